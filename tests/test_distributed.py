"""Losses over the ranks of a process group against one process with all their rows.

Four processes run every case once, in groups of two, three and four of them; the tests compare what they wrote.
"""

from __future__ import annotations

import copy
import itertools
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from fastloss.benchmarks import scaling
from fastloss.benchmarks.distributed import open_clip_loss
from fastloss.benchmarks.scaling import LOSSES, Problem
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import fastloss
import fastloss.reference
from fastloss._distributed import AllGather, Ring, World
from fastloss.spherical import modules as spherical_modules
from fastloss.spherical.distributed import facts_of
from tests.support import assert_as_accurate_as_torch, peak_bytes

WORLDS = {2: [0, 2], 3: [1, 2, 3], 4: [0, 1, 2, 3]}  # group size: its processes
ROWS = {
    2: [(4, 4), (6, 3), (0, 5)],
    3: [(3, 3, 3), (5, 0, 2)],
    4: [(3, 3, 3, 3), (2, 5, 1, 0), (0, 0, 7, 0)],
}
SCHEDULES = ["all-gather", "ring"]
FORMS = ["factors", "weight"]  # of a FactoredOutput
VARIANTS = [
    "info_nce",
    "info_nce dot ids",
    "info_nce key_ids row_scale",
    "info_nce extra key_ids",
    "info_nce symmetric",
    "info_nce symmetric key_ids row_scale extra",
    "info_nce unpaired ids",
    "clip_loss",
    "clip_loss key_ids row_scale",
    "nt_xent",
    "nt_xent dot ids row_scale",
]
D, M = 6, 3
SCALE = {"info_nce": "temperature", "clip_loss": "logit_scale", "nt_xent": "temperature"}
FEATURES = {
    "info_nce": ("query", "positive_key"),
    "clip_loss": ("image_features", "text_features"),
    "nt_xent": ("z0", "z1"),
}


@dataclass(frozen=True)
class Case:
    variant: str
    rows: tuple[int, ...]
    schedule: str
    reduction: str = "mean"
    dtype: torch.dtype = torch.float64
    width: int = D
    frozen: tuple[str, ...] = ()
    keep: int | None = None  # bytes of similarities for the backward pass

    @property
    def function(self) -> str:
        return self.variant.split()[0]

    def __str__(self) -> str:
        more = "".join(f" {name} frozen" for name in self.frozen) + (f" {self.keep} kept" if self.keep else "")
        return f"{self.variant} {self.rows} {self.schedule} {self.reduction} {self.dtype}{more}".replace("torch.", "")


CASES = [
    *(
        Case(variant, rows, schedule)
        for variant in VARIANTS
        for world in WORLDS
        for rows in ROWS[world]
        for schedule in SCHEDULES
    ),
    *(
        Case(variant, (3, 5, 2), schedule, reduction)
        for variant in ("info_nce symmetric row_scale", "nt_xent")
        for schedule in SCHEDULES
        for reduction in ("sum", "none")
    ),
    *(
        Case(variant, (3, 5, 2), schedule, frozen=frozen)
        for variant in ("clip_loss", "clip_loss row_scale", "nt_xent row_scale", "nt_xent")
        for schedule in SCHEDULES
        for frozen in (
            FEATURES[variant.split()[0]],
            (FEATURES[variant.split()[0]][0], SCALE[variant.split()[0]]),
            (FEATURES[variant.split()[0]][1], SCALE[variant.split()[0]]),
            (SCALE[variant.split()[0]],),
        )
    ),
    *(
        Case(variant, (5, 4), "auto", keep=keep)
        for variant in ("clip_loss", "nt_xent")
        for keep in (8, 8 * 40)  # nothing, and the first block of clip_loss
    ),
    *(Case(variant, (3, 5, 2), s, width=0) for variant in ("info_nce", "clip_loss", "nt_xent") for s in SCHEDULES),
    *(Case(variant, (0, 0, 0), s, "sum") for variant in ("info_nce", "clip_loss", "nt_xent") for s in SCHEDULES),
    *(
        Case(variant, (300, 700), schedule, dtype=dtype, width=33)
        for variant in ("info_nce", "clip_loss", "nt_xent")
        for schedule in SCHEDULES
        for dtype in (torch.float32, torch.bfloat16)
    ),
]


def arguments(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The rows of all ranks: tensors with a gradient, those without, options. Extra negatives are one block a rank."""
    words = set(case.variant.split())
    generator = torch.Generator().manual_seed(sum(case.rows))
    n = sum(case.rows)

    def features(*shape: int) -> Tensor:
        return torch.randn(*shape, case.width, generator=generator, dtype=torch.float64).div(2).to(case.dtype)

    tensors = {name: features(n) for name in FEATURES[case.function]}
    scale = torch.tensor(0.7, dtype=torch.float64)
    if "row_scale" in words:
        scale = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
    tensors[SCALE[case.function]] = scale if case.dtype == torch.float64 else scale.float()
    fixed: dict[str, Tensor] = {}
    names = {"info_nce": ("query_ids", "key_ids"), "clip_loss": ("image_ids", "text_ids"), "nt_xent": ("ids", "")}
    first, second = names[case.function]
    if words & {"ids", "key_ids"}:
        fixed[first] = torch.randint(4, (n,), generator=generator)
    if "key_ids" in words:
        fixed[second] = torch.randint(4, (n,), generator=generator)
    if "extra" in words:
        tensors["extra_negatives"] = features(len(case.rows), M)
    if "unpaired" in words:
        tensors["negative_keys"] = features(len(case.rows), M)
        fixed["key_ids"] = torch.randint(4, (len(case.rows), M), generator=generator)
    options: dict[str, Any] = {"reduction": case.reduction}
    if "dot" in words:
        options["normalize"] = False
    if "symmetric" in words:
        options["symmetric"] = True
    return tensors, fixed, options


def of_rank(case: Case, rank: int, x: Tensor) -> Tensor:
    """A rank's part: of what has a row for each of all ranks, its rows; of what has a block a rank, its block."""
    if x.dim() == 0:
        return x
    if len(x) == len(case.rows) != sum(case.rows):
        return x[rank]
    start = sum(case.rows[:rank])
    return x[start : start + case.rows[rank]]


def upstream(case: Case) -> Tensor:
    """What reaches the loss: one number a row without a reduction."""
    if case.reduction != "none":
        return torch.tensor(1.7)
    views = 2 if case.function == "nt_xent" else 1
    return torch.linspace(0.3, 1.9, views * sum(case.rows), dtype=torch.float64)


def own_upstream(case: Case, rank: int) -> Tensor:
    full = upstream(case)
    if case.function == "nt_xent" and full.dim():
        return torch.cat([of_rank(case, rank, view) for view in full.chunk(2)])
    return of_rank(case, rank, full)


def run_case(case: Case, group: Any) -> dict[str, Tensor]:
    rank = distributed.get_rank(group)
    tensors, fixed, options = arguments(case)
    leaves = {
        name: of_rank(case, rank, x).clone().requires_grad_(name not in case.frozen) for name, x in tensors.items()
    }
    fixed = {name: of_rank(case, rank, x) for name, x in fixed.items()}
    with pytest.MonkeyPatch.context() as patch:
        if case.keep is not None:
            patch.setattr(fastloss.contrastive.ops, "KEEP_BYTES", case.keep)
        loss = getattr(fastloss, case.function)(**leaves, **fixed, **options, group=group, schedule=case.schedule)
    loss.backward(own_upstream(case, rank).to(loss.dtype))
    return {"loss": loss.detach(), **{name: x.grad for name, x in leaves.items() if x.requires_grad}}


def one_process(case: Case, api: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The loss of all rows and its gradients; the extra negatives of a rank join the queries of that rank."""
    tensors, fixed, options = arguments(case)
    leaves = {name: x.detach().to(dtype).requires_grad_(name not in case.frozen) for name, x in tensors.items()}
    if not {"extra_negatives", "negative_keys"} & set(leaves):
        loss = getattr(api, case.function)(**leaves, **fixed, **options)
    else:
        per_rank = []
        for rank in range(len(case.rows)):
            mine = {name: x[rank] for name, x in leaves.items() if name in ("extra_negatives", "negative_keys")}
            ids = {"key_ids": fixed["key_ids"][rank]} if "negative_keys" in mine else {}
            full = getattr(api, case.function)(**{**leaves, **mine, **fixed, **ids, **options, "reduction": "none"})
            per_rank.append(of_rank(case, rank, full))
        loss = torch.cat(per_rank).mean()
    loss.backward(upstream(case).to(loss.dtype))
    return {"loss": loss.detach(), **{name: x.grad for name, x in leaves.items() if x.requires_grad}}


def join(case: Case, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the ranks found, as one process would hold it, with gradients averaged as DistributedDataParallel does."""
    world = len(parts)
    joined: dict[str, Tensor] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name == "loss" and case.reduction == "none" and case.function == "nt_xent":
            views = [value.chunk(2) for value in values]
            joined[name] = torch.cat([torch.cat([view[v] for view in views]) for v in range(2)])
        elif name == "loss" and case.reduction == "none":
            joined[name] = torch.cat(values)
        elif values[0].dim() == 0:
            assert all(torch.equal(value, values[0]) for value in values), f"{name} differs between ranks"
            # Without a reduction the objective is the average over the ranks of what each makes of its rows.
            joined[name] = values[0] * (world if case.reduction == "none" and name != "loss" else 1)
        else:
            stacked = name in ("extra_negatives", "negative_keys")
            whole = torch.stack(values) if stacked else torch.cat(values)
            joined[name] = whole if case.reduction == "none" else whole / world
    return joined


def infinite_losses(group: Any | None, rank: int | None, schedule: str) -> list[Tensor]:
    """Of the rows of a rank, or all: the similarity of the first query and the key of another rank overflows."""
    queries, keys = torch.eye(2).repeat(3, 1), torch.eye(2).flip(0).repeat(3, 1)
    queries[0, 0] = keys[4, 0] = 1e20
    rows = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    options = {"normalize": False, "reduction": "none", "group": group, "schedule": schedule}
    pair = queries[rows], keys[rows]
    one, both = (fastloss.info_nce(*pair, symmetric=symmetric, **options) for symmetric in (False, True))
    return [one, both, *fastloss.nt_xent(*pair, **options).chunk(2)]


def mean_gradients_of_ddp(group: Any) -> dict[str, Tensor]:
    """An encoder and a learned scale under DistributedDataParallel, with other rows on each rank."""
    rank = distributed.get_rank(group)
    model = DistributedDataParallel(towers(), process_group=group)
    x = batch()
    start = sum(DDP_ROWS[:rank])
    features = model(x[start : start + DDP_ROWS[rank]])
    loss = fastloss.clip_loss(*features, group=group)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.module.named_parameters()}}


DDP_ROWS = (4, 2, 3, 5)


class Towers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = torch.nn.Linear(D, D), torch.nn.Linear(D, D)
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normalize = torch.nn.functional.normalize
        return normalize(self.image(x)), normalize(self.text(x)), self.logit_scale.exp()


def towers() -> Towers:
    torch.manual_seed(3)
    return Towers().double()


def batch() -> Tensor:
    return torch.randn(sum(DDP_ROWS), D, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


CLASSES = (3, 1, 6, 2)
CLASS_PAIRS, DATA_PAIRS = ((0, 1), (2, 3)), ((0, 2), (1, 3))  # ranks with the same data, with the same classes
LINEAR = ["linear_z_loss", "linear_spherical_softmax_loss", "linear_taylor_softmax_loss", "linear_one_hot_mse_loss"]


def linear_arguments() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is the same on all ranks, and what has a row a class."""
    generator = torch.Generator().manual_seed(5)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = torch.randint(sum(CLASSES), (9,), generator=generator)
    target[2] = -100
    same = {"hidden": numbers(9, D), "sample_weight": numbers(9).abs(), "target": target}
    return same, {"weight": numbers(sum(CLASSES), D), "bias": numbers(12) + 3, "class_weight": numbers(12).abs()}


def run_linear(function: Any, same: dict[str, Tensor], split: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    tensors = {name: x.clone() for name, x in {**same, **split}.items()}
    leaves = {name: tensors[name].requires_grad_() for name in ("hidden", "sample_weight", *split)}
    loss = function(**tensors, **options)
    (1.7 * loss).backward()
    return {"loss": loss.detach(), **{name: x.grad for name, x in leaves.items() if x.grad is not None}}


def own_of_classes(rank: int, x: Tensor) -> Tensor:
    return x[sum(CLASSES[:rank]) : sum(CLASSES[: rank + 1])]


def train_factored(layer: Any, dense: bool = False) -> dict[str, Tensor]:
    """Some steps, with large gradients so that U is stabilised, and all that a layer tells."""
    generator = torch.Generator().manual_seed(6)
    told = {}
    for step in range(6):
        hidden = torch.randn(7 if step else 3, D, generator=generator, dtype=torch.float64).requires_grad_()
        target = torch.randint(sum(CLASSES), (len(hidden), 2), generator=generator)
        share = torch.rand(len(hidden), 2, generator=generator, dtype=torch.float64)
        loss = layer(hidden, target, share)
        loss.backward()
        layer.step(0.3, 0.05)
        told |= {f"loss {step}": loss.detach(), f"gradient {step}": hidden.grad}
        if step == 3:
            layer.stabilise()
            layer.refresh()
    hidden = hidden.detach()
    values, classes = layer.topk(hidden, 5)
    told |= {"logits": layer.logits(hidden), "some": layer.logits(hidden, torch.tensor([0, 11, 3])), "topk": values}
    return {**told, "classes": classes, "drift": torch.tensor(layer.drift() < 1e-12)}


def factored_layer(rank: int | None, group: Any = None) -> fastloss.FactoredOutput:
    """With the classes of a rank, or all of them."""
    torch.manual_seed(7)
    linear = torch.nn.Linear(D, sum(CLASSES), dtype=torch.float64)
    if rank is not None:
        full, linear = linear, torch.nn.Linear(D, CLASSES[rank], dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(own_of_classes(rank, full.weight))
            linear.bias.copy_(own_of_classes(rank, full.bias))
    return fastloss.FactoredOutput.from_linear(linear, class_group=group, max_scale=1.05)


@contextmanager
def layers_of(form: str) -> Iterator[None]:
    """Layers keep the factors of their weight, or the weight, however many classes there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spherical_modules, "few", lambda classes, width: form == "weight")
        yield


def split_factored(group: Any, form: str) -> dict[str, Any]:
    with layers_of(form):
        return split_layer(group)


def split_layer(group: Any) -> dict[str, Any]:
    layer = factored_layer(distributed.get_rank(group), group)
    found: dict[str, Any] = train_factored(copy.deepcopy(layer))
    found["repeated"] = all(torch.equal(found[name], x) for name, x in train_factored(layer).items())
    found["weight"] = torch.cat((layer.to_linear().weight.detach(), layer.bias()[:, None]), 1)
    fresh = fastloss.FactoredOutput(4, 10, class_group=group)
    found["fresh"] = fresh.weight()
    return found


def split_classes(group: Any) -> dict[str, Any]:
    rank = distributed.get_rank(group)
    same, split = linear_arguments()
    mine = {name: own_of_classes(rank, x) for name, x in split.items()}
    found: dict[str, Any] = {
        name: run_linear(getattr(fastloss, name), same, mine, class_group=group) for name in LINEAR
    }
    changes: dict[str, dict[str, Any]] = {
        "range": {"target": torch.full((9,), 12)},
        "odd": {"bias": None},
        "one range": {"target": torch.full((9,), 12)},
        "order": {"target": same["target"].flip(0)},
        "weights": {"sample_weight": None},
        "margin": {"b": 2.0},
        "sharpness": {"a": -1.0},
    }
    for name, change in changes.items():
        change = change if rank == 1 or name == "range" else {}
        try:
            fastloss.linear_z_loss(**{**same, **mine, **change}, class_group=group)
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)
    return found | refusals_of_layers(group, rank)


def refusals_of_layers(group: Any, rank: int) -> dict[str, str]:
    """Errors of one rank's arguments, after each of which the next call works."""
    odd = rank == 1
    split, whole = fastloss.FactoredOutput(D, 10, class_group=group), fastloss.FactoredOutput(D, 10)
    hidden, target = torch.ones(3, D), torch.tensor([1, 2, 3])

    def step_of_most() -> None:
        loss = split(hidden, target)
        if not odd:
            loss.backward()
        fastloss.FactoredSGD(split).step()

    def forward_twice() -> None:
        split(hidden, target)
        if not odd:
            split.zero_grad()
        try:
            split(hidden, target)
        finally:
            split.zero_grad()

    calls: dict[str, Any] = {
        "forward": forward_twice,
        "width": lambda: split(hidden[:, : D - odd], target),
        "class": lambda: split(hidden, target + 10 * odd),
        "order": lambda: split(hidden, torch.tensor([2, 1, 3]) if odd else target),
        "weights": lambda: split(hidden, target, sample_weight=torch.ones(3) if odd else None),
        "ignored": lambda: split(hidden, torch.tensor([0, -100 if odd else 0, 3])),
        "split lr": lambda: split.step(0.1 + odd),
        "split refused": lambda: split.step(-1.0 if odd else 0.1),
        "split backward": step_of_most,
        "without classes": lambda: fastloss.FactoredOutput.from_linear(
            torch.nn.Linear(D, 0 if odd else 5), class_group=group
        ),
        "lr": lambda: whole.step(-1.0 if odd else 0.1, group=group),
        "transform": lambda: torch.func.grad(lambda x: fastloss.clip_loss(x, x, 1.0, group=group))(hidden),
    }
    heard = {}
    for layer in (split, whole):
        layer(hidden, target).backward()
        layer.zero_grad()
    for name, call in calls.items():
        try:
            call()
        except (ValueError, RuntimeError) as error:
            heard[f"layer {name}"] = str(error)
    mesh = DeviceMesh.from_group(group, "cpu")
    whole.zero_grad()
    whole(hidden, target).backward()
    whole.step(0.1, group=mesh)
    return heard


def data_beside_classes(rank: int, pairs: dict[tuple[int, int], Any]) -> dict[str, Any]:
    """Ranks 0 and 1 split the classes of some data, ranks 2 and 3 those of other data."""
    classes = next(group for ranks, group in pairs.items() if rank in ranks and ranks in CLASS_PAIRS)
    data = next(group for ranks, group in pairs.items() if rank in ranks and ranks in DATA_PAIRS)
    layer = factored_layer(None)
    start = layer.to_linear()
    with torch.no_grad():
        half = torch.nn.Linear(D, 6, dtype=torch.float64)
        for own, full in ((half.weight, start.weight), (half.bias, start.bias)):
            own.copy_(full[6 * (rank % 2) :][:6])
    layer = fastloss.FactoredOutput.from_linear(half, class_group=classes)
    hidden, target = two_batches()[rank // 2]
    layer(hidden, target).backward()
    errors = []
    odd = rank == 1
    for lr in (-1.0 if odd else 0.1, 0.1 + odd):
        try:
            layer.step(lr, group=data)
        except (ValueError, RuntimeError) as error:
            errors.append(str(error))
    layer.step(0.1, 0.01, group=data)
    return {"errors": errors, "weight": layer.weight()}


def two_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(2, 5, D, generator=generator, dtype=torch.float64)
    return list(zip(hidden, torch.randint(12, (2, 5), generator=generator), strict=True))


def with_modules(rank: int) -> dict[str, Any]:
    """The modules as their libraries' users write them, each beside the function."""
    group = distributed.group.WORLD
    generator = torch.Generator().manual_seed(rank)
    x, y = torch.rand(2, 3, D, generator=generator).unbind()
    found = {
        "info_nce": (fastloss.InfoNCE(group=group)(x, y), fastloss.info_nce(x, y, group=group)),
        "ring": (
            fastloss.InfoNCE(symmetric=True, group=group, schedule="ring")(x, y),
            fastloss.info_nce(x, y, symmetric=True, group=group, schedule="ring"),
        ),
        "clip": (
            fastloss.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=4)(x, y, 2.0),
            fastloss.clip_loss(x, y, 2.0, group=group),
        ),
        "nt_xent": (
            fastloss.NTXentLoss(gather_distributed=True)(x, y),
            fastloss.nt_xent(x, y, group=group),
        ),
    }
    try:
        fastloss.ClipLoss(rank=rank, world_size=2)
    except ValueError as error:
        return {**found, "error": str(error)}
    return found


def refusals(group: Any, rank: int) -> dict[str, str]:
    """What a rank hears when the arguments of one do not fit, by name of the fault."""
    x = torch.ones(3, D)
    odd = rank == 1
    calls: dict[str, Any] = {
        "width": lambda: fastloss.clip_loss(x[:, : D - odd], x[:, : D - odd], 1.0, group=group),
        "dtype": lambda: fastloss.clip_loss(x.double() if odd else x, x.double() if odd else x, 1.0, group=group),
        "reduction": lambda: fastloss.info_nce(x, x, reduction="sum" if odd else "mean", group=group),
        "symmetric": lambda: fastloss.info_nce(x, x, symmetric=odd, group=group),
        "temperature": lambda: fastloss.nt_xent(x, x, 0.5 + odd, group=group),
        "digits": lambda: fastloss.clip_loss(x, x, torch.tensor(14.285714 + 1e-6 * odd), group=group),
        "row scales": lambda: fastloss.nt_xent(x, x, torch.ones(3) if odd else 1.0, group=group),
        "gradient": lambda: fastloss.nt_xent(
            x.clone().requires_grad_(odd), x, torch.tensor(0.5, requires_grad=odd), group=group
        ),
        "gradient of negatives": lambda: fastloss.info_nce(x, x, x.clone().requires_grad_(odd), group=group),
        "ids": lambda: fastloss.nt_xent(x, x, ids=torch.arange(3) if odd else None, group=group),
        "schedule": lambda: fastloss.nt_xent(x, x, group=group, schedule="ring" if odd else "auto"),
        "function": lambda: fastloss.nt_xent(x, x, group=group) if odd else fastloss.clip_loss(x, x, 1.0, group=group),
        "refused": lambda: fastloss.clip_loss(x, x[: 3 - odd], 1.0, group=group),
    }
    heard = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, TypeError, RuntimeError) as error:
            heard[name] = f"{type(error).__name__}: {error}"
    return heard


PROBLEMS = [
    (Problem(loss, world, 6, 8, 8, 8), schedule) for loss in LOSSES for world in WORLDS for schedule in SCHEDULES
]


@contextmanager
def counters(size: int) -> Iterator[dict[str, float]]:
    """Bytes that this rank hands to its transfers, and flops of its matrix products."""
    counts = {"bytes": 0.0, "flops": 0.0}
    patch = pytest.MonkeyPatch()

    def watch(owner: Any, name: str, kind: str, cost: Any) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            counts[kind] += cost(*args)
            return original(*args, **options)

        patch.setattr(owner, name, counted)

    def sends(ops: list[Any]) -> float:
        return sum(op.tensor.nbytes for op in ops if op.op is distributed.isend)

    gather = "all_gather_single" if hasattr(distributed, "all_gather_single") else "all_gather_into_tensor"
    watch(distributed, "batch_isend_irecv", "bytes", sends)
    watch(distributed, "all_to_all_single", "bytes", lambda out, x, *_: x.nbytes)
    watch(distributed, "all_gather", "bytes", lambda out, x: (size - 1) * x.nbytes)
    watch(distributed, gather, "bytes", lambda out, x: (size - 1) * x.nbytes)
    watch(distributed, "all_reduce", "bytes", lambda x: 2 * (size - 1) / size * x.nbytes)
    watch(torch, "mm", "flops", lambda a, b: 2 * a.shape[0] * a.shape[1] * b.shape[1])
    watch(torch, "addmm", "flops", lambda c, a, b: 2 * a.shape[0] * a.shape[1] * b.shape[1])
    watch(Tensor, "addmm_", "flops", lambda c, a, b: 2 * a.shape[0] * a.shape[1] * b.shape[1])
    try:
        yield counts
    finally:
        patch.undo()


def count(problem: Problem, schedule: str, group: Any) -> dict[str, float]:
    x, y = torch.rand(2, problem.rows, problem.width, dtype=torch.float64).unbind()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    leaves = {name: z.requires_grad_() for name, z in zip(FEATURES[problem.loss], (x, y), strict=True)}
    with counters(problem.world) as counts:
        options = {SCALE[problem.loss]: scale, "group": group, "schedule": schedule}
        getattr(fastloss, problem.loss)(**leaves, **options).backward()
    return counts


def beside_open_clip(rank: int) -> dict[str, list[Tensor]]:
    """Loss and gradients of a rank's features, by open_clip over four ranks and by the drop-in."""
    generator = torch.Generator().manual_seed(rank)
    features = list(torch.rand(2, 3, D, generator=generator, dtype=torch.float64).unbind())
    ours = fastloss.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=4)
    found = {}
    for name, loss in (("ours", ours), ("theirs", open_clip_loss(rank, 4))):
        leaves = [x.clone().requires_grad_() for x in features]
        value = loss(*leaves, torch.tensor(20.0, dtype=torch.float64))
        found[name] = [value.detach(), *torch.autograd.grad(value, leaves)]
    return found


WIDE = Problem("clip_loss", 4, 64, 2048)


def peak_blocks(group: Any, schedule: str) -> float:
    """Peak memory of a step in blocks of the rows of a rank; similarities and tiles are small beside one."""
    x, y = torch.rand(2, WIDE.rows, WIDE.width).unbind()
    x, y = x.requires_grad_(), y.requires_grad_()

    def step() -> None:
        torch.autograd.grad(fastloss.clip_loss(x, y, 1.0, group=group, schedule=schedule), (x, y))

    step()
    return peak_bytes(step) / x.nbytes


TIMEOUT = timedelta(seconds=20)


def with_compile_and_meshes(group: Any) -> dict[str, Any]:
    """A compiled step breaks its graph at the loss; a mesh is a group; sharded tensors are refused with advice."""
    found: dict[str, Any] = {}
    x = torch.eye(4, D).requires_grad_()

    def step(x: Tensor) -> Tensor:
        return fastloss.nt_xent(2 * x, x + 1, normalize=False, group=group) * 3

    for name, function in (("eager", step), ("compiled", torch.compile(step, backend="eager"))):
        loss = function(x)
        found[name] = (loss.detach(), *torch.autograd.grad(loss, x))
    torch.compiler.reset()
    try:
        torch.compile(step, backend="eager", fullgraph=True)(x)
    except Exception as error:
        found["fullgraph"] = type(error).__name__
    mesh = DeviceMesh.from_group(group, "cpu")
    found["mesh"] = fastloss.nt_xent(2 * x, x + 1, normalize=False, group=mesh).detach() * 3
    try:
        fastloss.nt_xent(DTensor.from_local(x, mesh, [Shard(0)]), x)
    except TypeError as error:
        found["sharded"] = str(error)
    leaf = torch.eye(4, D, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(fastloss.clip_loss(leaf, leaf + 1, 1.0, group=group), leaf, create_graph=True)
    try:
        first.sum().backward()
    except RuntimeError as error:
        found["second"] = str(error)
    return found


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4, timeout=TIMEOUT
        )
        groups = {size: distributed.new_group(ranks, timeout=TIMEOUT) for size, ranks in WORLDS.items()}
        found: dict[str, Any] = {}
        for case in CASES:
            if rank in WORLDS[len(case.rows)]:
                found[str(case)] = run_case(case, groups[len(case.rows)])
        found["ddp"] = mean_gradients_of_ddp(groups[4])
        for problem, schedule in PROBLEMS:
            if rank in WORLDS[problem.world]:
                found[f"{problem} {schedule}"] = count(problem, schedule, groups[problem.world])
        for size in (3, 4):
            if rank in WORLDS[size]:
                found[f"peak {size}"] = {schedule: peak_blocks(groups[size], schedule) for schedule in SCHEDULES}
        found["open_clip"] = beside_open_clip(rank)
        found["modules"] = with_modules(rank)
        found |= {form: split_factored(groups[4], form) for form in FORMS}
        found["classes"] = split_classes(groups[4])
        pairs = {ranks: distributed.new_group(ranks, timeout=TIMEOUT) for ranks in CLASS_PAIRS + DATA_PAIRS}
        found["data beside classes"] = data_beside_classes(rank, pairs)
        if rank in WORLDS[3]:
            mine = distributed.get_rank(groups[3])
            found["infinite"] = {schedule: infinite_losses(groups[3], mine, schedule) for schedule in SCHEDULES}
            found["refusals"] = refusals(groups[3], mine)
        if rank in WORLDS[2]:
            found["compile"] = with_compile_and_meshes(groups[2])
        torch.save(found, f"{folder}/{rank}.pt")
        distributed.barrier()
        if rank == 3:
            return  # this one is gone: the others must not wait for ever
        try:
            fastloss.clip_loss(torch.eye(3), torch.eye(3), 1.0, group=groups[4])
        except Exception as error:
            Path(f"{folder}/{rank}.lost").write_text(repr(error))
    except BaseException:
        Path(f"{folder}/{rank}.error").write_text(traceback.format_exc())
        raise


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("needs gloo")
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=worker, args=(rank, str(folder))) for rank in range(4)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(120)
    assert not [process for process in workers if process.is_alive()], "a rank hangs"
    errors = [path.read_text() for path in folder.glob("*.error")]
    assert not errors, errors[0]
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_find_what_one_process_finds(ranks: tuple[Path, list[dict[str, Any]]], case: Case) -> None:
    parts = [ranks[1][process][str(case)] for process in WORLDS[len(case.rows)]]
    actual = join(case, parts)
    truth = one_process(case, fastloss.reference, torch.float64)
    assert set(actual) == set(truth)
    if case.dtype == torch.float64:
        for name, expected in truth.items():
            scale = max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
            assert actual[name].dtype == torch.float64
            torch.testing.assert_close(
                actual[name], expected, rtol=0, atol=1e-12 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )
        return
    baseline = one_process(case, fastloss, case.dtype)
    for name, expected in truth.items():
        assert_as_accurate_as_torch(
            actual[name], expected, baseline[name].to(actual[name].dtype), magnitude=1.0, name=name
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_similarity_that_overflows_is_an_infinite_loss(ranks: tuple[Path, list[dict[str, Any]]], schedule: str) -> None:
    parts = [ranks[1][process]["infinite"][schedule] for process in WORLDS[3]]
    for expected, *of_ranks in zip(infinite_losses(None, None, schedule), *parts, strict=True):
        assert expected.isinf().any()
        torch.testing.assert_close(torch.cat(of_ranks), expected)


def test_averaged_gradients_of_an_encoder_are_those_of_one_process(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    model = towers()
    loss = fastloss.reference.clip_loss(*model(batch()))
    loss.backward()
    for part in (found["ddp"] for found in ranks[1]):
        torch.testing.assert_close(part["loss"], loss.detach(), rtol=1e-12, atol=0)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(part[name], parameter.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("width", "ValueError: clip_loss: the width must be the same on all ranks of the group, got 6, 5, 6"),
        (
            "dtype",
            "ValueError: clip_loss: the dtype must be the same on all ranks of the group, got torch.float32, torch.f",
        ),
        ("reduction", "ValueError: info_nce: `reduction` must be the same on all ranks"),
        (
            "symmetric",
            "ValueError: info_nce: `symmetric` must be the same on all ranks of the group, got False, True, False",
        ),
        (
            "temperature",
            "ValueError: nt_xent: `temperature` must be the same on all ranks of the group, got 0.5, 1.5, 0.5 (rank by",
        ),
        (
            "digits",
            "clip_loss: `logit_scale` must be the same on all ranks of the group, got 14.2857141, 14.2857151",
        ),
        (
            "row scales",
            "ValueError: nt_xent: whether `temperature` has one value a row must be the same on all ranks",
        ),
        (
            "gradient",
            "ValueError: nt_xent: which tensors need a gradient must be the same on all ranks of the group, got none, "
            "`z0` and `temperature`, none (rank by rank)",
        ),
        ("gradient of negatives", "got none, `negative_keys`, none (rank by rank)"),
        (
            "ids",
            "ValueError: nt_xent: whether `ids` is given must be the same on all ranks of the group, got False, True",
        ),
        ("schedule", "ValueError: nt_xent: `schedule` must be the same on all ranks of the group"),
        ("function", "must call the same function"),
    ],
)
def test_ranks_that_disagree_all_hear_of_it(ranks: tuple[Path, list[dict[str, Any]]], fault: str, message: str) -> None:
    for process in WORLDS[3]:
        assert message in ranks[1][process]["refusals"][fault]


def test_bad_input_of_one_rank_ends_the_call_on_all(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    heard = [ranks[1][process]["refusals"]["refused"] for process in WORLDS[3]]
    assert heard[1].startswith("ValueError: clip_loss: `text_features` must have size 3 in dimension 0")
    for message in (heard[0], heard[2]):
        assert message.startswith("RuntimeError: clip_loss: rank 1 of the group refused its arguments")


def test_rank_that_is_gone_is_an_error_on_the_others(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    assert sorted(path.name for path in ranks[0].glob("*.lost")) == ["0.lost", "1.lost", "2.lost"]


def test_compile_breaks_its_graph_at_the_loss(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for process in WORLDS[2]:
        found = ranks[1][process]["compile"]
        assert all(torch.equal(a, b) for a, b in zip(found["eager"], found["compiled"], strict=True))
        assert found["fullgraph"] == "Unsupported"


def test_mesh_is_a_group_and_sharded_tensors_are_refused_with_advice(
    ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    for process in WORLDS[2]:
        found = ranks[1][process]["compile"]
        assert torch.equal(found["mesh"], found["eager"][0])
        assert "nt_xent: `z0` must be a plain tensor, got a DTensor" in found["sharded"]


def test_second_derivative_raises(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for process in WORLDS[2]:
        assert "no second derivative" in ranks[1][process]["compile"]["second"]


@pytest.mark.parametrize("name", LINEAR)
def test_ranks_that_split_the_classes_find_what_one_process_finds(
    ranks: tuple[Path, list[dict[str, Any]]], name: str
) -> None:
    truth = run_linear(getattr(fastloss.reference, name), *linear_arguments())
    for rank, found in enumerate(ranks[1]):
        part = found["classes"][name]
        assert set(part) == set(truth)
        for key, expected in truth.items():
            mine = own_of_classes(rank, expected) if key in linear_arguments()[1] else expected
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(part[key], mine, rtol=0, atol=1e-12 * scale)


def test_ranks_that_split_the_classes_hear_of_bad_input(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    refused = "rank 1 of the group refused its arguments"
    messages = {
        "range": ("`target` must hold classes 0 to 11, or `ignore_index`, got 12",) * 2,
        "odd": ("whether `bias` is given must be the same on all ranks",) * 2,
        "one range": ("target` must be the same on all ranks",) * 2,
        "order": ("`target` (its checksum) must be the same on all ranks",) * 2,
        "weights": ("whether `sample_weight` is given must be the same on all ranks",) * 2,
        "margin": ("`b` must be the same on all ranks of the group, got 0, 2, 0, 0",) * 2,
        "sharpness": (refused, "`a` must be finite and greater than 0"),
        "layer forward": (refused, "second forward before a step"),
        "layer width": (refused, "`hidden` must have size 6"),
        "layer class": (refused, "`target` must be in [0, 10)"),
        "layer order": ("`target` (its checksum) must be the same on all ranks",) * 2,
        "layer weights": ("got none, `sample_weight`, none, none (rank by rank)",) * 2,
        "layer ignored": ("smallest `target` must be the same on all ranks of the group, got 0, -1, 0, 0",) * 2,
        "layer split lr": ("`lr` must be the same on all ranks",) * 2,
        "layer split refused": (refused, "`lr` must be finite and at least 0"),
        "layer split backward": ("the number of examples with a gradient must be the same on all ranks",) * 2,
        "layer without classes": ("must have at least one class, got 5, 0, 5, 5",) * 2,
        "layer lr": (refused, "`lr` must be finite and at least 0"),
        "layer transform": ("does not work under torch.func's transforms",) * 2,
    }
    for rank, found in enumerate(ranks[1]):
        for name, message in messages.items():
            assert message[rank == 1] in found["classes"][name], name


def test_checksum_tells_orders_of_targets_apart() -> None:
    orders = list(itertools.permutations(range(1, 7)))
    found = [facts_of(torch.tensor(order))["`target` (its checksum)"] for order in orders]
    assert len(set(map(float, found))) == len(orders)
    assert all(int(float(x)) == x for x in found)  # as the ranks send it


@pytest.mark.parametrize(("problem", "schedule"), PROBLEMS, ids=str)
def test_cost_model_counts_what_the_ranks_do(
    ranks: tuple[Path, list[dict[str, Any]]], problem: Problem, schedule: str
) -> None:
    """On the whole: nothing is sent twice, and each pair of rows is multiplied once forward and twice backward."""
    counts = [ranks[1][process][f"{problem} {schedule}"] for process in WORLDS[problem.world]]
    assert sum(c["bytes"] for c in counts) == pytest.approx(problem.world * scaling.sent_bytes(problem, schedule))
    assert sum(c["flops"] for c in counts) == problem.world * scaling.flops(problem)


def test_scaling_sheet_is_up_to_date() -> None:
    assert Path(scaling.__file__).with_suffix(".md").read_text() == "\n".join(scaling.sheet()) + "\n"


def test_auto_gathers_what_is_small_unless_there_is_only_one_block() -> None:
    assert Problem("clip_loss", 2, 10, 8).schedule == "ring"
    assert Problem("nt_xent", 3, 10, 8).schedule == "ring"
    assert Problem("clip_loss", 3, 10, 8).schedule == "all-gather"
    assert Problem("clip_loss", 4, 1 << 14, 256).schedule == "all-gather"
    assert Problem("clip_loss", 4, (1 << 14) + 1, 256).schedule == "ring"
    for rows, tour in ((1 << 14, AllGather), ((1 << 14) + 1, Ring)):
        world = World(None, 0, 4, (rows,) * 4, "auto", 4 * rows * 256 * 4, False)
        assert type(world.tour(3, Tensor.add_)) is tour
        assert type(world.tour(1, Tensor.add_)) is Ring


@pytest.mark.parametrize("form", FORMS)
def test_factored_layer_with_split_classes_is_the_layer_of_one_process(
    ranks: tuple[Path, list[dict[str, Any]]], form: str
) -> None:
    with layers_of(form):
        layer = factored_layer(None)
        truth = train_factored(layer)
        weight = torch.cat((layer.weight(), layer.bias()[:, None]), 1)
    assert bool(layer.moved_directions) == (form == "factors")
    parts = [found[form] for found in ranks[1]]
    for part in parts:
        assert part["repeated"]
        for name, expected in truth.items():
            torch.testing.assert_close(part[name], expected, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(torch.cat([part["weight"] for part in parts]), weight, rtol=1e-9, atol=1e-11)
    assert [len(part["fresh"]) for part in parts] == [3, 3, 2, 2]
    assert len(torch.cat([part["fresh"] for part in parts]).unique(dim=0)) == 10


def test_factored_layer_with_split_classes_and_other_data_beside(
    ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    layer = factored_layer(None)
    for hidden, target in two_batches():
        (layer(hidden, target) / 2).backward()
        layer.accumulate = True
    layer.step(0.1, 0.01)
    refused = "of the group refused its arguments"
    for rank, found in enumerate(ranks[1]):
        part = found["data beside classes"]
        mine = layer.weight()[6 * (rank % 2) :][:6]
        torch.testing.assert_close(part["weight"], mine, rtol=1e-9, atol=1e-11)
        bad, other_rate = part["errors"]
        assert ("`lr` must be finite and at least 0" if rank == 1 else refused) in bad
        assert ("`lr` and `weight_decay` must be the same on all ranks" if rank % 2 else refused) in other_rate


def test_modules_are_the_functions_over_all_processes(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank, found in enumerate(ranks[1]):
        modules = dict(found["modules"])
        message = modules.pop("error")
        assert (
            message == f"ClipLoss: `rank` and `world_size` must be {rank} and 4, those of the group, got {rank} and 2"
        )
        assert len(modules) == 4
        for ours, function in modules.values():
            assert torch.equal(ours, function)


def test_memory_of_the_ring_does_not_grow_with_the_ranks(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for process in WORLDS[3]:
        three, four = (ranks[1][process][f"peak {size}"] for size in (3, 4))
        # The gradients of both inputs, two blocks of rows and two of results, and what the op makes of one block. With
        # three ranks there is no block to come while results are on their way.
        assert three["ring"] == pytest.approx(2 + 3 + 2, abs=0.2)
        assert four["ring"] == pytest.approx(2 + 4 + 2, abs=0.2)
        # One more block of rows, of results to go, and of results that come.
        assert four["all-gather"] == pytest.approx(three["all-gather"] + 3, abs=0.1)


def test_gradients_are_open_clips_and_the_loss_is_the_mean_of_its_ranks(
    ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    found = [part["open_clip"] for part in ranks[1]]
    mean = torch.stack([part["theirs"][0] for part in found]).mean()
    for part in found:
        torch.testing.assert_close(part["ours"][0], mean, rtol=1e-12, atol=0)
        for ours, theirs in zip(part["ours"][1:], part["theirs"][1:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
