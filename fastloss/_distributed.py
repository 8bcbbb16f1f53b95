"""Losses over the ranks of a process group: what they agree on beforehand, and how blocks of rows travel.

A loss is a sum over pairs (row, row). Every rank visits the blocks of rows of other ranks, one after the other, and
returns to their owners what it found out about them: a `Tour`. Two of them, with one interface:

AllGather  all blocks at once; the results go back by one all-to-all. Holds the rows of all ranks.
Ring       block by block from the right neighbour, the next one travelling while this one is computed with; partial
           results travel along. Holds two blocks of rows and two of results. Blocks are sent again in the backward
           pass, unless there is only one.

Convention of gradients: those of the *sum over the ranks* of what the ranks return, which is what backward on every
rank computes. A loss of the same value L on all W ranks so gives W dL/dx to the rows x of a rank, and the average over
the ranks (DistributedDataParallel, FSDP) makes dL/d(parameter) of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from fastloss._checks import FLOATS
from fastloss._ops import needs_grad, once

SCHEDULES = ("auto", "all-gather", "ring")
# "auto": up to this size of the rows of all ranks together they are gathered, beyond it they go round in the ring.
# Gathered rows are held for the backward pass, where the ring has to send them again: two thirds of the ring's bytes.
# If only one block is to be visited, the ring holds it, and gathering has no advantage left.
GATHER_BYTES = 64 << 20
HEADER = 32  # numbers that the ranks show each other before any work
_AGREED, _REFUSED = 0.0, 1.0
_ONE_SCALE, _EITHER, _ROW_SCALES = 0.0, 1.0, 2.0

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Combine = Callable[[Tensor, Tensor], Tensor]  # adds the second to the first in place


def eager(function: F) -> F:
    """Dynamo breaks its graph here: point-to-point sends and their order are not for it to trace."""
    result: F = torch.compiler.disable(function)
    return result


@dataclass(frozen=True)
class World:
    """A group of more than one rank, and what its ranks have agreed on."""

    group: Any
    rank: int
    size: int
    rows: tuple[int, ...]  # of each rank
    schedule: str
    gathered_bytes: int  # the rows of all ranks
    row_scales: bool  # every row has a scale of its own

    def views(self, count: int) -> World:
        """The same with `count` rows for each of a rank's."""
        rows = tuple(count * n for n in self.rows)
        return replace(self, rows=rows, gathered_bytes=count * self.gathered_bytes)

    def own(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these rows of all ranks are this rank's, and their places here; 0 for those of others."""
        local = ids - sum(self.rows[: self.rank])
        mine = (ids >= 0) & (local >= 0) & (local < self.rows[self.rank])
        return mine, torch.where(mine, local, 0)

    def __deepcopy__(self, memo: Any) -> World:
        return self  # a group cannot be copied, and nothing here changes

    def tour(self, hops: int, combine: Combine, held: Sequence[Tensor] = ()) -> Tour:
        """Blocks of the next `hops` ranks; `held` is what an earlier tour left."""
        small = hops > 1 and self.gathered_bytes <= GATHER_BYTES
        gathers = self.schedule == "all-gather" or (self.schedule == "auto" and small)
        return (AllGather if gathers else Ring)(self, hops, combine, held)


class Tour(Protocol):
    """One visit of the blocks of other ranks. Iterate over `blocks`, `give` the result of each but the own one."""

    held: list[Tensor]  # what a second tour need not send again

    def blocks(self, fixed: Sequence[Tensor], fresh: Sequence[Tensor] = ()) -> Iterator[tuple[int, list[Tensor]]]:
        """(owner, its tensors), the own ones among them. `fixed` are the tensors that an earlier tour may have held."""
        ...

    def give(self, owner: int, part: Tensor) -> None:
        """A result (rows of the owner, any width) for the owner of the block just visited."""
        ...

    def returned(self) -> Tensor:
        """What the others gave for this rank's rows, combined."""
        ...


@eager
def agree(
    function: str,
    group: Any,
    x: Tensor,
    scale: tuple[str, Tensor] | None,
    differentiable: Mapping[str, Tensor | None],
    schedule: str,
    same: Mapping[str, Any],
) -> World | None:
    """The world of a loss whose arguments fit together on all ranks; None for a group of one.

    One small all-gather. `x` is the rank's block of rows; `scale` a name and a tensor, () or (rows,); `differentiable`
    has the tensors by name of which all ranks or none may need a gradient; `same` what must be equal on all ranks, by
    the words for it.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{function}: with a group of processes it does not work under torch.func's transforms")
    size = dist.get_world_size(group)
    if size == 1:
        return None
    same = {
        "the width": x.shape[1],
        "the dtype": x.dtype,
        "`schedule`": schedule,
        **same,
        "which tensors need a gradient": {label: needs_grad(t)[0] for label, t in differentiable.items()},
    }
    # One value for one row may be either; the others tell. Reading a value must not wait for a device.
    name, kind, value = "", _EITHER, 0.0
    if scale is not None:
        name, factor = scale
        kind = _ROW_SCALES if factor.dim() else _EITHER if len(x) == 1 else _ONE_SCALE
        value = float(factor.detach()) if factor.dim() == 0 and factor.device.type == "cpu" else 0.0
    table = exchange(function, group, [len(x), kind, value, *(_code(v) for v in same.values())])

    def differ(what: str, got: Sequence[str]) -> ValueError:
        shown = ", ".join(got)
        return ValueError(f"{function}: {what} must be the same on all ranks of the group, got {shown} (rank by rank)")

    rows, kinds, values, *columns = zip(*table, strict=True)
    for (what, mine), codes in zip(same.items(), columns, strict=True):
        if len(set(codes)) > 1:
            raise differ(what, [_text(mine, code) for code in codes])
    row_scales = _ROW_SCALES in kinds
    if row_scales and _ONE_SCALE in kinds:
        raise differ(f"whether `{name}` has one value a row", [str(k != _ONE_SCALE) for k in kinds])
    if not row_scales and len({str(v) for v in values}) > 1:  # as text, NaN is itself
        raise differ(f"`{name}`", _told_apart(values))
    gathered = int(size * max(rows) * x.shape[1] * x.element_size())
    return World(group, dist.get_rank(group), size, tuple(int(n) for n in rows), schedule, gathered, row_scales)


def announced(function: str, group: Any, check: Callable[..., T], *args: Any) -> T:
    """check(*args); the other ranks, which wait for this one to `agree`, are told if it raises."""
    if group is None:
        return check(*args)
    try:
        return check(*args)
    except (TypeError, ValueError, RuntimeError):
        if dist.get_world_size(group) > 1:
            _show(group, [_REFUSED, zlib.crc32(function.encode())])
        raise


def exchange(function: str, group: Any, numbers: Sequence[float]) -> list[list[float]]:
    """These numbers of all ranks, which call the same function and have not refused their arguments (`announced`)."""
    table = _show(group, [_AGREED, zlib.crc32(function.encode()), *numbers])
    for rank, shown in enumerate(table):
        if shown[0] == _REFUSED:
            raise RuntimeError(f"{function}: rank {rank} of the group refused its arguments; its own error says why")
    if len({shown[1] for shown in table}) > 1:
        raise ValueError(f"{function}: all ranks of the group must call the same function, some called another")
    return [shown[2 : 2 + len(numbers)] for shown in table]


def _show(group: Any, header: list[float]) -> list[list[float]]:
    """The headers of all ranks; on the CPU if the group has a backend there, where reading them waits for nobody."""
    kinds = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
    device = "cpu" if "cpu" in kinds else kinds[0]
    mine = torch.tensor(header + [0.0] * (HEADER - len(header)), dtype=torch.float64, device=device)
    shown = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shown, mine, group=group)
    table: list[list[float]] = torch.stack(shown).tolist()
    return table


def _code(value: Any) -> float:
    if isinstance(value, torch.dtype):
        return FLOATS.index(value)
    if isinstance(value, str):
        return zlib.crc32(value.encode())
    if isinstance(value, dict):
        return sum(1 << i for i, flag in enumerate(value.values()) if flag)
    return float(value)


def _text(value: Any, code: float) -> str:
    """What another rank's code of this rank's `value` stands for."""
    if isinstance(value, torch.dtype):
        return str(FLOATS[int(code)])
    if isinstance(value, bool):
        return str(bool(code))
    if isinstance(value, str):
        return repr(value) if code == _code(value) else "another"
    if isinstance(value, dict):
        return " and ".join(f"`{name}`" for i, name in enumerate(value) if int(code) >> i & 1) or "none"
    return f"{code:.17g}"


def _told_apart(values: Sequence[float]) -> list[str]:
    """In as few digits as tell those that differ apart."""
    for digits in (6, 9, 17):
        shown = [f"{v:.{digits}g}" for v in values]
        if len(set(shown)) == len({str(v) for v in values}):
            break
    return shown


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, x: Tensor) -> Tensor:
        ctx.group = group
        return all_sum(group, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, once("contrastive", all_sum, ctx.group, grad)


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, x: Tensor) -> Tensor:
        return all_sum(group, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


class Copied(torch.autograd.Function):
    """A tensor that all ranks have, of which each uses a copy: the gradients of the copies add up, times a factor."""

    @staticmethod
    def forward(ctx: Any, family: str, group: Any, factor: float, x: Tensor) -> Tensor:
        ctx.family, ctx.group, ctx.factor = family, group, factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor]:
        return None, None, None, once(ctx.family, all_sum, ctx.group, grad) * ctx.factor


def all_sum(group: Any, x: Tensor) -> Tensor:
    """The sum of x over the ranks, without a gradient."""
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total


@eager
def total(world: World, x: Tensor) -> Tensor:
    """The sum of x over the ranks, on every rank."""
    result: Tensor = _Total.apply(world.group, x)
    return result


@eager
def sum_of_parts(group: Any, x: Tensor) -> Tensor:
    """The sum of x over the ranks, which all do the same with it: the gradient of a rank's part is that of the sum."""
    result: Tensor = _Parts.apply(group, x)
    return result


@eager
def shared(world: World, scale: Tensor) -> Tensor:
    """The scale (rows,) of this rank's rows, or () of all ranks.

    The gradient of one for all is the average over the ranks, on every rank: that of one process, and another average
    over the ranks leaves it as it is.
    """
    if world.row_scales:
        return scale.reshape(-1)
    result: Tensor = Copied.apply("contrastive", world.group, 1 / world.size, scale)
    return result


class AllGather:
    def __init__(self, world: World, hops: int, combine: Combine, held: Sequence[Tensor] = ()) -> None:
        self.world, self.hops, self.combine = world, hops, combine
        self.held = list(held)
        self.most = max(world.rows)
        self.outgoing: Tensor | None = None
        self.given = 0

    def blocks(self, fixed: Sequence[Tensor], fresh: Sequence[Tensor] = ()) -> Iterator[tuple[int, list[Tensor]]]:
        rank, size = self.world.rank, self.world.size
        known = bool(self.held)
        gathered, works = list(self.held), []
        for x in (*(() if known else fixed), *fresh):
            out, work = self._gather(x)
            gathered.append(out)
            works.append(work)
        self.held = gathered[: len(fixed)]
        own = (rank, [*fixed, *fresh])
        if not known:  # the own block while the others are on their way; later, while the results are on theirs
            yield own
        for work in works:
            work.wait()
        for hop in range(1, self.hops + 1):
            owner = (rank + hop) % size
            start = owner * self.most
            yield owner, [x[start : start + self.world.rows[owner]] for x in gathered]
        if known:
            yield own

    def _gather(self, x: Tensor) -> tuple[Tensor, Any]:
        """Blocks of all ranks, each padded to the longest."""
        if len(x) < self.most:
            x = torch.cat((x, x.new_zeros((self.most - len(x), *x.shape[1:]))))
        out = x.new_empty((self.world.size * self.most, *x.shape[1:]))
        # PyTorch 2.13 renamed the function
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return out, gather(out, x.contiguous(), group=self.world.group, async_op=True)

    def give(self, owner: int, part: Tensor) -> None:
        rank, size, rows = self.world.rank, self.world.size, self.world.rows
        near = [(other - rank) % size <= self.hops and other != rank for other in range(size)]
        splits = [n if visited else 0 for n, visited in zip(rows, near, strict=True)]
        if self.outgoing is None:
            self.outgoing = part.new_empty((sum(splits), *part.shape[1:]))
        start = sum(splits[:owner])
        self.outgoing[start : start + rows[owner]] = part
        self.given += 1
        if self.given == self.hops:
            # Every rank sends each sum's terms to its owner, which adds them in the order of the ranks: gloo's own
            # reduce-scatter is an all-reduce, twice the bytes, and the order of others is not fixed.
            visitors = [(rank - other) % size <= self.hops and other != rank for other in range(size)]
            self.incoming = part.new_empty((self.hops, rows[rank], *part.shape[1:]))
            self.work = dist.all_to_all_single(
                self.incoming.flatten(0, 1),
                self.outgoing,
                [rows[rank] if visitor else 0 for visitor in visitors],
                splits,
                group=self.world.group,
                async_op=True,
            )

    def returned(self) -> Tensor:
        self.work.wait()
        result = self.incoming[0]
        for part in self.incoming[1:]:
            result = self.combine(result, part)
        return result


class Ring:
    def __init__(self, world: World, hops: int, combine: Combine, held: Sequence[Tensor] = ()) -> None:
        self.world, self.hops, self.combine = world, hops, combine
        self.held = list(held)
        self.given = 0
        self.partial: Tensor | None = None
        self.works: list[Any] = []

    def blocks(self, fixed: Sequence[Tensor], fresh: Sequence[Tensor] = ()) -> Iterator[tuple[int, list[Tensor]]]:
        rank, size = self.world.rank, self.world.size
        own = block = [x.contiguous() for x in (*fixed, *fresh)]
        if self.held:
            coming, works = self._pass_on(block[len(fixed) :], rank + 1)
            _wait(works)
            yield (rank + 1) % size, [*self.held, *coming]
            yield rank, own  # while the results for the other travel
            return
        for hop in range(self.hops):
            coming, works = self._pass_on(block, rank + hop + 1)
            yield (rank + hop) % size, block
            _wait(works)
            block, works = coming, []
        if self.hops == 1:
            self.held = block[: len(fixed)]
        yield (rank + self.hops) % size, block

    def _pass_on(self, block: list[Tensor], following: int) -> tuple[list[Tensor], list[Any]]:
        """To the left; from the right comes the block of the rank `following`."""
        rank, size, rows = self.world.rank, self.world.size, self.world.rows
        coming = [x.new_empty((rows[following % size], *x.shape[1:])) for x in block]
        return coming, self._transfer(block, (rank - 1) % size, coming, (rank + 1) % size, tag=0)

    def give(self, owner: int, part: Tensor) -> None:
        rank, size, rows = self.world.rank, self.world.size, self.world.rows
        _wait(self.works)
        self.works = []  # which hold what was sent
        if self.partial is not None:
            part, self.partial = self.combine(part, self.partial), None
        self.given += 1
        # On goes the block's partial result with the block; from the last visitor, home.
        last = self.given == self.hops
        target, source, subject = (
            (owner, (rank - self.hops) % size, rank) if last else ((rank - 1) % size, (rank + 1) % size, owner + 1)
        )
        self.partial = part.new_empty((rows[subject % size], *part.shape[1:]))
        self.works = self._transfer([part.contiguous()], target, [self.partial], source, tag=1)

    def returned(self) -> Tensor:
        _wait(self.works)
        assert self.partial is not None
        return self.partial

    def _transfer(self, sent: list[Tensor], to: int, received: list[Tensor], source: int, tag: int) -> list[Any]:
        """Starts both. Empty blocks are not sent: both sides know the sizes."""
        group = self.world.group
        ops = [dist.P2POp(dist.isend, x, group=group, tag=tag, group_peer=to) for x in sent if x.numel()]
        ops += [dist.P2POp(dist.irecv, x, group=group, tag=tag, group_peer=source) for x in received if x.numel()]
        return dist.batch_isend_irecv(ops) if ops else []


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()
