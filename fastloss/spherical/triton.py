"""The spherical ops on CUDA and ROCm devices: rows of logits and steps of factored layers in Triton, the rest as in
`tiles.py`.

Rows are read once forward, and read and written once backward, at the speed of memory. Each program takes a part of
some rows and leaves mean and sum of squares about it; a second kernel merges the parts in their order, so results do
not change from run to run. All dtypes; 16 bits are summed in float32. The linear forms are products of the vendor's
library in float32, which follow `torch.set_float32_matmul_precision`.

A step of a factored layer waits for its launches, not for its numbers: what stands between two products of the vendor's
is one launch, and the host reads the device once in a step. Sums have a fixed order. float32; layers in float64 take
the portable functions, as Triton passes numbers of the host in 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss import _triton
from fastloss._triton import Config, Specimen
from fastloss.spherical import portable, tiles
from fastloss.spherical.tiles import Rows

# ---------------------------------------------------------------- kernels


@triton.jit
def _ratio(a, b):
    """Rounded as IEEE has it. A chip's own quotient of float32 may be two units off, a row of one number not flat."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def _merge(count, mean, square, new_count, new_mean, new_square):
    """Mean and sum of squares about it, of two sets of numbers together (Chan, Golub and LeVeque)."""
    both = count + new_count
    share = tl.where(both > 0, new_count / tl.maximum(both, 1.0), 0.0)
    delta = new_mean - mean
    return both, mean + delta * share, square + new_square + delta * delta * (count * share)


@triton.jit
def _load(x, rows, cols, row_count, end, row_stride, col_stride):
    inside = (rows < row_count)[:, None] & (cols < end)[None, :]
    place = x + rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    return tl.load(place, mask=inside, other=0.0), inside


@triton.jit
def _moments_kernel(
    x, parts, row_count, classes, span, row_stride, col_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """parts (splits, 3, rows): of the `span` classes of this split, the mean as high + low, and the sum of squares."""
    wide = parts.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    begin = split * span
    end = tl.minimum(begin + span, classes)
    # Everything is taken about a number near the mean: what is left keeps the digits of the spread.
    value, inside = _load(x, rows, begin + tl.arange(0, BLOCK), row_count, end, row_stride, col_stride)
    pivot = _ratio(tl.sum(value.to(wide), 1), tl.minimum(end - begin, BLOCK).to(wide))
    count = tl.zeros((ROWS,), wide)
    mean = tl.zeros((ROWS,), wide)
    square = tl.zeros((ROWS,), wide)
    for start in range(begin, end, BLOCK):
        value, inside = _load(x, rows, start + tl.arange(0, BLOCK), row_count, end, row_stride, col_stride)
        near = tl.where(inside, value.to(wide) - pivot[:, None], 0.0)
        size = tl.zeros((ROWS,), wide) + tl.minimum(end - start, BLOCK).to(wide)
        own = _ratio(tl.sum(near, 1), size)
        off = tl.where(inside, near - own[:, None], 0.0)
        count, mean, square = _merge(count, mean, square, size, own, tl.sum(off * off, 1))
    high = pivot + mean
    place = parts + split.to(tl.int64) * 3 * row_count + rows
    tl.store(place, high, mask=rows < row_count)
    tl.store(place + row_count, (pivot - high) + mean, mask=rows < row_count)
    tl.store(place + 2 * row_count, square, mask=rows < row_count)


@triton.jit
def _merge_kernel(
    parts, x, target, high_out, low_out, square_out, centred_out, logit_out,
    row_count, classes, splits, span, row_stride, col_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """The statistics of whole rows, and the target's logit, 0 without a target."""
    wide = parts.dtype.element_ty
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = rows < row_count
    first = tl.load(parts + rows, mask=exists, other=0.0)
    count = tl.zeros((BLOCK,), wide)
    mean = tl.zeros((BLOCK,), wide)
    square = tl.zeros((BLOCK,), wide)
    place = parts + rows
    begin = 0
    for _ in range(splits):
        size = tl.zeros((BLOCK,), wide) + tl.minimum(classes - begin, span).to(wide)
        high = tl.load(place, mask=exists, other=0.0)
        low = tl.load(place + row_count, mask=exists, other=0.0)
        new_square = tl.load(place + 2 * row_count, mask=exists, other=0.0)
        count, mean, square = _merge(count, mean, square, size, (high - first) + low, new_square)
        place += 3 * row_count
        begin += span
    # One split: the mean is the part's own, to its last digit.
    own_low = tl.load(parts + row_count + rows, mask=exists, other=0.0)
    high = tl.where(splits == 1, first, first + mean)
    low = tl.where(splits == 1, own_low, (first - high) + mean)
    t = tl.load(target + rows, mask=exists, other=-1)
    place = x + rows.to(tl.int64) * row_stride + tl.maximum(t, 0) * col_stride
    logit = tl.load(place, mask=exists & (t >= 0), other=0.0).to(wide)
    tl.store(high_out + rows, high, mask=exists)
    tl.store(low_out + rows, low, mask=exists)
    tl.store(square_out + rows, square, mask=exists)
    tl.store(logit_out + rows, logit, mask=exists)
    tl.store(centred_out + rows, tl.where(t >= 0, (logit - high) - low, 0.0), mask=exists)


@triton.jit
def _gradient_kernel(
    x, target, high, low, shift, scale, spike, out,
    row_count, classes, row_stride, col_stride, out_row_stride, out_col_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`tiles.Kernels.gradient`; out may be x."""
    parts = tl.cdiv(classes, BLOCK)
    rows = tl.program_id(0) // parts * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    exists = rows < row_count
    a = tl.load(shift + rows, mask=exists, other=0.0)
    b = tl.load(scale + rows, mask=exists, other=0.0)
    c = tl.load(spike + rows, mask=exists, other=0.0)
    t = tl.load(target + rows, mask=exists, other=-1)
    touched = (a != 0) | (b != 0) | (c != 0)
    value, inside = _load(x, rows, cols, row_count, classes, row_stride, col_stride)
    off = value.to(a.dtype) - tl.load(high + rows, mask=exists, other=0.0)[:, None]
    off -= tl.load(low + rows, mask=exists, other=0.0)[:, None]
    g = a[:, None] + b[:, None] * off
    g += tl.where(cols[None, :] == t[:, None], c[:, None], 0.0)
    g = tl.where(touched[:, None], g, 0.0)
    place = out + rows.to(tl.int64)[:, None] * out_row_stride + cols.to(tl.int64)[None, :] * out_col_stride
    tl.store(place, g.to(out.dtype.element_ty), mask=inside)


# The step of a factored layer: what each computes is said in `portable.py`. All tensors are contiguous; `width` numbers
# a row, of which a program takes BLOCK at a time.


@triton.jit
def _statistics_kernel(
    entries, product, hidden, mean, t_out, square_out, center_out, targets, width, BLOCK: tl.constexpr
):
    """A program for each target of each row, and one a row for what has no target."""
    row = (tl.program_id(0) // (targets + 1)).to(tl.int64)
    k = tl.program_id(0) % (targets + 1)
    last = k == targets
    other = tl.where(last, product + row * width, entries + (row * targets + k) * width)
    cols = tl.arange(0, BLOCK)
    dot = tl.zeros((BLOCK,), tl.float32)
    center = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + cols
        h = tl.load(hidden + row * width + at, mask=at < width, other=0.0)
        dot += h * tl.load(other + at, mask=at < width, other=0.0)
        center += h * tl.load(mean + at, mask=at < width, other=0.0)
    found = tl.sum(dot)
    tl.store(t_out + row * targets + k, found, mask=k < targets)
    tl.store(square_out + row, tl.where(found < 0, 0.0, found), mask=last)  # NaN stays
    tl.store(center_out + row, tl.sum(center), mask=last)


_LOG2_E = tl.constexpr(math.log2(math.e))
_LN2_HIGH = tl.constexpr(0x162E3 / 2**17)  # few bits: products with exponents are exact
_LN2_LOW = tl.constexpr(math.log(2) - 0x162E3 / 2**17)


@triton.jit
def _exp(x):
    """Of x <= 0, to its last digits. `tl.exp` rounds x log2(e): at x = -30 that is ten units in the last place."""
    x = tl.where(x < -104, -104.0, x)  # 0; NaN stays
    exponent = tl.floor(x * _LOG2_E + 0.5)
    rest = (x - exponent * _LN2_HIGH) - exponent * _LN2_LOW
    return tl.exp2(exponent) * tl.exp(rest)


@triton.jit
def _log1p(x):
    """Of x in [0, 1], to its last digits: the rounding of 1 + x is in both factors."""
    y = 1 + x
    return tl.where(y == 1, x, tl.log(y) * tl.div_rn(x, tl.where(y == 1, 1.0, y - 1)))


@triton.jit(do_not_specialize=["rows"])
def _losses_kernel(
    t, v, mean, share, loss_out, t_out, v_out, mean_out, even_share, classes, a, b, eps,
    rows, targets, share_row_stride, share_col_stride, KIND: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`portable._closed_form` times `share`, or `even_share`; loss_out holds a sum for each row."""
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    exists = row < rows
    square = tl.load(v + row, mask=exists, other=1.0)
    middle = tl.load(mean + row, mask=exists, other=0.0)
    loss_sum = tl.zeros((BLOCK,), tl.float32)
    v_sum = tl.zeros((BLOCK,), tl.float32)
    mean_sum = tl.zeros((BLOCK,), tl.float32)
    for k in range(targets):
        x = tl.load(t + row * targets + k, mask=exists, other=0.0)
        if KIND == "z":
            flat = square == 0
            # Rounded as IEEE has it: an error of z is one of the same size of a small loss's logarithm.
            finite = tl.where(square == float("inf"), float("nan"), square)
            deviation = tl.sqrt_rn(tl.div_rn(tl.where(flat, 1.0, finite), classes))
            scale = tl.where(flat, 0.0, tl.div_rn(1.0, deviation + eps))
            z = x * scale
            y = a * (b - z)
            small = _exp(tl.where(y > 0, -y, y))
            loss = tl.div_rn(tl.where(y > 0, y, 0.0) + _log1p(small), a)
            d_t = -scale * tl.where(y > 0, 1.0, small) / (1 + small)
            d_v = d_t * z / (deviation * (-2 * classes))
            d_mean = tl.zeros((BLOCK,), tl.float32)
        elif KIND == "mse":
            loss = square + classes * (middle * middle) - 2 * (x + middle) + 1
            d_t = tl.full((BLOCK,), -2.0, tl.float32)
            d_v = tl.full((BLOCK,), 1.0, tl.float32)
            d_mean = 2 * classes * middle - 2
        else:
            shift = 0.0 if KIND == "spherical" else 1.0
            plus = eps if KIND == "spherical" else 1.0
            center = middle + shift
            entry = x + middle + shift
            total = square + classes * (center * center + plus)
            score = entry * entry + plus
            loss = tl.log(total) - tl.log(score)
            d_t = -2 * entry / score
            d_v = 1 / total
            d_mean = 2 * classes * center * d_v + d_t
        weight = even_share
        if WEIGHTED:
            weight = tl.load(share + row * share_row_stride + k * share_col_stride, mask=exists, other=0.0)
        loss_sum += weight * loss
        v_sum += weight * d_v
        mean_sum += weight * d_mean
        tl.store(t_out + row * targets + k, weight * d_t, mask=exists)
    tl.store(loss_out + row, loss_sum, mask=exists)
    tl.store(v_out + row, v_sum, mask=exists)
    tl.store(mean_out + row, mean_sum, mask=exists)


@triton.jit
def _hidden_gradient_kernel(
    entries, product, mean, g_t, g_v, g_mean, weighted_out, out, targets, width, BLOCK: tl.constexpr
):
    parts = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    cols = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    weighted = tl.zeros((BLOCK,), tl.float32)
    for k in range(targets):
        pair = row * targets + k
        weighted += tl.load(g_t + pair) * tl.load(entries + pair * width + cols, mask=inside, other=0.0)
    place = row * width + cols
    tl.store(weighted_out + place, weighted, mask=inside)
    result = weighted + 2 * tl.load(g_v + row) * tl.load(product + place, mask=inside, other=0.0)
    result += tl.load(g_mean + row) * tl.load(mean + cols, mask=inside, other=0.0)
    tl.store(out + place, result, mask=inside)


@triton.jit
def _factors_kernel(
    hidden, product, weighted, g_v, scaled_out, half_out, full_out, lr, shrink, width, BLOCK: tl.constexpr
):
    parts = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    cols = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    place = row * width + cols
    diagonal = -2 * lr * tl.load(g_v + row)
    scaled = diagonal * tl.load(product + place, mask=inside, other=0.0)
    step = lr * tl.load(weighted + place, mask=inside, other=0.0)
    tl.store(scaled_out + place, diagonal * tl.load(hidden + place, mask=inside, other=0.0), mask=inside)
    tl.store(half_out + place, 0.5 * scaled - step, mask=inside)
    tl.store(full_out + place, shrink * (scaled - step), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _square_kernel(x, target, g_t, g_v, factor, diagonal, same_factor, total_factor, rows, targets, SIDE: tl.constexpr):
    """x (rows, rows) = x diag(factor g_v) + diagonal I + the bracket of `portable.factored_pairs`, in place."""
    parts = tl.cdiv(rows, SIDE)
    i = tl.program_id(0) // parts * SIDE + tl.arange(0, SIDE)
    j = tl.program_id(0) % parts * SIDE + tl.arange(0, SIDE)
    same = tl.zeros((SIDE, SIDE), tl.float32)
    total_i = tl.zeros((SIDE,), tl.float32)
    total_j = tl.zeros((SIDE,), tl.float32)
    first = i.to(tl.int64) * targets
    second = j.to(tl.int64) * targets
    for k in range(targets):
        t_i = tl.load(target + first + k, mask=i < rows, other=-1)
        g_i = tl.load(g_t + first + k, mask=i < rows, other=0.0)
        total_i += g_i
        total_j += tl.load(g_t + second + k, mask=j < rows, other=0.0)
        for m in range(targets):
            t_j = tl.load(target + second + m, mask=j < rows, other=-1)
            g_j = tl.load(g_t + second + m, mask=j < rows, other=0.0)
            same += tl.where(t_i[:, None] == t_j[None, :], g_i[:, None] * g_j[None, :], 0.0)
    inside = (i < rows)[:, None] & (j < rows)[None, :]
    place = x + i.to(tl.int64)[:, None] * rows + j[None, :]
    value = tl.load(place, mask=inside, other=0.0) * (factor * tl.load(g_v + j, mask=j < rows, other=0.0))[None, :]
    value += tl.where(i[:, None] == j[None, :], diagonal, 0.0)
    value += same_factor * same + total_factor * total_i[:, None] * total_j[None, :]
    tl.store(place, value, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _verdict_kernel(full, g_mean, exists, solution, hidden, scaled, out, lr, rows, width, BLOCK: tl.constexpr):
    """out (3, rows): |solution| / |hidden|, infinite without `exists`; sum of full, and lr g_mean; scaled . hidden."""
    row = tl.program_id(0)
    begin = row.to(tl.int64) * width
    cols = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    grown = tl.zeros((BLOCK,), tl.float32)
    size = tl.zeros((BLOCK,), tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + cols
        place = begin + at
        total += tl.load(full + place, mask=at < width, other=0.0)
        s = tl.load(solution + place, mask=at < width, other=0.0)
        h = tl.load(hidden + place, mask=at < width, other=0.0)
        grown += s * s
        size += h * h
        share += h * tl.load(scaled + place, mask=at < width, other=0.0)
    length = tl.sum(size)
    growth = tl.div_rn(tl.sqrt_rn(tl.sum(grown)), tl.sqrt_rn(tl.where(length == 0, 1.0, length)))
    growth = tl.where(length == 0, 0.0, growth)
    tl.store(out + row, tl.where(tl.load(exists) != 0, growth, float("inf")))
    tl.store(out + rows + row, tl.sum(total) + lr * tl.load(g_mean + row))
    tl.store(out + 2 * rows + row, tl.sum(share))


@triton.jit(do_not_specialize=["pairs"])
def _scatter_kernel(
    v, target, g_t, solution, lr, pairs, targets, width, SCAN: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """The first pair of a class writes its row, for all of them: nobody else reads or writes it."""
    parts = tl.cdiv(width, BLOCK)
    pair = tl.program_id(0) // parts
    cols = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    own = tl.load(target + pair)
    earlier = 0
    for start in range(0, pair, SCAN):
        at = start + tl.arange(0, SCAN)
        earlier += tl.sum((tl.load(target + at, mask=at < pair, other=-1) == own).to(tl.int32))
    if earlier == 0:
        change = tl.zeros((BLOCK,), tl.float32)
        for start in range(pair, pairs, CHUNK):
            at = start + tl.arange(0, CHUNK)
            same = tl.load(target + at, mask=at < pairs, other=-1) == own
            if tl.sum(same.to(tl.int32)) > 0:
                g = tl.load(g_t + at, mask=same, other=0.0)
                place = (at // targets).to(tl.int64)[:, None] * width + cols[None, :]
                s = tl.load(solution + place, mask=same[:, None] & inside[None, :], other=0.0)
                change += tl.sum(g[:, None] * s, 0)
        row = v + own * width + cols
        tl.store(row, tl.load(row, mask=inside, other=0.0) - lr * change, mask=inside)


@triton.jit
def _symmetric_kernel(matrix, change, scale, width, SIDE: tl.constexpr):
    """A program reads and writes a tile of its own; the one across the diagonal does the same sums."""
    parts = tl.cdiv(width, SIDE)
    i = tl.program_id(0) // parts * SIDE + tl.arange(0, SIDE)
    j = tl.program_id(0) % parts * SIDE + tl.arange(0, SIDE)
    place = i.to(tl.int64)[:, None] * width + j[None, :]
    across = j.to(tl.int64)[:, None] * width + i[None, :]
    inside = (i < width)[:, None] & (j < width)[None, :]
    both = tl.load(change + place, mask=inside, other=0.0)
    both += tl.trans(tl.load(change + across, mask=(j < width)[:, None] & (i < width)[None, :], other=0.0))
    tl.store(matrix + place, scale * tl.load(matrix + place, mask=inside, other=0.0) + both, mask=inside)


# ---------------------------------------------------------------- configurations

# Numbers of a program at a time, and how many of a row at most.
_DEFAULT = Config((4096, 4096), 8)
_TABLE = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_90", "sm_100", "gfx942"), _DEFAULT),
    _triton.INTERPRETER: Config((512, 64)),
}
_CANDIDATES = (Config((2048, 2048), 4), Config((4096, 4096), 4), Config((8192, 8192), 8))
_MERGE_BLOCK = 128
_PROGRAMS = 4  # a multiprocessor, that rows are split to reach
# Of a step: numbers of a row, side of a tile of a square, targets to compare and to add up, numbers of a row to add up.
_STEP = Config((1024, 32, 1024, 32, 128))
_STEP_TABLE = {**dict.fromkeys(_TABLE, _STEP), _triton.INTERPRETER: Config((16, 16, 16, 16, 16))}
_LOSS_BLOCK = 32  # rows, a warp: few, so that many multiprocessors share them
# Beyond these, all pairs of targets are too many to compare: K^2 an entry of `factored_pairs`, (B K)^2 in a scatter.
PAIRED_TARGETS = 16
SCATTERED_PAIRS = 4096


def _size(config: Config, classes: int) -> dict[str, int]:
    """A program's numbers as some rows of few classes or a part of one row."""
    block = min(config.blocks[1], triton.next_power_of_2(max(classes, 1)))
    return {"ROWS": config.blocks[0] // block, "BLOCK": block}


def _config(kernel: str, x: Tensor, launch: object) -> Config:
    candidates = _CANDIDATES if x.is_cuda else (Config((256, 32)),)
    default = _triton.pick(_TABLE, x.device)
    return _triton.best(f"{kernel} {x.dtype} {_triton.size_class(*x.shape)}", x.device, default, candidates, launch)  # type: ignore[arg-type]


# ---------------------------------------------------------------- launches


class _Kernels:
    def fresh(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    def moments(self, logits: Tensor, target: Tensor, out: Rows) -> None:
        rows, classes = logits.shape
        strides = logits.stride()
        state: list[tuple[Tensor, int]] = []

        def launch(config: Config) -> None:
            size = _size(config, classes)
            programs = triton.cdiv(rows, size["ROWS"])
            wanted = triton.cdiv(_PROGRAMS * _triton.multiprocessors(logits.device), programs)
            blocks = triton.cdiv(classes, size["BLOCK"])
            span = triton.cdiv(blocks, min(blocks, wanted)) * size["BLOCK"]
            parts = out.high.new_empty((triton.cdiv(classes, span), 3, rows))
            _moments_kernel[(programs, len(parts))](
                logits, parts, rows, classes, span, *strides, **size, num_warps=config.num_warps
            )
            state[:] = [(parts, span)]

        with _triton.on(logits):
            launch(_config("moments", logits, launch))
            parts, span = state[0]
            _merge_kernel[(triton.cdiv(rows, _MERGE_BLOCK),)](
                parts, logits, target, out.high, out.low, out.square, out.centred, out.logit,
                rows, classes, len(parts), span, *strides, BLOCK=_MERGE_BLOCK,
            )  # fmt: skip

    def gradient(
        self, logits: Tensor, target: Tensor, stats: Tensor, shift: Tensor, scale: Tensor, spike: Tensor, out: Tensor
    ) -> None:
        rows, classes = logits.shape

        def launch(config: Config) -> None:
            size = _size(config, classes)
            _gradient_kernel[(triton.cdiv(rows, size["ROWS"]) * triton.cdiv(classes, size["BLOCK"]),)](
                logits, target, stats[0], stats[1], shift, scale, spike, out,
                rows, classes, *logits.stride(), *out.stride(), **size, num_warps=config.num_warps,
            )  # fmt: skip

        with _triton.on(logits):
            # In place it can run once only, so it is not what tuning times.
            in_place = out.data_ptr() == logits.data_ptr()
            launch(_triton.pick(_TABLE, logits.device) if in_place else _config("gradient", logits, launch))


_kernels = _Kernels()
row_moments_fwd = partial(tiles.row_moments_forward, _kernels)
row_moments_bwd = partial(tiles.row_moments_backward, _kernels)
row_moments_bwd_ = partial(tiles.row_moments_backward_, _kernels)
linear_moments_fwd = tiles.linear_moments_forward
linear_moments_bwd = tiles.linear_moments_backward


# ---------------------------------------------------------------- the step of a factored layer

P = ParamSpec("P")
R = TypeVar("R")


def _of_float32(twin: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """The launcher for float32, and its portable twin for float64."""

    def choice(launcher: Callable[P, R]) -> Callable[P, R]:
        @wraps(launcher)
        def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
            first = args[0]
            assert isinstance(first, Tensor)
            if first.dtype != torch.float32:
                return twin(*args, **kwargs)
            with _triton.on(first):
                return launcher(*args, **kwargs)

        return chosen

    return choice


def _step_blocks(x: Tensor) -> tuple[int, ...]:
    return _triton.pick(_STEP_TABLE, x.device).blocks


def _block(most: int, width: int) -> int:
    return min(most, int(triton.next_power_of_2(width)))


def _parts(x: Tensor, most: int) -> tuple[tuple[int], int]:
    """The grid of programs that take a part of a row each, and the size of these parts."""
    rows, width = x.shape
    block = _block(most, width)
    return (rows * triton.cdiv(width, block),), block


def _check_layout(*tensors: Tensor) -> None:
    assert all(x.is_contiguous() for x in tensors)


@_of_float32(portable.factored_statistics)
def factored_statistics(rows: Tensor, product: Tensor, hidden: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_layout(rows, product, hidden, mean)
    n, targets, width = rows.shape
    t, square, center = rows.new_empty(n, targets), rows.new_empty(n), rows.new_empty(n)
    block = _block(_step_blocks(rows)[0], width)
    _statistics_kernel[(n * (targets + 1),)](
        rows, product, hidden, mean, t, square, center, targets, width, BLOCK=block
    )
    return t, square, center


@_of_float32(portable.factored_losses)
def factored_losses(
    t: Tensor, v: Tensor, mean: Tensor, share: Tensor | float, kind: str, classes: int, a: float, b: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_layout(t, v, mean)
    loss, d_t, d_v, d_mean = torch.empty_like(v), torch.empty_like(t), torch.empty_like(v), torch.empty_like(v)
    weighted = isinstance(share, Tensor)
    weights = share.expand_as(t) if isinstance(share, Tensor) else t
    even = 0.0 if isinstance(share, Tensor) else float(share)
    _losses_kernel[(triton.cdiv(len(t), _LOSS_BLOCK),)](
        t, v, mean, weights, loss, d_t, d_v, d_mean, even, float(classes), float(a), float(b), float(eps),
        *t.shape, *weights.stride(), KIND=kind, WEIGHTED=weighted, BLOCK=_LOSS_BLOCK, num_warps=1,
    )  # fmt: skip
    return loss.sum(), d_t, d_v, d_mean


@_of_float32(portable.factored_gradient)
def factored_gradient(
    rows: Tensor, product: Tensor, mean: Tensor, g_t: Tensor, g_v: Tensor, g_mean: Tensor
) -> tuple[Tensor, Tensor]:
    _check_layout(rows, product, mean)
    g_t, g_v, g_mean = (x.contiguous() for x in (g_t, g_v, g_mean))
    weighted, gradient = torch.empty_like(product), torch.empty_like(product)
    grid, block = _parts(product, _step_blocks(rows)[0])
    _hidden_gradient_kernel[grid](
        rows, product, mean, g_t, g_v, g_mean, weighted, gradient, *rows.shape[1:], BLOCK=block
    )
    return weighted, gradient


@_of_float32(portable.factored_factors)
def factored_factors(
    hidden: Tensor, product: Tensor, weighted: Tensor, g_v: Tensor, lr: float, shrink: float, out: tuple[Tensor, ...]
) -> None:
    _check_layout(hidden, product, weighted, g_v, *out)
    grid, block = _parts(hidden, _step_blocks(hidden)[0])
    _factors_kernel[grid](hidden, product, weighted, g_v, *out, float(lr), float(shrink), hidden.shape[1], BLOCK=block)


def _square(x: Tensor, target: Tensor, g_t: Tensor, g_v: Tensor, targets: int, *numbers: float) -> None:
    _check_layout(x, target, g_t, g_v)
    side = _step_blocks(x)[1]
    _square_kernel[(triton.cdiv(len(x), side) ** 2,)](
        x, target, g_t, g_v, *map(float, numbers), len(x), targets, SIDE=side
    )


@_of_float32(portable.factored_pairs)
def factored_pairs(x: Tensor, target: Tensor, g_t: Tensor, g_v: Tensor, lr: float, classes: int) -> None:
    """Up to PAIRED_TARGETS an example; with more, the product with the table of the classes in the batch."""
    if target.shape[1] > PAIRED_TARGETS:
        portable.factored_pairs(x, target, g_t, g_v, lr, classes)
    else:
        half = lr * lr / 2
        _square(x, target, g_t, g_v, target.shape[1], -2 * lr, 0, half, -half / classes)


@_of_float32(portable.factored_inverse)
def factored_inverse(x: Tensor, g_v: Tensor, lr: float, shrink: float) -> tuple[Tensor, bool | Tensor]:
    _square(x, x, x, g_v, 0, -2 * lr, shrink, 0, 0)  # no targets, nothing to read of them
    inverse, info = torch.linalg.inv_ex(x)
    return inverse, info == 0


@_of_float32(portable.factored_verdict)
def factored_verdict(
    full: Tensor,
    g_mean: Tensor,
    lr: float,
    exists: bool | Tensor,
    solution: Tensor,
    hidden: Tensor,
    scaled: Tensor,
) -> portable.Verdict:
    """In one read."""
    _check_layout(full, g_mean, solution, hidden, scaled)
    rows, width = full.shape
    if not rows:
        return portable.Verdict(True, 0.0, torch.empty(0))
    out = full.new_empty(3, rows)
    exists = torch.as_tensor(exists, device=full.device)
    block = _block(_step_blocks(full)[0], width)
    _verdict_kernel[(rows,)](full, g_mean, exists, solution, hidden, scaled, out, float(lr), rows, width, BLOCK=block)
    growth, total, shares = out.cpu()
    return portable.Verdict(math.isfinite(float(total.sum())), float(growth.amax()), shares)


@_of_float32(portable.factored_scatter)
def factored_scatter(v: Tensor, target: Tensor, g_t: Tensor, solution: Tensor, lr: float) -> None:
    """Up to SCATTERED_PAIRS, compared with each other; more are sorted by PyTorch. Sums have a fixed order in both."""
    if target.numel() > SCATTERED_PAIRS:
        pairs = (g_t[:, :, None] * solution[:, None]).flatten(0, 1).mul_(-lr)
        v.index_put_((target.flatten(),), pairs, accumulate=True)
        return
    g_t = g_t.contiguous()
    _check_layout(v, target, solution)
    _, _, scan, chunk, most = _step_blocks(v)
    block = _block(most, v.shape[1])
    _scatter_kernel[(target.numel() * triton.cdiv(v.shape[1], block),)](
        v, target, g_t, solution, float(lr), target.numel(), target.shape[1], v.shape[1],
        SCAN=scan, CHUNK=chunk, BLOCK=block,
    )  # fmt: skip


@_of_float32(portable.symmetric_update)
def symmetric_update(matrix: Tensor, change: Tensor, scale: float) -> None:
    _check_layout(matrix, change)
    side = _step_blocks(matrix)[1]
    _symmetric_kernel[(triton.cdiv(len(matrix), side) ** 2,)](matrix, change, float(scale), len(matrix), SIDE=side)


# ---------------------------------------------------------------- specimens for the gates


def specimens(target: str, candidates: bool) -> list[Specimen]:
    """Every kernel at GPT-2's vocabulary, logits side by side; with `candidates`, in all that tuning tries."""
    found = []
    for dtype, name in (("*bf16", "bfloat16"), ("*fp32", "float32"), *((("*fp64", "float64"),) if candidates else ())):
        wide = "*fp64" if dtype == "*fp64" else "*fp32"
        configs = {_TABLE[target]: ""} | (
            {config: f" candidate {i}" for i, config in enumerate(_CANDIDATES)} if candidates else {}
        )
        for config, note in configs.items():
            found += _row_specimens(dtype, wide, f"{name}{note}", config)
    return found + _step_specimens(_STEP_TABLE[target])


def _row_specimens(dtype: str, wide: str, name: str, config: Config) -> list[Specimen]:
    sizes, side_by_side = _size(config, 50_257), {"col_stride": 1}
    moments = {"x": dtype, "parts": wide} | dict.fromkeys(("row_count", "classes", "span", "row_stride"), "i32")
    outputs = ("parts", "high_out", "low_out", "square_out", "centred_out", "logit_out")
    merge = {"x": dtype, "target": "*i64"} | dict.fromkeys(outputs, wide)
    merge |= dict.fromkeys(("row_count", "classes", "splits", "span", "row_stride"), "i32")
    gradient = {"x": dtype, "target": "*i64", "out": dtype}
    gradient |= dict.fromkeys(("high", "low", "shift", "scale", "spike"), wide)
    gradient |= dict.fromkeys(("row_count", "classes", "row_stride", "out_row_stride"), "i32")
    aligned = frozenset({"x", "row_stride"})
    return [
        Specimen(f"moments {name}", _moments_kernel, moments, sizes | side_by_side, config, aligned),
        Specimen(f"merge {name}", _merge_kernel, merge, side_by_side | {"BLOCK": _MERGE_BLOCK}, Config((128,))),
        Specimen(
            f"moments gradient {name}", _gradient_kernel, gradient, sizes | side_by_side | {"out_col_stride": 1},
            config, aligned | {"out", "out_row_stride"},
        ),
    ]  # fmt: skip


def _step_specimens(config: Config) -> list[Specimen]:
    """Of a layer of 512 features, one target an example, and with several targets and a bias."""
    length, side, scan, chunk, most = config.blocks
    found = []
    for note, targets, width in (("one target", 1, 512), ("targets and bias", None, 513)):
        sizes: dict[str, Any] = {"targets": targets} if targets else {}
        row: dict[str, Any] = {"BLOCK": _block(length, width)}
        part: dict[str, Any] = {"SCAN": scan, "CHUNK": chunk, "BLOCK": _block(most, width)}
        losses = [(_losses_kernel, {"KIND": kind, "WEIGHTED": not targets, "BLOCK": _LOSS_BLOCK} | sizes)
                  for kind in ("z", "spherical", "taylor", "mse")]  # fmt: skip
        kernels: list[tuple[Any, dict[str, Any]]] = [
            (_statistics_kernel, row | sizes), (_hidden_gradient_kernel, row | sizes), (_factors_kernel, row),
            (_square_kernel, {"SIDE": side} | sizes), (_verdict_kernel, row), (_scatter_kernel, part | sizes),
            (_symmetric_kernel, {"SIDE": side}), *losses,
        ]  # fmt: skip
        for kernel, constants in kernels:
            types = {name: _STEP_TYPES.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
            aligned = {name for name, kind in types.items() if kind[0] == "*"}
            aligned |= types.keys() & {"width"} if width % 16 == 0 else set()
            piece = f"{constants.get('KIND', '')}{kernel.__name__.removesuffix('_kernel')}".strip("_").replace("_", " ")
            name = f"{piece} of a step, {note}"
            found.append(Specimen(name, kernel, types, constants, config, frozenset(aligned)))
    return found


_STEP_TYPES = (
    {"target": "*i64", "exists": "*i1"}
    | dict.fromkeys(("targets", "width", "rows", "pairs", "share_row_stride", "share_col_stride"), "i32")
    | dict.fromkeys(("even_share", "classes", "a", "b", "eps"), "fp32")
    | dict.fromkeys(("lr", "shrink", "factor", "diagonal", "same_factor", "total_factor", "scale"), "fp32")
)
