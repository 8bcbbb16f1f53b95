"""Values and gradients against the reference (closed form with 3j symbols) and against e3nn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from e3nn import o3
from torch import Tensor

import fastloss
from fastloss import reference
from fastloss._backends import native_core
from fastloss.gaunt import native
from fastloss.gaunt.tables import antipodes
from fastloss.reference.gaunt import gaunt_block, wigner_3j
from tests.support import assert_equal_to_rounding

F64 = torch.float64
METHODS = ["ring", "direct", "fft"]
DEGREES = [(0, 0, 0), (1, 0, 1), (1, 1, 2), (2, 2, 4), (2, 3, 5), (3, 2, 2), (2, 1, 6), (4, 4, 0), (5, 5, 10)]


def functions(*shape: int, l: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:  # noqa: E741
    generator = torch.Generator().manual_seed(seed + 100 * l)
    return torch.randn(*shape, (l + 1) ** 2, dtype=F64, generator=generator).to(dtype)


def e3nn_constant(l1: int, l2: int, l3: int) -> float:
    return math.sqrt((2 * l1 + 1) * (2 * l2 + 1) * (2 * l3 + 1) / (4 * math.pi)) * abs(wigner_3j(l1, l2, l3, 0, 0, 0))


def e3nn_gaunt(l1: int, l2: int, l3: int, channels: int = 1) -> o3.TensorProduct:
    """The oracle: 'uuu' paths, whose weights enter under a square root."""
    paths = [
        (a, b, c, "uuu", False, e3nn_constant(a, b, c) ** 2)
        for a, b, c in product(range(l1 + 1), range(l2 + 1), range(l3 + 1))
        if abs(a - b) <= c <= a + b and (a + b + c) % 2 == 0
    ]
    irreps = [[(channels, (n, (-1) ** n)) for n in range(degree + 1)] for degree in (l1, l2, l3)]
    return e3nn_product(*irreps, paths)


def e3nn_product(*arguments: Any) -> o3.TensorProduct:
    with float64_by_default():
        return o3.TensorProduct(*arguments, irrep_normalization="none", path_normalization="none")


@contextmanager
def float64_by_default() -> Iterator[None]:
    """For e3nn's constants."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(("l1", "l2", "l3"), [(0, 0, 0), (1, 1, 2), (2, 3, 3), (4, 4, 6), (5, 3, 8)])
def test_reference_is_e3nns_wigner_3j_times_the_constant(l1: int, l2: int, l3: int) -> None:
    want = e3nn_constant(l1, l2, l3) * o3.wigner_3j(l1, l2, l3, dtype=F64)
    assert_equal_to_rounding(gaunt_block(l1, l2, l3), want, terms=8)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("l1", "l2", "l3"), [(1, 1, 2), (2, 2, 4), (3, 2, 4)])
def test_equals_e3nn(l1: int, l2: int, l3: int) -> None:
    x1, x2 = functions(20, l=l1), functions(20, l=l2, seed=1)
    want = e3nn_gaunt(l1, l2, l3)(x1, x2)
    for method in METHODS:
        got = fastloss.gaunt_tensor_product(x1, x2, l3, method=method)
        assert_equal_to_rounding(got, want, terms=x1.shape[1] * x2.shape[1])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("l1", "l2", "l3"), DEGREES)
@pytest.mark.parametrize("normalization", ["integral", "component", "norm"])
def test_values_and_gradients(l1: int, l2: int, l3: int, normalization: str, method: str) -> None:
    leaves = [functions(3, 4, l=l1), functions(4, l=l2, seed=1)]
    leaves += [torch.randn(shape, dtype=F64) for shape in ((4, l1 + 1), (l2 + 1,), (3, 1, l3 + 1))]
    upstream = functions(3, 4, l=l3, seed=2)
    results = []
    for function, extra in ((fastloss.gaunt_tensor_product, {"method": method}), (reference.gaunt_tensor_product, {})):
        x = [t.clone().requires_grad_() for t in leaves]
        out = function(x[0], x[1], l3, weights=x[2:], normalization=normalization, **extra)
        results.append((out.detach(), *torch.autograd.grad((out * upstream).sum(), x)))
    for got, want in zip(*results, strict=True):
        assert_equal_to_rounding(got, want, terms=(l1 + 1) ** 2 * (l2 + 1) ** 2 * 8, magnitude=4.0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("channels", [1, 5, 16, 33])
def test_channels_last_is_the_transpose(channels: int) -> None:
    x1, x2 = functions(7, channels, l=3), functions(channels, l=2, seed=1)
    want = fastloss.gaunt_tensor_product(x1, x2, 4)
    for method in METHODS:
        got = fastloss.gaunt_tensor_product(x1.mT, x2.mT, 4, method=method, dim=-2).mT
        assert_equal_to_rounding(got, want, terms=16 * 9)


@pytest.mark.parametrize("lanes", [0, 1, 15, 16, 17, 100])
def test_ragged_sizes_and_strides(backend: str, lanes: int) -> None:
    x1, x2 = functions(lanes, 2, l=2)[:, 1], functions(lanes, l=3).flip(-1)
    got = fastloss.gaunt_tensor_product(x1, x2)
    assert got.shape == (lanes, 36)
    assert_equal_to_rounding(got, reference.gaunt_tensor_product(x1, x2), terms=9 * 16)


def test_result_does_not_depend_on_threads_or_neighbours() -> None:
    x1, x2 = functions(100, l=4, dtype=torch.float32), functions(100, l=4, seed=1, dtype=torch.float32)
    want = fastloss.gaunt_tensor_product(x1, x2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(fastloss.gaunt_tensor_product(x1, x2), want)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(fastloss.gaunt_tensor_product(x1[37:40], x2[37:40]), want[37:40])


@pytest.mark.parametrize(("degree", "lmax_out", "method"), [(2, 4, "direct"), (3, 6, "direct"), (4, 5, "ring")])
def test_auto_goes_by_the_sum_of_degrees(degree: int, lmax_out: int, method: str) -> None:
    x, y = (functions(50, l=degree, seed=n, dtype=torch.float32) for n in (0, 1))
    by_method = {m: fastloss.gaunt_tensor_product(x, y, lmax_out, method=m) for m in ("auto", "direct", "ring")}
    assert not torch.equal(by_method["direct"], by_method["ring"])  # they round differently
    assert torch.equal(by_method["auto"], by_method[method])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("method", METHODS)
def test_square(method: str) -> None:
    x = functions(10, l=3).requires_grad_()
    got = fastloss.gaunt_tensor_product(x, x, method=method)
    want = fastloss.gaunt_tensor_product(x, x.clone(), method=method)
    assert_equal_to_rounding(got.detach(), want.detach(), terms=256)
    upstream = functions(10, l=6)
    for a, b in zip(
        torch.autograd.grad((got * upstream).sum(), x), torch.autograd.grad((want * upstream).sum(), x), strict=True
    ):
        assert_equal_to_rounding(a, b, terms=256)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("lmax_out", [None, 0, 3, 12])
@pytest.mark.parametrize("normalization", ["integral", "component", "norm"])
def test_many_bodies(lmax_out: int | None, normalization: str) -> None:
    a, b = functions(6, l=2), functions(6, l=3, seed=1)
    results: list[list[Tensor]] = []
    for module in (fastloss, reference):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        values = [
            module.gaunt_product([x, y, x], lmax_out, normalization=normalization),
            module.gaunt_product([x], lmax_out, normalization=normalization),
            module.gaunt_power(y, 3, lmax_out, normalization=normalization),
            module.gaunt_power(y.mT.unsqueeze(0), 2, lmax_out, normalization=normalization, dim=-2),
        ]
        total = sum((v * torch.linspace(1, 2, v.numel(), dtype=F64).reshape(v.shape)).sum() for v in values)
        results.append([*(v.detach() for v in values), *torch.autograd.grad(total, (x, y))])
    for got, want in zip(*results, strict=True):
        assert_equal_to_rounding(got, want, terms=9 * 9 * 16)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("normalization", ["integral", "component", "norm"])
@pytest.mark.parametrize("shape", [None, (4,), (5, 4), (5, 3, 4)])
def test_convolution(shape: tuple[int, ...] | None, normalization: str) -> None:
    x, vectors = functions(5, 3, l=2), torch.randn(5, 3, dtype=F64)
    weights = [] if shape is None else [torch.randn(shape, dtype=F64)]
    results = []
    for module in (fastloss, reference):
        leaves = [t.clone().requires_grad_() for t in (x, vectors, *weights)]
        options: dict[str, Any] = {"weights": leaves[2] if weights else None, "normalization": normalization}
        values = [
            module.gaunt_convolution(leaves[0], leaves[1], 3, 4, **options),
            module.gaunt_convolution(leaves[0].mT, leaves[1], 3, 4, dim=-2, **options).mT,
        ]
        total = sum((v * torch.linspace(1, 2, v.numel(), dtype=F64).reshape(v.shape)).sum() for v in values)
        results.append([*(v.detach() for v in values), *torch.autograd.grad(total, leaves)])
    for got, want in zip(*results, strict=True):
        assert_equal_to_rounding(got, want, terms=16 * 16 * 4)
    if shape != (5, 3, 4):
        got = fastloss.gaunt_convolution(x[:, 0], vectors, 3, weights=weights[0] if weights else None)
        want = reference.gaunt_convolution(x[:, 0], vectors, 3, weights=weights[0] if weights else None)
        assert_equal_to_rounding(got, want, terms=16 * 16)


@pytest.mark.parametrize("normalization", ["integral", "component", "norm"])
@pytest.mark.parametrize("normalize", [True, False])
def test_harmonics_equal_e3nn(normalization: str, normalize: bool) -> None:
    vectors = torch.randn(100, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    vectors = torch.cat((vectors, torch.eye(3, dtype=F64), -torch.eye(3, dtype=F64), torch.zeros(1, 3, dtype=F64)))
    got = fastloss.spherical_harmonics(vectors, 11, normalize=normalize, normalization=normalization)
    want = torch.cat([o3.spherical_harmonics(n, vectors, normalize, normalization) for n in range(12)], -1)
    assert_equal_to_rounding(got, want, terms=12 * 12)


@pytest.mark.parametrize("degree", [8, 20, 40, 60])
def test_harmonics_of_high_degree_in_float32(degree: int) -> None:
    vectors = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    vectors = torch.cat((vectors, torch.tensor([[1e-4, 1, 0], [0, 1, 0], [1e-25, -1e-20, 1e-22], [3e30, 1e30, 0]])))
    got = fastloss.spherical_harmonics(vectors, degree)
    want = reference.spherical_harmonics(vectors.double(), degree)
    # The sum of squares of degree l is (2 l + 1) / 4 pi; y in float32 leaves l^2 / 2 roundings at degree 8.
    bound = 32 * torch.finfo(torch.float32).eps if degree == 8 else 2 * torch.finfo(torch.float32).eps
    assert (got.double() - want).abs().max() <= bound * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_zero_vector(dtype: torch.dtype) -> None:
    vectors = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    values = fastloss.spherical_harmonics(vectors, 4)
    assert values[:, 1:].abs().max() == 0
    assert values[0, 0].item() == pytest.approx(math.sqrt(1 / (4 * math.pi)))
    (gradient,) = torch.autograd.grad(values.sum(), vectors, create_graph=True)
    assert gradient.abs().max() == 0
    (second,) = torch.autograd.grad(gradient.sum(), vectors)
    assert second.abs().max() == 0
    x = torch.randn(2, 4, dtype=dtype)
    (gradient,) = torch.autograd.grad(fastloss.gaunt_convolution(x, vectors, 2).sum(), vectors)
    assert gradient.abs().max() == 0


def test_product_is_pointwise() -> None:
    """The coefficients are of functions: their product has the products of the values."""
    points = torch.randn(30, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    x, y = functions(l=4), functions(l=3, seed=1)
    z = fastloss.gaunt_tensor_product(x, y)
    values = [fastloss.spherical_harmonics(points, math.isqrt(len(c)) - 1) @ c for c in (x, y, z)]
    assert_equal_to_rounding(values[0] * values[1], values[2], terms=64 * 4)


@pytest.mark.parametrize("degree", range(6))
def test_harmonics_on_half_a_grid_are_orthonormal(degree: int) -> None:
    """The other half, of antipodes, doubles products of two even or two odd degrees and cancels all others."""
    half = antipodes(degree, 2 * degree, 8, 4, F64, torch.device("cpu"))
    kept = half.places < (degree + 1) ** 2
    assert half.places[kept].sort().values.tolist() == list(range((degree + 1) ** 2))
    for rows in (slice(0, half.odd), slice(half.odd, None)):
        y = half.harmonics[rows]
        gram = 2 * (y * half.weights) @ y.T
        assert_equal_to_rounding(gram, torch.diag(kept[rows].to(F64)), terms=len(half.weights))


def test_equivariance() -> None:
    rotation = o3.rand_matrix(dtype=F64)
    a, b = torch.randn(2, 5, 3, dtype=F64)

    def run(turn: Tensor) -> Tensor:
        x, y = (fastloss.spherical_harmonics(v @ turn.T, 5) for v in (a, b))
        return fastloss.gaunt_tensor_product(x, y, 6)

    with float64_by_default():
        d = o3.Irreps.spherical_harmonics(6).D_from_matrix(rotation)
    assert (run(torch.eye(3, dtype=F64)) @ d.T - run(rotation)).abs().max() < 1e-10


@pytest.mark.parametrize("isa", native_core().supported_isas().split(","))
@pytest.mark.parametrize("method", ["ring", "direct"])
@pytest.mark.parametrize("lanes", [16, 33, 100])
def test_every_width_of_a_row(method: str, lanes: int, isa: str) -> None:
    """Rows of 1, 4, 9, 16, 25, ... numbers have ways of their own into vectors, of 16 float32 or 8 float64."""
    core = native_core()
    before = core.isa()
    core.choose_isa(isa)
    native._plan.cache_clear()  # plans tell how much memory the kernels of an instruction set take
    try:
        for dtype in (torch.float32, F64):
            for l1, l2 in product(range(5), range(3)):
                x, y = functions(lanes, l=l1), functions(lanes, l=l2, seed=1)
                leaves = [t.to(dtype).requires_grad_() for t in (x, y)]
                got = fastloss.gaunt_tensor_product(*leaves, method=method)
                upstream = functions(lanes, l=l1 + l2, seed=2)
                gradients = torch.autograd.grad(got, leaves, upstream.to(dtype))
                x, y = x.requires_grad_(), y.requires_grad_()
                want = reference.gaunt_tensor_product(x, y)
                scale = 32 * torch.finfo(dtype).eps
                for a, b in zip((got, *gradients), (want, *torch.autograd.grad(want, (x, y), upstream)), strict=True):
                    assert (a.double() - b).abs().max() <= scale * b.abs().max(), (l1, l2, dtype)
    finally:
        core.choose_isa(before)
        native._plan.cache_clear()


@pytest.mark.parametrize(("method", "degree"), [("ring", 4), ("ring", 16), ("fft", 4), ("fft", 16), ("direct", 4)])
def test_error_in_float32(method: str, degree: int) -> None:
    x, y = functions(32, l=degree), functions(32, l=degree, seed=1)
    want = fastloss.gaunt_tensor_product(x, y)
    got = fastloss.gaunt_tensor_product(x.float(), y.float(), method=method)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() / want.abs().max() < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x, y = functions(20, l=3, dtype=dtype), functions(20, l=3, seed=1, dtype=dtype)
    got = fastloss.gaunt_tensor_product(x, y)
    assert got.dtype == dtype
    assert torch.equal(got, fastloss.gaunt_tensor_product(x.float(), y.float()).to(dtype))
    assert fastloss.spherical_harmonics(x[:, :3], 3).dtype == dtype


@pytest.mark.usefixtures("backend")
def test_nan_stays_in_its_function() -> None:
    x, y = functions(20, l=2), functions(20, l=2, seed=1)
    clean = fastloss.gaunt_tensor_product(x, y)
    x[3, 4] = math.nan
    got = fastloss.gaunt_tensor_product(x, y)
    assert got[3, 4].isnan()  # x_4 y_0
    keep = torch.arange(20) != 3
    assert torch.equal(got[keep], clean[keep])
