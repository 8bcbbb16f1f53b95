"""The sliced ops on CUDA and ROCm devices: sorts and pairs of equal clouds in Triton, the block loop of `tiles.py`.

Projections are products of the vendor's library. A slice of float32 numbers that fits a program is sorted there, its
(number, index) packed into 64 bits; the second of two clouds of equal size is paired with the first in the program that
sorts it, which writes the cost and the gradients in the projections. Longer slices are sorted by `fastloss._cuda`
where it was built, else by `torch.sort`, as are all float64 ones; a kernel of the same text then pairs what is sorted.
Clouds of unequal sizes or with weights have their slices sorted in the same ways and merged by the code of
`portable.py`. Equal numbers stay in the order of their atoms, -0 equals 0. No atomics but in the merge, whose float64
sums PyTorch adds up in any order unless `torch.use_deterministic_algorithms` asks otherwise.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss import _triton
from fastloss._backends import cuda_core
from fastloss._triton import Config, Specimen
from fastloss.sliced import portable, tiles

# ---------------------------------------------------------------- kernels

_LARGEST_KEY = tl.constexpr(0x7FFFFFFF)  # a NaN's


@triton.jit
def _keys(x):
    """int32 in the order of float32 numbers; -0 is 0, NaN comes last."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, _LARGEST_KEY, bits ^ ((bits >> 31) & _LARGEST_KEY))


@triton.jit
def _numbers(keys):
    return (keys ^ ((keys >> 31) & _LARGEST_KEY)).to(tl.float32, bitcast=True)


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.jit
def _bit(dims: tl.constexpr, axis: tl.constexpr):
    """0 and 1 along one axis of a hypercube."""
    return tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (dims - 1 - axis))


@triton.jit
def _ascending(x):
    """Sorts the last axis of x (ROWS, BLOCK) by the bitonic network.

    `tl.sort` compares half of the pairs the other way round; complementing their numbers instead takes fewer registers,
    and spills none at twice the length.
    """
    dims: tl.constexpr = _log2(x.numel)
    levels: tl.constexpr = _log2(x.shape[1])
    h = tl.reshape(x, [2] * dims if dims else [1])
    for level in tl.static_range(1, levels + 1):
        flip = 0
        if level < levels:
            flip = -_bit(dims, dims - 1 - level).to(h.dtype)
        h = h ^ flip
        for axis in tl.static_range(dims - level, dims):
            other = tl.sum(h, axis, keep_dims=True) - h  # modulo a power of two
            h = tl.where((h > other) != (_bit(dims, axis) != 0), other, h)
        h = h ^ flip
    return tl.reshape(h, x.shape)


@triton.jit
def _sorted_rows(x, place, inside, cols, ORDER: tl.constexpr):
    """Numbers of rows in order, NaN throughout a row that has one, and, with ORDER, where they came from."""
    keys = _keys(tl.load(x + place, mask=inside, other=float("nan")))
    if ORDER:
        packed = _ascending((keys.to(tl.int64) << 32) | cols[None, :].to(tl.int64))
        value = _numbers((packed >> 32).to(tl.int32))
        order = packed.to(tl.int32)
    else:
        value = _numbers(_ascending(keys))
        order = cols[None, :]
    broken = tl.max(tl.where(inside & (value != value), 1, 0), 1)[:, None] > 0
    return tl.where(broken, float("nan"), value), order, broken


@triton.jit(do_not_specialize=["slices"])
def _sort_kernel(x, values, order, slices, n, ORDER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """`Epilogue.sort` of `tiles.py`; order is left alone without ORDER."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows < slices)[:, None] & (cols < n)[None, :]
    place = rows.to(tl.int64)[:, None] * n + cols[None, :]
    value, source, broken = _sorted_rows(x, place, inside, cols, ORDER)
    tl.store(values + place, value, mask=inside)
    if ORDER:
        tl.store(order + place, tl.where(broken, cols[None, :], source), mask=inside)


@triton.jit
def _magnitude(d, POWER: tl.constexpr):
    """|d|^POWER; through float64, whose logarithm keeps all digits of a float32 result."""
    if POWER == 0:
        result = tl.full(d.shape, 1.0, d.dtype)
    elif POWER == 1:
        result = tl.abs(d)
    elif POWER == 2:
        result = d * d
    else:
        result = tl.exp2(tl.log2(tl.abs(d).to(tl.float64)) * POWER).to(d.dtype)
    return result


@triton.jit(do_not_specialize=["slices", "tiles"])
def _pair_kernel(
    u, u_order, v, v_order, scale, cost, u_out, v_out, slices, n, tiles,
    P: tl.constexpr, SORT: tl.constexpr, WANT_U: tl.constexpr, WANT_V: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pairs u with v, which is sorted, and so is u without SORT; cost (slices, tiles) are tiles' shares of the mean.

    u_out and v_out receive scale times the derivatives of |u - v|^P over P, at u_order and v_order. u_out may be u with
    SORT: no number is written before all of its row are read.
    """
    tile = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    exists = rows < slices
    inside = exists[:, None] & (cols < n)[None, :]
    start = rows.to(tl.int64)[:, None] * n
    place = start + cols[None, :]
    if SORT:
        x, i, _ = _sorted_rows(u, place, inside, cols, WANT_U or WANT_V)
    else:
        x = tl.load(u + place, mask=inside, other=0.0)
    y = tl.load(v + place, mask=inside, other=0.0)
    d = x - y
    total = tl.sum(tl.where(inside, _magnitude(d, P), 0.0).to(tl.float64), 1) / n
    tl.store(cost + rows.to(tl.int64) * tiles + tile, total, mask=exists)
    if WANT_U or WANT_V:
        s = tl.load(scale + rows, mask=exists, other=0.0)[:, None]
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
        slope = d * s if P == 2 else sign * _magnitude(d, P - 1) * s
        slope = tl.where((x != x) | (y != y), float("nan"), slope)
        if WANT_U:
            if not SORT:
                i = tl.load(u_order + place, mask=inside, other=0)
            tl.store(u_out + start + i, slope, mask=inside)
        if WANT_V:
            j = tl.load(v_order + place, mask=inside, other=0)
            tl.store(v_out + start + j, -slope, mask=inside)


# ---------------------------------------------------------------- configurations

BLOCK_BYTES = (
    64 << 20
)  # of projections at a time: 167 slices of 50,000 atoms in each cloud, more than a card has multiprocessors

# Numbers of a program that takes several short slices, and of the longest slice that a program sorts; warps and
# registers for that, which are all of a multiprocessor's: told less, compilers spill to leave some to another program.
_DEFAULT = Config((2048, 8192), 32, maxnreg=64)
_TABLE = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_90", "sm_100"), _DEFAULT),
    "gfx942": Config((2048, 8192), 16),
    _triton.INTERPRETER: Config((64, 16)),
}
_TILE = 1024  # of slices that are sorted already
_FUSED = (1, 2)  # powers; others would spill beside the sort
_MOST_TOGETHER = 2**31 - 1  # numbers that `fastloss._cuda` sorts in one call
_MOST_REGISTERS = 255  # that a thread can name


def _share(n: int, table: Config, longest: int) -> Config:
    """Rows and columns of a program for slices of n numbers; as many numbers a thread as in the longest slice."""
    block = min(triton.next_power_of_2(n), longest)
    rows = max(1, table.blocks[0] // block)
    warps = max(1, table.num_warps * rows * block // table.blocks[1])
    limit = table.maxnreg and min(_MOST_REGISTERS, table.maxnreg * table.num_warps // warps)
    return Config((rows, block), warps, maxnreg=limit)


def _options(share: Config) -> dict[str, int]:
    return {"ROWS": share.blocks[0], "BLOCK": share.blocks[1], **share.options(bool(torch.version.hip))}


# ---------------------------------------------------------------- launches


def _sort(x: Tensor, with_order: bool) -> tuple[Tensor, Tensor]:
    """Rows of x (S, n) in order, NaN throughout where there is one, and their order, empty if not asked for."""
    table = _triton.pick(_TABLE, x.device)
    slices, n = x.shape
    if x.dtype == torch.float64 or n > table.blocks[1]:
        return _sort_long(x)
    values = torch.empty_like(x)
    order = torch.empty(x.shape if with_order else (0,), dtype=torch.int32, device=x.device)
    share = _share(n, table, table.blocks[1])
    with _triton.on(x):
        _sort_kernel[(triton.cdiv(slices, share.blocks[0]),)](
            x, values, order, slices, n, ORDER=with_order, **_options(share)
        )
    return values, order


def _sort_long(x: Tensor) -> tuple[Tensor, Tensor]:
    core = cuda_core() if x.is_cuda else None
    if core is None or x.dtype == torch.float64 or x.numel() > _MOST_TOGETHER:
        return portable.Epilogue().sort(x)
    values, order = torch.empty_like(x), torch.empty(x.shape, dtype=torch.int32, device=x.device)
    with _triton.on(x):
        scratch = torch.empty(core.sort_scratch_bytes(*x.shape), dtype=torch.uint8, device=x.device)
        stream = torch.cuda.current_stream(x.device).cuda_stream
        core.sort_rows(
            x.data_ptr(), *x.shape, values.data_ptr(), order.data_ptr(), scratch.data_ptr(), len(scratch), stream
        )
    return values, order


def _pair(u: Tensor, v: Tensor, p: float, factor: Tensor | None, cost: Tensor, want_u: bool, want_v: bool) -> None:
    """`Epilogue.transport` of `tiles.py` between clouds of equal size and weights."""
    slices, n = u.shape
    table = _triton.pick(_TABLE, u.device)
    fused = n <= table.blocks[1] and p in _FUSED
    share = _share(n, table, table.blocks[1] if fused else _TILE)
    wanted = factor is not None
    sorted_v, v_order = _sort(v, wanted)
    sorted_u, u_order = (u, v_order) if fused else _sort(u, wanted)
    tiles_of_slice = triton.cdiv(n, share.blocks[1])
    sums = cost.unsqueeze(1) if tiles_of_slice == 1 else cost.new_empty((slices, tiles_of_slice))
    scale = None if factor is None else (factor * p / n).float()
    with _triton.on(u):
        _pair_kernel[(tiles_of_slice, triton.cdiv(slices, share.blocks[0]))](
            sorted_u, u_order, sorted_v, v_order, scale, sums, u, v, slices, n, tiles_of_slice,
            P=p, SORT=fused, WANT_U=wanted and want_u, WANT_V=wanted and want_v, **_options(share),
        )  # fmt: skip
    if tiles_of_slice > 1:
        torch.sum(sums, 1, out=cost)


class _Epilogue(portable.Epilogue):
    block_bytes = BLOCK_BYTES

    def transport(
        self,
        u: Tensor,
        v: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        p: float,
        factor: Tensor | None,
        cost: Tensor,
        scratch: tuple[Tensor, int],
        want_u: bool,
        want_v: bool,
        want_a: bool,
        want_b: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        if a is not None or b is not None or u.shape != v.shape or u.dtype == torch.float64:
            return super().transport(u, v, a, b, p, factor, cost, scratch, want_u, want_v, want_a, want_b)
        _pair(u, v, p, factor, cost, want_u, want_v)
        return None, None

    def ordered(self, u: Tensor) -> tuple[Tensor, Tensor]:
        values, order = _sort(u, True)
        return values, order.long()

    def sort(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return _sort(u, True)


_epilogue = _Epilogue()
sliced_mean_fwd = partial(tiles.mean_forward, _epilogue)
sliced_mean_bwd = tiles.mean_backward
sliced_costs_fwd = partial(tiles.costs_forward, _epilogue)
sliced_costs_bwd = partial(tiles.costs_backward, _epilogue)
sort_slices_fwd = partial(tiles.sort_forward, _epilogue)
sort_slices_bwd = tiles.sort_backward


# ---------------------------------------------------------------- specimens for the gates


def specimens(target: str, candidates: bool) -> list[Specimen]:
    """The longest slices. With `candidates`, shorter ones, p = 1 and sorts alone, which are a part of pairing, too."""
    longest = _TABLE[target].blocks[1]
    found = [_pair_specimen(longest, 2, True, wanted, target) for wanted in (True, False)]
    found += [_pair_specimen(_TILE, 1.5, False, True, target), _sort_specimen(64, True, target)]
    if candidates:
        found += [_sort_specimen(n, True, target, " candidate") for n in (1024, longest // 2, longest)]
        found += [_sort_specimen(longest, False, target, " candidate")]
        found += [_pair_specimen(n, 2, True, True, target, " candidate") for n in (64, 1024, longest // 2)]
        found += [_pair_specimen(longest, 1, True, wanted, target, " candidate") for wanted in (False, True)]
    return found


def _specimen(name: str, kernel: Any, types: dict[str, str], flags: dict[str, Any], n: int, target: str) -> Specimen:
    share = _share(n, _TABLE[target], n)
    constants = flags | {"ROWS": share.blocks[0], "BLOCK": share.blocks[1]}
    return Specimen(f"{name}, {n} atoms", kernel, types, constants, share, frozenset({*types} - {"slices", "tiles"}))


def _sort_specimen(n: int, order: bool, target: str, note: str = "") -> Specimen:
    types = {"x": "*fp32", "values": "*fp32", "order": "*i32", "slices": "i32", "n": "i32"}
    name = f"sort{' with order' if order else ''}{note}"
    return _specimen(name, _sort_kernel, types, {"ORDER": order}, n, target)


def _pair_specimen(n: int, p: float, sort: bool, wanted: bool, target: str, note: str = "") -> Specimen:
    types = dict.fromkeys(("u", "v", "scale", "u_out", "v_out"), "*fp32") | {"cost": "*fp64"}
    types |= dict.fromkeys(("u_order", "v_order"), "*i32") | dict.fromkeys(("slices", "n", "tiles"), "i32")
    flags = {"P": p, "SORT": sort, "WANT_U": wanted, "WANT_V": wanted}
    name = f"{'sort and pair' if sort else 'pair'}{' with gradient' if wanted else ''}, p = {p}{note}"
    return _specimen(name, _pair_kernel, types, flags, n, target)
