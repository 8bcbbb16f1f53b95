"""The Gaunt op on CUDA and ROCm devices: one kernel, by dense transforms on the matrix units.

A program takes a block of lanes (functions side by side in all tensors). It goes through a grid on the sphere a few
points at a time: the inputs' coefficients times a table of harmonics are their values there, which are multiplied, and
the products times the same table are added to the outputs' coefficients, in registers. No values on the grid reach
memory. A point and its antipode are one column of the table: even degrees have the same value at both, odd degrees the
opposite one, which halves the arithmetic. Rings or the sparse tensor, and so `direct`, make no difference here.

float32: the transforms' factors as `_triton.float32_precision` has them, sums in float32. No atomics.

Portable are: float64; integrands of a degree above MOST_TOTAL, where the dense transforms' O(L^5) lose to the rings'
O(L^3); and programs of more than MOST_INPUTS functions, whose values outgrow the registers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastloss import _triton
from fastloss._triton import Config, Specimen
from fastloss.gaunt import portable
from fastloss.gaunt.program import Program, Term, degree_of
from fastloss.gaunt.tables import antipodes, parities

# From the published peaks of an H100, at half of them for the products: a product of degrees L, L to 2 L takes 18 ns a
# lane at L = 10, and the portable rings, which write their grids to memory, 20 ns. At L = 12 it is 37 and 29 ns.
MOST_TOTAL = 40
MOST_INPUTS = 6
MOST_SUMS = 6  # tiles of coefficients that a launch sums in registers; more of them take several launches
MOST_LANES = 128  # of a program
NARROW = 1 << 31  # places in a block of lanes below it are of 32 bits, which take half the registers
TILE = 16  # coefficients, the least that the matrix units take
_TILE = tl.constexpr(TILE)

# ---------------------------------------------------------------- kernel


@triton.jit
def _pointers(x, strides, size, places, row, begin, outer, channel, exists, SIDE: tl.constexpr):
    """To the coefficients of a tile of the table's rows: (TILE, lanes); with SIDE, where lanes run fastest, transposed.

    The compiler knows no neighbours in either dimension, and then lets neighbouring threads run along the first.
    """
    place = tl.load(places + row + tl.arange(0, _TILE))
    x += begin * strides[0]
    start = outer * strides[0] + channel * strides[1]
    offset = place.to(channel.dtype) * strides[2]
    wanted = place < size
    if SIDE:
        pointers, inside = x + start[:, None] + offset[None, :], exists[:, None] & wanted[None, :]
    else:
        pointers, inside = x + offset[:, None] + start[None, :], wanted[:, None] & exists[None, :]
    return pointers, inside


@triton.jit
def _harmonics_at(harmonics, row, point, point_count, POINTS: tl.constexpr):
    rows, points = row + tl.arange(0, _TILE), point + tl.arange(0, POINTS)
    return tl.load(harmonics + rows[:, None] * point_count + points[None, :])


@triton.jit
def _values(
    x, strides, size, places, harmonics, first, point, begin, outer, channel, exists, point_count,
    TILES: tl.constexpr, SIDE: tl.constexpr, LANES: tl.constexpr, POINTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the part of the functions that has one parity, whose rows of the table begin at `first`."""
    total = tl.zeros((LANES, POINTS), tl.float32)
    for row in range(first, first + TILES * _TILE, _TILE):
        pointers, inside = _pointers(x, strides, size, places, row, begin, outer, channel, exists, SIDE)
        coefficients = tl.load(pointers, mask=inside, other=0.0)
        if not SIDE:
            coefficients = tl.trans(coefficients)
        basis = _harmonics_at(harmonics, row, point, point_count, POINTS)
        total = tl.dot(coefficients, basis, total, input_precision=PRECISION)
    return total


@triton.jit
def _combine(values, OUTPUT: tl.constexpr, TERMS: tl.constexpr, LANES: tl.constexpr, POINTS: tl.constexpr):
    """The values of an output from those of the inputs."""
    total = tl.zeros((LANES, POINTS), tl.float32)
    for t in tl.static_range(len(TERMS)):
        if TERMS[t][0] == OUTPUT:
            product = values[TERMS[t][2]] * TERMS[t][1]
            for f in tl.static_range(3, len(TERMS[t])):
                product *= values[TERMS[t][f]]
            total += product
    return total


@triton.jit(do_not_specialize=["lane_count", "channels"])
def _kernel(
    inputs, outputs, in_strides, out_strides, places, harmonics, weights, lane_count, channels, point_count,
    IN_SIZES: tl.constexpr,  # coefficients
    EVEN: tl.constexpr, ODD: tl.constexpr,  # tiles of coefficients of either parity, of each input
    OUT_SIZES: tl.constexpr,
    TERMS: tl.constexpr,  # (output, coefficient, factors...)
    SUMS: tl.constexpr,  # (output, parity, row of the table): the tiles of coefficients that are computed
    FIRST_ODD: tl.constexpr, SIDE: tl.constexpr,
    INDEX: tl.constexpr,  # of places within a block of lanes
    LANES: tl.constexpr, POINTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Lanes are (outer, channel), outer from `begin` on. Divided before the loop: no compiler moves a division there.
    lane = tl.program_id(0).to(tl.int64) * LANES
    begin = lane // channels
    lanes = (lane - begin * channels).to(INDEX) + tl.arange(0, LANES)
    outer, channel = lanes // channels, lanes % channels
    exists = tl.arange(0, LANES) < tl.minimum(lane_count - lane, LANES).to(tl.int32)
    sums: tl.tuple = ()
    for _ in tl.static_range(len(SUMS)):
        sums += (tl.zeros((LANES, _TILE), tl.float32),)
    for point in range(0, point_count, POINTS):
        here: tl.tuple = ()
        opposite: tl.tuple = ()
        for i in tl.static_range(len(IN_SIZES)):
            even = _values(
                inputs[i], in_strides[i], IN_SIZES[i], places, harmonics, 0, point,
                begin, outer, channel, exists, point_count, EVEN[i], SIDE, LANES, POINTS, PRECISION,
            )  # fmt: skip
            odd = _values(
                inputs[i], in_strides[i], IN_SIZES[i], places, harmonics, FIRST_ODD, point,
                begin, outer, channel, exists, point_count, ODD[i], SIDE, LANES, POINTS, PRECISION,
            )  # fmt: skip
            here += (even + odd,)
            opposite += (even - odd,)
        weight = tl.load(weights + point + tl.arange(0, POINTS))[None, :]
        more: tl.tuple = ()
        for o in tl.static_range(len(OUT_SIZES)):
            first = _combine(here, o, TERMS, LANES, POINTS) * weight
            second = _combine(opposite, o, TERMS, LANES, POINTS) * weight
            for s in tl.static_range(len(SUMS)):
                if SUMS[s][0] == o:
                    f = first - second if SUMS[s][1] else first + second
                    basis = _harmonics_at(harmonics, SUMS[s][2], point, point_count, POINTS)
                    more += (tl.dot(f, tl.trans(basis), sums[s], input_precision=PRECISION),)
        sums = more
    for s in tl.static_range(len(SUMS)):
        pointers, inside = _pointers(
            outputs[SUMS[s][0]], out_strides[SUMS[s][0]], OUT_SIZES[SUMS[s][0]], places, SUMS[s][2],
            begin, outer, channel, exists, SIDE,
        )  # fmt: skip
        tl.store(pointers, sums[s] if SIDE else tl.trans(sums[s]), mask=inside)


# ---------------------------------------------------------------- configurations

# Lanes of a program, and points at a time.
_TABLE = {
    **dict.fromkeys(("sm_80", "sm_86"), Config((64, 16), 4, 1)),
    **dict.fromkeys(("sm_90", "sm_100", "gfx942"), Config((64, 16), 4, 2)),
    _triton.INTERPRETER: Config((16, 16)),
}
_ANYWHERE = (Config((32, 16), 4, 1), Config((32, 16), 4, 2), Config((64, 16), 8, 2))
_CANDIDATES = {
    **dict.fromkeys(("sm_86", "sm_100"), _ANYWHERE),
    **dict.fromkeys(("sm_80", "sm_90", "gfx942"), (*_ANYWHERE, Config((128, 16), 8, 2))),
    _triton.INTERPRETER: (Config((32, 32)),),
}


def _spread(config: Config, inputs: int) -> Config:
    """The values of many functions go to twice as many threads."""
    return replace(config, num_warps=2 * config.num_warps) if inputs > 3 else config


# ---------------------------------------------------------------- launches


@lru_cache(maxsize=1024)
def _launches(in_degrees: tuple[int, ...], program: Program) -> list[dict[str, Any]]:
    """The kernel's constants, launch by launch."""

    def tiles(degree: int) -> tuple[int, ...]:
        return tuple(triton.cdiv(len(places), TILE) for places in parities(degree))

    first_odd = TILE * tiles(max(*in_degrees, *program.out_degrees))[0]
    groups: list[tuple[tuple[int, int, int], ...]] = [()]
    for o, degree in enumerate(program.out_degrees):
        sums = [(o, odd, odd * first_odd + TILE * n) for odd, count in enumerate(tiles(degree)) for n in range(count)]
        size = triton.cdiv(len(sums), triton.cdiv(len(sums), MOST_SUMS))
        for begin in range(0, len(sums), size):
            group = tuple(sums[begin : begin + size])
            if len(groups[-1]) + len(group) > MOST_SUMS:
                groups.append(())
            groups[-1] += group
    constants = {
        "IN_SIZES": tuple((n + 1) ** 2 for n in in_degrees),
        "EVEN": tuple(tiles(n)[0] for n in in_degrees),
        "ODD": tuple(tiles(n)[1] for n in in_degrees),
        "OUT_SIZES": tuple((n + 1) ** 2 for n in program.out_degrees),
        "TERMS": tuple((o, t.coefficient, *t.factors) for o, terms in enumerate(program.outputs) for t in terms),
        "FIRST_ODD": first_odd,
    }
    return [constants | {"SUMS": group} for group in groups]


def _as_lanes(x: Tensor, channels_last: bool) -> Tensor:
    """(lanes / channels, channels, coefficients): a view, but of tensors whose leading dimensions are no two."""
    x = x.mT if channels_last else x
    lead = x.shape[:-1]
    return x.reshape(math.prod(lead[:-1]), lead[-1], x.shape[-1]) if len(lead) > 1 else x.reshape(-1, 1, x.shape[-1])


def _reach(x: Tensor) -> int:
    """The largest place within a block of lanes."""
    outer, channel, coefficient = x.stride()
    _, channels, size = x.shape
    return (MOST_LANES // channels + 1) * outer + (channels - 1) * channel + (size - 1) * coefficient


def gaunt_ring_fwd(inputs: list[Tensor], program: Program, channels_last: bool, direct: bool) -> list[Tensor]:
    degrees = tuple(degree_of(x, channels_last) for x in inputs)
    total, like = program.total(degrees), inputs[0]
    if like.dtype == torch.float64 or total > MOST_TOTAL or len(inputs) > MOST_INPUTS:
        return portable.gaunt_ring_fwd(inputs, program, channels_last, direct)
    lead, tail = (like.shape[:-2], like.shape[-1:]) if channels_last else (like.shape[:-1], ())
    out = [like.new_empty((*lead, (n + 1) ** 2, *tail)) for n in program.out_degrees]
    x, y = ([_as_lanes(t, channels_last) for t in tensors] for tensors in (inputs, out))
    if x[0].numel():
        _run(x, y, degrees, program, total, channels_last)
    return out


def _run(
    x: Sequence[Tensor], y: Sequence[Tensor], degrees: tuple[int, ...], program: Program, total: int, side: bool
) -> None:
    lanes, channels, device = x[0].shape[0] * x[0].shape[1], x[0].shape[1], x[0].device
    top = max(*degrees, *program.out_degrees)
    index = tl.int32 if max(map(_reach, (*x, *y))) < NARROW else tl.int64

    def launch(config: Config) -> None:
        block, points = config.blocks
        table = antipodes(top, total, TILE, points, torch.float32, device)
        for constants in _launches(degrees, program):
            _kernel[(triton.cdiv(lanes, block),)](
                tuple(x), tuple(y), tuple(t.stride() for t in x), tuple(t.stride() for t in y),
                table.places, table.harmonics, table.weights, lanes, channels, len(table.weights),
                **constants, SIDE=side, INDEX=index, LANES=block, POINTS=points,
                PRECISION=_triton.float32_precision(), num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip

    key = f"gaunt {degrees} {program.text()} {side} {_triton.size_class(lanes)}"
    default = _spread(_triton.pick(_TABLE, device), len(x))
    with _triton.on(x[0]):
        launch(_triton.best(key, device, default, _triton.pick(_CANDIDATES, device), launch))


# ---------------------------------------------------------------- specimens for the gates


def specimens(target: str, candidates: bool) -> list[Specimen]:
    """Products and their derivatives at the degrees of models in use; with `candidates`, in all that tuning tries."""
    product = Program((8,), ((Term(1, (0, 1)),),))
    gradient = product.gradient((True,) * 2, (25, 25), (True,))
    second = gradient.gradient((True,) * 3, (25, 25, 81), (True,) * 2)
    bodies = Program((12,), ((Term(1, (0, 1, 2, 3)),),))
    cases = {
        "product L = 4": ((4, 4), product, False),
        "product L = 4 channels last": ((4, 4), product, True),
        "product L = 4 gradient": ((4, 4, 8), gradient, False),
        "product L = 4 second gradient": ((4, 4, 8, 4, 4), second, False),
        "4 bodies L = 3 gradient": ((3, 3, 3, 3, 12), bodies.gradient((True,) * 4, (16,) * 4, (True,)), False),
    }
    extra = {f" candidate {i}": config for i, config in enumerate(_CANDIDATES[target] if candidates else ())}
    return [
        _specimen(f"{name}, launch {part}{note}", degrees, program, constants, side, config, target)
        for name, (degrees, program, side) in cases.items()
        for note, config in ({"": _spread(_TABLE[target], len(degrees))} | extra).items()
        for part, constants in enumerate(_launches(degrees, program))
    ]


def _specimen(
    name: str,
    degrees: tuple[int, ...],
    program: Program,
    constants: dict[str, Any],
    side: bool,
    config: Config,
    target: str,
) -> Specimen:
    lanes, points = config.blocks
    count, outputs = len(degrees), len(program.out_degrees)
    types: dict[str, Any] = {"inputs": ("*fp32",) * count, "outputs": ("*fp32",) * outputs}
    types |= {"in_strides": (("i32",) * 3,) * count, "out_strides": (("i32",) * 3,) * outputs}
    types |= {"places": "*i32", "harmonics": "*fp32", "weights": "*fp32"}
    types |= dict.fromkeys(("lane_count", "channels", "point_count"), "i32")
    precision = "tf32x3" if target.startswith("sm") else "ieee"
    constants = constants | {"SIDE": side, "INDEX": tl.int32, "LANES": lanes, "POINTS": points, "PRECISION": precision}
    aligned = frozenset({"places", "harmonics", "weights", "point_count"})
    return Specimen(f"gaunt {name}", _kernel, types, constants, config, aligned, True)
