"""The op in PyTorch, any device: the same rings, with the short Fourier series replaced by points on each ring.

The sparse tensor by the pairs of coefficients that couple, times their rows of it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.gaunt.program import Program, degree_of
from fastloss.gaunt.tables import grid, sparse

TILE_NUMBERS = 1 << 18  # of values on the grid, a tensor: 1 MiB in float32
DEVICE_TILE_NUMBERS = 1 << 24  # beside the CPU: smaller tiles would take as long to launch as to compute


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


def _direct(inputs: list[Tensor], program: Program, degrees: list[int]) -> list[Tensor]:
    results = []
    for degree, terms in zip(program.out_degrees, program.outputs, strict=True):
        out = inputs[0].new_zeros((len(inputs[0]), (degree + 1) ** 2))
        for term in terms:
            i, *others = term.factors
            if others:
                (j,) = others
                first, second, matrix = sparse(degrees[i], degrees[j], degree, out.dtype, out.device)
                product = (inputs[i].index_select(1, first) * inputs[j].index_select(1, second)) @ matrix
            else:
                product = inputs[i][:, : out.shape[1]]
            out[:, : product.shape[1]].add_(product, alpha=term.coefficient)
        results.append(out)
    return results


def gaunt_ring_fwd(inputs: list[Tensor], program: Program, channels_last: bool, direct: bool) -> list[Tensor]:
    degrees = [degree_of(x, channels_last) for x in inputs]
    if channels_last:
        inputs = [x.mT for x in inputs]
    lead = inputs[0].shape[:-1]
    lanes = math.prod(lead)
    inputs = [x.reshape(lanes, x.shape[-1]) for x in inputs]
    out = [inputs[0].new_empty((lanes, (n + 1) ** 2)) for n in program.out_degrees]
    total = program.total(degrees)
    numbers = (max(degrees) + 1) ** 4 if direct else (total + 2) * (total + 1)
    tile = max(1, (TILE_NUMBERS if out[0].device.type == "cpu" else DEVICE_TILE_NUMBERS) // numbers)
    for begin in range(0, lanes, tile):
        tiles = [x[begin : begin + tile] for x in inputs]
        part = _direct(tiles, program, degrees) if direct else _ring(tiles, program, degrees, total)
        for to, result in zip(out, part, strict=True):
            to[begin : begin + tile] = result
    out = [y.reshape(*lead, y.shape[-1]) for y in out]
    return [y.mT.contiguous() for y in out] if channels_last else out
