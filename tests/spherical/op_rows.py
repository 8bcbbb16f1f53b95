"""The spherical ops for the gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss.spherical import ops
from tests.op_table import MIB, Op


def _normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _targets(rows: int, classes: int) -> Tensor:
    target = torch.arange(rows) * 7 % classes
    target[rows // 2] = -1
    return target


def _rows(b: int = 4, c: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    return _normal((b, c), dtype, 0) + 3, _targets(b, c), "gate"


def _linear(b: int = 7, c: int = 6, d: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    hidden, weight = _normal((b, d), dtype, 0), _normal((c, d), dtype, 1)
    return hidden, weight, _normal((c,), dtype, 2), _targets(b, c), True, "gate"


def _dense_rows(logits: Tensor, *_: Any) -> Tensor:
    return (logits - logits.mean(1, keepdim=True)).square().sum()


def _dense_linear(hidden: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> Tensor:
    return _dense_rows(hidden @ weight.T + bias)


B, C, D = 2048, 20_000, 128

OPS = [
    Op(
        "row_moments",
        ops._RowMoments,
        _rows,
        (37, 33_001),
        (0,),
        lambda: _rows(512, C, torch.float32),
        # the gradient; vectors of B, and doubles for each chunk of a row
        lambda logits, *_: logits.numel() * 4 + 64 * len(logits) * 4,
        _dense_rows,
        # a block of rows with what squares and sums make of it, and a mask
        portable_slack=10 * MIB,
    ),
    Op(
        "linear_moments",
        ops._LinearMoments,
        _linear,
        (300, 700, 300),
        (0, 1, 2),
        lambda: _linear(B, C, D, torch.float32),
        # gradients; the kept directions; a tile and four blocks of at most 4 MiB, two Gram matrices, vectors
        lambda hidden, weight, *_: (2 * hidden.numel() + weight.numel() + 4 * D * D + 64 * B + 8 * C) * 4 + 5 * 4 * MIB,
        _dense_linear,
    ),
]
