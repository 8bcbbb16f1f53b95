"""The contrastive ops in tiled PyTorch: any device, any floating dtype."""

from __future__ import annotations

import math
from functools import partial
from typing import cast

import torch
from torch import Tensor

from fastloss.contrastive import tiles
from fastloss.contrastive.tiles import Gradient, Mask, Softmax


def _left_out(c: Tensor, mask: Mask) -> Tensor | None:
    """(rows, cols) of bool, or None if the tile is whole."""
    out: Tensor | None = None
    if mask.row_ids is not None and mask.col_ids is not None:
        out = mask.row_ids.unsqueeze(1) == mask.col_ids
    if mask.diagonal is not None and -c.shape[0] < mask.diagonal < c.shape[1]:
        out = torch.zeros_like(c, dtype=torch.bool) if out is None else out
        out.diagonal(mask.diagonal).fill_(True)
    return out


def _finite_or_zero(x: Tensor) -> Tensor:
    return torch.where(x.isinf(), 0, x)


def _along(x: Tensor, dim: int) -> Tensor:
    """A vector of rows (dim = 1) or columns (0) that broadcasts over a tile; scalars do already."""
    return x.unsqueeze(dim) if x.dim() else x


def _accumulate(z: Tensor, state: Softmax, dim: int) -> None:
    """Adds the base-2 logits z, whose softmax runs over `dim`, to the online state. Overwrites z."""
    top = torch.maximum(state.max, z.amax(dim).round_())
    shift = _finite_or_zero(top)  # all left out: -inf - 0, not -inf - -inf
    z.sub_(shift.unsqueeze(dim)).exp2_()
    state.sum.mul_((state.max - shift).exp2_()).add_(z.sum(dim))
    state.max.copy_(top)


class _Epilogue:
    def lse_tile(self, c: Tensor, row: Softmax, col: Softmax | None, mask: Mask) -> None:
        if c.numel() == 0:
            return
        out = _left_out(c, mask)
        for state, dim in ((row, 1), (col, 0)):
            if state is not None:
                z = c * _along(state.scale, dim)
                _accumulate(z if out is None else z.masked_fill_(out, -math.inf), state, dim)

    def grad_tile(self, c: Tensor, out: Tensor, row: Gradient, col: Gradient | None, mask: Mask) -> None:
        left_out = _left_out(c, mask)
        total: Tensor | None = None
        for state, dim in ((row, 1), (col, 0)):
            if state is None:
                continue
            p = (c * _along(state.scale, dim)).sub_(state.shift.unsqueeze(dim)).exp2_()
            if left_out is not None:
                p.masked_fill_(left_out, 0)
            if state.dot is not None:
                state.dot.add_((p * c if left_out is None else (p * c).masked_fill_(left_out, 0)).sum(dim))
            p.mul_(state.weight.unsqueeze(dim))
            if left_out is not None:
                p.masked_fill_(left_out, 0)
            total = p if total is None else total.add_(p)
        out.copy_(cast(Tensor, total))

    turn = staticmethod(tiles.turn)
    inverse_norms = staticmethod(tiles.inverse_norms)
    through_norms = staticmethod(tiles.through_norms)


_epilogue = _Epilogue()
similarity_lse_fwd = partial(tiles.lse_forward, _epilogue)
similarity_lse_bwd = partial(tiles.lse_backward, _epilogue)
self_similarity_lse_fwd = partial(tiles.self_lse_forward, _epilogue)
self_similarity_lse_bwd = partial(tiles.self_lse_backward, _epilogue)
pair_nll_fwd = partial(tiles.pair_nll, _epilogue)
pair_nll_bwd = tiles.pair_nll_backward
