"""POT's sliced distances: its signatures and its numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss._ops import accumulation_dtype
from fastloss.sliced.arguments import check_count, check_flags, check_p, given_directions, paired_clouds, rooted, seeded
from fastloss.sliced.ops import sliced_costs, sliced_mean


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
        seed: an int from -2**63 to 2**64 - 1 seeds a generator of this call; a ``torch.Generator`` is used and
            advanced; None draws from torch's default generator (POT has one of its own).
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
    x, y, theta, a, b, p = pot_arguments(name, X_s, X_t, a, b, n_projections, p, projections, seed, scaler, log=log)
    if not log:
        return rooted(sliced_mean(x, y, theta.t(), a, b, p)[0], p)
    costs = sliced_costs(x, y, theta.t(), a, b, p)[0]
    return rooted(costs.mean(), p), {"projections": theta, "projected_emds": costs}


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
    x, y, theta, a, b, p = pot_arguments(name, X_s, X_t, a, b, n_projections, p, projections, seed, scaler, log=log)
    costs = sliced_costs(x, y, theta.t(), a, b, p)[0]
    value = rooted(costs.max(), p)
    return (value, {"projections": theta, "projected_emds": costs}) if log else value


def pot_arguments(
    function: str,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    count: int | None,
    p: float,
    projections: Tensor | None,
    seed: int | torch.Generator | None,
    scaler: Any,
    **flags: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float]:
    """Clouds (1, n, d) and (1, m, d), directions as columns (d, L), weights (1, n) and (1, m), and p."""
    check_flags(function, **flags)
    p = check_p(function, p)
    if scaler is not None:
        transform = getattr(scaler, "transform", scaler)
        if not callable(transform):
            raise TypeError(f"{function}: `scaler` must have `transform` or be callable, got {type(scaler).__name__}")
        x, y = transform(x), transform(y)
    x, y, a, b, _ = paired_clouds(function, x, y, a, b, "X_s X_t a b", batched=False)
    if projections is not None:
        return x, y, given_directions(function, x, projections, columns=True).t(), a, b, p
    count = check_count(function, count)
    generator = seeded(function, seed)
    source = x.device if generator is None else generator.device
    drawn = torch.randn(x.shape[-1], count, dtype=accumulation_dtype(x.dtype), generator=generator, device=source)
    return x, y, (drawn / drawn.square().sum(0, keepdim=True).sqrt()).to(x.device), a, b, p
