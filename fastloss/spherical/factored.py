"""Exact SGD on a dense output weight held as W = V U + 1 (delta + mean)^T, at a cost that does not know the classes.

With C classes, the state is V (C, d), U (d, d) and its inverse, the mean row of W, delta (so that V U + 1 delta^T has
zero column means) and the centred Gram (W - 1 mean^T)^T (W - 1 mean^T). Centred statistics do not cancel when logits
are shifted.

A step with m rows of hidden H multiplies W by M = shrink I + H^T D H, D diagonal, and adds H^T times few numbers to the
rows of the targets. In units of m d^2 multiply-adds it costs 7: one for V[target] U and one for H Gram (forward pass),
one for H U^-1, two for U M, one for M^-1 U^-1 (Woodbury, which has H U^-1 already), one for the Gram, whose change is
H^T Y + (H^T Y)^T; and about 1 more for products of (m, m) and (m, d) matrices. The floor is that of the products: the
matrices of d^2 numbers stay in the caches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastloss._backends import implementation
from fastloss._distributed import World, all_sum

ROWS = 16384  # of V in a tile
PROBES = 8  # vectors that look at U and its inverse
ROUNDS = 2  # of the power iteration of these


class OverRanks:
    """Of a state: V has the rows of this rank's classes only if they are split; all else is the same on all ranks."""

    v: Tensor
    split: World | None

    @property
    def classes(self) -> int:
        return len(self.v) if self.split is None else sum(self.split.rows)

    def all(self, x: Tensor) -> Tensor:
        """The sum over all classes of what is x for those of V."""
        return x if self.split is None else all_sum(self.split.group, x)

    def seen(self, target: Tensor) -> Tensor:
        """The rows of V of these classes, on every rank."""
        if self.split is None:
            return self.v.index_select(0, target)
        mine, local = self.split.own(target)
        return self.all(self.v.index_select(0, local).masked_fill_(~mine[:, None], 0))


@dataclass
class State(OverRanks):
    v: Tensor
    u: Tensor
    inverse: Tensor
    delta: Tensor
    mean: Tensor
    gram: Tensor
    split: World | None = None


@dataclass
class Gradients:
    """By the statistics: g_v, g_mean for each row of hidden; g_t for each of its targets. And what the forward had."""

    hidden: Tensor  # (B, d)
    target: Tensor  # (B, K)
    g_t: Tensor  # (B, K)
    g_v: Tensor  # (B,)
    g_mean: Tensor  # (B,)
    rows: Tensor  # (B, d) the centred rows of W at the targets, summed with g_t
    product: Tensor  # (B, d) hidden times the Gram


def from_dense(weight: Tensor, split: World | None = None) -> State:
    """State of a dense weight (C, d), or of this rank's rows of it; costs O(C d^2), and takes `weight` over."""
    eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    zero = weight.new_zeros(weight.shape[1])
    state = State(weight, eye, eye.clone(), zero, zero.clone(), torch.zeros_like(eye), split)
    for _ in range(2):  # the second takes the rounding of a mean that is large beside the spread
        mean = state.all(weight.sum(0)) / state.classes
        weight -= mean
        state.mean += mean
    state.gram += state.all(weight.T @ weight)
    return state


def to_dense(state: State, columns: slice = slice(None)) -> Tensor:
    return torch.addmm((state.delta + state.mean)[columns], state.v, state.u[:, columns])


def _kernels(x: Tensor) -> Any:
    return implementation("spherical", x.device)


def statistics(state: State, hidden: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Target logits (B, K) less the mean logit, centred sum of squares of the logits (B,), mean logit (B,).

    And what the gradient to hidden needs again: the centred rows of W (B, K, d), and hidden times the Gram (B, d).
    """
    rows = torch.addmm(state.delta, state.seen(target.flatten()), state.u).view(*target.shape, len(state.u))
    product = hidden @ state.gram
    return *_kernels(hidden).factored_statistics(rows, product, hidden, state.mean), rows, product


def losses(t: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """See `portable.factored_losses`."""
    found: tuple[Tensor, ...] = implementation("spherical", t.device).factored_losses(t, *arguments)
    return found


def gradient(
    mean: Tensor, rows: Tensor, product: Tensor, g_t: Tensor, g_v: Tensor, g_mean: Tensor
) -> tuple[Tensor, Tensor]:
    """The rows of the targets summed with g_t, and the gradient to hidden, from the gradients of the statistics."""
    weighted, result = _kernels(rows).factored_gradient(rows, product, mean, g_t, g_v, g_mean)
    return weighted, result


class Scratch:
    """Memory for the intermediate results of a step, kept from one to the next: new pages cost as much as the sums."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        count = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.numel() < count or kept.dtype != like.dtype or kept.device != like.device:
            kept = self._kept[name] = like.new_empty(count)
        return kept[:count].view(shape)


@dataclass
class Plan:
    """A step that has been computed and not written."""

    state: State
    grads: Gradients
    lr: float
    shrink: float
    change: Tensor  # half of that of the Gram, see `plan`
    scaled: Tensor  # D H
    solution: Tensor  # H U^-1 after the step
    u_change: Tensor  # U H^T; all of the new U in large batches
    inverse: Tensor | None  # in large batches
    limit: float
    tame: bool  # no row of H U^-1 grew beyond the limit
    growth: float  # see `_growth`


def plan(state: State, grads: Gradients, lr: float, decay: float, limit: float, scratch: Scratch) -> Plan:
    """The SGD step W - lr (dL/dW + decay W); raises OverflowError when it is not finite.

    `limit`: of the singular values of U.
    """
    kernels = _kernels(grads.hidden)
    hidden, shrink = grads.hidden, 1 - lr * decay
    n, width = hidden.shape

    def take(name: str, *shape: int) -> Tensor:
        return scratch.take(name, state.u, *shape)

    # The Gram of Wc M - lr (I - 1 1^T / C) S, with S the sparse gradient, whose row of class c is the sum of g_t h over
    # the targets c. All terms of the change are of the form H^T Y + Y^T H.
    scaled, half, full = take("scaled", n, width), take("half", n, width), take("full", n, width)
    kernels.factored_factors(hidden, grads.product, grads.rows, grads.g_v, lr, shrink, (scaled, half, full))
    small = torch.mm(half, hidden.T, out=take("small", n, n))
    kernels.factored_pairs(small, grads.target, grads.g_t, grads.g_v, lr, state.classes)
    full.addmm_(small, hidden)
    change = torch.mm(hidden.T, full, out=take("change", width, width))

    inverse = None
    if n < width:
        factor, exists = kernels.factored_inverse(
            torch.mm(hidden, hidden.T, out=take("small", n, n)), grads.g_v, lr, shrink
        )
        solution = torch.mm(hidden, state.inverse, out=half)
        solution = torch.mm(factor, solution, out=take("solution", n, width))
        u_change = torch.mm(state.u, hidden.T, out=take("u", width, n))
    else:
        m = hidden.T @ scaled
        m.diagonal().add_(shrink)
        inverse, info = torch.linalg.solve_ex(m, state.inverse)
        exists = info == 0
        solution = hidden @ inverse
        u_change = state.u @ m
    verdict = kernels.factored_verdict(full, grads.g_mean, lr, exists, solution, hidden, scaled)
    if not verdict.finite:
        raise OverflowError
    tame = shrink != 0 and verdict.growth <= limit  # false for NaN
    if not tame and not bool((u_change.sum() + scaled.sum()).isfinite()):
        raise OverflowError
    growth = _growth(verdict.shares, shrink)
    return Plan(state, grads, lr, shrink, change, scaled, solution, u_change, inverse, limit, tame, growth)


def _growth(shares: Tensor, shrink: float) -> float:
    """Log of a bound of |M / shrink|, by which a step makes an error of the Gram grow, twice, beside the Gram.

    An error E becomes M E M, however small the weight is kept by the gradient's sparse part. The bound is the trace of
    what expands. Of what is taken past zero it is the largest row alone: where many rows together do that, the weight
    itself grows in step.
    """
    if shrink == 0 or not len(shares):
        return 0.0
    share = shares.double() / shrink
    return math.log(max(1.0, 1 + float(share.clamp(min=0).sum()), -1 - float(share.amin())))


def commit(plan: Plan) -> int:
    """Writes the step; how many directions of U had to be moved into V for it.

    V is written in the rows of the targets, and in all rows when a row of H U^-1 grew beyond the plan's limit.
    """
    state, grads, scaled, solution, shrink = plan.state, plan.grads, plan.scaled, plan.solution, plan.shrink
    hidden, share = grads.hidden, plan.lr / state.classes
    kernels = _kernels(hidden)
    if len(hidden) < len(state.u):
        state.u.addmm_(plan.u_change, scaled, beta=shrink)
        if plan.tame:
            state.inverse.addmm_(scaled.T, solution, beta=1 / shrink, alpha=-1 / shrink)
    else:
        state.u.copy_(plan.u_change)
        if plan.tame:
            assert plan.inverse is not None
            state.inverse.copy_(plan.inverse)
    moved = 0
    if not plan.tame:
        moved = stabilise(state, plan.limit)
        solution = hidden @ state.inverse
    kernels.symmetric_update(state.gram, plan.change, shrink * shrink)
    target, g_t = grads.target, grads.g_t
    if state.split is not None:
        mine, target = state.split.own(target)
        g_t = torch.where(mine, g_t, 0)
    kernels.factored_scatter(state.v, target, g_t, solution, plan.lr)
    delta = torch.addmv(state.delta, scaled.T, hidden @ state.delta, beta=shrink)
    torch.addmv(delta, hidden.T, grads.g_t.sum(1), alpha=share, out=state.delta)
    state.mean.mul_(shrink).addmv_(hidden.T, grads.g_mean, alpha=-share)
    return moved


def _probes(state: State, count: int) -> Tensor:
    """The same random vectors (d, count) on every rank and at every look."""
    width = len(state.u)
    generator = torch.Generator("cpu").manual_seed(width)
    return torch.randn(width, count, generator=generator, dtype=torch.float64, device="cpu").to(state.u)


def watch(state: State) -> tuple[float, float]:
    """An estimate of max(s, 1 / s) over the singular values s of U, and the error of its inverse, from a few vectors.

    The estimate comes from a block power iteration; it is not above the truth but for rounding, and close to it.
    """
    start = _probes(state, min(len(state.u), PROBES))
    error = torch.linalg.vector_norm(state.inverse @ (state.u @ start) - start) / torch.linalg.vector_norm(start)
    scale = 1.0
    for matrix in (state.u, state.inverse):
        block = start
        for _ in range(ROUNDS):
            block = matrix.T @ (matrix @ torch.linalg.qr(block)[0])
        scale = max(scale, float(torch.linalg.matrix_norm(matrix @ torch.linalg.qr(block)[0], 2)))
    return scale, float(error)


def invert(state: State, error: float) -> None:
    """The inverse of U anew: by one Newton step from an inverse whose `error` is small."""
    if error < 0.1:
        eye = torch.eye(len(state.u), dtype=state.u.dtype, device=state.u.device)
        state.inverse.addmm_(state.inverse.clone(), eye.addmm_(state.u, state.inverse, alpha=-1))
    else:
        state.inverse.copy_(torch.linalg.inv(state.u.double()))


def stabilise(state: State, limit: float) -> int:
    """Sets the singular values of U outside [1 / limit, limit] to 1, which V takes over; how many. In place."""
    left, s, right = torch.linalg.svd(state.u.double())
    out = (s > limit) | (s < 1 / limit)
    moved = int(out.sum())
    if moved:
        basis = left[:, out].to(state.v.dtype)
        change = ((s[out] - 1)[:, None] * left[:, out].T).to(state.v.dtype)
        for tile in torch.split(state.v, ROWS):
            tile += (tile @ basis) @ change
        s = torch.where(out, 1, s)
        state.u.copy_((left * s) @ right)
    state.inverse.copy_((right.T / s) @ left.T)
    return moved


def drift(state: State) -> float:
    """Relative error of the kept column means and Gram, from a few vectors; one read of V."""
    width = len(state.u)
    probes = _probes(state, PROBES) / width**0.5
    inner, offset = state.u @ probes, state.delta @ probes
    total = torch.zeros(PROBES, dtype=torch.float64, device=inner.device)
    product = torch.zeros(width, PROBES, dtype=torch.float64, device=inner.device)
    for tile in torch.split(state.v, ROWS):
        logits = (tile @ inner).add_(offset)
        total += logits.sum(0)
        product += tile.T @ logits
    total, product = state.all(total), state.all(product)
    exact = state.u.T.double() @ product + state.delta.double()[:, None] * total
    kept = (state.gram @ probes).double()
    size = float(torch.linalg.vector_norm(exact))
    if size == 0:
        return 0.0 if not kept.any() else float("inf")
    error = float(torch.linalg.vector_norm(kept - exact)) / size
    spread = float((probes.double() * exact).sum(0).clamp(min=0).sum())  # of the logits, as C times a square
    bias = float(total.square().sum()) / state.classes
    return max(error, (bias / spread) ** 0.5 if spread else 0.0)


def refresh(state: State) -> None:
    """Computes mean, delta, Gram and the inverse anew from V and U, in O(C d^2); W stays. In place."""
    mean_v = torch.zeros(len(state.u), dtype=torch.float64, device=state.u.device)
    for tile in torch.split(state.v, ROWS):
        mean_v += tile.sum(0)
    mean_v = (state.all(mean_v) / state.classes).to(state.v.dtype)
    gram = torch.zeros_like(state.gram, dtype=torch.float64)
    for tile in torch.split(state.v, ROWS):
        centred = tile - mean_v
        gram += centred.T @ centred
    gram = state.all(gram)
    offset = mean_v @ state.u
    u = state.u.double()
    inverse = torch.linalg.inv(u)  # may raise: nothing is written yet
    exact = u.T @ gram @ u
    state.gram.copy_((exact + exact.T) / 2)
    state.mean.add_(state.delta).add_(offset)
    state.delta.copy_(-offset)
    state.inverse.copy_(inverse)


def logits(state: State, hidden: Tensor, classes: Tensor | slice) -> Tensor:
    """Of the classes with these rows of V."""
    return (hidden @ state.u.T) @ state.v[classes].T + (hidden @ (state.delta + state.mean))[:, None]
