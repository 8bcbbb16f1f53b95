"""The contrastive ops on the CPU core: the tile loops of `tiles.py`, epilogues from csrc/cpu/contrastive.h."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastloss._backends import native_core
from fastloss.contrastive import tiles
from fastloss.contrastive.tiles import Gradient, Mask, Softmax, Turn

_C = native_core()
_LSE_TILE = {torch.float32: _C.lse_tile_float, torch.float64: _C.lse_tile_double}
_GRAD_TILE = {torch.float32: _C.grad_tile_float, torch.float64: _C.grad_tile_double}
_TURN = {torch.float32: _C.turn_float, torch.float64: _C.turn_double}
_INVERSE_NORMS = {torch.float32: _C.inverse_norms_float, torch.float64: _C.inverse_norms_double}
_THROUGH_NORMS = {torch.float32: _C.through_norms_float, torch.float64: _C.through_norms_double}


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _mask_arguments(mask: Mask) -> tuple[int, int, int]:
    diagonal = _C.NO_DIAGONAL if mask.diagonal is None else mask.diagonal
    return diagonal, _address(mask.row_ids), _address(mask.col_ids)


def _scale(scale: Tensor) -> tuple[int, bool]:
    return scale.data_ptr(), scale.dim() == 0


def _partials(c: Tensor, per_chunk: int) -> Tensor:
    """Scratch for the column sums of each chunk of rows; bounded by the tile: cols * rows / 32 * per_chunk."""
    chunks = -(-c.shape[0] // _C.CHUNK)
    return c.new_empty((per_chunk * chunks * c.shape[1],))


class _Epilogue:
    def lse_tile(self, c: Tensor, row: Softmax, col: Softmax | None, mask: Mask) -> None:
        partials = None if col is None else _partials(c, 2)
        columns = (0, 0) if col is None else (col.max.data_ptr(), col.sum.data_ptr())
        _LSE_TILE[c.dtype](
            c.data_ptr(),
            *c.shape,
            *_scale(row.scale),
            *((0, False) if col is None else _scale(col.scale)),
            *_mask_arguments(mask),
            row.max.data_ptr(),
            row.sum.data_ptr(),
            *columns,
            _address(partials),
            torch.get_num_threads(),
        )

    def grad_tile(self, c: Tensor, out: Tensor, row: Gradient, col: Gradient | None, mask: Mask) -> None:
        partials = _partials(c, 1) if col is not None and col.dot is not None else None
        columns = (0, False, 0, 0)
        if col is not None:
            columns = (*_scale(col.scale), col.shift.data_ptr(), col.weight.data_ptr())
        _GRAD_TILE[c.dtype](
            c.data_ptr(),
            out.data_ptr(),
            *c.shape,
            *_scale(row.scale),
            row.shift.data_ptr(),
            row.weight.data_ptr(),
            *columns,
            *_mask_arguments(mask),
            _address(row.dot),
            0 if col is None else _address(col.dot),
            _address(partials),
            torch.get_num_threads(),
        )

    def turn(self, state: Softmax, scale: Tensor, diagonal: Tensor, need_dot: bool) -> Turn:
        scale = scale.contiguous()
        directions, n = state.max.shape
        shift, weight, factor, dot = scale.new_empty((4, directions, n)).unbind()
        slope, total = scale.new_empty((n,)), scale.new_empty(())
        _TURN[scale.dtype](
            state.max.data_ptr(),
            state.sum.data_ptr(),
            *_scale(scale),
            diagonal.data_ptr(),
            n,
            directions,
            shift.data_ptr(),
            weight.data_ptr(),
            factor.data_ptr(),
            slope.data_ptr(),
            total.data_ptr(),
        )
        return Turn(total, Gradient(state.scale, shift, weight, dot.zero_() if need_dot else None), factor, slope)

    def inverse_norms(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype != dtype:  # 16 bits
            return tiles.inverse_norms(x, dtype)
        out = x.new_empty(len(x))
        address, threads = out.data_ptr(), torch.get_num_threads()
        _INVERSE_NORMS[dtype](x.data_ptr(), *x.shape, x.stride(0), tiles.NORM_EPS, address, threads)
        return out

    def through_norms(self, grad: Tensor, unit: Tensor, inverse: Tensor) -> None:
        addresses = grad.data_ptr(), unit.data_ptr(), inverse.data_ptr()
        _THROUGH_NORMS[grad.dtype](*addresses, *grad.shape, tiles.NORM_EPS, torch.get_num_threads())


_epilogue = _Epilogue()
similarity_lse_fwd = partial(tiles.lse_forward, _epilogue)
similarity_lse_bwd = partial(tiles.lse_backward, _epilogue)
self_similarity_lse_fwd = partial(tiles.self_lse_forward, _epilogue)
self_similarity_lse_bwd = partial(tiles.self_lse_backward, _epilogue)
pair_nll_fwd = partial(tiles.pair_nll, _epilogue)
pair_nll_bwd = tiles.pair_nll_backward
