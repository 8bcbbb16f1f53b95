"""The output layer that `fastloss.FactoredOutput` stands for, with a dense weight and gradients by autograd."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class FactoredOutput(nn.Module):
    """Arguments as in `fastloss.FactoredOutput`; takes the weight and bias of `linear` over."""

    def __init__(
        self,
        linear: nn.Linear,
        loss: str | Callable[[Tensor, Tensor, Tensor], Tensor] = "z",
        a: float = 1.0,
        b: float = 0.0,
        eps: float | None = None,
    ) -> None:
        super().__init__()
        self.linear, self.loss, self.a, self.b = linear, loss, a, b
        self.eps = {"z": 1e-12, "spherical": 1e-6}.get(str(loss), 0.0) if eps is None else eps

    def forward(self, hidden: Tensor, target: Tensor, target_weight: Tensor | None = None) -> Tensor:
        logits: Tensor = self.linear(hidden)
        if target.dim() == 1:
            target = target[:, None]
        weight = torch.ones_like(target, dtype=logits.dtype) if target_weight is None else target_weight
        if self.loss == "mse":
            dense = torch.zeros_like(logits).scatter_add(1, target, weight)
            return (logits - dense).square().sum(1).mean()
        entry = logits.gather(1, target)
        loss: Tensor
        if self.loss == "z":
            center = logits - logits.mean(1, keepdim=True)
            variance = center.square().mean(1, keepdim=True)
            flat = variance == 0  # z = 0 and gradient 0
            deviation = torch.where(flat, 1.0, variance).sqrt() + self.eps
            z = torch.where(flat, 0.0, center.gather(1, target) / deviation)
            loss = torch.logaddexp(torch.zeros_like(z), self.a * (self.b - z)) / self.a
        elif self.loss == "spherical":
            score = logits.square() + self.eps
            loss = score.sum(1, keepdim=True).log() - score.gather(1, target).log()
        elif self.loss == "taylor":
            score = 1 + logits + logits.square() / 2
            loss = score.sum(1, keepdim=True).log() - score.gather(1, target).log()
        else:
            assert callable(self.loss)
            q, s = logits.square().sum(1, keepdim=True), logits.sum(1, keepdim=True)
            loss = self.loss(entry, q.expand_as(entry), s.expand_as(entry))
        return (loss * weight).sum(1).mean()
