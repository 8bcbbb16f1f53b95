"""The sliced ops: schema, shapes, autograd and batching in one place.

For clouds x (B, n, d), y (B, m, d) and directions theta (L, d), cost_bl is W_p^p between the projections of cloud
pair b on theta_l, with weights a (B, n) and b (B, m), which are normalised, or equal ones.

sliced_mean   mean_l cost_bl, and its gradients in the forward pass, where the sorted slices are at hand: they are known
              but for a factor. For gradients of up to 32 MiB, which are held twice.
sliced_costs  all cost_bl; the backward pass projects and sorts again.
sort_slices   the sorted projections of one cloud (n, d) and where each came from, (L, n) both.

All are differentiable once, in the points, the directions and the weights. Work: a sort of n + m numbers a slice and
2 (n + m) d flops a slice for the projection, as many again for each gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastloss._ops import (
    LIBRARY,
    Op,
    accumulation_dtype,
    batch,
    define,
    distinct,
    needs_grad,
    once,
    runner,
    save_unseen,
)

WAITING_BYTES = 32 << 20
STREAM_ROWS = 256

_NEEDS = "bool need_x, bool need_y, bool need_theta, bool need_a, bool need_b"
_SCHEMAS = {
    "sliced_mean_fwd": (
        f"(Tensor x, Tensor y, Tensor theta, Tensor? a, Tensor? b, float p, {_NEEDS}) "
        "-> (Tensor mean, Tensor grad_x, Tensor grad_y, Tensor grad_theta, Tensor grad_a, Tensor grad_b)"
    ),
    "sliced_mean_bwd": (
        "(Tensor grad, Tensor x, Tensor y, Tensor theta, Tensor grad_x, Tensor grad_y, Tensor grad_theta, "
        "Tensor grad_a, Tensor grad_b) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "sliced_costs_fwd": "(Tensor x, Tensor y, Tensor theta, Tensor? a, Tensor? b, float p) -> Tensor",
    "sliced_costs_bwd": (
        f"(Tensor grad, Tensor x, Tensor y, Tensor theta, Tensor? a, Tensor? b, float p, {_NEEDS}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "sort_slices_fwd": "(Tensor x, Tensor theta) -> (Tensor sorted, Tensor order)",
    "sort_slices_bwd": (
        "(Tensor grad, Tensor x, Tensor theta, Tensor order, bool need_x, bool need_theta) -> (Tensor, Tensor)"
    ),
}


define("sliced", _SCHEMAS)

_mean = torch.ops.fastloss.sliced_mean_fwd.default
_mean_bwd = torch.ops.fastloss.sliced_mean_bwd.default
_costs = torch.ops.fastloss.sliced_costs_fwd.default
_costs_bwd = torch.ops.fastloss.sliced_costs_bwd.default
_sort = torch.ops.fastloss.sort_slices_fwd.default
_sort_bwd = torch.ops.fastloss.sort_slices_bwd.default


def _like(x: Tensor, shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or accumulation_dtype(x.dtype), device=x.device)


@torch.library.register_fake("fastloss::sliced_mean_fwd", lib=LIBRARY)
def _(x, y, theta, a, b, p, need_x, need_y, need_theta, need_a, need_b):  # type: ignore[no-untyped-def]
    return (
        _like(theta, (x.shape[0],)),
        _like(theta, x.shape if need_x else (0,)),
        _like(theta, y.shape if need_y else (0,)),
        _like(theta, (x.shape[0], *theta.shape) if need_theta else (0,)),
        _like(theta, x.shape[:2] if need_a else (0,)),
        _like(theta, y.shape[:2] if need_b else (0,)),
    )


@torch.library.register_fake("fastloss::sliced_mean_bwd", lib=LIBRARY)
def _(grad, x, y, theta, grad_x, grad_y, grad_theta, grad_a, grad_b):  # type: ignore[no-untyped-def]
    return (
        _like(x, grad_x.shape, x.dtype),
        _like(y, grad_y.shape, y.dtype),
        _like(theta, theta.shape if grad_theta.dim() > 1 else (0,), theta.dtype),
        torch.empty_like(grad_a),
        torch.empty_like(grad_b),
    )


@torch.library.register_fake("fastloss::sliced_costs_fwd", lib=LIBRARY)
def _(x, y, theta, a, b, p):  # type: ignore[no-untyped-def]
    return _like(theta, (x.shape[0], theta.shape[0]))


@torch.library.register_fake("fastloss::sliced_costs_bwd", lib=LIBRARY)
def _(  # type: ignore[no-untyped-def]
    grad, x, y, theta, a, b, p, need_x, need_y, need_theta, need_a, need_b
):
    return (
        _like(x, x.shape if need_x else (0,), x.dtype),
        _like(y, y.shape if need_y else (0,), y.dtype),
        _like(theta, theta.shape if need_theta else (0,), theta.dtype),
        _like(theta, x.shape[:2] if need_a else (0,)),
        _like(theta, y.shape[:2] if need_b else (0,)),
    )


@torch.library.register_fake("fastloss::sort_slices_fwd", lib=LIBRARY)
def _(x, theta):  # type: ignore[no-untyped-def]
    shape = (theta.shape[0], x.shape[0])
    return _like(x, shape), _like(x, shape, torch.int32)


@torch.library.register_fake("fastloss::sort_slices_bwd", lib=LIBRARY)
def _(grad, x, theta, order, need_x, need_theta):  # type: ignore[no-untyped-def]
    return (
        _like(x, x.shape if need_x else (0,), x.dtype),
        _like(theta, theta.shape if need_theta else (0,), theta.dtype),
    )


def _only(grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor | None]:
    return [g if need else None for g, need in zip(grads, needs, strict=True)]


class _SlicedMean(Op):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return _mean(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        save_unseen(ctx, output[1:])
        ctx.save_for_backward(*inputs[:3], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        rest = (None,) * (len(ctx.needs_input_grad) - 5)
        if grad is None:
            return (*(None,) * 5, *rest)
        grads = once("sliced", _mean_bwd, grad, *ctx.saved_tensors)
        return (*_only(grads, ctx.needs_input_grad[:5]), *rest)


class _SlicedCosts(Op):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return _costs(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.p = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needs = ctx.needs_input_grad[:5]
        grads = once("sliced", _costs_bwd, grad, *ctx.saved_tensors, ctx.p, *needs)
        return (*_only(grads, needs), None)


class _SortSlices(Op):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return _sort(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        save_unseen(ctx, output[1:])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
        if grad is None:
            return None, None
        needs = ctx.needs_input_grad[:2]
        return tuple(_only(once("sliced", _sort_bwd, grad, *ctx.saved_tensors, *needs), needs))


batch(_SCHEMAS)


def sliced_mean(
    x: Tensor,  # (B, n, d)
    y: Tensor,  # (B, m, d)
    theta: Tensor,  # (L, d)
    a: Tensor | None,  # (B, n), accumulation dtype; None for equal weights
    b: Tensor | None,  # (B, m)
    p: float,
) -> Tensor:
    """(B,) in the accumulation dtype; see the module's docstring."""
    y, b = distinct(y, x), distinct(b, a)
    needs = needs_grad(x, y, theta, a, b)
    size = 8 if x.dtype == torch.float64 else 4
    elements = x.numel() * needs[0] + y.numel() * needs[1] + len(x) * theta.numel() * needs[2]
    if any(needs) and elements * size > WAITING_BYTES:
        return sliced_costs(x, y, theta, a, b, p).mean(1)
    result: Tensor = runner(_SlicedMean, any(needs))(x, y, theta, a, b, p, *needs)[0]
    return result


class _StreamedMean(_SlicedMean):
    """Mean over blocks of directions drawn as they are used; the gradients are summed as the blocks come."""

    @staticmethod
    def forward(*args: Any) -> Any:
        x, y, _, a, b, p, *needs, draw, count = args
        sums: list[Tensor] = []
        for start in range(0, count, STREAM_ROWS):
            rows = min(STREAM_ROWS, count - start)
            found = _mean(x, y, draw(rows), a, b, p, *needs)
            if not sums:
                sums = [t.mul_(rows / count) for t in found]
            else:
                sums = [s.add_(t, alpha=rows / count) for s, t in zip(sums, found, strict=True)]
        return tuple(sums)


def streamed_mean(
    x: Tensor,
    y: Tensor,
    draw: Callable[[int], Tensor],  # so many directions, in the accumulation dtype
    count: int,
    a: Tensor | None,
    b: Tensor | None,
    p: float,
) -> Tensor:
    """:func:`sliced_mean` over `count` directions of which no more than STREAM_ROWS exist at a time."""
    y, b = distinct(y, x), distinct(b, a)
    none = _like(x, (0, x.shape[-1]))  # in the place of directions, which are nobody's
    needs = needs_grad(x, y, None, a, b)
    result: Tensor = runner(_StreamedMean, any(needs))(x, y, none, a, b, p, *needs, draw, count)[0]
    return result


def sliced_costs(x: Tensor, y: Tensor, theta: Tensor, a: Tensor | None, b: Tensor | None, p: float) -> Tensor:
    """(B, L) in the accumulation dtype; arguments as :func:`sliced_mean`."""
    y, b = distinct(y, x), distinct(b, a)
    result: Tensor = runner(_SlicedCosts, any(needs_grad(x, y, theta, a, b)))(x, y, theta, a, b, p)
    return result


def costs_slope(x: Tensor, y: Tensor, theta: Tensor, a: Tensor | None, b: Tensor | None, p: float) -> Tensor:
    """(L, d): the derivative of the sum of :func:`sliced_costs` in the directions, found without autograd."""
    grad = torch.ones((len(x), len(theta)), dtype=theta.dtype, device=theta.device)
    slope: Tensor = _costs_bwd(grad, x, y, theta, a, b, p, False, False, True, False, False)[2]
    return slope


def sort_slices(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted projections (L, n) of x (n, d), in the accumulation dtype, and their order (L, n) as int32."""
    values, order = runner(_SortSlices, any(needs_grad(x, theta)))(x, theta)
    return values, order
