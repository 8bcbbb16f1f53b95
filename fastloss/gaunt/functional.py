"""Products of functions on the sphere: checks, shapes, and one call of the op."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss._checks import FLOATS, check_device, check_flag, check_strided
from fastloss._ops import unobserved
from fastloss.gaunt.constants import norms, table
from fastloss.gaunt.harmonics import harmonics
from fastloss.gaunt.methods import fft
from fastloss.gaunt.ops import multiplier
from fastloss.gaunt.program import degree_of, degree_of_size
from fastloss.gaunt.tables import NORMALIZATIONS

METHODS = ("auto", "ring", "direct", "fft")
MOST_FACTORS = 16
DIRECT_DEGREES = 12  # l1 + l2 + l3 up to which "auto" takes the sparse tensor: measured, see CONTRIBUTING.md


def gaunt_tensor_product(
    x1: Tensor,
    x2: Tensor,
    lmax_out: int | None = None,
    *,
    weights: Sequence[Tensor | None] | None = None,
    method: str = "auto",
    normalization: str = "integral",
    dim: int = -1,
) -> Tensor:
    r"""Coefficients of the product of two functions on the sphere, in O(L³) a pair of functions.

    .. math::
        z_{l_3 m_3} = \sum_{l_1 m_1 l_2 m_2} x_{l_1 m_1} y_{l_2 m_2} \int Y_{l_1 m_1} Y_{l_2 m_2} Y_{l_3 m_3} \,d\Omega

    The integral is e3nn's ``wigner_3j`` times sqrt((2 l1 + 1)(2 l2 + 1)(2 l3 + 1) / 4π) |3j(l1 l2 l3; 0 0 0)|.
    It is **not** the Clebsch-Gordan product: paths with odd l1 + l2 + l3 vanish, so there is no cross product, and
    x y = y x. Degrees that l1 and l2 do couple to:

    ====== ====== ========= ============ ===============
    l1\l2  0      1         2            3
    ====== ====== ========= ============ ===============
    0      0      1         2            3
    1      1      0, 2      1, 3         2, 4
    2      2      1, 3      0, 2, 4      1, 3, 5
    3      3      2, 4      1, 3, 5      0, 2, 4, 6
    ====== ====== ========= ============ ===============

    Real harmonics in e3nn's order and signs: y is the pole, m = -l..l. In that order the parity of degree l is (-1)^l,
    and the product keeps it.

    Args:
        x1: (..., (l1 + 1)²) for degrees 0..l1, float64, float32, bfloat16 or float16; any strides.
        x2: (..., (l2 + 1)²), the dtype of x1; leading dimensions broadcast. If it is the tensor `x1`, the square is
            computed as one.
        lmax_out: degrees 0..lmax_out are returned; None for l1 + l2, all there are. Beyond that: zeros.
        weights: None, or three tensors or Nones: a factor for each degree of x1 (..., l1 + 1), of x2 (..., l2 + 1) and
            of the output (..., lmax_out + 1). Leading dimensions broadcast with those of the coefficients; with `dim` =
            -2 they are (..., C), degrees stay last. Path (l1, l2, l3) has the product of its three factors, not a
            number of its own: that would take a product a path. Differentiable.
        method: "ring" (exact quadrature over rings of latitude, short Fourier series on each), "direct" (the sparse
            Gaunt tensor: for small degrees, its table grows as L⁵), "fft" (double Fourier series), equal to rounding.
            "auto": "direct" where l1 + l2 + lmax_out is at most 12, else "ring". As measured with the native kernels:
            "direct" is faster up to 12 (l1 = l2 = 3), both take about the same time at 16, and beyond that the rings
            win at every degree up to 24, the largest of `benchmarks/gaunt.py`; "fft" has not caught up with them there.
        normalization: of the harmonics that the coefficients belong to: "integral" (orthonormal), "component"
            (|Y_l|² = 2l + 1) or "norm" (|Y_l| = 1), as e3nn names them.
        dim: -1, or -2 for (..., (l + 1)², C): functions side by side, coefficients in the dimension before.

    Returns:
        (..., (lmax_out + 1)²), the dtype of the inputs, under autocast the widest of theirs; 16-bit inputs are
        multiplied and summed in float32 and rounded once.
        Differentiable seven times, or five in forward mode (see :func:`fastloss.gaunt_product`), under ``torch.func``
        and in ``torch.compile``, where ``torch.func.grad`` gives gradients that are differentiated again (forces in a
        loss). NaN in a function makes NaN of what depends on it, and of nothing in other functions.

    Raises:
        TypeError: not dense tensors, not of one floating dtype (but under autocast); `lmax_out` is not an int.
        ValueError: a last dimension that is not a square, shapes that do not broadcast, devices that differ, weights
            that do not match the degrees or do not broadcast, negative `lmax_out`, unknown `method` or `normalization`.
        RuntimeError: a derivative of more than 64 functions.

    Memory:
        The inputs for the backward pass, and a scratch of some 40 (l1 + l2)² vectors of 64 bytes a thread (portable
        backend: tiles of about 1 MiB a tensor, 64 MiB on a GPU; Triton: none). "fft" stores complex series of every
        function.

    Determinism:
        Each function is computed by one thread; results do not depend on the number of threads. "fft" as torch's
        products and FFTs.

    Source:
        Luo, Chen and Krishnapriyan, *Enabling efficient equivariant operations in the Fourier basis via Gaunt tensor
        products*, 2024 ("fft"); the rings are those of every spectral transform method.

    Example:
        >>> x = torch.tensor([[0.0, 0.0, 1.0, 0.0]])  # y / |r|, but for a factor
        >>> fastloss.gaunt_tensor_product(x, x)  # y² is a constant and a multiple of Y_20
        tensor([[0.2821, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000, 0.2523, 0.0000, 0.0000]])
    """
    name = "gaunt_tensor_product"
    if weights is None and normalization == "integral" and x1 is not x2 and type(dim) is int and dim == -1:
        short = _short_way(x1, x2, lmax_out, method)
        if short is not None:
            return short
    l1 = _check_function(name, "x1", x1, dim)
    l2 = _check_function(name, "x2", x2, dim)
    dtype = _common_dtype(name, ("x1", "x2"), (x1, x2))
    l3 = _check_degree(name, "lmax_out", l1 + l2 if lmax_out is None else lmax_out)
    check_one_of(name, "method", method, METHODS)
    check_one_of(name, "normalization", normalization, NORMALIZATIONS)
    w1, w2, w3 = _check_weights(name, weights, (l1, l2, l3), x1)
    _check_weights_broadcast(name, (w1, w2, w3), x1, x2, dim)
    squared = x1 is x2 and w1 is w2
    degree = min(l3, l1 + l2)
    a = _scaled(x1.to(dtype), w1, l1, normalization, dim, 1)
    b = a if squared else _scaled(x2.to(dtype), w2, l2, normalization, dim, 1)
    if method == "fft" and 0 not in (a.numel(), b.numel()):
        out = _by_fourier(name, a, b, (l1, l2, degree), dim)
    else:
        out = _multiply(name, [a] if squared else [a, b], (0, 0) if squared else (0, 1), degree, dim, method)
    w3 = w3 if w3 is None else w3[..., : degree + 1]
    return _padded(_scaled(out, w3, degree, normalization, dim, -1), degree, l3, dim).to(dtype)


def gaunt_product(
    xs: Sequence[Tensor], lmax_out: int | None = None, *, normalization: str = "integral", dim: int = -1
) -> Tensor:
    r"""Coefficients of the product of several functions on the sphere (many-body features).

    .. math::
        z = x^{(1)} x^{(2)} \cdots x^{(n)} \quad\text{as functions, up to degree lmax\_out}

    All functions are brought to the rings once, multiplied there, and brought back once; nothing is cut off in
    between. A tensor that is there several times is brought there once.

    Args:
        xs: 1 to 16 tensors (..., (l + 1)²), degrees may differ; one dtype; leading dimensions broadcast.
        lmax_out: degrees 0..lmax_out are returned; None for the sum of all degrees. Beyond that: zeros.
        normalization: as :func:`fastloss.gaunt_tensor_product`.
        dim: as :func:`fastloss.gaunt_tensor_product`.

    Returns:
        (..., (lmax_out + 1)²), the dtype of the inputs (under autocast the widest); 16-bit inputs are multiplied and
        summed in float32.
        Differentiable as long as a derivative depends on 64 functions at most: the factors, and one for each gradient
        or tangent of a lower order. Of 2 factors there are seven derivatives (in forward mode alone five), of 16
        different ones three (two). The gradients of all inputs are one call of the same kernel.

    Raises:
        TypeError: `xs` is not a sequence of tensors of one floating dtype; `lmax_out` is not an int.
        ValueError: no tensors or more than 16, sizes that are not squares, shapes that do not broadcast, negative
            `lmax_out`, unknown `normalization`.
        RuntimeError: a derivative of more than 64 functions.

    Memory:
        The inputs for the backward pass, and a bounded scratch a thread.

    Determinism:
        Results do not depend on the number of threads.

    Source:
        Luo, Chen and Krishnapriyan, *Enabling efficient equivariant operations in the Fourier basis via Gaunt tensor
        products*, 2024.

    Example:
        >>> x, y, z = torch.randn(3, 5, 9).unbind()
        >>> fastloss.gaunt_product([x, y, z, z], lmax_out=2).shape
        torch.Size([5, 9])
    """
    name = "gaunt_product"
    if not isinstance(xs, (list, tuple)):
        raise TypeError(f"{name}: `xs` must be a list or tuple of tensors, got {type(xs).__name__}")
    if not 1 <= len(xs) <= MOST_FACTORS:
        raise ValueError(f"{name}: `xs` must hold 1 to {MOST_FACTORS} tensors, got {len(xs)}")
    return _product(name, [f"xs[{i}]" for i in range(len(xs))], xs, lmax_out, normalization, dim)


def gaunt_power(
    x: Tensor, degree: int, lmax_out: int | None = None, *, normalization: str = "integral", dim: int = -1
) -> Tensor:
    r"""Coefficients of a power of a function on the sphere.

    .. math::
        z = x^{\text{degree}} \quad\text{as functions, up to degree lmax\_out}

    Args:
        x: (..., (l + 1)²), float64, float32, bfloat16 or float16.
        degree: the exponent, 1 to 16.
        lmax_out: degrees 0..lmax_out are returned; None for degree · l. Beyond that: zeros.
        normalization: as :func:`fastloss.gaunt_tensor_product`.
        dim: as :func:`fastloss.gaunt_tensor_product`.

    Returns:
        (..., (lmax_out + 1)²), the dtype of x. Differentiable as :func:`fastloss.gaunt_tensor_product`.

    Raises:
        TypeError: `x` is not a floating tensor; `degree` or `lmax_out` is not an int.
        ValueError: a size that is not a square, `degree` out of range, negative `lmax_out`, unknown `normalization`.

    Memory:
        The input for the backward pass, and a bounded scratch a thread.

    Determinism:
        Results do not depend on the number of threads.

    Source:
        As :func:`fastloss.gaunt_product`.

    Example:
        >>> x = torch.randn(5, 16)
        >>> fastloss.gaunt_power(x, 3).shape
        torch.Size([5, 100])
    """
    name = "gaunt_power"
    if not _is_int(degree):
        raise TypeError(f"{name}: `degree` must be an int, got {type(degree).__name__}")
    if not 1 <= degree <= MOST_FACTORS:
        raise ValueError(f"{name}: `degree` must be from 1 to {MOST_FACTORS}, got {degree}")
    degree = int(degree)
    return _product(name, ["x"] * degree, [x] * degree, lmax_out, normalization, dim)


def gaunt_convolution(
    x: Tensor,
    vectors: Tensor,
    lmax_filter: int,
    lmax_out: int | None = None,
    *,
    weights: Tensor | None = None,
    normalization: str = "integral",
    dim: int = -1,
) -> Tensor:
    r"""Product of the features of edges with a filter along the edges, channel by channel.

    .. math::
        z_e = x_e h_e \text{ as functions}, \qquad
        h_e(\Omega) = \sum_l w_{el} \sum_m Y_{lm}(r_e / |r_e|) \, Y_{lm}(\Omega)

    Args:
        x: (E, C, (l + 1)²) or (E, (l + 1)²); with `dim` = -2, (E, (l + 1)², C).
        vectors: (E, 3), the dtype of x; differentiable. A zero vector has harmonics (constant, 0, 0, ...) and
            gradient 0.
        lmax_filter: the degree of the filter, at least 0.
        lmax_out: degrees 0..lmax_out are returned; None for the sum of both degrees.
        weights: None for ones, or factors w of the filter's degrees: (lmax_filter + 1,), (E, lmax_filter + 1) or
            (E, C, lmax_filter + 1); the radial part of the filter, for one. Differentiable.
        normalization: of the harmonics of x, of the result and of both Y above, as
            :func:`fastloss.gaunt_tensor_product`.
        dim: as :func:`fastloss.gaunt_tensor_product`.

    Returns:
        As x, with (lmax_out + 1)² coefficients. In all tensors differentiable as :func:`fastloss.gaunt_tensor_product`.

    Raises:
        TypeError: not tensors of one floating dtype; degrees that are not ints.
        ValueError: sizes and shapes that do not fit, negative degrees, unknown `normalization`.

    Memory:
        The filter is stored for every edge and channel: (E, C, (lmax_filter + 1)²). It is not turned into a frame of
        its own: the two rotations of x and of the result would cost more than what a filter of m = 0 saves.

    Determinism:
        Results do not depend on the number of threads.

    Source:
        As :func:`fastloss.gaunt_tensor_product`.

    Example:
        >>> x, vectors = torch.randn(10, 8, 9), torch.randn(10, 3)
        >>> fastloss.gaunt_convolution(x, vectors, 2, 2).shape
        torch.Size([10, 8, 9])
    """
    name = "gaunt_convolution"
    degree = _check_function(name, "x", x, dim)
    if x.dim() not in (2, 3) or (dim == -2 and x.dim() != 3):
        expected = "(E, (l + 1)², C)" if dim == -2 else "(E, (l + 1)²) or (E, C, (l + 1)²)"
        raise ValueError(f"{name}: `x` must have shape {expected}, got {tuple(x.shape)}")
    _check_vectors(name, vectors)
    if vectors.shape[:-1] != x.shape[:1]:
        raise ValueError(f"{name}: `vectors` must have shape ({x.shape[0]}, 3), got {tuple(vectors.shape)}")
    dtype = _common_dtype(name, ("x", "vectors"), (x, vectors))
    lf = _check_degree(name, "lmax_filter", lmax_filter)
    l3 = _check_degree(name, "lmax_out", degree + lf if lmax_out is None else lmax_out)
    check_one_of(name, "normalization", normalization, NORMALIZATIONS)
    if weights is not None:
        _check_weights(name, (weights, None, None), (lf, lf, lf), x, names=("weights", "", ""))
        lead = tuple(weights.shape[:-1])
        channels = x.shape[1 if dim == -1 else 2] if x.dim() == 3 else None
        full = (x.shape[0],) if channels is None else (x.shape[0], channels)
        if lead not in ((), full[:1], full):
            raise ValueError(
                f"{name}: `weights` must have shape ({lf + 1},), ({x.shape[0]}, {lf + 1})"
                + ("" if channels is None else f" or ({x.shape[0]}, {channels}, {lf + 1})")
                + f", got {tuple(weights.shape)}"
            )
    x = x.to(dtype)
    filters = _harmonics(vectors.to(dtype), lf, True).to(_wide(x).dtype)
    filters = filters * norms(normalization, lf, filters)
    if weights is not None:
        w = weights.to(filters.dtype).index_select(-1, table("degree_index", [lf], x))
        filters = (filters if w.dim() < 3 else filters.unsqueeze(1)) * w
    filters = filters * norms(normalization, lf, filters)
    if x.dim() == 3:
        filters = filters.unsqueeze(1) if filters.dim() == 2 else filters
        filters = filters.transpose(1, 2) if dim == -2 else filters
    a = _scaled(x, None, degree, normalization, dim, 1)
    most = min(l3, degree + lf)
    out = _multiply(name, [a, filters], (0, 1), most, dim)
    return _padded(_scaled(out, None, most, normalization, dim, -1), most, l3, dim).to(dtype)


def spherical_harmonics(
    vectors: Tensor, lmax: int, *, normalize: bool = True, normalization: str = "integral"
) -> Tensor:
    r"""Real spherical harmonics of degrees 0..lmax, in e3nn's order, signs and normalizations, for any degree.

    .. math::
        Y_{lm}(r) = N_{lm} P_l^{|m|}(y / |r|) \cdot
        \begin{cases} \sqrt 2 \sin(|m| \varphi) & m < 0 \\ 1 & m = 0 \\ \sqrt 2 \cos(m \varphi) & m > 0 \end{cases},
        \qquad \varphi = \operatorname{atan2}(x, z)

    A drop-in for ``e3nn.o3.spherical_harmonics`` of all degrees at once, without its limit of 12.

    Args:
        vectors: (..., 3), x, y, z, where y is the pole; float64, float32, bfloat16 or float16.
        lmax: the largest degree, at least 0. Recurrences in normalised form; beyond degree 8
            they run in float64, since y in float32 determines a high degree badly near the poles.
        normalize: True for the harmonics of the direction; False for the homogeneous polynomials |r|^l Y_lm(r / |r|).
        normalization: "integral" (orthonormal), "component" (|Y_l|² = 2l + 1) or "norm" (|Y_l| = 1).

    Returns:
        (..., (lmax + 1)²), index l² + l + m; the dtype of `vectors` (16-bit: computed in float32). Differentiable any
        number of times. A zero vector with `normalize` has Y_00 and zeros, as e3nn, and gradient 0.

    Raises:
        TypeError: `vectors` is not a floating tensor, `lmax` is not an int.
        ValueError: the last dimension is not 3, negative `lmax`, unknown `normalization`.

    Memory:
        O((lmax + 1)²) a vector, several times for the backward pass.

    Determinism:
        Elementwise: results do not depend on the number of threads.

    Source:
        Holmes and Featherstone, *A unified approach to the Clenshaw summation and the recursive computation of very
        high degree and order normalised associated Legendre functions*, 2002.

    Example:
        >>> fastloss.spherical_harmonics(torch.tensor([0.0, 2.0, 0.0]), 1, normalization="component")
        tensor([1.0000, 0.0000, 1.7321, 0.0000])
    """
    name = "spherical_harmonics"
    _check_vectors(name, vectors)
    check_flag(name, "normalize", normalize)
    degree = _check_degree(name, "lmax", lmax)
    check_one_of(name, "normalization", normalization, NORMALIZATIONS)
    values = _harmonics(vectors, degree, normalize)
    return (values * norms(normalization, degree, values)).to(vectors.dtype)


# ---------------------------------------------------------------- work


def _short_way(x1: Any, x2: Any, lmax_out: Any, method: Any) -> Tensor | None:
    """The product of ordinary tensors of the same leading dimensions, which a glance tells to be good; None of others.

    The checks and what is decided for every call are as much work as the product of a few thousand functions.
    """
    if (
        not (isinstance(x1, Tensor) and isinstance(x2, Tensor) and isinstance(method, str))
        or not (lmax_out is None or type(lmax_out) is int)
        or not unobserved((x1, x2))
        or x1.dim() == 0
        or (x1.shape != x2.shape and x1.shape[:-1] != x2.shape[:-1])
    ):
        return None
    run = _usual(x1.shape[-1], x2.shape[-1], x1.dtype, x2.dtype, lmax_out, method)
    return run and run(x1, x2)


@lru_cache(maxsize=1024)
def _usual(
    size1: int, size2: int, dtype1: torch.dtype, dtype2: torch.dtype, lmax_out: int | None, method: str
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The product of functions of these sizes, float32 or float64, if it needs nothing else."""
    l1, l2 = (math.isqrt(size) - 1 for size in (size1, size2))
    l3 = l1 + l2 if lmax_out is None else lmax_out
    if (
        dtype1 != dtype2
        or dtype1 not in (torch.float32, torch.float64)
        or ((l1 + 1) ** 2, (l2 + 1) ** 2) != (size1, size2)
        or min(l1, l2, l3) < 0
        or l3 > l1 + l2
        or method not in ("auto", "ring", "direct")
    ):
        return None
    run = multiplier((0, 1), l3, direct=_is_direct((l1, l2), l3, method), ordinary=True)
    return lambda x1, x2: run([x1, x2])


def _is_direct(degrees: Sequence[int], degree: int, method: str) -> bool:
    """By the sparse tensor; `degrees` of the factors."""
    return method == "direct" or (method == "auto" and len(degrees) <= 2 and degree + sum(degrees) <= DIRECT_DEGREES)


def _wide(x: Tensor) -> Tensor:
    """16-bit numbers as float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _harmonics(vectors: Tensor, degree: int, normalize: bool) -> Tensor:
    """Near the pole, y in float32 leaves an error of l²/2 roundings: beyond degree 8, recurrences run in float64."""
    return harmonics(vectors.double() if degree > 8 else _wide(vectors), degree, normalize)


def _scaled(x: Tensor, weight: Tensor | None, degree: int, normalization: str, dim: int, power: int) -> Tensor:
    """Weighted, and brought to orthonormal coefficients (power 1) or from them (power -1)."""
    x = _wide(x)
    if weight is not None:
        w = weight.to(x.dtype).index_select(-1, table("degree_index", [degree], x))
        if dim == -2:
            w = w.unsqueeze(-1) if w.dim() == 1 else w.transpose(-1, -2)
        x = x * w
    if normalization != "integral":
        scale = norms(normalization, degree, x)
        scale = scale if dim == -1 else scale.unsqueeze(-1)
        x = x * scale if power == 1 else x / scale
    return x


def _outer(x: Tensor, dim: int) -> tuple[int, ...]:
    """All sizes but that of the coefficients."""
    return tuple(x.shape[:-1]) if dim == -1 else (*x.shape[:-2], x.shape[-1])


def _broadcast_shapes(name: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        got = " and ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{name}: leading dimensions do not broadcast, got {got}") from error


def _broadcast(name: str, xs: Sequence[Tensor], dim: int) -> list[Tensor]:
    """All sizes alike but that of the coefficients."""
    outer = [_outer(x, dim) for x in xs]
    if all(shape == outer[0] for shape in outer):
        return list(xs)
    lead = _broadcast_shapes(name, *outer)
    if dim == -1:
        return [x.expand(*lead, x.shape[-1]) for x in xs]
    return [x.expand(*lead[:-1], x.shape[-2], lead[-1]) for x in xs]


def _padded(x: Tensor, degree: int, wanted: int, dim: int) -> Tensor:
    """With zeros for the degrees beyond all that there are."""
    missing = (wanted + 1) ** 2 - (degree + 1) ** 2
    return F.pad(x, (0, missing) if dim == -1 else (0, 0, 0, missing)) if missing else x


def _multiply(
    name: str, xs: Sequence[Tensor], factors: Sequence[int], degree: int, dim: int, method: str = "auto"
) -> Tensor:
    inputs = _broadcast(name, xs, dim)
    direct = _is_direct([degree_of(inputs[i], dim == -2) for i in factors], degree, method)
    return multiplier(factors, degree, channels_last=dim == -2, direct=direct)(inputs)


def _by_fourier(name: str, a: Tensor, b: Tensor, degrees: tuple[int, int, int], dim: int) -> Tensor:
    if dim == -2:
        a, b = a.mT, b.mT
    a, b = _broadcast(name, (a, b), -1)
    out = fft(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), *degrees).reshape(
        *a.shape[:-1], (degrees[2] + 1) ** 2
    )
    return out.mT if dim == -2 else out


def _product(
    name: str, names: Sequence[str], xs: Sequence[Any], lmax_out: int | None, normalization: str, dim: int
) -> Tensor:
    degrees = [_check_function(name, argument, x, dim) for argument, x in zip(names, xs, strict=True)]
    dtype = _common_dtype(name, names, xs)
    wanted = _check_degree(name, "lmax_out", sum(degrees) if lmax_out is None else lmax_out)
    degree = min(wanted, sum(degrees))
    check_one_of(name, "normalization", normalization, NORMALIZATIONS)
    distinct: list[int] = []  # positions of the first of each tensor
    factors = []
    for i, x in enumerate(xs):
        same = [n for n, j in enumerate(distinct) if xs[j] is x]
        if not same:
            distinct.append(i)
        factors.append(same[0] if same else len(distinct) - 1)
    scaled = [_scaled(xs[i].to(dtype), None, degrees[i], normalization, dim, 1) for i in distinct]
    out = _multiply(name, scaled, factors, degree, dim)
    return _padded(_scaled(out, None, degree, normalization, dim, -1), degree, wanted, dim).to(dtype)


# ---------------------------------------------------------------- checks


def _check_function(name: str, argument: str, x: Any, dim: Any) -> int:
    """The degree of the functions in x."""
    if not _is_int(dim) or dim not in (-1, -2):
        raise ValueError(f"{name}: `dim` must be -1 or -2, got {dim!r}")
    shape = "(..., (l + 1)²)" if dim == -1 else "(..., (l + 1)², C)"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: `{argument}` must be a tensor of shape {shape}, got {type(x).__name__}")
    check_strided(name, argument, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: `{argument}` must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() < -dim:
        raise ValueError(f"{name}: `{argument}` must have shape {shape}, got {tuple(x.shape)}")
    size = x.shape[dim]
    degree = degree_of_size(size) if size else 0
    if (degree + 1) ** 2 != size:
        raise ValueError(
            f"{name}: `{argument}` must have a square (l + 1)² of coefficients in dimension {dim}, got {size} "
            f"in shape {tuple(x.shape)}"
        )
    return degree


def _common_dtype(name: str, names: Sequence[str], xs: Sequence[Tensor]) -> torch.dtype:
    """That of all; under autocast, whose layers may hand over several, the widest."""
    first, dtype = xs[0], xs[0].dtype
    for argument, x in zip(names[1:], xs[1:], strict=True):
        check_device(name, argument, x, names[0], first)
        if x.dtype != first.dtype:
            if not torch.is_autocast_enabled(first.device.type):
                raise TypeError(f"{name}: `{argument}` must be {first.dtype} as `{names[0]}`, got {x.dtype}")
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _is_int(value: Any) -> bool:
    """Python's or NumPy's."""
    return not isinstance(value, bool) and isinstance(value, (int, Integral))


def _check_degree(name: str, argument: str, degree: Any) -> int:
    if not _is_int(degree):
        raise TypeError(f"{name}: `{argument}` must be an int, got {type(degree).__name__}")
    if degree < 0:
        raise ValueError(f"{name}: `{argument}` must be at least 0, got {degree}")
    return degree if isinstance(degree, int) else int(degree)


def check_one_of(name: str, argument: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: `{argument}` must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_weights(
    name: str, weights: Any, degrees: Sequence[int], x: Tensor, names: Sequence[str] | None = None
) -> list[Tensor | None]:
    if weights is None:
        return [None, None, None]
    if not isinstance(weights, (list, tuple)) or len(weights) != 3:
        raise ValueError(
            f"{name}: `weights` must be three tensors or Nones, for x1, x2 and the output, got {weights!r}"
        )
    for i, (weight, degree) in enumerate(zip(weights, degrees, strict=True)):
        argument = names[i] if names else f"weights[{i}]"
        if weight is None:
            continue
        if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
            got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"{name}: `{argument}` must be a floating-point tensor (..., {degree + 1}), got {got}")
        check_strided(name, argument, weight)
        if weight.dim() == 0 or weight.shape[-1] != degree + 1:
            raise ValueError(
                f"{name}: `{argument}` must have shape (..., {degree + 1}), a factor for each of the degrees "
                f"0..{degree}, got {tuple(weight.shape)}"
            )
        check_device(name, argument, weight, "the coefficients", x)
    return list(weights)


def _check_weights_broadcast(name: str, weights: Sequence[Tensor | None], x1: Tensor, x2: Tensor, dim: int) -> None:
    """Each with the functions that it belongs to: the last with the product of the others."""
    if all(w is None for w in weights):
        return
    shapes = [_outer(x, dim) for x in (x1, x2)]
    for i, weight in enumerate(weights):
        if i == 2:
            shapes.append(_broadcast_shapes(name, *shapes))
        if weight is None:
            continue
        try:
            shapes[i] = tuple(torch.broadcast_shapes(weight.shape[:-1], shapes[i]))  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ValueError(
                f"{name}: `weights[{i}]` must have leading dimensions that broadcast with {shapes[i]}, got shape "
                f"{tuple(weight.shape)}, of which the last are degrees"
            ) from error


def _check_vectors(name: str, vectors: Any) -> None:
    if not isinstance(vectors, Tensor):
        raise TypeError(f"{name}: `vectors` must be a tensor of shape (..., 3), got {type(vectors).__name__}")
    check_strided(name, "vectors", vectors)
    if vectors.dtype not in FLOATS:
        raise TypeError(f"{name}: `vectors` must be float64, float32, bfloat16 or float16, got {vectors.dtype}")
    if vectors.dim() == 0 or vectors.shape[-1] != 3:
        raise ValueError(f"{name}: `vectors` must have shape (..., 3), got {tuple(vectors.shape)}")
