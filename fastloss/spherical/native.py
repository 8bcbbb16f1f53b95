"""The spherical ops on the CPU core: rows through csrc/cpu/spherical.h, hidden states as in `tiles.py`."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastloss._backends import native_core
from fastloss.spherical import tiles
from fastloss.spherical.tiles import Rows

_C = native_core()
_MOMENTS = {torch.float32: _C.spherical_moments_float, torch.float64: _C.spherical_moments_double}
_GRADIENT = {torch.float32: _C.spherical_gradient_float, torch.float64: _C.spherical_gradient_double}

# Memory of this size is new from the system, not from the allocator's free lists; its pages are yet to be touched.
HUGE_BYTES = 32 << 20


def _direct(x: Tensor) -> bool:
    """Whether the kernels can read x where it is; else blocks of it are copied, in the accumulation dtype."""
    return x.dtype in _MOMENTS and (x.stride(1) == 1 or x.shape[1] == 1)


class _Kernels:
    def fresh(self, like: Tensor) -> Tensor:
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        if out.nbytes >= HUGE_BYTES:
            _C.advise_huge_pages(out.data_ptr(), out.nbytes)
        return out

    def moments(self, logits: Tensor, target: Tensor, out: Rows) -> None:
        c = logits.shape[1]
        rows = len(logits) if _direct(logits) else tiles.block_rows(c, out.high.dtype)
        chunks = -(-c // _C.SPHERICAL_CHUNK)
        partials = torch.empty((2 * min(rows, len(logits)) * chunks,), dtype=torch.float64)
        for begin in range(0, len(logits), max(rows, 1)):
            part = slice(begin, begin + rows)
            x, o = logits[part], out[part]
            x = x if _direct(logits) else x.to(o.high.dtype).contiguous()
            _MOMENTS[x.dtype](
                x.data_ptr(),
                x.stride(0),
                *x.shape,
                target[part].data_ptr(),
                o.high.data_ptr(),
                o.low.data_ptr(),
                o.square.data_ptr(),
                o.centred.data_ptr(),
                o.logit.data_ptr(),
                partials.data_ptr(),
                torch.get_num_threads(),
            )

    def gradient(
        self, logits: Tensor, target: Tensor, stats: Tensor, shift: Tensor, scale: Tensor, spike: Tensor, out: Tensor
    ) -> None:
        direct = _direct(logits) and _direct(out)
        rows = len(logits) if direct else tiles.block_rows(logits.shape[1], stats.dtype)
        for begin in range(0, len(logits), max(rows, 1)):
            part = slice(begin, begin + rows)
            x, g = logits[part], out[part]
            if not direct:
                x = g = x.to(stats.dtype, memory_format=torch.contiguous_format, copy=True)
            _GRADIENT[x.dtype](
                x.data_ptr(),
                x.stride(0),
                g.data_ptr(),
                g.stride(0),
                *x.shape,
                target[part].data_ptr(),
                stats[0, part].data_ptr(),
                stats[1, part].data_ptr(),
                shift[part].data_ptr(),
                scale[part].data_ptr(),
                spike[part].data_ptr(),
                torch.get_num_threads(),
            )
            if not direct:
                out[part].copy_(g)


_kernels = _Kernels()
row_moments_fwd = partial(tiles.row_moments_forward, _kernels)
row_moments_bwd = partial(tiles.row_moments_backward, _kernels)
row_moments_bwd_ = partial(tiles.row_moments_backward_, _kernels)
linear_moments_fwd = tiles.linear_moments_forward
linear_moments_bwd = tiles.linear_moments_backward
