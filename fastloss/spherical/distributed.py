"""Statistics of logits whose classes are split over the ranks of a process group.

With the mean m_r and the sum of squares v_r about it of each rank's C_r logits, those of all C are
    m = sum C_r m_r / C,    v = sum v_r + C_r (m_r - m)^2,
sums of positive terms: nothing cancels. Two all-reduces of (1 and 3 or 4) numbers a row forward, one of the gradient of
the hidden states backward. Hidden states and targets are the same on all ranks, and so is what is returned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss._distributed import Copied, World, all_sum, eager, sum_of_parts
from fastloss._ops import once
from fastloss.spherical.ops import check_classes, linear_moments

# Odd and irregular: a product with one of them, modulo 2^64, loses no bit and mixes the upper ones.
_ODD = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB)


@eager
def facts_of(target: Tensor) -> dict[str, Any]:
    """What ranks compare before any work: their targets, and a class that is not there is an error on all of them."""
    low, high = torch.aminmax(target) if target.numel() else target.new_zeros(2).unbind()
    low, high, checksum = torch.stack((low, high, _checksum(target))).tolist()
    return {"the smallest `target`": low, "the largest `target`": high, "`target` (its checksum)": checksum}


def _checksum(ids: Tensor) -> Tensor:
    """53 bits of the ids and their places, which a float64 holds; int64 wraps around."""
    places = torch.arange(ids.numel(), device=ids.device)
    mixed = ids.flatten() + places * _ODD[0]
    for odd in _ODD[1:]:
        mixed = (mixed ^ (mixed >> 32)) * odd
    return (mixed ^ (mixed >> 32)).sum() >> 11


@eager
def split_linear_moments(
    world: World,  # with the classes of the ranks as its rows
    hidden: Tensor,  # (B, D)
    weight: Tensor,  # (C_r, D)
    bias: Tensor | None,  # (C_r,)
    target: Tensor,  # (B,) int64 of `class_ids`, among the classes of all ranks
    function: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `ops.linear_moments`, of the logits of all ranks; the ranks' classes follow each other."""
    check_classes(function, target, sum(world.rows))
    mine, local = world.own(target)
    moments = linear_moments(
        Copied.apply("spherical", world.group, 1.0, hidden), weight, bias, torch.where(mine, local, -1), function
    )
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _Merged.apply(world, mine, *moments)
    return result


@eager
def split_class_weight(world: World, class_weight: Tensor, target: Tensor) -> Tensor:
    """(B,), the weights of the targets' classes; class_weight is (C_r,)."""
    mine, local = world.own(target)
    return sum_of_parts(world.group, torch.where(mine, class_weight[local], 0))


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, world: World, mine: Tensor, mean: Tensor, square: Tensor, centred: Tensor, logit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        share = world.rows[world.rank] / sum(world.rows)
        center = all_sum(world.group, mean * share)
        off = mean - center
        parts = (square + world.rows[world.rank] * off.square(), torch.where(mine, centred + off, 0), logit)
        ctx.world, ctx.share = world, share
        ctx.save_for_backward(mine, off)
        square, centred, logit = all_sum(world.group, torch.stack(parts)).unbind()
        return center, square, centred, logit

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # All ranks do the same with the merged statistics: their gradients need no sum.
        return None, None, *once("spherical", _unmerge, ctx.world, ctx.share, *grads, *ctx.saved_tensors)


def _unmerge(
    world: World, share: float, g_mean: Tensor, g_square: Tensor, g_centred: Tensor, g_logit: Tensor,
    mine: Tensor, off: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mean = (g_mean - g_centred) * share + 2 * world.rows[world.rank] * off * g_square + torch.where(mine, g_centred, 0)
    return mean, g_square, g_centred, g_logit
