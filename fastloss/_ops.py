"""What the ops of all families share: registration, batching, and the rules of their autograd Functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastloss._backends import implementation

LIBRARY = torch.library.Library("fastloss", "FRAGMENT")


Prepare = Callable[[str, tuple[Any, ...]], tuple[Any, ...]]


def define(family: str, schemas: Mapping[str, str], prepare: Prepare | None = None) -> None:
    """Defines the ops, and for every device a kernel that looks up the family's implementation.

    `prepare`, of an op's name and arguments, gives those of the implementation; it may raise.
    """
    for name, schema in schemas.items():
        LIBRARY.define(name + schema)
        for key in ("CPU", "CUDA", "XPU", "MPS"):
            LIBRARY.impl(name, _kernel(family, name, prepare), key)


def _kernel(family: str, name: str, prepare: Prepare | None) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if prepare is not None:
            args = prepare(name, args)
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        device = first.device
        kernel = getattr(implementation(family, device), name)
        if not torch.is_autocast_enabled(device.type):
            return kernel(*args)
        # An autocast region's dtype is for the user's layers; the products in here stay in the accumulation dtype.
        with torch.autocast(device.type, enabled=False):
            return kernel(*args)

    return run


_dispatch_keys = torch._C._dispatch_keys


def _ordinary_keys() -> frozenset[int]:
    # On the CPU whatever the default device, which may be set before this import.
    plain = torch.empty(0, device="cpu")
    with torch.inference_mode():
        return frozenset(_dispatch_keys(x).raw_repr() for x in (plain, torch.empty(0, device="cpu")))


_ORDINARY = _ordinary_keys()


def unobserved(tensors: Iterable[Tensor]) -> bool:
    """Ordinary tensors on the CPU, and no mode, transform or tracer that has to see the op.

    All that the dispatcher would do is to find the implementation. For a small call that costs as much as its work.
    """
    if torch.compiler.is_compiling():
        return False
    for x in tensors:  # by the keys themselves: they tell of everything that a tensor can have to itself
        if _dispatch_keys(x).raw_repr() not in _ORDINARY:
            return False
    return not (
        torch._C._are_functorch_transforms_active()
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
    )


def batch(names: Iterable[str]) -> None:
    """Registers the vmap rule of the ops: one call an element; each is a large problem of its own."""
    for name in names:
        torch.library.register_vmap(
            f"fastloss::{name}", _loop_over_batch(getattr(torch.ops.fastloss, name).default), lib=LIBRARY
        )


def _loop_over_batch(op: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if size == 0:  # one call on zeros, whose results are dropped, tells their shapes
            args = tuple(x if dim is None else _one_of_zeros(x, dim) for x, dim in zip(args, in_dims, strict=True))
        calls = [
            op(*(x if dim is None else x.select(dim, b) for x, dim in zip(args, in_dims, strict=True)))
            for b in range(max(size, 1))
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls)[:size], 0
        return tuple(torch.stack(out)[:size] for out in zip(*calls, strict=True)), (0,) * len(calls[0])

    return rule


def _one_of_zeros(x: Tensor, dim: int) -> Tensor:
    return x.new_zeros((*x.shape[:dim], 1, *x.shape[dim + 1 :]))


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """For products of fastloss's own outside of ops: an autocast region's dtype is for the user's layers."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_second_derivative(family: str) -> RuntimeError:
    return RuntimeError(
        f"fastloss: the {family} losses have no second derivative (create_graph=True was asked for). "
        f"fastloss.reference.{family} has the same losses in plain PyTorch, differentiable any number of times."
    )


class Op(torch.autograd.Function):
    """The base of Functions with a `setup_context`: torch looks up the signature of their `forward` in every call.

    `inspect` takes as long to find it as a small op takes itself, unless it is told.
    """

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]


class _Once(Op):
    """Runs a backward op. Differentiating its result is an error, never a silently missing term."""

    generate_vmap_rule = True

    @staticmethod
    def forward(family: str, op: Any, *args: Any) -> Any:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.family = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise no_second_derivative(ctx.family)


def once(family: str, op: Any, *args: Any) -> Any:
    # Autograd enables gradients here only for create_graph=True (and torch.func always).
    return _Once.apply(family, op, *args) if torch.is_grad_enabled() else op(*args)


def save_unseen(ctx: Any, outputs: tuple[Tensor, ...]) -> None:
    """Outputs that only the backward pass reads: autograd must not make gradients of zeros of their size."""
    ctx.mark_non_differentiable(*outputs)
    if not torch.compiler.is_compiling():  # Dynamo does not know the method; its graph drops unused zeros
        ctx.set_materialize_grads(False)


def needs_grad(*tensors: Tensor | None) -> list[bool]:
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]


def runner(function: type[torch.autograd.Function], grad: bool) -> Callable[..., Any]:
    """What to call. Dynamo fails on a Function without a gradient; elsewhere an outer transform may still want one."""
    return function.apply if grad or not torch.compiler.is_compiling() else function.forward


def traced(*tensors: Tensor | None) -> list[Any]:
    """Views, in a compiled function: of an argument of torch.func.grad Dynamo does not see that it needs a gradient."""
    return [x.view_as(x) if x is not None and torch.compiler.is_compiling() else x for x in tensors]


def distinct(x: Tensor | None, other: Tensor | None) -> Any:
    """A view of x if it is `other`: Dynamo does not trace a Function that gets one tensor twice."""
    return x.view_as(x) if x is not None and x is other else x
