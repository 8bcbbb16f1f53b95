"""Log-sum-exps of similarities between the rows of all ranks of a process group.

A rank's queries meet the keys of all ranks, block by block (see fastloss/_distributed.py for how blocks travel). What
is exchanged is rows, and two numbers a row of statistics; never similarities. Statistics of blocks are merged, and the
backward pass repeats the blocks with the merged ones, as the tiles of one process are.

similarity_lse        both directions of q . k: the block (i, j) is computed once, on the rank of the queries i, and the
                      statistics and gradients of its columns go to the rank of the keys j.
self_similarity_lse   each unordered pair of blocks is computed once, by the rank from which the other is at most W / 2
                      to the right; at exactly W / 2 each of the two ranks takes one half of the lower rank's rows.

Flops of a rank as in one process, divided by the number of ranks; of up to 512 MiB of its similarities the first
256 MiB are kept for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss._distributed import World, eager
from fastloss._ops import accumulation_dtype, needs_grad, once
from fastloss.contrastive import ops
from fastloss.contrastive.tiles import Softmax


@eager
def similarity_lse(
    world: World,
    q: Tensor,  # (n, D), the rank's rows
    k: Tensor,  # (n, D), the dtype of q
    row_scale: Tensor,  # () or (n,), accumulation dtype; a scalar is the same on all ranks
    col_scale: Tensor | None = None,  # () or (n,); None: no column statistics
    *,
    q_ids: Tensor | None = None,  # (n,) int64
    k_ids: Tensor | None = None,  # (n,) int64
    normalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(row_lse (n,), col_lse (n,) or (0,), c_ii (n,)) over the pairs (i, j), i != j, of the rows of all ranks."""
    grad = any(needs_grad(q, k, row_scale, col_scale))
    result: tuple[Tensor, Tensor, Tensor] = _SimilarityLse.apply(
        world, q, k, row_scale, col_scale, q_ids, k_ids, normalize, grad
    )
    return result


@eager
def self_similarity_lse(
    world: World,  # with the rows of x
    x: Tensor,  # (n, D), the rank's rows
    scale: Tensor,  # () or (n,), accumulation dtype; a scalar is the same on all ranks
    own_ids: Tensor,  # (n,) int64
    ids: Tensor | None = None,  # (n,) int64
    *,
    normalize: bool = False,
) -> Tensor:
    """(n,): without pairs of equal `own_ids` within the rank, and without pairs of equal `ids` of different ranks."""
    grad = any(needs_grad(x, scale))
    result: Tensor = _SelfSimilarityLse.apply(world, x, scale, own_ids, ids, normalize, grad)
    return result


class _SimilarityLse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, world: World, q: Tensor, k: Tensor, row_scale: Tensor, col_scale: Tensor | None,
        q_ids: Tensor | None, k_ids: Tensor | None, normalize: bool, grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        left = q.to(accumulation_dtype(q.dtype))
        keep = _Budget(len(q) * sum(world.rows), left, grad)
        tour = world.tour(world.size - 1, _merge)
        row, col = _nothing(len(q), row_scale), _nothing(0 if col_scale is None else len(k), row_scale)
        kept: list[Tensor] = []
        for owner, block in tour.blocks(_parcel(k, k_ids, col_scale)):
            own = owner == world.rank
            right, ids, scale = _unpacked(block, k_ids, col_scale)
            row_lse, col_lse, c_ii, row_stats, col_stats, similarities = ops.similarity_lse_fwd(
                left, right.to(left.dtype), row_scale, scale, q_ids, ids, normalize, own, keep(len(q) * len(right))
            )
            kept.append(similarities)
            _merge(row, _state(row_lse, row_stats))
            if own:
                diagonal = c_ii
            if col_scale is not None:
                if own:
                    _merge(col, _state(col_lse, col_stats))
                else:
                    tour.give(owner, _state(col_lse, col_stats))
        if col_scale is not None:
            _merge(col, tour.returned())
        row_sums, col_sums = _softmax(row), _softmax(col)
        ctx.world, ctx.normalize = world, normalize
        ctx.save_for_backward(
            q, k, row_scale, col_scale, q_ids, k_ids, row_sums.stats(), col_sums.stats(), *kept, *tour.held
        )
        return row_sums.lse(), col_sums.lse(), diagonal

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needs = ctx.needs_input_grad[1:5]
        found = once("contrastive", _backward, ctx.world, ctx.normalize, needs, *grads, *ctx.saved_tensors)
        return None, *found, None, None, None, None


def _backward(
    world: World, normalize: bool, needs: Sequence[bool],
    grad_row: Tensor, grad_col: Tensor, grad_diagonal: Tensor,
    q: Tensor, k: Tensor, row_scale: Tensor, col_scale: Tensor | None, q_ids: Tensor | None, k_ids: Tensor | None,
    row_stats: Tensor, col_stats: Tensor, *others: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    need_q, need_k, need_row, need_col = needs
    kept, held = others[: world.size], others[world.size :]
    # Keys with scales of their own: the gradient of the scale goes home behind that of the key.
    behind = need_col and col_scale is not None and col_scale.dim() > 0
    left = q.to(row_stats.dtype)
    grad_q: Tensor | None = None
    grad_row_scale, grad_col_scale = torch.zeros_like(grad_row), grad_row.new_zeros(())
    tour = world.tour(world.size - 1, Tensor.add_, held)
    for owner, block in tour.blocks(
        _parcel(k, k_ids, col_scale), [] if col_scale is None else [col_stats.t(), grad_col]
    ):
        own = owner == world.rank
        right, ids, scale = _unpacked(block, k_ids, col_scale)
        stats, upstream = (col_stats, grad_col) if col_scale is None else (block[-2].t().contiguous(), block[-1])
        c_ii = grad_diagonal if own else grad_diagonal.new_zeros(min(len(q), len(right)))
        dq, dk, ours, theirs = ops.similarity_lse_bwd(
            grad_row, upstream, c_ii, left, right.to(left.dtype), row_scale, scale, q_ids, ids, row_stats, stats,
            kept[(owner - world.rank) % world.size], normalize, own, need_q, need_k, need_row or need_col,
        )  # fmt: skip
        if need_q:
            grad_q = dq if grad_q is None else grad_q.add_(dq)
        if need_row:
            grad_row_scale += ours
        if behind:
            dk = _with_scale(dk, theirs)
        elif need_col:
            grad_col_scale += theirs.sum()
        if own:
            mine = dk
        elif need_k or behind:
            tour.give(owner, dk)
        del block, right, dq, dk  # not to be held while the next ones come
    if need_k or behind:
        mine += tour.returned()
    if behind:
        mine, grad_col_scale = mine[:, :-1], mine[:, -1]
    return (
        grad_q.to(q.dtype) if grad_q is not None else None,
        mine.to(k.dtype) if need_k else None,
        (grad_row_scale if row_scale.dim() else grad_row_scale.sum()) if need_row else None,
        grad_col_scale if need_col else None,
    )


class _SelfSimilarityLse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, world: World, x: Tensor, scale: Tensor, own_ids: Tensor, ids: Tensor | None,
        normalize: bool, grad: bool,
    ) -> Tensor:  # fmt: skip
        left = x.to(accumulation_dtype(x.dtype))
        hops = world.size // 2
        shares = [_share(world, (world.rank + hop) % world.size) for hop in range(1, hops + 1)]
        keep = _Budget(sum(_length(r) * _length(c) for r, c in shares), left, grad)
        tour = world.tour(hops, _merge)
        state = _nothing(len(x), scale)
        kept: list[Tensor] = []
        for owner, block in tour.blocks(_parcel(x, ids, scale)):
            if owner == world.rank:
                _merge(state, _state(*ops.self_similarity_lse_fwd(left, scale, own_ids, normalize)))
                continue
            right, other_ids, other_scale = _unpacked(block, ids, scale)
            rows, columns = _share(world, owner)
            row_lse, col_lse, _, row_stats, col_stats, similarities = ops.similarity_lse_fwd(
                left[rows], right[columns].to(left.dtype), _part(scale, rows), _part(other_scale, columns),
                _part(ids, rows), _part(other_ids, columns), normalize, False, keep(_length(rows) * _length(columns)),
            )  # fmt: skip
            kept.append(similarities)
            _merge(state[rows], _state(row_lse, row_stats))
            theirs = _nothing(len(right), scale)
            theirs[columns] = _state(col_lse, col_stats)
            tour.give(owner, theirs)
        _merge(state, tour.returned())
        sums = _softmax(state)
        ctx.world, ctx.normalize = world, normalize
        ctx.save_for_backward(x, scale, own_ids, ids, sums.stats(), *kept, *tour.held)
        return sums.lse()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needs = ctx.needs_input_grad[1:3]
        found = once("contrastive", _self_backward, ctx.world, ctx.normalize, needs, grad, *ctx.saved_tensors)
        return None, *found, None, None, None, None


def _self_backward(
    world: World, normalize: bool, needs: Sequence[bool], grad: Tensor,
    x: Tensor, scale: Tensor, own_ids: Tensor, ids: Tensor | None, stats: Tensor, *others: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    need_x, need_scale = needs
    hops = world.size // 2
    kept, held = others[:hops], others[hops:]
    behind = need_scale and scale.dim() > 0
    left = x.to(stats.dtype)
    grad_x = torch.zeros_like(left) if need_x else None
    grad_scale, elsewhere = torch.zeros_like(grad), grad.new_zeros(())
    tour = world.tour(hops, Tensor.add_, held)
    for owner, block in tour.blocks(_parcel(x, ids, scale), [stats.t(), grad]):
        own = owner == world.rank
        right, other_ids, other_scale = _unpacked(block, ids, scale)
        rows, columns = _share(world, owner)
        if own:
            dx, mine = ops.self_similarity_lse_bwd(grad, left, scale, own_ids, stats, normalize, need_x, need_scale)
        else:
            dx, dy, mine, theirs = ops.similarity_lse_bwd(
                grad[rows], block[-1][columns], grad.new_zeros(min(_length(rows), _length(columns))),
                left[rows], right[columns].to(left.dtype), _part(scale, rows), _part(other_scale, columns),
                _part(ids, rows), _part(other_ids, columns),
                stats[:, rows].contiguous(), block[-2][columns].t().contiguous(),
                kept[(owner - world.rank) % world.size - 1], normalize, False, need_x, need_x, need_scale,
            )  # fmt: skip
            if need_scale and not behind:
                elsewhere += theirs.sum()
            if behind:
                dy = _with_scale(dy, theirs)
            if need_x or behind:
                tour.give(owner, F.pad(dy, (0, 0, columns.start, 0)) if columns.start else dy)
            del dy
        if grad_x is not None:
            grad_x[rows] += dx
        if need_scale:
            grad_scale[rows] += mine
        del block, right, dx  # not to be held while the next ones come
    if need_x or behind:
        home = tour.returned()
        if grad_x is not None:
            grad_x += home[:, : x.shape[1]]
        if behind:
            grad_scale += home[:, -1]
    return (
        None if grad_x is None else grad_x.to(x.dtype),
        (grad_scale if scale.dim() else grad_scale.sum() + elsewhere) if need_scale else None,
    )


class _Budget:
    """How many similarities a block keeps for the backward pass, of those that all blocks together may keep."""

    def __init__(self, pairs: int, x: Tensor, grad: bool) -> None:
        self.left = ops.kept(pairs, x) if grad else 0

    def __call__(self, pairs: int) -> int:
        taken = min(pairs, self.left)
        self.left -= taken
        return taken


def _share(world: World, owner: int) -> tuple[slice, slice]:
    """The rows and the columns of the block (this rank, owner) that this rank computes."""
    rank, rows = world.rank, world.rows
    first, second = slice(0, rows[rank]), slice(0, rows[owner])
    if 2 * ((owner - rank) % world.size) != world.size:
        return first, second
    half = (rows[min(rank, owner)] + 1) // 2
    return (slice(0, half), second) if rank < owner else (first, slice(half, rows[owner]))


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _part(x: Tensor | None, part: slice) -> Tensor | None:
    return x if x is None or not x.dim() else x[part]


def _parcel(rows: Tensor, ids: Tensor | None, scale: Tensor | None) -> list[Tensor]:
    """What of a block travels: its rows, their ids, and their scales if they have their own."""
    return [rows, *([] if ids is None else [ids]), *([scale] if scale is not None and scale.dim() else [])]


def _unpacked(
    block: list[Tensor], ids: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows, ids and scales of a block that was packed like this rank's."""
    rest = iter(block[1:])
    return block[0], None if ids is None else next(rest), scale if scale is None or not scale.dim() else next(rest)


def _with_scale(grad: Tensor, per_row: Tensor) -> Tensor:
    """The gradients of rows (n, D), or (0,) if not needed, and behind them those of their scales (n,)."""
    return torch.cat((grad if grad.dim() == 2 else grad.view(len(per_row), 0), per_row.unsqueeze(1)), 1)


# A state is (n, 2): the maximum of the base-2 logits of a row, -inf where nothing was seen, and the sum of 2^(z - max);
# both are inf where a logit was.


def _nothing(n: int, like: Tensor) -> Tensor:
    return like.new_tensor([-math.inf, 0.0]).repeat(n, 1)


def _state(lse: Tensor, stats: Tensor) -> Tensor:
    """Of the log-sum-exps (n,) and the statistics (2, n) that the ops return."""
    shift, inverse = stats  # 0 and 0 where lse is infinite
    return torch.stack(
        (torch.where(inverse == 0, lse, shift), inverse.reciprocal().masked_fill_(lse == -math.inf, 0)), 1
    )


def _merge(state: Tensor, other: Tensor) -> Tensor:
    """Adds the sums of `other`, over other columns, to `state`."""
    top = torch.maximum(state[:, 0], other[:, 0])
    shift = top.masked_fill(top.isinf(), 0)  # -inf - 0, not -inf - -inf
    state[:, 1].mul_((state[:, 0] - shift).exp2_()).addcmul_(other[:, 1], (other[:, 0] - shift).exp2_())
    state[:, 0] = top
    return state


def _softmax(state: Tensor) -> Softmax:
    return Softmax(state.new_empty(()), state[:, 0], state[:, 1])
