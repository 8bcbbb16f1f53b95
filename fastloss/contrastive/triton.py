"""The contrastive ops on CUDA and ROCm devices.

A panel of the matrix of similarities is one launch: its tiles are products on the matrix units whose epilogue leaves
partial statistics (forward) or the entries of the gradient G in the dtype of the features (backward), and two products
of the vendor's library take dQ and dK from the panel. Each similarity is computed once forward and once backward. The
embeddings are too wide for a multiprocessor to hold a block's dQ, and adding every tile's dQ and dK to memory by
atomics would cap the rate at a third of the peak; there are no atomics, so results do not change from run to run.

Inputs of 16 bits are multiplied as they are and summed in float32; G is rounded to their dtype for the two products.
float32: S in three tf32 products (FASTLOSS_FLOAT32=ieee: in float32), dQ and dK as torch.mm does float32. float64 runs
on the portable kernels.

Extra memory: a panel of at most 256 MiB; sums in float32 of a block of rows and, up to 512 MiB, of all of dK; where
they do not fit, dQ and dK take a sweep each, 10MND flops in all instead of 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss import _triton
from fastloss._triton import Config, Specimen
from fastloss.contrastive import portable
from fastloss.contrastive.tiles import LOG2_E, NORM_EPS, blocks, inverse_norms, margin, per_row

PANEL_ROWS = 8192  # a panel holds this times PANEL_COLS entries of 16 bits: 256 MiB
PANEL_COLS = 16384  # not less than the rows: the mirrored square of a self-similarity lies in a row's first panel
ACCUMULATOR_BYTES = 512 << 20
_LOG2_E = tl.constexpr(LOG2_E)

# ---------------------------------------------------------------- kernels


@triton.jit
def _place(row_tiles, col_tiles, GROUP: tl.constexpr):
    """Tile of this program. Programs that run together share rows and columns in the second-level cache."""
    program = tl.program_id(0)
    group = program // (GROUP * col_tiles)
    first = group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = program % (GROUP * col_tiles)
    return first + inside % height, inside // height


@triton.jit
def _similarities(
    x, y, rows, cols, row_count, col_count, x_stride, y_stride, width, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) of float32. Places beyond the matrix repeat its last row or column."""
    k = tl.arange(0, BLOCK_K)
    left = x + tl.minimum(rows, row_count - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    right = y + tl.minimum(cols, col_count - 1).to(tl.int64)[None, :] * y_stride + k[:, None]
    c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, mask=(start + k < width)[None, :], other=0.0)
            b = tl.load(right, mask=(start + k < width)[:, None], other=0.0)
        c = tl.dot(a, b, c, input_precision=PRECISION)
        left += BLOCK_K
        right += BLOCK_K
    return c


@triton.jit
def _halves(c, M: tl.constexpr, N: tl.constexpr):
    """Left and right. An epilogue on a part of the columns at a time holds fewer intermediates in registers."""
    return tl.split(tl.permute(tl.reshape(c, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _pieces(c, M: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr):
    """The columns in one, two or four parts, from the left."""
    if PIECES == 1:
        pieces = (c,)
    elif PIECES == 2:
        pieces = _halves(c, M, N)
    else:
        left, right = _halves(c, M, N)
        pieces = _halves(left, M, N // 2) + _halves(right, M, N // 2)
    return pieces


@triton.jit
def _unit(c, row_factor, col_factor, rows, cols, row_count, col_count, NORMALIZE: tl.constexpr):
    if NORMALIZE:
        left = tl.load(row_factor + tl.minimum(rows, row_count - 1))
        right = tl.load(col_factor + tl.minimum(cols, col_count - 1))
        c = c * left[:, None] * right[None, :]
    return c


@triton.jit
def _taken(
    rows, cols, row_count, col_count, row_begin, col_begin, row_ids, col_ids,
    DROP_DIAGONAL: tl.constexpr, UPPER: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """The pairs of a tile that count, of bool."""
    taken = (rows < row_count)[:, None] & (cols < col_count)[None, :]
    if UPPER:
        taken &= (col_begin + cols)[None, :] > (row_begin + rows)[:, None]
    elif DROP_DIAGONAL:
        taken &= (col_begin + cols)[None, :] != (row_begin + rows)[:, None]
    if IDS:
        mine = tl.load(row_ids + tl.minimum(rows, row_count - 1))
        theirs = tl.load(col_ids + tl.minimum(cols, col_count - 1))
        taken &= mine[:, None] != theirs[None, :]
    return taken


@triton.jit
def _finite_or_zero(x):
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def _scale_of(scale, index, count, SCALAR: tl.constexpr):
    """The natural scale; logits are kept in base 2."""
    return tl.load(scale if SCALAR else scale + tl.minimum(index, count - 1))


@triton.jit
def _partial(z, AXIS: tl.constexpr):
    """Maximum, rounded to an integer, and sum of 2^(z - maximum) of the base-2 logits along an axis."""
    top = tl.floor(tl.max(z, AXIS) + 0.5)
    return top, tl.sum(tl.exp2(z - tl.expand_dims(_finite_or_zero(top), AXIS)), AXIS)


@triton.jit
def _lse_piece(
    c, row_factor, col_factor, row_scale, col_scale, row_ids, col_ids, row_partials, col_partials,
    rows, cols, row_count, col_count, row_begin, col_begin, row_tile, piece,
    NORMALIZE: tl.constexpr, COLUMNS: tl.constexpr, ROW_SCALAR: tl.constexpr, COL_SCALAR: tl.constexpr,
    DROP_DIAGONAL: tl.constexpr, UPPER: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    c = _unit(c, row_factor, col_factor, rows, cols, row_count, col_count, NORMALIZE)
    taken = _taken(rows, cols, row_count, col_count, row_begin, col_begin, row_ids, col_ids, DROP_DIAGONAL, UPPER, IDS)
    scale = _scale_of(row_scale, rows, row_count, ROW_SCALAR)
    z = c * ((scale if ROW_SCALAR else scale[:, None]) * _LOG2_E)
    top, total = _partial(tl.where(taken, z, float("-inf")), 1)
    row_place = row_partials + piece.to(tl.int64) * 2 * row_count + rows
    tl.store(row_place, top, mask=rows < row_count)
    tl.store(row_place + row_count, total, mask=rows < row_count)
    if COLUMNS:
        scale = _scale_of(col_scale, cols, col_count, COL_SCALAR)
        z = c * ((scale if COL_SCALAR else scale[None, :]) * _LOG2_E)
        top, total = _partial(tl.where(taken, z, float("-inf")), 0)
        col_place = col_partials + row_tile.to(tl.int64) * 2 * col_count + cols
        tl.store(col_place, top, mask=cols < col_count)
        tl.store(col_place + col_count, total, mask=cols < col_count)


@triton.jit
def _nothing(partials, slot, index, count, SIZE: tl.constexpr):
    place = partials + slot.to(tl.int64) * 2 * count + index
    tl.store(place, tl.full((SIZE,), float("-inf"), tl.float32), mask=index < count)
    tl.store(place + count, tl.zeros((SIZE,), tl.float32), mask=index < count)


@triton.jit(do_not_specialize=["row_count", "col_count", "row_begin", "col_begin"])
def _lse_tile_kernel(
    x, y, row_factor, col_factor, row_scale, col_scale, row_ids, col_ids,
    row_partials, col_partials,  # (pieces of columns, 2, rows), (row tiles, 2, columns)
    row_count, col_count, row_begin, col_begin, width, x_stride, y_stride,
    NORMALIZE: tl.constexpr, COLUMNS: tl.constexpr, ROW_SCALAR: tl.constexpr, COL_SCALAR: tl.constexpr,
    DROP_DIAGONAL: tl.constexpr, UPPER: tl.constexpr, IDS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Partial statistics of a tile: maximum and sum of every row, and of every column if COLUMNS."""
    row_tile, col_tile = _place(tl.cdiv(row_count, BLOCK_M), tl.cdiv(col_count, BLOCK_N), GROUP)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    W: tl.constexpr = BLOCK_N // PIECES
    first = col_tile * PIECES
    if UPPER and col_begin + (col_tile + 1) * BLOCK_N <= row_begin + row_tile * BLOCK_M + 1:
        for p in tl.static_range(PIECES):
            _nothing(row_partials, first + p, rows, row_count, BLOCK_M)
        if COLUMNS:
            _nothing(col_partials, row_tile, cols, col_count, BLOCK_N)
    else:
        c = _similarities(
            x, y, rows, cols, row_count, col_count, x_stride, y_stride, width,
            EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        pieces = _pieces(c, BLOCK_M, BLOCK_N, PIECES)
        for p in tl.static_range(PIECES):
            _lse_piece(
                pieces[p], row_factor, col_factor, row_scale, col_scale, row_ids, col_ids, row_partials, col_partials,
                rows, col_tile * BLOCK_N + p * W + tl.arange(0, W), row_count, col_count, row_begin, col_begin,
                row_tile, first + p, NORMALIZE, COLUMNS, ROW_SCALAR, COL_SCALAR, DROP_DIAGONAL, UPPER, IDS,
            )  # fmt: skip


@triton.jit
def _slots_at(partials, start, slots, stride, i, count, SLOTS: tl.constexpr):
    """Places of the partial results of `SLOTS` tiles at once, so that their loads overlap, and which of them exist."""
    slot = start + tl.arange(0, SLOTS)
    place = partials + slot.to(tl.int64)[:, None] * stride + i[None, :]
    return place, (slot < slots)[:, None] & (i < count)[None, :]


@triton.jit(do_not_specialize=["count", "tiles"])
def _fold_kernel(
    partials, state_max, state_sum, lse, shift, inverse, count, tiles,
    FIRST: tl.constexpr, LAST: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds partial statistics (tiles, 2, count) to the state, in the order of the tiles; the last one finishes it."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    if FIRST:
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
    else:
        top = tl.load(state_max + i, mask=inside, other=float("-inf"))
        total = tl.load(state_sum + i, mask=inside, other=0.0)
    for start in range(0, tiles, SLOTS):
        place, exists = _slots_at(partials, start, tiles, 2 * count, i, count, SLOTS)
        new_top = tl.load(place, mask=exists, other=float("-inf"))
        new_total = tl.load(place + count, mask=exists, other=0.0)
        both = tl.maximum(top, tl.max(new_top, 0))
        near = _finite_or_zero(both)
        total = total * tl.exp2(top - near) + tl.sum(new_total * tl.exp2(new_top - near[None, :]), 0)
        top = both
    if LAST:
        tl.store(lse + i, (tl.log2(total) + top) * (1 / _LOG2_E), mask=inside)
        tl.store(shift + i, _finite_or_zero(top), mask=inside)
        tl.store(inverse + i, tl.where(total == 0, 0.0, 1 / total), mask=inside)
    else:
        tl.store(state_max + i, top, mask=inside)
        tl.store(state_sum + i, total, mask=inside)


@triton.jit(do_not_specialize=["count", "tiles"])
def _scale_grad_kernel(partials, upstream, inverse, out, count, tiles, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds to out_i the product upstream_i E_i[c], from the partial sums (tiles, count)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tiles, SLOTS):
        place, exists = _slots_at(partials, start, tiles, count, i, count, SLOTS)
        total += tl.sum(tl.load(place, mask=exists, other=0.0), 0)
    total *= tl.load(upstream + i, mask=inside, other=0.0) * tl.load(inverse + i, mask=inside, other=0.0)
    tl.store(out + i, total + tl.load(out + i, mask=inside, other=0.0), mask=inside)


@triton.jit
def _grad_piece(
    c, row_factor, col_factor, row_scale, col_scale, row_ids, col_ids, row_shift, row_inverse, row_upstream,
    col_shift, col_inverse, col_upstream, magnifier, panel, row_dots, col_dots,
    rows, cols, row_count, col_count, row_begin, col_begin, panel_stride, row_tile, piece,
    NORMALIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOTS: tl.constexpr,
    ROW_SCALAR: tl.constexpr, COL_SCALAR: tl.constexpr, DROP_DIAGONAL: tl.constexpr, UPPER: tl.constexpr,
    IDS: tl.constexpr, BLOCK_M: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    c = _unit(c, row_factor, col_factor, rows, cols, row_count, col_count, NORMALIZE)
    taken = _taken(rows, cols, row_count, col_count, row_begin, col_begin, row_ids, col_ids, DROP_DIAGONAL, UPPER, IDS)
    safe_rows = tl.minimum(rows, row_count - 1)
    safe_cols = tl.minimum(cols, col_count - 1)
    g = tl.zeros((BLOCK_M, W), tl.float32)
    if ROWS:
        scale = _scale_of(row_scale, rows, row_count, ROW_SCALAR)
        shift = tl.load(row_shift + safe_rows)
        weight = tl.load(row_upstream + safe_rows) * scale * tl.load(row_inverse + safe_rows)
        z = c * ((scale if ROW_SCALAR else scale[:, None]) * _LOG2_E)
        p = tl.where(taken, tl.exp2(z - shift[:, None]), 0.0)
        g += p * weight[:, None]
        if DOTS:
            dots = tl.sum(tl.where(taken, p * c, 0.0), 1)
            tl.store(row_dots + piece.to(tl.int64) * row_count + rows, dots, mask=rows < row_count)
    if COLUMNS:
        scale = _scale_of(col_scale, cols, col_count, COL_SCALAR)
        shift = tl.load(col_shift + safe_cols)
        weight = tl.load(col_upstream + safe_cols) * scale * tl.load(col_inverse + safe_cols)
        z = c * ((scale if COL_SCALAR else scale[None, :]) * _LOG2_E)
        p = tl.where(taken, tl.exp2(z - shift[None, :]), 0.0)
        g += p * weight[None, :]
        if DOTS:
            dots = tl.sum(tl.where(taken, p * c, 0.0), 0)
            tl.store(col_dots + row_tile.to(tl.int64) * col_count + cols, dots, mask=cols < col_count)
    g = _unit(tl.where(taken, g, 0.0), row_factor, col_factor, rows, cols, row_count, col_count, NORMALIZE)
    g = (g * tl.load(magnifier)).to(panel.dtype.element_ty)
    place = panel + rows.to(tl.int64)[:, None] * panel_stride + cols[None, :]
    inside = (rows < row_count)[:, None] & (cols < col_count)[None, :]
    if UPPER:
        tl.store(place, g, mask=inside & (cols[None, :] >= rows[:, None]))
        # The mirrored place of (i, j), j > i, in the square on the diagonal.
        mirror = panel + cols.to(tl.int64)[:, None] * panel_stride + rows[None, :]
        exists = (cols < row_count)[:, None] & (rows < row_count)[None, :] & (cols[:, None] > rows[None, :])
        tl.store(mirror, tl.trans(g), mask=exists)
    else:
        tl.store(place, g, mask=inside)


@triton.jit(do_not_specialize=["row_count", "col_count", "row_begin", "col_begin"])
def _grad_tile_kernel(
    x, y, row_factor, col_factor, row_scale, col_scale, row_ids, col_ids,
    row_shift, row_inverse, row_upstream, col_shift, col_inverse, col_upstream, magnifier,
    panel,  # (rows, columns)
    row_dots, col_dots,  # (pieces of columns, rows), (row tiles, columns)
    row_count, col_count, row_begin, col_begin, width, x_stride, y_stride, panel_stride,
    NORMALIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOTS: tl.constexpr,
    ROW_SCALAR: tl.constexpr, COL_SCALAR: tl.constexpr, DROP_DIAGONAL: tl.constexpr, UPPER: tl.constexpr,
    IDS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of G, as the vendor's products want it: times both factors and the magnifier, in the panel's dtype.

    If UPPER, the panel begins on the diagonal and G is symmetric: tiles below it are the mirrored ones above.
    """
    row_tile, col_tile = _place(tl.cdiv(row_count, BLOCK_M), tl.cdiv(col_count, BLOCK_N), GROUP)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    W: tl.constexpr = BLOCK_N // PIECES
    first = col_tile * PIECES
    if UPPER and (col_tile + 1) * BLOCK_N <= row_tile * BLOCK_M + 1:
        if DOTS:
            for p in tl.static_range(PIECES):
                place = row_dots + (first + p).to(tl.int64) * row_count + rows
                tl.store(place, tl.zeros((BLOCK_M,), tl.float32), mask=rows < row_count)
            place = col_dots + row_tile.to(tl.int64) * col_count + cols
            tl.store(place, tl.zeros((BLOCK_N,), tl.float32), mask=cols < col_count)
    else:
        c = _similarities(
            x, y, rows, cols, row_count, col_count, x_stride, y_stride, width,
            EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        pieces = _pieces(c, BLOCK_M, BLOCK_N, PIECES)
        for p in tl.static_range(PIECES):
            _grad_piece(
                pieces[p], row_factor, col_factor, row_scale, col_scale, row_ids, col_ids, row_shift, row_inverse,
                row_upstream, col_shift, col_inverse, col_upstream, magnifier, panel, row_dots, col_dots,
                rows, col_tile * BLOCK_N + p * W + tl.arange(0, W), row_count, col_count, row_begin, col_begin,
                panel_stride, row_tile, first + p, NORMALIZE, ROWS, COLUMNS, DOTS, ROW_SCALAR, COL_SCALAR,
                DROP_DIAGONAL, UPPER, IDS, BLOCK_M, W,
            )  # fmt: skip


@triton.jit
def _scale_rows_kernel(x, factor, out, count, width, x_stride, out_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out_i = factor_i x_i in the dtype of out."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < count)[:, None] & (k < width)[None, :]
    scale = tl.load(factor + rows, mask=rows < count, other=0.0)[:, None]
    value = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(out + rows[:, None] * out_stride + k[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _row_dots_kernel(
    x, y, x_inverse, y_inverse, out, count, width, x_stride, y_stride,
    NORMALIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out_i = x_i . y_i, of unit rows if NORMALIZE."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    exists = rows < count
    if NORMALIZE:
        a = tl.load(x_inverse + rows, mask=exists, other=0.0)[:, None]
        b = tl.load(y_inverse + rows, mask=exists, other=0.0)[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = exists[:, None] & (k < width)[None, :]
        left = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
        right = tl.load(y + rows[:, None] * y_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORMALIZE:
            left *= a
            right *= b
        total += left * right
    tl.store(out + rows, tl.sum(total, 1), mask=exists)


@triton.jit
def _unit_gradient(sums, unscale, y, partner_weight, rows, k, inside, sums_stride, y_stride, PARTNER: tl.constexpr):
    """Gradient of the (normalised) rows at the features k: the products' sums, and the positives' part."""
    t = tl.load(sums + rows[:, None] * sums_stride + k[None, :], mask=inside, other=0.0) * unscale
    if PARTNER:
        t += partner_weight * tl.load(y + rows[:, None] * y_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
    return t


@triton.jit
def _finish_kernel(
    sums, x, x_inverse, x_factor, y, y_inverse, diagonal, magnifier, out,
    count, width, sums_stride, x_stride, y_stride, out_stride, EPS,
    NORMALIZE: tl.constexpr, PARTNER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of rows from those of the normalised ones; PARTNER: each has a positive, y_i."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    exists = rows < count
    unscale = tl.full((ROWS,), 1.0, tl.float32) / tl.load(magnifier)
    weight = tl.zeros((ROWS,), tl.float32)
    if PARTNER:
        weight = tl.load(diagonal + rows, mask=exists, other=0.0)
    if NORMALIZE:
        factor = tl.load(x_factor + rows, mask=exists, other=1.0)
        unscale = tl.where(factor == 0, 0.0, unscale / factor)
        if PARTNER:
            weight *= tl.load(y_inverse + rows, mask=exists, other=0.0)
        inverse = tl.load(x_inverse + rows, mask=exists, other=0.0)
        along = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, width, BLOCK):
            k = start + tl.arange(0, BLOCK)
            inside = exists[:, None] & (k < width)[None, :]
            t = _unit_gradient(
                sums, unscale[:, None], y, weight[:, None], rows, k, inside, sums_stride, y_stride, PARTNER
            )
            unit = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
            along += t * (unit * inverse[:, None])
        # Shorter rows are divided by eps, a constant.
        projection = tl.where(inverse * EPS < 1, tl.sum(along, 1), 0.0)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = exists[:, None] & (k < width)[None, :]
        t = _unit_gradient(sums, unscale[:, None], y, weight[:, None], rows, k, inside, sums_stride, y_stride, PARTNER)
        if NORMALIZE:
            unit = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
            t = (t - projection[:, None] * (unit * inverse[:, None])) * inverse[:, None]
        tl.store(out + rows[:, None] * out_stride + k[None, :], t.to(out.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------- configurations

# blocks: rows and columns of a tile, features at a time, parts of the columns that the epilogue takes in turn.
_TILES_16 = {
    "sm_80": Config((128, 128, 32, 4), 8, 4),
    "sm_86": Config((128, 64, 32, 2), 8, 3),
    "sm_90": Config((128, 128, 64, 2), 8, 3),
    "sm_100": Config((128, 128, 64, 4), 8, 3),
    "gfx942": Config((128, 128, 32, 4), 8, 2),
    "interpreter": Config((32, 32, 16, 2)),
}
# Larger tiles read the features less often. What their epilogue leaves of the registers is enough for one kernel each.
_LARGEST_16 = {
    "lse": _TILES_16 | {"sm_90": Config((128, 256, 64, 4), 8, 3)},
    "grad": _TILES_16 | {"sm_90": Config((256, 128, 64, 4), 8, 3)},
}
_TILES_32 = {
    "sm_80": Config((64, 64, 32, 2), 8, 3),
    "sm_86": Config((64, 64, 32, 2), 8, 2),
    "sm_90": Config((64, 64, 32, 1), 8, 3),
    "sm_100": Config((64, 64, 32, 2), 8, 3),
    "gfx942": Config((64, 64, 16, 1), 8, 2),
    "interpreter": Config((32, 32, 16, 4)),
}
# Where large tiles would leave multiprocessors without work.
_SMALL_16 = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_90"), Config((64, 64, 64, 2), 4, 3)),
    "sm_100": Config((64, 64, 64, 2), 8, 3),
    "gfx942": Config((64, 64, 32, 2), 4, 2),
    "interpreter": Config((16, 16, 16, 1)),
}
# What tuning tries besides, where it neither spills nor outgrows the chip (`make kernels`).
_SQUARE, _WIDE, _TALL, _FLAT = (
    Config((128, 128, 64, 2), 8, 3),
    Config((128, 256, 64, 4), 8, 4),
    Config((256, 128, 64, 4), 8, 3),
    Config((64, 128, 64, 2), 4, 4),
)
_TWO_A_MULTIPROCESSOR = Config((128, 128, 64, 4), 8, 3, 128)
_CANDIDATES_16: dict[str, dict[str, tuple[Config, ...]]] = {
    "lse": {
        "sm_80": (_SQUARE, _WIDE, _TALL, _FLAT),
        "sm_86": (_SQUARE, _TALL, _FLAT),
        "sm_90": (_SQUARE, _TWO_A_MULTIPROCESSOR, _WIDE, _TALL, _FLAT),
        "sm_100": (_SQUARE, _TWO_A_MULTIPROCESSOR, _WIDE, _TALL),
        "gfx942": (_TWO_A_MULTIPROCESSOR,),
    },
    "grad": {
        **dict.fromkeys(("sm_80", "sm_86"), (_SQUARE, _TALL, _FLAT)),
        "sm_90": (_SQUARE, _FLAT),
        "sm_100": (_SQUARE, _TALL),
        "gfx942": (_TWO_A_MULTIPROCESSOR,),
    },
    "grad mirrored": {
        **dict.fromkeys(("sm_80", "sm_90"), (_FLAT,)),
        "sm_86": (_SQUARE, _FLAT),
        "sm_100": (),
        "gfx942": (_TWO_A_MULTIPROCESSOR,),
    },
}
_FEW_WARPS, _TALL_32 = Config((64, 64, 32, 1), 4, 3), Config((128, 64, 32, 1), 8, 3)
_CANDIDATES_32: dict[str, dict[str, tuple[Config, ...]]] = {
    "lse": dict.fromkeys(("sm_80", "sm_86", "sm_90", "sm_100"), (_FEW_WARPS, _TALL_32)) | {"gfx942": ()},
    "grad": dict.fromkeys(("sm_80", "sm_86", "sm_90", "sm_100"), (_FEW_WARPS, _TALL_32)) | {"gfx942": (_TALL_32,)},
    "grad mirrored": {
        **dict.fromkeys(("sm_80", "sm_86", "sm_90"), (_FEW_WARPS, _TALL_32)),
        "sm_100": (),
        "gfx942": (_TALL_32,),
    },
}
_INTERPRETER_CANDIDATES = (Config((32, 16, 32, 1)),)
_GROUP = 8
_FOLD = {"SLOTS": 16, "BLOCK": 128}  # partial results and rows of a program at a time


def _tables(
    kernel: str, dtype: torch.dtype, mirrored: bool
) -> tuple[dict[str, Config], dict[str, Config], dict[str, tuple[Config, ...]]]:
    """Defaults for large and for small panels, and what tuning tries besides."""
    tried = "grad mirrored" if mirrored and kernel == "grad" else kernel
    if dtype == torch.float32:
        return _TILES_32, _TILES_32, _CANDIDATES_32[tried]
    return _TILES_16 if mirrored else _LARGEST_16[kernel], _SMALL_16, _CANDIDATES_16[tried]


def _tile_config(kernel: str, x: Tensor, y: Tensor, mirrored: bool, launch: Callable[[Config], None]) -> Config:
    large, small, tried = _tables(kernel, x.dtype, mirrored)
    config = _triton.pick(large, x.device)
    tiles = triton.cdiv(len(x), config.blocks[0]) * triton.cdiv(len(y), config.blocks[1])
    if tiles < _triton.multiprocessors(x.device):
        config = _triton.pick(small, x.device)
    candidates = _INTERPRETER_CANDIDATES if x.device.type == "cpu" else _triton.pick(tried, x.device)
    key = f"{kernel}{' mirrored' if mirrored else ''} {x.dtype} {_triton.size_class(len(x), len(y), x.shape[1])}"
    return _triton.best(key, x.device, config, candidates, launch)


def _row_blocks(width: int) -> dict[str, int]:
    """Rows and features of a program of the row kernels: 2048 numbers."""
    block = min(1024, triton.next_power_of_2(max(width, 1)))
    return {"ROWS": 2048 // block, "BLOCK": block}


# ---------------------------------------------------------------- launches


class _Rows:
    """The rows of an input as the tile kernels read them.

    Where they are normalised: 2^e x_i, which is exact and near one, and the rest of the inverse norm, a factor in
    [1/2, 1) (0 for a row of zeros).
    """

    def __init__(self, x: Tensor, normalize: bool) -> None:
        self.x = x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
        self.normalize = normalize
        self.inverse = self.factor = torch.ones((1,), dtype=torch.float32, device=x.device)  # not read
        if normalize:
            self.inverse = inverse_norms(self.x, torch.float32)
            self.factor, exponent = torch.frexp(self.inverse)
            self._power = torch.ldexp((self.inverse != 0).float(), exponent)
        self._held: tuple[slice, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def factor_of(self, part: slice) -> Tensor:
        return self.factor[part] if self.normalize else self.factor

    def inverse_of(self, part: slice) -> Tensor:
        return self.inverse[part] if self.normalize else self.inverse

    def __getitem__(self, part: slice) -> Tensor:
        if not self.normalize:
            return self.x[part]
        if self._held is None or self._held[0] != part:
            block = self.x[part]
            out = torch.empty(block.shape, dtype=block.dtype, device=block.device)
            rows, width = block.shape
            if out.numel():
                size = _row_blocks(width)
                _scale_rows_kernel[(triton.cdiv(rows, size["ROWS"]), triton.cdiv(width, size["BLOCK"]))](
                    block, self._power[part], out, rows, width, block.stride(0), out.stride(0), **size
                )
            self._held = part, out
        return self._held[1]


@dataclass
class _Statistics:
    """One direction of the forward pass: the scale, the online maximum and sum, and what comes of them."""

    scale: Tensor  # () or (n,)
    state: Tensor  # (2, n)
    lse: Tensor  # (n,)
    stats: Tensor  # (2, n): the shift, and one over the sum of 2^(z - shift), 0 where all pairs are left out

    @classmethod
    def start(cls, scale: Tensor, n: int) -> _Statistics:
        return cls(scale.contiguous(), scale.new_empty((2, n)), scale.new_empty((n,)), scale.new_empty((2, n)))

    def __getitem__(self, part: slice) -> _Statistics:
        return _Statistics(per_row(self.scale, part), self.state[:, part], self.lse[part], self.stats[:, part])

    def fold(self, partials: Tensor, first: bool = False, last: bool = False) -> None:
        if count := len(self.lse):
            _fold_kernel[(triton.cdiv(count, _FOLD["BLOCK"]),)](
                partials, *self.state, self.lse, *self.stats, count, len(partials),
                FIRST=first, LAST=last, **_FOLD,
            )  # fmt: skip

    def begin(self) -> None:
        self.fold(self.state[:0], first=True)

    def end(self) -> None:
        self.fold(self.state[:0], last=True)


@dataclass
class _Direction:
    """One direction of the backward pass; gradients of its scale where `scale_grad` has room for them."""

    scale: Tensor  # () or (n,)
    stats: Tensor  # (2, n)
    upstream: Tensor  # (n,)
    scale_grad: Tensor  # (n,) or (0,)

    @classmethod
    def start(cls, scale: Tensor, stats: Tensor, upstream: Tensor, need_scale: bool) -> _Direction:
        room = upstream.new_zeros((len(upstream) if need_scale else 0,))
        return cls(scale.contiguous(), stats, upstream.contiguous(), room)

    def __getitem__(self, part: slice) -> _Direction:
        room = self.scale_grad[part] if len(self.scale_grad) else self.scale_grad
        return _Direction(per_row(self.scale, part), self.stats[:, part], self.upstream[part], room)

    def without_scale(self) -> _Direction:
        return _Direction(self.scale, self.stats, self.upstream, self.scale_grad[:0])

    def vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.scale, self.stats[0], self.stats[1], self.upstream

    def add(self, partials: Tensor) -> None:
        """The partial sums (tiles, n) of 2^(z - shift) c."""
        if count := len(self.scale_grad):
            _scale_grad_kernel[(triton.cdiv(count, _FOLD["BLOCK"]),)](
                partials, self.upstream, self.stats[1], self.scale_grad, count, len(partials), **_FOLD
            )


@dataclass(frozen=True)
class _Pairs:
    """Which pairs count. `upper`: those of a self-similarity, each once."""

    row_ids: Tensor | None
    col_ids: Tensor | None
    drop_diagonal: bool
    upper: bool = False

    def swapped(self) -> _Pairs:
        return _Pairs(self.col_ids, self.row_ids, self.drop_diagonal)

    def arguments(self, rows: slice, cols: slice, dummy: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, bool]]:
        ids = self.row_ids is not None and self.col_ids is not None
        vectors = (self.row_ids[rows], self.col_ids[cols]) if ids else (dummy, dummy)  # type: ignore[index]
        # Right of the square on the diagonal every pair counts.
        upper = self.upper and rows.start == cols.start
        return vectors, {"DROP_DIAGONAL": self.drop_diagonal, "UPPER": upper, "IDS": ids}


def _common(x: Tensor, block_k: int) -> dict[str, Any]:
    precision = _triton.float32_precision() if x.dtype == torch.float32 else "ieee"
    return {"EVEN": x.shape[1] % block_k == 0, "PRECISION": precision, "GROUP": _GROUP}


def _launched(kernel: Any, rows: int, cols: int, config: Config, *args: Any, **options: Any) -> None:
    m, n, k, pieces = config.blocks
    kernel[(triton.cdiv(rows, m) * triton.cdiv(cols, n),)](
        *args, **options, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, PIECES=pieces, **config.options(bool(torch.version.hip))
    )


def _slots(rows: int, cols: int, config: Config) -> tuple[int, int]:
    """Partial results that a column gets, and that a row gets."""
    m, n, _, pieces = config.blocks
    return triton.cdiv(rows, m), triton.cdiv(cols, n) * pieces


def _lse_panel(
    left: _Rows, right: _Rows, i: slice, j: slice, row: _Statistics, col: _Statistics | None, pairs: _Pairs
) -> tuple[Tensor, Tensor]:
    """Partial statistics of the rows i, (pieces, 2, rows), and of the columns j, from their similarities."""
    x, y = left[i], right[j]
    m, n = len(x), len(y)
    ids, mask = pairs.arguments(i, j, row.scale)
    row_scale = per_row(row.scale, i)
    col_scale = row_scale if col is None else per_row(col.scale, j)
    found: list[Tensor] = []

    def launch(config: Config) -> None:
        tiles = _slots(m, n, config)
        found[:] = (
            row.lse.new_empty((tiles[1], 2, m)),
            row.lse.new_empty((tiles[0] if col is not None else 0, 2, n)),
        )
        _launched(
            _lse_tile_kernel, m, n, config,
            x, y, left.factor_of(i), right.factor_of(j), row_scale, col_scale, *ids, *found,
            m, n, i.start, j.start, x.shape[1], x.stride(0), y.stride(0),
            NORMALIZE=left.normalize, COLUMNS=col is not None, ROW_SCALAR=row_scale.dim() == 0,
            COL_SCALAR=col_scale.dim() == 0, **mask, **_common(x, config.blocks[2]),
        )  # fmt: skip

    launch(_tile_config("lse", x, y, mask["UPPER"], launch))
    return found[0], found[1]


def _lse_sweep(left: _Rows, right: _Rows, row: _Statistics, col: _Statistics | None, pairs: _Pairs) -> None:
    """Fills the statistics. Of a self-similarity `row` is `col`."""
    m, n = len(left), len(right)
    if 0 < m <= PANEL_ROWS and 0 < n <= PANEL_COLS:  # one panel: nothing is launched but it and the folds
        of_rows, of_cols = _lse_panel(left, right, slice(0, m), slice(0, n), row, col, pairs)
        row.fold(of_rows, first=True, last=row is not col)
        if col is not None:
            col.fold(of_cols, first=row is not col, last=True)
        return
    states = [s for s in (row, None if row is col else col) if s is not None]
    for state in states:
        state.begin()
    for i in blocks(m, PANEL_ROWS):
        for j in blocks(n, PANEL_COLS, i.start if pairs.upper else 0):
            of_rows, of_cols = _lse_panel(left, right, i, j, row, col, pairs)
            row[i].fold(of_rows)
            if col is not None:
                col[j].fold(of_cols)
    for state in states:
        state.end()


def _diagonal(left: _Rows, right: _Rows) -> Tensor:
    rows, width = min(len(left), len(right)), left.x.shape[1]
    out = torch.empty((rows,), dtype=torch.float32, device=left.x.device)
    size = _row_blocks(width)
    if rows:
        _row_dots_kernel[(triton.cdiv(rows, size["ROWS"]),)](
            left.x, right.x, left.inverse, right.inverse, out, rows, width, left.x.stride(0), right.x.stride(0),
            NORMALIZE=left.normalize, **size,
        )  # fmt: skip
    return out


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out = a b, or out += a b, in float32 from features of any dtype."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=1 if add else 0, out=out)
        return
    target = torch.empty_like(out) if add else out
    if a.is_cuda:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=target)
    else:  # the interpreter's; the CPU has no product of mixed dtypes
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=target)
    if add:
        out.add_(target)


class _Backward:
    """What all panels of a backward pass share."""

    def __init__(
        self,
        left: _Rows,
        right: _Rows,
        row: _Direction | None,
        col: _Direction | None,
        pairs: _Pairs,
        magnifier: Tensor,
    ) -> None:
        self.left, self.right, self.row, self.col, self.pairs, self.magnifier = left, right, row, col, pairs, magnifier
        self.dots = any(d is not None and len(d.scale_grad) for d in (row, col))
        self.nothing = torch.empty((0,), dtype=torch.float32, device=left.x.device)
        rows, cols = min(len(left), PANEL_ROWS), min(len(right), PANEL_COLS)
        self.scratch = torch.empty((rows * cols,), dtype=left.x.dtype, device=left.x.device)

    def panel(self, i: slice, j: slice) -> Tensor:
        """(rows, columns): G; also adds to the gradients of the scales."""
        x, y = self.left[i], self.right[j]
        m, n = len(x), len(y)
        panel = self.scratch[: m * n].view(m, n)
        ids, mask = self.pairs.arguments(i, j, self.magnifier)
        row, col = self.row and self.row[i], self.col and self.col[j]
        row_vectors, col_vectors = _vectors(row, self.magnifier), _vectors(col, self.magnifier)
        found = [self.nothing, self.nothing]

        def launch(config: Config) -> None:
            if self.dots:
                tiles = _slots(m, n, config)
                found[0] = self.nothing.new_empty((tiles[1], m))
                found[1] = self.nothing.new_empty((tiles[0], n))
            _launched(
                _grad_tile_kernel, m, n, config,
                x, y, self.left.factor_of(i), self.right.factor_of(j), row_vectors[0], col_vectors[0], *ids,
                *row_vectors[1:], *col_vectors[1:], self.magnifier, panel, *found,
                m, n, i.start, j.start, x.shape[1], x.stride(0), y.stride(0), n,
                NORMALIZE=self.left.normalize, ROWS=row is not None, COLUMNS=col is not None, DOTS=self.dots,
                ROW_SCALAR=row_vectors[0].dim() == 0, COL_SCALAR=col_vectors[0].dim() == 0,
                **mask, **_common(x, config.blocks[2]),
            )  # fmt: skip

        launch(_tile_config("grad", x, y, mask["UPPER"], launch))
        for direction, partials in zip((row, col), found, strict=True):
            if direction is not None:
                direction.add(partials)
        return panel

    def finish(
        self, side: _Rows, other: _Rows, part: slice, sums: Tensor, diagonal: Tensor | None, out: Tensor
    ) -> None:
        """Writes the gradients of the rows `part` of `side`, given the products' sums."""
        positives = 0 if diagonal is None else min(len(diagonal) - part.start, part.stop - part.start)
        middle = part.start + max(positives, 0)
        for rows, partner in ((slice(part.start, middle), True), (slice(middle, part.stop), False)):
            count, width = rows.stop - rows.start, side.x.shape[1]
            if count and width:
                x, s, o = side.x[rows], sums[rows.start - part.start : rows.stop - part.start], out[rows]
                y = other.x[rows] if partner else x
                size = _row_blocks(width)
                _finish_kernel[(triton.cdiv(count, size["ROWS"]),)](
                    s, x, side.inverse_of(rows), side.factor_of(rows), y,
                    other.inverse_of(rows) if partner else side.inverse_of(rows),
                    self.magnifier if diagonal is None else diagonal[rows], self.magnifier, o,
                    count, width, s.stride(0), x.stride(0), y.stride(0), o.stride(0), NORM_EPS,
                    NORMALIZE=side.normalize, PARTNER=partner, **size,
                )  # fmt: skip


def _vectors(direction: _Direction | None, dummy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (dummy,) * 4 if direction is None else direction.vectors()


def _sums(rows: int, width: int, like: Tensor) -> Tensor:
    return torch.empty((rows, width), dtype=torch.float32, device=like.device)


def _gradient_sweep(
    work: _Backward, diagonal: Tensor | None, left_out: Tensor | None, right_out: Tensor | None
) -> None:
    """Writes the gradients of the rows, and of the columns, where wanted."""
    left, right, width = work.left, work.right, work.left.x.shape[1]
    row_sums = _sums(min(len(left), PANEL_ROWS), width, left.x)
    all_sums = _sums(len(right) if right_out is not None else 0, width, left.x)
    for i in blocks(len(left), PANEL_ROWS):
        sums = row_sums[: i.stop - i.start]
        for j in blocks(len(right), PANEL_COLS):
            panel = work.panel(i, j)
            if left_out is not None:
                _product(panel, right[j], sums, j.start > 0)
            if right_out is not None:
                _product(panel.t(), left[i], all_sums[j], i.start > 0)
        if left_out is not None:
            work.finish(left, right, i, sums if len(right) else sums.zero_(), diagonal, left_out)
    if right_out is not None:
        everything = slice(0, len(right))
        work.finish(right, left, everything, all_sums if len(left) else all_sums.zero_(), diagonal, right_out)


def _self_sweep(work: _Backward, out: Tensor) -> None:
    """Of a self-similarity, whose G is symmetric: panels begin on the diagonal."""
    x = work.left
    sums = torch.zeros_like(x.x, dtype=torch.float32, memory_format=torch.contiguous_format)
    for i in blocks(len(x), PANEL_ROWS):
        height = i.stop - i.start
        for j in blocks(len(x), PANEL_COLS, i.start):
            panel = work.panel(i, j)
            _product(panel, work.right[j], sums[i], True)
            # The square on the diagonal holds both of its halves.
            skip = height if j.start == i.start else 0
            if panel.shape[1] > skip:
                _product(panel[:, skip:].t(), x[i], sums[j.start + skip : j.stop], True)
        work.finish(x, x, i, sums[i], None, out)


def _magnifier(dtype: torch.dtype, *bounds: Tensor) -> Tensor:
    """A power of two that brings the largest |G| possible below 2^14: float16 has few exponents.

    On the device, so that nothing waits for it.
    """
    one = bounds[0].new_ones(())
    if dtype != torch.float16:
        return one
    bound = torch.stack([b.abs().amax() if b.numel() else torch.zeros_like(one) for b in bounds]).sum()
    power = torch.ldexp(one, (14 - torch.frexp(bound)[1]).clamp(-100, 100))
    return torch.where(bound.isfinite() & (bound > 0), power, one)


# ---------------------------------------------------------------- the ops


def _portable_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """float64 on the portable kernels: it is for checking, and the matrix units do not have it everywhere."""

    @wraps(function)
    def run(*args: Any) -> Any:
        features = next(x for x in args if isinstance(x, Tensor) and x.dim() == 2)
        if features.dtype == torch.float64:
            return getattr(portable, function.__name__)(*args)
        with _triton.on(features):
            return function(*args)

    return run


@_portable_float64
def similarity_lse_fwd(
    q: Tensor,
    k: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    normalize: bool,
    drop_diagonal: bool,
    keep: int,
) -> tuple[Tensor, ...]:
    if keep:
        raise RuntimeError("fastloss: backend 'triton' keeps no similarities for the backward pass")
    left, right = _Rows(q, normalize), _Rows(k, normalize)
    row, col = _lse(left, right, row_scale, col_scale, _Pairs(q_ids, k_ids, drop_diagonal))
    diagonal, nothing = _diagonal(left, right), row.lse.new_empty((0,))
    if col is None:
        return row.lse, nothing, diagonal, row.stats, row.stats.new_empty((2, 0)), nothing.clone()
    return row.lse, col.lse, diagonal, row.stats, col.stats, nothing


def _lse(
    left: _Rows, right: _Rows, row_scale: Tensor, col_scale: Tensor | None, pairs: _Pairs
) -> tuple[_Statistics, _Statistics | None]:
    row = _Statistics.start(row_scale, len(left))
    col = None if col_scale is None else _Statistics.start(col_scale, len(right))
    _lse_sweep(left, right, row, col, pairs)
    return row, col


@_portable_float64
def similarity_lse_bwd(
    grad_row: Tensor,
    grad_col: Tensor,
    grad_diagonal: Tensor,
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
    left, right = _Rows(q, normalize), _Rows(k, normalize)
    directions = [(row_scale, row_stats, grad_row)]
    if col_scale is not None:
        directions.append((col_scale, col_stats, grad_col))
    grad_q, grad_k = _empty_gradient(q, need_q, q.dtype), _empty_gradient(k, need_k, k.dtype)
    pairs = _Pairs(q_ids, k_ids, drop_diagonal)
    scales = _gradients(left, right, directions, grad_diagonal, pairs, grad_q, grad_k, need_scale)
    return grad_q, grad_k, *scales


def _empty_gradient(x: Tensor, needed: bool, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape if needed else (0,), dtype=dtype, device=x.device)


def _gradients(
    left: _Rows,
    right: _Rows,
    directions: list[tuple[Tensor, Tensor, Tensor]],  # (scale, statistics, upstream) of the rows, of the columns
    diagonal: Tensor,
    pairs: _Pairs,
    left_out: Tensor,  # (M, D), or (0,) if not wanted
    right_out: Tensor,
    need_scale: bool,
) -> tuple[Tensor, Tensor]:
    """Fills both gradients; returns those of the scales per row and per column, (0,) for what is not wanted."""
    magnifier = _magnifier(left.x.dtype, *(scale * upstream for scale, _, upstream in directions))
    row, col = ([_Direction.start(*d, need_scale) for d in directions] + [None])[:2]
    diagonal = diagonal.contiguous()  # a sum's gradient is one number, expanded
    need_left, need_right = left_out.dim() == 2, right_out.dim() == 2
    fits = right.x.numel() * 4 <= ACCUMULATOR_BYTES
    if need_left or need_scale or fits:
        _gradient_sweep(
            _Backward(left, right, row, col, pairs, magnifier),
            diagonal,
            left_out if need_left else None,
            right_out if need_right and fits else None,
        )
    if need_right and not fits:
        new_row, new_col = (None if d is None else d.without_scale() for d in (col, row))
        _gradient_sweep(_Backward(right, left, new_row, new_col, pairs.swapped(), magnifier), diagonal, right_out, None)
    nothing = magnifier.new_empty((0,))
    first, second = (nothing if d is None else d.scale_grad for d in (row, col))
    return first, second


@_portable_float64
def self_similarity_lse_fwd(x: Tensor, scale: Tensor, ids: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor]:
    rows, state = _Rows(x, normalize), _Statistics.start(scale, len(x))
    _lse_sweep(rows, _Rows(x, normalize), state, state, _Pairs(ids, ids, True, upper=True))
    return state.lse, state.stats


@_portable_float64
def self_similarity_lse_bwd(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    stats: Tensor,
    normalize: bool,
    need_x: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor]:
    rows = _Rows(x, normalize)
    magnifier = _magnifier(x.dtype, 2 * scale * grad)
    state = _Direction.start(scale, stats, grad, need_scale)
    out = _empty_gradient(x, need_x, x.dtype)
    # One more object of the same rows: its blocks are held beside those of the first.
    others = _Rows(x, normalize)
    if x.numel() * 4 <= ACCUMULATOR_BYTES:
        work = _Backward(rows, others, state, state, _Pairs(ids, ids, True, upper=True), magnifier)
        if need_x:
            _self_sweep(work, out)
        else:
            for i in blocks(len(x), PANEL_ROWS):
                for j in blocks(len(x), PANEL_COLS, i.start):
                    work.panel(i, j)
    else:
        work = _Backward(rows, others, state, state.without_scale(), _Pairs(ids, ids, True), magnifier)
        _gradient_sweep(work, None, out if need_x else None, None)
    return out, state.scale_grad


@_portable_float64
def pair_nll_fwd(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    normalize: bool,
    symmetric: bool,
    need_q: bool,
    need_k: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `tiles.pair_nll`: forward and backward pass, one after the other."""
    left, right = _Rows(q, normalize), _Rows(k, normalize)
    pairs = _Pairs(q_ids, k_ids, True)
    states = [s for s in _lse(left, right, scale, scale if symmetric else None, pairs) if s is not None]
    diagonal = _diagonal(left, right)
    positive = scale * diagonal
    margins = [margin(state.lse, positive) for state in states]
    total = torch.stack([torch.nn.functional.softplus(x, threshold=40).sum() for x in margins]).mean()
    if not (need_q or need_k or need_scale):
        return total, scale.new_empty((0,)), scale.new_empty((0,)), scale.new_empty((0,))
    upstreams = [x.sigmoid_().mul_(1 / len(margins)) for x in margins]
    slope = torch.stack(upstreams).sum(0)
    grad_q, grad_k = _empty_gradient(q, need_q, torch.float32), _empty_gradient(k, need_k, torch.float32)
    directions = [(scale, state.stats, upstream) for state, upstream in zip(states, upstreams, strict=True)]
    per_row, per_col = _gradients(left, right, directions, -slope * scale, pairs, grad_q, grad_k, need_scale)
    if need_scale:
        per_row = (per_row + per_col if symmetric else per_row) - slope * diagonal
    return total, grad_q, grad_k, per_row


pair_nll_bwd = portable.pair_nll_bwd


# ---------------------------------------------------------------- specimens for the gates

_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_WIDTHS = frozenset({"x", "y", "width", "x_stride", "y_stride"})


def specimens(target: str, candidates: bool) -> list[Specimen]:
    """Every kernel in its defaults on `target`; with `candidates`, the tiles in all that tuning tries."""
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if candidates else (torch.bfloat16, torch.float32):
        for kernel in ("lse", "grad"):
            for mirrored in (False, True):
                large, small, tried = _tables(kernel, dtype, mirrored)
                configs = {large[target]: ""}
                configs.setdefault(small[target], " small")
                for i, config in enumerate(tried[target] if candidates else ()):
                    configs.setdefault(config, f" candidate {i}")
                for config, note in configs.items():
                    found.append(_tile_specimen(kernel, dtype, mirrored, config, note, target))
        found += _row_specimens(dtype)
    counts = {"count": "i32", "tiles": "i32"}
    fold = counts | dict.fromkeys(("partials", "state_max", "state_sum", "lse", "shift", "inverse"), "*fp32")
    scale = counts | dict.fromkeys(("partials", "upstream", "inverse", "out"), "*fp32")
    flags, config = _FOLD | {"FIRST": True, "LAST": True}, Config(tuple(_FOLD.values()))
    return [
        *found,
        Specimen("fold", _fold_kernel, fold, flags, config),
        Specimen("scale gradient", _scale_grad_kernel, scale, _FOLD, config),
    ]


def _tile_specimen(kernel: str, dtype: torch.dtype, mirrored: bool, config: Config, note: str, target: str) -> Specimen:
    """Symmetric InfoNCE of unit rows, all but the diagonal; or NT-Xent with ids."""
    pointer, name = _TYPES[dtype], str(dtype).removeprefix("torch.")
    m, n, k, pieces = config.blocks
    constants = {
        "EVEN": True, "PRECISION": "tf32x3" if dtype == torch.float32 and target.startswith("sm") else "ieee",
        "GROUP": _GROUP, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PIECES": pieces,
        "COLUMNS": True, "DROP_DIAGONAL": True, "ROW_SCALAR": True, "COL_SCALAR": True,
        **dict.fromkeys(("NORMALIZE", "UPPER", "IDS"), mirrored),
    }  # fmt: skip
    floats = ("row_factor", "col_factor", "row_scale", "col_scale")
    counts = ("row_count", "col_count", "row_begin", "col_begin", "width", "x_stride", "y_stride")
    types = {"x": pointer, "y": pointer, "row_ids": "*i64", "col_ids": "*i64"}
    types |= dict.fromkeys(floats, "*fp32") | dict.fromkeys(counts, "i32")
    title = f"{kernel}{' mirrored' if mirrored else ''} {name}{note}"
    if kernel == "lse":
        types |= dict.fromkeys(("row_partials", "col_partials"), "*fp32")
        return Specimen(title, _lse_tile_kernel, types, constants, config, _WIDTHS, True)
    vectors = [f"{d}_{v}" for d in ("row", "col") for v in ("shift", "inverse", "upstream", "dots")] + ["magnifier"]
    types |= dict.fromkeys(vectors, "*fp32") | {"panel": pointer, "panel_stride": "i32"}
    constants |= {"ROWS": True, "DOTS": True}
    return Specimen(title, _grad_tile_kernel, types, constants, config, _WIDTHS | {"panel", "panel_stride"}, True)


def _row_specimens(dtype: torch.dtype) -> list[Specimen]:
    pointer, name = _TYPES[dtype], str(dtype).removeprefix("torch.")
    scale = {"x": pointer, "out": pointer, "factor": "*fp32"}
    scale |= dict.fromkeys(("count", "width", "x_stride", "out_stride"), "i32")
    dots = {"x": pointer, "y": pointer}
    dots |= dict.fromkeys(("count", "width", "x_stride", "y_stride"), "i32")
    dots |= dict.fromkeys(("x_inverse", "y_inverse", "out"), "*fp32")
    finish = {"x": pointer, "y": pointer, "out": pointer, "EPS": "fp32"}
    finish |= dict.fromkeys(("sums", "x_inverse", "x_factor", "y_inverse", "diagonal", "magnifier"), "*fp32")
    finish |= dict.fromkeys(("count", "width", "sums_stride", "x_stride", "y_stride", "out_stride"), "i32")
    block = _row_blocks(1024)
    flags = block | {"NORMALIZE": True, "PARTNER": True}
    config = Config((1024,))
    return [
        Specimen(f"scale rows {name}", _scale_rows_kernel, scale, block, config, _WIDTHS & scale.keys()),
        Specimen(f"row dots {name}", _row_dots_kernel, dots, block | {"NORMALIZE": True}, config, _WIDTHS),
        Specimen(f"finish {name}", _finish_kernel, finish, flags, config, _WIDTHS),
    ]
