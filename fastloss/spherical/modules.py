"""FactoredOutput: an output layer trained by exact SGD at a cost that does not know the number of classes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from fastloss._checks import (
    check_device,
    check_flag,
    check_floating,
    check_group,
    check_ids,
    check_int,
    check_number,
    check_size,
)
from fastloss._distributed import World, agree, all_sum, announced, exchange
from fastloss._ops import full_precision, once
from fastloss.spherical import dense, factored
from fastloss.spherical.distributed import facts_of
from fastloss.spherical.functional import _one_hot_mse, _Rows, _spherical, _taylor, _z, check_weights, check_z

Method = TypeVar("Method", bound=Callable[..., Any])
LossOfSums = Callable[[Tensor, Tensor, Tensor], Tensor]
EPS = {"z": 1e-12, "spherical": 1e-6, "taylor": 0.0, "mse": 0.0}
COUNTERS = ("steps", "stabilisations", "moved_directions", "inversions", "refreshes")
CHECK_EVERY = 64  # steps between two looks at U and its inverse, O(D^2) each
PROBE_EVERY = 4096  # steps between two looks at the means and the Gram, O(C D) each
INVERSE_ERROR, DRIFT = 128, 256  # in units in the last place: what is allowed
SEEN = 16  # more than this at a look at the Gram, and it is computed anew
FEW = 64  # classes whose products cost less than the calls around them
TILE = 2**22  # logits in a tile of topk


def _in_own_dtype(method: Method) -> Method:
    """Autocast would round the products of the layer's state."""

    @functools.wraps(method)
    def run(self: FactoredOutput, *args: Any, **options: Any) -> Any:
        with full_precision(self.v):
            return method(self, *args, **options)

    return cast(Method, run)


def few(classes: int, width: int) -> bool:
    """Whether a step on the weight itself costs no more products than one on its factors, or hardly any."""
    return classes <= max(FEW, 2 * width)


def _first_derivative(ctx: Any, *grads: Tensor) -> Tensor:
    """The gradient to the hidden states; to differentiate it is an error."""
    if not torch.is_grad_enabled():
        return cast(Tensor, ctx.layer._backward(ctx, *grads))
    result: Tensor = once("spherical", lambda _, *g: ctx.layer._backward(ctx, *g), *ctx.saved_tensors, *grads)
    return result


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target: Tensor, layer: FactoredOutput) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(hidden)  # which a second derivative would be of
        ctx.hidden, ctx.target = hidden.detach().contiguous(), target
        ctx.layer, ctx.revision = layer, layer._revision
        t, v, mean, ctx.entries, ctx.product = layer._form.statistics(layer._state(), ctx.hidden, target)
        return t, v, mean

    @staticmethod
    def backward(ctx: Any, g_t: Tensor, g_v: Tensor, g_mean: Tensor) -> tuple[Tensor, None, None]:
        return _first_derivative(ctx, g_t, g_v, g_mean), None, None


class _BuiltIn(torch.autograd.Function):
    """The sum of the built-in losses (B, K) times `share`; their derivatives in closed form, in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target: Tensor, share: Tensor | float, layer: FactoredOutput) -> Tensor:
        ctx.save_for_backward(hidden)  # which a second derivative would be of
        ctx.hidden, ctx.target = hidden.detach().contiguous(), target
        ctx.layer, ctx.revision = layer, layer._revision
        t, v, mean, ctx.entries, ctx.product = layer._form.statistics(layer._state(), ctx.hidden, target)
        assert isinstance(layer.loss, str)
        options = (layer.num_classes, layer.a, layer.b, layer.eps)
        loss, *ctx.g = factored.losses(t, v, mean, share, layer.loss, *options)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        return _first_derivative(ctx, *(g * upstream for g in ctx.g)), None, None, None


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
        ignore_index: int; rows whose targets are all this have loss 0 and gradient 0, and count nowhere; among several
            targets, one that is this has weight 0.
        accumulate: True lets several forward and backward passes add their gradients before a step.
        max_scale: float > 1; singular values of U beyond this or its inverse are moved into V, see Memory.
        refresh_every: int, steps between two computations of the Gram matrix anew, in O(C D^2); 0 for never.
        device, dtype: of the state; float32 or float64.
        class_group: None, or a ``torch.distributed`` process group or a mesh of one dimension, whose ranks split the
            classes as evenly as possible; see Split classes.

    Raises:
        TypeError: an argument of another type, `dtype` neither float32 nor float64.
        ValueError: a number out of its range, or not in that of `dtype`; an unknown `loss`.
        RuntimeError: a step without a gradient or with one that is not finite, a backward pass after the weight has
            changed. No error changes the state.

    Few classes:
        Up to 64, or twice the width (a bias counts as one), the state is the weight itself, and a step O(B C D): the
        factors would cost more, and lose digits. All else is the same, but that there is nothing to keep up.

    Memory:
        (C + 4 D) D numbers, and O((B K + D) D) in a step, kept from one step to the next.

    Upkeep:
        The Gram matrix is carried from step to step, and its error with it. Where the loss pushes a target's logit up
        from below the mean, U expands, the error as its square, and the weight does not: each step adds to a bound of
        that growth, in O(B D). When it has passed 256, and every 4096 steps, a read of V (:meth:`drift`) looks at the
        Gram matrix and the means; where they are off by more than 16 units in the last place, and every
        `refresh_every` steps, they are computed anew, counted in `refreshes`.
        Every 64 steps a few vectors look at U and its inverse, in O(D^2): singular values beyond `max_scale` are moved
        into V, in O(C D) for each, counted in `moved_directions` and the passes in `stabilisations` (also at once, when
        a row of a step grows that far); an inverse that is off is improved, in O(D^3), counted in `inversions`.

    Several processes:
        Each holds the whole layer. ``step(..., group=group)``, or ``FactoredSGD(..., group=group)``, gathers the hidden
        states, their products with the Gram matrix and the gradients by the statistics, (3 D + K + 2) numbers an
        example, of all ranks of the ``torch.distributed`` group, divides the gradients by the number of ranks as
        DistributedDataParallel does, and does the same step on every rank; a rank without a gradient takes part with no
        rows. With equal batches this is the step of one process with all of them. The layer has no parameters for
        DistributedDataParallel to average; give that ``broadcast_buffers=False``, or it sends V in every forward pass.

    Split classes:
        With `class_group` each rank holds V for classes of its own, in the order of the ranks, and the (D, D) matrices
        that all ranks share and keep the same by the same steps: on processors that round alike. Hidden states, targets
        (which are compared) and weights are the same on all ranks, targets and `class_weight` of all classes. A forward
        pass sums the rows of the targets over the ranks, (B, K, D) numbers; a step sends a few numbers, since ranks
        compare its options. Loss, gradient to hidden and step are those of one process. ``group=`` of a step is another
        group, of data.

    Autocast and compilation:
        In an autocast region the layer computes in its own dtype, and `hidden` has to come in it. ``torch.compile``
        breaks its graph at the layer, which looks at the targets and keeps gradients for the step, and may warn there:
        compile what is below it.

    Determinism:
        As the matrix products and solvers of PyTorch on the device; the kernels between them do not depend on the
        number of threads.

    Source:
        Vincent, de Brébisson and Bouthillier, *Efficient exact gradient update for training deep networks with very
        large sparse targets*, 2015.

    Example:
        >>> layer = fastloss.FactoredOutput(2, 3, loss="mse", bias=False)
        >>> layer = fastloss.FactoredOutput.from_linear(nn.Linear(2, 3, bias=False), loss="mse")
        >>> loss = layer(torch.eye(2), torch.tensor([0, 2]))
        >>> loss.backward()
        >>> layer.step(lr=1.0)  # one step solves this problem
        >>> layer(torch.eye(2), torch.tensor([0, 2])).item() < 1e-5
        True
    """

    v: Tensor
    u: Tensor
    delta: Tensor
    mean: Tensor
    gram: Tensor
    steps: int
    stabilisations: int
    moved_directions: int
    inversions: int
    refreshes: int

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
        ignore_index: int = -100,
        accumulate: bool = False,
        max_scale: float = 32.0,
        refresh_every: int = 20_000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        class_group: Any = None,
    ) -> None:
        super().__init__()
        name = "FactoredOutput"
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if isinstance(loss, str) and loss not in EPS:
            raise ValueError(f"{name}: `loss` must be one of {', '.join(EPS)} or a callable, got {loss!r}")
        if not isinstance(loss, str) and not callable(loss):
            raise TypeError(f"{name}: `loss` must be a string or a callable, got {type(loss).__name__}")
        for label, size in (("in_features", in_features), ("num_classes", num_classes)):
            check_int(name, label, size, least=1)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: `dtype` must be float32 or float64, got {dtype}")
        for label, flag in (("bias", bias), ("accumulate", accumulate)):
            check_flag(name, label, flag)
        max_scale = check_number(name, "max_scale", max_scale, above=1)
        check_int(name, "refresh_every", refresh_every, least=0)
        check_int(name, "ignore_index", ignore_index)
        eps = EPS.get(loss, 0.0) if eps is None and isinstance(loss, str) else 0.0 if eps is None else eps
        a, b, eps = check_z(name, a, b, eps, dtype)
        if loss == "spherical":
            check_number(name, "eps", eps, above=0, dtype=dtype)
        self.in_features, self.num_classes, self.has_bias = in_features, num_classes, bias
        self.loss, self.a, self.b, self.eps = loss, a, b, eps
        self.ignore_index = ignore_index
        self.accumulate, self.max_scale, self.refresh_every = accumulate, max_scale, refresh_every
        for counter in COUNTERS:
            setattr(self, counter, 0)
        self._revision = self._open = 0
        self._growth = 0.0  # log of the most by which an error of the Gram has grown, its square root
        self._pending: list[factored.Gradients] = []
        self._scratch = factored.Scratch()
        self._split = _even_split(name, num_classes, check_group(name, class_group))
        for rank, rows in enumerate([num_classes] if self._split is None else self._split.rows):
            # Every rank draws for all: with one seed on all of them, their rows must differ.
            drawn = torch.empty(rows, in_features + self.has_bias, device=device, dtype=dtype).uniform_(-1, 1)
            if self._split is None or rank == self._split.rank:
                weight = drawn
        self._start(weight.div_(math.sqrt(in_features)))

    def _start(self, weight: Tensor) -> None:
        with full_precision(weight):
            state = self._form.from_dense(weight, self._split)
        for name in self._numbers():
            self.register_buffer(name, getattr(state, name))

    @property
    def _form(self) -> Any:
        """The module with the state and its step."""
        return dense if few(self.num_classes, self.in_features + self.has_bias) else factored

    def _numbers(self) -> list[str]:
        """The state's tensors by name."""
        return [field.name for field in fields(self._form.State) if field.name != "split"]

    def _state(self) -> Any:
        return self._form.State(**{name: self.get_buffer(name) for name in self._numbers()}, split=self._split)

    @classmethod
    def from_linear(cls, linear: nn.Linear, loss: str | LossOfSums = "z", **options: Any) -> FactoredOutput:
        """The layer with the weight, bias, device and dtype of `linear`; other arguments as in the constructor.

        With `class_group`, `linear` has the classes of this rank, at least one.
        """
        weight = linear.weight.detach()
        has_bias = linear.bias is not None
        columns = [weight, linear.bias.detach()[:, None]] if has_bias else [weight]
        group, split = check_group("FactoredOutput", options.pop("class_group", None)), None
        if group is not None:
            split = agree("FactoredOutput", group, weight, None, {}, "auto", {"whether there is a bias": has_bias})
        classes = linear.out_features if split is None else sum(split.rows)
        if split is not None and not all(split.rows):
            raise ValueError(
                "FactoredOutput: every rank of `class_group` must have at least one class, "
                f"got {', '.join(map(str, split.rows))} (rank by rank)"
            )
        # The classes of the constructor's own weight are replaced: it need not have them all.
        layer = cls(
            linear.in_features, linear.out_features, has_bias, loss, device=weight.device, dtype=weight.dtype, **options
        )
        layer.num_classes, layer._split = classes, split
        layer._start(torch.cat(columns, 1))
        return layer

    @torch.no_grad()
    @_in_own_dtype
    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` with the implied weight and bias, with `class_group` of this rank's classes."""
        linear = nn.Linear(
            self.in_features, len(self.v), self.has_bias, device=self.v.device, dtype=self.v.dtype
        )  # fmt: skip
        weight = self._form.to_dense(self._state())
        linear.weight.copy_(weight[:, : self.in_features])
        if self.has_bias:
            linear.bias.copy_(weight[:, self.in_features])
        return linear

    @_in_own_dtype
    def weight(self) -> Tensor:
        """The implied weight (C, D); with `class_group`, this rank's rows of it, as :meth:`bias`."""
        weight: Tensor = self._form.to_dense(self._state(), slice(self.in_features))
        return weight

    @_in_own_dtype
    def bias(self) -> Tensor | None:
        """The implied bias (C,), None in a layer without."""
        return self._form.to_dense(self._state(), slice(-1, None))[:, 0] if self.has_bias else None

    def _hidden(self, name: str, hidden: Tensor) -> Tensor:
        """Checked, with a column of ones for the bias."""
        check_floating(name, "hidden", hidden, "(B, D)", 2)
        check_size(name, "hidden", hidden, 1, self.in_features, "`in_features`")
        check_device(name, "hidden", hidden, "the layer", self.v)
        self._check_dtype(name)
        if hidden.dtype != self.v.dtype:
            raise TypeError(f"{name}: `hidden` must have the layer's dtype, {self.v.dtype}, got {hidden.dtype}")
        return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1) if self.has_bias else hidden

    def _check_dtype(self, name: str) -> None:
        if self.v.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: the layer must be float32 or float64, got {self.v.dtype}")

    def _ids(self, name: str, label: str, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
        return self._in_range(name, label, check_ids(name, label, ids, shape, "the layer", self.v))

    def _in_range(self, name: str, label: str, ids: Tensor, extent: tuple[int, int] | None = None) -> Tensor:
        if ids.numel():
            low, high = extent or _extent(ids)
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"{name}: `{label}` must be in [0, {self.num_classes}), got {low} to {high}")
        return ids

    @torch.no_grad()
    @_in_own_dtype
    def logits(self, hidden: Tensor, classes: Tensor | None = None) -> Tensor:
        """Logits (B, C), or (B, N) of the classes (N,), without gradient."""
        name = "FactoredOutput.logits"
        hidden = self._hidden(name, hidden)
        if classes is None:
            if self._split is None:
                return self._logits(hidden, slice(None))
            classes = torch.arange(self.num_classes, device=self.v.device)
        if not isinstance(classes, Tensor):
            raise TypeError(f"{name}: `classes` must be an integer tensor of shape (N,), got {type(classes).__name__}")
        shape = tuple(classes.shape)[:1]
        classes = self._ids(name, "classes", classes, shape)
        if self._split is None:
            return self._logits(hidden, classes)
        mine, local = self._split.own(classes)
        return all_sum(self._split.group, self._logits(hidden, local).masked_fill_(~mine, 0))

    def _logits(self, hidden: Tensor, classes: Tensor | slice) -> Tensor:
        """Of classes of this rank."""
        logits: Tensor = self._form.logits(self._state(), hidden, classes)
        return logits

    @torch.no_grad()
    @_in_own_dtype
    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits (B, k), sorted, and their classes (B, k); at most 2^22 logits, or k a row, at a time."""
        name = "FactoredOutput.topk"
        hidden = self._hidden(name, hidden)
        check_int(name, "k", k, least=1, most=self.num_classes)
        rows = max(k, TILE // max(1, len(hidden)))
        best = hidden.new_empty(len(hidden), 0)
        index = torch.empty(best.shape, dtype=torch.int64, device=hidden.device)
        for start in range(0, len(self.v), rows):
            tile = self._logits(hidden, slice(start, start + rows))
            value, place = tile.topk(min(k, tile.shape[1]))
            best, index = torch.cat([best, value], 1), torch.cat([index, place + start], 1)
            best, place = best.topk(min(k, best.shape[1]))
            index = index.gather(1, place)
        return (best, index) if self._split is None else _topk_of_ranks(self._split, best, index, k)

    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        target_weight: Tensor | None = None,
        *,
        class_weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The (weighted) mean of the losses of the examples that are not ignored, NaN where there are none.

        Args:
            hidden: (B, D) of the layer's dtype, in an autocast region too.
            target: (B,) or (B, K) integers in [0, C), or `ignore_index`.
            target_weight: (B, K) of any floating dtype, required with targets (B, K). The loss of an example is the sum
                over k of target_weight[k] times the loss of target[k]; for "mse" it is the squared error to the vector
                with target_weight[k] added at target[k].
            class_weight: (C,), with one target an example, and
            sample_weight: (B,), factors of an example's loss, as in :func:`fastloss.z_loss`.

        Raises:
            TypeError: not tensors, not of a floating (target: integer) dtype, `hidden` not of the layer's dtype.
            ValueError: shapes or devices that do not fit, a target out of range, a callable loss that returns another
                shape.
            RuntimeError: a second forward before a step without `accumulate`.
        """
        name, training = "FactoredOutput", torch.is_grad_enabled()
        group = None if self._split is None else self._split.group
        inputs, target, ignored, target_weight, row_weight = announced(
            name, group, self._arguments, name, hidden, target, target_weight, class_weight, sample_weight
        )
        count, weighted = target.shape[1], target_weight is not None
        if self._split is not None:
            seen = target if ignored is None else target.masked_fill(ignored.reshape(target.shape), -1)
            given = {"target_weight": target_weight, "class_weight": class_weight, "sample_weight": sample_weight}
            facts = {
                "the shape of `target`": str(tuple(target.shape)),
                "grad mode": training,
                "which weights are given": {label: w is not None for label, w in given.items()},
                **facts_of(seen),
            }
            agree(name, group, self.v, None, {}, "auto", facts)
        if ignored is not None:
            ignored = ignored.reshape(len(hidden), count)
            rows = ignored.all(1)
            inputs = torch.where(rows[:, None], 0, inputs)  # NaN there must not reach a gradient through 0 * NaN
            target_weight = (
                (~ignored).to(self.v.dtype) if target_weight is None else target_weight.masked_fill(ignored, 0)
            )
            row_weight = (~rows).to(self.v.dtype) if row_weight is None else torch.where(rows, 0, row_weight)
        if training:  # the step may come after the caller has written other numbers into them
            target = target.clone()
            inputs = inputs.clone(memory_format=torch.contiguous_format) if inputs is hidden else inputs
            inputs = inputs if inputs.requires_grad else inputs.detach().requires_grad_()
        weights = [w for w in (target_weight, row_weight) if w is not None]
        with full_precision(inputs):
            if self._has_closed_form(weighted) and not any(w.requires_grad for w in weights):
                share = self._share(len(hidden), target_weight, row_weight)
                loss: Tensor = _BuiltIn.apply(inputs, target, share, self)  # type: ignore[no-untyped-call]
                loss = loss if len(hidden) and row_weight is None else _nan_if_none(loss, row_weight)
            else:
                t, v, mean = _Statistics.apply(inputs, target, self)  # type: ignore[no-untyped-call]
                if ignored is None:
                    losses = self._loss(t, v[:, None], mean[:, None], target, target_weight)
                else:  # at the zeros of ignored rows it may have no derivative
                    left = ~rows
                    of_targets = None if target_weight is None else target_weight[left]
                    some = self._loss(t[left], v[left, None], mean[left, None], target[left], of_targets)
                    losses = some.new_zeros(len(rows)).masked_scatter(left, some)
                loss = losses.mean() if row_weight is None else (losses * row_weight).sum() / row_weight.sum()
        self._open += training
        return loss

    def _arguments(
        self, name: str, hidden: Tensor, target: Tensor, target_weight: Tensor | None, class_weight: Tensor | None,
        sample_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Checked: hidden, targets (B, K), which of them are ignored, weights of targets and of rows."""
        inputs = self._hidden(name, hidden)
        several = isinstance(target, Tensor) and target.dim() == 2
        count = target.shape[1] if several else 1
        shape = (len(hidden), count) if several else (len(hidden),)
        target, ignored = self._targets(name, target, shape)
        target = target.reshape(len(hidden), count)
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
        row_weight = self._row_weight(name, target, count, class_weight, sample_weight)
        if torch.is_grad_enabled() and self._open and not self.accumulate:
            raise RuntimeError(
                f"{name}: second forward before a step; step() or zero_grad() comes between two, "
                "accumulate=True adds their gradients, torch.no_grad() keeps none"
            )
        return inputs, target, ignored, target_weight, row_weight

    def _targets(self, name: str, target: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Checked, with class 0 for ignored ones; and where these are, None for nowhere."""
        target = check_ids(name, "target", target, shape, "the layer", self.v)
        if not target.numel():
            return target, None
        low, high = extent = _extent(target)  # which mostly tells that none is ignored: the device is read once
        if not (low <= self.ignore_index <= high and bool((target == self.ignore_index).any())):
            return self._in_range(name, "target", target, extent), None
        ignored = target == self.ignore_index
        return self._in_range(name, "target", target.masked_fill(ignored, 0)), ignored

    def _row_weight(
        self, name: str, target: Tensor, count: int, class_weight: Tensor | None, sample_weight: Tensor | None
    ) -> Tensor | None:
        if class_weight is not None and count != 1:
            raise ValueError(f"{name}: `class_weight` must be None with several targets an example (use target_weight)")
        check_weights(name, class_weight, sample_weight, self.num_classes, "the layer", target)
        weight = None if sample_weight is None else sample_weight.to(self.v.dtype)
        if class_weight is not None:
            of_class = class_weight[target[:, 0]].to(self.v.dtype)
            weight = of_class if weight is None else weight * of_class
        return weight

    def _share(self, rows: int, target_weight: Tensor | None, row_weight: Tensor | None) -> Tensor | float:
        """What each loss (B, K) counts in the mean."""
        if row_weight is None:
            share: Tensor | float = 1 / max(rows, 1)
        else:
            share = (row_weight / row_weight.sum())[:, None].masked_fill(row_weight[:, None] == 0, 0)
        return share if target_weight is None else share * target_weight

    def _has_closed_form(self, weighted: bool) -> bool:
        """With weights of targets, "mse" is one loss of an example, no sum over its targets."""
        return isinstance(self.loss, str) and (self.loss != "mse" or not weighted)

    @_in_own_dtype
    def _backward(self, ctx: Any, g_t: Tensor, g_v: Tensor, g_mean: Tensor) -> Tensor:
        """The gradient to hidden; that of the weight is kept for the step."""
        if self._revision != ctx.revision:
            raise RuntimeError("FactoredOutput: backward of a forward that came before the last change of the weight")
        rows, gradient = factored.gradient(self.mean, ctx.entries, ctx.product, g_t, g_v, g_mean)
        g_t, g_v, g_mean = (x.contiguous() for x in (g_t, g_v, g_mean))
        self._pending.append(factored.Gradients(ctx.hidden, ctx.target, g_t, g_v, g_mean, rows, ctx.product))
        return gradient

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

    def _plan(self, lr: float, weight_decay: float, group: Any) -> dense.Plan | factored.Plan | None:
        """The step with the gradients of all ranks, None where nobody has one. Nothing is written."""
        name = "FactoredOutput.step"
        split = None if self._split is None else self._split.group
        # Whoever waits for this rank hears of an error: the ranks with other data, then those with the other classes.
        grads = announced(name, split, self._of_all_data, name, lr, weight_decay, group)
        lr, weight_decay = float(lr), float(weight_decay)
        if split is not None:
            count = 0 if grads is None else len(grads.hidden)
            facts = {"`lr`": lr, "`weight_decay`": weight_decay, "the number of examples with a gradient": count}
            agree(name, split, self.v, None, {}, "auto", facts)
        if grads is None:
            return None
        try:
            with full_precision(self.v):
                plan: dense.Plan | factored.Plan = self._form.plan(
                    self._state(), grads, lr, weight_decay, self.max_scale, self._scratch
                )
                return plan
        except OverflowError:
            parts = (grads.hidden, grads.g_t, grads.g_v, grads.g_mean)
            if all(bool(part.isfinite().all()) for part in parts):
                raise RuntimeError(f"{name}: the step is not finite; zero_grad() discards it") from None
            raise RuntimeError(f"{name}: the gradient is not finite; zero_grad() discards it") from None

    def _of_all_data(self, name: str, lr: float, weight_decay: float, group: Any) -> factored.Gradients | None:
        """The gradients of this rank or, of a group, all its ranks."""
        grads = announced(name, group, self._of_this_rank, name, lr, weight_decay)
        return grads if group is None else _gathered(grads, self.v, (lr, weight_decay), group)

    def _of_this_rank(self, name: str, lr: float, weight_decay: float) -> factored.Gradients | None:
        check_number(name, "lr", lr, least=0)
        check_number(name, "weight_decay", weight_decay, least=0)
        self._check_dtype(name)
        for part in self._pending:
            if part.hidden.dtype != self.v.dtype or part.hidden.device != self.v.device:
                raise RuntimeError(f"{name}: the layer's dtype or device has changed since the backward pass")
        return _joined(self._pending) if self._pending else None

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float = 0.0, *, group: Any = None) -> None:
        """The SGD step on weight and bias with the gradients since the last step; with `group`, of all its ranks."""
        plan = self._plan(lr, weight_decay, check_group("FactoredOutput.step", group))
        if plan is None:
            raise RuntimeError("FactoredOutput.step: no gradient; call forward and backward first")
        self._commit(plan)

    @torch.no_grad()
    def _commit(self, plan: dense.Plan | factored.Plan) -> None:
        with full_precision(self.v):
            self._count(self._form.commit(plan))
            self._revision += 1
            self._pending, self._open = [], 0
            self.steps += 1
            if self._form is factored:
                self._growth += plan.growth
                self._maintain()

    def _maintain(self) -> None:
        """The looks and refreshments that are due after a step."""
        eps = torch.finfo(self.v.dtype).eps
        if self.steps % CHECK_EVERY == 0:
            scale, error = factored.watch(self._state())
            if not scale <= self.max_scale:
                self.stabilise()
            elif not error <= INVERSE_ERROR * eps:
                factored.invert(self._state(), error)
                self.inversions += 1
        if self.refresh_every and self.steps % self.refresh_every == 0:
            self.refresh()
        elif self.steps % PROBE_EVERY == 0 or not 2 * self._growth <= math.log(DRIFT):
            seen = self.drift() / eps
            if not seen <= SEEN:
                self.refresh()
            else:
                self._growth = math.log(max(1.0, seen)) / 2

    def _count(self, moved: int) -> None:
        self.moved_directions += moved
        self.stabilisations += moved > 0

    @torch.no_grad()
    @_in_own_dtype
    def stabilise(self) -> int:
        """Moves the singular values of U beyond `max_scale` or its inverse into V; how many. The weight stays."""
        moved: int = self._form.stabilise(self._state(), self.max_scale)
        self._revision += 1
        self._count(moved)
        return moved

    stabilize = stabilise

    @torch.no_grad()
    @_in_own_dtype
    def drift(self) -> float:
        """The relative error of the kept Gram matrix and means, from eight random vectors; one read of V, O(C D)."""
        error: float = self._form.drift(self._state())
        return error

    @torch.no_grad()
    @_in_own_dtype
    def refresh(self) -> None:
        """Computes the Gram matrix, the means and the inverse of U anew, in O(C D^2). The weight stays."""
        self._form.refresh(self._state())
        self._growth = 0.0
        self._revision += 1
        self.refreshes += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discards the gradients since the last step; to be called here, a parent's does not reach the layer."""
        super().zero_grad(set_to_none)
        self._pending, self._open = [], 0

    def get_extra_state(self) -> Tensor:
        numbers = [*(getattr(self, name) for name in COUNTERS), self._growth]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        *counts, self._growth = state.tolist()
        for name, value in zip(COUNTERS, counts, strict=True):
            setattr(self, name, int(value))
        self.zero_grad()
        self._revision += 1

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        for name in self._numbers():  # with assign=True they are whatever the dict has; the kernels know no strides
            setattr(self, name, self.get_buffer(name).contiguous())

    def __getstate__(self) -> dict[str, Any]:
        # a copy starts without gradients
        return {**self.__dict__, "_pending": [], "_open": 0, "_scratch": factored.Scratch()}

    def extra_repr(self) -> str:
        loss = repr(self.loss) if isinstance(self.loss, str) else getattr(self.loss, "__name__", "callable")
        return f"{self.in_features}, {self.num_classes}, bias={self.has_bias}, loss={loss}"


def _even_split(name: str, classes: int, group: Any) -> World | None:
    """Classes that follow each other, as evenly as possible; None for one rank."""
    size = 1 if group is None else distributed.get_world_size(group)
    if size == 1:
        return None
    if classes < size:
        raise ValueError(f"{name}: `num_classes` must be at least {size}, the ranks of `class_group`, got {classes}")
    rows = tuple(classes // size + (rank < classes % size) for rank in range(size))
    return World(group, distributed.get_rank(group), size, rows, "auto", 0, False)


def _topk_of_ranks(split: World, best: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best of what is the best of each rank's classes."""
    missing = (0, k - best.shape[1])
    index = index + sum(split.rows[: split.rank])
    mine = torch.stack((F.pad(best, missing, value=-math.inf).double(), F.pad(index, missing).double()))
    shown = [torch.empty_like(mine) for _ in range(split.size)]
    distributed.all_gather(shown, mine, group=split.group)
    values, places = torch.cat(shown, 2)
    values, chosen = values.topk(k)
    return values.to(best.dtype), places.gather(1, chosen).to(index.dtype)


def _extent(ids: Tensor) -> tuple[int, int]:
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    return low, high


def _nan_if_none(loss: Tensor, row_weight: Tensor | None) -> Tensor:
    """NaN, as any mean of nothing, where no row counts."""
    return loss / 0 if row_weight is None else loss + 0 * (1 / row_weight.sum())


def _joined(parts: list[factored.Gradients]) -> factored.Gradients:
    if len(parts) == 1:
        return parts[0]
    most = max(part.target.shape[1] for part in parts)
    padded = [_padded(part, most) for part in parts]
    return factored.Gradients(
        *(torch.cat(columns) for columns in zip(*(vars(p).values() for p in padded), strict=True))
    )


def _padded(part: factored.Gradients, targets: int) -> factored.Gradients:
    """With this many targets: those that are missing are class 0 with gradient 0."""
    missing = targets - part.target.shape[1]
    if missing == 0:
        return part
    return replace(part, target=F.pad(part.target, (0, missing)), g_t=F.pad(part.g_t, (0, missing)))


def _gathered(
    grads: factored.Gradients | None, like: Tensor, options: tuple[float, float], group: Any
) -> factored.Gradients | None:
    """The gradients of all ranks, averaged as DistributedDataParallel does, in the order of the ranks."""
    name = "FactoredOutput.step"
    world = distributed.get_world_size(group)
    width = like.shape[1]
    if grads is None:
        empty = like.new_empty(0, width)
        grads = factored.Gradients(
            empty, torch.empty(0, 1, dtype=torch.int64, device=like.device), like.new_empty(0, 1),
            like.new_empty(0), like.new_empty(0), empty, empty,
        )  # fmt: skip
    table = exchange(name, group, [*grads.target.shape, *options])
    shown = [numbers[2:] for numbers in table]
    if any(numbers != shown[0] for numbers in shown):
        raise ValueError(f"{name}: `lr` and `weight_decay` must be the same on all ranks, got {shown}")
    counts, most = [int(numbers[0]) for numbers in table], int(max(numbers[1] for numbers in table))
    if not sum(counts):
        return None
    grads = _padded(grads, most)
    rows = max(counts)
    numbers = torch.cat(
        [grads.hidden, grads.rows, grads.product, grads.g_v[:, None], grads.g_mean[:, None], grads.g_t], 1
    )
    parts: list[Tensor] = []
    for packed in (numbers, grads.target):
        mine = F.pad(packed, (0, 0, 0, rows - len(packed))).contiguous()
        others = [torch.empty_like(mine) for _ in range(world)]
        distributed.all_gather(others, mine, group=group)
        parts.append(torch.cat([other[:count] for other, count in zip(others, counts, strict=True)]))
    hidden, entries, product, g_v, g_mean, g_t = torch.split(parts[0], [width, width, width, 1, 1, most], 1)
    share = 1 / world
    return factored.Gradients(
        hidden.contiguous(),
        parts[1],
        (g_t * share).contiguous(),
        (g_v[:, 0] * share).contiguous(),
        (g_mean[:, 0] * share).contiguous(),
        (entries * share).contiguous(),
        product.contiguous(),
    )


class FactoredSGD(torch.optim.Optimizer):
    r"""SGD for layers of :class:`fastloss.FactoredOutput`, to be used beside the optimizer of the other parameters.

    .. math::
        W \leftarrow W - \eta \Bigl(\frac{\partial L}{\partial W} + \lambda W\Bigr)

    Args:
        layers: a FactoredOutput, or an iterable of them or of dicts with the key "layer" and options of their own.
            Each layer is a parameter group, `add_param_group` adds one; learning-rate schedulers work as with any
            optimizer.
        lr: float >= 0.
        weight_decay: float >= 0.
        group: a ``torch.distributed`` process group or a mesh of one dimension, see :class:`fastloss.FactoredOutput`.

    Raises:
        TypeError: a layer of another class.
        ValueError: no layers, one layer twice, a number out of its range.
        RuntimeError: a gradient or a step that is not finite; no layer has changed then. A step by a
            ``torch.amp.GradScaler``.

    Gradient scaling:
        A scaler finds no gradients to unscale here, and the layer, which is not in 16 bits, needs none of its scale:
        scale what leaves the layer, ``hidden.register_hook(scaler.scale)``, instead of the loss. Then ``step()`` of
        this optimizer and ``scaler.step`` of that of the 16-bit layers have the gradients they should have.

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
        *,
        group: Any = None,
    ) -> None:
        self._group = check_group("FactoredSGD", group)
        self._layers: list[FactoredOutput] = []
        if not isinstance(layers, (nn.Module, Iterable)):
            raise TypeError(f"FactoredSGD: `layers` must be a FactoredOutput or several, got {type(layers).__name__}")
        items = [layers] if isinstance(layers, nn.Module) else list(layers)
        if not items:
            raise ValueError(
                "FactoredSGD: `layers` must hold at least one FactoredOutput (the layer, which has no parameters), "
                "got none"
            )
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__([item if isinstance(item, dict) else {"layer": item} for item in items], defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One more layer: {"layer": layer}, with options of its own."""
        name = "FactoredSGD"
        if not isinstance(param_group, dict) or "layer" not in param_group:
            got = f"the keys {', '.join(param_group)}" if isinstance(param_group, dict) else type(param_group).__name__
            raise TypeError(f"{name}: a parameter group must be a dict with the key 'layer', got {got}")
        options = dict(param_group)
        layer = options.pop("layer")
        if not isinstance(layer, FactoredOutput):
            raise TypeError(f"{name}: `layers` must hold FactoredOutput, got {type(layer).__name__}")
        for label, value in {**self.defaults, **options}.items():
            if label not in self.defaults:
                raise ValueError(f"{name}: options of a layer must be lr or weight_decay, got {label!r}")
            options[label] = check_number(name, label, value, least=0)
        if any(layer is other for other in self._layers):
            raise ValueError(f"{name}: `layers` must hold each layer once, got one twice")
        # No parameter is trained here; a small tensor of the layer stands for it in the group.
        super().add_param_group({"params": [layer.mean], **options})
        self._layers.append(layer)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_layers": self._layers, "_group": self._group}

    @property
    def _step_supports_amp_scaling(self) -> bool:  # a GradScaler asks before a step
        raise RuntimeError(
            "FactoredSGD: a GradScaler cannot unscale the gradients of a FactoredOutput; scale those that leave the "
            "layer, hidden.register_hook(scaler.scale), instead of the loss, and call step() of this optimizer"
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every layer that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        todo = []
        for layer, group in zip(self._layers, self.param_groups, strict=True):
            lr, decay = float(group["lr"]), float(group["weight_decay"])
            if layer._pending or self._group is not None or layer._split is not None:  # for other ranks to see
                plan = layer._plan(lr, decay, self._group)
                if plan is not None:
                    todo.append((layer, plan))
        for layer, plan in todo:
            layer._commit(plan)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discards the gradients of the layers."""
        for layer in self._layers:
            layer.zero_grad(set_to_none)
