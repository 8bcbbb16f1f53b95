"""The contrastive ops for the gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss.contrastive import ops
from tests.op_table import MIB, Op


def _features(rows: int, d: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(rows, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _similarity(m: int = 7, n: int = 5, d: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    ids = torch.arange(max(m, n)) % 4
    scale = torch.linspace(0.5, 2, m, dtype=dtype), torch.linspace(2, 0.5, n, dtype=dtype)
    return _features(m, d, dtype, 0), _features(n, d, dtype, 1), *scale, ids[:m], ids[:n].flip(0), True, True, 0


def _pair_nll(m: int = 5, n: int = 7, d: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    scale = torch.tensor(1.5, dtype=dtype)
    return _features(m, d, dtype, 0), _features(n, d, dtype, 1), scale, None, None, True, m == n, True, True, True


def _self(m: int = 7, d: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    return _features(m, d, dtype, 0), torch.linspace(0.5, 2, m, dtype=dtype), torch.arange(m) % 5, True


def _dense_similarity(q: Tensor, k: Tensor, scale: Tensor, *_: Any) -> Tensor:
    return (scale[:, None] * q @ k.T).logsumexp(1).sum()


SLACK = 8 * 1024 * 512 * 4  # the portable epilogue works on whole tiles
B, D = 6144, 32  # the dense matrix is 144 MiB

OPS = [
    Op(
        "similarity_lse",
        ops._SimilarityLse,
        _similarity,
        (1100, 530, 20),
        (0, 1, 2, 3),
        lambda: _similarity(B, B, D, torch.float32),
        # two gradients, a tile of 1024 x 512 with its partial column sums, normalised blocks, 32 vectors of B
        lambda q, *_: 2 * q.numel() * 4 + 1024 * 512 * 4 * 9 // 8 + 4 * 1536 * D * 4 + 32 * B * 4,
        _dense_similarity,
        SLACK,
    ),
    Op(
        "pair_nll",
        ops._PairNll,
        _pair_nll,
        (530, 1100, 20),
        (0, 1, 2),
        lambda: _pair_nll(B, B + 1, D, torch.float32),
        # gradients twice (found forward, scaled backward), a panel of 24 MiB (1024 rows), blocks, vectors
        lambda q, *_: 4 * q.numel() * 4 + 24 * MIB + 4 * 1536 * D * 4 + 32 * B * 4,
        lambda q, k, scale, *_: _dense_similarity(q, k, scale.expand(len(q))),
        SLACK,
    ),
    Op(
        "self_similarity_lse",
        ops._SelfSimilarityLse,
        _self,
        (1100, 20),
        (0, 1),
        lambda: _self(B, D, torch.float32),
        lambda x, *_: x.numel() * 4 + 512 * 512 * 4 * 9 // 8 + 4 * 1024 * D * 4 + 32 * B * 4,
        lambda x, scale, *_: _dense_similarity(x, x, scale),
        SLACK,
    ),
]
