"""The loop over blocks of slices that every backend shares: project, hand the rows to the backend, project back.

A slice is one row of theta (L, d); its atoms are the row theta_l X^T of the projections. A block of slices is bounded
by the backend's `block_bytes` whatever L is, and its size depends on the sizes of the problem alone, so that sums run
in the same order for any number of threads.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

BLOCK_BYTES = 12 << 20  # of projections at a time on a CPU: stays in a shared cache, and every core has several slices
LEAST_SLICES = 4


class Epilogue(Protocol):
    block_bytes: int

    def scratch(self, u: Tensor, v: Tensor) -> tuple[Tensor, int]:  # for rows like these; what is in it is its own
        ...

    def transport(
        self,
        u: Tensor,  # (S, n) projections; overwritten by their gradients if `factor` is given
        v: Tensor,  # (S, m)
        a: Tensor | None,  # (n,) float64, sums to one
        b: Tensor | None,  # (m,)
        p: float,
        factor: Tensor | None,  # (S,) float64: derivative of the loss in each slice's cost
        cost: Tensor,  # (S,) float64, written
        scratch: tuple[Tensor, int],
        want_u: bool,
        want_v: bool,
        want_a: bool,
        want_b: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # factor * potentials (S, n) and (S, m)
        ...

    def sort(self, u: Tensor) -> tuple[Tensor, Tensor]:  # sorted (S, n), order (S, n) int32
        ...


def slices_at_a_time(slices: int, atoms: int, itemsize: int, block_bytes: int = BLOCK_BYTES) -> int:
    return max(1, min(slices, max(LEAST_SLICES, block_bytes // max(1, atoms * itemsize))))


def cumulative(weights: Tensor | None, order: Tensor) -> Tensor:
    """(S, n) cumulative weights in float64 in each slice's order; one from the last atom of positive weight on."""
    n = order.shape[1]
    if weights is None:
        return (torch.arange(1, n + 1, dtype=torch.float64, device=order.device) / n).repeat(len(order), 1)
    weights = weights[order]
    ends = weights.cumsum(1)
    left = (weights > 0).flip(1).cumsum(1).flip(1)  # atoms of positive weight from here on
    return torch.where((left == 0) | ((left == 1) & (weights > 0)), 1.0, ends)


def _unit_sum(weights: Tensor | None) -> tuple[Tensor | None, Tensor | float]:
    if weights is None:
        return None, 1.0
    weights = weights.double()
    total = weights.sum()
    return (weights / total).contiguous(), total


def sweep(
    epilogue: Epilogue,
    x: Tensor,  # (n, d) in the accumulation dtype
    y: Tensor,  # (m, d)
    theta: Tensor,  # (L, d)
    a: Tensor | None,  # (n,), normalised in here
    b: Tensor | None,
    p: float,
    factor: Tensor | None,  # (L,) float64, or None for costs alone
    needs: tuple[bool, bool, bool, bool, bool],  # of x, y, theta, a, b
) -> tuple[Tensor, list[Tensor]]:
    """Costs (L,) in float64, and the gradients of sum_l factor_l cost_l; (0,) for those not needed."""
    slices, n, m = len(theta), len(x), len(y)
    need_x, need_y, need_theta, need_a, need_b = needs
    weights_a, total_a = _unit_sum(a)
    weights_b, total_b = _unit_sum(b)
    # All made before the loop: large buffers that come and go between small ones that stay leave holes in the heap.
    costs = torch.empty(slices, dtype=torch.float64, device=x.device)
    grad_x = x.new_zeros(x.shape if need_x else (0,))
    grad_y = y.new_zeros(y.shape if need_y else (0,))
    grad_theta = theta.new_empty(theta.shape if need_theta else (0,))
    grad_a = torch.zeros(n if need_a else 0, dtype=torch.float64, device=x.device)
    grad_b = torch.zeros(m if need_b else 0, dtype=torch.float64, device=x.device)
    step = slices_at_a_time(slices, (n + m) * (2 if need_a or need_b else 1), x.element_size(), epilogue.block_bytes)
    u_rows, v_rows = x.new_empty((min(step, slices), n)), x.new_empty((min(step, slices), m))
    scratch = epilogue.scratch(u_rows, v_rows)
    for start in range(0, slices, step):
        block = theta[start : start + step]
        u, v = u_rows[: len(block)], v_rows[: len(block)]
        torch.mm(block, x.t(), out=u)
        torch.mm(block, y.t(), out=v)
        want_u, want_v = need_x or need_theta, need_y or need_theta
        f, g = epilogue.transport(
            u,
            v,
            weights_a,
            weights_b,
            p,
            None if factor is None else factor[start : start + step].contiguous(),
            costs[start : start + step],
            scratch,
            want_u,
            want_v,
            need_a,
            need_b,
        )
        if factor is None:
            continue
        if need_x:
            grad_x.addmm_(u.t(), block)
        if need_y:
            grad_y.addmm_(v.t(), block)
        if need_theta:
            torch.mm(u, x, out=grad_theta[start : start + step]).addmm_(v, y)
        if f is not None:
            grad_a += f.sum(0, dtype=torch.float64)
        if g is not None:
            grad_b += g.sum(0, dtype=torch.float64)
    if need_a:
        grad_a /= total_a
    if need_b:
        grad_b /= total_b
    gradients = [grad_x, grad_y, grad_theta, grad_a.to(x.dtype), grad_b.to(x.dtype)]
    return costs, gradients


def _accumulation(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _element(x: Tensor | None, index: int) -> Tensor | None:
    return None if x is None else x[index]


def _needs(*needs: bool) -> tuple[bool, bool, bool, bool, bool]:
    x, y, theta, a, b = needs
    return x, y, theta, a, b


def mean_forward(
    epilogue: Epilogue, x: Tensor, y: Tensor, theta: Tensor, a: Tensor | None, b: Tensor | None, p: float, *needs: bool
) -> tuple[Tensor, ...]:
    """Mean cost of each pair of clouds (B,), and its gradients one a pair."""
    directions = _accumulation(theta)
    wanted = _needs(*needs)
    slices = len(theta)
    factor = torch.full((slices,), 1 / max(1, slices), dtype=torch.float64, device=x.device) if any(wanted) else None
    means, grads = [], []
    for i in range(len(x)):
        one_x, one_y = _accumulation(x[i]), _accumulation(y[i])
        costs, found = sweep(epilogue, one_x, one_y, directions, _element(a, i), _element(b, i), p, factor, wanted)
        means.append(costs.mean().to(directions.dtype))
        grads.append(found)
    if len(x) == 1:  # handed on, not copied
        return (
            means[0].unsqueeze(0),
            *(g.unsqueeze(0) if need else g for need, g in zip(wanted, grads[0], strict=True)),
        )
    shapes = (x.shape, y.shape, (len(x), *theta.shape), x.shape[:2], y.shape[:2])
    stacked = [
        torch.stack([g[k] for g in grads]) if need and grads else directions.new_empty(shapes[k] if need else (0,))
        for k, need in enumerate(wanted)
    ]
    return (torch.stack(means) if means else directions.new_empty((0,)), *stacked)


def mean_backward(grad: Tensor, x: Tensor, y: Tensor, theta: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
    grad_x, grad_y, grad_theta, grad_a, grad_b = grads
    row, cloud = grad[:, None], grad[:, None, None]

    def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        return (gradient * factor).to(dtype) if gradient.dim() > 1 else gradient.new_empty((0,), dtype=dtype)

    if grad_theta.dim() > 1 and len(grad) != 1:
        grad_theta = (grad_theta * cloud).sum(0).to(theta.dtype)
    else:
        grad_theta = scaled(grad_theta.squeeze(0), grad, theta.dtype)
    return (
        scaled(grad_x, cloud, x.dtype),
        scaled(grad_y, cloud, y.dtype),
        grad_theta,
        scaled(grad_a, row, grad_a.dtype),
        scaled(grad_b, row, grad_b.dtype),
    )


def costs_forward(
    epilogue: Epilogue, x: Tensor, y: Tensor, theta: Tensor, a: Tensor | None, b: Tensor | None, p: float
) -> Tensor:
    """Cost of each slice of each pair of clouds (B, L)."""
    directions = _accumulation(theta)
    nothing = _needs(False, False, False, False, False)
    rows = [
        sweep(
            epilogue,
            _accumulation(x[i]),
            _accumulation(y[i]),
            directions,
            _element(a, i),
            _element(b, i),
            p,
            None,
            nothing,
        )[0]
        for i in range(len(x))
    ]
    return torch.stack(rows).to(directions.dtype) if rows else directions.new_empty((0, len(theta)))


def costs_backward(
    epilogue: Epilogue,
    grad: Tensor,  # (B, L)
    x: Tensor,
    y: Tensor,
    theta: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    p: float,
    *needs: bool,
) -> tuple[Tensor, ...]:
    directions = _accumulation(theta)
    wanted = _needs(*needs)
    need_x, need_y, need_theta, need_a, need_b = wanted
    one = len(x) == 1  # its gradient is handed on, not copied: it may be large
    grad_x = torch.empty(x.shape if need_x and not one else (0,), dtype=x.dtype, device=x.device)
    grad_y = torch.empty(y.shape if need_y and not one else (0,), dtype=y.dtype, device=x.device)
    grad_theta = directions.new_zeros(theta.shape if need_theta else (0,))
    grad_a = directions.new_empty(x.shape[:2] if need_a else (0,))
    grad_b = directions.new_empty(y.shape[:2] if need_b else (0,))
    for i in range(len(x)):
        found = sweep(
            epilogue,
            _accumulation(x[i]),
            _accumulation(y[i]),
            directions,
            _element(a, i),
            _element(b, i),
            p,
            grad[i].double(),
            wanted,
        )[1]
        if need_x:
            if one:
                grad_x = found[0].to(x.dtype).unsqueeze(0)
            else:
                grad_x[i] = found[0]
        if need_y:
            if one:
                grad_y = found[1].to(y.dtype).unsqueeze(0)
            else:
                grad_y[i] = found[1]
        if need_theta:
            grad_theta += found[2]
        if need_a:
            grad_a[i] = found[3]
        if need_b:
            grad_b[i] = found[4]
    return grad_x, grad_y, grad_theta.to(theta.dtype), grad_a, grad_b


def sort_forward(epilogue: Epilogue, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """The sorted projections of one cloud (L, n), and the atom behind each."""
    points, directions = _accumulation(x), _accumulation(theta)
    slices, n = len(theta), len(x)
    values = points.new_empty((slices, n))
    order = torch.empty((slices, n), dtype=torch.int32, device=x.device)
    step = slices_at_a_time(slices, n, points.element_size(), epilogue.block_bytes)
    for start in range(0, slices, step):
        values[start : start + step], order[start : start + step] = epilogue.sort(
            torch.mm(directions[start : start + step], points.t())
        )
    return values, order


def sort_backward(
    grad: Tensor, x: Tensor, theta: Tensor, order: Tensor, need_x: bool, need_theta: bool
) -> tuple[Tensor, Tensor]:
    points, directions = _accumulation(x), _accumulation(theta)
    slices, n = order.shape
    grad_x = points.new_zeros(x.shape if need_x else (0,))
    grad_theta = directions.new_empty(theta.shape if need_theta else (0,))
    step = slices_at_a_time(slices, n, points.element_size())
    for start in range(0, slices, step):
        part = grad[start : start + step]
        back = torch.empty_like(part).scatter_(1, order[start : start + step].long(), part)
        if need_x:
            grad_x.addmm_(back.t(), directions[start : start + step])
        if need_theta:
            torch.mm(back, points, out=grad_theta[start : start + step])
    return grad_x.to(x.dtype), grad_theta.to(theta.dtype)
