"""The spherical ops on the CPU core: rows through csrc/cpu/spherical.h, hidden states as in `tiles.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastloss._backends import native_core
from fastloss.spherical import portable, tiles
from fastloss.spherical.tiles import Rows

_C = native_core()
_MOMENTS = {torch.float32: _C.spherical_moments_float, torch.float64: _C.spherical_moments_double}
_GRADIENT = {torch.float32: _C.spherical_gradient_float, torch.float64: _C.spherical_gradient_double}

# Memory of this size is new from the system, not from the allocator's free lists; its pages are yet to be touched.
HUGE_BYTES = 32 << 20

# Up to this size the kernel in one thread is faster than LAPACK's inverse.
INVERSE_ROWS = 192


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


def _factored(name: str, x: Tensor) -> Any:
    return getattr(_C, f"spherical_{name}_{'float' if x.dtype == torch.float32 else 'double'}")


def _addresses(*tensors: Tensor) -> list[int]:
    assert all(x.is_contiguous() for x in tensors)
    return [x.data_ptr() for x in tensors]


# The step of a factored layer. What each computes is said in `portable.py`, which has the same names.


def factored_statistics(rows: Tensor, product: Tensor, hidden: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t, square, center = rows.new_empty(rows.shape[:2]), rows.new_empty(len(rows)), rows.new_empty(len(rows))
    _factored("factored_statistics", rows)(
        *_addresses(rows, product, hidden, mean), *rows.shape, *_addresses(t, square, center), torch.get_num_threads()
    )
    return t, square, center


factored_losses = portable.factored_losses


def factored_gradient(
    rows: Tensor, product: Tensor, mean: Tensor, g_t: Tensor, g_v: Tensor, g_mean: Tensor
) -> tuple[Tensor, Tensor]:
    weighted, gradient = torch.empty_like(product), torch.empty_like(product)
    g = [x.contiguous() for x in (g_t, g_v, g_mean)]
    _factored("factored_gradient", rows)(
        *_addresses(rows, product, mean, *g), *rows.shape, *_addresses(weighted, gradient), torch.get_num_threads()
    )
    return weighted, gradient


def factored_factors(
    hidden: Tensor, product: Tensor, weighted: Tensor, g_v: Tensor, lr: float, shrink: float, out: tuple[Tensor, ...]
) -> None:
    _factored("factored_factors", hidden)(
        *_addresses(hidden, product, weighted, g_v), lr, shrink, *hidden.shape, *_addresses(*out),
        torch.get_num_threads(),
    )  # fmt: skip


def factored_pairs(x: Tensor, target: Tensor, g_t: Tensor, g_v: Tensor, lr: float, classes: int) -> None:
    if target.shape[1] == 1:
        _factored("factored_pairs", x)(*_addresses(x, target, g_t, g_v), lr, classes, len(x))
    else:
        portable.factored_pairs(x, target, g_t, g_v, lr, classes)


def factored_inverse(x: Tensor, g_v: Tensor, lr: float, shrink: float) -> tuple[Tensor, bool | Tensor]:
    if len(x) > INVERSE_ROWS:
        return portable.factored_inverse(x, g_v, lr, shrink)
    order = x.new_empty(len(x), dtype=torch.int64)
    exists: bool = _factored("factored_inverse", x)(*_addresses(x, g_v), lr, shrink, len(x), *_addresses(order))
    return x, exists


def factored_growth(solution: Tensor, hidden: Tensor) -> float:
    growth: float = _factored("factored_growth", hidden)(*_addresses(solution, hidden), *hidden.shape)
    return growth


factored_verdict = partial(portable.verdict_by, factored_growth)


def factored_scatter(v: Tensor, target: Tensor, g_t: Tensor, solution: Tensor, lr: float) -> None:
    _factored("factored_scatter", v)(
        *_addresses(v, target, g_t.contiguous(), solution), lr, *target.shape, v.shape[1], torch.get_num_threads()
    )


def symmetric_update(matrix: Tensor, change: Tensor, scale: float) -> None:
    _factored("symmetric_update", matrix)(*_addresses(matrix, change), len(matrix), scale, torch.get_num_threads())


_kernels = _Kernels()
row_moments_fwd = partial(tiles.row_moments_forward, _kernels)
row_moments_bwd = partial(tiles.row_moments_backward, _kernels)
row_moments_bwd_ = partial(tiles.row_moments_backward_, _kernels)
linear_moments_fwd = tiles.linear_moments_forward
linear_moments_bwd = tiles.linear_moments_backward
