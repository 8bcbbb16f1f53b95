"""The losses under autograd's options, torch.compile, torch.func and autocast; gradients in place of the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastloss
from tests.spherical.problems import LINEAR, LOSSES, make


@pytest.mark.parametrize("function", [*LOSSES, *LINEAR])
def test_gradcheck(backend: str, function: str) -> None:
    problem = make(function, 6, 7, 3, dtype=torch.float64, options="weights")

    def loss(*tensors: Tensor) -> Tensor:
        arguments = dict(zip(problem.tensors, tensors, strict=True))
        value: Tensor = getattr(fastloss, function)(**arguments, target=problem.target, **problem.options)
        return value

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in problem.tensors.values()])


@pytest.mark.parametrize("function", [*LOSSES, *LINEAR])
def test_second_derivatives_raise(function: str) -> None:
    problem = make(function, 6, 7, 3)
    leaves = [x.requires_grad_() for x in problem.tensors.values()]
    loss = getattr(fastloss, function)(**problem.tensors, target=problem.target)
    (first,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative .* fastloss\.reference\.spherical"):
        first.sum().backward()


@pytest.mark.parametrize("function", [*LOSSES, *LINEAR])
def test_compiles_without_a_graph_break(function: str) -> None:
    problem = make(function, 12, 17, 5, dtype=torch.float64, options="weights")
    want, wants = problem(fastloss)
    leaves = [x.requires_grad_() for x in problem.tensors.values()]
    compiled = torch.compile(getattr(fastloss, function), fullgraph=True, backend="aot_eager")
    loss = compiled(**problem.tensors, target=problem.target, **problem.options)
    torch.testing.assert_close(loss.detach(), want, rtol=1e-14, atol=0)
    gradients = torch.autograd.grad(loss, leaves)
    for got, expected in zip(gradients, wants.values(), strict=True):
        torch.testing.assert_close(got * 0.5, expected, rtol=1e-12, atol=1e-15)  # the weight of one entry is 0.5


@pytest.mark.parametrize("function", [*LOSSES, *LINEAR])
def test_vmap_of_grad_and_grad_of_vmap(function: str) -> None:
    problems = [make(function, 6, 7, 3, dtype=torch.float64)]
    names = list(problems[0].tensors)
    target = problems[0].target
    batch = [torch.stack([x, 2 * x, x - 1]) for x in problems[0].tensors.values()]

    def loss(*tensors: Tensor) -> Tensor:
        value: Tensor = getattr(fastloss, function)(**dict(zip(names, tensors, strict=True)), target=target)
        return value

    argnums = tuple(range(len(names)))
    want = [torch.func.grad(loss, argnums)(*(x[i] for x in batch)) for i in range(3)]
    inside = torch.func.vmap(torch.func.grad(loss, argnums))(*batch)
    outside = torch.func.grad(lambda *xs: torch.func.vmap(loss)(*xs).sum(), argnums)(*batch)
    for k in argnums:
        for got in (inside[k], outside[k]):
            torch.testing.assert_close(got, torch.stack([w[k] for w in want]), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("function", LINEAR)
@pytest.mark.parametrize("only", ["hidden", "weight", "bias"])
def test_gradients_of_some_inputs(function: str, only: str) -> None:
    for rows in (6, 60):
        problem = make(function, rows, 17, 8, dtype=torch.float64, options="none")
        problem = problem.with_options(reduction="sum")
        want = problem(fastloss)[1][only]
        tensors = {k: v.detach().clone().requires_grad_(k == only) for k, v in problem.tensors.items()}
        loss = getattr(fastloss, function)(**tensors, target=problem.target, **problem.options)
        (got,) = torch.autograd.grad(loss * 0.5, tensors[only])
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("function", LINEAR)
def test_products_keep_their_dtype_under_autocast(function: str) -> None:
    problem = make(function, 40, 31, 16)
    want, wants = problem(fastloss)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = problem(fastloss)
    assert torch.equal(loss, want)
    assert all(torch.equal(gradients[k], w) for k, w in wants.items())


def test_hidden_states_in_bfloat16_with_weights_in_float32() -> None:
    hidden, weight = torch.randn(40, 16).bfloat16().requires_grad_(), torch.randn(31, 16, requires_grad=True)
    target = torch.arange(40) % 31
    got = torch.autograd.grad(fastloss.linear_z_loss(hidden, weight, target), (hidden, weight))
    wide = hidden.detach().float().requires_grad_()
    want = torch.autograd.grad(fastloss.linear_z_loss(wide, weight, target), (wide, weight))
    assert torch.equal(got[0], want[0].bfloat16())
    assert torch.equal(got[1], want[1])


# ---------------------------------------------------------------- the gradient in place of the logits


def _through(function: str, base: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    logits = base.clone().requires_grad_() * 1
    target = torch.arange(len(base)) % base.shape[1]
    target[-1] = -100
    return logits, getattr(fastloss, function)(logits, target, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", LOSSES)
def test_gradient_takes_the_place_of_the_logits(backend: str, function: str, dtype: torch.dtype) -> None:
    base = torch.randn(9, 2100).to(dtype)
    logits, loss = _through(function, base)
    (want,) = torch.autograd.grad(loss, logits)
    logits, loss = _through(function, base, gradient_overwrites_logits=True)
    version = logits._version
    (got,) = torch.autograd.grad(loss, logits)
    assert torch.equal(got, want)
    assert got.data_ptr() == logits.data_ptr()
    assert torch.equal(logits, got)
    assert logits._version > version


def test_strided_logits_are_overwritten_in_place(backend: str) -> None:
    base = torch.randn(12, 8)
    logits = (base.clone().requires_grad_() * 1).t()
    target = torch.arange(8)
    (want,) = torch.autograd.grad(fastloss.z_loss(logits, target), logits)
    (got,) = torch.autograd.grad(fastloss.z_loss(logits, target, gradient_overwrites_logits=True), logits)
    assert torch.equal(got, want)
    assert got.data_ptr() == logits.data_ptr()


def test_overwritten_logits_are_refused_by_others_that_saved_them() -> None:
    logits, loss = _through("z_loss", torch.randn(4, 6), gradient_overwrites_logits=True)
    other = logits.square().sum()
    torch.autograd.grad(loss, logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_a_second_backward_pass_over_overwritten_logits_raises() -> None:
    logits, loss = _through("z_loss", torch.randn(4, 6), gradient_overwrites_logits=True)
    torch.autograd.grad(loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


def test_logits_changed_before_the_backward_pass_are_refused() -> None:
    logits, loss = _through("z_loss", torch.randn(4, 6), gradient_overwrites_logits=True)
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


def test_overwriting_has_no_second_derivative() -> None:
    logits, loss = _through("z_loss", torch.randn(4, 6), gradient_overwrites_logits=True)
    with pytest.raises(RuntimeError, match="overwrites the logits has no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_overwriting_through_a_layer_is_right() -> None:
    layer, x, target = torch.nn.Linear(5, 7).double(), torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 7
    results = []
    for overwrite in (False, True):
        loss = fastloss.z_loss(layer(x), target, gradient_overwrites_logits=overwrite)
        results.append(torch.autograd.grad(loss, tuple(layer.parameters())))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_overwriting_changes_nothing_in_compiled_code() -> None:
    base, target = torch.randn(4, 6, requires_grad=True), torch.arange(4)

    def run(x: Tensor) -> Tensor:
        return fastloss.z_loss(x * 2, target, gradient_overwrites_logits=True)

    (want,) = torch.autograd.grad(run(base), base)
    (got,) = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(base), base)
    torch.testing.assert_close(got, want)


def test_the_schema_of_the_overwriting_op_is_honest() -> None:
    schema = torch.ops.fastloss.row_moments_bwd_.default._schema
    assert [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write] == ["logits"]
    target = torch.tensor([0, 1, -1])
    logits = torch.randn(3, 5)
    stats = torch.ops.fastloss.row_moments_fwd(logits, target, "test")[4]
    grads = [torch.randn(3) for _ in range(4)]
    torch.library.opcheck(torch.ops.fastloss.row_moments_bwd_.default, (*grads, logits, target, stats))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("loss", ["z_loss", "spherical_softmax_loss", "taylor_softmax_loss", "one_hot_mse_loss"])
def test_gradient_of_an_argument_in_a_compiled_function(loss: str, linear: bool) -> None:
    """The argument of torch.func.grad goes straight into the loss."""
    torch.manual_seed(0)
    x, weight, target = torch.randn(4, 6), torch.randn(9, 6), torch.arange(4)
    function = getattr(fastloss, f"linear_{loss}" if linear else loss)
    arguments = (0, 1) if linear else (0,)

    def gradients(x: Tensor, weight: Tensor) -> Any:
        of_both = (lambda x, w: function(x, w, target)) if linear else (lambda x, w: function(x, target))
        return torch.func.grad(of_both, argnums=arguments)(x, weight)

    found = torch.compile(gradients, fullgraph=True, backend="aot_eager")(x, weight)
    wanted = gradients(x, weight)
    assert all(g.abs().max() > 0 for g in wanted)
    torch.testing.assert_close(found, wanted)
