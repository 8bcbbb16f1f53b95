"""Derivatives of any order, torch.func, torch.compile, and the module."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from e3nn import o3
from torch import Tensor
from torch._vmap_internals import _vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fastloss
from fastloss.gaunt import ops, portable
from tests.gaunt.test_values import F64, METHODS, e3nn_constant, e3nn_product, functions
from tests.support import assert_equal_to_rounding


def loss_of(method: str) -> Callable[..., Tensor]:
    return lambda x, y: fastloss.gaunt_tensor_product(x, y, 2, method=method).pow(3).sum()


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return functions(*shape, l=2), functions(*shape, l=1, seed=1)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method: str) -> None:
    leaves = [x.requires_grad_() for x in pair(2)]
    function = lambda x, y: fastloss.gaunt_tensor_product(x, y, 2, method=method)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("factors", "orders", "needed"), [(2, 7, 89), (16, 3, 83)])
def test_derivatives_depend_on_64_functions_at_most(factors: int, orders: int, needed: int) -> None:
    xs = [functions(2, l=1, seed=i).requires_grad_() for i in range(factors)]
    value = fastloss.gaunt_product(xs, 0).pow(3).sum()
    for _ in range(orders):
        gradients = torch.autograd.grad(value, xs, create_graph=True)
        value = torch.stack([g.pow(2).sum() for g in gradients]).sum()
    with pytest.raises(RuntimeError, match=f"may depend on 64 functions at most, .*, got {needed}; multiply fewer"):
        torch.autograd.grad(value, xs, create_graph=True)


@pytest.mark.usefixtures("backend")
def test_gradcheck_of_the_others() -> None:
    x, y = (t.requires_grad_() for t in pair(2))
    vectors = torch.randn(2, 3, dtype=F64, requires_grad=True)
    many = lambda x, y: fastloss.gaunt_product([x, y, x], 1)  # noqa: E731
    assert torch.autograd.gradcheck(many, (x, y), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(many, (x, y))
    power = lambda x: fastloss.gaunt_power(x, 3, 2, normalization="norm")  # noqa: E731
    assert torch.autograd.gradcheck(power, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(power, (x,))
    convolution = lambda x, v: fastloss.gaunt_convolution(x, v, 2, 2)  # noqa: E731
    assert torch.autograd.gradcheck(convolution, (x, vectors), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(convolution, (x, vectors))
    harmonics = lambda v: fastloss.spherical_harmonics(v, 3)  # noqa: E731
    assert torch.autograd.gradcheck(harmonics, (vectors,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(harmonics, (vectors,))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dim", [-1, -2])
def test_gradcheck_of_weights_and_channels(dim: int) -> None:
    x, y = functions(2, 2, l=2), functions(2, 2, l=1, seed=1)
    x, y = ((t.mT if dim == -2 else t).contiguous().requires_grad_() for t in (x, y))
    w1, w2, w3 = (torch.rand(2, n + 1, dtype=F64, requires_grad=True) for n in (2, 1, 3))

    def product(*leaves: Tensor) -> Tensor:
        return fastloss.gaunt_tensor_product(*leaves[:2], weights=leaves[2:], normalization="norm", dim=dim)

    def square(x: Tensor, w: Tensor) -> Tensor:
        return fastloss.gaunt_tensor_product(x, x, 2, weights=(w, w, None), normalization="component", dim=dim)

    def convolution(x: Tensor, vectors: Tensor, weights: Tensor) -> Tensor:
        return fastloss.gaunt_convolution(x, vectors, 2, 2, weights=weights, normalization="component", dim=dim)

    vectors = torch.randn(2, 3, dtype=F64, requires_grad=True)
    radial = torch.rand(2, 2, 3, dtype=F64, requires_grad=True)
    for function, leaves in (
        (product, (x, y, w1, w2, w3)),
        (square, (x, w1)),
        (convolution, (x, vectors, radial)),
    ):
        assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, leaves)


def test_module_has_second_derivatives() -> None:
    module = fastloss.GauntTensorProduct("2x0e + 2x1o", "0e + 1o", "2x1o + 2x0e").double()
    x, y = torch.randn(2, 8, dtype=F64, requires_grad=True), torch.randn(2, 4, dtype=F64, requires_grad=True)
    names, values = zip(*module.named_parameters(), strict=True)

    def function(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x, y))

    assert torch.autograd.gradcheck(function, (x, y, *values), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, y, *values))


def test_vmap_of_the_others_is_a_loop() -> None:
    x, y = functions(4, 3, l=2), functions(4, 3, l=1, seed=1)
    vectors = torch.randn(4, 3, 3, dtype=F64)
    for function, arguments in (
        (lambda x, y: fastloss.gaunt_product([x, y, x], 2), (x, y)),
        (lambda x: fastloss.gaunt_power(x, 3, 2), (x,)),
        (lambda x, v: fastloss.gaunt_convolution(x, v, 2, 2), (x, vectors)),
        (lambda v: fastloss.spherical_harmonics(v, 4), (vectors,)),
        (lambda x, y: fastloss.gaunt_tensor_product(x.mT, y.mT, 2, dim=-2), (x, y)),
    ):
        got = torch.func.vmap(function)(*arguments)
        want = torch.stack([function(*(a[b] for a in arguments)) for b in range(4)])
        assert_equal_to_rounding(got, want, terms=500)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_training_with_forces_under_compile(compiler: str) -> None:
    """Forces are gradients in the vectors; the loss on them is differentiated in the features and the weights."""
    x, weights = functions(6, l=2).requires_grad_(), torch.rand(6, 3, dtype=F64, requires_grad=True)
    vectors = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(3))

    def energy(vectors: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        z = fastloss.gaunt_convolution(x, vectors, 2, 2, weights=weights)
        return fastloss.gaunt_tensor_product(z, z, 1).pow(2).sum()

    def loss(vectors: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        return torch.func.grad(energy)(vectors, x, weights).pow(2).sum()

    want = torch.autograd.grad(loss(vectors, x, weights), (x, weights))
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for got, expected in zip(torch.autograd.grad(compiled(vectors, x, weights), (x, weights)), want, strict=True):
        assert_equal_to_rounding(got, expected, terms=5000)


@pytest.mark.parametrize("method", METHODS)
def test_transforms_agree_with_autograd(method: str) -> None:
    loss = loss_of(method)
    x, y = pair(3)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, y), leaf)
    assert_equal_to_rounding(torch.func.grad(loss)(x, y), gradient, terms=100)
    want = torch.autograd.functional.hessian(lambda a: loss(a, y), x)
    assert_equal_to_rounding(torch.func.hessian(lambda a: loss(a, y))(x), want, terms=1000)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(torch.stack((x, 2 * x)), y)
    assert_equal_to_rounding(each[1], torch.func.grad(loss)(2 * x, y), terms=100)


def second_derivative(route: str, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss on forces: what training with forces differentiates."""
    if route == "torch.func.grad":
        return lambda x, y: torch.func.grad(loss)(x, y).pow(2).sum()
    return lambda x, y: torch.autograd.grad(loss(x, y), x, create_graph=True)[0].pow(2).sum()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("route", ["torch.func.grad", "torch.autograd.grad"])
def test_second_derivative_under_compile(route: str, compiler: str) -> None:
    x, y = (t.requires_grad_() for t in pair(3))
    function = second_derivative(route, loss_of("ring"))
    want = torch.autograd.grad(function(x, y), (x, y))
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    traced = route == "torch.autograd.grad"  # off by default in Dynamo
    with torch._dynamo.config.patch(trace_autograd_ops=True) if traced else nullcontext():
        result = torch.autograd.grad(compiled(x, y), (x, y))
    for got, expected in zip(result, want, strict=True):
        assert_equal_to_rounding(got, expected, terms=1000)


@pytest.mark.parametrize("method", METHODS)
def test_compiles(method: str) -> None:
    x, y = (t.requires_grad_() for t in pair(3))
    loss = loss_of(method)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        torch.autograd.grad(compiled(x, y), (x, y)), torch.autograd.grad(loss(x, y), (x, y)), strict=True
    ):
        assert_equal_to_rounding(got, want, terms=100)


def test_compiles_with_dynamic_shapes() -> None:
    compiled = torch.compile(fastloss.gaunt_tensor_product, fullgraph=True, dynamic=True, backend="aot_eager")
    for lanes in (3, 5):
        for degree in (1, 3):
            x, y = functions(lanes, l=degree), functions(lanes, l=2)
            assert_equal_to_rounding(compiled(x, y), fastloss.gaunt_tensor_product(x, y), terms=200)


def test_others_compile() -> None:
    x, _ = pair(4)
    vectors = torch.randn(4, 3, dtype=F64)

    def function(x: Tensor, vectors: Tensor) -> Tensor:
        y = fastloss.gaunt_convolution(x, vectors, 3, 2, normalization="component")
        return fastloss.gaunt_product([y, x, y], 1, normalization="norm") + fastloss.gaunt_power(x, 3, 1)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal_to_rounding(compiled(x, vectors), function(x, vectors), terms=1000)


def test_tables_built_in_inference_mode_serve_training() -> None:
    x, y = functions(2, l=6), functions(2, l=5)
    for method in METHODS:
        with torch.inference_mode():
            fastloss.gaunt_tensor_product(x, y, 7, method=method, normalization="norm")
        leaf = x.clone().requires_grad_()
        fastloss.gaunt_tensor_product(leaf, y, 7, method=method, normalization="norm").sum().backward()


def test_tables_built_inside_transforms_serve_compiled_graphs() -> None:
    vectors = functions(4, l=2)[:, :3]
    function = lambda v: fastloss.spherical_harmonics(v, 15, normalization="norm")  # noqa: E731 - a degree of its own
    torch.func.grad(lambda v: function(v).sum())(vectors)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(vectors), function(vectors))


@pytest.mark.parametrize("method", METHODS)
def test_tables_are_not_built_on_the_default_device(method: str) -> None:
    x, y = functions(2, l=3), functions(2, l=1)
    with torch.device("meta"):  # degrees and normalization that no other test has tables of
        got = fastloss.gaunt_tensor_product(x, y, 1, method=method, normalization="norm")
        harmonics = fastloss.spherical_harmonics(x[:, :3], 14, normalization="norm")
    assert torch.equal(got, fastloss.gaunt_tensor_product(x, y, 1, method=method, normalization="norm"))
    assert torch.equal(harmonics, fastloss.spherical_harmonics(x[:, :3], 14, normalization="norm"))


class TestModule:
    def test_equals_e3nn(self) -> None:
        irreps = "4x0e + 4x1o + 4x2e", "4x1o + 4x0e", "4x3o + 4x1o + 4x2e"
        module = fastloss.GauntTensorProduct(*(o3.Irreps(i) for i in irreps)).double()
        for weight in module.parameters():
            torch.nn.init.normal_(weight)
        w1, w2, w3 = (w.detach() for w in module.parameters())
        degrees = [0, 1, 2], [1, 0], [3, 1, 2]
        paths = [(i, j, k) for i in range(3) for j in range(2) for k in range(3)]
        x = torch.randn(10, o3.Irreps(irreps[0]).dim, dtype=F64), torch.randn(10, o3.Irreps(irreps[1]).dim, dtype=F64)
        want = torch.zeros(10, o3.Irreps(irreps[2]).dim, dtype=F64)
        for i, j, k in paths:
            a, b, c = degrees[0][i], degrees[1][j], degrees[2][k]
            if not abs(a - b) <= c <= a + b or (a + b + c) % 2:
                continue
            path = [(i, j, k, "uuu", True, e3nn_constant(a, b, c) ** 2)]
            want += e3nn_product(*irreps, path)(*x, w1[:, a] * w2[:, b] * w3[:, c])
        assert_equal_to_rounding(module(*x).detach(), want, terms=200)

    def test_default_output_and_reversed_parity(self) -> None:
        module = fastloss.GauntTensorProduct("2x1o", "2x1e")
        assert module.irreps_out == "2x0o+2x2o"
        module = fastloss.GauntTensorProduct("0e + 1o", "0e + 1o")
        assert module.irreps_out == "1x0e+1x1o+1x2e"

    def test_one_multiplicity_is_shared(self) -> None:
        module = fastloss.GauntTensorProduct("3x0e+3x1o", "0e+1o", internal_weights=False).double()
        assert not list(module.parameters())
        x, y = torch.randn(5, 12, dtype=F64), torch.randn(5, 4, dtype=F64)
        first = torch.cat((x[:, :1], x[:, 3:6]), 1)
        want = fastloss.gaunt_tensor_product(first, y)
        got = module(x, y)
        assert_equal_to_rounding(torch.cat((got[:, :1], got[:, 3:6], got[:, 12:17]), 1), want, terms=16)

    def test_state_dict_copy_and_compile(self) -> None:
        module = fastloss.GauntTensorProduct("4x0e + 4x1o", "4x0e + 4x1o")
        torch.nn.init.normal_(module.weight1)
        assert sorted(module.state_dict()) == ["weight1", "weight2", "weight3"]
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        other = fastloss.GauntTensorProduct("4x0e + 4x1o", "4x0e + 4x1o")
        other.load_state_dict(torch.load(file))
        x = torch.randn(2, 6, 16)
        want = module(*x)
        assert torch.equal(other(*x), want)
        assert torch.equal(copy.deepcopy(module)(*x), want)
        assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(*x), want)
        assert "4x0e" in repr(module)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("4x0e+3x1o", "4x0e"), "`irreps_in1` must have one multiplicity"),
            (("4x0e+4x0e", "4x0e"), "`irreps_in1` must name each degree once"),
            (("4x0e", "4x0e+4x1e"), "`irreps_in2` must have the parities of one function"),
            (("4x0e", "2x0e"), "`irreps_in2` must have multiplicity 4 (as `irreps_in1`) or 1, got 2"),
            (("4x0e", "4x0e", "2x0e"), "`irreps_out` must have multiplicity 4"),
            (("4x1o", "4x1o", "4x1o"), "`irreps_out` must come from 4x1o times 4x1o, but nothing couples to degree 1"),
            (("4x1o", "4x1o", "4x3o"), "nothing couples to degree 3"),
            (("4x1o", "4x1o", "4x2o"), "the parities multiply to the others"),
            (("4x1z", "4x1o"), "`irreps_in1` must be irreps such as"),
            (("", "4x1o"), "`irreps_in1` must be irreps such as"),
        ],
    )
    def test_irreps_that_do_not_fit(self, arguments: tuple[str, ...], message: str) -> None:
        with pytest.raises(ValueError, match="GauntTensorProduct") as error:
            fastloss.GauntTensorProduct(*arguments)
        assert message in str(error.value)

    @pytest.mark.parametrize("route", ["assign", "to_empty"])
    def test_comes_from_the_meta_device(self, route: str) -> None:
        irreps = "4x0e + 4x2e", "1x0e + 1x1o"
        module = fastloss.GauntTensorProduct(*irreps)
        with torch.no_grad():
            for weight in module.parameters():
                weight.normal_()
        with torch.device("meta"):
            copied = fastloss.GauntTensorProduct(*irreps)
        if route == "to_empty":
            copied = copied.to_empty(device="cpu")
        copied.load_state_dict(module.state_dict(), assign=route == "assign")
        x, y = torch.randn(3, 24), torch.randn(3, 4)
        torch.testing.assert_close(copied(x, y), module(x, y), rtol=0, atol=0)

    def test_options_and_inputs_that_do_not_fit(self) -> None:
        with pytest.raises(TypeError, match="`internal_weights` must be True or False, got NoneType"):
            fastloss.GauntTensorProduct("0e", "0e", internal_weights=None)  # type: ignore[arg-type]
        options: dict[str, Any]
        for options in ({"method": "grid"}, {"normalization": "none"}):
            with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be one of"):
                fastloss.GauntTensorProduct("0e", "0e", **options)
        module = fastloss.GauntTensorProduct("2x0e+2x1o", "0e")
        with pytest.raises(ValueError, match=r"`x1` must have shape \(\.\.\., 8\) for 2x0e\+2x1o, got \(3, 7\)"):
            module(torch.zeros(3, 7), torch.zeros(3, 1))


def test_factor_of_a_constant() -> None:
    """The constant function 1 has the coefficient sqrt(4 pi)."""
    one = torch.tensor([math.sqrt(4 * math.pi)], dtype=F64)
    x = functions(3, l=3)
    assert_equal_to_rounding(fastloss.gaunt_tensor_product(x, one), x, terms=16)


@pytest.mark.parametrize("method", METHODS)
def test_vectorised_autograd(method: str) -> None:
    """The vmap of torch.autograd itself, also nested."""
    x, y = pair(2)
    cubed = lambda x: fastloss.gaunt_tensor_product(x, y, method=method).pow(3).sum()  # noqa: E731
    expected = torch.func.hessian(cubed)(x)
    for vectorize in (True, False):
        actual = torch.autograd.functional.hessian(cubed, x, vectorize=vectorize)
        assert_equal_to_rounding(actual, expected, terms=16 * 9 * 4)  # coefficients of the output, and of the inputs
    if method == "fft":
        return  # einsum itself knows no such vmap
    rows, columns = functions(3, 2, l=2), functions(5, 2, l=1, seed=1)
    product = partial(fastloss.gaunt_tensor_product, method=method)
    outer = _vmap(lambda a: _vmap(lambda b: product(a, b))(columns))(rows)
    assert_equal_to_rounding(outer, product(rows[:, None], columns[None]), terms=9 * 4)


def test_autocast_takes_the_widest_dtype() -> None:
    x, y = (t.float() for t in pair(3))
    vectors = torch.randn(3, 3)
    narrow = x.bfloat16()
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: fastloss.gaunt_tensor_product(x, y),
        lambda x: fastloss.gaunt_product([x, y, x]),
        lambda x: fastloss.gaunt_convolution(x, vectors, 2),
    ]
    for call in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = call(narrow)
        assert mixed.dtype == torch.float32
        torch.testing.assert_close(mixed, call(narrow.float()), rtol=0, atol=0)
        with pytest.raises(TypeError, match="must be torch\\.bfloat16 as"):
            call(narrow)


@pytest.mark.parametrize("method", METHODS)
def test_no_functions(method: str) -> None:
    x, y = (t[:0].requires_grad_() for t in pair(2))
    out = fastloss.gaunt_tensor_product(x, y, 2, method=method)
    assert out.shape == (0, 9)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (x, y))] == [x.shape, y.shape]


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("method", METHODS)
def test_degrees_beyond_all_are_zeros_and_cost_nothing(method: str, dim: int) -> None:
    x, y = pair(2)
    weight = torch.rand(301, dtype=F64).requires_grad_()
    if dim == -2:
        x, y = x.T, y.T
    few = fastloss.gaunt_tensor_product(x, y, weights=(None, None, weight[:4]), method=method, dim=dim)
    many = fastloss.gaunt_tensor_product(x, y, 300, weights=(None, None, weight), method=method, dim=dim)
    assert many.shape[dim] == 301**2
    torch.testing.assert_close(many.narrow(dim, 0, 16), few, rtol=0, atol=0)
    assert not many.narrow(dim, 16, 301**2 - 16).any()
    (gradient,) = torch.autograd.grad(many.sum(), weight)
    assert not gradient[4:].any()
    assert fastloss.gaunt_power(x, 2, 300, dim=dim).shape[dim] == 301**2


def test_integers_of_numpy() -> None:
    x, y = pair(2)
    torch.testing.assert_close(
        fastloss.gaunt_tensor_product(x, y, np.int64(2)), fastloss.gaunt_tensor_product(x, y, 2), rtol=0, atol=0
    )
    torch.testing.assert_close(fastloss.gaunt_power(x, np.int32(2)), fastloss.gaunt_power(x, 2), rtol=0, atol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_harmonics_of_degree_zero_keep_the_graph(normalize: bool) -> None:
    vectors = torch.tensor([[1.0, 2.0, math.inf]]).requires_grad_()
    values = fastloss.spherical_harmonics(vectors, 0, normalize=normalize)
    torch.testing.assert_close(values, torch.tensor([[1 / math.sqrt(4 * math.pi)]]))
    (gradient,) = torch.autograd.grad(values.sum(), vectors)
    assert not gradient.any()


class TestShortWay:
    """Ordinary tensors go past the dispatcher; whatever has to see the op still does."""

    def test_modes_see_the_op(self) -> None:
        class Seen(TorchDispatchMode):
            def __init__(self) -> None:
                super().__init__()
                self.names: list[str] = []

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                self.names.append(str(func))
                return func(*args, **(kwargs or {}))

        x, y = (t.requires_grad_() for t in pair(3))
        with Seen() as seen:
            fastloss.gaunt_tensor_product(x, y).sum().backward()
        assert seen.names.count("fastloss.gaunt_ring_fwd.default") == 2

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    def test_traced_graph_has_the_op(self) -> None:
        traced = torch.jit.trace(fastloss.gaunt_tensor_product, pair(3), check_trace=False)
        assert "fastloss::gaunt_ring_fwd" in str(traced.graph)

    def test_negative_view_is_resolved(self) -> None:
        x, y = pair(3)
        negative = torch._neg_view(x)
        assert negative.is_neg()
        torch.testing.assert_close(
            fastloss.gaunt_tensor_product(negative, y), fastloss.gaunt_tensor_product(-x, y), rtol=0, atol=0
        )

    def test_backend_is_obeyed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        called = []
        monkeypatch.setattr(portable, "gaunt_ring_fwd", lambda *args: called.append(args) or [torch.zeros(3, 16)])
        with fastloss.use_backend("portable"):
            fastloss.gaunt_tensor_product(*pair(3))
        assert len(called) == 1

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"lmax_out": True}, TypeError, "`lmax_out` must be an int, got bool"),
            ({"lmax_out": [1]}, TypeError, "`lmax_out` must be an int, got list"),
            ({"lmax_out": -1}, ValueError, "`lmax_out` must be at least 0, got -1"),
            ({"method": ["ring"]}, ValueError, "`method` must be one of"),
            ({"method": "rings"}, ValueError, "`method` must be one of"),
        ],
    )
    def test_bad_arguments_are_still_seen(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        x, y = pair(3)
        fastloss.gaunt_tensor_product(x, y, 1)  # of which True would be the same key
        with pytest.raises(error, match=message):
            fastloss.gaunt_tensor_product(x, y, **options)

    def test_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ops, "_op", None)
        x, y = (t.requires_grad_() for t in pair(3))
        for method in ("auto", "ring"):
            fastloss.gaunt_tensor_product(x, y, method=method).sum().backward()


def test_gradients_in_a_compiled_function_of_sizes_that_change() -> None:
    def forces(x: Tensor, y: Tensor) -> Tensor:
        return torch.func.grad(lambda q: fastloss.gaunt_tensor_product(q, y).sin().sum())(x)  # type: ignore[no-any-return]

    compiled = torch.compile(forces, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, size in ((17, 4), (5, 9)):
        x, y = torch.randn(2, rows, size, dtype=torch.float64)
        torch.testing.assert_close(compiled(x, y), forces(x, y))
