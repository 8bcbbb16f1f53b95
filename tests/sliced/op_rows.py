"""The sliced ops for the gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss.reference import sliced as reference
from fastloss.sliced import ops
from tests.op_table import MIB, Op


def _cloud(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _problem(n: int, m: int, d: int, slices: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return (
        _cloud(2, n, d, dtype=dtype, seed=0),
        _cloud(2, m, d, dtype=dtype, seed=1),
        _cloud(slices, d, dtype=dtype, seed=2),
        _cloud(2, n, dtype=dtype, seed=3).softmax(1),
        _cloud(2, m, dtype=dtype, seed=4).softmax(1),
    )


def _mean(n: int = 6, m: int = 5, d: int = 3, slices: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    return (*_problem(n, m, d, slices, dtype), 2.0, True, True, True, True, True)


def _costs(n: int = 6, m: int = 5, d: int = 3, slices: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    return (*_problem(n, m, d, slices, dtype), 2.5)


def _sort(n: int = 6, d: int = 3, slices: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    return _cloud(n, d, dtype=dtype, seed=0), _cloud(slices, d, dtype=dtype, seed=1)


def _dense(x: Tensor, y: Tensor, theta: Tensor, a: Tensor, b: Tensor, p: float, *_: Any) -> Tensor:
    return reference._costs(x, y, a, b, theta, p).sum()


N, D, L = 4096, 3, 512
BLOCK = 12 * MIB


def _moved(x: Tensor, y: Tensor, theta: Tensor, a: Tensor, b: Tensor, *_: Any) -> int:
    # gradients twice; a block of projections with as many potentials, made twice a block; a thread's buffers
    # (28 bytes an atom with both rows, at most two of them here); weights in float64 and vectors
    leaves = sum(t.numel() for t in (x, y, theta, a, b)) + (x.shape[0] - 1) * theta.numel()
    return 4 * leaves * 4 + 2 * BLOCK + torch.get_num_threads() * 56 * N + 64 * N + MIB


OPS = [
    Op(
        "sliced_mean",
        ops._SlicedMean,
        _mean,
        (300, 250, 5, 40),
        (0, 1, 2, 3, 4),
        lambda: _mean(N, N - 96, D, L, torch.float32),
        _moved,
        _dense,
        20 * BLOCK,  # sort, search and gather in int64 and float64, all slices of a block at once
    ),
    Op(
        "sliced_costs",
        ops._SlicedCosts,
        _costs,
        (300, 250, 5, 40),
        (0, 1, 2, 3, 4),
        lambda: _costs(N, N - 96, D, L, torch.float32),
        _moved,
        _dense,
        20 * BLOCK,
    ),
    Op(
        "sort_slices",
        ops._SortSlices,
        _sort,
        (300, 5, 40),
        (0, 1),
        lambda: _sort(N, D, 4 * L, torch.float32),
        # values, order, the upstream gradient and the loss's own products of that size, then blocks and their indices
        lambda x, theta: 5 * x.shape[0] * theta.shape[0] * 4 + 6 * BLOCK + MIB,
        lambda x, theta: (theta @ x.T).unsqueeze(0).expand(8, -1, -1).sort(-1)[0].sum(),
        4 * BLOCK,
    ),
]
