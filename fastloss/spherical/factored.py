"""Exact SGD on a dense output weight held as W = V U + 1 (delta + mean)^T, at a cost that does not know the classes.

With C classes, the state is V (C, d), U (d, d), the mean row of W, delta (so that V U + 1 delta^T has zero column
means) and the centred Gram (W - 1 mean^T)^T (W - 1 mean^T). Centred statistics do not cancel when logits are shifted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class State:
    v: Tensor
    u: Tensor
    delta: Tensor
    mean: Tensor
    gram: Tensor


def from_dense(weight: Tensor) -> State:
    """State of a dense weight (C, d); the only function that costs O(C d^2)."""
    mean = weight.mean(0)
    v = weight - mean
    eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return State(v, eye, torch.zeros_like(mean), mean, v.T @ v)


def to_dense(state: State) -> Tensor:
    return state.v @ state.u + (state.delta + state.mean)


def statistics(state: State, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per example: target logit less the mean logit, centred sum of squares of the logits, mean logit."""
    rows = state.v[target] @ state.u + state.delta
    return (rows * hidden).sum(1), ((hidden @ state.gram) * hidden).sum(1), hidden @ state.mean


def input_gradient(state: State, hidden: Tensor, target: Tensor, g_t: Tensor, g_v: Tensor, g_mean: Tensor) -> Tensor:
    """Gradient to hidden from the gradients of the three statistics."""
    rows = state.v[target] @ state.u + state.delta
    return g_t[:, None] * rows + 2 * g_v[:, None] * (hidden @ state.gram) + g_mean[:, None] * state.mean


def step(
    state: State, hidden: Tensor, target: Tensor, g_t: Tensor, g_v: Tensor, g_mean: Tensor, lr: float, decay: float
) -> State:
    """The SGD step W - lr (dL/dW + decay W); V is written in place, only in the rows of `target`."""
    classes = state.v.shape[0]
    rows = state.v[target] @ state.u + state.delta
    shrink = 1 - lr * decay
    m = -lr * (hidden.T @ (2 * g_v[:, None] * hidden))
    m.diagonal().add_(shrink)
    seen, inverse = target.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    sparse = hidden.new_zeros(seen.shape[0], hidden.shape[1]).index_add_(0, inverse, g_t[:, None] * hidden)
    average = sparse.sum(0) / classes
    u = state.u @ m
    change = torch.linalg.solve(u.T, sparse.T).T  # raises before anything is written when U is singular
    cross = m.T @ (rows.T @ (g_t[:, None] * hidden))
    gram = m.T @ state.gram @ m - lr * (cross + cross.T)
    gram += lr * lr * (sparse.T @ sparse - classes * torch.outer(average, average))
    delta = state.delta @ m + lr * average
    mean = shrink * state.mean - lr / classes * (hidden.T @ g_mean)
    state.v.index_add_(0, seen, change, alpha=-lr)
    return State(state.v, u, delta, mean, gram)
