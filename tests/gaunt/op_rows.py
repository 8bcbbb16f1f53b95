"""The Gaunt family's op for the gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss.gaunt import ops
from fastloss.gaunt.program import Program, Term
from tests.op_table import MIB, Op


def _program(degree: int) -> Program:
    """Several outputs, sums, coefficients, a square: everything a program can say."""
    return Program((degree, 1, 0), ((Term(2, (0, 1)), Term(-1, (0, 0, 1))), (Term(1, (1,)),), (Term(3, (0, 1)),)))


def _sample(
    lanes: int = 3, l1: int = 2, l2: int = 1, degree: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(lanes, (n + 1) ** 2, dtype=dtype, generator=generator) for n in (l1, l2)]
    return (*x, _program(degree))


def _ring(x1: Tensor, x2: Tensor, program: Program) -> tuple[Tensor, ...]:
    return tuple(ops._op(*_raw_arguments(x1, x2, program)))


def _raw_arguments(x1: Tensor, x2: Tensor, program: Program) -> tuple[Any, ...]:
    return [x1, x2], program.text(), False, False


LANES, L = 32768, 4
GRID = (2 * L + 2) * (4 * L + 1)


def _dense(x1: Tensor, x2: Tensor, _: Any) -> Tensor:
    """Values of both functions and of their product on a whole grid."""
    table = torch.linspace(-1, 1, 25 * GRID).view(25, GRID)
    return (x1 @ table * (x2 @ table)).sum()


OPS = [
    Op(
        "gaunt_ring",
        _ring,
        _sample,
        (37, 5, 4, 8),
        (0, 1),
        lambda: _sample(LANES, L, L, 2 * L, torch.float32),
        # the outputs, their gradients twice (the weights of the sum are a tensor, too), gradients, scratch
        lambda x1, x2, program: 4 * LANES * (3 * (81 + 4 + 1) + 2 * 50) + 2 * MIB,
        _dense,
        20 * MIB,
        twice=True,
        closed=True,
        raw_arguments=_raw_arguments,
    )
]
