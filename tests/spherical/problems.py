"""Calls of the spherical losses, and their evaluation by fastloss, the float64 reference and plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fastloss
import fastloss.reference
from tests.support import assert_as_accurate_as_torch

LOSSES = ["z_loss", "spherical_softmax_loss", "taylor_softmax_loss", "one_hot_mse_loss"]
LINEAR = ["linear_" + name for name in LOSSES]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"class_weight": True, "sample_weight": True, "reduction": "mean"},
    "sum": {"sample_weight": True, "reduction": "sum"},
    "none": {"class_weight": True, "reduction": "none"},
}


@dataclass(frozen=True)
class Problem:
    function: str
    tensors: dict[str, Tensor]  # arguments with a gradient
    target: Tensor
    options: dict[str, Any]

    def __call__(self, api: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the gradients of a sum of it with weights that differ from row to row."""

        def cast(x: Any) -> Any:
            return x.to(dtype) if dtype is not None and isinstance(x, Tensor) else x

        leaves = {k: cast(v).detach().clone().requires_grad_() for k, v in self.tensors.items()}
        options = {k: cast(v) for k, v in self.options.items()}
        loss: Tensor = getattr(api, self.function)(**leaves, target=self.target, **options)
        weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
        gradients = torch.autograd.grad((loss * weights).sum(), list(leaves.values()))
        return loss.detach(), dict(zip(leaves, gradients, strict=True))

    def to(self, device: str) -> Problem:
        def move(values: dict[str, Any]) -> dict[str, Any]:
            return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}

        return replace(self, tensors=move(self.tensors), target=self.target.to(device), options=move(self.options))

    def with_options(self, **options: Any) -> Problem:
        return replace(self, options={**self.options, **options})

    def check(self, magnitude: float = 0.0) -> None:
        """As accurate as the dense formula in the same dtype (16 bits: in float32), against it in float64.

        For float64, whose truth has the same dtype, the dense formula's error in float32 is taken, brought to float64
        by the ratio of their units in the last place. The error of a linear loss is the worst of four orders of the
        features: a logit near zero turns the rounding of one dot product into that of a whole gradient.
        """
        dtype = next(iter(self.tensors.values())).dtype
        double = dtype == torch.float64
        truth, truths = self(fastloss.reference, torch.float64)
        plain, plains = self(fastloss.reference, torch.float32)
        for seed in range(3 if "hidden" in self.tensors else 0):
            order = torch.randperm(self.tensors["hidden"].shape[1], generator=torch.Generator().manual_seed(seed))
            moved = {k: v[:, order] if v.dim() == 2 else v for k, v in self.tensors.items()}
            other, others = replace(self, tensors=moved)(fastloss.reference, torch.float32)
            plain = _further(plain, other, truth)
            for name, g in others.items():
                g = g[:, order.argsort()] if g.dim() == 2 else g
                plains[name] = _further(plains[name], g, truths[name])
        loss, gradients = self(fastloss)

        def compare(name: str, actual: Tensor, exact: Tensor, baseline: Tensor) -> None:
            if double:
                ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
                baseline = exact + (baseline.double() - exact) * ratio
            baseline = baseline.to(actual.dtype)
            assert_as_accurate_as_torch(actual, exact, baseline, magnitude=magnitude, name=name)

        compare("loss", loss, truth, plain)
        for name, gradient in gradients.items():
            compare(name, gradient, truths[name], plains[name])


def _further(a: Tensor, b: Tensor, truth: Tensor) -> Tensor:
    """The one with the larger error."""
    return a if not a.numel() or (a - truth).abs().max() >= (b - truth).abs().max() else b


def make(
    function: str,
    rows: int = 33,
    classes: int = 101,
    width: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    options: str = "plain",
    offset: float = 0.0,
) -> Problem:
    """Every fifth row is ignored. `offset` shifts all logits, of linear losses by the bias."""
    generator = torch.Generator().manual_seed(rows * 7919 + classes * 31 + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    target = torch.randint(classes, (rows,), generator=generator)
    target[2::5] = -100
    if function in LINEAR:
        tensors = {"hidden": normal(rows, width), "weight": normal(classes, width) / width**0.5}
        if bias:
            tensors["bias"] = normal(classes) + offset
    else:
        tensors = {"logits": normal(rows, classes) + offset}
    chosen = dict(OPTIONS[options])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, size in (("class_weight", classes), ("sample_weight", rows)):
        if chosen.get(name):
            chosen[name] = torch.rand(size, generator=generator, dtype=torch.float64).to(wide)
    return Problem(function, {k: v.to(dtype) for k, v in tensors.items()}, target, chosen)
