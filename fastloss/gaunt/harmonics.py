"""Spherical harmonics as homogeneous polynomials in x, y, z, differentiable by autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss.gaunt.constants import table


def harmonics(vectors: Tensor, degree: int, normalize: bool) -> Tensor:
    """(..., 3) -> (..., (degree + 1)^2), orthonormal on the sphere; float32 or float64.

    Y_lm = Q_lm(y, r^2) times the real or imaginary part of sqrt(2) (z + i x)^m, with Q_lm = N_lm P_l^m / sin^m, which
    obeys the recurrence in l of the normalised Legendre functions: no small number is divided by, no large one appears.
    """
    if normalize:
        # Scaled by the largest component first: squares of components neither overflow nor vanish.
        size = vectors.detach().abs().amax(-1, keepdim=True)
        zero = size == 0
        scaled = vectors / torch.where(zero, 1, size)
        length = torch.where(zero, 1, (scaled * scaled).sum(-1, keepdim=True)).sqrt()
        unit = torch.where(zero, 0, scaled / length)
        squared = torch.where(zero[..., 0], 0, 1).to(unit.dtype)
    else:
        unit, squared = vectors, (vectors * vectors).sum(-1)
    x, y, z = unit.unbind(-1)
    y, squared = y.unsqueeze(-1), squared.unsqueeze(-1)
    # (z + i x)^m
    cosine, sine = [torch.ones_like(x)], [torch.zeros_like(x)]
    for _ in range(degree):
        c, s = cosine[-1], sine[-1]
        cosine.append(c * z - s * x)
        sine.append(s * z + c * x)
    waves, sines = torch.stack(cosine, -1), torch.stack(sine, -1)
    diagonal = math.sqrt(1 / (4 * math.pi))
    before: Tensor | None = None
    constant = torch.full_like(x, diagonal)
    if degree == 0:  # nothing else is there to keep the graph: a sum of no components, of gradient zero
        constant = constant + vectors[..., :0].sum(-1)
    here = constant.unsqueeze(-1)
    rows = [here]
    for n in range(1, degree + 1):
        a, b = (table(f"recurrence.{part}", [n], x) for part in (0, 1))
        row = a * (y * here)  # orders 0..n-1
        if before is not None:  # order n - 1 has no term two degrees below
            row = torch.cat((row[..., :-1] - b * (squared * before), row[..., -1:]), -1)
        diagonal *= math.sqrt((2 * n + 1) / (2 * n) * (2 if n == 1 else 1))  # sqrt(2) from order 1 on
        before, here = here, torch.cat((row, torch.full_like(x, diagonal).unsqueeze(-1)), -1)
        rows.append(here)
    parts = [row * waves[..., : n + 1] for n, row in enumerate(rows)]
    parts += [row[..., 1:] * sines[..., 1 : n + 1] for n, row in enumerate(rows)]
    return torch.cat(parts, -1).index_select(-1, table("order_columns", [degree], x))
