"""The Triton kernel against the closed form in float64: on a GPU, or interpreted (see `tests/test_triton.py`).

The interpreter takes 16 lanes, 16 coefficients of one parity and 16 points at a time, so that small degrees cross every
edge. The measure of an error is that of the portable backend, which has the same quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import reference
from fastloss._triton import INTERPRETER, Config
from fastloss.gaunt import ops
from fastloss.gaunt import triton as kernels
from fastloss.gaunt.program import Program, Term
from tests.gaunt.op_rows import _program
from tests.support import assert_as_accurate_as_torch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, F64 = torch.float32, torch.float64
Run = Callable[[Any, Sequence[Tensor]], Tensor]


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with fastloss.use_backend("triton"):
        yield


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=F64, generator=generator).to(dtype).to(DEVICE)


def functions(*shape: int, l: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:  # noqa: E741
    return numbers(*shape, (l + 1) ** 2, seed=seed, dtype=dtype)


def derivatives(run: Run, module: Any, leaves: Sequence[Tensor], dtype: torch.dtype, order: int) -> list[Tensor]:
    """The values, and with each order the gradients of a weighted sum of all that came before."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    found = [run(module, leaves)]
    for _ in range(order):
        total = torch.stack([(y * numbers(*y.shape, seed=5).to(y)).sum() for y in found]).sum()
        found += torch.autograd.grad(total, leaves, create_graph=True)
    return [y.detach().to(DEVICE) for y in found]


def check(run: Run, leaves: Sequence[Tensor], order: int = 1) -> None:
    actual = derivatives(run, fastloss, leaves, F32, order)
    with fastloss.use_backend("portable"):
        baseline = derivatives(run, fastloss, leaves, F32, order)
    truth = derivatives(run, reference, [x.cpu() for x in leaves], F64, order)
    for n, (got, want, base) in enumerate(zip(actual, truth, baseline, strict=True)):
        assert_as_accurate_as_torch(got, want, base, name=f"result {n}")


def product(*degrees: int, **options: Any) -> Run:
    return lambda module, x: module.gaunt_tensor_product(*x, *degrees, **options)


@pytest.mark.parametrize(
    ("l1", "l2", "l3"),
    [(0, 0, 0), (1, 0, 1), (1, 1, 2), (2, 3, 5), (3, 2, 2), (2, 1, 6), (4, 4, 8), (5, 5, 10), (6, 4, 0)],
)
def test_degrees_at_every_edge(l1: int, l2: int, l3: int) -> None:
    """A tile is 16 coefficients of one parity: all up to degree 4, where two parities take one tile each."""
    check(product(l3), [functions(5, l=l1), functions(5, l=l2, seed=1)])


def test_rings_and_the_sparse_tensor_are_one_kernel() -> None:
    x, y = functions(5, l=2), functions(5, l=3)
    by_method = [fastloss.gaunt_tensor_product(x, y, method=method) for method in ("auto", "ring", "direct")]
    assert torch.equal(by_method[0], by_method[1])
    assert torch.equal(by_method[0], by_method[2])


@pytest.mark.parametrize("l3", range(9))
def test_points_at_every_edge(l3: int) -> None:
    """From 2 x 3 points, a point and its antipode being one, to 6 x 11."""
    check(product(l3), [functions(3, l=1), functions(3, l=1, seed=1)])


@pytest.mark.parametrize("lanes", [1, 2, 15, 16, 17, 31, 32, 33])
def test_lanes_at_every_edge(lanes: int) -> None:
    check(product(), [functions(lanes, l=2), functions(lanes, l=1, seed=1)])


def test_no_lanes() -> None:
    x = functions(0, l=2).requires_grad_()
    product = fastloss.gaunt_tensor_product(x, x)
    assert product.shape == (0, 25)
    assert torch.autograd.grad(product.sum(), x)[0].shape == (0, 9)


def test_no_leading_dimensions() -> None:
    check(product(), [functions(l=2), functions(l=1, seed=1)])


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("channels", [1, 2, 16, 17])
def test_channels_last(channels: int, lead: tuple[int, ...]) -> None:
    x, y = (numbers(*lead, (l + 1) ** 2, channels, seed=l) for l in (3, 2))  # noqa: E741
    check(product(4, dim=-2), [x, y])


def test_strides() -> None:
    x, y = functions(4, 6, 2, l=2), functions(5, l=3)
    pairs = [
        (x[:, :, 1], functions(6, l=1)),
        (x[:, ::2, 0], functions(4, 1, l=1)),
        (x.transpose(0, 1)[:, :, 0], functions(6, 4, l=1)),
        (x.movedim(2, 0), functions(1, l=1)),
        (y.flip(-1).mT.contiguous().mT, functions(5, l=1)),
        (y[:1].expand(5, -1), functions(5, l=1)),
    ]
    for pair in pairs:
        got = fastloss.gaunt_tensor_product(*pair)
        lead = got.shape[:-1]
        want = fastloss.gaunt_tensor_product(*(t.expand(*lead, t.shape[-1]).contiguous() for t in pair))
        assert torch.equal(got, want)


@pytest.mark.parametrize("normalization", ["integral", "component", "norm"])
def test_weights_and_normalizations(normalization: str) -> None:
    def run(module: Any, x: Sequence[Tensor]) -> Tensor:
        result: Tensor = module.gaunt_tensor_product(*x[:2], 3, weights=x[2:], normalization=normalization)
        return result

    check(run, [functions(3, 4, l=2), functions(4, l=2, seed=1), numbers(4, 3), numbers(3), numbers(3, 1, 4)])


@pytest.mark.parametrize("lmax_out", [None, 2])
def test_squares_and_powers(lmax_out: int | None) -> None:
    x = [functions(5, l=3)]
    check(lambda module, x: module.gaunt_tensor_product(x[0], x[0], lmax_out), x, order=2)
    check(lambda module, x: module.gaunt_power(x[0], 3, lmax_out), x)
    check(lambda module, x: module.gaunt_power(x[0], 1, lmax_out), x)


@pytest.mark.parametrize("lmax_out", [None, 3])
def test_many_bodies(lmax_out: int | None) -> None:
    x = [functions(5, l=l, seed=l) for l in (1, 2, 3)]  # noqa: E741
    check(lambda module, x: module.gaunt_product([x[0], x[1], x[0], x[2]], lmax_out), x)


@pytest.mark.parametrize("dim", [-1, -2])
def test_convolution(dim: int) -> None:
    x = functions(5, 3, l=2)
    leaves = [x if dim == -1 else x.mT.contiguous(), numbers(5, 3), numbers(5, 3, 4)]
    check(lambda module, x: module.gaunt_convolution(*x[:2], 3, 4, weights=x[2], dim=dim), leaves, order=2)


@pytest.mark.parametrize("dim", [-1, -2])
def test_second_and_third_derivatives(dim: int) -> None:
    x, y = numbers(5, 9, 9), numbers(5, 9, 9, seed=1)
    check(product(3, dim=dim), [x, y], order=2)
    check(product(2, dim=dim), [x[:2], y[:2]], order=3)


def outputs_of(program: Program, inputs: list[Tensor]) -> list[Tensor]:
    result: list[Tensor] = ops._op(inputs, program.text(), False, False)
    return result


@pytest.mark.parametrize(
    "program",
    [
        _program(3),
        Program((0, 2), ((), (Term(1, (1,)),))),  # nothing; less than all coefficients
        Program((4, 4), ((Term(1, (0, 1)), Term(-3, (1, 1)), Term(2, (0,))), (Term(1, (0, 0)),))),
        Program((6, 5, 4), ((Term(1, (0, 1)),), (Term(1, (0, 0)),), (Term(1, (1, 1)),))),  # several launches
    ],
    ids=["several outputs", "empty sum", "sums", "launches"],
)
def test_programs(program: Program) -> None:
    inputs = [functions(20, l=2), functions(20, l=3, seed=1)]
    assert (len(kernels._launches((2, 3), program)) > 1) == (program.out_degrees == (6, 5, 4))
    actual, truth = outputs_of(program, inputs), outputs_of(program, [x.double() for x in inputs])
    with fastloss.use_backend("portable"):
        baseline = outputs_of(program, inputs)
    for got, want, base in zip(actual, truth, baseline, strict=True):
        assert_as_accurate_as_torch(got, want, base)


@pytest.mark.parametrize("config", [Config((32, 32)), Config((64, 16))], ids=str)
def test_other_configurations(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels._TABLE, INTERPRETER, config)
    check(product(), [functions(33, l=3), functions(33, l=2, seed=1)])


@pytest.mark.parametrize("dim", [-1, -2])
def test_places_of_64_bits(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = numbers(3, 9, 9), numbers(3, 9, 9, seed=1)
    want = fastloss.gaunt_tensor_product(x, y, dim=dim)
    monkeypatch.setattr(kernels, "NARROW", 0)
    assert torch.equal(fastloss.gaunt_tensor_product(x, y, dim=dim), want)


def test_what_takes_64_bits() -> None:
    """Only the places within a block of lanes count, not how large a tensor is."""
    narrow = [numbers(9).expand(1 << 40, 9), numbers(1, 9).expand(1 << 30, 1 << 5, 9)]
    assert all(kernels._reach(kernels._as_lanes(x, False)) < kernels.NARROW for x in narrow)
    wide = torch.empty_strided((4, 4, 9), (9, 1 << 30, 1), device="meta")
    assert kernels._reach(kernels._as_lanes(wide, False)) >= kernels.NARROW


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x, y = functions(20, l=3, dtype=dtype), functions(20, l=3, seed=1, dtype=dtype)
    got = fastloss.gaunt_tensor_product(x, y)
    assert torch.equal(got, fastloss.gaunt_tensor_product(x.float(), y.float()).to(dtype))


@pytest.mark.parametrize("dim", [-1, -2])
def test_nan_stays_in_its_function(dim: int) -> None:
    x, y = functions(20, l=2), functions(20, l=2, seed=1)

    def run() -> Tensor:
        if dim == -1:
            return fastloss.gaunt_tensor_product(x, y)
        return fastloss.gaunt_tensor_product(x.mT, y.mT, dim=-2).mT

    clean = run()
    x[3, 4] = math.nan
    got = run()
    assert got[3].isnan().all()
    keep = torch.arange(20) != 3
    assert torch.equal(got[keep], clean[keep])


def test_what_is_portable(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(kernels, "_run", lambda *arguments: ran.append(arguments))

    def runs_here(inputs: list[Tensor], lmax_out: int | None = None) -> bool:
        ran.clear()
        product = fastloss.gaunt_product(inputs, lmax_out)
        if not ran:
            with fastloss.use_backend("portable"):
                assert torch.equal(product, fastloss.gaunt_product(inputs, lmax_out))
        return bool(ran)

    two = [functions(2, l=11, seed=n) for n in (0, 1)]
    many = [functions(2, l=1, seed=n) for n in range(kernels.MOST_INPUTS + 1)]
    assert runs_here(two, kernels.MOST_TOTAL - 22)
    assert not runs_here(two, kernels.MOST_TOTAL - 21)
    assert runs_here(many[:-1], 3)
    assert not runs_here(many, 3)
    assert not runs_here([functions(2, l=1, dtype=F64)] * 2)
