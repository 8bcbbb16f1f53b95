"""What the backends of the spherical ops share: the rows' statistics, and the walk over tiles of classes.

A loss of the family sees a row of logits o through its mean, the sum of squares about the mean, and the target's logit.
For logits O = H W^T + 1 b^T with W and b centred (T = W - 1 w'^T, w' the mean row) the sum of squares of row i is
|T h_i|^2, and two orders of the same products give it, and its gradients, without a (B, C) matrix:

    by logits: (T H^T), a tile of classes at a time    4BCd flops, 2BCd without gradients of H    needs tiles (n, B)
    by Gram:   G = T^T T, then h_i . G h_i             2Cd^2 or less                              needs (d, d)

    weight's gradient by logits: (T H^T) diag(2g) H    4BCd flops
    by Gram:   T (H^T diag(2g) H)                      2Cd^2

The cheaper one runs, by counted flops. h . Gh loses digits where |T h|^2 is far below |T|^2 |h|^2; such rows are found
by that ratio and done by logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Elements of a tile: 4 MiB of float32, which the caches hold. On a GPU launches cost more than a trip through memory.
SCRATCH = 1 << 20
GPU_SCRATCH = 1 << 24
# Rows whose sum of squares is below this share of the bound |T^T T| |h|^2 have lost as many bits to cancellation.
GRAM_SHARE = 2.0**-8
# G is symmetric: its strips of rows begin at the diagonal. Four of them do 5/8 of the products.
STRIPS = 4
NARROWEST_STRIP = 64


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def scratch(device: torch.device) -> int:
    return SCRATCH if device.type == "cpu" else GPU_SCRATCH


def block_rows(columns: int, dtype: torch.dtype) -> int:
    """Rows of a block of at most 2 MiB, which stays in the caches."""
    return max(1, (2 << 20) // dtype.itemsize // max(columns, 1))


def parts(total: int, size: int) -> Iterator[slice]:
    for begin in range(0, total, size):
        yield slice(begin, min(begin + size, total))


@dataclass
class Rows:
    """Statistics of rows of logits. The mean is high + low."""

    high: Tensor  # all (rows,)
    low: Tensor
    square: Tensor
    centred: Tensor
    logit: Tensor

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.high[part], self.low[part], self.square[part], self.centred[part], self.logit[part])


class Kernels(Protocol):
    """What a backend does with a matrix of logits (rows, C). Ignored rows have the target -1."""

    def fresh(self, like: Tensor) -> Tensor:
        """Memory for a gradient."""
        ...

    def moments(self, logits: Tensor, target: Tensor, out: Rows) -> None: ...

    def gradient(
        self, logits: Tensor, target: Tensor, stats: Tensor, shift: Tensor, scale: Tensor, spike: Tensor, out: Tensor
    ) -> None:
        """out_ij = shift_i + scale_i ((x_ij - stats_0i) - stats_1i), plus spike_i at the target; 0 if all three are.

        `out` may be `logits`.
        """
        ...


def row_moments_forward(
    kernels: Kernels, logits: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    stats = torch.empty((2, len(logits)), dtype=accumulation_dtype(logits), device=logits.device)
    rows = Rows(stats[0], stats[1], *(torch.empty_like(stats[0]) for _ in range(3)))
    if logits.shape[0]:
        kernels.moments(logits, target, rows)
    return rows.high + rows.low, rows.square, rows.centred, rows.logit, stats


def _gradient(
    kernels: Kernels,
    grad_mean: Tensor,
    grad_square: Tensor,
    grad_centred: Tensor,
    grad_logit: Tensor,
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    out: Tensor,
) -> None:
    if logits.shape[0] == 0:
        return
    grad_centred = grad_centred.masked_fill(target < 0, 0)  # without a target it is constant
    shift = (grad_mean - grad_centred) / logits.shape[1]
    spike = grad_centred + grad_logit
    kernels.gradient(logits, target, stats, shift, 2 * grad_square, spike, out)


def row_moments_backward(
    kernels: Kernels,
    grad_mean: Tensor,
    grad_square: Tensor,
    grad_centred: Tensor,
    grad_logit: Tensor,
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
) -> Tensor:
    out = kernels.fresh(logits)
    _gradient(kernels, grad_mean, grad_square, grad_centred, grad_logit, logits, target, stats, out)
    return out


def row_moments_backward_(
    kernels: Kernels,
    grad_mean: Tensor,
    grad_square: Tensor,
    grad_centred: Tensor,
    grad_logit: Tensor,
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
) -> None:
    _gradient(kernels, grad_mean, grad_square, grad_centred, grad_logit, logits, target, stats, logits)


# ---------------------------------------------------------------- hidden states


class Classes:
    """Weight and bias about their means, a tile at a time.

    The subtracted means are rounded ones; `left` is what then remains of the mean, summed on the way.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, center: Tensor | None = None) -> None:
        self.weight, self.bias, self.dtype = weight, bias, dtype
        c, d = weight.shape
        self.count, self.width = c, d
        if center is None:
            # (2, d + 1): the means of the columns and of the bias, and what is left of them.
            center = torch.zeros((2, d + 1), dtype=dtype, device=weight.device)
            for part in parts(c, max(1, scratch(weight.device) // max(d, 1))):
                center[0, :d] += weight[part].sum(0, dtype=dtype)
            center[0, :d] /= c
            if bias is not None:
                # About its first element: the mean of a shifted bias keeps the digits of the spread.
                center[0, d] = bias[0] + (bias.to(dtype) - bias[0]).mean()
        self.center = center

    def left(self) -> tuple[Tensor, Tensor]:
        return self.center[1, : self.width], self.center[1, self.width]

    def tile_size(self, columns: int) -> int:
        room = scratch(self.weight.device) // max(self.width + columns, 1)
        return min(max(64, room), max(self.count, 1))

    def tiles(self, columns: int = 0) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """(classes, their rows of T, their centred biases); `columns` more numbers a class are the caller's."""
        size = self.tile_size(columns)
        buffer = torch.empty((size, self.width), dtype=self.dtype, device=self.weight.device)
        means = self.center[0, : self.width]
        for part in parts(self.count, size):
            tile = torch.sub(self.weight[part], means, out=buffer[: part.stop - part.start])
            yield part, tile, None if self.bias is None else self.bias[part].to(self.dtype) - self.center[0, self.width]

    def find_left(self) -> None:
        """For those who have not summed it on the way."""
        self.center[1] = 0
        for _, tile, bias in self.tiles():
            self._add_left(tile, bias)
        self.center[1] /= self.count

    def _add_left(self, tile: Tensor, bias: Tensor | None) -> None:
        self.center[1, : self.width] += tile.sum(0)
        if bias is not None:
            self.center[1, self.width] += bias.sum()

    def gram(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the centred [W b]: (d, d), (d,) and (); finds what is left on the way."""
        d = self.width
        gram = self.center.new_zeros((d, d))
        cross, own = self.center.new_zeros((d,)), self.center.new_zeros(())
        strip = max(NARROWEST_STRIP, -(-d // STRIPS))
        for _, tile, bias in self.tiles():
            self._add_left(tile, bias)
            for rows in parts(d, strip):
                gram[rows, rows.start :].addmm_(tile[:, rows].t(), tile[:, rows.start :])
            if bias is not None:
                cross.addmv_(tile.t(), bias)
                own += bias.dot(bias)
        for rows in parts(d, strip):
            gram[rows.stop :, rows] = gram[rows, rows.stop :].t()
        self.center[1] /= self.count
        left, left_bias = self.left()
        gram.addr_(left, left, alpha=-self.count)
        cross -= self.count * left_bias * left
        own -= self.count * left_bias * left_bias
        return gram, cross, own

    def by_logits(self, hidden: Tensor, square: Tensor, direction: Tensor | None) -> None:
        """Sums of squares (n,) and, if wanted, their half gradients (n, d) of rows of H, from tiles of logits."""
        square.zero_()
        if direction is not None:
            direction.zero_()
        for _, tile, bias in self.tiles(len(hidden)):
            logits = _tile_logits(tile, bias, hidden)
            if direction is not None:
                direction.addmm_(logits.t(), tile)
            square += logits.square_().sum(0)
        left, left_bias = self.left()
        mean = torch.mv(hidden, left) + left_bias
        square.sub_(self.count * mean * mean).clamp_(min=0)
        if direction is not None:
            direction.addr_(mean, left, alpha=-self.count)


def _tile_logits(tile: Tensor, bias: Tensor | None, hidden: Tensor) -> Tensor:
    """(classes, rows)"""
    return torch.mm(tile, hidden.t()) if bias is None else torch.addmm(bias.unsqueeze(1), tile, hidden.t())


def _gram_forward(rows: int, width: int, need_hidden: bool) -> bool:
    """Whether Gram, 2d^2 a class (5/8 of that in strips), is cheaper than logits, 2 or 4 Bd a class."""
    gram = (5 / 8 if width >= STRIPS * NARROWEST_STRIP else 1) * 2 * width
    return gram < (4 if need_hidden else 2) * rows


def _gram_backward(rows: int, width: int) -> bool:
    return 2 * width < 4 * rows


def linear_moments_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, need_hidden: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(hidden, weight, bias)
    b, d = hidden.shape
    new = torch.zeros((0,), dtype=dtype, device=hidden.device).new_empty
    square, centred, logit = new((b,)), new((b,)), new((b,))
    direction = new((b, d) if need_hidden else (0, d))
    if b == 0:
        return square, square.clone(), centred, logit, direction, new((2, d + 1)).zero_()
    h = hidden.to(dtype)
    classes = Classes(weight, bias, dtype)
    row_blocks = list(parts(b, max(1, scratch(hidden.device) // max(d, 1))))
    if _gram_forward(b, d, need_hidden):
        gram, cross, own = classes.gram()
        largest = torch.linalg.matrix_norm(gram)
        lost = torch.empty((b,), dtype=torch.bool, device=hidden.device)
        for part in row_blocks:
            x = h[part]
            product = torch.addmm(cross, x, gram, out=direction[part]) if need_hidden else torch.addmm(cross, x, gram)
            product = product * x
            square[part] = (product.sum(1) + torch.mv(x, cross) + own).clamp_(min=0)
            bound = largest * torch.linalg.vector_norm(x, dim=1).square_() + own
            lost[part] = square[part] < GRAM_SHARE * bound
        redo = lost.nonzero().squeeze(1)
    else:
        classes.find_left()
        redo = torch.arange(b, device=hidden.device)
    for part in parts(len(redo), 1024):
        some = redo[part]
        s = new((len(some),))
        p = new((len(some), d)) if need_hidden else None
        classes.by_logits(h[some], s, p)
        square[some] = s
        if p is not None:
            direction[some] = p

    left, left_bias = classes.left()
    mean = torch.mv(h, classes.center[0, :d] + left) + (classes.center[0, d] + left_bias)
    for part in row_blocks:
        x, t = h[part], target[part].clamp(min=0)
        w = weight[t].to(dtype)
        logit[part] = (w * x).sum(1)
        centred[part] = w.sub_(classes.center[0, :d]).sub_(left).mul_(x).sum(1)
        if bias is not None:
            own_bias = bias[t].to(dtype)
            logit[part] += own_bias
            centred[part] += (own_bias - classes.center[0, d]).sub_(left_bias)
    logit.masked_fill_(target < 0, 0)
    centred.masked_fill_(target < 0, 0)
    return mean, square, centred, logit, direction, classes.center


def linear_moments_backward(
    grad_mean: Tensor,
    grad_square: Tensor,
    grad_centred: Tensor,
    grad_logit: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    direction: Tensor,
    center: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = center.dtype
    (b, d), c = hidden.shape, len(weight)
    grad_hidden = torch.empty((b, d) if need_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    grad_weight = torch.empty((c, d) if need_weight else (0,), dtype=weight.dtype, device=weight.device)
    grad_bias = torch.empty(
        (c if need_bias else 0,), dtype=weight.dtype if bias is None else bias.dtype, device=weight.device
    )
    if b == 0:
        return grad_hidden, grad_weight.zero_(), grad_bias.zero_()
    if need_hidden and len(direction) < b:
        # Under a transform of a transform nobody could see, in the forward pass, that this gradient would be wanted.
        direction = linear_moments_forward(hidden, weight, bias, target, True)[4]
    classes = Classes(weight, bias, dtype, center)
    means, (left, left_bias) = center[0, :d], classes.left()
    grad_centred = grad_centred.masked_fill(target < 0, 0)  # without a target both are constant
    factor, spike = 2 * grad_square, (grad_centred + grad_logit).masked_fill(target < 0, 0)
    row_blocks = list(parts(b, max(1, scratch(hidden.device) // max(d, 1))))
    if need_hidden:
        for part in row_blocks:
            t = target[part].clamp(min=0)
            spikes, drag = spike[part], (grad_mean - grad_centred)[part]
            # spike w_t + (grad_mean - grad_centred) mean, with the weights about the mean row: no digits lost to it
            g = weight[t].to(dtype).sub_(means).sub_(left).mul_(spikes.unsqueeze(1))
            g.addr_(drag + spikes, means + left)
            g.addcmul_(direction[part], factor[part].unsqueeze(1))
            unused = (factor[part] == 0) & (spikes == 0) & (drag == 0)
            grad_hidden[part] = g.masked_fill_(unused.unsqueeze(1), 0)
    if need_weight or need_bias:
        _class_gradients(
            classes, hidden, target, factor, (grad_mean - grad_centred) / c, spike, left, left_bias,
            grad_weight if need_weight else None, grad_bias if need_bias else None,
        )  # fmt: skip
    return grad_hidden, grad_weight, grad_bias


def _class_gradients(
    classes: Classes,
    hidden: Tensor,
    target: Tensor,
    factor: Tensor,  # (B,) of the centred logits
    common: Tensor,  # (B,) the same for all classes
    spike: Tensor,  # (B,) of the target's logit
    left: Tensor,
    left_bias: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """d/dW = 1 (sum common_i h_i)^T + [centred logits] diag(factor) H + spikes; d/db the same with 1 for h."""
    dtype, (b, d), c = classes.dtype, hidden.shape, classes.count
    unused = (factor == 0) & (common == 0) & (spike == 0)
    h = hidden.to(dtype)
    if bool(unused.any()):
        h = h.masked_fill(unused.unsqueeze(1), 0)
    rows, row_bias = torch.mv(h.t(), common), common.sum()
    by_gram = _gram_backward(b, d)
    weighted = torch.mv(h.t(), factor)  # (d,)
    if by_gram:
        moment = h.new_zeros((d, d))
        for part in parts(b, max(1, scratch(hidden.device) // max(d, 1))):
            moment.addmm_((h[part] * factor[part].unsqueeze(1)).t(), h[part])
        total = factor.sum()
        rows = rows - torch.mv(moment, left) - left_bias * weighted
        row_bias = row_bias - left.dot(weighted) - left_bias * total
    else:
        offsets = (torch.mv(h, left) + left_bias).unsqueeze(0)
    # Targets of a tile are a run of the sorted ones; ignored rows come first. Stable: sums keep the batch's order.
    order = target.argsort(stable=True)
    sorted_target, columns = target[order], 0 if by_gram else b
    size = classes.tile_size(columns)
    # Of all tiles at once: a device is waited for once.
    ends = torch.searchsorted(sorted_target, torch.arange(0, c + size, size, device=hidden.device)).tolist()
    for (part, tile, bias), first, last in zip(classes.tiles(columns), ends[:-1], ends[1:], strict=True):
        mine, ids = order[first:last], sorted_target[first:last] - part.start
        if not by_gram:
            logits = _tile_logits(tile, bias, h).sub_(offsets).mul_(factor)
        if grad_weight is not None:
            direct = grad_weight.dtype == dtype and grad_weight.is_contiguous()
            out = grad_weight[part] if direct else tile.new_empty(tile.shape)
            torch.addmm(rows, *((tile, moment) if by_gram else (logits, h)), out=out)
            if by_gram and bias is not None:
                out.addr_(bias, weighted)
            if len(mine):
                out.index_add_(0, ids, h[mine] * spike[mine].unsqueeze(1))
            if not direct:
                grad_weight[part] = out
        if grad_bias is not None:
            column = torch.mv(tile, weighted) if by_gram else logits.sum(1)
            if by_gram and bias is not None:
                column.add_(bias * total)
            grad_bias[part] = column.add_(row_bias).index_add_(0, ids, spike[mine])
