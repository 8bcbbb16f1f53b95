"""FactoredOutput: an output layer trained by exact SGD at a cost that does not know the number of classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastloss._checks import check_device, check_floating, check_ids, check_number, check_size
from fastloss.spherical import factored
from fastloss.spherical.functional import _one_hot_mse, _Rows, _spherical, _taylor, _z

LossOfSums = Callable[[Tensor, Tensor, Tensor], Tensor]
EPS = {"z": 1e-12, "spherical": 1e-6, "taylor": 0.0, "mse": 0.0}
STATE = ("v", "u", "delta", "mean", "gram")
CHECK_EVERY = 32  # steps between two looks at the singular values of U
TILE = 2**22  # logits in a tile of topk


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target: Tensor, layer: FactoredOutput) -> tuple[Tensor, Tensor, Tensor]:
        ctx.hidden, ctx.target, ctx.layer, ctx.revision = hidden.detach(), target, layer, layer._revision
        t, v, mean, ctx.rows, ctx.product = factored.statistics(layer._state(), ctx.hidden, target)
        return t, v, mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_t: Tensor, g_v: Tensor, g_mean: Tensor) -> tuple[Tensor, None, None]:
        hidden, target, layer = ctx.hidden, ctx.target, ctx.layer
        if layer._revision != ctx.revision:
            raise RuntimeError("FactoredOutput: backward of a forward that came before the last change of the weight")
        gradient = factored.input_gradient(layer._state(), ctx.rows, ctx.product, g_t, g_v, g_mean)
        owner = torch.arange(len(hidden), device=hidden.device).repeat_interleave(target.shape[1])
        layer._pending.append(factored.Gradients(hidden, owner, target.flatten(), g_t.flatten(), g_v, g_mean))
        return gradient, None, None


class FactoredOutput(nn.Module):
    r"""A linear output layer and its spherical loss, trained by exact SGD in time independent of the number of classes.

    .. math::
        W = V U + 1 \omega^\top, \qquad W \leftarrow W - \eta \Bigl(\frac{\partial L}{\partial W} + \lambda W\Bigr)

    The weight is never a parameter: `step` (or :class:`fastloss.FactoredSGD`) applies the step to the factors. Of V it
    writes the rows of the targets alone.

    Args:
        in_features: int, the width D of the hidden states.
        num_classes: int, C.
        bias: learn a bias, with the same step and weight decay as the weight.
        loss: "z", "spherical", "taylor", "mse", with the definitions of :func:`fastloss.z_loss`,
            :func:`fastloss.spherical_softmax_loss`, :func:`fastloss.taylor_softmax_loss` and
            :func:`fastloss.one_hot_mse_loss`; or a callable of the target logits (N,), the sums of the squared logits
            (N,) and the sums of the logits (N,) that gives N losses and is differentiable. The built-in losses use
            centred sums, which do not cancel where logits share an offset.
        a, b: sharpness > 0 and margin of "z".
        eps: float >= 0 of "z" and "spherical"; None is the default of the function.
        accumulate: True lets several forward and backward passes add their gradients before a step.
        max_scale: float > 1; singular values of U beyond this or its inverse are moved into V, see Memory.
        refresh_every: int, steps between two computations of the Gram matrix anew, in O(C D^2); 0 for never.
        device, dtype: of the state; float32 or float64.

    Call:
        hidden (B, D) of the layer's dtype, target (B,) or (B, K) integers in [0, C), target_weight (B, K), required
        with K targets. An example's loss is the sum over k of target_weight[k] times the loss of target[k]; for "mse"
        it is the squared error to the vector with target_weight[k] added at target[k]. Returns the mean over B.

    Raises:
        TypeError: not tensors, or of another dtype than the layer's (target: an integer dtype).
        ValueError: shapes or devices that do not fit, a target out of range, a number out of its range, a callable that
            returns another shape.
        RuntimeError: a second forward before a step without `accumulate`, a step without a gradient or with one that is
            not finite, a backward pass after the weight has changed. No error changes the state.

    Memory:
        (C + 4 D) D numbers, and O((B K + D) D) in a step. Every 32 steps, and when a row of the step grows beyond
        `max_scale`, the singular values of U are looked at; those out of range are moved into V in O(C D) for each,
        counted in `moved_directions`, and the passes over V in `stabilisations`.

    Determinism:
        As the matrix products, solver and index_add of PyTorch on the device.

    Source:
        Vincent, de Brébisson and Bouthillier, *Efficient exact gradient update for training deep networks with very
        large sparse targets*, 2015.

    Example:
        >>> layer = fastloss.FactoredOutput(2, 3, loss="mse", bias=False)
        >>> layer = fastloss.FactoredOutput.from_linear(nn.Linear(2, 3, bias=False), loss="mse")
        >>> loss = layer(torch.eye(2), torch.tensor([0, 2]))
        >>> loss.backward()
        >>> layer.step(lr=1.0)  # one step solves this problem
        >>> layer(torch.eye(2), torch.tensor([0, 2])).item() < 1e-9
        True
    """

    v: Tensor
    u: Tensor
    delta: Tensor
    mean: Tensor
    gram: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        loss: str | LossOfSums = "z",
        *,
        a: float = 1.0,
        b: float = 0.0,
        eps: float | None = None,
        accumulate: bool = False,
        max_scale: float = 32.0,
        refresh_every: int = 20_000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "FactoredOutput"
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if isinstance(loss, str) and loss not in EPS:
            raise ValueError(f"{name}: `loss` must be one of {', '.join(EPS)} or a callable, got {loss!r}")
        if not isinstance(loss, str) and not callable(loss):
            raise TypeError(f"{name}: `loss` must be a string or a callable, got {type(loss).__name__}")
        for label, size in (("in_features", in_features), ("num_classes", num_classes)):
            check_number(name, label, size, least=1)
        check_number(name, "a", a, above=0)
        check_number(name, "b", b)
        check_number(name, "max_scale", max_scale, above=1)
        check_number(name, "refresh_every", refresh_every, least=0)
        eps = EPS.get(loss, 0.0) if eps is None and isinstance(loss, str) else 0.0 if eps is None else eps
        if loss == "spherical":
            check_number(name, "eps", eps, above=0)
        check_number(name, "eps", eps, least=0)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: `dtype` must be float32 or float64, got {dtype}")
        self.in_features, self.num_classes, self.has_bias = in_features, num_classes, bool(bias)
        self.loss, self.a, self.b, self.eps = loss, a, b, eps
        self.accumulate, self.max_scale, self.refresh_every = accumulate, max_scale, refresh_every
        self.steps = self.stabilisations = self.moved_directions = 0
        self._revision = self._open = 0
        self._pending: list[factored.Gradients] = []
        weight = torch.empty(num_classes, in_features + self.has_bias, device=device, dtype=dtype)
        self._start(weight.uniform_(-1, 1).div_(math.sqrt(in_features)))

    def _start(self, weight: Tensor) -> None:
        for name, value in vars(factored.from_dense(weight)).items():
            self.register_buffer(name, value)

    def _state(self) -> factored.State:
        return factored.State(*(self.get_buffer(name) for name in STATE))

    def _write(self, state: factored.State) -> None:
        for name in STATE:
            setattr(self, name, getattr(state, name))
        self._revision += 1

    @classmethod
    def from_linear(cls, linear: nn.Linear, loss: str | LossOfSums = "z", **options: Any) -> FactoredOutput:
        """The layer with the weight, bias, device and dtype of `linear`; other arguments as in the constructor."""
        weight = linear.weight.detach()
        has_bias = linear.bias is not None
        columns = [weight, linear.bias.detach()[:, None]] if has_bias else [weight]
        layer = cls(
            linear.in_features, linear.out_features, has_bias, loss, device=weight.device, dtype=weight.dtype, **options
        )
        layer._start(torch.cat(columns, 1))
        return layer

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` with the implied weight and bias."""
        linear = nn.Linear(
            self.in_features, self.num_classes, self.has_bias, device=self.v.device, dtype=self.v.dtype
        )  # fmt: skip
        dense = factored.to_dense(self._state())
        linear.weight.copy_(dense[:, : self.in_features])
        if self.has_bias:
            linear.bias.copy_(dense[:, self.in_features])
        return linear

    def weight(self) -> Tensor:
        """The implied weight (C, D)."""
        return self.v @ self.u[:, : self.in_features] + (self.delta + self.mean)[: self.in_features]

    def bias(self) -> Tensor | None:
        """The implied bias (C,), None in a layer without."""
        return self.v @ self.u[:, -1] + (self.delta + self.mean)[-1] if self.has_bias else None

    def _hidden(self, name: str, hidden: Tensor) -> Tensor:
        """Checked, with a column of ones for the bias."""
        check_floating(name, "hidden", hidden, "(B, D)", 2)
        check_size(name, "hidden", hidden, 1, self.in_features, "`in_features`")
        check_device(name, "hidden", hidden, "the layer", self.v)
        if hidden.dtype != self.v.dtype or self.v.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name}: `hidden` must have the layer's dtype, float32 or float64, got {hidden.dtype} "
                f"with a layer in {self.v.dtype}"
            )
        return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1) if self.has_bias else hidden

    def _ids(self, name: str, label: str, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
        ids = check_ids(name, label, ids, shape, "the layer", self.v)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_classes:
            raise ValueError(
                f"{name}: `{label}` must be in [0, {self.num_classes}), got {int(ids.min())} to {int(ids.max())}"
            )
        return ids

    @torch.no_grad()
    def logits(self, hidden: Tensor, classes: Tensor | None = None) -> Tensor:
        """Logits (B, C), or (B, N) of the classes (N,), without gradient."""
        name = "FactoredOutput.logits"
        hidden = self._hidden(name, hidden)
        if classes is None:
            return factored.logits(self._state(), hidden, slice(None))
        shape = tuple(classes.shape)[:1] if isinstance(classes, Tensor) else ()
        return factored.logits(self._state(), hidden, self._ids(name, "classes", classes, shape))

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits (B, k), sorted, and their classes (B, k); at most 2^22 logits are held at a time."""
        name = "FactoredOutput.topk"
        hidden = self._hidden(name, hidden)
        check_number(name, "k", k, least=1)
        if k > self.num_classes:
            raise ValueError(f"{name}: `k` must be at most {self.num_classes}, the number of classes, got {k}")
        state, rows = self._state(), max(k, TILE // max(1, len(hidden)))
        best = hidden.new_empty(len(hidden), 0)
        index = torch.empty(best.shape, dtype=torch.int64, device=hidden.device)
        for start in range(0, self.num_classes, rows):
            tile = factored.logits(state, hidden, slice(start, start + rows))
            value, place = tile.topk(min(k, tile.shape[1]))
            best, index = torch.cat([best, value], 1), torch.cat([index, place + start], 1)
            best, place = best.topk(min(k, best.shape[1]))
            index = index.gather(1, place)
        return best, index

    def forward(self, hidden: Tensor, target: Tensor, target_weight: Tensor | None = None) -> Tensor:
        name = "FactoredOutput"
        inputs = self._hidden(name, hidden)
        several = isinstance(target, Tensor) and target.dim() == 2
        count = target.shape[1] if several else 1
        shape = (len(hidden), count) if several else (len(hidden),)
        target = self._ids(name, "target", target, shape).reshape(len(hidden), count)
        if several and target_weight is None:
            raise ValueError(f"{name}: `target_weight` must be given with target (B, K), got None")
        if target_weight is not None:
            check_floating(name, "target_weight", target_weight, "(B, K)", 2)
            if target_weight.shape != target.shape:
                raise ValueError(
                    f"{name}: `target_weight` must have shape {tuple(target.shape)}, got {tuple(target_weight.shape)}"
                )
            check_device(name, "target_weight", target_weight, "the layer", self.v)
            target_weight = target_weight.to(self.v.dtype)
        training = torch.is_grad_enabled()
        if training and self._open and not self.accumulate:
            raise RuntimeError(f"{name}: second forward before a step; pass accumulate=True to add gradients")
        if training and not inputs.requires_grad:
            inputs = inputs.detach().requires_grad_()
        with torch.autocast(inputs.device.type, enabled=False):
            t, v, mean = _Statistics.apply(inputs, target, self)  # type: ignore[no-untyped-call]
            loss = self._loss(t, v[:, None], mean[:, None], target, target_weight)
        self._open += training
        return loss.mean()

    def _loss(self, t: Tensor, v: Tensor, mean: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Losses (B,) from the statistics (B, K), (B, 1), (B, 1)."""
        rows = _Rows(self.num_classes, mean, v, t, t + mean, torch.zeros_like(target, dtype=torch.bool), None)
        if self.loss == "mse":
            if weight is None:
                return _one_hot_mse(rows).squeeze(1)
            square = v + self.num_classes * mean.square()
            same = (target[:, :, None] == target[:, None, :]).to(weight.dtype)
            norm = (weight * (same @ weight[:, :, None]).squeeze(2)).sum(1)
            return square.squeeze(1) - 2 * (weight * rows.logit).sum(1) + norm
        if self.loss == "z":
            loss = _z(rows, self.a, self.b, self.eps)
        elif self.loss == "spherical":
            loss = _spherical(rows, self.eps)
        elif self.loss == "taylor":
            loss = _taylor(rows)
        else:
            assert not isinstance(self.loss, str)
            square = (v + self.num_classes * mean.square()).expand_as(t)
            given = self.loss(rows.logit.flatten(), square.flatten(), (self.num_classes * mean).expand_as(t).flatten())
            if not isinstance(given, Tensor) or given.shape != (t.numel(),):
                got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise ValueError(f"FactoredOutput: `loss` must return a tensor of shape ({t.numel()},), got {got}")
            loss = given.reshape(t.shape)
        return (loss if weight is None else loss * weight).sum(1)

    def _check_step(self, lr: float, weight_decay: float) -> None:
        name = "FactoredOutput.step"
        check_number(name, "lr", lr)
        check_number(name, "weight_decay", weight_decay)
        if not self._pending:
            raise RuntimeError(f"{name}: no gradient; call forward and backward first")
        for grads in self._pending:
            if not all(bool(x.isfinite().all()) for x in (grads.hidden, grads.g_t, grads.g_v, grads.g_mean)):
                raise RuntimeError(f"{name}: the gradient is not finite; zero_grad() discards it")

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float = 0.0) -> None:
        """The SGD step on weight and bias with the gradients since the last step."""
        self._check_step(lr, weight_decay)
        grads = _joined(self._pending)
        with torch.autocast(self.v.device.type, enabled=False):
            state, moved = factored.step(self._state(), grads, lr, weight_decay, self.max_scale)
            self._write(state)
            self._count(moved)
            self.zero_grad()
            self.steps += 1
            if self.steps % CHECK_EVERY == 0 and factored.scale_bound(self.u) > self.max_scale:
                self.stabilise()
            if self.refresh_every and self.steps % self.refresh_every == 0:
                self.refresh()

    def _count(self, moved: int) -> None:
        self.moved_directions += moved
        self.stabilisations += moved > 0

    @torch.no_grad()
    def stabilise(self) -> int:
        """Moves the singular values of U beyond `max_scale` or its inverse into V; how many. The weight stays."""
        state = self._state()
        state.u, moved = factored.stabilise(state.v, state.u, self.max_scale)
        self._write(state)
        self._count(moved)
        return moved

    @torch.no_grad()
    def refresh(self) -> None:
        """Computes the Gram matrix and the means anew, in O(C D^2). The weight stays."""
        self._write(factored.refresh(self._state()))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discards the gradients since the last step."""
        super().zero_grad(set_to_none)
        self._pending, self._open = [], 0

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.steps, self.stabilisations, self.moved_directions])

    def set_extra_state(self, state: Tensor) -> None:
        self.steps, self.stabilisations, self.moved_directions = (int(x) for x in state)
        self._revision += 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": [], "_open": 0}  # a copy starts without gradients

    def extra_repr(self) -> str:
        loss = repr(self.loss) if isinstance(self.loss, str) else getattr(self.loss, "__name__", "callable")
        return f"{self.in_features}, {self.num_classes}, bias={self.has_bias}, loss={loss}"


def _joined(parts: list[factored.Gradients]) -> factored.Gradients:
    if len(parts) == 1:
        return parts[0]
    owners, offset = [], 0
    for part in parts:
        owners.append(part.owner + offset)
        offset += len(part.hidden)
    return factored.Gradients(
        torch.cat([p.hidden for p in parts]),
        torch.cat(owners),
        *(torch.cat([getattr(p, name) for p in parts]) for name in ("target", "g_t", "g_v", "g_mean")),
    )


class FactoredSGD(torch.optim.Optimizer):
    r"""SGD for layers of :class:`fastloss.FactoredOutput`, to be used beside the optimizer of the other parameters.

    .. math::
        W \leftarrow W - \eta \Bigl(\frac{\partial L}{\partial W} + \lambda W\Bigr)

    Args:
        layers: a FactoredOutput, or an iterable of them or of dicts with the key "layer" and options of their own.
            Each layer is a parameter group; learning-rate schedulers work as with any optimizer.
        lr: float >= 0.
        weight_decay: float >= 0.

    Raises:
        TypeError: a layer of another class.
        ValueError: no layers, a number out of its range.
        RuntimeError: a gradient that is not finite; no layer has changed then.

    Example:
        >>> layer = fastloss.FactoredOutput(4, 10)
        >>> optimizer = fastloss.FactoredSGD(layer, lr=0.1)
        >>> schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        >>> layer(torch.ones(2, 4), torch.tensor([1, 2])).backward()
        >>> optimizer.step()
        >>> schedule.step()
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """

    def __init__(
        self,
        layers: FactoredOutput | Iterable[FactoredOutput | dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        name = "FactoredSGD"
        defaults = {"lr": lr, "weight_decay": weight_decay}
        self._layers: list[FactoredOutput] = []
        groups: list[dict[str, Any]] = []
        for item in [layers] if isinstance(layers, FactoredOutput) else layers:
            options = dict(item) if isinstance(item, dict) else {"layer": item}
            layer = options.pop("layer", None)
            if not isinstance(layer, FactoredOutput):
                raise TypeError(f"{name}: `layers` must hold FactoredOutput, got {type(layer).__name__}")
            for label, value in {**defaults, **options}.items():
                if label not in defaults:
                    raise ValueError(f"{name}: options of a layer must be lr or weight_decay, got {label!r}")
                check_number(name, label, value, least=0)
            self._layers.append(layer)
            groups.append({"params": [layer.v], **options})
        if not groups:
            raise ValueError(f"{name}: `layers` must hold at least one FactoredOutput, got none")
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every layer that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        todo = []
        for layer, group in zip(self._layers, self.param_groups, strict=True):
            if layer._pending:
                lr, decay = float(group["lr"]), float(group["weight_decay"])
                layer._check_step(lr, decay)
                todo.append((layer, lr, decay))
        for layer, lr, decay in todo:
            layer.step(lr, decay)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discards the gradients of the layers."""
        for layer in self._layers:
            layer.zero_grad(set_to_none)
