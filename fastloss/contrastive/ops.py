"""The contrastive ops: schema, shapes, autograd and batching in one place.

similarity_lse       statistics of c_ij = q_i . k_j (cosines if `normalize`) in one sweep over tiles:
                     row_lse_i = log sum_j exp(row_scale_i c_ij), col_lse_j = log sum_i exp(col_scale_j c_ij), c_ii.
pair_nll             sum_i softplus(log sum_{j != i} exp(scale_i c_ij) - scale_i c_ii), or its mean with that of the
                     columns, and its gradients in the forward pass: with a scalar reduction they are known but for a
                     factor. For gradients of up to 32 MiB, and both directions of up to 32 MiB of similarities.
self_similarity_lse  log sum_{j != i} exp(scale_i c_ij) with c_ij = x_i . x_j; each pair is computed once.

Pairs of equal ids, and the diagonal if `drop_diagonal`, are left out of the sums. All are differentiable once, in the
tensors and in the scales. Flops, forward + backward: similarity_lse 8MND, but 6MND for
similarities that are kept, up to 256 MiB where that is at least half of them; pair_nll 6MND; self_similarity_lse 4MMD.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss._backends import TRITON, backend_of
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
from fastloss.contrastive.tiles import KEEP_BYTES, PANEL_BYTES, PANEL_ROWS, WAITING_BYTES, margin

_SCHEMAS = {
    "similarity_lse_fwd": (
        "(Tensor q, Tensor k, Tensor row_scale, Tensor? col_scale, Tensor? q_ids, Tensor? k_ids, "
        "bool normalize, bool drop_diagonal, SymInt keep) "
        "-> (Tensor row_lse, Tensor col_lse, Tensor diagonal, Tensor row_stats, Tensor col_stats, Tensor kept)"
    ),
    "similarity_lse_bwd": (
        "(Tensor grad_row, Tensor grad_col, Tensor grad_diagonal, Tensor q, Tensor k, Tensor row_scale, "
        "Tensor? col_scale, Tensor? q_ids, Tensor? k_ids, Tensor row_stats, Tensor col_stats, Tensor kept, "
        "bool normalize, bool drop_diagonal, bool need_q, bool need_k, bool need_scale) "
        "-> (Tensor grad_q, Tensor grad_k, Tensor grad_row_scale, Tensor grad_col_scale)"
    ),
    "pair_nll_fwd": (
        "(Tensor q, Tensor k, Tensor scale, Tensor? q_ids, Tensor? k_ids, bool normalize, bool symmetric, "
        "bool need_q, bool need_k, bool need_scale) -> (Tensor total, Tensor grad_q, Tensor grad_k, Tensor grad_scale)"
    ),
    "pair_nll_bwd": (
        "(Tensor grad, Tensor q, Tensor k, Tensor scale, Tensor grad_q, Tensor grad_k, Tensor grad_scale) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "self_similarity_lse_fwd": ("(Tensor x, Tensor scale, Tensor? ids, bool normalize) -> (Tensor lse, Tensor stats)"),
    "self_similarity_lse_bwd": (
        "(Tensor grad, Tensor x, Tensor scale, Tensor? ids, Tensor stats, bool normalize, "
        "bool need_x, bool need_scale) "
        "-> (Tensor grad_x, Tensor grad_scale)"
    ),
}


define("contrastive", _SCHEMAS)

similarity_lse_fwd = torch.ops.fastloss.similarity_lse_fwd.default
similarity_lse_bwd = torch.ops.fastloss.similarity_lse_bwd.default
_pair_nll = torch.ops.fastloss.pair_nll_fwd.default
_pair_nll_bwd = torch.ops.fastloss.pair_nll_bwd.default
self_similarity_lse_fwd = torch.ops.fastloss.self_similarity_lse_fwd.default
self_similarity_lse_bwd = torch.ops.fastloss.self_similarity_lse_bwd.default


@torch.library.register_fake("fastloss::similarity_lse_fwd", lib=LIBRARY)
def _(q, k, row_scale, col_scale, q_ids, k_ids, normalize, drop_diagonal, keep):  # type: ignore[no-untyped-def]
    m, n = q.shape[0], k.shape[0]
    new = row_scale.new_empty
    columns = 0 if col_scale is None else n
    return new((m,)), new((columns,)), new((torch.sym_min(m, n),)), new((2, m)), new((2, columns)), new((keep,))


@torch.library.register_fake("fastloss::similarity_lse_bwd", lib=LIBRARY)
def _(  # type: ignore[no-untyped-def]
    grad_row, grad_col, grad_diagonal, q, k, row_scale, col_scale, q_ids, k_ids, row_stats, col_stats, kept,
    normalize, drop_diagonal, need_q, need_k, need_scale,
):  # fmt: skip
    columns = need_scale and col_scale is not None
    return (
        torch.empty(q.shape if need_q else (0,), dtype=q.dtype, device=q.device),
        torch.empty(k.shape if need_k else (0,), dtype=k.dtype, device=k.device),
        row_stats.new_empty((q.shape[0] if need_scale else 0,)),
        row_stats.new_empty((k.shape[0] if columns else 0,)),
    )


@torch.library.register_fake("fastloss::pair_nll_fwd", lib=LIBRARY)
def _(q, k, scale, q_ids, k_ids, normalize, symmetric, need_q, need_k, need_scale):  # type: ignore[no-untyped-def]
    return (
        scale.new_empty(()),
        scale.new_empty(q.shape if need_q else (0,)),
        scale.new_empty(k.shape if need_k else (0,)),
        scale.new_empty((q.shape[0] if need_scale else 0,)),
    )


@torch.library.register_fake("fastloss::pair_nll_bwd", lib=LIBRARY)
def _(grad, q, k, scale, grad_q, grad_k, grad_scale):  # type: ignore[no-untyped-def]
    return (
        torch.empty_like(grad_q, dtype=q.dtype),
        torch.empty_like(grad_k, dtype=k.dtype),
        torch.empty_like(grad_scale),
    )


@torch.library.register_fake("fastloss::self_similarity_lse_fwd", lib=LIBRARY)
def _(x, scale, ids, normalize):  # type: ignore[no-untyped-def]
    return scale.new_empty((x.shape[0],)), scale.new_empty((2, x.shape[0]))


@torch.library.register_fake("fastloss::self_similarity_lse_bwd", lib=LIBRARY)
def _(grad, x, scale, ids, stats, normalize, need_x, need_scale):  # type: ignore[no-untyped-def]
    return (
        torch.empty(x.shape if need_x else (0,), dtype=x.dtype, device=x.device),
        stats.new_empty((x.shape[0] if need_scale else 0,)),
    )


class _SimilarityLse(Op):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return similarity_lse_fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, row_scale, col_scale, q_ids, k_ids, ctx.normalize, ctx.drop_diagonal, _ = inputs
        save_unseen(ctx, output[3:])
        ctx.save_for_backward(q, k, row_scale, col_scale, q_ids, k_ids, *output[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # read once: activation checkpointing unpacks a tensor one time
        q, k, row_scale, col_scale = saved[:4]
        lengths = (q.shape[0], 0 if col_scale is None else k.shape[0], torch.sym_min(q.shape[0], k.shape[0]))
        upstream = (
            row_scale.new_zeros((n,)) if grad is None else grad for grad, n in zip(grads[:3], lengths, strict=True)
        )
        need_q, need_k, need_row, need_col = ctx.needs_input_grad[:4]
        grad_q, grad_k, per_row, per_col = once(
            "contrastive", similarity_lse_bwd, *upstream, *saved,
            ctx.normalize, ctx.drop_diagonal, need_q, need_k, need_row or need_col,
        )  # fmt: skip
        return (
            grad_q if need_q else None,
            grad_k if need_k else None,
            (per_row if row_scale.dim() else per_row.sum()) if need_row else None,
            (per_col if col_scale.dim() else per_col.sum()) if need_col else None,
            None, None, None, None, None,
        )  # fmt: skip


class _PairNll(Op):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return _pair_nll(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        save_unseen(ctx, output[1:])
        ctx.save_for_backward(*inputs[:3], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return (None,) * 10
        saved = ctx.saved_tensors
        scale = saved[2]
        need_q, need_k, need_scale = ctx.needs_input_grad[:3]
        grad_q, grad_k, per_row = once("contrastive", _pair_nll_bwd, grad, *saved)
        return (
            grad_q if need_q else None,
            grad_k if need_k else None,
            (per_row if scale.dim() else per_row.sum()) if need_scale else None,
            None, None, None, None, None, None, None,
        )  # fmt: skip


class _SelfSimilarityLse(Op):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return self_similarity_lse_fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, scale, ids, ctx.normalize = inputs
        save_unseen(ctx, output[1:])
        ctx.save_for_backward(x, scale, ids, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
        if grad is None:
            return (None,) * 4
        saved = ctx.saved_tensors
        scale = saved[1]
        need_x, need_scale = ctx.needs_input_grad[:2]
        grad_x, per_row = once("contrastive", self_similarity_lse_bwd, grad, *saved, ctx.normalize, need_x, need_scale)
        return (
            grad_x if need_x else None,
            (per_row if scale.dim() else per_row.sum()) if need_scale else None,
            None,
            None,
        )


batch(_SCHEMAS)


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
    grad = any(needs_grad(q, k, row_scale, col_scale))
    keep = kept(q.shape[0] * k.shape[0], q) if grad else 0
    k, col_scale, k_ids = distinct(k, q), distinct(col_scale, row_scale), distinct(k_ids, q_ids)
    row_lse, col_lse, diagonal, *_ = runner(_SimilarityLse, grad)(
        q, k, row_scale, col_scale, q_ids, k_ids, normalize, drop_diagonal, keep
    )
    return row_lse, col_lse, diagonal


def kept(pairs: int, like: Tensor) -> int:
    """How many similarities the backward pass does not compute again."""
    if backend_of(like.device) == TRITON:
        return 0  # the matrix units take less time to compute one than memory to write and read it
    most = KEEP_BYTES // accumulation_dtype(like.dtype).itemsize
    keep: int = torch.sym_min(pairs, most) if pairs <= 2 * most else 0
    return keep


def pair_nll(
    q: Tensor,  # (M, D)
    k: Tensor,  # (N, D), N >= M, the dtype of q
    scale: Tensor,  # () or (M,), accumulation dtype
    *,
    q_ids: Tensor | None = None,  # (M,) int64
    k_ids: Tensor | None = None,  # (N,) int64
    normalize: bool = False,
    symmetric: bool = False,  # the mean of both directions; N = M
) -> Tensor:
    """() in the accumulation dtype; see the module's docstring."""
    needs = needs_grad(q, k, scale)
    size = 8 if q.dtype == torch.float64 else 4
    fits = (needs[0] * q.numel() + needs[1] * k.numel()) * size <= WAITING_BYTES
    if symmetric:
        fits = fits and q.shape[0] * k.shape[0] * size <= PANEL_BYTES
    else:
        fits = fits and PANEL_ROWS * k.shape[0] * size <= PANEL_BYTES
    # What a transform wants outside of vmap cannot be seen in it.
    if fits and (any(needs) or not torch._C._are_functorch_transforms_active()):
        k, k_ids = distinct(k, q), distinct(k_ids, q_ids)
        run = _PairNll.apply if any(needs) else _pair_nll
        total: Tensor = run(q, k, scale, q_ids, k_ids, normalize, symmetric, *needs)[0]
        return total
    row_lse, col_lse, diagonal = similarity_lse(
        q,
        k,
        scale,
        scale if symmetric else None,
        q_ids=q_ids,
        k_ids=k_ids,
        normalize=normalize,
        drop_diagonal=True,
    )
    positive = scale * diagonal
    loss = nll(row_lse, positive)
    return ((loss + nll(col_lse, positive)) / 2 if symmetric else loss).sum()


def nll(negatives: Tensor, positive: Tensor) -> Tensor:
    """-log(e^positive / (e^positive + e^negatives)); softplus(x) = x beyond 40 to the last bit of float64."""
    return F.softplus(margin(negatives, positive), threshold=40)


def self_similarity_lse(
    x: Tensor,  # (M, D)
    scale: Tensor,  # () or (M,), accumulation dtype
    *,
    ids: Tensor | None = None,  # (M,) int64
    normalize: bool = False,
) -> Tensor:
    """(M,) in the accumulation dtype; see the module's docstring."""
    result: Tensor = runner(_SelfSimilarityLse, any(needs_grad(x, scale)))(x, scale, ids, normalize)[0]
    return result
