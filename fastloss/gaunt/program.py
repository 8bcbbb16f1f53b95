"""What the op computes: sums of products of functions on the sphere. Closed under differentiation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


def degree_of_size(size: int) -> int:
    """The largest degree whose coefficients are no more than `size`."""
    if not torch.compiler.is_compiling():
        return math.isqrt(size) - 1
    degree = 0  # Dynamo does not know the square root of a symbolic size
    while (degree + 2) ** 2 <= size:
        degree += 1
    return degree


def degree_of(x: Tensor, channels_last: bool) -> int:
    """The degree of the functions in (..., d) or, with channels last, (..., d, channels)."""
    return degree_of_size(x.shape[-2 if channels_last else -1])


MOST_INPUTS = 64  # of a program, in every backend: csrc/cpu/gaunt_kernels.cpp has a place for each


@dataclass(frozen=True)
class Term:
    coefficient: int
    factors: tuple[int, ...]  # inputs, sorted; one may be there several times


class Compact(NamedTuple):
    """A program as the op takes it, without the inputs that no term has."""

    keep: list[int]  # the inputs that are left, at least one
    text: str


@dataclass(frozen=True)
class Program:
    """outputs[o] is a sum of terms; its coefficients are taken up to out_degrees[o]."""

    out_degrees: tuple[int, ...]
    outputs: tuple[tuple[Term, ...], ...]

    def __post_init__(self) -> None:
        # Looked up several times a call.
        object.__setattr__(self, "_hash", hash((self.out_degrees, self.outputs)))
        keep = sorted({i for terms in self.outputs for t in terms for i in t.factors}) or [0]
        if len(keep) > MOST_INPUTS:
            raise RuntimeError(
                f"fastloss: a derivative of a product of functions may depend on {MOST_INPUTS} functions at most, the "
                f"factors and one for each gradient or tangent, got {len(keep)}; multiply fewer of them at once"
            )
        at = {i: n for n, i in enumerate(keep)}
        object.__setattr__(self, "_compact", Compact(keep, self.text(at)))

    def __hash__(self) -> int:
        result: int = self.__dict__["_hash"]
        return result

    def text(self, at: Mapping[int, int] | None = None) -> str:
        """What `parse` reads, for the dispatcher, which takes a string faster than lists; input i is called at_i."""
        return f"{' '.join(map(str, self.out_degrees))}:{' '.join(map(str, self.flat(at)))}"

    def flat(self, at: Mapping[int, int] | None = None) -> list[int]:
        """The terms as csrc/cpu/gaunt.h reads them; input i is called at_i."""
        numbers: list[int] = []
        for terms in self.outputs:
            numbers.append(len(terms))
            for term in terms:
                factors = term.factors if at is None else [at[i] for i in term.factors]
                numbers += (term.coefficient, len(factors), *factors)
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

    def compact(self) -> Compact:
        made: Compact = self.__dict__["_compact"]
        return made

    @lru_cache(maxsize=4096)  # noqa: B019 - programs are few and small
    def gradient(self, needs: tuple[bool, ...], sizes: tuple[int, ...], present: tuple[bool, ...]) -> Program:
        """Gradients of sum_o <gradient of output o, output o> with respect to the inputs that need one.

        sizes: numbers of coefficients of the inputs, which are inputs of the gradient, too; behind them, it has the
        gradients of the outputs for which there is one.
        """
        wanted = [i for i, need in enumerate(needs) if need]
        terms = [self.outputs[o] for o, there in enumerate(present) if there]
        outputs = []
        for i in wanted:
            found: dict[tuple[int, ...], int] = {}
            for n, of_output in enumerate(terms):
                for term in of_output:
                    times = term.factors.count(i)
                    if times:
                        others = list(term.factors)
                        others.remove(i)
                        key = tuple(sorted((*others, len(needs) + n)))
                        found[key] = found.get(key, 0) + times * term.coefficient
            outputs.append(tuple(Term(c, key) for key, c in found.items()))
        return Program(tuple(degree_of_size(sizes[i]) for i in wanted), tuple(outputs))

    @lru_cache(maxsize=4096)  # noqa: B019
    def tangent(self, moving: tuple[int, ...], inputs: int) -> Program:
        """How the outputs move when input moving_n moves by input inputs + n."""
        at = {i: inputs + n for n, i in enumerate(moving)}
        outputs = []
        for terms in self.outputs:
            found: dict[tuple[int, ...], int] = {}
            for term in terms:
                for n, i in enumerate(term.factors):
                    if i in at:
                        key = tuple(sorted((*term.factors[:n], *term.factors[n + 1 :], at[i])))
                        found[key] = found.get(key, 0) + term.coefficient
            outputs.append(tuple(Term(c, key) for key, c in found.items()))
        return Program(self.out_degrees, tuple(outputs))


@lru_cache(maxsize=4096)
def parse(text: str) -> Program:
    out_degrees, flat = (tuple(map(int, part.split())) for part in text.split(":"))
    numbers = iter(flat)
    outputs = []
    for _ in out_degrees:
        terms = []
        for _ in range(next(numbers)):
            coefficient, count = next(numbers), next(numbers)
            terms.append(Term(coefficient, tuple(next(numbers) for _ in range(count))))
        outputs.append(tuple(terms))
    return Program(out_degrees, tuple(outputs))
