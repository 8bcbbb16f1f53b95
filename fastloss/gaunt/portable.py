"""The op in PyTorch, any device: the same rings, with the short Fourier series replaced by points on each ring."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.gaunt.program import Program, degree_of
from fastloss.gaunt.tables import grid

TILE_NUMBERS = 1 << 18  # of values on the grid, a tensor: 1 MiB in float32


def _ring(inputs: list[Tensor], program: Program, degrees: list[int], total: int) -> list[Tensor]:
    def values(x: Tensor, degree: int) -> Tensor:
        g = grid(degree, total, False, x.dtype, x.device)
        by_order = F.pad(x, (0, 1))[:, g.gather]  # (lanes, order, degree)
        return torch.einsum("nmr,ma->nra", torch.einsum("nml,mlr->nmr", by_order, g.legendre), g.azimuth)

    def coefficients(f: Tensor, degree: int) -> Tensor:
        g = grid(degree, total, True, f.dtype, f.device)
        by_order = torch.einsum("nmr,mlr->nml", torch.einsum("nra,ma->nmr", f, g.azimuth), g.legendre)
        out = f.new_zeros((len(f), (degree + 1) ** 2 + 1))
        out[:, g.gather.flatten()] = by_order.flatten(1)
        return out[:, :-1]

    on_grid = [values(x, degree) for x, degree in zip(inputs, degrees, strict=True)]
    results = []
    for degree, terms in zip(program.out_degrees, program.outputs, strict=True):
        f = torch.zeros_like(on_grid[0])
        for term in terms:
            product = on_grid[term.factors[0]]
            for i in term.factors[1:]:
                product = product * on_grid[i]
            f.add_(product, alpha=term.coefficient)
        results.append(coefficients(f, degree))
    return results


def gaunt_ring_fwd(inputs: list[Tensor], program: Program, channels_last: bool) -> list[Tensor]:
    degrees = [degree_of(x, channels_last) for x in inputs]
    shape = inputs[0].shape
    if channels_last:
        inputs = [x.transpose(1, 2).reshape(-1, x.shape[1]) for x in inputs]
    total, lanes = program.total(degrees), inputs[0].shape[0]
    out = [inputs[0].new_empty((lanes, (n + 1) ** 2)) for n in program.out_degrees]
    tile = max(1, TILE_NUMBERS // ((total + 2) * (total + 1)))
    for begin in range(0, lanes, tile):
        part = _ring([x[begin : begin + tile] for x in inputs], program, degrees, total)
        for to, result in zip(out, part, strict=True):
            to[begin : begin + tile] = result
    if channels_last:
        return [y.reshape(shape[0], shape[2], y.shape[1]).transpose(1, 2).contiguous() for y in out]
    return out
