"""Sliced optimal transport as textbook formulas, over all slices at once, differentiated by plain autograd.

In one dimension the optimal coupling is monotone: W_p^p = int_0^1 |F^-1(q) - G^-1(q)|^p dq, a finite sum over the
breakpoints of both cumulative weights, and (1/n) sum_i |x_(i) - y_(i)|^p for equal weights and sizes. Arguments are
documented in `fastloss.sliced` and are taken here as valid.
"""

import math
from typing import Any

import torch
from torch import Tensor


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    n_projections: int = 128,
    p: float = 2.0,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    projections: Tensor | None = None,
    sampler: str = "random",
    generator: torch.Generator | None = None,
    root: bool = False,
    streaming: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Mean over the directions of W_p^p between the projected clouds; its p-th root if `root`.

    `streaming` concerns memory alone. It draws each block of directions by itself; give the reference `projections`.
    """
    costs = _costs(x, y, x_weights, y_weights, _draw(x, n_projections, projections, sampler, generator), p)
    return _reduce(_rooted(costs.mean(-1), p, root), reduction)


def max_sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    n_projections: int = 16,
    n_steps: int = 50,
    step_size: float = 1.0,
    p: float = 2.0,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    projections: Tensor | None = None,
    generator: torch.Generator | None = None,
    root: bool = False,
) -> Tensor:
    """The largest W_p^p over unit directions, sought from each starting direction by ascent along the sphere."""
    theta = _unit(_draw(x, n_projections, projections, "random", generator).detach())
    a, b = (None if w is None else w.detach() for w in (x_weights, y_weights))
    best = _costs(x.detach(), y.detach(), a, b, theta, p)
    step = torch.full_like(best, step_size)
    for _ in range(n_steps):
        moving = theta.clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(_costs(x.detach(), y.detach(), a, b, moving, p).sum(), moving)
        tangent = slope - (slope * theta).sum(1, keepdim=True) * theta
        trial = _unit(theta + step[:, None] * _unit(tangent))
        costs = _costs(x.detach(), y.detach(), a, b, trial, p)
        better = costs > best
        theta = torch.where(better[:, None], trial, theta)
        best = torch.where(better, costs, best)
        step = torch.where(better, step, step / 2)
    chosen = theta[best.argmax()][None]
    return _rooted(_costs(x, y, x_weights, y_weights, chosen, p)[0], p, root)


def energy_sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    n_projections: int = 128,
    p: float = 2.0,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    projections: Tensor | None = None,
    sampler: str = "random",
    generator: torch.Generator | None = None,
    energy: str = "exp",
    detach_weights: bool = True,
    root: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Sum over the directions of w_l W_p^p, with weights proportional to an energy of W_p^p."""
    costs = _costs(x, y, x_weights, y_weights, _draw(x, n_projections, projections, sampler, generator), p)
    seen = costs.detach() if detach_weights else costs
    if energy == "exp":
        weights = seen.softmax(-1)
    else:
        power = seen if energy == "identity" else seen**2
        total = power.sum(-1, keepdim=True)
        weights = torch.where(total > 0, power / torch.where(total > 0, total, 1), 1 / costs.shape[-1])
    return _reduce(_rooted((weights * costs).sum(-1), p, root), reduction)


def sliced_wasserstein_matrix(
    xs: Tensor,
    ys: Tensor | None = None,
    *,
    n_projections: int = 128,
    p: float = 2.0,
    projections: Tensor | None = None,
    sampler: str = "random",
    generator: torch.Generator | None = None,
    root: bool = False,
) -> Tensor:
    """Entry (i, j): the sliced distance between cloud i of xs (K, n, d) and cloud j of ys (M, m, d)."""
    theta = _draw(xs, n_projections, projections, sampler, generator)
    others = xs if ys is None else ys
    rows = [torch.stack([_costs(x, y, None, None, theta, p).mean() for y in others]) for x in xs]
    return _rooted(torch.stack(rows), p, root)


def sliced_gromov_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    n_projections: int = 128,
    projections: Tensor | None = None,
    sampler: str = "random",
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean over the directions of min over both orders of (1/n^2) sum_ij ((u_i-u_j)^2 - (v_i-v_j)^2)^2."""
    theta = _draw(x, n_projections, projections, sampler, generator)
    u, v = (x @ theta.T).sort(-2)[0], (y @ theta.T).sort(-2)[0]
    pairs = [(w.unsqueeze(-3) - w.unsqueeze(-2)) ** 2 for w in (u, v, v.flip(-2))]
    costs = torch.minimum(((pairs[0] - pairs[1]) ** 2).mean((-3, -2)), ((pairs[0] - pairs[2]) ** 2).mean((-3, -2)))
    return _reduce(costs.mean(-1), reduction)


def soft_correspondence(x: Tensor, y: Tensor, temperature: float | Tensor = 0.07) -> Tensor:
    """softmax(x y^T / temperature) y."""
    return torch.softmax(x @ y.mT / temperature, -1) @ y


def sliced_wasserstein_distance(
    X_s: Tensor,
    X_t: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    n_projections: int = 50,
    p: float = 2,
    projections: Tensor | None = None,
    seed: int | torch.Generator | None = None,
    log: bool = False,
    scaler: Any = None,
) -> Any:
    """(mean over the directions, columns of `projections`, of W_p^p)^(1/p)."""
    X_s, X_t = _scaled(scaler, X_s, X_t)
    theta = _columns(X_s, n_projections, projections, seed)
    costs = _costs(X_s, X_t, a, b, theta.T, p)
    value = _rooted(costs.mean(), p, True)
    return (value, {"projections": theta, "projected_emds": costs}) if log else value


def max_sliced_wasserstein_distance(
    X_s: Tensor,
    X_t: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    n_projections: int = 50,
    p: float = 2,
    projections: Tensor | None = None,
    seed: int | torch.Generator | None = None,
    log: bool = False,
    scaler: Any = None,
) -> Any:
    """(largest W_p^p over the directions drawn)^(1/p)."""
    X_s, X_t = _scaled(scaler, X_s, X_t)
    theta = _columns(X_s, n_projections, projections, seed)
    costs = _costs(X_s, X_t, a, b, theta.T, p)
    value = _rooted(costs.max(), p, True)
    return (value, {"projections": theta, "projected_emds": costs}) if log else value


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
    """Monotone plans of the projections, as lists of their positive entries, and their costs between the points."""
    dense, costs, theta = _plans(X_s, X_t, a, b, metric, p, projections, n_projections, seed)
    plans = [_entries(g) for g in dense]
    log_dict = {"X_projection": X_s @ theta, "Y_projection": X_t @ theta, "projections": theta}
    return (plans, costs, log_dict) if log else (plans, costs)


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
    """The monotone plan with the lowest cost between the points, and this cost."""
    plans, costs, theta = _plans(X_s, X_t, a, b, metric, p, projections, n_projections, seed)
    best = int(costs.argmin())
    plan = plans[best] if dense else _entries(plans[best])
    log_dict = {
        "projections": theta,
        "costs": costs,
        "min_projection": theta[:, best],
        "X_min_projection": X_s @ theta[:, best],
        "Y_min_projection": X_t @ theta[:, best],
    }
    return (plan, costs[best], log_dict) if log else (plan, costs[best])


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
    """Mean of the monotone plans with weights proportional to exp(-beta cost), and its cost between the points."""
    plans, costs, theta = _plans(X_s, X_t, a, b, metric, p, projections, n_projections, seed)
    weights = torch.softmax(-beta * costs, 0)
    mean = (weights[:, None, None] * plans).sum(0)
    cost = (mean * _distances(X_s, X_t, metric, p)).sum()
    plan = mean if dense else _entries(mean)
    log_dict = {"projections": theta, "costs": costs, "G": [_entries(g) for g in plans], "weights": weights}
    return (plan, cost, log_dict) if log else (plan, cost)


def _plans(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    metric: str,
    p: float,
    projections: Tensor | None,
    count: int | None,
    seed: int | torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense plans (L, n, m), costs (L,) and directions (d, L).

    Sorted, an atom holds an interval of [0, 1]; the plan moves as much from i to j as their intervals overlap.
    """
    theta = _columns(x, count or 0, projections, seed)
    plans = []
    for u, v in zip((x @ theta).T, (y @ theta).T, strict=True):
        i, j = u.sort(stable=True)[1], v.sort(stable=True)[1]
        wa = torch.full_like(u, 1 / len(u)) if a is None else (a / a.sum())[i]
        wb = torch.full_like(v, 1 / len(v)) if b is None else (b / b.sum())[j]
        ends_a, ends_b = wa.cumsum(0)[:, None], wb.cumsum(0)[None]
        overlap = torch.minimum(ends_a, ends_b) - torch.maximum(ends_a - wa[:, None], ends_b - wb[None])
        plans.append(overlap.clamp(min=0)[i.argsort()][:, j.argsort()])
    dense = torch.stack(plans)
    return dense, (dense * _distances(x, y, metric, p)).sum((1, 2)), theta


def _distances(x: Tensor, y: Tensor, metric: str, p: float) -> Tensor:
    """(n, m) distances between all points."""
    d = (x[:, None] - y[None]).abs()
    if metric == "sqeuclidean":
        return (d**2).sum(-1)
    order = {"euclidean": 2, "cityblock": 1, "minkowski": p}[metric]
    return _rooted((d**order).sum(-1), order, True)


def _entries(plan: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masses, rows and columns of the positive entries."""
    rows, cols = plan.nonzero(as_tuple=True)
    return plan[rows, cols], rows, cols


def sliced_wasserstein_sphere(
    X_s: Tensor,
    X_t: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    n_projections: int = 50,
    p: float = 2,
    projections: Tensor | None = None,
    seed: int | torch.Generator | None = None,
    log: bool = False,
) -> Any:
    """(mean over planes of W_p^p between the clouds on the plane's circle of length one)^(1/p).

    A shift of mass around the circle turns the circle into the line; its cost is convex and piecewise linear, so its
    minimum is at a shift that aligns two cumulative weights: all n m of them are tried, and a turn to either side.
    """
    frames = _frames(X_s, n_projections, projections, seed)
    costs = []
    for u, v in zip(_on_circle(X_s, frames), _on_circle(X_t, frames), strict=True):
        (u, i), (v, j) = u.sort(), v.sort()
        weights = [torch.full_like(w, 1 / len(w)) for w in (u, v)]
        wa = weights[0] if a is None else (a / a.sum())[i]
        wb = weights[1] if b is None else (b / b.sum())[j]
        ends_u, ends_v = wa.cumsum(0), wb.cumsum(0)
        best = None
        aligned = (ends_v[None] - ends_u[:, None]).flatten()
        for shift in torch.cat([aligned - 1, aligned, aligned + 1]):
            levels = torch.cat([ends_u.new_zeros(1), ends_u[:-1], (ends_v - shift) % 1, ends_u.new_ones(1)]).sort()[0]
            middle = (levels[1:] + levels[:-1]).detach() / 2
            meets = middle + shift.detach()
            turn = meets.floor()
            at_u = torch.searchsorted(ends_u.detach(), middle).clamp(max=len(u) - 1)
            at_v = torch.searchsorted(ends_v.detach(), meets - turn).clamp(max=len(v) - 1)
            cost = (levels.diff() * (u[at_u] - v[at_v] - turn).abs() ** p).sum()
            best = cost if best is None or cost < best else best
        costs.append(best)
    emds = torch.stack([c for c in costs if c is not None])
    value = _rooted(emds.mean(), p, True)
    return (value, {"projections": frames, "projected_emds": emds}) if log else value


def sliced_wasserstein_sphere_unif(
    X_s: Tensor,
    a: Tensor | None = None,
    n_projections: int = 50,
    projections: Tensor | None = None,
    seed: int | torch.Generator | None = None,
    log: bool = False,
) -> Any:
    """(mean over planes of W_2^2 between the cloud on the plane's circle and the uniform distribution)^(1/2).

    W_2^2 = min over shifts s of int (F^-1(q) - q - s)^2 dq, a variance, integrated atom by atom.
    """
    frames = _frames(X_s, n_projections, projections, seed)
    u, order = _on_circle(X_s, frames).sort(1)
    weights = torch.full_like(u, 1 / u.shape[1]) if a is None else (a / a.sum())[order]
    ends = weights.cumsum(1)
    starts = ends - weights
    mean = (weights * u).sum(1) - 0.5
    centred = u - mean[:, None]
    emds = (((centred - starts) ** 3 - (centred - ends) ** 3) / 3).sum(1)
    value = _rooted(emds.mean(), 2, True)
    return (value, {"projections": frames, "projected_emds": emds}) if log else value


def _frames(x: Tensor, count: int, projections: Tensor | None, seed: int | torch.Generator | None) -> Tensor:
    """(L, d, 2) planes: orthonormal columns."""
    if projections is not None:
        return projections
    generator = seed if isinstance(seed, torch.Generator) else None
    if isinstance(seed, int):
        generator = torch.Generator().manual_seed(seed)
    frames: Tensor = torch.linalg.qr(torch.randn(count, x.shape[1], 2, dtype=x.dtype, generator=generator))[0]
    return frames


def _on_circle(x: Tensor, frames: Tensor) -> Tensor:
    """(L, n) angles of the projections, as fractions of a turn."""
    flat = torch.einsum("ldk,nd->lnk", frames, x)
    return ((torch.atan2(-flat[..., 1], -flat[..., 0]) + math.pi) / (2 * math.pi)) % 1


# ---------------------------------------------------------------- one dimension


def _costs(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, theta: Tensor, p: float) -> Tensor:
    """(..., L) costs W_p^p of the projections of x (..., n, d) and y (..., m, d)."""
    u, u_order = (theta @ x.mT).sort(dim=-1, stable=True)
    v, v_order = (theta @ y.mT).sort(dim=-1, stable=True)
    if a is None and b is None and u.shape[-1] == v.shape[-1]:
        return ((u - v).abs() ** p).mean(-1)
    u_ends, v_ends = _cumulative(a, u_order, u), _cumulative(b, v_order, v)
    ends = torch.cat([u_ends, v_ends], -1).sort(-1)[0]
    mass = torch.diff(ends, dim=-1, prepend=torch.zeros_like(ends[..., :1]))
    i = torch.searchsorted(u_ends.detach(), ends.detach()).clamp(max=u.shape[-1] - 1)
    j = torch.searchsorted(v_ends.detach(), ends.detach()).clamp(max=v.shape[-1] - 1)
    return (mass * (u.gather(-1, i) - v.gather(-1, j)).abs() ** p).sum(-1)


def _cumulative(weights: Tensor | None, order: Tensor, like: Tensor) -> Tensor:
    n = order.shape[-1]
    if weights is None:
        return (torch.arange(1, n + 1, dtype=like.dtype, device=like.device) / n).expand(order.shape).contiguous()
    weights = (weights / weights.sum(-1, keepdim=True)).to(like.dtype)
    return weights.unsqueeze(-2).expand(order.shape).gather(-1, order).cumsum(-1).contiguous()


def _rooted(mean: Tensor, p: float, root: bool) -> Tensor:
    """mean^(1/p), with gradient zero at zero."""
    if not root:
        return mean
    zero = mean == 0
    return torch.where(zero, 0, torch.where(zero, 1, mean) ** (1 / p))


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean()


# ---------------------------------------------------------------- directions


def _unit(theta: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(theta, dim=-1, keepdim=True)
    return theta / torch.where(norm == 0, 1, norm)


def _draw(x: Tensor, count: int, projections: Tensor | None, sampler: str, generator: torch.Generator | None) -> Tensor:
    """(L, d) directions: those given, or unit vectors."""
    if projections is not None:
        return projections
    d = x.shape[-1]
    if sampler == "random":
        return _unit(torch.randn(count, d, dtype=x.dtype, generator=generator))
    if sampler == "orthogonal":
        blocks = [
            torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)) for _ in range(-(-count // d))
        ]
        signed = [(q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T for q, r in blocks]
        return torch.cat(signed)[:count].to(x.dtype)
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    uniform = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    normal = math.sqrt(2) * torch.erfinv(2 * uniform.clamp(2.0**-33, 1 - 2.0**-33) - 1)
    return _unit(normal).to(x.dtype)


def _columns(x: Tensor, count: int, projections: Tensor | None, seed: int | torch.Generator | None) -> Tensor:
    """(d, L) directions as columns."""
    if projections is not None:
        return projections
    generator = seed if isinstance(seed, torch.Generator) else None
    if isinstance(seed, int):
        generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(x.shape[1], count, dtype=x.dtype, generator=generator)
    return drawn / (drawn**2).sum(0, keepdim=True).sqrt()


def _scaled(scaler: Any, *clouds: Tensor) -> list[Tensor]:
    if scaler is None:
        return list(clouds)
    return [scaler.transform(x) if hasattr(scaler, "transform") else scaler(x) for x in clouds]
