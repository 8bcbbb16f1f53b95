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


class _Epilogue:
    block_bytes = tiles.BLOCK_BYTES

    def scratch(self, u: Tensor, v: Tensor) -> tuple[Tensor, int]:
        """Buffers of the threads that share the slices of u (S, n) and v (S, m), and how many they are."""
        threads = max(1, min(torch.get_num_threads(), len(u)))
        return torch.empty(_SCRATCH[u.dtype](u.shape[1], v.shape[1], threads), dtype=torch.uint8), threads

    def transport(
        self,
        u: Tensor,
        v: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        p: float,
        factor: Tensor | None,
        cost: Tensor,
        scratch: tuple[Tensor, int],
        want_u: bool,
        want_v: bool,
        want_a: bool,
        want_b: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        f = torch.empty_like(u) if want_a else None
        g = torch.empty_like(v) if want_b else None
        buffers, threads = scratch
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
            buffers.data_ptr(),
            threads,
        )
        return f, g

    def sort(self, u: Tensor) -> tuple[Tensor, Tensor]:
        values, order = torch.empty_like(u), torch.empty(u.shape, dtype=torch.int32)
        buffers, threads = self.scratch(u, u)
        _SORT[u.dtype](
            u.data_ptr(), len(u), u.shape[1], values.data_ptr(), order.data_ptr(), buffers.data_ptr(), threads
        )
        return values, order


_epilogue = _Epilogue()
sliced_mean_fwd = partial(tiles.mean_forward, _epilogue)
sliced_mean_bwd = tiles.mean_backward
sliced_costs_fwd = partial(tiles.costs_forward, _epilogue)
sliced_costs_bwd = partial(tiles.costs_backward, _epilogue)
sort_slices_fwd = partial(tiles.sort_forward, _epilogue)
sort_slices_bwd = tiles.sort_backward
