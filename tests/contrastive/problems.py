"""Inputs of the contrastive losses, and their evaluation by fastloss, the float64 reference and plain torch."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastloss
import fastloss.reference
from tests.support import assert_as_accurate_as_torch, assert_equal_to_rounding

HALF_DTYPES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALF_DTYPES]
SCALES = ("temperature", "logit_scale")

# One name a mode; the words are combined freely by `make_problem`.
VARIANTS = [
    "info_nce",
    "info_nce dot",
    "info_nce ids",
    "info_nce key_ids",
    "info_nce row_temperature",
    "info_nce symmetric",
    "info_nce symmetric key_ids row_temperature",
    "info_nce extra",
    "info_nce extra key_ids",
    "info_nce extra extra_ids row_temperature",
    "info_nce extra symmetric ids",
    "info_nce unpaired",
    "info_nce unpaired key_ids row_temperature",
    "info_nce unpaired dot",
    "info_nce paired",
    "info_nce paired key_ids row_temperature",
    "info_nce paired dot",
    "clip_loss",
    "clip_loss ids",
    "clip_loss key_ids row_temperature",
    "nt_xent",
    "nt_xent dot",
    "nt_xent ids row_temperature",
]

# A reduced loss in one direction has a kernel of its own, which finds the gradients in the forward pass.
REDUCED = ["info_nce mean", "info_nce mean dot", "info_nce sum key_ids row_temperature"]


@dataclass(frozen=True)
class Problem:
    """A call of `function`: `tensors` are the arguments with a gradient, `options` the others."""

    function: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def __call__(self, api: Any, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Tensor:
        loss: Tensor = getattr(api, self.function)(**{**(tensors or self.tensors), **self.options, **changes})
        return loss

    def with_options(self, **options: Any) -> "Problem":
        return replace(self, options={**self.options, **options})

    def with_tensors(self, **tensors: Tensor) -> "Problem":
        return replace(self, tensors={**self.tensors, **tensors})

    def to(self, device: str) -> "Problem":
        options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        return replace(self, tensors={name: x.to(device) for name, x in self.tensors.items()}, options=options)

    @property
    def features(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.tensors.items() if name not in SCALES}

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.features.values())).dtype

    @property
    def width(self) -> int:
        return next(iter(self.features.values())).shape[-1]

    @property
    def largest_scale(self) -> float:
        if "logit_scale" in self.tensors:
            return float(self.tensors["logit_scale"].max())
        return 1 / float(self.tensors["temperature"].min())

    @property
    def normalizes(self) -> bool:
        return self.function != "clip_loss" and bool(self.options.get("normalize", True))

    @property
    def largest_similarity(self) -> float:
        """Bound of |S_ij| * T_i."""
        if self.normalizes:
            return 1.0
        norms = [float(x.double().norm(dim=-1).max()) for x in self.features.values() if x.numel()]
        return max(norms, default=0.0) ** 2

    @property
    def largest_logit(self) -> float:
        return self.largest_scale * self.largest_similarity


def make_problem(
    variant: str,
    rows: int = 33,
    columns: int = 17,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    temperature: float = 0.1,
) -> Problem:
    """Positives are alike and ids collide now and then; the reduction is "none" if the variant names no other."""
    words = set(variant.split())
    generator = torch.Generator().manual_seed(rows * 7919 + columns * 31 + width)

    def features(*shape: int) -> Tensor:
        x = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
        # Plain dot products of vectors about as long as unit ones, so that the temperature means the same.
        return (x / width**0.5 if "dot" in words else x).to(dtype)

    def ids(*shape: int) -> Tensor:
        return torch.randint(max(2, rows // 2), shape, generator=generator)

    scale_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor(temperature, dtype=scale_dtype)
    if "row_temperature" in words:
        scale = scale * (0.5 + torch.rand(rows, generator=generator, dtype=scale_dtype))
    first = features(rows)
    second = (first.double() / 2 + features(rows).double()).to(dtype)
    options: dict[str, Any] = {"reduction": next((word for word in ("mean", "sum") if word in words), "none")}

    if "clip_loss" in words:
        unit = torch.nn.functional.normalize
        tensors = {"image_features": unit(first.double()).to(dtype), "text_features": unit(second.double()).to(dtype)}
        tensors["logit_scale"] = 1 / scale
        options |= {"image_ids": ids(rows)} if words & {"ids", "key_ids"} else {}
        options |= {"text_ids": ids(rows)} if "key_ids" in words else {}
        return Problem("clip_loss", tensors, options)

    options |= {"normalize": False} if "dot" in words else {}
    if "nt_xent" in words:
        options |= {"ids": ids(rows)} if "ids" in words else {}
        return Problem("nt_xent", {"z0": first, "z1": second, "temperature": scale}, options)

    tensors = {"query": first, "positive_key": second, "temperature": scale}
    key_shape: tuple[int, ...] = (rows,)
    if "unpaired" in words:
        tensors["negative_keys"], key_shape = features(columns), (columns,)
    if "paired" in words:
        tensors["negative_keys"], key_shape = features(rows, columns), (rows, columns)
        options["negative_mode"] = "paired"
    if "extra" in words:
        tensors["extra_negatives"] = features(columns)
        key_shape = (rows + columns,) if "extra_ids" in words else key_shape
    options |= {"symmetric": True} if "symmetric" in words else {}
    options |= {"query_ids": ids(rows)} if words & {"ids", "key_ids", "extra_ids"} else {}
    options |= {"key_ids": ids(*key_shape)} if words & {"key_ids", "extra_ids"} else {}
    return Problem("info_nce", tensors, options)


class Result(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor]


def upstream_of(loss: Tensor) -> Tensor:
    """A gradient of the loss that is neither 1, nor equal for all rows, nor of one sign."""
    return torch.linspace(1.7, -1.0, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)


def evaluate(
    problem: Problem,
    api: Any = fastloss,
    *,
    leaf_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    requires_grad: Iterable[str] | None = None,
    forward: AbstractContextManager[Any] | None = None,
) -> Result:
    """Loss and gradients. Inputs are cast to `leaf_dtype`, and to `compute_dtype` inside the graph, where given.

    `forward` is entered for the forward pass alone.
    """
    wanted = set(problem.tensors if requires_grad is None else requires_grad)
    leaves = {
        name: (x.detach() if leaf_dtype is None else x.detach().to(leaf_dtype)).requires_grad_(name in wanted)
        for name, x in problem.tensors.items()
    }
    inputs = leaves if compute_dtype is None else {name: x.to(compute_dtype) for name, x in leaves.items()}
    with forward or nullcontext():
        loss = problem(api, inputs)
    if wanted:
        loss.backward(upstream_of(loss))
    gradients = {name: leaves[name].grad for name in problem.tensors if name in wanted}
    assert all(g is not None for g in gradients.values()), "an input that requires grad received none"
    assert all(leaves[name].grad is None for name in set(leaves) - wanted)
    return Result(loss.detach(), gradients)  # type: ignore[arg-type]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(problem: Problem, actual: Result | None = None, requires_grad: Iterable[str] | None = None) -> Result:
    """fastloss is as accurate as the dense formula in plain torch, in every output; returns what it computed."""
    wanted = list(problem.tensors) if requires_grad is None else list(requires_grad)
    dtype = accumulation_dtype(problem.dtype)
    if actual is None:
        actual = evaluate(problem, requires_grad=wanted)
    truth = evaluate(problem, fastloss.reference, leaf_dtype=torch.float64, requires_grad=wanted)
    assert actual.loss.dtype == dtype
    compare(problem, actual, truth, evaluate(problem, fastloss.reference, compute_dtype=dtype, requires_grad=wanted))
    return actual


def compare(problem: Problem, actual: Result, truth: Result, baseline: Result) -> None:
    """Every output of `actual` against `truth`, with the error of `baseline` (of the same dtype) as the measure."""
    rows = len(next(iter(problem.features.values())))
    reduction = problem.options["reduction"]
    # What reaches the loss of each row.
    upstream = upstream_of(truth.loss).abs() if reduction == "none" else torch.full((max(rows, 1),), 1.7)
    upstream = upstream / rows if reduction == "mean" else upstream
    # A logit is rounded relative to its size, so every probability has that many ulps of relative error.
    condition = max(1.0, problem.largest_logit)
    terms = sum(x.shape[-2] for x in problem.features.values()) + problem.width

    def judge(name: str, got: Tensor, expected: Tensor, base: Tensor, magnitude: float, weight: Tensor | float) -> None:
        if got.dtype == torch.float64:
            assert_equal_to_rounding(got, expected, terms=terms, magnitude=magnitude, weight=weight, name=name)
        else:
            assert_as_accurate_as_torch(got, expected, base, magnitude=magnitude, weight=weight, name=name)

    losses = rows if reduction == "sum" else 1
    judge("loss", actual.loss, truth.loss, baseline.loss, losses * problem.largest_logit, 1.0)
    for name, gradient in truth.gradients.items():
        weight: Tensor | float = 1.0
        if name in SCALES:
            # sum_i u_i (E_i[c] - c_ii), a difference of similarities, times d(1 / T)/dT = 1 / T^2.
            outer = problem.largest_scale**2 if name == "temperature" else 1.0
            magnitude = float(upstream.sum()) * problem.largest_similarity * outer
        else:
            # sum_j G_ij y_j / |x|, of which the part along x is taken off: the rest may be zero. Times |x| all rows
            # are alike; without normalisation, the similarity's bound stands for |x| |y|.
            x = problem.tensors[name].double()
            norm = x.norm(dim=-1, keepdim=True)
            longest = max(float(f.double().norm(dim=-1).max()) for f in problem.features.values() if f.numel())
            weight = torch.where(norm > 0, norm, 1.0) if problem.normalizes else 1.0
            magnitude = float(upstream.max()) * problem.largest_scale * (1.0 if problem.normalizes else longest)
        judge(
            f"gradient of {name}", actual.gradients[name], gradient, baseline.gradients[name],
            condition * magnitude, weight,
        )  # fmt: skip
