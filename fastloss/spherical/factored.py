"""Exact SGD on a dense output weight held as W = V U + 1 (delta + mean)^T, at a cost that does not know the classes.

With C classes, the state is V (C, d), U (d, d), the mean row of W, delta (so that V U + 1 delta^T has zero column
means) and the centred Gram (W - 1 mean^T)^T (W - 1 mean^T). Centred statistics do not cancel when logits are shifted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 16384  # of V in a tile


@dataclass
class State:
    v: Tensor
    u: Tensor
    delta: Tensor
    mean: Tensor
    gram: Tensor


@dataclass
class Gradients:
    """Of the statistics: g_v, g_mean for each row of hidden; g_t for each pair (row of hidden, target)."""

    hidden: Tensor  # (B, d)
    owner: Tensor  # (N,) the row of hidden of each pair
    target: Tensor  # (N,)
    g_t: Tensor  # (N,)
    g_v: Tensor  # (B,)
    g_mean: Tensor  # (B,)


def from_dense(weight: Tensor) -> State:
    """State of a dense weight (C, d); costs O(C d^2), and takes `weight` over."""
    mean = weight.mean(0)
    v = weight.sub_(mean)
    rest = v.mean(0)  # the rounding of a mean that is large beside the spread
    v -= rest
    mean = mean + rest
    eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return State(v, eye, torch.zeros_like(mean), mean, v.T @ v)


def to_dense(state: State) -> Tensor:
    return state.v @ state.u + (state.delta + state.mean)


def statistics(state: State, hidden: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Target logits (B, K) less the mean logit, centred sum of squares of the logits (B,), mean logit (B,).

    And what the gradient to hidden needs again: the centred rows of W (B, K, d), and hidden times the Gram (B, d).
    """
    rows = state.v[target] @ state.u + state.delta
    product = hidden @ state.gram
    square = (product * hidden).sum(1).clamp(min=0)
    return (rows * hidden[:, None]).sum(2), square, hidden @ state.mean, rows, product


def input_gradient(state: State, rows: Tensor, product: Tensor, g_t: Tensor, g_v: Tensor, g_mean: Tensor) -> Tensor:
    """Gradient to hidden from the gradients of the three statistics."""
    return (g_t[:, :, None] * rows).sum(1) + 2 * g_v[:, None] * product + g_mean[:, None] * state.mean


def step(state: State, grads: Gradients, lr: float, decay: float, limit: float) -> tuple[State, int]:
    """The SGD step W - lr (dL/dW + decay W), and how many directions of U had to be moved into V for it.

    V is written in place: in the rows of the targets, and in all rows when a solution with U grows beyond `limit`.
    """
    classes, width = state.v.shape
    hidden = grads.hidden
    shrink = 1 - lr * decay
    scaled = (-2 * lr * grads.g_v)[:, None] * hidden
    m = None if len(hidden) < width else torch.eye(width, dtype=hidden.dtype, device=hidden.device).mul_(shrink)
    if m is not None:
        m += hidden.T @ scaled

    def times_m(x: Tensor) -> Tensor:  # M = shrink I + hidden^T scaled is symmetric, of low rank in small batches
        return torch.addmm(x, x @ hidden.T, scaled, beta=shrink) if m is None else x @ m

    seen, inverse = grads.target.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    pairs = grads.g_t[:, None] * hidden[grads.owner]
    sparse = hidden.new_zeros(len(seen), width).index_add_(0, inverse, pairs)
    average = sparse.sum(0) / classes
    u, delta = times_m(state.u), times_m(state.delta[None])[0]
    rows = state.v[seen] @ u + delta
    cross = (rows - lr / 2 * sparse).T @ sparse
    gram = times_m(times_m(state.gram).T) - lr * (cross + cross.T) - lr * lr * classes * torch.outer(average, average)
    change, growth = _solve(u, sparse)
    moved = 0
    if not growth <= limit:
        u, moved = stabilise(state.v, u, limit)
        change, _ = _solve(u, sparse)
    mean = shrink * state.mean - lr / classes * (hidden.T @ grads.g_mean)
    state.v.index_add_(0, seen, change, alpha=-lr)
    return State(state.v, u, delta + lr * average, mean, gram), moved


def _solve(u: Tensor, sparse: Tensor) -> tuple[Tensor, float]:
    """sparse U^-1, and the most that a row grew by: a lower bound of 1 / (the least singular value of U)."""
    solution, info = torch.linalg.solve_ex(u.T, sparse.T)
    change = solution.T
    size = sparse.norm(dim=1)
    growth = torch.where(size > 0, change.norm(dim=1) / size, 0)
    return change, float("inf") if int(info) else float(growth.max()) if len(growth) else 0.0


def scale_bound(u: Tensor) -> float:
    """An upper bound of max(s, 1 / s) over the singular values s of U, at most d^(1/16) times too large."""
    inverse, info = torch.linalg.inv_ex(u)
    return float("inf") if int(info) else max(_norm_bound(u), _norm_bound(inverse))


def _norm_bound(x: Tensor) -> float:
    """The 2-norm as ||(x^T x)^4||_F^(1/8)."""
    size = x.norm()
    power = x / size
    power = power.T @ power
    power = power @ power
    power = power @ power
    return float(size * power.norm() ** 0.125)


def stabilise(v: Tensor, u: Tensor, limit: float) -> tuple[Tensor, int]:
    """U with its singular values outside [1 / limit, limit] set to 1, which V takes over in place; how many."""
    left, s, right = torch.linalg.svd(u.double())
    out = (s > limit) | (s < 1 / limit)
    moved = int(out.sum())
    if moved:
        basis = left[:, out].to(v.dtype)
        change = ((s[out] - 1)[:, None] * left[:, out].T).to(v.dtype)
        for tile in torch.split(v, ROWS):
            tile += (tile @ basis) @ change
        u = ((left * torch.where(out, 1, s)) @ right).to(u.dtype)
    return u, moved


def refresh(state: State) -> State:
    """The same W with its mean, delta and Gram computed anew from V and U, in O(C d^2)."""
    mean_v = state.v.mean(0)
    gram = torch.zeros_like(state.gram)
    for tile in torch.split(state.v, ROWS):
        centred = tile - mean_v
        gram.addmm_(centred.T, centred)
    offset = mean_v @ state.u
    return State(state.v, state.u, -offset, state.mean + state.delta + offset, state.u.T @ gram @ state.u)


def logits(state: State, hidden: Tensor, classes: Tensor | slice) -> Tensor:
    return (hidden @ state.u.T) @ state.v[classes].T + (hidden @ (state.delta + state.mean))[:, None]
