"""Cases and providers of the spherical family.

Logits are standard normal with the target raised by three, as in a model that has begun to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from fastloss.reference import spherical as reference

from .harness import Case, Formula, Inputs, Loss, Provider, Schedule, Sizes, Suite, Unavailable

FAMILY = "spherical"


def _target(rows: int, classes: int, device: torch.device | None = None) -> Tensor:
    return torch.arange(rows, device=device) * 997 % classes


# ---------------------------------------------------------------- inputs


def logits_inputs(sizes: Sizes, dtype: torch.dtype, seed: int) -> Inputs:
    rows, classes = sizes["rows"], sizes["classes"]
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))
    logits[torch.arange(rows), _target(rows, classes)] += 3
    return (logits.to(dtype).requires_grad_(),)


def linear_inputs(sizes: Sizes, dtype: torch.dtype, seed: int) -> Inputs:
    """Each hidden state leans towards the weights of its class."""
    generator = torch.Generator().manual_seed(seed)
    rows, classes, dim = sizes["rows"], sizes["classes"], sizes["dim"]
    weight = torch.randn(classes, dim, generator=generator) / dim**0.5
    hidden = torch.randn(rows, dim, generator=generator) + 3 * weight[_target(rows, classes)]
    return tuple(x.to(dtype).requires_grad_() for x in (hidden, weight))


# ---------------------------------------------------------------- cost models

# Memory-bound: seven operations a logit, forward and backward; the share of the peak of products says nothing here.
ROWS = Formula("7·B·C", lambda s: 7.0 * s["rows"] * s["classes"])
TRAFFIC = Formula("12·B·C bytes (read twice, the gradient written once)", lambda s: 12.0 * s["rows"] * s["classes"])


def _dense_linear(s: Sizes) -> float:
    return 6.0 * s["rows"] * s["classes"] * s["dim"]


# What the textbook does. A method that does fewer shows more than the peak: that is its point.
LINEAR = Formula("6·B·C·D (the logits, and two products of their gradient)", _dense_linear)


def matrices(count: float) -> Formula:
    """Peak of code that holds `count` matrices of the logits' shape at once."""
    return Formula(f"{count:g}·B·C·itemsize", lambda s: count * s["rows"] * s["classes"] * s["itemsize"])


# ---------------------------------------------------------------- providers


def _eager(logits: Tensor) -> Tensor:
    target = _target(len(logits), logits.shape[1], logits.device)
    mean, deviation = logits.mean(1), logits.std(1, correction=0)
    z = (logits.gather(1, target[:, None]).squeeze(1) - mean) / (deviation + 1e-12)
    return F.softplus(-z).mean()


EAGER: Mapping[str, Loss] = {
    "z_loss": _eager,
    "linear_z_loss": lambda hidden, weight: _eager(F.linear(hidden, weight)),
}

TRUTH: Mapping[str, Loss] = {
    "z_loss": lambda logits: reference.z_loss(logits, _target(len(logits), logits.shape[1], logits.device)),
    "linear_z_loss": lambda hidden, weight: reference.linear_z_loss(
        hidden, weight, _target(len(hidden), len(weight), hidden.device)
    ),
}


def _z_loss(logits: Tensor) -> Tensor:
    return fastloss.z_loss(logits, _target(len(logits), logits.shape[1], logits.device))


def _linear_z_loss(hidden: Tensor, weight: Tensor) -> Tensor:
    return fastloss.linear_z_loss(hidden, weight, _target(len(hidden), len(weight), hidden.device))


def _in_place(logits: Tensor) -> Tensor:
    # The logits of a case are leaves and wanted again: the loss gets a copy, which counts in its time.
    return fastloss.z_loss(
        logits * 1, _target(len(logits), logits.shape[1], logits.device), gradient_overwrites_logits=True
    )


def _fastloss(name: str, description: str, backend: str, losses: Mapping[str, Loss], full_only: bool) -> Provider:
    def build(op: str) -> Loss:
        status = fastloss.backends().get(backend, "not available: unknown backend")
        if status.startswith("not available"):
            raise Unavailable(f"backend {backend}: {status.removeprefix('not available: ')}")
        return losses[op]

    def context() -> AbstractContextManager[object]:
        return fastloss.use_backend(backend)

    builders: dict[str, Callable[[], Loss]] = {op: partial(build, op) for op in losses}
    peak = {"z_loss": matrices(1)} if name != "fastloss[in place]" else {"z_loss": matrices(2)}
    return Provider(name, description, builders, peak, full_only=full_only, context=context)


def _compiled(op: str) -> Loss:
    return torch.compile(EAGER[op], fullgraph=True, dynamic=True)


_OURS: Mapping[str, Loss] = {"z_loss": _z_loss, "linear_z_loss": _linear_z_loss}

PROVIDERS = (
    _fastloss("fastloss", "this library, native backend", "native", _OURS, full_only=False),
    _fastloss("fastloss[portable]", "this library, backend in plain PyTorch", "portable", _OURS, full_only=True),
    _fastloss(
        "fastloss[in place]",
        "this library, the gradient in place of a copy of the logits",
        "native",
        {"z_loss": _in_place},
        full_only=True,
    ),
    Provider(
        "eager",
        "the textbook code in plain PyTorch",
        {op: partial(EAGER.__getitem__, op) for op in EAGER},
        {"z_loss": matrices(3), "linear_z_loss": matrices(4)},
    ),
    Provider(
        "torch.compile",
        "the same code under torch.compile(fullgraph=True, dynamic=True)",
        {op: partial(_compiled, op) for op in EAGER},
        {"z_loss": matrices(2), "linear_z_loss": matrices(3)},
        compiles=True,
    ),
)

# ---------------------------------------------------------------- cases

_PAIR = frozenset({"fastloss", "eager"})


def _rows(name: str, rows: int, classes: int, reason: str, **options: object) -> Case:
    sizes = {"rows": rows, "classes": classes, "dim": 1}
    return Case(name, FAMILY, "z_loss", reason, sizes, logits_inputs, ROWS, traffic=TRAFFIC, **options)  # type: ignore[arg-type]


def _linear(name: str, rows: int, classes: int, dim: int, reason: str, **options: object) -> Case:
    sizes = {"rows": rows, "classes": classes, "dim": dim}
    return Case(name, FAMILY, "linear_z_loss", reason, sizes, linear_inputs, LINEAR, **options)  # type: ignore[arg-type]


CASES = (
    _rows(
        "z-logits-4096",
        4096,
        50_257,
        "a batch of tokens with GPT-2's vocabulary",
        # Several passes first: on a virtual machine, memory that nobody has touched yet may cost more than the loss.
        quick=Schedule(rounds=5, warmup=2, budget=20, timed=_PAIR, memory=frozenset()),
        full=Schedule(rounds=15, warmup=2, slow_rounds=5),
    ),
    _linear(
        "z-linear-2048",
        2048,
        50_257,
        512,
        "more rows than features: the Gram route",
        quick=Schedule(rounds=2, warmup=0, budget=12, timed=_PAIR, memory=frozenset({"fastloss"})),
        full=Schedule(rounds=7, slow_rounds=3),
    ),
    _linear(
        "z-linear-128",
        128,
        50_257,
        512,
        "fewer rows than features: by tiles of logits",
        full=Schedule(rounds=15, slow_rounds=5),
    ),
)

SUITE = Suite(FAMILY, CASES, PROVIDERS, TRUTH, baseline="eager")
