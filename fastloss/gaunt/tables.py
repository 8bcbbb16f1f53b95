"""Constants of the family, built in float64 and cached: Legendre functions on rings, Fourier bases, Gaunt tensor.

Built in float32, the Legendre functions alone would lose digits at high degrees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from fastloss.gaunt.program import Program

NORMALIZATIONS = ("integral", "component", "norm")
Build = TypeVar("Build", bound=Callable[..., Any])


def _table(build: Build) -> Build:
    """Caches a builder, whose tensors must outlive the caller's modes, transforms and default device."""

    @lru_cache(maxsize=256)
    @wraps(build)
    def table(*args: Any) -> Any:
        # Inside torch.func.grad, torch.tensor makes wrappers of its level.
        with temporarily_clear_interpreter_stack(), torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            return build(*args)

    return cast(Build, table)


def legendre(degree: int, x: Tensor) -> Tensor:
    """Associated Legendre functions, orthonormal on the sphere without the azimuth's sqrt(2): (len(x), triangle).

    Order by order: m = 0 with l = 0..degree, then m = 1 with l = 1..degree, ... All signs are those of l = m: positive.
    """
    sine = (1 - x * x).clamp(min=0).sqrt()
    columns = []
    diagonal = torch.full_like(x, math.sqrt(1 / (4 * math.pi)))
    for m in range(degree + 1):
        if m:
            diagonal = diagonal * sine * math.sqrt((2 * m + 1) / (2 * m))
        before, here = torch.zeros_like(x), diagonal
        columns.append(here)
        for n in range(m + 1, degree + 1):
            a = math.sqrt((4 * n * n - 1) / (n * n - m * m))
            b = math.sqrt(((n - 1) ** 2 - m * m) / (4 * (n - 1) ** 2 - 1))
            before, here = here, a * (x * here - b * before)
            columns.append(here)
    return torch.stack(columns, 1)


def gauss_legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes x >= 0 and weights of the rule on [-1, 1]; a node x > 0 stands for -x as well, 0 has half its weight."""
    pairs = (nodes + 1) // 2
    x = torch.cos(math.pi * (torch.arange(1, pairs + 1, dtype=torch.float64) - 0.25) / (nodes + 0.5))
    if nodes % 2:
        x[-1] = 0
    derivative = torch.ones_like(x)
    for _ in range(6):  # Newton's method converges quadratically from 1e-2
        before, value = torch.ones_like(x), x
        for n in range(2, nodes + 1):
            before, value = value, ((2 * n - 1) * x * value - (n - 1) * before) / n
        derivative = nodes * (x * value - before) / (x * x - 1)
        if nodes > 1:
            x = x - value / derivative
    weight = 2 / ((1 - x * x) * derivative**2)
    if nodes % 2:
        x[-1] = 0
        weight[-1] /= 2
    return x, weight


def order_at(degree: int, m: int) -> int:
    """First column of order m in :func:`legendre`."""
    return m * (degree + 1) - m * (m - 1) // 2


@_table
def recurrence(degree: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """P_lm = a_m x P_(l-1)m - b_m P_(l-2)m at l = degree: a of orders 0..l-1, b of orders 0..l-2."""
    n = degree
    a = [math.sqrt((4 * n * n - 1) / (n * n - m * m)) for m in range(n)]
    b = [a[m] * math.sqrt(((n - 1) ** 2 - m * m) / (4 * (n - 1) ** 2 - 1)) for m in range(n - 1)]
    first, second = (torch.tensor(values, dtype=torch.float64).to(device, dtype) for values in (a, b))
    return first, second


class Rings(NamedTuple):
    pairs: int
    equator: bool  # the last pair is one ring
    to_ring: Tensor  # (pairs, triangle)
    from_ring: Tensor  # with the quadrature's weights


@_table
def rings(degree: int, total: int, dtype: torch.dtype) -> Rings:
    """Rings on which products of `total` degrees, that of the output included, are exact; CPU tensors."""
    x, weight = gauss_legendre(total // 2 + 1)
    table = legendre(degree, x)
    orders = torch.cat([torch.full((degree + 1 - m,), m) for m in range(degree + 1)])
    # A function is sum_m F_m e^(i m phi); real harmonics carry sqrt(2) for m > 0, half of it in either of +-m.
    to_ring = torch.where(orders > 0, table / math.sqrt(2), table)
    from_ring = torch.where(orders > 0, table * math.sqrt(2), table) * (2 * math.pi * weight)[:, None]
    return Rings(len(x), total // 2 % 2 == 0, to_ring.to(dtype).contiguous(), from_ring.to(dtype).contiguous())


def degrees_of(degree: int) -> list[int]:
    """The degree of each of the (degree + 1)^2 coefficients."""
    return [n for n in range(degree + 1) for _ in range(2 * n + 1)]


@_table
def degree_index(degree: int, device: torch.device) -> Tensor:
    return torch.tensor(degrees_of(degree), device=device)


def harmonic_norm(normalization: str, degree: int) -> float:
    """How much larger a harmonic of this normalization is than the orthonormal one."""
    if normalization == "integral":
        return 1.0
    return math.sqrt(4 * math.pi / (1 if normalization == "component" else 2 * degree + 1))


@_table
def norms(normalization: str, degree: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """:func:`harmonic_norm` of each coefficient."""
    values = [harmonic_norm(normalization, n) for n in degrees_of(degree)]
    return torch.tensor(values, dtype=torch.float64).to(device, dtype)


class Grid(NamedTuple):
    """A ring grid for plain tensor code: values on (rings, azimuths) and back."""

    gather: Tensor  # (2 degree + 1, degree + 1): where order m of degree l is, (degree + 1)^2 for none
    legendre: Tensor  # (2 degree + 1, degree + 1, rings)
    azimuth: Tensor  # (2 degree + 1, azimuths)


@_table
def grid(degree: int, total: int, back: bool, dtype: torch.dtype, device: torch.device) -> Grid:
    """`back`: with the quadrature's weights."""
    half, half_weight = gauss_legendre(total // 2 + 1)
    x, weight = torch.cat((half, -half)), torch.cat((half_weight, half_weight))
    count = total + 1
    values = legendre(degree, x)
    gather = torch.full((2 * degree + 1, degree + 1), (degree + 1) ** 2)
    theta = torch.zeros(2 * degree + 1, degree + 1, len(x), dtype=torch.float64)
    angle = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count
    azimuth = torch.ones(2 * degree + 1, count, dtype=torch.float64)
    for m in range(-degree, degree + 1):
        for n in range(abs(m), degree + 1):
            gather[m + degree, n] = n * n + n + m
            theta[m + degree, n] = values[:, order_at(degree, abs(m)) + n - abs(m)]
        if m:
            azimuth[m + degree] = math.sqrt(2) * (torch.cos(m * angle) if m > 0 else torch.sin(-m * angle))
    if back:
        theta, azimuth = theta * weight, azimuth * (2 * math.pi / count)
    return Grid(gather.to(device), theta.to(device, dtype), azimuth.to(device, dtype))


def _harmonics_on(g: Grid, degree: int) -> Tensor:
    """((degree + 1)^2, points) of all harmonics, ring by ring."""
    dense = torch.einsum("mlr,ma->mlra", g.legendre, g.azimuth).flatten(2)
    out = torch.zeros((degree + 1) ** 2 + 1, dense.shape[-1], dtype=dense.dtype)
    return out.index_put((g.gather.flatten(),), dense.flatten(0, 1))[:-1]


class Antipodes(NamedTuple):
    """Harmonics on one half of a grid, and all there is to know about the other: those of odd degree change sign there.

    Rows and columns are padded with zeros. Rows of even degree come first, then those of odd degree, so that the
    coefficients of a smaller degree are the first of either.
    """

    places: Tensor  # (rows,), int32: which coefficient a row belongs to, beyond all for none
    odd: int  # the first row of odd degree
    harmonics: Tensor  # (rows, points)
    weights: Tensor  # (points,), of the quadrature


def parities(degree: int) -> tuple[list[int], list[int]]:
    """The places of the coefficients of even and of odd degrees."""
    even, odd = ([n * n + n + m for n in range(k, degree + 1, 2) for m in range(-n, n + 1)] for k in (0, 1))
    return even, odd


@_table
def antipodes(degree: int, total: int, rows: int, points: int, dtype: torch.dtype, device: torch.device) -> Antipodes:
    """Exact for integrands of degree `total`; sizes are multiples of `rows` and `points`.

    The southern rings are turned by half a circle, so that every point has its antipode for any number of azimuths.
    """
    _, weight = gauss_legendre(total // 2 + 1)
    g = grid(degree, total, False, torch.float64, torch.device("cpu"))
    values = _harmonics_on(g._replace(legendre=g.legendre[:, :, : len(weight)]), degree)
    weights = weight.repeat_interleave(total + 1) * (2 * math.pi / (total + 1))
    columns = -len(weights) % points

    def padded(places: list[int]) -> tuple[Tensor, Tensor]:
        more = -len(places) % rows
        return F.pad(torch.tensor(places), (0, more), value=len(values)), F.pad(values[places], (0, columns, 0, more))

    (even, above), (odd, below) = map(padded, parities(degree))
    harmonics = torch.cat((above, below)).to(device, dtype).contiguous()
    places = torch.cat((even, odd)).to(device, torch.int32)
    return Antipodes(places, len(even), harmonics, F.pad(weights, (0, columns)).to(device, dtype))


@_table
def gaunt(l1: int, l2: int, l3: int) -> Tensor:
    """The Gaunt tensor ((l1 + 1)^2, (l2 + 1)^2, (l3 + 1)^2), float64, CPU: integrals of three harmonics on a grid."""

    def on_grid(degree: int, back: bool) -> Tensor:
        return _harmonics_on(grid(degree, l1 + l2 + l3, back, torch.float64, torch.device("cpu")), degree)

    y1, y2, y3 = on_grid(l1, False), on_grid(l2, False), on_grid(l3, True)
    tensor: Tensor = (y1[:, None] * y2) @ y3.T
    tensor[tensor.abs() < 1e-12] = 0  # entries that exist are at least 1e-3 at the degrees the tensor is for
    return tensor


class Sparse(NamedTuple):
    """The Gaunt tensor by pairs: out_k = sum_p x1[first_p] x2[second_p] matrix[p, k]."""

    first: Tensor
    second: Tensor
    matrix: Tensor


@_table
def sparse(l1: int, l2: int, l3: int, dtype: torch.dtype, device: torch.device) -> Sparse:
    pairs = gaunt(l1, l2, l3).flatten(0, 1)
    kept = pairs.abs().sum(1).nonzero()[:, 0]
    d2 = (l2 + 1) ** 2
    return Sparse((kept // d2).to(device), (kept % d2).to(device), pairs[kept].to(device, dtype))


class Entries(NamedTuple):
    """A program of products of at most two factors: output k is the sum over its entries of value * at[a] * at[b].

    `at` holds the coefficients of all inputs, one after the other, and a one behind them.
    """

    counts: Tensor  # entries of each coefficient of each output
    places: Tensor  # (entries, 2), flattened: a, b
    values: Tensor


@_table
def entries(in_degrees: tuple[int, ...], program: Program) -> Entries:
    starts = [0]
    for degree in in_degrees:
        starts.append(starts[-1] + (degree + 1) ** 2)
    count = starts[-1] + 1
    keys, values, before = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.float64)], 0
    for degree, terms in zip(program.out_degrees, program.outputs, strict=True):
        for term in terms:
            i, *others = term.factors
            if others:
                (j,) = others
                tensor = gaunt(in_degrees[i], in_degrees[j], degree)
                a, b, k = tensor.nonzero().unbind(1)
                value = tensor[a, b, k]
                a, b = a + starts[i], b + starts[j]
                a, b = torch.minimum(a, b), torch.maximum(a, b)  # of a square, both orders are one entry
            else:
                k = torch.arange((min(in_degrees[i], degree) + 1) ** 2)
                a, b, value = k + starts[i], torch.full_like(k, starts[-1]), torch.ones(len(k), dtype=torch.float64)
            keys.append(((k + before) * count + a) * count + b)
            values.append(value * term.coefficient)
        before += (degree + 1) ** 2
    unique, inverse = torch.unique(torch.cat(keys), return_inverse=True)  # in the order of the outputs
    total = torch.zeros(len(unique), dtype=torch.float64).index_add(0, inverse, torch.cat(values))
    places = torch.stack((unique // count % count, unique % count), 1)
    return Entries(torch.bincount(unique // count**2, minlength=before), places.flatten(), total)


@_table
def columns(degree: int, device: torch.device) -> Tensor:
    """Where l^2 + l + m is in (order, degree), flattened."""
    places = [(m + degree) * (degree + 1) + n for n in range(degree + 1) for m in range(-n, n + 1)]
    return torch.tensor(places, device=device)


@_table
def order_columns(degree: int, device: torch.device) -> Tensor:
    """Where l^2 + l + m is in [cosines of (l, m >= 0), degree by degree; sines of (l, m >= 1), degree by degree]."""
    cosines = (degree + 1) * (degree + 2) // 2
    places = []
    for n in range(degree + 1):
        places += [cosines + n * (n - 1) // 2 + m - 1 for m in range(n, 0, -1)]
        places += [n * (n + 1) // 2 + m for m in range(n + 1)]
    return torch.tensor(places, device=device)


@_table
def irreps_columns(channels: int, degrees: tuple[int, ...], device: torch.device) -> Tensor:
    """(channels, (lmax + 1)^2): where each coefficient is in the layout of irreps, their size where there is none."""
    index = torch.full((channels, (max(degrees) + 1) ** 2), channels * sum(2 * n + 1 for n in degrees))
    start = 0
    for n in degrees:
        size = channels * (2 * n + 1)
        index[:, n * n : (n + 1) ** 2] = torch.arange(start, start + size).view(channels, 2 * n + 1)
        start += size
    return index.to(device)


@_table
def irreps_entries(channels: int, degrees: tuple[int, ...], device: torch.device) -> Tensor:
    """The other way round: where each entry of the irreps is in (channels, (lmax + 1)^2), flattened."""
    index = irreps_columns(channels, degrees, device).flatten()
    return index.argsort()[: channels * sum(2 * n + 1 for n in degrees)]


class Fourier(NamedTuple):
    """Between coefficients and the double Fourier series sum_uv F_uv e^(i (u theta + v phi)), -degree <= u, v."""

    gather: Tensor  # as in Grid
    to_fourier: Tensor  # (2 degree + 1, degree + 1, 2 degree + 1): order, degree, u
    orders: Tensor  # (2 degree + 1, 2 degree + 1): real order, v; complex


@_table
def fourier(degree: int, dtype: torch.dtype, device: torch.device) -> Fourier:
    count = 2 * degree + 1
    theta = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count
    values = legendre(degree, theta.cos())
    gather = torch.full((count, degree + 1), (degree + 1) ** 2)
    table = torch.zeros(count, degree + 1, count, dtype=torch.complex128)
    orders = torch.zeros(count, count, dtype=torch.complex128)
    for m in range(-degree, degree + 1):
        # Beyond theta = pi a ring goes on as the polynomial in cos(theta) times sin(theta)^m, which changes sign there.
        sign = torch.where(theta.sin() < 0, -1.0, 1.0) if m % 2 else torch.ones_like(theta)
        for n in range(abs(m), degree + 1):
            gather[m + degree, n] = n * n + n + m
            series = torch.fft.fft(values[:, order_at(degree, abs(m)) + n - abs(m)] * sign) / count
            table[m + degree, n] = torch.fft.fftshift(series)
        if m == 0:
            orders[degree, degree] = 1
        elif m > 0:
            orders[degree + m, [degree + m, degree - m]] = math.sqrt(0.5)
        else:  # sqrt(2) sin(|m| phi)
            orders.imag[degree + m, degree - m] = -math.sqrt(0.5)
            orders.imag[degree + m, degree + m] = math.sqrt(0.5)
    kind = torch.complex64 if dtype == torch.float32 else torch.complex128
    return Fourier(gather.to(device), table.to(device, kind), orders.to(device, kind))


@_table
def from_fourier(band: int, degree: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(order, degree, u), integrals of e^(i u theta) with the Legendre functions, and (order, v); |u|, |v| <= band."""
    x, weight = gauss_legendre(band + degree + 2)
    x, weight = torch.cat((x, -x)), torch.cat((weight, weight))
    theta = x.acos()
    values = legendre(degree, x)
    u = torch.arange(-band, band + 1, dtype=torch.float64)
    # The series of order v is even (v even) or odd in u, so that only one of the two parts of e^(i u theta) remains.
    even = torch.cos(u * theta[:, None]) * weight[:, None] + 0j
    odd = 1j * torch.sin(u * theta[:, None]) * weight[:, None]
    table = torch.zeros(2 * degree + 1, degree + 1, 2 * band + 1, dtype=torch.complex128)
    orders = torch.zeros(2 * degree + 1, 2 * band + 1, dtype=torch.complex128)
    for m in range(-degree, degree + 1):
        for n in range(abs(m), degree + 1):
            p = values[:, order_at(degree, abs(m)) + n - abs(m)]
            table[m + degree, n] = (p[:, None] * (odd if m % 2 else even)).sum(0)
        if abs(m) > band:
            continue
        if m == 0:
            orders[degree, band] = 2 * math.pi
        elif m > 0:
            orders.real[degree + m, [band + m, band - m]] = math.sqrt(2) * math.pi
        else:
            orders.imag[degree + m, band - m] = math.sqrt(2) * math.pi
            orders.imag[degree + m, band + m] = -math.sqrt(2) * math.pi
    kind = torch.complex64 if dtype == torch.float32 else torch.complex128
    return table.to(device, kind), orders.to(device, kind)
