"""FactoredOutput: an output layer trained by exact SGD at a cost that does not know the number of classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fastloss.spherical import factored

LossOfSums = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target: Tensor, layer: FactoredOutput) -> tuple[Tensor, Tensor, Tensor]:
        ctx.hidden, ctx.target, ctx.layer = hidden.detach(), target, layer
        return factored.statistics(layer._state(), ctx.hidden, target)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        seen = (ctx.hidden, ctx.target, *grads)
        gradient = factored.input_gradient(ctx.layer._state(), *seen)
        ctx.layer._pending.append(seen)
        return gradient, None, None


class FactoredOutput(nn.Module):
    """Linear output layer and loss of the target logit a, the sum of squares q and the sum s of the logits.

    The mean loss over the batch is returned; `step` applies exact SGD to the implied dense weight and bias.
    "z" is log(1 + exp(1 - z)) of the standardised target logit z; "mse" sums the squared error over the classes.
    """

    def __init__(
        self, in_features: int, num_classes: int, bias: bool = True, loss: str | LossOfSums = "z",
        accumulate: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(loss, str) and loss not in ("z", "mse"):
            raise ValueError(f"FactoredOutput: loss must be 'z', 'mse' or a callable, got {loss!r}")
        self.in_features, self.num_classes, self.bias = in_features, num_classes, bias
        self.loss, self.accumulate = loss, accumulate
        self._pending: list[tuple[Tensor, ...]] = []
        self._open = 0
        weight = torch.empty(num_classes, in_features + bias).uniform_(-1, 1) / math.sqrt(in_features)
        self._start(weight)

    def _start(self, weight: Tensor) -> None:
        for name, value in vars(factored.from_dense(weight)).items():
            self.register_buffer(name, value)

    def _state(self) -> factored.State:
        return factored.State(*(self.get_buffer(n) for n in ("v", "u", "delta", "mean", "gram")))

    @classmethod
    def from_linear(cls, linear: nn.Linear, loss: str | LossOfSums = "z", accumulate: bool = False) -> FactoredOutput:
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, loss, accumulate)
        weight = linear.weight.detach()
        layer._start(weight.clone() if linear.bias is None else torch.cat([weight, linear.bias.detach()[:, None]], 1))
        return layer

    def weight(self) -> Tensor:
        """The implied dense weight (num_classes, in_features), with the bias as a last column if there is one."""
        return factored.to_dense(self._state())

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        if hidden.ndim != 2 or hidden.shape[1] != self.in_features:
            raise ValueError(f"FactoredOutput: hidden must be (B, {self.in_features}), got {tuple(hidden.shape)}")
        if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
            raise ValueError(f"FactoredOutput: target must be int64 (B,), got {target.dtype} {tuple(target.shape)}")
        if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < self.num_classes:
            raise ValueError(f"FactoredOutput: target must be in [0, {self.num_classes}), got a class outside")
        if torch.is_grad_enabled() and self._open and not self.accumulate:
            raise RuntimeError("FactoredOutput: second forward before a step; pass accumulate=True to add gradients")
        if not hidden.requires_grad and torch.is_grad_enabled():
            hidden = hidden.detach().requires_grad_()
        if self.bias:
            hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1)
        t, v, mean = _Statistics.apply(hidden, target, self)  # type: ignore[no-untyped-call]
        classes = self.num_classes
        if self.loss == "z":
            loss = softplus(1 - t / (v / classes).sqrt())
        else:
            a, q, s = t + mean, v + classes * mean.square(), classes * mean
            loss = q - 2 * a + 1 if isinstance(self.loss, str) else self.loss(a, q, s)
        if loss.shape != target.shape:
            raise ValueError(f"FactoredOutput: loss must return {tuple(target.shape)}, got {tuple(loss.shape)}")
        self._open += torch.is_grad_enabled()
        return loss.mean()

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float = 0.0) -> None:
        if not (math.isfinite(lr) and math.isfinite(weight_decay)):
            raise ValueError(f"FactoredOutput.step: lr and weight_decay must be finite, got {lr} and {weight_decay}")
        if not self._pending:
            raise RuntimeError("FactoredOutput.step: no gradient; call forward and backward first")
        batch = [torch.cat(parts) for parts in zip(*self._pending, strict=True)]
        state = factored.step(self._state(), batch[0], batch[1], batch[2], batch[3], batch[4], lr, weight_decay)
        for name, value in vars(state).items():
            setattr(self, name, value)
        self._pending, self._open = [], 0
