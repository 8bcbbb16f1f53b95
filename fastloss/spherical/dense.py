"""The functions of `factored.py` for few classes, with the centred weight itself for a state.

With fewer classes than twice the width the factors cost more than the weight does: 8 d^2 multiply-adds a row of hidden
against 4 C d. And they are badly conditioned there: the Gram is singular, or nearly, so that the sum of squares of a
row of hidden that is almost orthogonal to the weight has no digits left, and the step of U and those of the rows of V
grow without bound and cancel. Here sums of squares come from the logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastloss.spherical.factored import Gradients, Scratch


@dataclass
class State:
    v: Tensor  # (C, d) the weight less its mean row
    mean: Tensor


@dataclass
class Plan:
    """A step that has been computed and not written."""

    state: State
    v: Tensor
    mean: Tensor
    growth: float = 0.0  # nothing is carried from step to step that could drift


def from_dense(weight: Tensor) -> State:
    state = State(weight, torch.zeros_like(weight[0]))
    for _ in range(2):  # the second time for the rounding of a mean that is large beside the spread
        refresh(state)
    return state


def to_dense(state: State, columns: slice = slice(None)) -> Tensor:
    return state.v[:, columns] + state.mean[columns]


def statistics(state: State, hidden: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    centred = hidden @ state.v.T
    square = torch.linalg.vecdot(centred, centred)
    rows = state.v[target]
    return centred.gather(1, target), square, hidden @ state.mean, rows, centred @ state.v


def plan(state: State, grads: Gradients, lr: float, decay: float, limit: float, scratch: Scratch) -> Plan:
    """As `factored.plan`; `limit` and `scratch` are of no use here."""
    hidden, shrink = grads.hidden, 1 - lr * decay
    by_logits = (hidden @ state.v.T).mul_(2 * grads.g_v[:, None]).scatter_add_(1, grads.target, grads.g_t)
    v = torch.addmm(state.v, by_logits.T, hidden, beta=shrink, alpha=-lr)
    v -= v.mean(0)  # t is a logit less the mean
    mean = torch.addmv(state.mean, hidden.T, grads.g_mean, beta=shrink, alpha=-lr / len(v))
    if not math.isfinite(float(v.sum()) + float(mean.sum())):
        raise OverflowError
    return Plan(state, v, mean)


def commit(plan: Plan) -> int:
    plan.state.v.copy_(plan.v)
    plan.state.mean.copy_(plan.mean)
    return 0


def stabilise(state: State, limit: float) -> int:
    """Nothing to move: there is no U."""
    return 0


def drift(state: State) -> float:
    """The relative error of the kept column means."""
    spread = float(torch.linalg.vector_norm(state.v))
    return float(torch.linalg.vector_norm(state.v.mean(0))) * len(state.v) ** 0.5 / spread if spread else 0.0


def refresh(state: State) -> None:
    rest = state.v.mean(0)
    state.v.sub_(rest)
    state.mean.add_(rest)


def logits(state: State, hidden: Tensor, classes: Tensor | slice) -> Tensor:
    return hidden @ state.v[classes].T + (hidden @ state.mean)[:, None]
