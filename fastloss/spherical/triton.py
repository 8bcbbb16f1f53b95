"""The spherical ops on CUDA and ROCm devices: rows of logits in Triton, hidden states as in `tiles.py`.

Rows are read once forward, and read and written once backward, at the speed of memory. Each program takes a part of
some rows and leaves mean and sum of squares about it; a second kernel merges the parts in their order, so results do
not change from run to run. All dtypes; 16 bits are summed in float32. The linear forms are products of the vendor's
library in float32, which follow `torch.set_float32_matmul_precision`.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss import _triton
from fastloss._triton import Config, Specimen
from fastloss.spherical import portable, tiles
from fastloss.spherical.tiles import Rows

# ---------------------------------------------------------------- kernels


@triton.jit
def _merge(count, mean, square, new_count, new_mean, new_square):
    """Mean and sum of squares about it, of two sets of numbers together (Chan, Golub and LeVeque)."""
    both = count + new_count
    share = tl.where(both > 0, new_count / tl.maximum(both, 1.0), 0.0)
    delta = new_mean - mean
    return both, mean + delta * share, square + new_square + delta * delta * (count * share)


@triton.jit
def _load(x, rows, cols, row_count, end, row_stride, col_stride):
    inside = (rows < row_count)[:, None] & (cols < end)[None, :]
    place = x + rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    return tl.load(place, mask=inside, other=0.0), inside


@triton.jit
def _moments_kernel(
    x, parts, row_count, classes, span, row_stride, col_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """parts (splits, 3, rows): of the `span` classes of this split, the mean as high + low, and the sum of squares."""
    wide = parts.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    begin = split * span
    end = tl.minimum(begin + span, classes)
    # Everything is taken about a number near the mean: what is left keeps the digits of the spread.
    value, inside = _load(x, rows, begin + tl.arange(0, BLOCK), row_count, end, row_stride, col_stride)
    pivot = tl.sum(value.to(wide), 1) / tl.minimum(end - begin, BLOCK).to(wide)
    count = tl.zeros((ROWS,), wide)
    mean = tl.zeros((ROWS,), wide)
    square = tl.zeros((ROWS,), wide)
    for start in range(begin, end, BLOCK):
        value, inside = _load(x, rows, start + tl.arange(0, BLOCK), row_count, end, row_stride, col_stride)
        near = tl.where(inside, value.to(wide) - pivot[:, None], 0.0)
        size = tl.zeros((ROWS,), wide) + tl.minimum(end - start, BLOCK).to(wide)
        own = tl.sum(near, 1) / size
        off = tl.where(inside, near - own[:, None], 0.0)
        count, mean, square = _merge(count, mean, square, size, own, tl.sum(off * off, 1))
    high = pivot + mean
    place = parts + split.to(tl.int64) * 3 * row_count + rows
    tl.store(place, high, mask=rows < row_count)
    tl.store(place + row_count, (pivot - high) + mean, mask=rows < row_count)
    tl.store(place + 2 * row_count, square, mask=rows < row_count)


@triton.jit
def _merge_kernel(
    parts, x, target, high_out, low_out, square_out, centred_out, logit_out,
    row_count, classes, splits, span, row_stride, col_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """The statistics of whole rows, and the target's logit, 0 without a target."""
    wide = parts.dtype.element_ty
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = rows < row_count
    first = tl.load(parts + rows, mask=exists, other=0.0)
    count = tl.zeros((BLOCK,), wide)
    mean = tl.zeros((BLOCK,), wide)
    square = tl.zeros((BLOCK,), wide)
    place = parts + rows
    begin = 0
    for _ in range(splits):
        size = tl.zeros((BLOCK,), wide) + tl.minimum(classes - begin, span).to(wide)
        high = tl.load(place, mask=exists, other=0.0)
        low = tl.load(place + row_count, mask=exists, other=0.0)
        new_square = tl.load(place + 2 * row_count, mask=exists, other=0.0)
        count, mean, square = _merge(count, mean, square, size, (high - first) + low, new_square)
        place += 3 * row_count
        begin += span
    # One split: the mean is the part's own, to its last digit.
    own_low = tl.load(parts + row_count + rows, mask=exists, other=0.0)
    high = tl.where(splits == 1, first, first + mean)
    low = tl.where(splits == 1, own_low, (first - high) + mean)
    t = tl.load(target + rows, mask=exists, other=-1)
    place = x + rows.to(tl.int64) * row_stride + tl.maximum(t, 0) * col_stride
    logit = tl.load(place, mask=exists & (t >= 0), other=0.0).to(wide)
    tl.store(high_out + rows, high, mask=exists)
    tl.store(low_out + rows, low, mask=exists)
    tl.store(square_out + rows, square, mask=exists)
    tl.store(logit_out + rows, logit, mask=exists)
    tl.store(centred_out + rows, tl.where(t >= 0, (logit - high) - low, 0.0), mask=exists)


@triton.jit
def _gradient_kernel(
    x, target, high, low, shift, scale, spike, out,
    row_count, classes, row_stride, col_stride, out_row_stride, out_col_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`tiles.Kernels.gradient`; out may be x."""
    parts = tl.cdiv(classes, BLOCK)
    rows = tl.program_id(0) // parts * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    exists = rows < row_count
    a = tl.load(shift + rows, mask=exists, other=0.0)
    b = tl.load(scale + rows, mask=exists, other=0.0)
    c = tl.load(spike + rows, mask=exists, other=0.0)
    t = tl.load(target + rows, mask=exists, other=-1)
    touched = (a != 0) | (b != 0) | (c != 0)
    value, inside = _load(x, rows, cols, row_count, classes, row_stride, col_stride)
    off = value.to(a.dtype) - tl.load(high + rows, mask=exists, other=0.0)[:, None]
    off -= tl.load(low + rows, mask=exists, other=0.0)[:, None]
    g = a[:, None] + b[:, None] * off
    g += tl.where(cols[None, :] == t[:, None], c[:, None], 0.0)
    g = tl.where(touched[:, None], g, 0.0)
    place = out + rows.to(tl.int64)[:, None] * out_row_stride + cols.to(tl.int64)[None, :] * out_col_stride
    tl.store(place, g.to(out.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------- configurations

# Numbers of a program at a time, and how many of a row at most.
_DEFAULT = Config((4096, 4096), 8)
_TABLE = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_90", "sm_100", "gfx942"), _DEFAULT),
    _triton.INTERPRETER: Config((512, 64)),
}
_CANDIDATES = (Config((2048, 2048), 4), Config((4096, 4096), 4), Config((8192, 8192), 8))
_MERGE_BLOCK = 128
_PROGRAMS = 4  # a multiprocessor, that rows are split to reach


def _size(config: Config, classes: int) -> dict[str, int]:
    """A program's numbers as some rows of few classes or a part of one row."""
    block = min(config.blocks[1], triton.next_power_of_2(max(classes, 1)))
    return {"ROWS": config.blocks[0] // block, "BLOCK": block}


def _config(kernel: str, x: Tensor, launch: object) -> Config:
    candidates = _CANDIDATES if x.is_cuda else (Config((256, 32)),)
    default = _triton.pick(_TABLE, x.device)
    return _triton.best(f"{kernel} {x.dtype} {_triton.size_class(*x.shape)}", x.device, default, candidates, launch)  # type: ignore[arg-type]


# ---------------------------------------------------------------- launches


class _Kernels:
    def fresh(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    def moments(self, logits: Tensor, target: Tensor, out: Rows) -> None:
        rows, classes = logits.shape
        strides = logits.stride()
        state: list[tuple[Tensor, int]] = []

        def launch(config: Config) -> None:
            size = _size(config, classes)
            programs = triton.cdiv(rows, size["ROWS"])
            wanted = triton.cdiv(_PROGRAMS * _triton.multiprocessors(logits.device), programs)
            blocks = triton.cdiv(classes, size["BLOCK"])
            span = triton.cdiv(blocks, min(blocks, wanted)) * size["BLOCK"]
            parts = out.high.new_empty((triton.cdiv(classes, span), 3, rows))
            _moments_kernel[(programs, len(parts))](
                logits, parts, rows, classes, span, *strides, **size, num_warps=config.num_warps
            )
            state[:] = [(parts, span)]

        with _triton.on(logits):
            launch(_config("moments", logits, launch))
            parts, span = state[0]
            _merge_kernel[(triton.cdiv(rows, _MERGE_BLOCK),)](
                parts, logits, target, out.high, out.low, out.square, out.centred, out.logit,
                rows, classes, len(parts), span, *strides, BLOCK=_MERGE_BLOCK,
            )  # fmt: skip

    def gradient(
        self, logits: Tensor, target: Tensor, stats: Tensor, shift: Tensor, scale: Tensor, spike: Tensor, out: Tensor
    ) -> None:
        rows, classes = logits.shape

        def launch(config: Config) -> None:
            size = _size(config, classes)
            _gradient_kernel[(triton.cdiv(rows, size["ROWS"]) * triton.cdiv(classes, size["BLOCK"]),)](
                logits, target, stats[0], stats[1], shift, scale, spike, out,
                rows, classes, *logits.stride(), *out.stride(), **size, num_warps=config.num_warps,
            )  # fmt: skip

        with _triton.on(logits):
            # In place it can run once only, so it is not what tuning times.
            in_place = out.data_ptr() == logits.data_ptr()
            launch(_triton.pick(_TABLE, logits.device) if in_place else _config("gradient", logits, launch))


_kernels = _Kernels()
row_moments_fwd = partial(tiles.row_moments_forward, _kernels)
row_moments_bwd = partial(tiles.row_moments_backward, _kernels)
row_moments_bwd_ = partial(tiles.row_moments_backward_, _kernels)
linear_moments_fwd = tiles.linear_moments_forward
linear_moments_bwd = tiles.linear_moments_backward
factored_statistics = portable.factored_statistics
factored_gradient = portable.factored_gradient
factored_factors = portable.factored_factors
factored_pairs = portable.factored_pairs
factored_inverse = portable.factored_inverse
factored_growth = portable.factored_growth
factored_scatter = portable.factored_scatter
symmetric_update = portable.symmetric_update


# ---------------------------------------------------------------- specimens for the gates


def specimens(target: str, candidates: bool) -> list[Specimen]:
    """Every kernel at GPT-2's vocabulary, logits side by side; with `candidates`, in all that tuning tries."""
    found = []
    for dtype, name in (("*bf16", "bfloat16"), ("*fp32", "float32"), *((("*fp64", "float64"),) if candidates else ())):
        wide = "*fp64" if dtype == "*fp64" else "*fp32"
        configs = {_TABLE[target]: ""} | (
            {config: f" candidate {i}" for i, config in enumerate(_CANDIDATES)} if candidates else {}
        )
        for config, note in configs.items():
            found += _row_specimens(dtype, wide, f"{name}{note}", config)
    return found


def _row_specimens(dtype: str, wide: str, name: str, config: Config) -> list[Specimen]:
    sizes, side_by_side = _size(config, 50_257), {"col_stride": 1}
    moments = {"x": dtype, "parts": wide} | dict.fromkeys(("row_count", "classes", "span", "row_stride"), "i32")
    outputs = ("parts", "high_out", "low_out", "square_out", "centred_out", "logit_out")
    merge = {"x": dtype, "target": "*i64"} | dict.fromkeys(outputs, wide)
    merge |= dict.fromkeys(("row_count", "classes", "splits", "span", "row_stride"), "i32")
    gradient = {"x": dtype, "target": "*i64", "out": dtype}
    gradient |= dict.fromkeys(("high", "low", "shift", "scale", "spike"), wide)
    gradient |= dict.fromkeys(("row_count", "classes", "row_stride", "out_row_stride"), "i32")
    aligned = frozenset({"x", "row_stride"})
    return [
        Specimen(f"moments {name}", _moments_kernel, moments, sizes | side_by_side, config, aligned),
        Specimen(f"merge {name}", _merge_kernel, merge, side_by_side | {"BLOCK": _MERGE_BLOCK}, Config((128,))),
        Specimen(
            f"moments gradient {name}", _gradient_kernel, gradient, sizes | side_by_side | {"out_col_stride": 1},
            config, aligned | {"out", "out_row_stride"},
        ),
    ]  # fmt: skip
