"""Products of functions on the sphere by the Gaunt tensor, from the closed form with Wigner's 3j symbols.

Dense and slow. Shares nothing with the kernels: no quadrature, no Fourier series, no Legendre recurrence for products.
Arguments are documented in `fastloss.gaunt.functional` and are taken here as valid.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def wigner_3j(l1: int, l2: int, l3: int, m1: int, m2: int, m3: int) -> float:
    """Racah's formula, in integers up to the last square root."""
    if m1 + m2 + m3 or not abs(l1 - l2) <= l3 <= l1 + l2 or abs(m1) > l1 or abs(m2) > l2 or abs(m3) > l3:
        return 0.0
    f = math.factorial
    low, high = max(0, l2 - l3 - m1, l1 - l3 + m2), min(l1 + l2 - l3, l1 - m1, l2 + m2)
    # The terms of the sum as fractions of the product of the largest denominators.
    denominators = [
        f(t) * f(l3 - l2 + t + m1) * f(l3 - l1 + t - m2) * f(l1 + l2 - l3 - t) * f(l1 - t - m1) * f(l2 - t + m2)
        for t in range(low, high + 1)
    ]
    common = math.lcm(*denominators) if denominators else 1
    total = sum((-1) ** t * (common // d) for t, d in zip(range(low, high + 1), denominators, strict=True))
    above = f(l1 + l2 - l3) * f(l1 - l2 + l3) * f(-l1 + l2 + l3)
    above *= f(l1 + m1) * f(l1 - m1) * f(l2 + m2) * f(l2 - m2) * f(l3 + m3) * f(l3 - m3)
    # total^2 * above / (common^2 * (l1 + l2 + l3 + 1)!) is a small number made of large integers.
    squared = (total * total * above * (1 << 200)) // (common * common * f(l1 + l2 + l3 + 1))
    root = math.isqrt(squared << 200) / (1 << 200)
    return math.copysign(root, total * (-1) ** (l1 - l2 - m3)) if total else 0.0


def _complex_of_real(l: int) -> list[list[tuple[int, complex]]]:  # noqa: E741
    """Real harmonic m = -l..l as a combination of complex ones: [(order, factor), ...]."""
    half = math.sqrt(0.5)
    rows: list[list[tuple[int, complex]]] = []
    for m in range(-l, l + 1):
        if m == 0:
            rows.append([(0, 1.0)])
        elif m > 0:
            rows.append([(m, (-1) ** m * half), (-m, half)])
        else:
            rows.append([(m, 1j * half), (-m, -1j * (-1) ** m * half)])
    return rows


def gaunt_block(l1: int, l2: int, l3: int) -> Tensor:
    """Integrals of three real harmonics, (2 l1 + 1, 2 l2 + 1, 2 l3 + 1), float64."""
    block = torch.zeros(2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1, dtype=torch.float64)
    if (l1 + l2 + l3) % 2 or not abs(l1 - l2) <= l3 <= l1 + l2:
        return block
    constant = math.sqrt((2 * l1 + 1) * (2 * l2 + 1) * (2 * l3 + 1) / (4 * math.pi)) * wigner_3j(l1, l2, l3, 0, 0, 0)
    rows = [_complex_of_real(n) for n in (l1, l2, l3)]
    for i, first in enumerate(rows[0]):
        for j, second in enumerate(rows[1]):
            for k, third in enumerate(rows[2]):
                total = 0j
                for m1, a in first:
                    for m2, b in second:
                        for m3, c in third:
                            if m1 + m2 + m3 == 0:
                                total += a * b * c * wigner_3j(l1, l2, l3, m1, m2, m3)
                block[i, j, k] = constant * total.real
    return block


def gaunt_tensor(l1: int, l2: int, l3: int) -> Tensor:
    """((l1 + 1)^2, (l2 + 1)^2, (l3 + 1)^2), float64: all blocks up to these degrees."""
    tensor = torch.zeros((l1 + 1) ** 2, (l2 + 1) ** 2, (l3 + 1) ** 2, dtype=torch.float64)
    for a in range(l1 + 1):
        for b in range(l2 + 1):
            for c in range(abs(a - b), min(l3, a + b) + 1, 2):
                tensor[a * a : (a + 1) ** 2, b * b : (b + 1) ** 2, c * c : (c + 1) ** 2] = gaunt_block(a, b, c)
    return tensor


def _degree(x: Tensor) -> int:
    return math.isqrt(x.shape[-1]) - 1


def _scale(normalization: str, degree: int, x: Tensor) -> Tensor:
    """Harmonics of this normalization over orthonormal ones."""
    four_pi = 4 * math.pi
    power = {"integral": 1.0, "component": four_pi, "norm": four_pi}[normalization]
    values = [
        math.sqrt(power / (2 * n + 1 if normalization == "norm" else 1))
        for n in range(degree + 1)
        for _ in range(2 * n + 1)
    ]
    return torch.tensor(values, dtype=x.dtype)


def _weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return x
    return x * torch.cat(
        [weight[..., n : n + 1].expand(*weight.shape[:-1], 2 * n + 1) for n in range(_degree(x) + 1)], -1
    )


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
    """Coefficients of the product of the functions on the sphere whose coefficients are x1 and x2."""
    if dim == -2:
        out = gaunt_tensor_product(
            x1.transpose(-1, -2), x2.transpose(-1, -2), lmax_out, weights=weights, normalization=normalization
        )
        return out.transpose(-1, -2)
    w1, w2, w3 = weights or (None, None, None)
    l1, l2 = _degree(x1), _degree(x2)
    l3 = l1 + l2 if lmax_out is None else lmax_out
    a = _weighted(x1, w1) * _scale(normalization, l1, x1)
    b = _weighted(x2, w2) * _scale(normalization, l2, x2)
    out = torch.einsum("...i,...j,ijk->...k", a, b, gaunt_tensor(l1, l2, l3).to(x1.dtype))
    return _weighted(out / _scale(normalization, l3, out), w3)


def gaunt_product(
    xs: Sequence[Tensor], lmax_out: int | None = None, *, normalization: str = "integral", dim: int = -1
) -> Tensor:
    """Product of several functions, two by two."""
    out = xs[0]
    for x in xs[1:]:
        out = gaunt_tensor_product(out, x, normalization=normalization, dim=dim)
    size, wanted = out.shape[dim], out.shape[dim] if lmax_out is None else (lmax_out + 1) ** 2
    if wanted <= size:
        return out.narrow(dim, 0, wanted)
    missing = list(out.shape)
    missing[dim] = wanted - size
    return torch.cat((out, out.new_zeros(missing)), dim)


def gaunt_power(
    x: Tensor, degree: int, lmax_out: int | None = None, *, normalization: str = "integral", dim: int = -1
) -> Tensor:
    """The function to the power `degree`."""
    return gaunt_product([x] * degree, lmax_out, normalization=normalization, dim=dim)


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
    """Product with the filter sum_l w_l sum_m Y_lm(vector) Y_lm."""
    filters = spherical_harmonics(vectors, lmax_filter, normalization=normalization)
    filters = filters.reshape(*filters.shape[:-1], *[1] * (x.dim() - vectors.dim()), filters.shape[-1])
    if weights is not None:
        missing = x.dim() - weights.dim() if weights.dim() > 1 else 0
        filters = _weighted(filters, weights.reshape(*weights.shape[:-1], *[1] * missing, weights.shape[-1]))
    if dim == -2:
        out = gaunt_tensor_product(x.transpose(-1, -2), filters, lmax_out, normalization=normalization)
        return out.transpose(-1, -2)
    return gaunt_tensor_product(x, filters, lmax_out, normalization=normalization)


def spherical_harmonics(
    vectors: Tensor, lmax: int, *, normalize: bool = True, normalization: str = "integral"
) -> Tensor:
    """Real spherical harmonics by angles: y is the pole, z the origin of the azimuth."""
    x, y, z = vectors.unbind(-1)
    length = vectors.norm(dim=-1)
    safe = torch.where(length == 0, torch.ones_like(length), length)
    cosine, sine, azimuth = y / safe, torch.sqrt(x * x + z * z) / safe, torch.atan2(x, z)
    # Legendre functions without normalisation or sign, P_m^m = (2m - 1)!! sin^m, then upwards in l.
    legendre: dict[tuple[int, int], Tensor] = {}
    for m in range(lmax + 1):
        legendre[m, m] = float(math.prod(range(1, 2 * m, 2))) * sine**m
        for n in range(m + 1, lmax + 1):
            below = legendre[n - 2, m] * (n + m - 1) if n > m + 1 else 0
            legendre[n, m] = ((2 * n - 1) * cosine * legendre[n - 1, m] - below) / (n - m)
    columns = []
    for n in range(lmax + 1):
        for m in range(-n, n + 1):
            k = abs(m)
            factor = math.sqrt((2 * n + 1) / (4 * math.pi) * math.factorial(n - k) / math.factorial(n + k))
            wave = torch.ones_like(azimuth) if m == 0 else torch.cos(m * azimuth) if m > 0 else torch.sin(k * azimuth)
            value = factor * legendre[n, k] * wave * (math.sqrt(2) if m else 1)
            if not normalize:
                value = value * length**n
            # At the origin all harmonics but the constant are zero.
            columns.append(value if n == 0 else torch.where(length == 0, torch.zeros_like(value), value))
    out = torch.stack(columns, -1)
    return out * _scale(normalization, lmax, out)
