"""The op on the CPU core, csrc/cpu/gaunt.h."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastloss._backends import native_core
from fastloss.gaunt.program import Program, degree_of
from fastloss.gaunt.tables import Rings, rings

_CALLS = {torch.float32: native_core().GauntFloat, torch.float64: native_core().GauntDouble}


@lru_cache(maxsize=1024)
def _call(in_degrees: tuple[int, ...], program: Program, dtype: torch.dtype) -> tuple[Any, Rings, int]:
    degree = max((*in_degrees, *program.out_degrees))
    ring = rings(degree, program.total(in_degrees), dtype)
    call = _CALLS[dtype](
        in_degrees, program.out_degrees, program.flat(), degree, program.band(in_degrees), ring.pairs, ring.equator
    )
    return call, ring, call.scratch()


def gaunt_ring_fwd(inputs: list[Tensor], program: Program, channels_last: bool) -> list[Tensor]:
    x = [t.contiguous() for t in inputs]
    first = x[0]
    call, tables, scratch = _call(tuple(degree_of(t, channels_last) for t in x), program, first.dtype)
    sizes = [(n + 1) ** 2 for n in program.out_degrees]
    if channels_last:
        batch, _, channels = first.shape
        lanes, out = batch * channels, [first.new_empty((batch, d, channels)) for d in sizes]
    else:
        lanes, channels, out = first.shape[0], 0, [first.new_empty((first.shape[0], d)) for d in sizes]
    if lanes:
        threads = torch.get_num_threads()
        memory = first.new_empty((scratch * threads,))
        call.run(
            [t.data_ptr() for t in x],
            [t.data_ptr() for t in out],
            lanes,
            channels,
            tables.to_ring.data_ptr(),
            tables.from_ring.data_ptr(),
            memory.data_ptr(),
            threads,
        )
    return out
