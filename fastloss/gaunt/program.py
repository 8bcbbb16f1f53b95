"""What the op computes: sums of products of functions on the sphere. Closed under differentiation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor


def degree_of(x: Tensor, channels_last: bool) -> int:
    """The degree of the functions in (lanes, d) or, with channels last, (batch, d, channels)."""
    return math.isqrt(x.shape[1]) - 1


@dataclass(frozen=True)
class Term:
    coefficient: int
    factors: tuple[int, ...]  # inputs, sorted; one may be there several times


@dataclass(frozen=True)
class Program:
    """outputs[o] is a sum of terms; its coefficients are taken up to out_degrees[o]."""

    out_degrees: tuple[int, ...]
    outputs: tuple[tuple[Term, ...], ...]

    def flat(self) -> list[int]:
        """As csrc/cpu/gaunt.h reads it."""
        numbers: list[int] = []
        for terms in self.outputs:
            numbers.append(len(terms))
            for term in terms:
                numbers += (term.coefficient, len(term.factors), *term.factors)
        return numbers

    def band(self, in_degrees: Sequence[int]) -> int:
        """The largest degree of a product."""
        return max((sum(in_degrees[i] for i in t.factors) for terms in self.outputs for t in terms), default=0)

    def total(self, in_degrees: Sequence[int]) -> int:
        """The largest degree of an integrand: rings and azimuths are chosen for it."""
        return max(
            (
                sum(in_degrees[i] for i in t.factors) + degree
                for degree, terms in zip(self.out_degrees, self.outputs, strict=True)
                for t in terms
            ),
            default=0,
        )

    def terms_of_gradients(self, wanted: Sequence[int], first: int) -> tuple[tuple[Term, ...], ...]:
        """Gradients of sum_o <input first + o, output o> with respect to the inputs `wanted`: again such sums."""
        outputs = []
        for i in wanted:
            found: dict[tuple[int, ...], int] = {}
            for o, terms in enumerate(self.outputs):
                for term in terms:
                    times = term.factors.count(i)
                    if times:
                        others = list(term.factors)
                        others.remove(i)
                        key = tuple(sorted((*others, first + o)))
                        found[key] = found.get(key, 0) + times * term.coefficient
            outputs.append(tuple(Term(c, key) for key, c in found.items()))
        return tuple(outputs)


def parse(out_degrees: Sequence[int], flat: Sequence[int]) -> Program:
    return _parse(tuple(out_degrees), tuple(flat))


@lru_cache(maxsize=4096)
def _parse(out_degrees: tuple[int, ...], flat: tuple[int, ...]) -> Program:
    numbers = iter(flat)
    outputs = []
    for _ in out_degrees:
        terms = []
        for _ in range(next(numbers)):
            coefficient, count = next(numbers), next(numbers)
            terms.append(Term(coefficient, tuple(next(numbers) for _ in range(count))))
        outputs.append(tuple(terms))
    return Program(out_degrees, tuple(outputs))


def product(factors: Sequence[int], out_degree: int) -> Program:
    """The program of one product."""
    return Program((out_degree,), ((Term(1, tuple(sorted(factors))),),))
