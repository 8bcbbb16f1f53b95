"""The op on the CPU core, csrc/cpu/gaunt.h."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastloss._backends import native_core
from fastloss.gaunt.program import Program, degree_of_size
from fastloss.gaunt.tables import Rings, entries, rings

_CALLS = {torch.float32: native_core().GauntFloat, torch.float64: native_core().GauntDouble}


@lru_cache(maxsize=1024)
def _call(sizes: tuple[int, ...], program: Program, direct: bool, dtype: torch.dtype) -> tuple[Any, Rings | None, int]:
    in_degrees = tuple(map(degree_of_size, sizes))
    call = _CALLS[dtype](in_degrees, program.out_degrees, program.flat())
    ring = None
    if direct:
        call.by_entries(*(table.tolist() for table in entries(in_degrees, program)))
    else:
        degree = max((*in_degrees, *program.out_degrees))
        ring = rings(degree, program.total(in_degrees), dtype)
        call.by_rings(degree, program.band(in_degrees), ring.pairs, ring.equator)
    return call, ring, call.scratch()


def gaunt_ring_fwd(inputs: list[Tensor], program: Program, channels_last: bool, direct: bool) -> list[Tensor]:
    x = [t.contiguous() for t in inputs]
    first, where = x[0], -2 if channels_last else -1
    call, tables, scratch = _call(tuple([t.shape[where] for t in x]), program, direct, first.dtype)
    lead, tail = (first.shape[:-2], first.shape[-1:]) if channels_last else (first.shape[:-1], ())
    out = [first.new_empty((*lead, (n + 1) ** 2, *tail)) for n in program.out_degrees]
    lanes = first.numel() // first.shape[where]
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
