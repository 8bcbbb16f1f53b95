"""FactoredOutput against the dense layer and torch's SGD; errors leave the state as it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import FactoredOutput, FactoredSGD, reference
from fastloss.spherical import modules


def share_of_squares(a: Tensor, q: Tensor, s: Tensor) -> Tensor:
    return (q + 0.1 * s.square() + 1).log() - (a.square() + 0.5).log()


LOSSES = ["z", "spherical", "taylor", "mse", share_of_squares]


@pytest.fixture(params=["factors", "weight"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs with both states, whatever its number of classes; those of U alone ask for the factors."""
    monkeypatch.setattr(modules, "few", lambda classes, width: request.param == "weight")
    return str(request.param)


factors_only = pytest.mark.parametrize("form", ["factors"], indirect=True)


def pair(
    loss: Any = "z", bias: bool = True, width: int = 5, classes: int = 30, eps: float | None = None, **options: Any
) -> tuple[Any, Any]:
    torch.manual_seed(0)
    linear = torch.nn.Linear(width, classes, bias=bias, dtype=torch.float64)
    layer = FactoredOutput.from_linear(linear, loss=loss, eps=eps, **options)
    return layer, reference.FactoredOutput(linear, loss, eps=eps)


def assert_same_weight(layer: FactoredOutput, dense: Any, rtol: float) -> None:
    for ours, theirs in ((layer.weight(), dense.linear.weight), (layer.bias(), dense.linear.bias)):
        if theirs is None:
            assert ours is None
        else:
            assert ours is not None
            error = float((ours - theirs.detach()).norm() / theirs.detach().norm())
            assert error < rtol, error


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("targets", [0, 1, 3])  # 0: one, of target (B,)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x if isinstance(x, str) else "callable")
def test_follows_linear_and_sgd(loss: Any, targets: int, bias: bool) -> None:
    # the default eps lets gradients of 1000 / C through, which part any two runs
    layer, dense = pair(loss, bias, eps=0.01 if loss == "spherical" else None, accumulate=True)
    lr = 0.01
    theirs = torch.optim.SGD(dense.parameters(), lr=lr, weight_decay=0.1)
    ours = FactoredSGD(layer, lr=lr, weight_decay=0.1)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 10, 0.5) for o in (ours, theirs)]
    for _ in range(30):
        theirs.zero_grad()
        for _ in range(2):
            x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
            y = torch.randint(3, (4, targets) if targets else (4,))  # classes repeat
            w = torch.rand(4, targets, dtype=torch.float64) if targets else None
            value, expected = layer(x, y, w), dense(x, y, w)
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
            (g_expected,) = torch.autograd.grad(expected, x, retain_graph=True)
            expected.backward(inputs=list(dense.parameters()))
            value.backward()
            torch.testing.assert_close(x.grad, g_expected, rtol=1e-9, atol=1e-11)
        theirs.step()
        ours.step()
        for schedule in schedules:
            schedule.step()
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] == lr / 8
    assert_same_weight(layer, dense, 1e-10)


@factors_only
@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_long_runs_are_stabilised(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions of U shrink to 1e-50 (by decay) or grow apart (by the loss); the weight follows the dense one."""
    monkeypatch.setattr(modules, "CHECK_EVERY", 8)
    layer, dense = pair("mse", max_scale=4.0, refresh_every=100)
    lr = 0.02 if decay else 0.05
    theirs = torch.optim.SGD(dense.parameters(), lr=lr, weight_decay=decay)
    for _ in range(400):
        x, y = torch.randn(4, 5, dtype=torch.float64) * torch.tensor([1.5, 1, 1, 0.1, 0.1]), torch.randint(6, (4,))
        theirs.zero_grad()
        dense(x, y).backward()
        theirs.step()
        layer(x, y).backward()
        layer.step(lr, decay)
    assert layer.stabilisations > 0
    assert layer.moved_directions >= layer.stabilisations
    s = torch.linalg.svdvals(layer.u)
    assert 1e-2 < float(s.min()) <= float(s.max()) < 1e2
    assert_same_weight(layer, dense, 1e-10)


@factors_only
def test_a_step_that_makes_u_singular() -> None:
    layer, dense = pair("mse", bias=False, width=2, classes=4)
    x, y = torch.eye(2, dtype=torch.float64), torch.tensor([0, 2])
    theirs = torch.optim.SGD(dense.parameters(), lr=1.0)
    for _ in range(2):
        theirs.zero_grad()
        dense(x, y).backward()
        theirs.step()
        layer(x, y).backward()
        layer.step(1.0)
    assert layer.moved_directions >= 2
    assert_same_weight(layer, dense, 1e-12)


@pytest.mark.parametrize("loss", ["z", "spherical", "taylor", "mse"])
def test_losses_are_those_of_the_functions(loss: str) -> None:
    layer, dense = pair(loss)
    function = getattr(
        fastloss, "linear_" + {"mse": "one_hot_mse"}.get(loss, loss + "_softmax" * (loss != "z")) + "_loss"
    )
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(30, (8,))
    expected = function(x, dense.linear.weight, y, dense.linear.bias)
    torch.testing.assert_close(layer(x, y), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dense(x, y), expected, rtol=1e-10, atol=1e-12)


def test_shifted_logits_in_float32() -> None:
    _, dense = pair("z")
    with torch.no_grad():
        dense.linear.bias += 10_000
        dense.linear.float()
    layer = FactoredOutput.from_linear(dense.linear)
    dense.linear.double()
    x, y = torch.randn(8, 5, requires_grad=True), torch.randint(30, (8,))
    exact = x.detach().double().requires_grad_()
    loss, expected = layer(x, y), dense(exact, y)
    loss.backward()
    expected.backward()
    assert x.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert float((x.grad - exact.grad).norm()) < 1e-5 * float(exact.grad.norm())


def test_logits_whose_squares_overflow() -> None:
    """A sum of squares of infinity is no standardised logit of 0: whoever reads the loss has to see it."""
    layer, _ = pair("z", accumulate=True)
    x, y = torch.randn(4, 5, dtype=torch.float64) * 1e170, torch.tensor([0, 1, 2, 3])
    assert layer(x, y).isnan()
    assert layer(x, y, sample_weight=torch.ones(4, requires_grad=True)).isnan()


def test_zero_variance_is_finite() -> None:
    linear = torch.nn.Linear(3, 4)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.ones_(linear.bias)
    for loss in LOSSES:
        layer = FactoredOutput.from_linear(linear, loss=loss)
        x = torch.randn(2, 3, requires_grad=True)
        layer(x, torch.tensor([0, 1])).backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        layer.step(0.1)
        assert layer.weight().isfinite().all()


def test_one_class_and_empty_batches() -> None:
    layer = FactoredOutput(3, 1)
    layer(torch.randn(2, 3), torch.tensor([0, 0])).backward()
    layer.step(0.1)
    assert layer.weight().isfinite().all()
    assert layer(torch.randn(0, 3), torch.zeros(0, dtype=torch.int64)).isnan()


def trained(**options: Any) -> FactoredOutput:
    torch.manual_seed(3)
    layer = FactoredOutput(4, 20, **options)
    for _ in range(3):
        layer(torch.randn(5, 4), torch.randint(20, (5,))).backward()
        layer.step(0.1)
    return layer


def through_state_dict(layer: FactoredOutput) -> FactoredOutput:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    copied = FactoredOutput(4, 20)
    copied.load_state_dict(torch.load(file))
    return copied


@pytest.mark.parametrize(
    "copier",
    [through_state_dict, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["state_dict", "deepcopy", "pickle"],
)
def test_copies_are_exact(copier: Callable[[FactoredOutput], FactoredOutput]) -> None:
    layer = trained()
    copied = copier(layer)
    x, y = torch.randn(5, 4), torch.randint(20, (5,))
    for one in (layer, copied):
        one(x, y).backward()
        one.step(0.1)
    assert copied.steps == layer.steps == 4
    for name, value in layer.state_dict().items():
        assert torch.equal(value, copied.state_dict()[name]), name


def test_dtype_moves() -> None:
    layer = trained()
    double = copy.deepcopy(layer).to(torch.float64)
    torch.testing.assert_close(double.weight().float(), layer.weight())
    double(torch.randn(2, 4, dtype=torch.float64), torch.tensor([1, 2])).backward()
    double.step(0.1)
    with pytest.raises(TypeError, match=r"must have the layer's dtype, torch\.float64, got torch\.float32"):
        double(torch.randn(2, 4), torch.tensor([1, 2]))
    with pytest.raises(TypeError, match=r"the layer must be float32 or float64, got torch\.bfloat16"):
        layer.to(torch.bfloat16)(torch.randn(2, 4).bfloat16(), torch.tensor([1, 2]))


def test_logits_topk_and_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "TILE", 28)  # four rows of hidden, seven classes a tile
    for bias in (True, False):
        layer = trained(bias=bias)
        x = torch.randn(4, 4)
        linear = layer.to_linear()
        expected = linear(x).detach()
        torch.testing.assert_close(layer.logits(x), expected)
        classes = torch.tensor([3, 3, 19])
        torch.testing.assert_close(layer.logits(x, classes), expected[:, classes])
        for k in (1, 5, 20):
            value, index = layer.topk(x, k)
            torch.testing.assert_close(value, expected.topk(k)[0])
            torch.testing.assert_close(expected.gather(1, index), value)
        again = FactoredOutput.from_linear(linear)
        torch.testing.assert_close(again.weight(), layer.weight())


def test_two_layers_with_their_own_rates() -> None:
    first, second = trained(), trained()
    optimizer = FactoredSGD([first, {"layer": second, "lr": 0.0}], lr=0.1)
    before = second.weight()
    x, y = torch.randn(5, 4), torch.randint(20, (5,))
    for layer in (first, second):
        layer(x, y).backward()
    optimizer.step()
    torch.testing.assert_close(second.weight(), before)
    assert not torch.allclose(first.weight(), before)
    saved = optimizer.state_dict()
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1
    value = optimizer.step(lambda: float(first(x, y).detach()))
    assert value is not None
    first.zero_grad()
    first(x, y).backward()
    optimizer.zero_grad()
    optimizer.step()  # no gradient: nothing to do
    assert first.steps == 4


def test_layer_is_added_to_an_optimizer() -> None:
    first, second = trained(), trained()
    optimizer = FactoredSGD(first, lr=0.1)
    with pytest.raises(TypeError, match="a parameter group must be a dict with the key 'layer', got the keys params"):
        optimizer.add_param_group({"params": [torch.zeros(3)]})
    with pytest.raises(ValueError, match="each layer once"):
        optimizer.add_param_group({"layer": first})
    with pytest.raises(ValueError, match="`lr` must be finite and at least 0, got -1"):
        optimizer.add_param_group({"layer": second, "lr": -1})
    optimizer.add_param_group({"layer": second, "lr": 0.2})
    x, y = torch.randn(5, 4), torch.randint(20, (5,))
    for layer in (first, second):
        layer(x, y).backward()
    expected = copy.deepcopy(second)
    expected(x, y).backward()
    expected.step(0.2)
    optimizer.step()
    assert torch.equal(second.weight(), expected.weight())
    assert (first.steps, second.steps) == (4, 4)


def test_gradient_scaler_scales_what_leaves_the_layer() -> None:
    x, y = torch.randn(5, 4), torch.randint(20, (5,))
    scaled, plain = trained(), trained()
    below = [torch.nn.Linear(4, 4) for _ in range(2)]
    below[1].load_state_dict(below[0].state_dict())
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in below]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    hidden = below[0](x)
    hidden.register_hook(scaler.scale)
    scaled(hidden, y).backward()
    factored = FactoredSGD(scaled, lr=0.1)
    with pytest.raises(RuntimeError, match=r"FactoredSGD: a GradScaler cannot unscale .*hidden\.register_hook"):
        scaler.step(factored)
    factored.step()
    scaler.step(optimizers[0])
    scaler.update()
    plain(below[1](x), y).backward()
    FactoredSGD(plain, lr=0.1).step()
    optimizers[1].step()
    assert torch.equal(scaled.weight(), plain.weight())
    assert torch.equal(below[0].weight, below[1].weight)  # the scale is a power of two
    torch.amp.GradScaler("cpu", enabled=False).step(factored)


def test_state_of_any_strides_is_loaded() -> None:
    layer, other = FactoredOutput(4, 20), FactoredOutput(4, 20)
    strided = {name: torch.stack((x, x), -1)[..., 0] for name, x in layer.state_dict().items()}
    other.load_state_dict(strided, assign=True)
    x, y = torch.randn(5, 4), torch.randint(20, (5,))
    for each in (layer, other):
        each(x, y).backward()
        each.step(0.1)
    assert torch.equal(other.weight(), layer.weight())


def test_errors_leave_the_state() -> None:
    layer = FactoredOutput(4, 9)
    before = copy.deepcopy(layer.state_dict())
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 1])
    with pytest.raises(RuntimeError, match="no gradient"):
        layer.step(0.1)
    for bad in (y + 8, y - 1):
        with pytest.raises(ValueError, match=r"`target` must be in \[0, 9\)"):
            layer(x, bad)
    with pytest.raises(TypeError, match="`target` must be an integer tensor"):
        layer(x, y.float())
    with pytest.raises(ValueError, match=r"`target` must have shape \(3,\)"):
        layer(x, y[:2])
    with pytest.raises(ValueError, match="`hidden` must have size 4"):
        layer(x[:, :3], y)
    with pytest.raises(ValueError, match="`target_weight` must be given"):
        layer(x, y[:, None])
    with pytest.raises(ValueError, match=r"`target_weight` must have shape \(3, 1\), got \(3, 2\)"):
        layer(x, y[:, None], torch.ones(3, 2))
    with pytest.raises(ValueError, match="`k` must be at most 9, got 10"):
        layer.topk(x, 10)
    with pytest.raises(TypeError, match="`k` must be an int, got float"):
        layer.topk(x, 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`classes` must be in \[0, 9\)"):
        layer.logits(x, torch.tensor([9]))
    layer(x, y).backward()
    with pytest.raises(RuntimeError, match=r"second forward before a step; step\(\) or zero_grad\(\) comes between"):
        layer(x, y)
    for rates in ((float("nan"), 0.0), (0.1, float("inf")), (-0.1, 0.0), (0.1, -0.1)):
        with pytest.raises(ValueError, match="must be finite and at least 0"):
            layer.step(*rates)
    first = FactoredOutput(4, 9)
    optimizer = FactoredSGD([first, layer], lr=0.1)
    for option in ("lr", "weight_decay"):
        optimizer.param_groups[1][option] = -0.1
        first(x, y).backward()
        with pytest.raises(ValueError, match=f"`{option}` must be finite and at least 0, got -0.1"):
            optimizer.step()
        optimizer.param_groups[1][option] = 0.0
        first.zero_grad()
    assert first.steps == 0
    layer.zero_grad()
    layer(x * float("nan"), y).backward()
    with pytest.raises(RuntimeError, match="gradient is not finite"):
        FactoredSGD(layer, lr=0.1).step()
    after = layer.state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_a_step_that_overflows_changes_no_layer() -> None:
    """Gradients are finite; the second layer's step is not, and the first does not go ahead."""
    linear = torch.nn.Linear(4, 9)
    with torch.no_grad():
        linear.weight *= 1e-4  # the smaller the weight, the larger its gradient
        linear.bias *= 1e-4
    layers = [FactoredOutput(4, 9), FactoredOutput.from_linear(linear)]
    optimizer = FactoredSGD([layers[0], {"layer": layers[1], "lr": 1e36}], lr=0.1)
    before = [copy.deepcopy(layer.state_dict()) for layer in layers]
    for layer in layers:
        layer(torch.randn(3, 4), torch.tensor([0, 1, 1])).backward()
    with pytest.raises(RuntimeError, match=r"the step is not finite; zero_grad\(\) discards it"):
        optimizer.step()
    for layer, state in zip(layers, before, strict=True):
        for name, value in layer.state_dict().items():
            assert torch.equal(value, state[name]), name
    optimizer.zero_grad()
    layers[0](torch.randn(3, 4), torch.tensor([0, 1, 1])).backward()
    optimizer.step()
    assert layers[0].steps == 1


@factors_only
def test_a_step_that_overflows_in_the_factors_alone() -> None:
    """Of a zero weight, the change of the Gram matrix is zero whatever the rate, and that of U is not."""
    linear = torch.nn.Linear(4, 9, bias=False)
    torch.nn.init.zeros_(linear.weight)
    layer = FactoredOutput.from_linear(linear, loss=lambda a, q, s: q)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.full((8, 4), 1e12), torch.arange(8)).backward()
    with pytest.raises(RuntimeError, match="the step is not finite"):
        layer.step(1e18)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_micro_batches_with_different_numbers_of_targets() -> None:
    layer, dense = pair("z", accumulate=True)
    theirs = torch.optim.SGD(dense.parameters(), lr=0.1)
    for shape in ((4,), (3, 2)):
        x, y = torch.randn(shape[0], 5, dtype=torch.float64), torch.randint(30, shape)
        share = None if len(shape) == 1 else torch.full(shape, 0.5, dtype=torch.float64)
        for model in (layer, dense):
            model(x, y, share).backward()
    theirs.step()
    layer.step(0.1)
    assert_same_weight(layer, dense, 1e-12)


def test_class_weights_need_one_target() -> None:
    layer = FactoredOutput(4, 9)
    target = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="`class_weight` must be None with several targets an example"):
        layer(torch.randn(3, 4), target, torch.ones(3, 2), class_weight=torch.ones(9))


def test_one_weighted_target_of_mse() -> None:
    """The error to the weight at the target, in both shapes of the targets; not the weight times an error to 1."""
    y, w = torch.tensor([0, 2, 2]), torch.rand(3, 1, dtype=torch.float64)
    for target in (y, y[:, None]):
        layer, dense = pair("mse")
        x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        losses = [model(x, target, w) for model in (layer, dense)]
        torch.testing.assert_close(*losses, rtol=1e-11, atol=0)
        (gradient,) = torch.autograd.grad(losses[1], x, retain_graph=True)
        losses[1].backward(inputs=list(dense.parameters()))
        losses[0].backward()
        torch.testing.assert_close(x.grad, gradient, rtol=1e-10, atol=1e-12)
        layer.step(0.1)
        torch.optim.SGD(dense.parameters(), lr=0.1).step()
        assert_same_weight(layer, dense, 1e-11)


def test_weights_of_another_dtype() -> None:
    layer, _ = pair("z")
    x, y, w = torch.randn(3, 5, dtype=torch.float64), torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.rand(3, 2)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, y, w), layer(x, y, w.double()), rtol=0, atol=0)


def test_weights_of_classes_are_differentiated() -> None:
    layer, dense = pair("z")
    x, y, w = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 2, 2]), torch.rand(30, dtype=torch.float64)
    w.requires_grad_()
    got, expected = (torch.autograd.grad(model(x, y, class_weight=w), w)[0] for model in (layer, dense))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Dynamo's, of what it does not trace
def test_compiled_calls_are_those_of_the_layer() -> None:
    """Dynamo breaks its graph where it has to look at the targets; what runs is the same."""
    layer, _ = pair("z")
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, backend="eager")
    for step in range(10):
        x, y = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 2, step])
        losses = layer(x, y), compiled(x, y)
        assert torch.equal(*losses)
        for loss, one in zip(losses, (layer, other), strict=True):
            loss.backward()
            one.step(0.1)
    assert torch.equal(layer.weight(), other.weight())


def test_default_device_may_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "CHECK_EVERY", 1)
    monkeypatch.setattr(modules, "PROBE_EVERY", 1)
    layer, _ = pair()
    other = copy.deepcopy(layer)
    hidden, target = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 3, 3, 29])
    for at, device in ((layer, "cpu"), (other, "meta")):
        with torch.device(device):
            at(hidden, target).backward()
            at.step(0.1)
            assert at.drift() < 1e-12
            at.load_state_dict(at.state_dict())
    assert torch.equal(layer.weight(), other.weight())
    assert layer.steps == other.steps == 1


def test_a_layer_moved_between_backward_and_step() -> None:
    layer = FactoredOutput(4, 9)
    layer(torch.randn(3, 4), torch.tensor([0, 1, 1])).backward()
    layer.double()
    with pytest.raises(RuntimeError, match="dtype or device has changed since the backward pass"):
        layer.step(0.1)


def test_one_layer_twice() -> None:
    layer = FactoredOutput(4, 9)
    with pytest.raises(ValueError, match="`layers` must hold each layer once, got one twice"):
        FactoredSGD([layer, layer], lr=0.1)


def test_weight_of_an_ignored_target_does_not_matter() -> None:
    layer, _ = pair()
    x, y = torch.randn(2, 5, dtype=torch.float64), torch.tensor([[1, -100], [2, 3]])
    weights = (torch.tensor([[1.0, w], [0.5, 0.5]]) for w in (0.0, torch.nan))
    with torch.no_grad():
        assert torch.equal(*(layer(x, y, w) for w in weights))


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_no_targets_at_all(backend: str) -> None:
    """Of "mse" that is weight decay by the batch: the squared logits are the loss."""
    layer, dense = pair("mse")
    x, y, w = torch.randn(3, 5, dtype=torch.float64), torch.empty(3, 0, dtype=torch.int64), torch.empty(3, 0)
    for _ in range(4):
        torch.full_like(x, torch.nan)  # in the memory that comes next
    with fastloss.use_backend(backend):
        loss = layer(x, y, w)
        loss.backward()
        layer.step(0.01)
    expected = dense.linear(x).square().sum(1).mean()
    expected.backward()
    torch.optim.SGD(dense.parameters(), lr=0.01).step()
    torch.testing.assert_close(loss, expected)
    assert_same_weight(layer, dense, 1e-11)


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_backward_inside_autocast(backend: str) -> None:
    gradients = []
    for inside in (False, True):
        layer, _ = pair()
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float().requires_grad_()
        with fastloss.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=inside):
            layer.float()(x, torch.tensor([0, 3, 3, 29])).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_autocast_does_not_touch_the_layer() -> None:
    x, linear = torch.randn(4, 5), torch.nn.Linear(5, 30)
    found = []
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            layer = FactoredOutput.from_linear(linear)
            started = copy.deepcopy(layer.state_dict())
            layer.refresh()
            layer.stabilise()
            dense = layer.to_linear()
            told = [layer.logits(x), layer.topk(x, 3)[0], layer.weight(), layer.bias(), torch.tensor(layer.drift())]
        found.append([*told, dense.weight, *started.values(), *layer.state_dict().values()])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*found, strict=True))


@factors_only
def test_refresh_that_raises_leaves_the_state() -> None:
    layer, _ = pair()
    layer.u.zero_()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(torch.linalg.LinAlgError):
        layer.refresh()
    assert all(torch.equal(x, before[name]) for name, x in layer.state_dict().items())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_of_the_optimizer_step_their_own_layer(copier: Callable[[FactoredSGD], FactoredSGD]) -> None:
    optimizer = FactoredSGD(trained(), lr=0.1)
    copied = copier(optimizer)
    x, y = torch.randn(5, 4), torch.randint(20, (5,))
    for one in (optimizer, copied):
        one._layers[0](x, y).backward()
        one.step()
    assert torch.equal(optimizer._layers[0].weight(), copied._layers[0].weight())
    assert copied.param_groups[0]["params"][0] is copied._layers[0].mean


def test_backward_of_an_old_weight() -> None:
    layer = FactoredOutput(4, 9, accumulate=True)
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 1])
    old = layer(x, y)
    layer(x, y).backward()
    layer.step(0.1)
    with pytest.raises(RuntimeError, match="before the last change"):
        old.backward()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`loss` must be one of z, spherical, taylor, mse or a callable"):
        FactoredOutput(4, 9, loss="softmax")
    with pytest.raises(TypeError, match="`loss` must be a string or a callable, got int"):
        FactoredOutput(4, 9, loss=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`num_classes` must be at least 1, got 0"):
        FactoredOutput(4, 0)
    with pytest.raises(TypeError, match="`in_features` must be an int, got str"):
        FactoredOutput("a", 9)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`num_classes` must be an int, got float"):
        FactoredOutput(4, 2.5)  # type: ignore[arg-type]
    for option, value, text in (
        ("refresh_every", 1.5, "an int, got float"),
        ("ignore_index", 1.5, "an int, got float"),
        ("accumulate", "x", "True or False, got str"),
        ("bias", 1, "True or False, got int"),
    ):
        with pytest.raises(TypeError, match=f"`{option}` must be {text}"):
            FactoredOutput(4, 9, **{option: value})  # type: ignore[arg-type]
    for option, value in (("ignore_index", 2**63), ("a", 1e300), ("b", 1e300), ("eps", 1e300)):
        with pytest.raises(ValueError, match=f"`{option}` must be"):
            FactoredOutput(4, 9, **{option: value}, dtype=torch.float32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`eps` must be in the range of torch\.float32, 1\.18e-38 to"):
        FactoredOutput(4, 9, loss="spherical", eps=1e-300)
    with pytest.raises(ValueError, match="`eps` must be finite and greater than 0"):
        FactoredOutput(4, 9, loss="spherical", eps=0.0)
    with pytest.raises(TypeError, match="`dtype` must be float32 or float64"):
        FactoredOutput(4, 9, dtype=torch.float16)
    wrong = FactoredOutput(4, 9, loss=lambda a, q, s: a.sum())
    with pytest.raises(ValueError, match=r"`loss` must return a tensor of shape \(2,\), got \(\)"):
        wrong(torch.randn(2, 4), torch.tensor([0, 1]))
    layer = FactoredOutput(4, 9)
    with pytest.raises(TypeError, match="must hold FactoredOutput, got Linear"):
        FactoredSGD([torch.nn.Linear(2, 2)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="must hold FactoredOutput, got Linear"):
        FactoredSGD(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`layers` must be a FactoredOutput or several, got int"):
        FactoredSGD(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one FactoredOutput"):
        FactoredSGD([])
    with pytest.raises(ValueError, match=r"at least one FactoredOutput \(the layer, which has no parameters\)"):
        FactoredSGD(layer.parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`lr` must be finite and at least 0"):
        FactoredSGD(layer, lr=-1.0)
    with pytest.raises(ValueError, match="got 'momentum'"):
        FactoredSGD([{"layer": layer, "momentum": 0.9}])


@pytest.mark.parametrize("case", ["ignored", "class", "sample", "all", "learned", "several"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x if isinstance(x, str) else "callable")
def test_weights_and_ignored_targets(loss: Any, case: str) -> None:
    """One step follows the dense layer; what is in an ignored row does not matter."""
    layer, dense = pair(loss, eps=0.01 if loss == "spherical" else None, ignore_index=7)
    dense.ignore_index = 7
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 7, 3, 3, 29, 7])
    options: dict[str, Tensor] = {}
    if case in ("class", "all"):
        options["class_weight"] = torch.rand(30, dtype=torch.float64)
    if case in ("sample", "all", "learned"):
        options["sample_weight"] = torch.rand(6, dtype=torch.float64).requires_grad_(case == "learned")
    if case == "several":
        y = torch.stack([y, torch.tensor([7, 7, 2, 3, 28, 0])], 1)
        options["target_weight"] = torch.rand(6, 2, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    value, expected = layer(ours, y, **options), dense(theirs, y, **options)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    if case == "learned":
        (expected_g,) = torch.autograd.grad(expected, options["sample_weight"], retain_graph=True)
        value.backward()
        torch.testing.assert_close(options["sample_weight"].grad, expected_g, rtol=1e-9, atol=1e-12)
        dense.zero_grad()
    else:
        value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11)
    layer.step(0.01)
    torch.optim.SGD(dense.parameters(), lr=0.01).step()
    assert_same_weight(layer, dense, 1e-11)
    if case != "several":
        bad = x.clone()
        bad[1] = torch.nan
        bad.requires_grad_()
        fresh, _ = pair(loss, eps=0.01 if loss == "spherical" else None, ignore_index=7)
        fresh(bad, y, **options).backward()
        assert bad.grad is not None
        assert bad.grad.isfinite().all()
        fresh.step(0.01)
        torch.testing.assert_close(fresh.weight(), layer.weight(), rtol=1e-12, atol=1e-13)
        nothing = layer(x, torch.full_like(y, 7), **options)
        assert nothing.isnan()


@pytest.mark.parametrize("loss", ["z", "spherical", "taylor", "mse"])
def test_closed_forms_are_the_derivatives(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = pair(loss, a=0.7, b=0.3, eps=0.01)
    layer.accumulate = True
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 7, 3, 3, 29, 7])
    values, gradients = [], []
    for closed in (True, False):
        monkeypatch.setattr(layer, "_has_closed_form", lambda targets, closed=closed: closed)
        leaf = x.clone().requires_grad_()
        values.append(layer(leaf, y))
        (2 * values[-1]).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(values[0], values[1], rtol=1e-13, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-13)
    for name in ("g_t", "g_v", "g_mean"):
        one, other = (getattr(part, name) for part in layer._pending)
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("classes", [10, 500])
@pytest.mark.parametrize("loss", ["mse", lambda t, q, s: (t - 1) ** 2])
def test_step_is_that_of_the_forward_pass(loss: Any, classes: int, bias: bool) -> None:
    """Whatever is written into its arguments after the backward pass: a batch buffer is used again."""
    torch.manual_seed(0)
    layer = fastloss.FactoredOutput(8, classes, bias=bias, loss=loss, dtype=torch.float64)
    other = copy.deepcopy(layer)
    hidden, target = torch.randn(4, 8, dtype=torch.float64, requires_grad=True), torch.arange(4)
    for one in (layer, other):
        one(hidden, target).backward()
    layer.step(0.1)
    with torch.no_grad():
        hidden.mul_(3)
    target.fill_(10**11)
    other.step(0.1)
    assert torch.equal(layer.weight(), other.weight())


@pytest.mark.parametrize("classes", [10, 500])
@pytest.mark.parametrize("loss", ["z", share_of_squares])
def test_no_second_derivative(loss: Any, classes: int) -> None:
    """A penalty on the gradient would be lost silently."""
    layer = fastloss.FactoredOutput(8, classes, loss=loss, dtype=torch.float64)
    hidden = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    value = layer(hidden, torch.arange(4))
    (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative .* fastloss\.reference\.spherical"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("classes", [10, 500])
def test_ignored_rows_do_not_reach_a_callable_loss(classes: int) -> None:
    """They have no logits, where a cosine has no derivative."""
    torch.manual_seed(0)
    layer = fastloss.FactoredOutput(8, classes, loss=lambda t, q, s: -t / q.sqrt(), dtype=torch.float64)
    other = copy.deepcopy(layer)
    hidden, target = torch.randn(4, 8, dtype=torch.float64), torch.tensor([3, -100, 4, 5])
    kept = [0, 2, 3]
    losses = [layer(hidden, target), other(hidden[kept], target[kept])]
    for one, loss in zip((layer, other), losses, strict=True):
        loss.backward()
        one.step(0.1)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(layer.weight(), other.weight())
