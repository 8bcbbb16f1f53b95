"""The sliced losses: checks, directions, one call of an op, a mean and a root.

Every loss of the family starts from W_p^p between the projections of two clouds on L directions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss._checks import check_number, check_reduction
from fastloss._ops import accumulation_dtype, full_precision
from fastloss.sliced.arguments import (
    check_cloud,
    check_count,
    check_flags,
    check_generator,
    check_p,
    check_sampler,
    check_width,
    directions,
    draw,
    paired_clouds,
    reduced,
    rooted,
)
from fastloss.sliced.ops import costs_slope, sliced_costs, sliced_mean, sort_slices, streamed_mean


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
        p: >= 1; 1 and 2 are the fastest. \|difference\|^p must be representable: else it is zero or infinite.
        x_weights: (..., n) or (n,), non-negative, sum one (to 1e-4; 1e-8 in float64; 1e-2 in 16 bits); None for 1/n.
            Differentiable: the gradient is the dual potential with weighted mean zero, which is the derivative of the
            distance of weights divided by their sum.
        y_weights: (..., m) or (m,), likewise.
        projections: (L, d), used as they are (not normalised). Differentiable. None draws unit vectors.
        sampler: "random" (uniform on the sphere), "orthogonal" (rows of random orthogonal matrices, d at a time) or
            "qmc" (a scrambled Sobol sequence mapped to the sphere; under ``torch.func.vmap`` it needs
            ``randomness="same"``).
        generator: of the random numbers; None for torch's default one. ``torch.compile(fullgraph=True)`` traces neither
            generators nor "qmc".
        root: True gives (SW_p^p)^(1/p) of each pair of clouds; its gradient is defined as zero where it is zero.
        streaming: True draws and uses directions block by block, so that not even they are stored: memory does not
            depend on L. Excludes `projections`.
        reduction: over the leading dimensions: "none", "sum" or "mean".

    Returns:
        float64 for float64 inputs, float32 otherwise (16-bit inputs are projected and sorted in float32). Identical
        clouds give 0 with gradient 0. NaN in a cloud makes its loss and gradient NaN.

    Raises:
        TypeError: not dense floating tensors, `p` not a number, `root` or `streaming` not a bool, `generator` not one.
        ValueError: shapes that do not fit, empty clouds, p < 1, weights that are negative, not finite or do not sum to
            one, projections of zero norm, unknown `sampler` or `reduction`. Values are not checked under
            ``torch.compile`` and ``vmap``.
        RuntimeError: a second derivative is asked for; "qmc" directions that differ between elements of ``vmap``.

    Memory:
        O((n + m) d), the gradients, and 12 MiB of projections (four slices if they are larger) with 24 (n + m) bytes of
        buffers a thread, whatever L. Gradients of up to 32 MiB are found in the forward pass and held twice; larger
        ones are found by sorting again in the backward pass. Gradients in `projections` add L d, in weights double the
        projections. On a GPU a block is 64 MiB, of which a few are held, about twenty for unequal sizes or weights.

    Determinism:
        The result does not depend on the number of threads as far as the BLAS library's products do not. Equal
        projections are paired in the order of the points. On a GPU gradients for unequal sizes or weights are added up
        by atomics, in float64, unless ``torch.use_deterministic_algorithms`` is on.

    Source:
        Bonneel, Rabin, Peyré and Pfister, *Sliced and Radon Wasserstein barycenters of measures*, 2015.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> fastloss.sliced_wasserstein(x, x + 2, projections=torch.eye(2))
        tensor(4.)
    """
    name = "sliced_wasserstein"
    check_reduction(name, reduction)
    check_flags(name, root=root, streaming=streaming)
    p = check_p(name, p)
    x, y, a, b, lead = paired_clouds(name, x, y, x_weights, y_weights)
    if streaming:
        if projections is not None:
            raise ValueError(f"{name}: `projections` must be None with `streaming`, got a tensor")
        count = check_count(name, n_projections)
        check_sampler(name, sampler)
        check_generator(name, generator)
        d, dtype, device = x.shape[-1], accumulation_dtype(x.dtype), x.device

        def block(rows: int) -> Tensor:
            return draw(name, rows, d, sampler, generator, dtype, device)

        mean = streamed_mean(x, y, block, count, a, b, p)
    else:
        theta = directions(name, x, n_projections, projections, sampler, generator)
        mean = sliced_mean(x, y, theta, a, b, p)
    return reduced(rooted(mean, p) if root else mean, lead, reduction)


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
        step_size: finite and > 0, the first tangent step; 1 turns a direction by 45 degrees.
        p: >= 1.
        x_weights: (n,), non-negative, sum one; None for 1/n. Differentiable.
        y_weights: (m,), likewise.
        projections: (L, d), the starts; normalised here.
        generator: of the starts; None for torch's default one.
        root: True gives the p-th root, with gradient zero where it is zero.

    Returns:
        float64 for float64 inputs, float32 otherwise: a lower bound of the maximum. Identical clouds give 0.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`sliced_wasserstein`; n_steps < 0, step_size not finite or <= 0.

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
    check_flags(name, root=root)
    p = check_p(name, p)
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 0:
        raise ValueError(f"{name}: `n_steps` must be an integer >= 0, got {n_steps!r}")
    step_size = check_number(name, "step_size", step_size, above=0)
    x, y, a, b, _ = paired_clouds(name, x, y, x_weights, y_weights, batched=False)
    theta = directions(name, x, n_projections, projections, "random", generator)
    theta = F.normalize(theta.detach().to(accumulation_dtype(x.dtype)), dim=1)
    fixed_x, fixed_y = x.detach(), y.detach()
    fixed_a, fixed_b = (None if w is None else w.detach() for w in (a, b))

    def costs(directions: Tensor) -> Tensor:
        return sliced_costs(fixed_x, fixed_y, directions, fixed_a, fixed_b, p)[0]

    best = costs(theta)
    step = torch.full_like(best, step_size)
    for _ in range(n_steps):
        slope = costs_slope(fixed_x, fixed_y, theta, fixed_a, fixed_b, p)
        tangent = slope - (slope * theta).sum(1, keepdim=True) * theta
        trial = F.normalize(theta + step[:, None] * F.normalize(tangent, dim=1), dim=1)
        value = costs(trial)
        better = value > best
        theta = torch.where(better[:, None], trial, theta)
        best = torch.where(better, value, best)
        step = torch.where(better, step, step / 2)
    chosen = theta.index_select(0, best.argmax(0, keepdim=True))
    mean = sliced_mean(x, y, chosen, a, b, p)[0]
    return rooted(mean, p) if root else mean


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
    check_flags(name, detach_weights=detach_weights, root=root)
    p = check_p(name, p)
    if energy not in ("exp", "identity", "square"):
        raise ValueError(f"{name}: `energy` must be 'exp', 'identity' or 'square', got {energy!r}")
    x, y, a, b, lead = paired_clouds(name, x, y, x_weights, y_weights)
    theta = directions(name, x, n_projections, projections, sampler, generator)
    costs = sliced_costs(x, y, theta, a, b, p)
    seen = costs.detach() if detach_weights else costs
    if energy == "exp":
        weights = seen.softmax(-1)
    else:
        # In units of the largest, or squares and sums leave the range. The ratio does not change with the unit.
        unit = costs.detach().amax(-1, keepdim=True)
        zero = unit == 0
        share = seen / torch.where(zero, 1, unit)
        power = share if energy == "identity" else share.square()
        total = power.sum(-1, keepdim=True)
        weights = torch.where(zero, 1 / costs.shape[-1], power / torch.where(zero, 1, total))
    mean = (weights * costs).sum(-1)
    return reduced(rooted(mean, p) if root else mean, lead, reduction)


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
        ys: (M, m, d), M clouds, of another size if need be; None: `xs`, and the matrix is exactly symmetric.
            Differentiable.
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
    check_flags(name, root=root)
    p = check_p(name, p)
    for what, clouds in (("xs", xs), ("ys", ys)):
        if clouds is not None:
            check_cloud(name, what, clouds)
            if clouds.dim() != 3 or len(clouds) == 0:
                raise ValueError(
                    f"{name}: `{what}` must have shape (clouds, points, d) with at least one cloud, "
                    f"got {tuple(clouds.shape)}"
                )
    if ys is not None:
        check_width(name, "ys", ys, "xs", xs)
        dtype = torch.promote_types(xs.dtype, ys.dtype)
        xs, ys = xs.to(dtype), ys.to(dtype)
    theta = directions(name, xs, n_projections, projections, sampler, generator)
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
    with full_precision(xs):
        for k in range(len(u)):
            start = k if ys is None else 0  # one triangle, mirrored below: the diagonal is zero
            entries = [_mean_power(u[k] - part, p, mass) for part in v[start:].split(columns)]
            rows.append(F.pad(torch.cat(entries), (start, 0)))
    matrix = torch.stack(rows) / u.shape[1]
    if ys is None:
        matrix = matrix + matrix.t()
    return rooted(matrix, p) if root else matrix


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
    x, y, _, _, lead = paired_clouds(name, x, y, None, None)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{name}: `y` must have as many points as `x`, {x.shape[1]}, got {y.shape[1]}")
    theta = directions(name, x, n_projections, projections, sampler, generator)
    values = [_gromov(sort_slices(cx, theta)[0], sort_slices(cy, theta)[0]) for cx, cy in zip(x, y, strict=True)]
    losses = torch.stack(values) if values else x.new_empty(0, dtype=accumulation_dtype(x.dtype))
    return reduced(losses, lead, reduction)


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
        (..., n, d) in the common dtype of the inputs, also for 16-bit ones and under ``torch.autocast``. A point of x
        that is not finite gives NaN; NaN in y gives NaN everywhere.

    Raises:
        TypeError: not dense floating tensors.
        ValueError: shapes that do not fit, empty clouds, a float temperature that is not finite and positive.
        RuntimeError: PyTorch's own, for a second derivative: its fused attention has none.

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
        check_cloud(name, what, cloud)
    check_width(name, "y", y, "x", x)
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
    with full_precision(x):
        points = F.scaled_dot_product_attention(query, keys, keys, scale=1.0)
    # Attention takes a row of NaN, or of -inf alone, for one that is masked, and gives zero.
    finite = query.detach().isfinite().all(-1, keepdim=True)
    return (points * torch.where(finite, 1, torch.nan).to(dtype)).reshape(*lead, n, d)
