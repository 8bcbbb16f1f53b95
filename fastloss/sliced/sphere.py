"""POT's spherical sliced distances, in plain PyTorch over all circles at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastloss._checks import FLOATS, check_device
from fastloss._ops import full_precision
from fastloss.sliced.arguments import (
    check_cloud,
    check_count,
    check_dims,
    check_flags,
    check_p,
    check_weights,
    check_width,
    rooted,
    seeded,
    sum_tolerance,
    values_are_known,
)


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
    r"""Spherical sliced Wasserstein distance, a drop-in for ``ot.sliced_wasserstein_sphere`` on PyTorch tensors.

    .. math::
        \Bigl( \frac1L \sum_l \min_s \int_0^1 \bigl| F_l^{-1}(q) - G_l^{-1}(q + s) \bigr|^p dq \Bigr)^{1/p}

    with the quantile functions of the clouds projected on great circle l, of length one, continued beyond [0, 1] by
    whole turns. The shift s is found by bisection on the slope of a convex function. The derivative is that of the
    minimum: the shift, which lets two steps meet, moves with their weights.

    Args:
        X_s: (n, d) unit vectors (to 1e-4), n >= 1, d >= 2; float64 or float32; any strides. Differentiable.
        X_t: (m, d) unit vectors, m >= 1. Differentiable.
        a: (n,), non-negative, sum one; None for 1/n. Differentiable.
        b: (m,), likewise.
        n_projections: great circles drawn >= 1; ignored with `projections`.
        p: >= 1.
        projections: (L, d, 2), orthonormal columns (to 1e-8 in float64, 1e-4 in float32, 1e-2 in 16 bits) that span the
            planes of the circles.
        seed: an int seeds a generator of this call; a ``torch.Generator`` is used and advanced; None draws from torch's
            default generator.
        log: True returns ``(value, {"projections": (L, d, 2), "projected_emds": (L,)})``.

    Returns:
        A 0-dim tensor of the common dtype of the points, differentiable twice. Zero has gradient zero.

    Raises:
        TypeError: not floating tensors, `p` not a number.
        ValueError: shapes that do not fit, vectors that are not unit vectors, projections that are not orthonormal, bad
            weights, p < 1.

    Memory:
        O(L (n + m)): plain PyTorch over all circles at once.

    Determinism:
        Deterministic on CPU.

    Source:
        Bonet et al., *Spherical sliced-Wasserstein*, 2023.

    Example:
        >>> x = torch.eye(2)
        >>> fastloss.sliced_wasserstein_sphere(x, -x, projections=torch.eye(2)[None])  # each by a quarter
        tensor(0.2500)
    """
    name = "sliced_wasserstein_sphere"
    check_flags(name, log=log)
    p = check_p(name, p)
    frames, a, b = _sphere_arguments(name, (X_s, X_t), (a, b), n_projections, projections, seed)
    costs = _circle_costs(_on_circle(X_s, frames), _on_circle(X_t, frames), a, b, p).to(frames.dtype)
    value = rooted(costs.mean(), p)
    return (value, {"projections": frames, "projected_emds": costs}) if log else value


def sliced_wasserstein_sphere_unif(
    X_s: Tensor,
    a: Tensor | None = None,
    n_projections: int = 50,
    projections: Tensor | None = None,
    seed: int | torch.Generator | None = None,
    log: bool = False,
) -> Any:
    r"""Spherical sliced distance to the uniform distribution, a drop-in for ``ot.sliced_wasserstein_sphere_unif``.

    .. math::
        \Bigl( \frac1L \sum_l \min_s \int_0^1 \bigl( F_l^{-1}(q) - q - s \bigr)^2 dq \Bigr)^{1/2}

    in closed form: a variance. The same seed gives POT's number where there are no weights. (With weights POT 0.9.7
    sorts the points and leaves the weights in their order, which is another distribution.)

    Args:
        X_s: (n, d) unit vectors (to 1e-4), n >= 1, d >= 2; float64 or float32; any strides. Differentiable.
        a: (n,), non-negative, sum one; None for 1/n. Differentiable.
        n_projections: great circles drawn >= 1; ignored with `projections`.
        projections: (L, d, 2), orthonormal columns (to 1e-8 in float64, 1e-4 in float32, 1e-2 in 16 bits) that span the
            planes of the circles.
        seed: as in :func:`sliced_wasserstein_sphere`.
        log: True returns ``(value, {"projections": (L, d, 2), "projected_emds": (L,)})``.

    Returns:
        A 0-dim tensor of the dtype of the points, differentiable twice.

    Raises:
        TypeError, ValueError: as :func:`sliced_wasserstein_sphere`.

    Memory, determinism:
        As :func:`sliced_wasserstein_sphere`.

    Source:
        Bonet et al., *Spherical sliced-Wasserstein*, 2023.

    Example:
        >>> fastloss.sliced_wasserstein_sphere_unif(torch.eye(2)[:1], projections=torch.eye(2)[None])  # 1 / sqrt(12)
        tensor(0.2887)
    """
    name = "sliced_wasserstein_sphere_unif"
    check_flags(name, log=log)
    frames, a, _ = _sphere_arguments(name, (X_s,), (a, None), n_projections, projections, seed)
    u, order = _on_circle(X_s, frames).double().sort(1)
    weights = torch.full_like(u, 1 / u.shape[1]) if a is None else (a.double() / a.double().sum())[order]
    middle = weights.cumsum(1) - weights / 2
    mean = (weights * u).sum(1, keepdim=True) - 0.5
    costs = ((weights * (u - middle - mean).square()).sum(1) + weights.pow(3).sum(1) / 12).to(frames.dtype)
    value = rooted(costs.mean(), 2)
    return (value, {"projections": frames, "projected_emds": costs}) if log else value


def _sphere_arguments(
    function: str,
    clouds: tuple[Tensor, ...],
    weights: tuple[Tensor | None, Tensor | None],
    count: int,
    projections: Tensor | None,
    seed: int | torch.Generator | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Planes (L, d, 2) in the common dtype of the clouds, and checked weights."""
    first = clouds[0]
    for name, x in zip(("X_s", "X_t"), clouds, strict=False):
        check_cloud(function, name, x)
        check_dims(function, (name, x))
        if x.dtype not in (torch.float64, torch.float32):
            raise TypeError(f"{function}: `{name}` must be float64 or float32, got {x.dtype}")
        check_width(function, name, x, "X_s", first)
        if values_are_known(x) and bool((x.detach().square().sum(1) - 1).abs().gt(1e-4).any()):
            raise ValueError(f"{function}: `{name}` must consist of unit vectors (to 1e-4), got others")
    d = first.shape[1]
    if d < 2:
        raise ValueError(f"{function}: `X_s` must have at least two dimensions, got {tuple(first.shape)}")
    checked = [
        None if w is None else check_weights(function, name, w, x, batched=False)
        for name, w, x in zip(("a", "b"), weights, (first, clouds[-1]), strict=True)
    ]
    dtype = torch.promote_types(first.dtype, clouds[-1].dtype)
    if projections is not None:
        fits = isinstance(projections, Tensor) and projections.dim() == 3 and projections.shape[1:] == (d, 2)
        if not fits or len(projections) == 0:
            got = tuple(projections.shape) if isinstance(projections, Tensor) else type(projections).__name__
            raise ValueError(f"{function}: `projections` must be a tensor of shape (L, {d}, 2), L >= 1, got {got}")
        if projections.dtype not in FLOATS:
            raise TypeError(f"{function}: `projections` must be a floating-point tensor, got {projections.dtype}")
        check_device(function, "projections", projections, "the points", first)
        if values_are_known(projections):
            _check_orthonormal(function, projections.detach())
        return projections.to(dtype), checked[0], checked[1]
    count = check_count(function, count)
    generator = seeded(function, seed)
    source = first.device if generator is None else generator.device
    normal = torch.randn(count, d, 2, dtype=dtype, generator=generator, device=source)
    return torch.linalg.qr(normal)[0].to(first.device), checked[0], checked[1]


def _check_orthonormal(function: str, frames: Tensor) -> None:
    wide, tolerance = frames.double(), sum_tolerance(frames.dtype)
    error = (wide.mT @ wide - torch.eye(2, dtype=torch.float64, device=frames.device)).abs().amax((1, 2))
    bad = ~(error <= tolerance)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise ValueError(
            f"{function}: `projections` must have orthonormal columns (to {tolerance:.0e}), "
            f"got products off by {float(error[index]):.3g} in plane {index}"
        )


def _on_circle(x: Tensor, frames: Tensor) -> Tensor:
    """(L, n) angles of the projections, as fractions of a turn in [0, 1)."""
    with full_precision(x):
        flat = torch.einsum("ldk,nd->lnk", frames, x.to(frames.dtype))
    return ((torch.atan2(-flat[..., 1], -flat[..., 0]) + math.pi) / (2 * math.pi)).remainder(1)


BISECTIONS = 45  # of shifts in [-1, 1]: to 6e-14


def _circle_costs(u: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, p: float) -> Tensor:
    """(L,) costs in float64 of transport around circles of length one."""
    (u, u_order), (v, v_order) = u.double().sort(1), v.double().sort(1)
    u_ends, v_ends = _circle_ends(a, u_order), _circle_ends(b, v_order)
    n, m = u.shape[1], v.shape[1]

    def at(values: Tensor, ends: Tensor, level: Tensor) -> Tensor:
        turn = level.floor()
        index = torch.searchsorted(ends.detach().contiguous(), (level - turn).contiguous())
        return values.gather(1, index.clamp_(max=values.shape[1] - 1)) + turn

    with torch.no_grad():
        low, high = u.new_full((len(u), 1), -1.0), u.new_full((len(u), 1), 1.0)
        following = torch.cat([v[:, 1:], v[:, :1] + 1], 1)
        for _ in range(BISECTIONS):
            shift = (low + high) / 2
            opposite = at(u, u_ends, v_ends - shift)  # what meets the jump from v_j to v_(j+1)
            slope = ((opposite - following).abs().pow(p) - (opposite - v).abs().pow(p)).sum(1, keepdim=True)
            low, high = torch.where(slope < 0, shift, low), torch.where(slope < 0, high, shift)
        shift = (low + high) / 2
    if a is not None or b is not None:
        shift = _moving(shift, u_ends, v_ends)
    edges = u.new_zeros(len(u), 1)
    inner = (v_ends - shift).remainder(1)
    levels = torch.cat([edges, u_ends[:, : n - 1], inner[:, :m], edges + 1], 1).sort(1)[0]
    middle = (levels[:, 1:] + levels[:, :-1]).detach() / 2
    d = at(u, u_ends, middle) - at(v, v_ends, middle + shift)
    return (levels.diff(dim=1) * d.abs().pow(p)).sum(1)


def _moving(shift: Tensor, u_ends: Tensor, v_ends: Tensor) -> Tensor:
    """The shift, differentiable in the weights: the best one lets a step of u meet one of v, and goes with them."""
    level = (v_ends.detach() - shift).remainder(1)
    n, m = u_ends.shape[1], v_ends.shape[1]
    above = torch.searchsorted(u_ends.detach().contiguous(), level.contiguous()).clamp_(max=n - 1)
    step = torch.cat([above, (above - 1) % n], 1)  # the first follows the last, around the circle
    gap = u_ends.detach().gather(1, step) - level.repeat(1, 2)
    nearest = (gap - gap.round()).abs().argmin(1, keepdim=True)
    meeting = v_ends.gather(1, nearest % m) - u_ends.gather(1, step.gather(1, nearest))
    return shift + (meeting - meeting.detach())


def _circle_ends(weights: Tensor | None, order: Tensor) -> Tensor:
    n = order.shape[1]
    if weights is None:
        return (torch.arange(1, n + 1, dtype=torch.float64, device=order.device) / n).expand(order.shape)
    weights = weights.double()
    return (weights / weights.sum())[order].cumsum(1)
