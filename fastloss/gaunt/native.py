"""The op on the CPU core, csrc/cpu/gaunt.h."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss._backends import native_core
from fastloss.gaunt.program import Program, degree_of_size
from fastloss.gaunt.tables import Rings, entries, rings

_CALLS = {torch.float32: native_core().GauntFloat, torch.float64: native_core().GauntDouble}


class _Plan(NamedTuple):
    """A program for inputs of given sizes."""

    call: Any
    tables: Rings | None
    scratch: int  # numbers a thread
    sizes: tuple[int, ...]  # of the outputs


@lru_cache(maxsize=1024)
def _plan(sizes: tuple[int, ...], program: Program, direct: bool, dtype: torch.dtype) -> _Plan:
    in_degrees = tuple(map(degree_of_size, sizes))
    call = _CALLS[dtype](in_degrees, program.out_degrees, program.flat())
    ring = None
    if direct:
        call.by_entries(*(table.tolist() for table in entries(in_degrees, program)))
    else:
        degree = max((*in_degrees, *program.out_degrees))
        ring = rings(degree, program.total(in_degrees), dtype)
        call.by_rings(degree, program.band(in_degrees), ring.pairs, ring.equator)
    return _Plan(call, ring, call.scratch(), tuple((degree + 1) ** 2 for degree in program.out_degrees))


def gaunt_ring_fwd(inputs: list[Tensor], program: Program, channels_last: bool, direct: bool) -> list[Tensor]:
    # A few microseconds in here are a tenth of a small product with its gradient.
    x = [t.contiguous() for t in inputs]
    first, where = x[0], -2 if channels_last else -1
    call, tables, scratch, sizes = _plan(tuple([t.shape[where] for t in x]), program, direct, first.dtype)
    *lead, size = first.shape[:-1] if channels_last else first.shape
    tail = first.shape[-1:] if channels_last else ()
    out = [torch.empty_like(first) if n == size else first.new_empty((*lead, n, *tail)) for n in sizes]
    lanes = first.numel() // size
    if lanes:
        threads = torch.get_num_threads()
        memory = first.new_empty((scratch * threads,)) if scratch else None
        call.run(
            [t.data_ptr() for t in x],
            [t.data_ptr() for t in out],
            lanes,
            first.shape[-1] if channels_last else 0,
            tables.to_ring.data_ptr() if tables else 0,
            tables.from_ring.data_ptr() if tables else 0,
            0 if memory is None else memory.data_ptr(),
            threads,
        )
    return out
