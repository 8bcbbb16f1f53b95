"""The spherical ops in PyTorch, a block of rows at a time: any device, any floating dtype."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastloss.spherical import tiles
from fastloss.spherical.tiles import Rows


class _Blocks:
    def fresh(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    def moments(self, logits: Tensor, target: Tensor, out: Rows) -> None:
        c = logits.shape[1]
        rows = tiles.block_rows(c, out.high.dtype)
        for begin in range(0, len(logits), rows):
            part = slice(begin, begin + rows)
            x, t, o = logits[part], target[part].unsqueeze(1), out[part]
            wide = x.to(o.high.dtype, memory_format=torch.contiguous_format, copy=True)
            o.logit.copy_(wide.gather(1, t.clamp(min=0)).squeeze(1).masked_fill_(t.squeeze(1) < 0, 0))
            # The first mean only has to be near; what is left over is summed about it.
            pivot = wide[:, :1].clone()
            o.high.copy_((pivot + wide.sub_(pivot).mean(1, keepdim=True)).squeeze(1))
            wide.copy_(x).sub_(o.high.unsqueeze(1))
            torch.mean(wide, 1, out=o.low)
            o.centred.copy_((o.logit - o.high).sub_(o.low).masked_fill_(t.squeeze(1) < 0, 0))
            o.square.copy_(wide.square_().sum(1).sub_(o.low * o.low * c).clamp_(min=0))

    def gradient(
        self, logits: Tensor, target: Tensor, stats: Tensor, shift: Tensor, scale: Tensor, spike: Tensor, out: Tensor
    ) -> None:
        factors = torch.stack((*stats, shift, scale)).unsqueeze(2)
        untouched = ((shift == 0) & (scale == 0) & (spike == 0)).unsqueeze(1)
        rows = tiles.block_rows(logits.shape[1], stats.dtype)
        for begin in range(0, len(logits), rows):
            part = slice(begin, begin + rows)
            high, low, a, b = factors[:, part]
            t = target[part].unsqueeze(1)
            g = logits[part].to(stats.dtype, copy=True).sub_(high).sub_(low).mul_(b).add_(a)
            g.scatter_add_(1, t.clamp(min=0), spike[part].unsqueeze(1).masked_fill(t < 0, 0))
            out[part].copy_(g.masked_fill_(untouched[part], 0))


_blocks = _Blocks()
row_moments_fwd = partial(tiles.row_moments_forward, _blocks)
row_moments_bwd = partial(tiles.row_moments_backward, _blocks)
row_moments_bwd_ = partial(tiles.row_moments_backward_, _blocks)
linear_moments_fwd = tiles.linear_moments_forward
linear_moments_bwd = tiles.linear_moments_backward
