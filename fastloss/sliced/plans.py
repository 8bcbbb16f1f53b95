"""POT's transport plans between clouds that come from their projections, as index arrays.

On every direction the optimal plan between the projections is the monotone one. It couples the points themselves as
well, at the cost of their own distances: an upper bound of the Wasserstein distance, with a plan that attains it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss._checks import check_number
from fastloss._ops import full_precision
from fastloss.sliced.arguments import check_count, rooted
from fastloss.sliced.ops import sort_slices
from fastloss.sliced.pot import pot_arguments
from fastloss.sliced.tiles import cumulative

METRICS = ("sqeuclidean", "euclidean", "cityblock", "minkowski")
BLOCK_BYTES = 32 << 20  # of masses, indices or differences of points at a time


class TransportPlan(NamedTuple):
    """A sparse transport plan: entry k moves mass `data[k]` from point `rows[k]` to point `cols[k]`.

    Entries of no mass may occur; in the mean of several plans pairs may occur more than once. As a matrix:
    ``torch.sparse_coo_tensor(torch.stack([plan.rows, plan.cols]), plan.data, (n, m))``.
    """

    data: Tensor
    rows: Tensor
    cols: Tensor


def sliced_plans(
    X_s: Tensor,
    X_t: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    metric: str = "sqeuclidean",
    p: float = 1,
    projections: Tensor | None = None,
    n_projections: int | None = None,
    seed: int | torch.Generator | None = None,
    batch_size: int | None = None,
    log: bool = False,
) -> Any:
    r"""Transport plans of the projections on each direction, and what they cost between the points themselves.

    .. math::
        C_l = \sum_{ij} G^l_{ij}\, c(x_i, y_j), \qquad G^l \text{ the monotone plan of } \theta_{l\#} \mu,
        \theta_{l\#} \nu

    A drop-in for ``ot.sliced.sliced_plans`` on PyTorch tensors: its plans for the same seed, or the same projections,
    and its costs for equal sizes without weights. (Else POT 0.9.7 multiplies distances by masses of other entries.)

    Args:
        X_s: (n, d) points, n >= 1; float64, float32, bfloat16 or float16; any strides. The costs are differentiable.
        X_t: (m, d) points, m >= 1, likewise.
        a: (n,), non-negative, sum one; None for 1/n. Masses and costs are differentiable, where no cumulative weights
            of both clouds coincide.
        b: (m,), likewise.
        metric: c: "sqeuclidean", "euclidean", "cityblock" or "minkowski".
        p: >= 1, the order of "minkowski"; else not used.
        projections: (d, L), columns. Plans do not depend on their lengths. One that is not finite gives masses and a
            cost of NaN.
        n_projections: directions drawn >= 1; must be given without `projections`, ignored with them.
        seed: as in :func:`sliced_wasserstein_distance`.
        batch_size: pairs of points whose distance is taken at a time >= 1; None for 32 MiB of them.
        log: True returns also ``{"X_projection": (n, L), "Y_projection": (m, L), "projections": (d, L)}``.

    Returns:
        ``(plans, costs)``: a list of L :class:`TransportPlan` of n entries (equal sizes without weights) or n + m - 1,
        with int64 indices, and (L,) costs; float64 for float64 inputs, float32 otherwise. NaN in a cloud, or
        in the projections on a direction, makes all masses and the cost of that plan NaN. Differentiable twice.

    Raises:
        TypeError, ValueError: as :func:`sliced_wasserstein_distance`; unknown `metric`; neither `projections` nor
            `n_projections`.

    Memory:
        O(L (n + m)) for the plans; with gradients, O(L (n + m) d) for the differences of the points.

    Determinism:
        As :func:`sliced_wasserstein`.

    Source:
        Tanguy, Chapel and Delon, *Sliced transport plans*, 2025.

    Example:
        >>> x, y = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> (first, second), costs = fastloss.sliced_plans(x, y, projections=torch.eye(2))
        >>> first.data, first.rows, first.cols
        (tensor([0.5000, 0.5000]), tensor([0, 1]), tensor([1, 0]))
        >>> costs
        tensor([5., 3.])
    """
    problem = _Problem("sliced_plans", X_s, X_t, a, b, metric, p, projections, n_projections, seed, batch_size, log=log)
    plans, costs = problem.plans()
    if not log:
        return plans, costs
    theta = problem.theta.t()
    with full_precision(theta):
        projected = {"X_projection": problem.x @ theta, "Y_projection": problem.y @ theta}
    return plans, costs, {**projected, "projections": theta}


def min_sliced_transport_plan(
    X_s: Tensor,
    X_t: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    projections: Tensor | None = None,
    metric: str = "sqeuclidean",
    p: float = 2,
    n_projections: int | None = None,
    seed: int | torch.Generator | None = None,
    batch_size: int | None = None,
    dense: bool = False,
    log: bool = False,
) -> Any:
    r"""The cheapest of the transport plans that the directions give.

    .. math::
        \min_l C_l, \qquad C_l = \sum_{ij} G^l_{ij}\, c(x_i, y_j)

    The signature and the numbers (see :func:`sliced_plans`) of ``ot.min_sliced_transport_plan``, but the plan comes as
    index arrays: POT's default is ``dense=True``.

    Args:
        X_s: (n, d) points, n >= 1; float64, float32, bfloat16 or float16; any strides. The cost is differentiable.
        X_t: (m, d) points, m >= 1, likewise.
        a: (n,), non-negative, sum one; None for 1/n. Differentiable as in :func:`sliced_plans`.
        b: (m,), likewise.
        projections: (d, L), columns.
        metric: c: "sqeuclidean", "euclidean", "cityblock" or "minkowski".
        p: >= 1, the order of "minkowski"; else not used.
        n_projections: directions drawn >= 1; must be given without `projections`, ignored with them.
        seed: as in :func:`sliced_wasserstein_distance`.
        batch_size: pairs of points whose distance is taken at a time >= 1; None for 32 MiB of them.
        dense: True returns the plan as an (n, m) matrix.
        log: True returns also ``{"projections": (d, L), "costs": (L,), "min_projection": (d,),
            "X_min_projection": (n,), "Y_min_projection": (m,)}``, without gradients.

    Returns:
        ``(plan, cost)``: a :class:`TransportPlan`, or the matrix, and a 0-dim tensor; float64 for float64 inputs,
        float32 otherwise. A direction whose plan costs NaN makes the result NaN. Differentiable twice.

    Raises:
        TypeError, ValueError: as :func:`sliced_plans`.

    Memory:
        O((n + m) d), whatever L, beside blocks of 32 MiB (one slice if it is larger); n m with `dense`.

    Determinism:
        As :func:`sliced_wasserstein`. Of equal costs, the first.

    Source:
        Mahey et al., *Fast optimal transport through sliced generalized Wasserstein geodesics*, 2023.

    Example:
        >>> x, y = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> plan, cost = fastloss.min_sliced_transport_plan(x, y, projections=torch.eye(2))
        >>> plan.rows, plan.cols, cost
        (tensor([0, 1]), tensor([0, 1]), tensor(3.))
    """
    name = "min_sliced_transport_plan"
    flags = {"dense": dense, "log": log}
    problem = _Problem(name, X_s, X_t, a, b, metric, p, projections, n_projections, seed, batch_size, **flags)
    with torch.no_grad():
        costs = torch.cat([problem.costs(*problem.coupling(block)) for block in problem.blocks()])
    best = problem.theta.index_select(0, costs.argmin(0, keepdim=True))  # of NaN, the first
    coupling = problem.coupling(best)
    cost = problem.costs(*coupling)[0]
    plan = TransportPlan(*(t[0] for t in coupling))
    result = problem.dense(plan) if dense else plan
    if not log:
        return result, cost
    direction = best.detach()[0]
    with full_precision(direction):
        projected = [cloud.detach() @ direction for cloud in (problem.x, problem.y)]
    return (
        result,
        cost,
        {
            "projections": problem.theta.detach().t(),
            "costs": costs,
            "min_projection": direction,
            "X_min_projection": projected[0],
            "Y_min_projection": projected[1],
        },
    )


def expected_sliced_plan(
    X_s: Tensor,
    X_t: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    projections: Tensor | None = None,
    metric: str = "sqeuclidean",
    p: float = 2,
    n_projections: int | None = None,
    beta: float = 0.0,
    seed: int | torch.Generator | None = None,
    dense: bool = False,
    batch_size: int | None = None,
    log: bool = False,
) -> Any:
    r"""The mean of the transport plans that the directions give, with more weight for the cheaper ones.

    .. math::
        G = \sum_l w_l G^l, \qquad w_l = \frac{\exp(-\beta C_l)}{\sum_k \exp(-\beta C_k)}, \qquad
        C_l = \sum_{ij} G^l_{ij}\, c(x_i, y_j)

    The signature and the numbers (see :func:`sliced_plans`) of ``ot.expected_sliced_plan``, but the plan comes as index
    arrays: POT's default is ``dense=True``.

    Args:
        X_s: (n, d) points, n >= 1; float64, float32, bfloat16 or float16; any strides. The cost is differentiable, and
            through the w_l the plan.
        X_t: (m, d) points, m >= 1, likewise.
        a: (n,), non-negative, sum one; None for 1/n. Differentiable as in :func:`sliced_plans`.
        b: (m,), likewise.
        projections: (d, L), columns.
        metric: c: "sqeuclidean", "euclidean", "cityblock" or "minkowski".
        p: >= 1, the order of "minkowski"; else not used.
        n_projections: directions drawn >= 1; must be given without `projections`, ignored with them.
        beta: inverse temperature, any finite number (beyond the range of the dtype, its largest); 0 weighs all
            directions equally.
        seed: as in :func:`sliced_wasserstein_distance`.
        dense: True returns the plan as an (n, m) matrix.
        batch_size: pairs of points whose distance is taken at a time >= 1; None for 32 MiB of them.
        log: True returns also ``{"projections": (d, L), "costs": (L,), "G": the list of plans, "weights": (L,)}``.

    Returns:
        ``(plan, cost)``: a :class:`TransportPlan` of all entries of all plans, or the matrix, and the 0-dim cost of the
        plan; float64 for float64 inputs, float32 otherwise. A direction whose plan costs NaN makes the result NaN.
        Differentiable twice.

    Raises:
        TypeError, ValueError: as :func:`sliced_plans`; `beta` not a finite number.

    Memory:
        As :func:`sliced_plans`; n m more with `dense`.

    Determinism:
        As :func:`sliced_wasserstein`.

    Source:
        Liu et al., *Expected sliced transport plans*, 2024.

    Example:
        >>> x, y = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> fastloss.expected_sliced_plan(x, y, projections=torch.eye(2), dense=True)
        (tensor([[0.2500, 0.2500],
                [0.2500, 0.2500]]), tensor(4.))
    """
    name = "expected_sliced_plan"
    beta = check_number(name, "beta", beta)
    flags = {"dense": dense, "log": log}
    problem = _Problem(name, X_s, X_t, a, b, metric, p, projections, n_projections, seed, batch_size, **flags)
    plans, costs = problem.plans()
    # Differences to the plan of most weight: neither they nor a beta within the range of the dtype make inf - inf.
    limit = torch.finfo(costs.dtype).max
    most = (costs.min() if beta >= 0 else costs.max()).detach()
    weights = (-max(-limit, min(limit, beta)) * (costs - most)).softmax(0)
    plan = TransportPlan(
        torch.cat([w * one.data for w, one in zip(weights, plans, strict=True)]),
        torch.cat([one.rows for one in plans]),
        torch.cat([one.cols for one in plans]),
    )
    cost = (weights * costs).sum()
    result = problem.dense(plan) if dense else plan
    if not log:
        return result, cost
    return result, cost, {"projections": problem.theta.t(), "costs": costs, "G": plans, "weights": weights}


class _Problem:
    """Checked arguments, and the plans and costs of blocks of directions."""

    def __init__(
        self,
        function: str,
        x: Tensor,
        y: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        metric: str,
        p: float,
        projections: Tensor | None,
        count: int | None,
        seed: int | torch.Generator | None,
        batch_size: int | None,
        **flags: bool,
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"{function}: `metric` must be one of {', '.join(METRICS)}, got {metric!r}")
        if projections is None and count is None:
            raise ValueError(f"{function}: `n_projections` must be given where `projections` is None")
        if batch_size is not None:
            batch_size = check_count(function, batch_size, "batch_size")
        x, y, theta, a, b, p = pot_arguments(function, x, y, a, b, count, p, projections, seed, None, **flags)
        self.x, self.y = x[0].to(theta.dtype), y[0].to(theta.dtype)
        self.theta = theta.t()
        # The masses are differences of cumulative weights: those of many points are small ones of large ones.
        self.a, self.b = (None if w is None else w[0].double() / w[0].double().sum() for w in (a, b))
        self.metric = metric
        self.order = {"sqeuclidean": 2, "euclidean": 2, "cityblock": 1, "minkowski": p}[metric]
        self.permutes = a is None and b is None and len(self.x) == len(self.y)
        self.entries = len(self.x) if self.permutes else len(self.x) + len(self.y) - 1
        row = self.x.shape[1] * self.x.element_size()
        self.pairs = batch_size or max(1, BLOCK_BYTES // row)

    def blocks(self) -> tuple[Tensor, ...]:
        """Directions, so many at a time that their pairs and masses stay within the bounds."""
        step = max(1, min(self.pairs, BLOCK_BYTES // 8) // self.entries)
        return tuple(self.theta[start : start + step] for start in range(0, len(self.theta), step))

    def plans(self) -> tuple[list[TransportPlan], Tensor]:
        """The plan and the cost of each direction."""
        plans, costs = [], []
        for block in self.blocks():
            coupling = self.coupling(block)
            plans += [TransportPlan(*one) for one in zip(*coupling, strict=True)]
            costs.append(self.costs(*coupling))
        return plans, torch.cat(costs)

    def coupling(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Masses, points of x and points of y of the monotone plans, (S, entries) each. NaN has no place in an order:
        all masses are NaN where a projection is, or the direction is not finite."""
        theta = theta.detach()
        (u, rows), (v, cols) = (sort_slices(cloud.detach(), theta) for cloud in (self.x, self.y))
        broken = u[:, -1:].isnan() | v[:, -1:].isnan() | ~theta.isfinite().all(1, keepdim=True)  # NaN sorts last
        rows, cols = rows.long(), cols.long()
        if self.permutes:
            mass = self.x.new_full((len(theta), 1), 1 / len(self.x)).masked_fill(broken, torch.nan)
            return mass.expand(rows.shape), rows, cols
        x_ends, y_ends = cumulative(self.a, rows), cumulative(self.b, cols)
        ends = torch.cat([x_ends, y_ends], 1).sort(1)[0][:, :-1]  # both reach one: once is enough
        mass = ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1])).masked_fill(broken, torch.nan)
        level = ends.detach().contiguous()
        i = torch.searchsorted(x_ends.detach(), level)
        j = torch.searchsorted(y_ends.detach(), level)
        return mass.to(self.x.dtype), rows.gather(1, i), cols.gather(1, j)

    def costs(self, mass: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """(S,) sums over the entries of mass times distance."""
        total = mass.new_zeros(len(mass))
        for start in range(0, self.entries, self.pairs):
            m, i, j = (t[:, start : start + self.pairs] for t in (mass, rows, cols))
            difference = self.x.index_select(0, i.flatten()) - self.y.index_select(0, j.flatten())
            distance = self._distance(difference).reshape(m.shape)
            total = total + torch.where(m == 0, 0, m * distance).sum(1)  # no mass, no cost, infinite or not
        return total

    def _distance(self, difference: Tensor) -> Tensor:
        if self.order == 1:
            return difference.abs().sum(1)
        if self.order == 2:
            square = difference.square().sum(1)
            return square if self.metric == "sqeuclidean" else rooted(square, 2)
        return rooted(difference.abs().pow(self.order).sum(1), self.order)

    def dense(self, plan: TransportPlan) -> Tensor:
        n, m = len(self.x), len(self.y)
        return plan.data.new_zeros(n * m).index_add(0, plan.rows * m + plan.cols, plan.data).reshape(n, m)
