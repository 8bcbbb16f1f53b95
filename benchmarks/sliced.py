"""Cases and providers of the sliced family: two normal clouds, the second shifted, on the same directions for all."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.reference import sliced as reference

from .harness import Case, Formula, Inputs, Loss, Provider, Schedule, Sizes, Suite, Unavailable, relative_norm_error

FAMILY = "sliced"

# ---------------------------------------------------------------- inputs


def directions(like: Tensor, slices: int) -> Tensor:
    """(L, d) unit vectors, the same for every provider and, but for rounding, every dtype."""
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(slices, like.shape[-1], dtype=torch.float64, generator=generator)
    return F.normalize(theta, dim=1).float().to(like.dtype)


def _points(sizes: Sizes, others: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = (sizes["batch"],) if "batch" in sizes else ()
    x = torch.randn(*batch, sizes["rows"], sizes["dim"], generator=generator)
    return x, torch.randn(*batch, others, sizes["dim"], generator=generator) + 0.5


def equal_inputs(sizes: Sizes, dtype: torch.dtype, seed: int) -> Inputs:
    # The directions are an input, with a gradient, like the points.
    x, y = _points(sizes, sizes["rows"], seed)
    return tuple(t.to(dtype).requires_grad_() for t in (x, y, directions(x, sizes["slices"])))


def forward_inputs(sizes: Sizes, dtype: torch.dtype, seed: int) -> Inputs:
    return tuple(t.detach() for t in equal_inputs(sizes, dtype, seed))


def weighted_inputs(sizes: Sizes, dtype: torch.dtype, seed: int) -> Inputs:
    """Clouds of n and about 3n/4 points with random weights."""
    x, y = _points(sizes, sizes["rows"] * 37123 // 50000, seed)
    theta = directions(x, sizes["slices"])
    generator = torch.Generator().manual_seed(seed + 1)
    weights = [torch.rand(len(t), generator=generator) + 0.5 for t in (x, y)]
    return tuple(t.to(dtype).requires_grad_() for t in (x, y, theta, *(w / w.sum() for w in weights)))


# ---------------------------------------------------------------- cost models


def _flops(s: Sizes) -> float:
    return 16.0 * s["rows"] * s["dim"] * s["slices"] * s.get("batch", 1)


EQUAL = Formula("16·n·d·L (projections, gradients in the points and directions; sorting is not counted)", _flops)
FORWARD = Formula("4·n·d·L (projections; sorting is not counted)", lambda s: _flops(s) / 4)
WEIGHTED = Formula("14·n·d·L (the same with m = 3n/4)", lambda s: _flops(s) * 0.87)


def _numbers(count: float) -> Formula:
    return Formula(
        f"{count:g}·n·L·itemsize", lambda s: count * s["rows"] * s["slices"] * s.get("batch", 1) * s["itemsize"]
    )


# ---------------------------------------------------------------- providers


def _equal_eager(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    return ((theta @ x.mT).sort(-1)[0] - (theta @ y.mT).sort(-1)[0]).square().mean()


def _weighted_eager(x: Tensor, y: Tensor, theta: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return reference.sliced_wasserstein(x, y, x_weights=a, y_weights=b, projections=theta)


def _equal_truth(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    return reference.sliced_wasserstein(x, y, projections=theta)


EQUAL_OP, FORWARD_OP, WEIGHTED_OP = (
    "sliced_wasserstein",
    "sliced_wasserstein without gradients",
    "weighted_sliced_wasserstein",
)
EAGER: Mapping[str, Loss] = {EQUAL_OP: _equal_eager, FORWARD_OP: _equal_eager, WEIGHTED_OP: _weighted_eager}
TRUTH: Mapping[str, Loss] = {EQUAL_OP: _equal_truth, FORWARD_OP: _equal_truth, WEIGHTED_OP: _weighted_eager}


def _fastloss(name: str, description: str, backend: str, full_only: bool = False) -> Provider:
    def build() -> Loss:
        status = fastloss.backends().get(backend, "not available: unknown backend")
        if status.startswith("not available"):
            raise Unavailable(f"backend {backend}: {status.removeprefix('not available: ')}")
        return lambda x, y, theta, a=None, b=None: fastloss.sliced_wasserstein(
            x, y, projections=theta, x_weights=a, y_weights=b
        )

    def context() -> AbstractContextManager[object]:
        return fastloss.use_backend(backend)

    return Provider(name, description, dict.fromkeys(EAGER, build), full_only=full_only, context=context)


def _ready(loss: Loss) -> Callable[[], Loss]:
    return lambda: loss


def _pot() -> Loss:
    ot = importlib.import_module("ot")

    def run(x: Tensor, y: Tensor, theta: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        # POT divides weights by nothing; their derivative is taken along sums of one, as everybody's here.
        a, b = (None if w is None else w / w.sum() for w in (a, b))
        distance: Tensor = ot.sliced_wasserstein_distance(x, y, a, b, projections=theta.T)
        return distance.square()

    return run


PROVIDERS = (
    _fastloss("fastloss", "this library, native backend", "native"),
    _fastloss("fastloss[portable]", "this library, backend in plain PyTorch", "portable", full_only=True),
    Provider(
        "eager",
        "the textbook code in plain PyTorch: project, sort rows, pair",
        {op: _ready(loss) for op, loss in EAGER.items()},
        {EQUAL_OP: _numbers(11), FORWARD_OP: _numbers(11), WEIGHTED_OP: _numbers(45)},
    ),
    Provider(
        "pot",
        "package POT, ot.sliced_wasserstein_distance, squared",
        dict.fromkeys(EAGER, _pot),
        dict.fromkeys(EAGER, _numbers(42)),
        slow=True,
    ),
)

# ---------------------------------------------------------------- cases


PROBLEMS = {
    EQUAL_OP: (equal_inputs, EQUAL),
    FORWARD_OP: (forward_inputs, FORWARD),
    WEIGHTED_OP: (weighted_inputs, WEIGHTED),
}


def _case(name: str, rows: int, dim: int, slices: int, reason: str, op: str = EQUAL_OP, **options: Any) -> Case:
    setup, flops = PROBLEMS[op]
    return Case(name, FAMILY, op, reason, {"rows": rows, "dim": dim, "slices": slices}, setup, flops, **options)


_OURS = frozenset({"fastloss"})

CASES = (
    _case(
        "sliced-50000",
        50000,
        3,
        256,
        "shapes and point clouds: many points in space",
        quick=Schedule(rounds=2, warmup=0, slow_rounds=1, budget=20, memory=_OURS),
        full=Schedule(rounds=7, slow_rounds=2, budget=120),
    ),
    _case(
        "sliced-8192",
        8192,
        64,
        256,
        "features of a large batch",
        quick=Schedule(rounds=5, slow_rounds=1, budget=10, memory=_OURS),
        full=Schedule(rounds=15, slow_rounds=3, budget=60),
    ),
    _case(
        "sliced-1024",
        1024,
        64,
        128,
        "features of a small batch, where overhead counts",
        quick=Schedule(rounds=20, slow_rounds=2, budget=5, memory=_OURS),
        full=Schedule(rounds=100, slow_rounds=10, budget=60),
    ),
    _case(
        "sliced-forward-50000",
        50000,
        3,
        256,
        "the value alone: keys are sorted without their indices",
        FORWARD_OP,
        quick=Schedule(rounds=2, budget=10, timed=frozenset({"fastloss", "eager"}), memory=frozenset()),
        full=Schedule(rounds=7, slow_rounds=2, budget=60),
    ),
    _case(
        "sliced-memory-100000",
        100000,
        128,
        1000,
        "many directions: memory must not grow with their number",
        quick=Schedule(rounds=0, timed=_OURS, memory=_OURS),
        full=Schedule(rounds=2, slow_rounds=0, budget=60),
    ),
    _case(
        "sliced-weighted-50000",
        50000,
        3,
        256,
        "clouds of 50,000 and 37,123 points with weights, gradients in the weights included",
        WEIGHTED_OP,
        quick=Schedule(rounds=1, warmup=0, budget=20, timed=frozenset({"fastloss", "pot"}), memory=_OURS),
        full=Schedule(rounds=3, slow_rounds=1, budget=120),
    ),
)

SUITE = Suite(FAMILY, CASES, PROVIDERS, TRUTH, baseline="eager", gradient_error=relative_norm_error)
