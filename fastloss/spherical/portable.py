"""The spherical ops in PyTorch, a block of rows at a time: any device, any floating dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
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


def factored_statistics(rows: Tensor, product: Tensor, hidden: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows . hidden (B, K), product . hidden (B,), not below 0, and hidden . mean (B,)."""
    square = torch.linalg.vecdot(product, hidden).clamp_(min=0)
    return torch.linalg.vecdot(rows, hidden[:, None]), square, hidden @ mean


def factored_losses(
    t: Tensor, v: Tensor, mean: Tensor, share: Tensor | float, kind: str, classes: int, a: float, b: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses (B, K) times `share`, and its derivatives by t (B, K), v (B,) and mean (B,)."""
    loss, *derivatives = _closed_form(t, v[:, None], mean[:, None], kind, classes, a, b, eps)
    d_t, d_v, d_mean = (share * d for d in derivatives)
    return (loss * share).sum(), d_t, d_v.expand_as(t).sum(1), d_mean.expand_as(t).sum(1)


def _closed_form(
    t: Tensor, v: Tensor, mean: Tensor, kind: str, classes: int, a: float, b: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (B, K) and their derivatives by the statistics (B, K), (B, 1), (B, 1); as `functional._z` and others."""
    if kind == "z":
        v = v.masked_fill(v.isinf(), torch.nan)
        flat = v == 0
        deviation = torch.where(flat, 1, v).div_(classes).sqrt_()
        scale = (deviation + eps).reciprocal_().masked_fill_(flat, 0)
        z = t * scale
        loss = F.softplus(b - z, beta=a, threshold=40)
        d_t = torch.sigmoid(a * (b - z)).mul_(scale).neg_()
        d_v = (d_t * z).div_(deviation * (-2 * classes))
        return loss, d_t, d_v, torch.zeros_like(mean)
    if kind == "mse":
        loss = v + classes * mean.square() - 2 * (t + mean) + 1
        return loss, torch.full_like(t, -2), torch.ones_like(v), 2 * classes * mean - 2
    # log of a total less the log of the target's share, squares of o + shift each
    shift, plus = (0.0, eps) if kind == "spherical" else (1.0, 1.0)
    center, entry = mean + shift, t + mean + shift
    total, score = v + classes * (center.square() + plus), entry.square() + plus
    d_t = -2 * entry / score
    d_v = total.reciprocal()
    return total.log() - score.log(), d_t, d_v, 2 * classes * center * d_v + d_t


def factored_gradient(
    rows: Tensor, product: Tensor, mean: Tensor, g_t: Tensor, g_v: Tensor, g_mean: Tensor
) -> tuple[Tensor, Tensor]:
    """The rows (B, K, d) summed with g_t; and that + 2 g_v product + g_mean mean."""
    weighted = torch.bmm(g_t[:, None], rows)[:, 0]
    return weighted, torch.addcmul(weighted, product, 2 * g_v[:, None]).addcmul_(g_mean[:, None], mean)


def factored_factors(
    hidden: Tensor, product: Tensor, weighted: Tensor, g_v: Tensor, lr: float, shrink: float, out: tuple[Tensor, ...]
) -> None:
    """D hidden, D product / 2 - lr weighted, shrink (D product - lr weighted) with the diagonal D = -2 lr g_v."""
    diagonal = (-2 * lr) * g_v[:, None]
    scaled, half, full = out
    torch.mul(hidden, diagonal, out=scaled)
    torch.mul(product, diagonal, out=full)
    torch.mul(full, 0.5, out=half).sub_(weighted, alpha=lr)
    full.sub_(weighted, alpha=lr).mul_(shrink)


def factored_pairs(x: Tensor, target: Tensor, g_t: Tensor, g_v: Tensor, lr: float, classes: int) -> None:
    """x = x D + lr^2/2 (S S^T as coefficients of hidden, less its mean over the classes), in place.

    The entry (i, j) of the bracket is the sum over k, l of g_ik g_jl ([target_ik = target_jl] - 1 / classes).
    """
    x.mul_(-2 * lr * g_v)
    if target.shape[1] == 1:
        same = (target == target.T) * (g_t * g_t.T)
    else:
        seen, place = target.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        table = g_t.new_zeros(len(target), len(seen)).scatter_add_(1, place, g_t)
        same = table @ table.T
    total = g_t.sum(1)
    x.add_(same, alpha=lr * lr / 2).addr_(total, total, alpha=-lr * lr / (2 * classes))


def factored_inverse(x: Tensor, g_v: Tensor, lr: float, shrink: float) -> tuple[Tensor, bool | Tensor]:
    """(shrink I + x D)^-1, and whether it exists. x is lost."""
    x.mul_(-2 * lr * g_v).diagonal().add_(shrink)
    inverse, info = torch.linalg.inv_ex(x)
    return inverse, int(info) == 0


def factored_growth(solution: Tensor, hidden: Tensor) -> float:
    """The largest |solution| / |hidden| of a row; 0 for rows of zeros, NaN or infinity where solutions are such."""
    if not len(hidden):
        return 0.0
    size = torch.linalg.vector_norm(hidden, dim=1)
    return float((torch.linalg.vector_norm(solution, dim=1) / size).masked_fill_(size == 0, 0).amax())


class Verdict(NamedTuple):
    """All that the host has to know of a step."""

    finite: bool  # the sum of full and lr g_mean
    growth: float  # `factored_growth` of the solution, infinite if it does not exist
    shares: Tensor  # (B,) scaled . hidden, on the CPU


def verdict_by(
    growth: Callable[[Tensor, Tensor], float],
    full: Tensor,
    g_mean: Tensor,
    lr: float,
    exists: bool | Tensor,
    solution: Tensor,
    hidden: Tensor,
    scaled: Tensor,
) -> Verdict:
    finite = math.isfinite(float(full.sum()) + float(g_mean.sum()) * lr)
    shares = torch.linalg.vecdot(scaled, hidden).cpu()
    return Verdict(finite, growth(solution, hidden) if finite and exists else math.inf, shares)


factored_verdict = partial(verdict_by, factored_growth)


def factored_scatter(v: Tensor, target: Tensor, g_t: Tensor, solution: Tensor, lr: float) -> None:
    """v[target] -= lr g_t solution, in place; classes may repeat."""
    pairs = (g_t[:, :, None] * solution[:, None]).flatten(0, 1)
    v.index_add_(0, target.flatten(), pairs, alpha=-lr)


def symmetric_update(matrix: Tensor, change: Tensor, scale: float) -> None:
    """matrix = scale matrix + change + change^T, in place, for a symmetric matrix."""
    matrix.mul_(scale).add_(change + change.T)


_blocks = _Blocks()
row_moments_fwd = partial(tiles.row_moments_forward, _blocks)
row_moments_bwd = partial(tiles.row_moments_backward, _blocks)
row_moments_bwd_ = partial(tiles.row_moments_backward_, _blocks)
linear_moments_fwd = tiles.linear_moments_forward
linear_moments_bwd = tiles.linear_moments_backward
