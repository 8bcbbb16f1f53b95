"""The sliced losses: checks, directions, one call of an op, a mean and a root.

Every loss of the family starts from W_p^p between the projections of two clouds on L directions. The p-th root of a
mean of zero has an infinite derivative; it is given the derivative zero, which is the right one at a minimum.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss._checks import FLOATS, check_device, check_reduction
from fastloss._ops import accumulation_dtype, no_second_derivative
from fastloss.sliced.ops import (
    sliced_costs,
    sliced_mean,
    sliced_mean_and_gradients,
    sort_slices,
)

SAMPLERS = ("random", "orthogonal", "qmc")


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
    r"""Sliced Wasserstein distance between point clouds, W_p^p averaged over directions.

    .. math::
        \mathrm{SW}_p^p = \frac1L \sum_{l=1}^L \int_0^1 \bigl| F_l^{-1}(q) - G_l^{-1}(q) \bigr|^p\, dq

    with the quantile functions of the clouds projected on direction l; for n = m and equal weights the integral is
    the mean of \|x_(i) - y_(i)\|^p over the sorted projections.

    Args:
        x: (..., n, d) points, n >= 1; float64, float32, bfloat16 or float16; any strides. Differentiable.
        y: (..., m, d) points, m >= 1; the leading dimensions broadcast against those of `x`. Differentiable.
        n_projections: L >= 1, the number of directions drawn; ignored with `projections`.
        p: >= 1; 1 and 2 are the fastest.
        x_weights: (..., n) or (n,), non-negative, sum one (to 1e-4; 1e-8 in float64; 1e-2 in 16 bits); None for 1/n.
            Differentiable: the gradient is the dual potential with mean zero, which is the derivative of the distance
            of weights divided by their sum.
        y_weights: (..., m) or (m,), likewise.
        projections: (L, d), used as they are (not normalised). Differentiable. None draws unit vectors.
        sampler: "random" (uniform on the sphere), "orthogonal" (rows of random orthogonal matrices, d at a time) or
            "qmc" (a scrambled Sobol sequence mapped to the sphere).
        generator: of the random numbers; None for torch's default one.
        root: True gives (SW_p^p)^(1/p) of each pair of clouds; its gradient is defined as zero where it is zero.
        streaming: True draws and uses directions block by block, so that not even they are stored: memory does not
            depend on L. Excludes `projections`.
        reduction: over the leading dimensions: "none", "sum" or "mean".

    Returns:
        float64 for float64 inputs, float32 otherwise (16-bit inputs are projected and sorted in float32). Identical
        clouds give 0 with gradient 0. NaN in a cloud makes its loss and gradient NaN.

    Raises:
        TypeError: not floating tensors, `p` not a number.
        ValueError: shapes that do not fit, empty clouds, p < 1, weights that are negative, not finite or do not sum to
            one, projections of zero norm, unknown `sampler` or `reduction`. Values are not checked under
            ``torch.compile`` and ``vmap``.
        RuntimeError: a second derivative is asked for.

    Memory:
        O((n + m) d), the gradients, and 12 MiB of projections (four slices if they are larger) with 24 (n + m) bytes of
        buffers a thread, whatever L. Gradients of up to 32 MiB are found in the forward pass and held twice; larger
        ones are found by sorting again in the backward pass. Gradients in `projections` add L d, in weights double the
        projections.

    Determinism:
        The result does not depend on the number of threads as far as the BLAS library's products do not. Equal
        projections are paired in the order of the points.

    Source:
        Bonneel, Rabin, Peyré and Pfister, *Sliced and Radon Wasserstein barycenters of measures*, 2015.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> fastloss.sliced_wasserstein(x, x + 2, projections=torch.eye(2))
        tensor(4.)
    """
    name = "sliced_wasserstein"
    check_reduction(name, reduction)
    _check_p(name, p)
    x, y, a, b, lead = _clouds(name, x, y, x_weights, y_weights)
    if streaming:
        if projections is not None:
            raise ValueError(f"{name}: `projections` must be None with `streaming`, got a tensor")
        _check_count(name, n_projections)
        _check_sampler(name, sampler)
        mean = _streamed(x, y, a, b, n_projections, float(p), sampler, generator)
    else:
        theta = _directions(name, x, n_projections, projections, sampler, generator)
        mean = sliced_mean(x, y, theta, a, b, float(p))
    return _reduce((_root(mean, p) if root else mean).reshape(lead), reduction)


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
    r"""Largest W_p^p over directions, found by projected gradient ascent on the sphere from several starts.

    .. math::
        \max_{|\theta| = 1} W_p^p(\theta_\# \mu, \theta_\# \nu)

    Each start moves along the tangent of its gradient, by an angle that halves whenever the value does not grow, so the
    value never falls. The gradient in the points is that at the best direction found (Danskin's theorem).

    Args:
        x: (n, d) points, n >= 1; float64, float32, bfloat16 or float16; any strides. Differentiable.
        y: (m, d) points, m >= 1. Differentiable.
        n_projections: random starts >= 1; ignored with `projections`.
        n_steps: steps of the ascent >= 0; 0 gives the largest of the starts.
        step_size: > 0, the first tangent step; 1 turns a direction by 45 degrees.
        p: >= 1.
        x_weights: (n,), non-negative, sum one; None for 1/n. Differentiable.
        y_weights: (m,), likewise.
        projections: (L, d), the starts; normalised here.
        generator: of the starts; None for torch's default one.
        root: True gives the p-th root, with gradient zero where it is zero.

    Returns:
        float64 for float64 inputs, float32 otherwise: a lower bound of the maximum. Identical clouds give 0.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`sliced_wasserstein`; n_steps < 0, step_size <= 0.

    Memory, determinism:
        As :func:`sliced_wasserstein`. Work: 2 n_steps sweeps over the starts.

    Source:
        Deshpande et al., *Max-sliced Wasserstein distance and its use for GANs*, 2019.

    Example:
        >>> x = torch.zeros(3, 2)
        >>> fastloss.max_sliced_wasserstein(x, x + torch.tensor([3.0, 4.0]))  # the distance of the means, squared
        tensor(25...)
    """
    name = "max_sliced_wasserstein"
    _check_p(name, p)
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 0:
        raise ValueError(f"{name}: `n_steps` must be an integer >= 0, got {n_steps!r}")
    if not step_size > 0:
        raise ValueError(f"{name}: `step_size` must be positive, got {step_size!r}")
    _check_dims(name, ("x", x), ("y", y))
    x, y, a, b, _ = _clouds(name, x, y, x_weights, y_weights)
    theta = _directions(name, x, n_projections, projections, "random", generator)
    theta = F.normalize(theta.detach().to(accumulation_dtype(x.dtype)), dim=1)
    fixed_x, fixed_y = x.detach(), y.detach()
    fixed_a, fixed_b = (None if w is None else w.detach() for w in (a, b))

    def costs(directions: Tensor) -> Tensor:
        return sliced_costs(fixed_x, fixed_y, directions, fixed_a, fixed_b, float(p))[0]

    best = costs(theta)
    step = torch.full_like(best, step_size)
    for _ in range(n_steps):
        moving = theta.clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(costs(moving).sum(), moving)
        tangent = slope - (slope * theta).sum(1, keepdim=True) * theta
        trial = F.normalize(theta + step[:, None] * F.normalize(tangent, dim=1), dim=1)
        value = costs(trial)
        better = value > best
        theta = torch.where(better[:, None], trial, theta)
        best = torch.where(better, value, best)
        step = torch.where(better, step, step / 2)
    mean = sliced_mean(x, y, theta[best.argmax()].unsqueeze(0), a, b, float(p))[0]
    return _root(mean, p) if root else mean


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
    r"""Energy-based sliced Wasserstein distance: directions count the more, the farther the projections are apart.

    .. math::
        \sum_l w_l W_p^p(l), \qquad w_l = \frac{f(W_p^p(l))}{\sum_k f(W_p^p(k))}

    by importance sampling from the uniform distribution; f is exp, the identity or the square.

    Args:
        x: (..., n, d) points, n >= 1; float64, float32, bfloat16 or float16; any strides. Differentiable.
        y: (..., m, d) points, m >= 1; the leading dimensions broadcast against those of `x`. Differentiable.
        n_projections: directions drawn >= 1; ignored with `projections`.
        p: >= 1.
        x_weights: (..., n) or (n,), non-negative, sum one; None for 1/n. Differentiable.
        y_weights: (..., m) or (m,), likewise.
        projections: (L, d), used as they are. Differentiable. None draws unit vectors.
        sampler: "random", "orthogonal" or "qmc".
        generator: of the random numbers; None for torch's default one.
        energy: f: "exp", "identity" or "square". Where all costs are zero, the last two weigh all directions equally.
        detach_weights: False differentiates w_l as well.
        root: True gives the p-th root, with gradient zero where it is zero.
        reduction: over the leading dimensions: "none", "sum" or "mean".

    Returns:
        float64 for float64 inputs, float32 otherwise.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`sliced_wasserstein`; unknown `energy`.

    Memory, determinism:
        As :func:`sliced_wasserstein`, and the costs (..., L). The backward pass sorts again.

    Source:
        Nguyen and Ho, *Energy-based sliced Wasserstein distance*, 2023.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> fastloss.energy_sliced_wasserstein(x, x + 2, projections=torch.eye(2))
        tensor(4.)
    """
    name = "energy_sliced_wasserstein"
    check_reduction(name, reduction)
    _check_p(name, p)
    if energy not in ("exp", "identity", "square"):
        raise ValueError(f"{name}: `energy` must be 'exp', 'identity' or 'square', got {energy!r}")
    x, y, a, b, lead = _clouds(name, x, y, x_weights, y_weights)
    theta = _directions(name, x, n_projections, projections, sampler, generator)
    costs = sliced_costs(x, y, theta, a, b, float(p))
    seen = costs.detach() if detach_weights else costs
    if energy == "exp":
        weights = seen.softmax(-1)
    else:
        power = seen if energy == "identity" else seen.square()
        total = power.sum(-1, keepdim=True)
        zero = total == 0
        weights = torch.where(zero, 1 / costs.shape[-1], power / torch.where(zero, 1, total))
    mean = (weights * costs).sum(-1)
    return _reduce((_root(mean, p) if root else mean).reshape(lead), reduction)


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
    r"""Sliced Wasserstein distances between all pairs of many clouds, each slice of each cloud sorted once.

    .. math::
        D_{ij} = \frac1L \sum_{l=1}^L W_p^p(\theta_{l\#} x^i, \theta_{l\#} y^j)

    Args:
        xs: (K, n, d), K clouds, K >= 1, n >= 1; float64, float32, bfloat16 or float16; any strides. Differentiable.
        ys: (M, m, d), M clouds, of another size if need be; None: `xs`, and the matrix is symmetric. Differentiable.
        n_projections: directions drawn >= 1, the same for all clouds; ignored with `projections`.
        p: >= 1.
        projections: (L, d), used as they are. Differentiable. None draws unit vectors.
        sampler: "random", "orthogonal" or "qmc".
        generator: of the random numbers; None for torch's default one.
        root: True gives the p-th root entry by entry, with gradient zero where it is zero.

    Returns:
        (K, M), float64 for float64 inputs, float32 otherwise. Zero on the diagonal without `ys`.

    Raises:
        TypeError, ValueError: as :func:`sliced_wasserstein`; no clouds.
        RuntimeError: a second derivative is asked for.

    Memory:
        O(K L n + M L m): the sorted slices and where they came from, and blocks of differences of at most 32 MiB (one
        row of pairs if that is larger).

    Determinism:
        As :func:`sliced_wasserstein`.

    Source:
        Kolouri, Zou and Rohde, *Sliced Wasserstein kernels for probability distributions*, 2016.

    Example:
        >>> clouds = torch.tensor([[[0.0], [1.0]], [[2.0], [3.0]]])
        >>> fastloss.sliced_wasserstein_matrix(clouds, projections=torch.ones(1, 1))
        tensor([[0., 4.],
                [4., 0.]])
    """
    name = "sliced_wasserstein_matrix"
    _check_p(name, p)
    for what, clouds in (("xs", xs), ("ys", ys)):
        if clouds is not None:
            _check_cloud(name, what, clouds)
            if clouds.dim() != 3 or len(clouds) == 0:
                raise ValueError(
                    f"{name}: `{what}` must have shape (clouds, points, d) with at least one cloud, "
                    f"got {tuple(clouds.shape)}"
                )
    if ys is not None:
        _check_width(name, "ys", ys, "xs", xs)
        dtype = torch.promote_types(xs.dtype, ys.dtype)
        xs, ys = xs.to(dtype), ys.to(dtype)
    theta = _directions(name, xs, n_projections, projections, sampler, generator)
    u = torch.stack([sort_slices(x, theta)[0] for x in xs])
    v = u if ys is None else torch.stack([sort_slices(y, theta)[0] for y in ys])
    n, m = u.shape[2], v.shape[2]
    if n != m:
        # Both on the common grid of quantile levels, the same for all pairs.
        levels_x, levels_y = (torch.arange(1, k + 1, dtype=torch.float64, device=u.device) / k for k in (n, m))
        ends = torch.cat([levels_x, levels_y]).unique()
        mass = ends.diff(prepend=ends.new_zeros(1)).to(u.dtype)
        u = u[:, :, torch.searchsorted(levels_x, ends).clamp_(max=n - 1)]
        v = v[:, :, torch.searchsorted(levels_y, ends).clamp_(max=m - 1)]
    else:
        mass = u.new_full((n,), 1 / n)
    rows = []
    columns = max(1, (32 << 20) // (u[0].numel() * u.element_size()))
    for k in range(len(u)):
        entries = [_mean_power(u[k] - part, p, mass) for part in v.split(columns)]
        rows.append(torch.cat(entries))
    matrix = torch.stack(rows) / u.shape[1]
    return _root(matrix, p) if root else matrix


def _mean_power(d: Tensor, p: float, mass: Tensor) -> Tensor:
    """(M, L, n) differences to (M,) sums of mass |d|^p."""
    power = d.abs() if p == 1 else d.square() if p == 2 else d.abs().pow(p)
    return (power @ mass).sum(1)


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
    r"""Sliced Gromov-Wasserstein: pairs of clouds compared by their own squared distances, slice by slice.

    .. math::
        \frac1L \sum_l \min_{\sigma \in \{\uparrow, \downarrow\}}
        \frac1{n^2} \sum_{ij} \bigl( (u_i - u_j)^2 - (v_{\sigma(i)} - v_{\sigma(j)})^2 \bigr)^2

    with the sorted projections u, v of both clouds, matched in ascending or in descending order. The double sum is
    taken in closed form from moments, in O(n).

    Args:
        x: (..., n, d) points, n >= 1; float64, float32, bfloat16 or float16; any strides. Differentiable.
        y: (..., n, d) points, as many as `x`. Differentiable.
        n_projections: directions drawn >= 1; ignored with `projections`.
        projections: (L, d), used as they are. Differentiable. None draws unit vectors.
        sampler: "random", "orthogonal" or "qmc".
        generator: of the random numbers; None for torch's default one.
        reduction: over the leading dimensions: "none", "sum" or "mean".

    Returns:
        float64 for float64 inputs, float32 otherwise. Does not change when a cloud is shifted or mirrored.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`sliced_wasserstein`; clouds of different sizes.

    Memory:
        O(L n) a pair: the sorted slices and their powers in float64.

    Determinism:
        As :func:`sliced_wasserstein`.

    Source:
        Vayer et al., *Sliced Gromov-Wasserstein*, 2019.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> fastloss.sliced_gromov_wasserstein(x, 5 - x, projections=torch.ones(1, 1))
        tensor(0.)
    """
    name = "sliced_gromov_wasserstein"
    check_reduction(name, reduction)
    x, y, _, _, lead = _clouds(name, x, y, None, None)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{name}: `y` must have as many points as `x`, {x.shape[1]}, got {y.shape[1]}")
    theta = _directions(name, x, n_projections, projections, sampler, generator)
    values = [_gromov(sort_slices(cx, theta)[0], sort_slices(cy, theta)[0]) for cx, cy in zip(x, y, strict=True)]
    if not values:
        return _reduce(x.new_empty(lead, dtype=accumulation_dtype(x.dtype)), reduction)
    return _reduce(torch.stack(values).reshape(lead), reduction)


def _gromov(u: Tensor, v: Tensor) -> Tensor:
    """Mean over the slices of the better of both orders. With centred u and v and means <.>,
    <(D_u - D_v)^2> over pairs = sum of D_u^2 = 2<u^4> + 6<u^2>^2, likewise v, and the cross term
    <D_u D_v> = 2<u^2 v^2> + 2<u^2><v^2> + 4<uv>^2 (odd moments enter with products of means, which are zero)."""
    dtype = u.dtype
    u, v = u.double(), v.double()
    u, v = u - u.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    u2, v2 = u.square(), v.square()

    def own(w2: Tensor) -> Tensor:
        return 2 * w2.square().mean(1) + 6 * w2.mean(1).square()

    def cross(w: Tensor) -> Tensor:
        return 2 * (u2 * w.square()).mean(1) + 2 * u2.mean(1) * v2.mean(1) + 4 * (u * w).mean(1).square()

    both = torch.maximum(cross(v), cross(v.flip(1)))
    return (own(u2) + own(v2) - 2 * both).clamp(min=0).mean().to(dtype)


def soft_correspondence(x: Tensor, y: Tensor, temperature: float | Tensor = 0.07) -> Tensor:
    r"""Points of y averaged by the softmax of their similarity to each point of x, without the n by m matrix.

    .. math::
        \hat y_i = \sum_j \frac{\exp(x_i \cdot y_j / \tau)}{\sum_k \exp(x_i \cdot y_k / \tau)}\, y_j

    The soft correspondence of shape matching: ``sliced_wasserstein(x, soft_correspondence(x, y))`` is linear in memory.
    It is attention with keys and values y, and runs on PyTorch's fused attention.

    Args:
        x: (..., n, d) features, n >= 1; float64, float32, bfloat16 or float16; any strides. Differentiable.
        y: (..., m, d) features, m >= 1, with the leading dimensions of `x`. Differentiable.
        temperature: tau, a positive float, or a 0-dim tensor, differentiable.

    Returns:
        (..., n, d) in the common dtype of the inputs.

    Raises:
        TypeError: not floating tensors.
        ValueError: shapes that do not fit, empty clouds, a float temperature that is not finite and positive.

    Memory:
        O((n + m) d) on devices where PyTorch's attention has a memory-linear kernel (CPU: all dtypes).

    Determinism:
        As ``torch.nn.functional.scaled_dot_product_attention``: deterministic on CPU.

    Source:
        Le et al., *Integrating efficient optimal transport and functional maps for unsupervised shape correspondence
        learning*, 2024.

    Example:
        >>> fastloss.soft_correspondence(torch.eye(2), torch.eye(2), temperature=0.001)
        tensor([[1., 0.],
                [0., 1.]])
    """
    name = "soft_correspondence"
    for what, cloud in (("x", x), ("y", y)):
        _check_cloud(name, what, cloud)
    _check_width(name, "y", y, "x", x)
    if x.shape[:-2] != y.shape[:-2]:
        raise ValueError(f"{name}: `y` must have the leading dimensions of `x`, {tuple(x.shape)}, got {tuple(y.shape)}")
    if not isinstance(temperature, Tensor):
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise TypeError(f"{name}: `temperature` must be a float or a tensor, got {type(temperature).__name__}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"{name}: `temperature` must be finite and positive, got {temperature}")
    elif temperature.dim():
        raise ValueError(f"{name}: `temperature` must be a 0-dim tensor, got shape {tuple(temperature.shape)}")
    dtype = torch.promote_types(x.dtype, y.dtype)
    lead, (n, d), m = x.shape[:-2], x.shape[-2:], y.shape[-2]
    query = (x.to(dtype) / temperature).to(dtype).reshape(-1, 1, n, d)
    keys = y.to(dtype).reshape(-1, 1, m, d)
    return F.scaled_dot_product_attention(query, keys, keys, scale=1.0).reshape(*lead, n, d)


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
    r"""Sliced Wasserstein distance, a drop-in for ``ot.sliced_wasserstein_distance`` on PyTorch tensors.

    .. math::
        \Bigl( \frac1L \sum_{l=1}^L W_p^p(\theta_{l\#} \mu, \theta_{l\#} \nu) \Bigr)^{1/p}

    The same seed, or the same projections, gives POT's number. Where POT gives NaN gradients (identical clouds) or
    accepts weights that do not sum to one, this function gives zero gradients and an error.

    Args:
        X_s: (n, d) points, n >= 1; float64, float32, bfloat16 or float16; any strides. Differentiable.
        X_t: (m, d) points, m >= 1. Differentiable.
        a: (n,), non-negative, sum one; None for 1/n. Differentiable.
        b: (m,), likewise.
        n_projections: directions drawn >= 1; ignored with `projections`.
        p: >= 1.
        projections: (d, L), columns, used as they are. Differentiable.
        seed: an int seeds a generator of this call; a ``torch.Generator`` is used and advanced; None draws from torch's
            default generator (POT has one of its own).
        log: True returns ``(value, {"projections": (d, L), "projected_emds": (L,)})``, with W_p^p of each direction.
        scaler: None, an object with ``transform``, or a callable, applied to both clouds first.

    Returns:
        A 0-dim tensor, float64 for float64 inputs, float32 otherwise.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`sliced_wasserstein`.

    Memory, determinism:
        As :func:`sliced_wasserstein`; with `log`, the backward pass sorts again.

    Source:
        Bonneel, Rabin, Peyré and Pfister, *Sliced and Radon Wasserstein barycenters of measures*, 2015.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> fastloss.sliced_wasserstein_distance(x, x + 2, projections=torch.eye(2))
        tensor(2.)
    """
    name = "sliced_wasserstein_distance"
    x, y, theta, a, b = _pot_arguments(name, X_s, X_t, a, b, n_projections, p, projections, seed, scaler)
    if not log:
        return _root(sliced_mean(x, y, theta.t(), a, b, float(p))[0], p)
    costs = sliced_costs(x, y, theta.t(), a, b, float(p))[0]
    return _root(costs.mean(), p), {"projections": theta, "projected_emds": costs}


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
    r"""Largest Wasserstein distance over the directions drawn, a drop-in for ``ot.max_sliced_wasserstein_distance``.

    .. math::
        \Bigl( \max_l W_p^p(\theta_{l\#} \mu, \theta_{l\#} \nu) \Bigr)^{1/p}

    :func:`max_sliced_wasserstein` also improves the direction.

    Args:
        X_s: (n, d) points, n >= 1; float64, float32, bfloat16 or float16; any strides. Differentiable.
        X_t: (m, d) points, m >= 1. Differentiable.
        a: (n,), non-negative, sum one; None for 1/n. Differentiable.
        b: (m,), likewise.
        n_projections: directions drawn >= 1; ignored with `projections`.
        p: >= 1.
        projections: (d, L), columns, used as they are. Differentiable.
        seed: as in :func:`sliced_wasserstein_distance`.
        log: True returns ``(value, {"projections": (d, L), "projected_emds": (L,)})``.
        scaler: None, an object with ``transform``, or a callable, applied to both clouds first.

    Returns:
        A 0-dim tensor, float64 for float64 inputs, float32 otherwise.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`sliced_wasserstein`.

    Memory, determinism:
        As :func:`sliced_wasserstein`; the backward pass sorts again.

    Source:
        Deshpande et al., *Max-sliced Wasserstein distance and its use for GANs*, 2019.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> fastloss.max_sliced_wasserstein_distance(x, x + torch.tensor([2.0, 3.0]), projections=torch.eye(2))
        tensor(3.)
    """
    name = "max_sliced_wasserstein_distance"
    x, y, theta, a, b = _pot_arguments(name, X_s, X_t, a, b, n_projections, p, projections, seed, scaler)
    costs = sliced_costs(x, y, theta.t(), a, b, float(p))[0]
    value = _root(costs.max(), p)
    return (value, {"projections": theta, "projected_emds": costs}) if log else value


def _pot_arguments(
    function: str,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    count: int,
    p: float,
    projections: Tensor | None,
    seed: int | torch.Generator | None,
    scaler: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Clouds (1, n, d) and (1, m, d), directions as columns (d, L), weights (1, n) and (1, m)."""
    _check_p(function, p)
    if scaler is not None:
        transform = getattr(scaler, "transform", scaler)
        if not callable(transform):
            raise TypeError(f"{function}: `scaler` must have `transform` or be callable, got {type(scaler).__name__}")
        x, y = transform(x), transform(y)
    _check_dims(function, ("X_s", x), ("X_t", y))
    x, y, a, b, _ = _clouds(function, x, y, a, b, "X_s X_t a b")
    dtype, d = accumulation_dtype(x.dtype), x.shape[-1]
    if projections is None:
        _check_count(function, count)
        generator = _seeded(function, seed)
        source = x.device if generator is None else generator.device
        drawn = torch.randn(d, count, dtype=dtype, generator=generator, device=source)
        return x, y, (drawn / drawn.square().sum(0, keepdim=True).sqrt()).to(x.device), a, b
    if isinstance(projections, Tensor) and (projections.dim() != 2 or projections.shape[0] != d):
        raise ValueError(f"{function}: `projections` must have shape ({d}, L), got {tuple(projections.shape)}")
    given = projections.t() if isinstance(projections, Tensor) else projections
    return x, y, _directions(function, x, count, given, "random", None).t(), a, b


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
    whole turns. The shift s is found by bisection on the slope of a convex function, and the derivative is taken at
    that shift.

    Args:
        X_s: (n, d) unit vectors (to 1e-4), n >= 1, d >= 2; float64 or float32; any strides. Differentiable.
        X_t: (m, d) unit vectors, m >= 1. Differentiable.
        a: (n,), non-negative, sum one; None for 1/n. Differentiable.
        b: (m,), likewise.
        n_projections: great circles drawn >= 1; ignored with `projections`.
        p: >= 1.
        projections: (L, d, 2), orthonormal columns that span the planes of the circles.
        seed: an int seeds a generator of this call; a ``torch.Generator`` is used and advanced; None draws from torch's
            default generator.
        log: True returns ``(value, {"projections": (L, d, 2), "projected_emds": (L,)})``.

    Returns:
        A 0-dim tensor of the dtype of the points. Zero has gradient zero.

    Raises:
        TypeError: not floating tensors, `p` not a number.
        ValueError: shapes that do not fit, vectors that are not unit vectors, bad weights, p < 1.

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
    _check_p(name, p)
    frames, a, b = _sphere_arguments(name, (X_s, X_t), (a, b), n_projections, projections, seed)
    costs = _circle_costs(_on_circle(X_s, frames), _on_circle(X_t, frames), a, b, float(p)).to(X_s.dtype)
    value = _root(costs.mean(), p)
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

    in closed form: a variance.

    Args:
        X_s: (n, d) unit vectors (to 1e-4), n >= 1, d >= 2; float64 or float32; any strides. Differentiable.
        a: (n,), non-negative, sum one; None for 1/n. Differentiable.
        n_projections: great circles drawn >= 1; ignored with `projections`.
        projections: (L, d, 2), orthonormal columns that span the planes of the circles.
        seed: as in :func:`sliced_wasserstein_sphere`.
        log: True returns ``(value, {"projections": (L, d, 2), "projected_emds": (L,)})``.

    Returns:
        A 0-dim tensor of the dtype of the points.

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
    frames, a, _ = _sphere_arguments(name, (X_s,), (a, None), n_projections, projections, seed)
    u, order = _on_circle(X_s, frames).double().sort(1)
    weights = torch.full_like(u, 1 / u.shape[1]) if a is None else (a.double() / a.double().sum())[order]
    middle = weights.cumsum(1) - weights / 2
    mean = (weights * u).sum(1, keepdim=True) - 0.5
    costs = ((weights * (u - middle - mean).square()).sum(1) + weights.pow(3).sum(1) / 12).to(X_s.dtype)
    value = _root(costs.mean(), 2)
    return (value, {"projections": frames, "projected_emds": costs}) if log else value


def _sphere_arguments(
    function: str,
    clouds: tuple[Tensor, ...],
    weights: tuple[Tensor | None, Tensor | None],
    count: int,
    projections: Tensor | None,
    seed: int | torch.Generator | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Planes (L, d, 2) and checked weights."""
    first = clouds[0]
    for name, x in zip(("X_s", "X_t"), clouds, strict=False):
        _check_cloud(function, name, x)
        _check_dims(function, (name, x))
        _check_width(function, name, x, "X_s", first)
        if _values_are_known(x) and bool((x.detach().square().sum(1) - 1).abs().gt(1e-4).any()):
            raise ValueError(f"{function}: `{name}` must consist of unit vectors (to 1e-4), got others")
    d = first.shape[1]
    if d < 2:
        raise ValueError(f"{function}: `X_s` must have at least two dimensions, got {tuple(first.shape)}")
    checked = [
        None if w is None else _check_weights(function, name, w, x)
        for name, w, x in zip(("a", "b"), weights, (first, clouds[-1]), strict=True)
    ]
    if projections is not None:
        if not isinstance(projections, Tensor) or projections.dim() != 3 or projections.shape[1:] != (d, 2):
            got = tuple(projections.shape) if isinstance(projections, Tensor) else type(projections).__name__
            raise ValueError(f"{function}: `projections` must be a tensor of shape (L, {d}, 2), got {got}")
        return projections.to(first.dtype), checked[0], checked[1]
    _check_count(function, count)
    generator = _seeded(function, seed)
    source = first.device if generator is None else generator.device
    normal = torch.randn(count, d, 2, dtype=first.dtype, generator=generator, device=source)
    return torch.linalg.qr(normal)[0].to(first.device), checked[0], checked[1]


def _seeded(function: str, seed: Any) -> torch.Generator | None:
    if isinstance(seed, bool) or not (seed is None or isinstance(seed, (int, torch.Generator))):
        raise TypeError(f"{function}: `seed` must be None, an int or a torch.Generator, got {type(seed).__name__}")
    return torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed


def _on_circle(x: Tensor, frames: Tensor) -> Tensor:
    """(L, n) angles of the projections, as fractions of a turn in [0, 1)."""
    flat = torch.einsum("ldk,nd->lnk", frames, x)
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
    edges = u.new_zeros(len(u), 1)
    inner = (v_ends - shift).remainder(1)
    levels = torch.cat([edges, u_ends[:, : n - 1], inner[:, :m], edges + 1], 1).sort(1)[0]
    middle = (levels[:, 1:] + levels[:, :-1]).detach() / 2
    d = at(u, u_ends, middle) - at(v, v_ends, middle + shift)
    return (levels.diff(dim=1) * d.abs().pow(p)).sum(1)


def _circle_ends(weights: Tensor | None, order: Tensor) -> Tensor:
    n = order.shape[1]
    if weights is None:
        return (torch.arange(1, n + 1, dtype=torch.float64, device=order.device) / n).expand(order.shape)
    weights = weights.double()
    return (weights / weights.sum())[order].cumsum(1)


# ---------------------------------------------------------------- directions


def _draw(
    count: int, d: int, sampler: str, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(count, d) unit vectors, drawn where the generator lives."""
    source = device if generator is None else generator.device
    if sampler == "random":
        theta = torch.randn(count, d, dtype=dtype, generator=generator, device=source)
        return F.normalize(theta, dim=1).to(device)
    if sampler == "orthogonal":
        blocks = []
        for _ in range(-(-count // d)):
            normal = torch.randn(d, d, dtype=torch.float64, generator=generator, device=source)
            q, r = torch.linalg.qr(normal)
            blocks.append((q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T)  # signs make it uniform
        return torch.cat(blocks)[:count].to(device=device, dtype=dtype)
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=source))
    uniform = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    edge = 2.0**-33  # half the spacing of the sequence: its end points are not quantiles
    normal = math.sqrt(2) * torch.erfinv(2 * uniform.clamp(edge, 1 - edge) - 1)
    return F.normalize(normal, dim=1).to(device=device, dtype=dtype)


def _directions(
    function: str,
    x: Tensor,
    count: int,
    projections: Tensor | None,
    sampler: str,
    generator: torch.Generator | None,
) -> Tensor:
    """(L, d) in the accumulation dtype of x."""
    _check_sampler(function, sampler)
    d, dtype = x.shape[-1], accumulation_dtype(x.dtype)
    if projections is None:
        _check_count(function, count)
        return _draw(count, d, sampler, generator, dtype, x.device)
    if not isinstance(projections, Tensor):
        raise TypeError(
            f"{function}: `projections` must be a tensor of shape (L, {d}), got {type(projections).__name__}"
        )
    if projections.dtype not in FLOATS:
        raise TypeError(f"{function}: `projections` must be a floating-point tensor, got {projections.dtype}")
    if projections.dim() != 2 or projections.shape[1] != d or len(projections) == 0:
        raise ValueError(f"{function}: `projections` must have shape (L, {d}), L >= 1, got {tuple(projections.shape)}")
    check_device(function, "projections", projections, "the points", x)
    if _values_are_known(projections) and bool((projections.detach() == 0).all(1).any()):
        row = int((projections.detach() == 0).all(1).nonzero()[0])
        raise ValueError(f"{function}: `projections` must have no row of zero norm, got zeros in row {row}")
    return projections.to(dtype)


STREAM_ROWS = 256


class _Accumulated(torch.autograd.Function):
    """Mean over streamed blocks of directions; the gradients are summed as the blocks come."""

    @staticmethod
    def forward(ctx: Any, draw: Any, count: int, p: float, *tensors: Tensor | None) -> Tensor:
        needs = tuple(ctx.needs_input_grad[3:])
        x, y, a, b = tensors
        assert x is not None
        assert y is not None
        total = torch.zeros(len(x), dtype=accumulation_dtype(x.dtype), device=x.device)
        sums: list[Tensor | None] = [None] * len(tensors)
        for start in range(0, count, STREAM_ROWS):
            rows = min(STREAM_ROWS, count - start)
            mean, found = sliced_mean_and_gradients(x, y, draw(rows), a, b, p, needs)
            total.add_(mean, alpha=rows / count)
            for k, g in enumerate(found):
                if g is not None:
                    before = sums[k]
                    sums[k] = g.mul_(rows / count) if before is None else before.add_(g, alpha=rows / count)
        ctx.save_for_backward(*[s for s in sums if s is not None])
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise no_second_derivative("sliced")
        saved = iter(ctx.saved_tensors)
        result: list[Tensor | None] = []
        for need in ctx.needs_input_grad[3:]:
            g = next(saved) if need else None
            result.append(None if g is None else g * grad.reshape(-1, *[1] * (g.dim() - 1)))
        return (None, None, None, *result)


def _streamed(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    count: int,
    p: float,
    sampler: str,
    generator: torch.Generator | None,
) -> Tensor:
    dtype, d = accumulation_dtype(x.dtype), x.shape[-1]

    def draw(rows: int) -> Tensor:
        return _draw(rows, d, sampler, generator, dtype, x.device)

    result: Tensor = _Accumulated.apply(draw, count, p, x, y, a, b)
    return result


# ---------------------------------------------------------------- checks


def _check_p(function: str, p: Any) -> None:
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{function}: `p` must be a number, got {type(p).__name__}")
    if not (math.isfinite(p) and p >= 1):
        raise ValueError(f"{function}: `p` must be finite and at least 1, got {p}")


def _check_count(function: str, count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{function}: `n_projections` must be an integer >= 1, got {count!r}")


def _check_sampler(function: str, sampler: Any) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"{function}: `sampler` must be 'random', 'orthogonal' or 'qmc', got {sampler!r}")


def _check_cloud(function: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: `{name}` must be a tensor of shape (..., points, d), got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{function}: `{name}` must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() < 2 or x.shape[-1] == 0 or x.shape[-2] == 0:
        raise ValueError(
            f"{function}: `{name}` must have shape (..., points, d) with at least one point and one dimension, "
            f"got {tuple(x.shape)}"
        )


def _check_dims(function: str, *clouds: tuple[str, Any]) -> None:
    for name, x in clouds:
        if isinstance(x, Tensor) and x.dim() != 2:
            raise ValueError(f"{function}: `{name}` must have shape (points, d), got {tuple(x.shape)}")


def _check_width(function: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{function}: `{name}` must have the width of `{other_name}`, {other.shape[-1]}, got {x.shape[-1]}"
        )
    check_device(function, name, x, other_name, other)


def _values_are_known(x: Tensor) -> bool:
    """Whether numbers can be looked at here: not while tracing, nor under vmap."""
    return not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x))


def _check_weights(function: str, name: str, weights: Any, x: Tensor) -> Tensor:
    """Weights of the points of x, in its accumulation dtype."""
    n = x.shape[-2]
    if not isinstance(weights, Tensor):
        raise TypeError(f"{function}: `{name}` must be a tensor of shape (..., {n}), got {type(weights).__name__}")
    if weights.dtype not in FLOATS:
        raise TypeError(f"{function}: `{name}` must be a floating-point tensor, got {weights.dtype}")
    if weights.dim() < 1 or weights.shape[-1] != n:
        raise ValueError(f"{function}: `{name}` must have shape (..., {n}), got {tuple(weights.shape)}")
    check_device(function, name, weights, "the points", x)
    if _values_are_known(weights):
        seen = weights.detach().double()
        if not bool(seen.isfinite().all()):
            raise ValueError(f"{function}: `{name}` must be finite, got NaN or infinity")
        if bool((seen < 0).any()):
            raise ValueError(f"{function}: `{name}` must not be negative, got {float(seen.min()):.6g}")
        total = seen.sum(-1)
        tolerance = {torch.float64: 1e-8, torch.float32: 1e-4}.get(weights.dtype, 1e-2)
        if bool(((total - 1).abs() > tolerance).any()):
            worst = float(total.flatten()[(total - 1).abs().argmax()])
            raise ValueError(
                f"{function}: `{name}` must sum to one (to {tolerance:.0e}), got a sum of {worst:.6g}; "
                f"divide the weights by their sum"
            )
    return weights.to(accumulation_dtype(x.dtype))


def _clouds(
    function: str, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, names: str = "x y x_weights y_weights"
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, torch.Size]:
    """Checked clouds (B, n, d) and (B, m, d) of one dtype, weights (B, n) and (B, m), and the leading dimensions."""
    x_name, y_name, a_name, b_name = names.split()
    _check_cloud(function, x_name, x)
    _check_cloud(function, y_name, y)
    _check_width(function, y_name, y, x_name, x)
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if a is not None:
        a = _check_weights(function, a_name, a, x)
    if b is not None:
        b = _check_weights(function, b_name, b, y)
    leads = [x.shape[:-2], y.shape[:-2], *(w.shape[:-1] for w in (a, b) if w is not None)]
    try:
        lead = torch.broadcast_shapes(*leads)
    except RuntimeError:
        raise ValueError(
            f"{function}: the leading dimensions of the clouds and weights must broadcast, got "
            + ", ".join(str(tuple(s)) for s in leads)
        ) from None
    x, y = (t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (x, y))
    a, b = (None if w is None else w.expand(*lead, w.shape[-1]).reshape(-1, w.shape[-1]) for w in (a, b))
    return x, y, a, b, lead


def _root(mean: Tensor, p: float) -> Tensor:
    zero = mean == 0
    return torch.where(zero, 0, torch.where(zero, 1, mean).pow(1 / p))


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()
