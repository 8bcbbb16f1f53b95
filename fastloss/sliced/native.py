"""The sliced ops on the CPU core: the block loop of `tiles.py`, rows by csrc/cpu/sliced.h."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastloss._backends import native_core
from fastloss.sliced import tiles

_C = native_core()
_TRANSPORT = {torch.float32: _C.transport_float, torch.float64: _C.transport_double}
_SORT = {torch.float32: _C.sort_rows_float, torch.float64: _C.sort_rows_double}
_SCRATCH = {torch.float32: _C.sliced_scratch_float, torch.float64: _C.sliced_scratch_double}


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _scratch(u: Tensor, m: int) -> tuple[Tensor, int]:
    """Buffers of the threads that share the slices of u (S, n) with rows of m atoms beside it."""
    threads = max(1, min(torch.get_num_threads(), len(u)))
    return torch.empty(_SCRATCH[u.dtype](u.shape[1], m, threads), dtype=torch.uint8), threads


class _Epilogue:
    def transport(
        self,
        u: Tensor,
        v: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        p: float,
        factor: Tensor | None,
        want_u: bool,
        want_v: bool,
        want_a: bool,
        want_b: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        cost = torch.empty(len(u), dtype=torch.float64)
        f = torch.empty_like(u) if want_a else None
        g = torch.empty_like(v) if want_b else None
        scratch, threads = _scratch(u, v.shape[1])
        _TRANSPORT[u.dtype](
            u.data_ptr(),
            v.data_ptr(),
            len(u),
            u.shape[1],
            v.shape[1],
            _address(a),
            _address(b),
            p,
            _address(factor),
            want_u,
            want_v,
            _address(f),
            _address(g),
            cost.data_ptr(),
            scratch.data_ptr(),
            threads,
        )
        return cost, f, g

    def sort(self, u: Tensor) -> tuple[Tensor, Tensor]:
        values, order = torch.empty_like(u), torch.empty(u.shape, dtype=torch.int32)
        scratch, threads = _scratch(u, u.shape[1])
        _SORT[u.dtype](
            u.data_ptr(), len(u), u.shape[1], values.data_ptr(), order.data_ptr(), scratch.data_ptr(), threads
        )
        return values, order


_epilogue = _Epilogue()
sliced_mean_fwd = partial(tiles.mean_forward, _epilogue)
sliced_mean_bwd = tiles.mean_backward
sliced_costs_fwd = partial(tiles.costs_forward, _epilogue)
sliced_costs_bwd = partial(tiles.costs_backward, _epilogue)
sort_slices_fwd = partial(tiles.sort_forward, _epilogue)
sort_slices_bwd = tiles.sort_backward
