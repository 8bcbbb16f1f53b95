"""The contrastive ops: schema, shapes, autograd and batching in one place.

similarity_lse       statistics of c_ij = q_i . k_j (cosines if `normalize`) in one sweep over tiles:
                     row_lse_i = log sum_j exp(row_scale_i c_ij), col_lse_j = log sum_i exp(col_scale_j c_ij), c_ii.
self_similarity_lse  log sum_{j != i} exp(scale_i c_ij) with c_ij = x_i . x_j; each pair is computed once.

Pairs of equal ids, and the diagonal if `drop_diagonal`, are left out of the sums. Both are differentiable once, in the
tensors and in the scales. Flops: 2MND forward, 6MND backward (4MND if the similarities were kept).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastloss._backends import implementation
from fastloss.contrastive.tiles import KEEP_BYTES

_LIBRARY = torch.library.Library("fastloss", "FRAGMENT")

_SCHEMAS = {
    "similarity_lse_fwd": (
        "(Tensor q, Tensor k, Tensor row_scale, Tensor? col_scale, Tensor? q_ids, Tensor? k_ids, "
        "bool normalize, bool drop_diagonal, bool keep) -> (Tensor row_lse, Tensor col_lse, Tensor diagonal, Tensor kept)"
    ),
    "similarity_lse_bwd": (
        "(Tensor grad_row, Tensor grad_col, Tensor grad_diagonal, Tensor q, Tensor k, Tensor row_scale, "
        "Tensor? col_scale, Tensor? q_ids, Tensor? k_ids, Tensor row_lse, Tensor col_lse, Tensor kept, "
        "bool normalize, bool drop_diagonal, bool need_q, bool need_k, bool need_scale) "
        "-> (Tensor grad_q, Tensor grad_k, Tensor grad_row_scale, Tensor grad_col_scale)"
    ),
    "self_similarity_lse_fwd": "(Tensor x, Tensor scale, Tensor? ids, bool normalize) -> Tensor",
    "self_similarity_lse_bwd": (
        "(Tensor grad, Tensor x, Tensor scale, Tensor? ids, Tensor lse, bool normalize, bool need_x, bool need_scale) "
        "-> (Tensor grad_x, Tensor grad_scale)"
    ),
}


def _kernel(name: str) -> Callable[..., Any]:
    def run(first: Tensor, *args: Any) -> Any:
        return getattr(implementation("contrastive", first.device), name)(first, *args)

    return run


def _loop_over_batch(op: Any) -> Callable[..., Any]:
    """vmap rule: one call an element; each is a large problem of its own."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        calls = [
            op(*(x if dim is None else x.select(dim, b) for x, dim in zip(args, in_dims, strict=True)))
            for b in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(torch.stack(out) for out in zip(*calls, strict=True)), (0,) * len(calls[0])

    return rule


for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    for _key in ("CPU", "CUDA", "XPU", "MPS"):
        _LIBRARY.impl(_name, _kernel(_name), _key)

_similarity_lse = torch.ops.fastloss.similarity_lse_fwd.default
_similarity_lse_bwd = torch.ops.fastloss.similarity_lse_bwd.default
_self_similarity_lse = torch.ops.fastloss.self_similarity_lse_fwd.default
_self_similarity_lse_bwd = torch.ops.fastloss.self_similarity_lse_bwd.default


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("fastloss::similarity_lse_fwd", lib=_LIBRARY)
def _(q, k, row_scale, col_scale, q_ids, k_ids, normalize, drop_diagonal, keep):  # type: ignore[no-untyped-def]
    m, n = q.shape[0], k.shape[0]
    new = row_scale.new_empty
    return new((m,)), new((0 if col_scale is None else n,)), new((torch.sym_min(m, n),)), new((m * n if keep else 0,))


@torch.library.register_fake("fastloss::similarity_lse_bwd", lib=_LIBRARY)
def _(  # type: ignore[no-untyped-def]
    grad_row, grad_col, grad_diagonal, q, k, row_scale, col_scale, q_ids, k_ids, row_lse, col_lse, kept,
    normalize, drop_diagonal, need_q, need_k, need_scale,
):  # fmt: skip
    columns = need_scale and col_scale is not None
    return (
        torch.empty(q.shape if need_q else (0,), dtype=q.dtype, device=q.device),
        torch.empty(k.shape if need_k else (0,), dtype=k.dtype, device=k.device),
        row_lse.new_empty((q.shape[0] if need_scale else 0,)),
        row_lse.new_empty((k.shape[0] if columns else 0,)),
    )


@torch.library.register_fake("fastloss::self_similarity_lse_fwd", lib=_LIBRARY)
def _(x, scale, ids, normalize):  # type: ignore[no-untyped-def]
    return scale.new_empty((x.shape[0],))


@torch.library.register_fake("fastloss::self_similarity_lse_bwd", lib=_LIBRARY)
def _(grad, x, scale, ids, lse, normalize, need_x, need_scale):  # type: ignore[no-untyped-def]
    return (
        torch.empty(x.shape if need_x else (0,), dtype=x.dtype, device=x.device),
        lse.new_empty((x.shape[0] if need_scale else 0,)),
    )


def _save_similarity(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, row_scale, col_scale, q_ids, k_ids, ctx.normalize, ctx.drop_diagonal, _ = inputs
    row_lse, col_lse, _, kept = output
    ctx.save_for_backward(q, k, row_scale, col_scale, q_ids, k_ids, row_lse, col_lse, kept)


def _similarity_backward(ctx: Any, grad_row: Tensor, grad_col: Tensor, grad_diagonal: Tensor, _: Tensor) -> Any:
    q, k, row_scale, col_scale, q_ids, k_ids, row_lse, col_lse, kept = ctx.saved_tensors
    need_q, need_k, need_row, need_col = ctx.needs_input_grad[:4]
    need_scale = need_row or need_col
    grad_q, grad_k, per_row, per_col = _similarity_lse_bwd(
        grad_row.contiguous(), grad_col.contiguous(), grad_diagonal.contiguous(),
        q, k, row_scale, col_scale, q_ids, k_ids, row_lse, col_lse, kept,
        ctx.normalize, ctx.drop_diagonal, need_q, need_k, need_scale,
    )  # fmt: skip
    return (
        grad_q if need_q else None,
        grad_k if need_k else None,
        (per_row if row_scale.dim() else per_row.sum()) if need_row else None,
        (per_col if col_scale.dim() else per_col.sum()) if need_col else None,
        None, None, None, None, None,
    )  # fmt: skip


def _save_self(ctx: Any, inputs: Any, output: Any) -> None:
    x, scale, ids, ctx.normalize = inputs
    ctx.save_for_backward(x, scale, ids, output)


def _self_backward(ctx: Any, grad: Tensor) -> Any:
    x, scale, ids, lse = ctx.saved_tensors
    need_x, need_scale = ctx.needs_input_grad[:2]
    grad_x, per_row = _self_similarity_lse_bwd(
        grad.contiguous(), x, scale, ids, lse, ctx.normalize, need_x, need_scale
    )
    return (
        grad_x if need_x else None,
        (per_row if scale.dim() else per_row.sum()) if need_scale else None,
        None,
        None,
    )


def _no_second_derivative(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        "fastloss: the contrastive losses have no second derivative (create_graph=True was asked for). "
        "fastloss.reference.contrastive has the same losses in plain PyTorch, differentiable any number of times."
    )


torch.library.register_autograd(
    "fastloss::similarity_lse_fwd", _similarity_backward, setup_context=_save_similarity, lib=_LIBRARY
)
torch.library.register_autograd(
    "fastloss::self_similarity_lse_fwd", _self_backward, setup_context=_save_self, lib=_LIBRARY
)
for _name in ("similarity_lse_bwd", "self_similarity_lse_bwd"):
    torch.library.register_autograd(f"fastloss::{_name}", _no_second_derivative, lib=_LIBRARY)
for _name in _SCHEMAS:
    torch.library.register_vmap(
        f"fastloss::{_name}", _loop_over_batch(getattr(torch.ops.fastloss, _name).default), lib=_LIBRARY
    )


def similarity_lse(
    q: Tensor,  # (M, D)
    k: Tensor,  # (N, D), the dtype of q
    row_scale: Tensor,  # () or (M,), accumulation dtype
    col_scale: Tensor | None = None,  # () or (N,); None: no column statistics
    *,
    q_ids: Tensor | None = None,  # (M,) int64
    k_ids: Tensor | None = None,  # (N,) int64
    normalize: bool = False,
    drop_diagonal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(row_lse (M,), col_lse (N,) or (0,), c_ii (min(M, N),)) in the accumulation dtype; see the module's docstring."""
    tensors = (q, k, row_scale) if col_scale is None else (q, k, row_scale, col_scale)
    size = q.shape[0] * k.shape[0] * (8 if q.dtype == torch.float64 else 4)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and size <= KEEP_BYTES
    row_lse, col_lse, diagonal, _ = _similarity_lse(
        q, k, row_scale, col_scale, q_ids, k_ids, normalize, drop_diagonal, keep
    )
    return row_lse, col_lse, diagonal


def self_similarity_lse(
    x: Tensor,  # (M, D)
    scale: Tensor,  # () or (M,), accumulation dtype
    *,
    ids: Tensor | None = None,  # (M,) int64
    normalize: bool = False,
) -> Tensor:
    """(M,) in the accumulation dtype; see the module's docstring."""
    result: Tensor = _self_similarity_lse(x, scale, ids, normalize)
    return result
