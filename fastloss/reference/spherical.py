"""The spherical losses as dense formulas of the logits. Arguments are documented in `fastloss.spherical.functional`.

`gradient_overwrites_logits` is about memory only and means nothing here.
"""

import torch
from torch import Tensor


def z_loss(
    logits: Tensor,
    target: Tensor,
    a: float = 1.0,
    b: float = 0.0,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
    gradient_overwrites_logits: bool = False,
) -> Tensor:
    """softplus(a (b - z)) / a of the standardised logit z of the target."""
    center = logits - logits.mean(1, keepdim=True)
    variance = center.square().mean(1)
    flat = variance == 0  # z = 0 and gradient 0
    deviation = torch.where(flat, 1.0, variance).sqrt() + eps
    z = torch.where(flat, 0.0, _entry(center, target, ignore_index) / deviation)
    loss = torch.logaddexp(torch.zeros_like(z), a * (b - z)) / a
    return _reduce(loss, target, class_weight, sample_weight, ignore_index, reduction)


def spherical_softmax_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-6,
    gradient_overwrites_logits: bool = False,
) -> Tensor:
    """-log((o_t^2 + eps) / sum_k (o_k^2 + eps))."""
    score = logits.square() + eps
    loss = score.sum(1).log() - _entry(score, target, ignore_index).log()
    return _reduce(loss, target, class_weight, sample_weight, ignore_index, reduction)


def taylor_softmax_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    gradient_overwrites_logits: bool = False,
) -> Tensor:
    """-log(f(o_t) / sum_k f(o_k)) with f(o) = 1 + o + o^2 / 2."""
    score = 1 + logits + logits.square() / 2
    loss = score.sum(1).log() - _entry(score, target, ignore_index).log()
    return _reduce(loss, target, class_weight, sample_weight, ignore_index, reduction)


def one_hot_mse_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    gradient_overwrites_logits: bool = False,
) -> Tensor:
    """sum_k (o_k - [k = t])^2."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    loss = (logits - (classes == target[:, None]).to(logits.dtype)).square().sum(1)
    return _reduce(loss, target, class_weight, sample_weight, ignore_index, reduction)


def linear_z_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    a: float = 1.0,
    b: float = 0.0,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    """`z_loss` of hidden weight^T + bias."""
    return z_loss(
        _logits(hidden, weight, bias),
        target,
        a,
        b,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        eps=eps,
    )


def linear_spherical_softmax_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-6,
) -> Tensor:
    """`spherical_softmax_loss` of hidden weight^T + bias."""
    return spherical_softmax_loss(
        _logits(hidden, weight, bias),
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        eps=eps,
    )


def linear_taylor_softmax_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`taylor_softmax_loss` of hidden weight^T + bias."""
    return taylor_softmax_loss(
        _logits(hidden, weight, bias),
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        reduction=reduction,
    )


def linear_one_hot_mse_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`one_hot_mse_loss` of hidden weight^T + bias."""
    return one_hot_mse_loss(
        _logits(hidden, weight, bias),
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        reduction=reduction,
    )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = hidden @ weight.T
    return logits if bias is None else logits + bias


def _entry(x: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """x of the target, of class 0 in ignored rows."""
    index = torch.where(target == ignore_index, 0, target)
    return x.gather(1, index[:, None]).squeeze(1)


def _reduce(
    loss: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    kept = target != ignore_index
    weight = torch.ones_like(loss) if sample_weight is None else sample_weight
    if class_weight is not None:
        weight = weight * class_weight[torch.where(kept, target, 0)]
    weight = torch.where(kept, weight, 0.0)
    loss = torch.where(kept, loss * weight, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / weight.sum()
