"""Every op, one row each: the gates of test_gates.py are generated from this table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastloss.contrastive import ops


@dataclass(frozen=True)
class Op:
    """A differentiable op.

    sample: arguments of the op for problem sizes that cross no tile and that cross several.
    differentiable: positions of the arguments that have a gradient.
    memory_model: bytes that forward and backward may allocate at most at the same time, gradients included.
    dense: the same function storing the whole matrix; must exceed `memory_model`, or the gate could not fail.
    """

    name: str
    function: Any
    sample: Callable[..., tuple[Any, ...]]
    differentiable: Sequence[int]
    large: Callable[[], tuple[Any, ...]]
    memory_model: Callable[..., int]
    dense: Callable[..., Tensor]

    @property
    def raw(self) -> Any:
        return getattr(torch.ops.fastloss, self.name + "_fwd").default

    def loss(self, *args: Any) -> Tensor:
        """A scalar of all differentiable outputs, with weights that differ from entry to entry."""
        out = self.function.apply(*args)
        outs = [out] if isinstance(out, Tensor) else [o for o in out if o.requires_grad and o.numel()]
        return sum((o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).reshape(o.shape)).sum() for o in outs)


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


MIB = 1 << 20
B, D = 6144, 32  # the dense matrix is 144 MiB

OPS = [
    Op(
        "similarity_lse",
        ops._SimilarityLse,
        _similarity,
        (0, 1, 2, 3),
        lambda: _similarity(B, B, D, torch.float32),
        # two gradients, a tile of 1024 x 512 with its partial column sums, normalised blocks, 32 vectors of B
        lambda q, *_: 2 * q.numel() * 4 + 1024 * 512 * 4 * 9 // 8 + 4 * 1536 * D * 4 + 32 * B * 4,
        _dense_similarity,
    ),
    Op(
        "pair_nll",
        ops._PairNll,
        _pair_nll,
        (0, 1, 2),
        lambda: _pair_nll(B, B + 1, D, torch.float32),
        # gradients twice (found forward, scaled backward), a panel of 24 MiB (1024 rows), blocks, vectors
        lambda q, *_: 4 * q.numel() * 4 + 24 * MIB + 4 * 1536 * D * 4 + 32 * B * 4,
        lambda q, k, scale, *_: _dense_similarity(q, k, scale.expand(len(q))),
    ),
    Op(
        "self_similarity_lse",
        ops._SelfSimilarityLse,
        _self,
        (0, 1),
        lambda: _self(B, D, torch.float32),
        lambda x, *_: x.numel() * 4 + 512 * 512 * 4 * 9 // 8 + 4 * 1024 * D * 4 + 32 * B * 4,
        lambda x, scale, *_: _dense_similarity(x, x, scale),
    ),
]

assert {f"{op.name}_{way}" for op in OPS for way in ("fwd", "bwd")} == set(ops._SCHEMAS), "an op without a row"
