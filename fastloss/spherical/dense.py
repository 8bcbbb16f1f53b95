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

from fastloss._distributed import World
from fastloss.spherical.factored import Gradients, OverRanks, Scratch


@dataclass
class State(OverRanks):
    v: Tensor  # (C, d) the weight less its mean row
    mean: Tensor
    split: World | None = None


@dataclass
class Plan:
    """A step that has been computed and not written."""

    state: State
    v: Tensor
    mean: Tensor
    growth: float = 0.0  # nothing is carried from step to step that could drift


def from_dense(weight: Tensor, split: World | None = None) -> State:
    state = State(weight, weight.new_zeros(weight.shape[1]), split)
    for _ in range(2):  # the second time for the rounding of a mean that is large beside the spread
        refresh(state)
    return state


def to_dense(state: State, columns: slice = slice(None)) -> Tensor:
    return state.v[:, columns] + state.mean[columns]


def statistics(state: State, hidden: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    centred = hidden @ state.v.T
    square = state.all(torch.linalg.vecdot(centred, centred))
    rows = state.seen(target.flatten()).view(*target.shape, hidden.shape[1])
    product = state.all(centred @ state.v)
    return torch.linalg.vecdot(rows, hidden[:, None]), square, hidden @ state.mean, rows, product


def plan(state: State, grads: Gradients, lr: float, decay: float, limit: float, scratch: Scratch) -> Plan:
    """As `factored.plan`; `limit` and `scratch` are of no use here."""
    hidden, target, g_t, shrink = grads.hidden, grads.target, grads.g_t, 1 - lr * decay
    if state.split is not None:
        mine, target = state.split.own(target)
        g_t = torch.where(mine, g_t, 0)
    by_logits = (hidden @ state.v.T).mul_(2 * grads.g_v[:, None]).scatter_add_(1, target, g_t)
    v = torch.addmm(state.v, by_logits.T, hidden, beta=shrink, alpha=-lr)
    v -= state.all(v.sum(0)) / state.classes  # t is a logit less the mean
    mean = torch.addmv(state.mean, hidden.T, grads.g_mean, beta=shrink, alpha=-lr / state.classes)
    if not math.isfinite(float(state.all(v.sum())) + float(mean.sum())):
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
    spread = float(state.all(state.v.square().sum()).sqrt())
    rest = state.all(state.v.sum(0))
    return float(torch.linalg.vector_norm(rest)) / state.classes**0.5 / spread if spread else 0.0


def refresh(state: State) -> None:
    rest = state.all(state.v.sum(0)) / state.classes
    state.v.sub_(rest)
    state.mean.add_(rest)


def logits(state: State, hidden: Tensor, classes: Tensor | slice) -> Tensor:
    return hidden @ state.v[classes].T + (hidden @ state.mean)[:, None]
