"""The spherical ops: schema, shapes, autograd and batching in one place.

row_moments     of each row of a matrix of logits o: the mean m_i, sum_j (o_ij - m_i)^2, o_it - m_i and o_it, with
                t = target[i]; the last two are 0 for t = -1. One read; backward one read and one write.
linear_moments  the same of the logits hidden weight^T + bias, which are never stored.

Every loss of the family is a function of these four and of C. Both are differentiable once, in the logits or in
hidden, weight and bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss._ops import LIBRARY, Op, batch, define, needs_grad, once, runner, save_unseen, traced
from fastloss.spherical.tiles import accumulation_dtype

_SCHEMAS = {
    "row_moments_fwd": (
        "(Tensor logits, Tensor target, str function) "
        "-> (Tensor mean, Tensor square, Tensor centred, Tensor logit, Tensor stats)"
    ),
    "row_moments_bwd": (
        "(Tensor grad_mean, Tensor grad_square, Tensor grad_centred, Tensor grad_logit, "
        "Tensor logits, Tensor target, Tensor stats) -> Tensor"
    ),
    "linear_moments_fwd": (
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, bool need_hidden, str function) "
        "-> (Tensor mean, Tensor square, Tensor centred, Tensor logit, Tensor direction, Tensor center)"
    ),
    "linear_moments_bwd": (
        "(Tensor grad_mean, Tensor grad_square, Tensor grad_centred, Tensor grad_logit, "
        "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor direction, Tensor center, "
        "bool need_hidden, bool need_weight, bool need_bias) "
        "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
    ),
}
# The gradient takes the place of the logits.
_IN_PLACE_SCHEMAS = {
    "row_moments_bwd_": (
        "(Tensor grad_mean, Tensor grad_square, Tensor grad_centred, Tensor grad_logit, "
        "Tensor(a!) logits, Tensor target, Tensor stats) -> ()"
    ),
}


_LOWEST = torch.iinfo(torch.int64).min


def _checked(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward ops check the targets; the last argument names the function in the message."""
    if not name.endswith("_fwd"):
        return args
    *rest, function = args
    if name == "linear_moments_fwd":
        check_classes(function, target=rest[3], classes=rest[1].shape[0])
    else:
        check_classes(function, target=rest[1], classes=rest[0].shape[1])
    return tuple(rest)


def check_classes(function: str, target: Tensor, classes: int) -> None:
    """In the op, since only here the values are known under torch.compile and torch.func. See `class_ids`."""
    if target.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(target))
    if low < -1 or high >= classes:
        raise ValueError(
            f"{function}: `target` must hold classes 0 to {classes - 1}, or `ignore_index`, "
            f"got {high if low >= -1 else low if low == _LOWEST else low + 1}"
        )


def class_ids(target: Tensor, ignore_index: int) -> Tensor:
    """-1 for ignored rows; a negative class moves down by one, out of their way, to be refused by the op."""
    moved = target.clamp(min=_LOWEST + 1) - 1
    return torch.where(target == ignore_index, -1, torch.where(target < 0, moved, target))


define("spherical", _SCHEMAS | _IN_PLACE_SCHEMAS, _checked)

_row_moments = torch.ops.fastloss.row_moments_fwd.default
_row_moments_bwd = torch.ops.fastloss.row_moments_bwd.default
_row_moments_bwd_ = torch.ops.fastloss.row_moments_bwd_.default
_linear_moments = torch.ops.fastloss.linear_moments_fwd.default
_linear_moments_bwd = torch.ops.fastloss.linear_moments_bwd.default


@torch.library.register_fake("fastloss::row_moments_fwd", lib=LIBRARY)
def _(logits, target, function):  # type: ignore[no-untyped-def]
    b, dtype = logits.shape[0], accumulation_dtype(logits)
    return tuple(logits.new_empty(shape, dtype=dtype) for shape in ((b,), (b,), (b,), (b,), (2, b)))


@torch.library.register_fake("fastloss::row_moments_bwd", lib=LIBRARY)
def _(grad_mean, grad_square, grad_centred, grad_logit, logits, target, stats):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastloss::row_moments_bwd_", lib=LIBRARY)
def _(grad_mean, grad_square, grad_centred, grad_logit, logits, target, stats):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("fastloss::linear_moments_fwd", lib=LIBRARY)
def _(hidden, weight, bias, target, need_hidden, function):  # type: ignore[no-untyped-def]
    (b, d), dtype = hidden.shape, accumulation_dtype(hidden, weight, bias)
    shapes = ((b,), (b,), (b,), (b,), (b if need_hidden else 0, d), (2, d + 1))
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.register_fake("fastloss::linear_moments_bwd", lib=LIBRARY)
def _(  # type: ignore[no-untyped-def]
    grad_mean, grad_square, grad_centred, grad_logit, hidden, weight, bias, target, direction, center,
    need_hidden, need_weight, need_bias,
):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        (weight if bias is None else bias).new_empty((weight.shape[0] if need_bias else 0,)),
    )


def _upstream(grads: tuple[Tensor | None, ...], stats: Tensor, rows: Any) -> list[Tensor]:
    """Gradients of the four statistics; zeros for those that the loss does not use."""
    return [stats.new_zeros((rows,)) if g is None else g for g in grads]


class _RowMoments(Op):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return _row_moments(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        save_unseen(ctx, output[4:])
        ctx.save_for_backward(inputs[0], inputs[1], output[4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        logits, target, stats = ctx.saved_tensors
        upstream = _upstream(grads[:4], stats, logits.shape[0])
        return once("spherical", _row_moments_bwd, *upstream, logits, target, stats), None, None


class _RowMomentsOverwriting(Op):
    """The gradient is the memory of the logits; whoever else saved them hears of it by their version."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, function: str) -> Any:
        output = _row_moments(logits, target, function)
        save_unseen(ctx, output[4:])
        ctx.save_for_backward(logits, target, output[4])
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastloss: a gradient that overwrites the logits has no second derivative "
                "(create_graph=True was asked for)"
            )
        logits, target, stats = ctx.saved_tensors
        gradient = logits.detach()
        _row_moments_bwd_(*_upstream(grads[:4], stats, logits.shape[0]), gradient, target, stats)
        torch.autograd.graph.increment_version(logits)
        return gradient, None, None


class _LinearMoments(Op):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return _linear_moments(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        save_unseen(ctx, output[4:])
        ctx.save_for_backward(*inputs[:4], *output[4:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        hidden, weight, bias, target, direction, center = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        results = once(
            "spherical", _linear_moments_bwd, *_upstream(grads[:4], center, hidden.shape[0]),
            hidden, weight, bias, target, direction, center, *needs,
        )  # fmt: skip
        return *(g if need else None for g, need in zip(results, needs, strict=True)), None, None, None


batch(_SCHEMAS)


def row_moments(
    logits: Tensor,  # (B, C)
    target: Tensor,  # (B,) int64, of `class_ids`
    function: str,  # for messages
    *,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, square, centred, logit), (B,) each, in the accumulation dtype; see the module's docstring."""
    if overwrite and not torch.compiler.is_compiling():
        mean, square, centred, logit, _ = _RowMomentsOverwriting.apply(logits, target, function)
    else:
        (logits,) = traced(logits)
        mean, square, centred, logit, _ = runner(_RowMoments, any(needs_grad(logits)))(logits, target, function)
    return mean, square, centred, logit


def linear_moments(
    hidden: Tensor,  # (B, D)
    weight: Tensor,  # (C, D)
    bias: Tensor | None,  # (C,)
    target: Tensor,  # (B,) int64, of `class_ids`
    function: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `row_moments`, of hidden weight^T + bias."""
    hidden, weight, bias = traced(hidden, weight, bias)
    needs = needs_grad(hidden, weight, bias)
    mean, square, centred, logit, _, _ = runner(_LinearMoments, any(needs))(
        hidden, weight, bias, target, needs[0], function
    )
    return mean, square, centred, logit
