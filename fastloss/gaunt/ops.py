"""The op of the family: sums of products of functions on the sphere, its autograd, batching and forward mode.

gaunt_ring   outputs[o] = sum_t coefficient_t prod_j inputs[factor_tj], as functions on the sphere, each given by its
             (degree + 1)^2 coefficients in orthonormal real harmonics. Every function is brought to the rings once.
             `direct`: by the sparse Gaunt tensor instead; for products of at most two factors.

Gradients of such sums are such sums (of more inputs), and so are their derivatives, to any order: one op, which calls
itself. Multiply-adds a lane, two factors of degree L, output 2L: 16 L^3 for the products and 6 L^3 for the ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from fastloss._backends import implementation
from fastloss._ops import LIBRARY, define, unobserved
from fastloss.gaunt import program as programs
from fastloss.gaunt.program import Program

_SCHEMAS = {"gaunt_ring_fwd": "(Tensor[] inputs, str program, bool channels_last, bool direct) -> Tensor[]"}


def _prepare(_: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    inputs, program, *how = args
    return inputs, programs.parse(program), *how


define("gaunt", _SCHEMAS, _prepare)
_op = torch.ops.fastloss.gaunt_ring_fwd.default


@torch.library.register_fake("fastloss::gaunt_ring_fwd", lib=LIBRARY)
def _(inputs, program, channels_last, direct):  # type: ignore[no-untyped-def]
    lead, tail = (inputs[0].shape[:-2], inputs[0].shape[-1:]) if channels_last else (inputs[0].shape[:-1], ())
    return [inputs[0].new_empty((*lead, (n + 1) ** 2, *tail)) for n in programs.parse(program).out_degrees]


def _vmap(info: Any, in_dims: Any, inputs: Any, *rest: Any) -> tuple[Any, Any]:
    """One more leading dimension."""
    batched = [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(inputs, in_dims[0], strict=True)
    ]
    out = _op(batched, *rest)
    return out, [0] * len(out)


torch.library.register_vmap("fastloss::gaunt_ring_fwd", _vmap, lib=LIBRARY)


def _legacy_vmap(inputs: list[Tensor], *rest: Any) -> list[Tensor]:
    """The vmap beneath torch.autograd's `vectorize` and `is_grads_batched`, older than torch.func's."""
    levels = range(torch._C._vmapmode_increment_nesting() - 1, 0, -1)
    torch._C._vmapmode_decrement_nesting()
    for level in levels:  # a tensor without this level gets a dimension of size 1
        inputs = [torch._remove_batch_dim(x, level, 1, 0) for x in inputs]
    lead = torch.broadcast_shapes(*(x.shape[: len(levels)] for x in inputs))
    outputs = _op([x.expand(*lead, *x.shape[len(levels) :]) for x in inputs], *rest)
    for level in reversed(levels):
        outputs = [torch._add_batch_dim(x, 0, level) for x in outputs]
    return list(outputs)


LIBRARY.impl("gaunt_ring_fwd", _legacy_vmap, "Batched")


class How(NamedTuple):
    channels_last: bool
    direct: bool


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: Program, how: How, ordinary: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`ordinary`, here and below: the inputs are known to be `unobserved`."""
        ctx.program, ctx.how = program, how
        ctx.save_for_backward(*inputs)
        if not ordinary or _forward_mode():
            ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)
        if ordinary or not torch._C._are_functorch_transforms_active():
            return tuple(_below_autograd(program, how, inputs, ordinary))
        # A Function switches gradients off; the levels of torch.func below this one still want theirs.
        with torch.enable_grad(), _set_fwd_grad_enabled(True):
            return tuple(_below_autograd(program, how, inputs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, None, None, *_gradients(ctx.program, ctx.how, ctx.saved_tensors, grads, ctx.needs_input_grad[3:])

    @staticmethod
    def jvp(ctx: Any, _program: Any, _how: Any, _ordinary: Any, *tangents: Tensor | None) -> Any:
        return tuple(_tangents(ctx.program, ctx.how, ctx.saved_tensors, tangents))


def _call(program: Program, how: How, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Runs the program without the inputs that no term has."""
    if not torch.is_grad_enabled() and not _forward_mode():
        return _below_autograd(program, how, inputs)
    keep, text = program.compact()
    return _run([inputs[i] for i in keep], text, how)


def _below_autograd(program: Program, how: How, inputs: Sequence[Tensor], ordinary: bool = False) -> list[Tensor]:
    keep, text = program.compact()
    return _plain([inputs[i] for i in keep], text, how, ordinary)


def _plain(inputs: list[Tensor], text: str, how: How, ordinary: bool = False) -> list[Tensor]:
    """The op without derivatives: of tensors that need none, or where autograd is off."""
    result: list[Tensor]
    if (ordinary or unobserved(inputs)) and not _forward_mode():
        kernel = implementation("gaunt", inputs[0].device).gaunt_ring_fwd
        result = kernel(inputs, programs.parse(text), *how)
        return result
    with torch._C._AutoDispatchBelowAutograd():
        result = _op(inputs, text, *how)
    return result


def _run(inputs: list[Tensor], text: str, how: How, ordinary: bool = False) -> Sequence[Tensor]:
    """The op with derivatives."""
    if ordinary or unobserved(inputs):
        return _with_autograd(inputs, text, how, True)
    result: list[Tensor] = _op(inputs, text, *how)
    return result


def _gradients(
    program: Program, how: How, inputs: Sequence[Tensor], grads: Sequence[Tensor | None], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    where = -2 if how.channels_last else -1
    given = [g for g in grads if g is not None]
    present = tuple([g is not None for g in grads])
    gradient = program.gradient(needs, tuple([int(x.shape[where]) for x in inputs]), present)
    values = iter(_call(gradient, how, [*inputs, *given]))
    return [next(values) if need else None for need in needs]


def _tangents(
    program: Program, how: How, inputs: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    moving = [i for i, t in enumerate(tangents) if t is not None]
    moved = program.tangent(tuple(moving), len(inputs))
    return _call(moved, how, [*inputs, *(t for t in tangents if t is not None)])


def _forward_mode() -> bool:
    return forward_ad._current_level >= 0


def _autograd(inputs: list[Tensor], text: str, channels_last: bool, direct: bool) -> list[Tensor]:
    """The op's autograd. Registered below the function transforms and Dynamo, which therefore both see one op."""
    return list(_with_autograd(inputs, text, How(channels_last, direct)))


LIBRARY.impl("gaunt_ring_fwd", _autograd, "Autograd")
# Function.apply would hand the call to the transforms again, although they call it, one level at a time.
_apply = super(torch.autograd.Function, _Ring).apply


def _with_autograd(inputs: list[Tensor], text: str, how: How, ordinary: bool = False) -> Sequence[Tensor]:
    transformed = not ordinary and torch._C._are_functorch_transforms_active()
    recorded = torch.is_grad_enabled() and True in [x.requires_grad for x in inputs]
    if not (recorded or transformed or _forward_mode()):
        return _plain(inputs, text, how, ordinary)
    result: tuple[Tensor, ...]
    if not transformed:
        result = _apply(programs.parse(text), how, ordinary, *inputs)
        return result
    with enable_single_level_autograd_function():
        result = _apply(programs.parse(text), how, ordinary, *inputs)
        return result


def multiplier(
    factors: Sequence[int], degree: int, *, channels_last: bool = False, direct: bool = False, ordinary: bool = False
) -> Callable[[list[Tensor]], Tensor]:
    """The product of the inputs with these numbers, up to a degree, as a function of the inputs.

    inputs: (..., (degree + 1)^2) or with channels last (..., (degree + 1)^2, channels), the
    other sizes those of all; float32 or float64. `ordinary`: they are all `unobserved`.
    """
    program = f"{degree}:1 1 {len(factors)} {' '.join(map(str, factors))}"
    how = How(channels_last, direct)
    return lambda inputs: _run(inputs, program, how, ordinary)[0]
