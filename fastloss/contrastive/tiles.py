"""The tile loops of the contrastive ops, shared by the portable and the native backend.

A similarity c_ij = x_i . y_j lives only in one scratch tile at a time: `torch.mm` writes it, an epilogue consumes it.
The backends differ in the epilogue. Logits are kept in base 2 (log2(e) is folded into the scales).

Notation: M rows, N columns, D features; a *direction* is "row" (softmax over the columns of each row) or "col".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
NORM_EPS = 1e-12  # torch.nn.functional.normalize's

# 2 MiB of scratch stay in the L2/L3 caches between the product and the epilogue.
TILE_ROWS = 1024
TILE_COLS = 512
# A self-similarity is covered by square tiles on and above the diagonal; small ones waste less on the diagonal.
SELF_TILE = 512
# So many similarities may be kept for the backward pass instead of being computed again: 6MND flops for them, not
# 8MND. Only where they are at least half of all: of a larger matrix they would save less time than they cost memory.
KEEP_BYTES = 256 << 20
# One direction with a scalar reduction needs nothing but its own rows: a panel of whole rows serves forward and
# backward, 6MND flops. At least 128 rows, below which the products lose their speed: 512 bytes a column in float32.
PANEL_BYTES = 32 << 20
PANEL_ROWS = 128
# Its gradients wait for the upstream factor, which makes new ones of them: up to this size speed is worth the copy.
WAITING_BYTES = 32 << 20
# Rows that many tiles ask for are normalised once and held, up to this size.
HELD_BYTES = 16 << 20


class Mask(NamedTuple):
    """Pairs of a tile that are left out: (i, i + diagonal), and those of equal ids."""

    diagonal: int | None
    row_ids: Tensor | None  # (rows,)
    col_ids: Tensor | None  # (cols,)


def per_row(x: Tensor, part: slice) -> Tensor:
    """The part of a vector, or a scalar that serves all rows."""
    return x if x.dim() == 0 else x[part]


def margin(negatives: Tensor, positive: Tensor) -> Tensor:
    """negatives - positive, but NaN, not -inf, for a positive of +inf, whose probability is inf / inf."""
    return negatives - positive - 0 * positive.clamp(min=0)


@dataclass
class Softmax:
    """One direction's state in base 2: the scale, and per row (or column) the online maximum and sum.

    The maximum is that of the logits rounded to integers: 2^(z - max) only moves the exponent of 2^z. Of both
    directions of a square matrix, `max` and `sum` are the rows of (2, n) tensors.
    """

    scale: Tensor  # () or (n,), contiguous
    max: Tensor  # (n,) or (2, n)
    sum: Tensor  # (n,) or (2, n)

    @classmethod
    def start(cls, scale: Tensor, *shape: int) -> Softmax:
        return cls((scale * LOG2_E).contiguous(), scale.new_full(shape, -math.inf), scale.new_zeros(shape))

    def __getitem__(self, part: slice) -> Softmax:
        return Softmax(per_row(self.scale, part), self.max[part], self.sum[part])

    def direction(self, which: int) -> Softmax:
        return Softmax(self.scale, self.max[which], self.sum[which])

    def stats(self) -> Tensor:
        """(2, n) or (2, 2, n): the shift, and one over the sum of 2^(z - shift), 0 where all pairs are left out.

        The backward pass repeats exactly these exponentials.
        """
        return torch.stack(
            (self.max.masked_fill(self.max.isinf(), 0), self.sum.reciprocal().masked_fill_(self.sum == 0, 0))
        )

    def lse(self) -> Tensor:
        """Natural log-sum-exp; -inf where nothing was seen."""
        return self.sum.log2().add_(self.max).mul_(1 / LOG2_E)


@dataclass
class Gradient:
    """One direction's inputs of the backward pass, in base 2, and its accumulated sum of 2^(z - shift) c.

    The softmax is 2^(z - shift) / sum with the forward pass's own shift and sum: a saturated row gives exactly one,
    where 2^(z - lse) would carry the rounding of lse, |lse| times that of one.
    """

    scale: Tensor  # () or (n,)
    shift: Tensor  # (n,)
    weight: Tensor  # (n,)  upstream gradient times the natural scale, over the sum
    dot: Tensor | None  # (n,)

    @classmethod
    def start(cls, scale: Tensor, stats: Tensor, upstream: Tensor, need_dot: bool) -> Gradient:
        return cls(
            (scale * LOG2_E).contiguous(),
            stats[0],
            upstream * scale * stats[1],
            torch.zeros_like(upstream) if need_dot else None,
        )

    def __getitem__(self, part: slice) -> Gradient:
        dot = None if self.dot is None else self.dot[part]
        return Gradient(per_row(self.scale, part), self.shift[part], self.weight[part], dot)

    def direction(self, which: int) -> Gradient:
        dot = None if self.dot is None else self.dot[which]
        return Gradient(self.scale, self.shift[which], self.weight[which], dot)

    def without_dot(self) -> Gradient:
        """The same inputs; the dots go to a buffer of their own, which is dropped."""
        return Gradient(self.scale, self.shift, self.weight, None if self.dot is None else torch.zeros_like(self.dot))

    def scale_grad(self, upstream: Tensor, stats: Tensor) -> Tensor:
        """Gradient of the natural scale per row: upstream * E_P[c]."""
        assert self.dot is not None
        return upstream * self.dot * stats[1]


class Turn(NamedTuple):
    """What lies between the passes of `pair_nll`, of `directions` = 1 or 2 softmaxes of n pairs each."""

    total: Tensor  # ()  the loss: softplus(x) of every pair, x = lse - scale c, the mean of both directions
    gradient: Gradient  # of the negatives; (directions, n)
    factor: Tensor  # (directions, n)  its upstream gradient sigmoid(x) / directions, over the sum
    slope: Tensor  # (n,)  minus the gradient of the positive logit: the upstream gradients of both directions

    def scale_grad(self, diagonal: Tensor, out: Tensor) -> None:
        """The gradient of the natural scale per row."""
        assert self.gradient.dot is not None
        torch.sub((self.factor * self.gradient.dot).sum(0), self.slope * diagonal, out=out)


def turn(state: Softmax, scale: Tensor, diagonal: Tensor, need_dot: bool) -> Turn:
    """In PyTorch. scale: the natural one, () or (n,); diagonal: c_ii, (n,)."""
    directions = len(state.max)
    x = margin(state.lse(), scale * diagonal)
    total = torch.nn.functional.softplus(x, threshold=40).sum() / directions
    upstream, stats = x.sigmoid_().mul_(1 / directions), state.stats()
    gradient = Gradient.start(scale, stats, upstream, need_dot)
    return Turn(total, gradient, upstream * stats[1], upstream.sum(0))


class Epilogue(Protocol):
    """What a backend does with a tile, and between the passes."""

    def lse_tile(self, c: Tensor, row: Softmax, col: Softmax | None, mask: Mask) -> None:
        """Adds the tile c (rows, cols) to the statistics."""
        ...

    def grad_tile(self, c: Tensor, out: Tensor, row: Gradient, col: Gradient | None, mask: Mask) -> None:
        """out_ij = row.weight_i P_ij + col.weight_j R_ij, zero where masked; out may be c. Adds to the dots."""
        ...

    def turn(self, state: Softmax, scale: Tensor, diagonal: Tensor, need_dot: bool) -> Turn:
        """What `tiles.turn` gives."""
        ...

    def inverse_norms(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What `tiles.inverse_norms` gives, of rows side by side."""
        ...

    def through_norms(self, grad: Tensor, unit: Tensor, inverse: Tensor) -> None:
        """What `tiles.through_norms` does; all contiguous, in one dtype."""
        ...


def inverse_norms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows,). A row of exactly zero stays zero and gets no gradient (1 / eps would make it 1e12)."""
    norm = torch.linalg.vector_norm(x, dim=1, dtype=dtype)
    return torch.where(norm == 0, norm, norm.clamp(min=NORM_EPS).reciprocal())


def through_norms(grad: Tensor, unit: Tensor, inverse: Tensor) -> None:
    """Turns the gradient of normalised rows into that of the rows themselves, in place. inverse: (rows,)."""
    along = torch.einsum("rd,rd->r", unit, grad)
    along = torch.where(inverse * NORM_EPS < 1, along, 0)  # shorter rows are divided by eps, a constant
    grad.addcmul_(unit, along.unsqueeze(1), value=-1).mul_(inverse.unsqueeze(1))


class Side:
    """The rows of one input, cast to the accumulation dtype and normalised: block by block on demand, or held."""

    def __init__(self, epilogue: Epilogue, x: Tensor, normalize: bool, block: int, hold: bool = False) -> None:
        self.epilogue = epilogue
        self.x = x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.direct = not normalize and x.dtype == self.dtype
        self.inverse_norm: Tensor | None = None
        if normalize:
            self.inverse_norm = epilogue.inverse_norms(self.x, self.dtype)
        hold = hold and x.numel() * self.dtype.itemsize <= HELD_BYTES
        rows = 0 if self.direct else x.shape[0] if hold else min(block, x.shape[0])
        self.scratch = torch.empty((rows, x.shape[1]), dtype=self.dtype, device=x.device)
        self.held = self._write(self.x, self.scratch) if hold and not self.direct else None

    def __getitem__(self, part: slice) -> Tensor:
        """Rows `part`, (rows, D); valid until the next call."""
        if self.held is not None:
            return self.held[part]
        block = self.x[part]
        return block if self.direct else self._write(block, self.scratch[: block.shape[0]], part)

    def _write(self, block: Tensor, out: Tensor, part: slice = slice(None)) -> Tensor:
        if self.inverse_norm is None:
            return out.copy_(block)
        return torch.mul(block, self.inverse_norm[part].unsqueeze(1), out=out)

    def finish(self, grad: Tensor, part: slice, unit: Tensor) -> None:
        """Turns the gradient of the normalised rows `unit` into that of the rows given, in place."""
        if self.inverse_norm is not None:
            self.epilogue.through_norms(grad, unit, self.inverse_norm[part])


def blocks(n: int, size: int, first: int = 0) -> Iterator[slice]:
    for start in range(first, n, size):
        yield slice(start, min(start + size, n))


def _tile(buffer: Tensor, rows: slice, cols: slice, start: int = 0) -> Tensor:
    """A contiguous tile of the size (rows, cols) in a flat buffer."""
    shape = (rows.stop - rows.start, cols.stop - cols.start)
    return buffer[start : start + shape[0] * shape[1]].view(shape)


def _kept_tile(kept: Tensor, rows: slice, cols: slice, n: int) -> Tensor | None:
    """The tile's own place in the order of the sweep, if the buffer reaches that far."""
    start = rows.start * n + (rows.stop - rows.start) * cols.start
    end = start + (rows.stop - rows.start) * (cols.stop - cols.start)
    return _tile(kept, rows, cols, start) if end <= kept.shape[0] else None


def _mask(drop_diagonal: bool, rows: slice, cols: slice, row_ids: Tensor | None, col_ids: Tensor | None) -> Mask:
    return Mask(
        rows.start - cols.start if drop_diagonal else None,
        None if row_ids is None else row_ids[rows],
        None if col_ids is None else col_ids[cols],
    )


def _diagonal(rows: slice, cols: slice) -> tuple[slice, int]:
    """The indices i whose pair (i, i) lies in the tile, and the offset of that diagonal within it."""
    return slice(max(rows.start, cols.start), min(rows.stop, cols.stop)), rows.start - cols.start


def lse_forward(
    epilogue: Epilogue,
    q: Tensor,  # (M, D)
    k: Tensor,  # (N, D)
    row_scale: Tensor,  # () or (M,)
    col_scale: Tensor | None,  # () or (N,); None: no column statistics
    q_ids: Tensor | None,  # (M,)
    k_ids: Tensor | None,  # (N,)
    normalize: bool,
    drop_diagonal: bool,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the op returns.

    row_lse (M,), col_lse (N,) or (0,), c_ii (min(M, N),); for the backward pass the row and column statistics, (2, M)
    and (2, N) or (2, 0), and the first `keep` similarities, tile by tile, (keep,).
    """
    m, n = q.shape[0], k.shape[0]
    left, right = Side(epilogue, q, normalize, TILE_ROWS), Side(epilogue, k, normalize, TILE_COLS, hold=True)
    row = Softmax.start(row_scale, m)
    col = None if col_scale is None else Softmax.start(col_scale, n)
    diagonal = row.max.new_empty((min(m, n),))
    kept = row.max.new_empty((keep,))
    scratch = row.max.new_empty((0 if keep == m * n else min(m, TILE_ROWS) * min(n, TILE_COLS),))
    for i in blocks(m, TILE_ROWS):
        q_block = left[i]
        for j in blocks(n, TILE_COLS):
            held = _kept_tile(kept, i, j, n)
            c = torch.mm(q_block, right[j].t(), out=_tile(scratch, i, j) if held is None else held)
            both, offset = _diagonal(i, j)
            if both.start < both.stop:
                diagonal[both] = c.diagonal(offset)
            epilogue.lse_tile(c, row[i], None if col is None else col[j], _mask(drop_diagonal, i, j, q_ids, k_ids))
    if col is None:
        col = Softmax.start(row_scale.new_empty((0,)), 0)
    return row.lse(), col.lse(), diagonal, row.stats(), col.stats(), kept


def lse_backward(
    epilogue: Epilogue,
    grad_row: Tensor,  # (M,)
    grad_col: Tensor,  # (N,) or (0,)
    grad_diagonal: Tensor,  # (min(M, N),)
    q: Tensor,
    k: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    row_stats: Tensor,
    col_stats: Tensor,
    kept: Tensor,
    normalize: bool,
    drop_diagonal: bool,
    need_q: bool,
    need_k: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and of the scales per row (M,) and per column (N,); (0,) for what is not needed."""
    m, n = q.shape[0], k.shape[0]
    left, right = Side(epilogue, q, normalize, TILE_ROWS), Side(epilogue, k, normalize, TILE_COLS, hold=True)
    row = Gradient.start(row_scale, row_stats, grad_row, need_scale)
    col = None if col_scale is None else Gradient.start(col_scale, col_stats, grad_col, need_scale)
    dtype = left.dtype
    empty = row_stats.new_empty((0,))
    grad_q = torch.empty(q.shape if need_q else (0,), dtype=q.dtype, device=q.device)
    grad_k = torch.empty(k.shape if need_k else (0,), dtype=dtype, device=k.device)
    if m == 0:
        grad_k.zero_()
    block_grad = grad_q if q.dtype == dtype else row_stats.new_empty((min(m, TILE_ROWS), q.shape[1]))
    scratch = row_stats.new_empty((min(m, TILE_ROWS) * min(n, TILE_COLS),))
    for i in blocks(m, TILE_ROWS):
        q_block = left[i]
        dq = (block_grad[i] if q.dtype == dtype else block_grad[: i.stop - i.start]) if need_q else empty
        if n == 0:
            dq.zero_()
        for j in blocks(n, TILE_COLS):
            k_block = right[j]
            g = _tile(scratch, i, j)
            held = _kept_tile(kept, i, j, n)
            c = torch.mm(q_block, k_block.t(), out=g) if held is None else held
            epilogue.grad_tile(c, g, row[i], None if col is None else col[j], _mask(drop_diagonal, i, j, q_ids, k_ids))
            both, offset = _diagonal(i, j)
            if both.start < both.stop:
                g.diagonal(offset).add_(grad_diagonal[both])
            if need_q:
                torch.addmm(dq, g, k_block, beta=0 if j.start == 0 else 1, out=dq)
            if need_k:
                torch.addmm(grad_k[j], g.t(), q_block, beta=0 if i.start == 0 else 1, out=grad_k[j])
        if need_q:
            left.finish(dq, i, q_block)
            if q.dtype != dtype:
                grad_q[i] = dq
    if need_k:
        for j in blocks(n, TILE_COLS):
            right.finish(grad_k[j], j, right[j] if normalize else empty)
    return (
        grad_q,
        grad_k.to(k.dtype),
        row.scale_grad(grad_row, row_stats) if need_scale else empty,
        col.scale_grad(grad_col, col_stats) if need_scale and col is not None else empty,
    )


def self_lse_forward(
    epilogue: Epilogue,
    x: Tensor,  # (M, D)
    scale: Tensor,  # () or (M,)
    ids: Tensor | None,  # (M,)
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """log sum over j != i of exp(scale_i c_ij), (M,), and the statistics (2, M). Each c_ij = c_ji is computed once."""
    n = x.shape[0]
    left, right = Side(epilogue, x, normalize, SELF_TILE), Side(epilogue, x, normalize, SELF_TILE, hold=True)
    state = Softmax.start(scale, n)
    scratch = state.max.new_empty((min(n, SELF_TILE) ** 2,))
    for i in blocks(n, SELF_TILE):
        x_block = left[i]
        for j in blocks(n, SELF_TILE, i.start):
            diagonal = i == j
            c = torch.mm(x_block, (x_block if diagonal else right[j]).t(), out=_tile(scratch, i, j))
            epilogue.lse_tile(c, state[i], None if diagonal else state[j], _mask(True, i, j, ids, ids))
    return state.lse(), state.stats()


def self_lse_backward(
    epilogue: Epilogue,
    grad: Tensor,  # (M,)
    x: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    stats: Tensor,
    normalize: bool,
    need_x: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the scale per row."""
    n = x.shape[0]
    left, right = Side(epilogue, x, normalize, SELF_TILE), Side(epilogue, x, normalize, SELF_TILE, hold=True)
    state = Gradient.start(scale, stats, grad, need_scale)
    total = torch.zeros(x.shape, dtype=left.dtype, device=x.device) if need_x else stats.new_empty((0,))
    scratch = stats.new_empty((min(n, SELF_TILE) ** 2,))
    for i in blocks(n, SELF_TILE):
        x_block = left[i]
        for j in blocks(n, SELF_TILE, i.start):
            diagonal = i == j
            y_block = x_block if diagonal else right[j]
            g = torch.mm(x_block, y_block.t(), out=_tile(scratch, i, j))
            # A tile on the diagonal holds each pair twice: taking both directions makes it symmetric and its row
            # sums complete; its column dots repeat the row dots.
            col = state[j].without_dot() if diagonal else state[j]
            epilogue.grad_tile(g, g, state[i], col, _mask(True, i, j, ids, ids))
            if need_x:
                total[i].addmm_(g, y_block)
                if not diagonal:
                    total[j].addmm_(g.t(), x_block)
    if need_x and normalize:
        for i in blocks(n, SELF_TILE):
            left.finish(total[i], i, left[i])
    grad_scale = state.scale_grad(grad, stats) if need_scale else stats.new_empty((0,))
    return total.to(x.dtype) if need_x else total, grad_scale


def pair_nll(
    epilogue: Epilogue,
    q: Tensor,  # (M, D)
    k: Tensor,  # (N, D), N >= M
    scale: Tensor,  # () or (M,)
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    normalize: bool,
    symmetric: bool,  # then N = M, and one panel holds the whole matrix
    need_q: bool,
    need_k: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum_i softplus(lse_i - scale_i c_ii), lse_i without the diagonal, and its gradients, in one sweep.

    If symmetric, the mean of that and of the same for the columns, column i with scale_i. The gradients are in the
    accumulation dtype: a loss scale may still multiply them. The loss does not depend on which are needed.
    """
    m, n = q.shape[0], k.shape[0]
    height = max(m, 1) if symmetric else max(PANEL_ROWS, min(TILE_ROWS, PANEL_BYTES // (max(n, 1) * 4)))
    left, right = Side(epilogue, q, normalize, height), Side(epilogue, k, normalize, TILE_COLS, hold=True)
    dtype = left.dtype
    directions = 2 if symmetric else 1
    second_pass = need_q or need_k or need_scale
    empty = scale.new_empty((0,))
    totals = []
    grad_q = torch.empty(q.shape if need_q else (0,), dtype=dtype, device=q.device)
    grad_k = torch.empty(k.shape if need_k else (0,), dtype=dtype, device=k.device)
    grad_scale = scale.new_empty((m if need_scale else 0,))
    panel = scale.new_empty((min(m, height) * (n if second_pass else min(n, TILE_COLS)),))
    for i in blocks(m, height):
        q_block = left[i]
        rows = slice(0, i.stop - i.start)
        dq = grad_q[i] if need_q else empty
        row_scale = per_row(scale, i)
        state = Softmax.start(row_scale, directions, rows.stop)
        row, col = state.direction(0), state.direction(1) if symmetric else None
        diagonal = scale.new_empty((rows.stop,))
        for j in blocks(n, TILE_COLS):
            c = torch.mm(q_block, right[j].t(), out=_tile(panel, rows, j, rows.stop * j.start if second_pass else 0))
            both, offset = _diagonal(i, j)
            if both.start < both.stop:
                diagonal[both.start - i.start : both.stop - i.start] = c.diagonal(offset)
            epilogue.lse_tile(c, row, col and col[j], _mask(True, i, j, q_ids, k_ids))
        turned = epilogue.turn(state, row_scale, diagonal, need_scale)
        totals.append(turned.total)
        if not second_pass:
            continue
        row_grad, col_grad = turned.gradient.direction(0), turned.gradient.direction(1) if symmetric else None
        pull = turned.slope * row_scale
        for j in blocks(n, TILE_COLS):
            g = _tile(panel, rows, j, rows.stop * j.start)
            epilogue.grad_tile(g, g, row_grad, col_grad and col_grad[j], _mask(True, i, j, q_ids, k_ids))
            both, offset = _diagonal(i, j)
            if both.start < both.stop:
                g.diagonal(offset).sub_(pull[both.start - i.start : both.stop - i.start])
            if need_q:
                torch.addmm(dq, g, right[j], beta=0 if j.start == 0 else 1, out=dq)
            if need_k:
                torch.addmm(grad_k[j], g.t(), q_block, beta=0 if i.start == 0 else 1, out=grad_k[j])
        if need_scale:
            turned.scale_grad(diagonal, grad_scale[i])
        if need_q:
            left.finish(dq, i, q_block)
    if need_k:
        if m == 0:
            grad_k.zero_()
        for j in blocks(n, TILE_COLS) if normalize else ():
            right.finish(grad_k[j], j, right[j])
    total = totals[0] if len(totals) == 1 else torch.stack(totals).sum() if totals else scale.new_zeros(())
    return total, grad_q, grad_k, grad_scale


def pair_nll_backward(
    grad: Tensor, q: Tensor, k: Tensor, scale: Tensor, grad_q: Tensor, grad_k: Tensor, grad_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients found by the forward pass times the upstream one; q, k and scale only connect the graph."""
    return (grad_q * grad).to(q.dtype), (grad_k * grad).to(k.dtype), grad_scale * grad
