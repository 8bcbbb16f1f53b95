"""The sliced ops in plain PyTorch, a block of slices at a time: any device, any floating dtype."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastloss.sliced import tiles


def _power(d: Tensor, p: float) -> Tensor:
    if p == 1:
        return d.abs()
    return d.square() if p == 2 else d.abs().pow(p)


def _slope(d: Tensor, p: float) -> Tensor:
    """Derivative of |d|^p over p."""
    if p == 1:
        return d.sign()
    return d if p == 2 else d.sign() * d.abs().pow(p - 1)


def _potential(u: Tensor, v: Tensor, ends: Tensor, other: Tensor, p: float) -> Tensor:
    """f_{i+1} - f_i = c(i+1, j) - c(i, j), j the atom of v where atom i of u ends; two such atoms where both end."""
    inner = ends[:, :-1].contiguous()
    last = v.shape[1] - 1
    total = torch.zeros_like(inner)
    for right in (False, True):
        j = torch.searchsorted(other, inner, right=right).clamp_(max=last)
        at = v.gather(1, j)
        total += (_power(u[:, 1:] - at, p) - _power(u[:, :-1] - at, p)).double()
    return torch.cat([torch.zeros_like(ends[:, :1]), total.cumsum(1) / 2], 1)


def _centred(f: Tensor, order: Tensor, weights: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor:
    f = torch.empty_like(f).scatter_(1, order, f)
    mean = f.mean(1, keepdim=True) if weights is None else (f @ weights).unsqueeze(1)
    return ((f - mean) * factor.unsqueeze(1)).to(dtype)


class Epilogue:
    block_bytes = tiles.BLOCK_BYTES

    def scratch(self, u: Tensor, v: Tensor) -> tuple[Tensor, int]:
        return u.new_empty(0), 0

    def transport(
        self,
        u: Tensor,
        v: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        p: float,
        factor: Tensor | None,
        cost: Tensor,
        scratch: tuple[Tensor, int],
        want_u: bool,
        want_v: bool,
        want_a: bool,
        want_b: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        (us, u_order), (vs, v_order) = self.ordered(u), self.ordered(v)
        broken = us[:, -1:].isnan() | vs[:, -1:].isnan()  # NaN sorts last
        f = g = None
        if a is None and b is None and u.shape[1] == v.shape[1]:
            n = u.shape[1]
            d = us - vs
            cost.copy_(_power(d, p).mean(1, dtype=torch.float64))
            if factor is not None:
                slope = _slope(d, p) * (factor * p / n).to(d.dtype).unsqueeze(1)
                if want_u:
                    u.scatter_(1, u_order, slope)
                if want_v:
                    v.scatter_(1, v_order, -slope)
        else:
            a_ends, b_ends = tiles.cumulative(a, u_order), tiles.cumulative(b, v_order)
            ends = torch.cat([a_ends, b_ends], 1).sort(dim=1)[0]
            mass = ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1])).clamp_(min=0)
            i = torch.searchsorted(a_ends, ends).clamp_(max=u.shape[1] - 1)
            j = torch.searchsorted(b_ends, ends).clamp_(max=v.shape[1] - 1)
            d = (us.gather(1, i) - vs.gather(1, j)).double()
            cost.copy_(torch.where(mass > 0, mass * _power(d, p), 0).sum(1))
            if factor is not None:
                slope = torch.where(mass > 0, mass * _slope(d, p), 0) * (factor * p).unsqueeze(1)
                for row, order, at, want, sign in ((u, u_order, i, want_u, 1), (v, v_order, j, want_v, -1)):
                    if want:
                        total = torch.zeros(row.shape, dtype=torch.float64, device=row.device)
                        row.copy_(total.scatter_add_(1, order.gather(1, at), sign * slope))
                if want_a:
                    f = _centred(_potential(us, vs, a_ends, b_ends, p), u_order, a, factor, u.dtype)
                if want_b:
                    g = _centred(_potential(vs, us, b_ends, a_ends, p), v_order, b, factor, u.dtype)
        cost.masked_fill_(broken[:, 0], torch.nan)
        if factor is not None:
            for out, want in ((u, want_u), (v, want_v), (f, want_a), (g, want_b)):
                if want and out is not None:
                    out.masked_fill_(broken, torch.nan)
        return f, g

    def ordered(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in order and where they came from, as int64; a row with NaN has one at its end."""
        return u.sort(dim=1, stable=True)

    def sort(self, u: Tensor) -> tuple[Tensor, Tensor]:
        values, order = u.sort(dim=1, stable=True)
        broken = values[:, -1:].isnan()
        identity = torch.arange(u.shape[1], device=u.device)
        return values.masked_fill_(broken, torch.nan), torch.where(broken, identity, order).int()


_epilogue = Epilogue()
sliced_mean_fwd = partial(tiles.mean_forward, _epilogue)
sliced_mean_bwd = tiles.mean_backward
sliced_costs_fwd = partial(tiles.costs_forward, _epilogue)
sliced_costs_bwd = partial(tiles.costs_backward, _epilogue)
sort_slices_fwd = partial(tiles.sort_forward, _epilogue)
sort_slices_bwd = tiles.sort_backward
