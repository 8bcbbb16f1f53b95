"""Cases and providers of the contrastive family.

Everybody gets the same tensors: row i of the second is row i of the first plus noise, so positives stand out as they do
in training and the softmax is neither flat nor saturated.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.reference import contrastive as reference

from .harness import Case, Formula, Inputs, Loss, Provider, Schedule, Sizes, Suite, Unavailable

FAMILY = "contrastive"
TEMPERATURE = 0.07  # CLIP's initial value
NT_XENT_TEMPERATURE = 0.5  # SimCLR's

# ---------------------------------------------------------------- inputs


def _pairs(rows: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(rows, dim, generator=generator)
    return first, first + torch.randn(rows, dim, generator=generator)


def clip_inputs(sizes: Sizes, dtype: torch.dtype, seed: int) -> Inputs:
    """Unit rows, as open_clip's model returns them, and the learned scale, which stays in float32."""
    image, text = (F.normalize(x, dim=1).to(dtype) for x in _pairs(sizes["rows"], sizes["dim"], seed))
    scale = torch.tensor(1 / TEMPERATURE)
    return tuple(x.requires_grad_() for x in (image, text, scale))


def info_nce_inputs(sizes: Sizes, dtype: torch.dtype, seed: int) -> Inputs:
    return tuple(x.to(dtype).requires_grad_() for x in _pairs(sizes["rows"], sizes["dim"], seed))


def nt_xent_inputs(sizes: Sizes, dtype: torch.dtype, seed: int) -> Inputs:
    """Two views: "rows" counts the anchors of both."""
    return tuple(x.to(dtype).requires_grad_() for x in _pairs(sizes["rows"] // 2, sizes["dim"], seed))


# ---------------------------------------------------------------- cost models


def _flops(factor: int) -> Callable[[Sizes], float]:
    return lambda s: float(factor) * s["rows"] ** 2 * s["dim"]


# What a method does that does not keep the matrix: products for S, S again in backward, dQ and dK. The dense code keeps
# S and does 6·M·N·D, so its share of the peak is overstated by a third.
TWO_SIDED = Formula("8·M·N·D (2 forward, 2 recomputed, 4 backward)", _flops(8))
# S is symmetric: half of it forward, half recomputed, each entry of the half used for both of its rows.
SELF_SIMILAR = Formula("4·n²·D (n²·D forward on one triangle, n²·D recomputed, 2·n²·D backward)", _flops(4))


def matrices(count: float) -> Formula:
    """Peak of code that holds `count` matrices of the similarities' shape at once (counted by measuring it)."""
    return Formula(f"{count:g}·rows²·itemsize", lambda s: count * s["rows"] ** 2 * s["itemsize"])


# ---------------------------------------------------------------- providers


def _clip_eager(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image @ text.t()
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def _info_nce_eager(query: Tensor, key: Tensor) -> Tensor:
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).t() / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def _nt_xent_eager(z0: Tensor, z1: Tensor) -> Tensor:
    z = F.normalize(torch.cat((z0, z1)), dim=1)
    logits = z @ z.t() / NT_XENT_TEMPERATURE
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z0)))


EAGER: Mapping[str, Loss] = {"clip_loss": _clip_eager, "info_nce": _info_nce_eager, "nt_xent": _nt_xent_eager}


# The library's dense formulas share nothing with its kernels.
TRUTH: Mapping[str, Loss] = {
    "clip_loss": cast(Loss, reference.clip_loss),  # a tensor, without output_dict
    "info_nce": lambda query, key: reference.info_nce(query, key, temperature=TEMPERATURE),
    "nt_xent": lambda z0, z1: reference.nt_xent(z0, z1, temperature=NT_XENT_TEMPERATURE),
}


def _fastloss(name: str, description: str, backend: str, full_only: bool = False) -> Provider:
    def builder(op: str) -> Callable[[], Loss]:
        def build() -> Loss:
            status = fastloss.backends().get(backend, "not available: unknown backend")
            if status.startswith("not available"):
                raise Unavailable(f"backend {backend}: {status.removeprefix('not available: ')}")
            if op == "clip_loss":
                return cast(Loss, fastloss.clip_loss)
            if op == "info_nce":
                return lambda query, key: fastloss.info_nce(query, key, temperature=TEMPERATURE)
            return lambda z0, z1: fastloss.nt_xent(z0, z1, temperature=NT_XENT_TEMPERATURE)

        return build

    def context() -> AbstractContextManager[object]:
        return fastloss.use_backend(backend)

    losses = {op: builder(op) for op in EAGER}
    return Provider(name, description, losses, full_only=full_only, context=context)


def _linear_cross_entropy(chunked: bool) -> Mapping[str, Callable[[], Loss]]:
    """The stock op with the keys as weight matrix and i as row i's target; two directions are two calls."""

    def stock() -> tuple[Callable[..., Tensor], Mapping[str, Any]]:
        if not hasattr(F, "linear_cross_entropy"):
            raise Unavailable("torch.nn.functional.linear_cross_entropy came with PyTorch 2.13")
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return F.linear_cross_entropy, {"options": options}

    def clip() -> Loss:
        loss, options = stock()

        def run(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
            target = torch.arange(len(image), device=image.device)
            forward = loss(scale * image, text, target, **options)
            return (forward + loss(scale * text, image, target, **options)) / 2

        return run

    def one_direction() -> Loss:
        loss, options = stock()

        def run(query: Tensor, key: Tensor) -> Tensor:
            query, key = F.normalize(query, dim=1) / TEMPERATURE, F.normalize(key, dim=1)
            return loss(query, key, torch.arange(len(query), device=query.device), **options)

        return run

    return {
        "clip_loss": clip,
        "info_nce": one_direction,
        "nt_xent": _unavailable("cannot leave out a row's own similarity"),
    }


def _ready(loss: Loss) -> Callable[[], Loss]:
    return lambda: loss


def _unavailable(reason: str) -> Callable[[], Loss]:
    def build() -> Loss:
        raise Unavailable(reason)

    return build


def _info_nce_package() -> Loss:
    info_nce = importlib.import_module("info_nce").info_nce
    return lambda query, key: info_nce(query, key, temperature=TEMPERATURE)


def _open_clip() -> Loss:
    loss: Loss = importlib.import_module("open_clip").ClipLoss()
    return loss


def _lightly() -> Loss:
    loss: Loss = importlib.import_module("lightly.loss").NTXentLoss(temperature=NT_XENT_TEMPERATURE)
    return loss


def _metric_learning(inner: str, temperature: float, symmetric: bool) -> Callable[[], Loss]:
    def build() -> Loss:
        losses = importlib.import_module("pytorch_metric_learning.losses")
        loss: Loss = losses.SelfSupervisedLoss(getattr(losses, inner)(temperature=temperature), symmetric=symmetric)
        return loss

    return build


def _compiled(op: str) -> Callable[[], Loss]:
    # Dynamic shapes: one compilation serves every size.
    return lambda: torch.compile(EAGER[op], fullgraph=True, dynamic=True)


_METRIC_LEARNING_CUBE = Formula(
    "17·rows³ bytes (a mask and four float matrices of positive pairs by negative pairs)",
    lambda s: 17.0 * s["rows"] ** 3,
)
_ONE_DIRECTION = "computes one direction only"

PROVIDERS = (
    _fastloss("fastloss", "this library, native backend", "native"),
    _fastloss("fastloss[portable]", "this library, backend in plain PyTorch", "portable", full_only=True),
    Provider(
        "eager",
        "the textbook code in plain PyTorch",
        {op: _ready(loss) for op, loss in EAGER.items()},
        {"clip_loss": matrices(4), "info_nce": matrices(3), "nt_xent": matrices(3.5)},
    ),
    Provider(
        "torch.compile",
        "the same code under torch.compile(fullgraph=True, dynamic=True)",
        {op: _compiled(op) for op in EAGER},
        {op: matrices(2) for op in EAGER},
        compiles=True,
    ),
    Provider(
        "linear_cross_entropy",
        "torch.nn.functional.linear_cross_entropy",
        _linear_cross_entropy(chunked=False),
        {"clip_loss": matrices(4), "info_nce": matrices(3)},
    ),
    Provider(
        "linear_cross_entropy[chunked]",
        "torch.nn.functional.linear_cross_entropy with LinearCrossEntropyOptions(), which never holds the whole matrix",
        _linear_cross_entropy(chunked=True),
        slow=True,
    ),
    Provider(
        "info_nce",
        "package info-nce-pytorch",
        {
            "info_nce": _info_nce_package,
            "clip_loss": _unavailable(_ONE_DIRECTION),
            "nt_xent": _unavailable("keeps a row's own similarity"),
        },
        {"info_nce": matrices(3)},
    ),
    Provider(
        "open_clip",
        "package open_clip_torch, ClipLoss",
        {"clip_loss": _open_clip},
        {"clip_loss": matrices(4)},
    ),
    Provider("lightly", "package lightly, NTXentLoss", {"nt_xent": _lightly}, {"nt_xent": matrices(5)}),
    Provider(
        "pytorch_metric_learning",
        "package pytorch-metric-learning, SupConLoss with one positive a row, which is NT-Xent",
        {"nt_xent": _metric_learning("SupConLoss", NT_XENT_TEMPERATURE, symmetric=True)},
        {"nt_xent": matrices(12.6)},
        slow=True,
    ),
    Provider(
        "pytorch_metric_learning[NTXentLoss]",
        "package pytorch-metric-learning, NTXentLoss",
        {
            "nt_xent": _metric_learning("NTXentLoss", NT_XENT_TEMPERATURE, symmetric=True),
            "info_nce": _metric_learning("NTXentLoss", TEMPERATURE, symmetric=False),
        },
        {"nt_xent": _METRIC_LEARNING_CUBE, "info_nce": _METRIC_LEARNING_CUBE},
        slow=True,
        full_only=True,
    ),
)

# ---------------------------------------------------------------- cases

_PROBED = frozenset({"fastloss", "eager"})
_SWEPT = frozenset({"fastloss", "eager", "torch.compile", "linear_cross_entropy[chunked]"})
_FULL_LARGE = Schedule(rounds=7, slow_rounds=3, budget=150)


def _clip(name: str, rows: int, dim: int, reason: str, **options: Any) -> Case:
    return Case(name, FAMILY, "clip_loss", reason, {"rows": rows, "dim": dim}, clip_inputs, TWO_SIDED, **options)


def _info_nce(name: str, rows: int, dim: int, reason: str, **options: Any) -> Case:
    return Case(name, FAMILY, "info_nce", reason, {"rows": rows, "dim": dim}, info_nce_inputs, TWO_SIDED, **options)


def _nt_xent(name: str, rows: int, dim: int, reason: str, **options: Any) -> Case:
    return Case(name, FAMILY, "nt_xent", reason, {"rows": rows, "dim": dim}, nt_xent_inputs, SELF_SIMILAR, **options)


def _sweep(rows: int) -> Case:
    quick = Schedule(rounds=max(3, min(30, 8192 // rows)), budget=6, timed=_SWEPT, memory=_SWEPT - {"torch.compile"})
    return _clip(
        f"clip-sweep-{rows}",
        rows,
        256,
        "how time and memory grow with the batch",
        sweep="clip_loss, D = 256",
        quick=quick if rows in (256, 1024, 4096) else None,
        full=Schedule(rounds=max(5, min(50, 32768 // rows)), slow_rounds=5, budget=60),
    )


CASES = (
    _clip(
        "clip-8192",
        8192,
        512,
        "the headline: a large CLIP batch, where the matrix no longer fits any cache",
        quick=Schedule(rounds=3, warmup=0, budget=30, timed=_SWEPT, memory=_SWEPT),
        full=_FULL_LARGE,
    ),
    _clip("clip-4096", 4096, 512, "a usual CLIP batch on one machine", full=Schedule(rounds=15, slow_rounds=5)),
    _clip(
        "clip-512",
        512,
        128,
        "a small batch, where overhead counts and the dense matrix fits in cache",
        quick=Schedule(rounds=40, warmup=2, slow_rounds=10, budget=5, memory=_PROBED),
        full=Schedule(rounds=200, warmup=5, slow_rounds=50),
    ),
    _clip(
        "clip-32768",
        32768,
        256,
        "a batch whose matrix alone is 4 GiB: what memory-flat is for",
        quick=Schedule(rounds=0, timed=frozenset({"fastloss"})),
        full=Schedule(rounds=0),
    ),
    _clip(
        "clip-4096-bfloat16",
        4096,
        512,
        "half precision, the usual training dtype",
        dtype=torch.bfloat16,
        full=Schedule(rounds=7, slow_rounds=3),
    ),
    _nt_xent(
        "nt-xent-8192",
        8192,
        512,
        "SimCLR with two views of 4096: one set of rows against itself",
        quick=Schedule(rounds=2, warmup=0, budget=20, timed=_PROBED | {"torch.compile"}, memory=_PROBED),
        full=_FULL_LARGE,
    ),
    _nt_xent(
        "nt-xent-512",
        512,
        128,
        "small enough for every peer",
        quick=Schedule(rounds=20, slow_rounds=2, budget=5, memory=_PROBED),
        full=Schedule(rounds=100, slow_rounds=5),
    ),
    _info_nce(
        "info-nce-8192",
        8192,
        512,
        "one direction with in-batch negatives, unnormalised inputs",
        quick=Schedule(rounds=2, warmup=0, budget=20, timed=_SWEPT, memory=_PROBED),
        full=_FULL_LARGE,
    ),
    _info_nce("info-nce-4096", 4096, 512, "the same at a usual batch", full=Schedule(rounds=15, slow_rounds=5)),
    *(_sweep(rows) for rows in (256, 512, 1024, 2048, 4096, 8192)),
)

SUITE = Suite(FAMILY, CASES, PROVIDERS, TRUTH, baseline="eager")
