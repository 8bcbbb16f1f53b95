"""Bad input is refused before any work, by a message that says where, what was expected and what came."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

import fastloss
from tests.spherical.problems import LINEAR, LOSSES

LOGITS: dict[str, Any] = {"logits": torch.randn(4, 5), "target": torch.tensor([0, 1, 2, -100])}
HIDDEN: dict[str, Any] = {
    "hidden": torch.randn(4, 3), "weight": torch.randn(5, 3), "target": torch.tensor([0, 1, 2, -100]),
}  # fmt: skip

SHARED = [
    ({"target": [0, 1]}, TypeError, "`target` must be an integer tensor of shape (4,), got list"),
    ({"target": torch.zeros(4)}, TypeError, "`target` must be an integer tensor, got torch.float32"),
    ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, "`target` must have shape (4,), got (3,)"),
    (
        {"target": torch.tensor([0, 5, 0, 0])}, ValueError,
        "`target` must hold classes 0 to 4, or `ignore_index`, got 5",
    ),
    (
        {"target": torch.tensor([0, -1, 0, 0])}, ValueError,
        "`target` must hold classes 0 to 4, or `ignore_index`, got -1",
    ),
    (
        {"target": torch.tensor([0, -100, 0, 0]), "ignore_index": -1}, ValueError,
        "`target` must hold classes 0 to 4, or `ignore_index`, got -100",
    ),
    (
        {"target": torch.tensor([0, -(2**63), 0, 0])}, ValueError,
        "`target` must hold classes 0 to 4, or `ignore_index`, got -9223372036854775808",
    ),
    ({"ignore_index": 1.0}, TypeError, "`ignore_index` must be an int, got float"),
    (
        {"ignore_index": 2**63}, ValueError,
        "`ignore_index` must be at most 9223372036854775807, got 9223372036854775808",
    ),
    (
        {"ignore_index": -(10**5000)}, ValueError,
        "`ignore_index` must be at least -9223372036854775808, got an integer of 16610 bits",
    ),
    ({"reduction": "max"}, ValueError, "`reduction` must be 'none', 'sum' or 'mean', got 'max'"),
    (
        {"class_weight": torch.ones(4)}, ValueError,
        "`class_weight` must have size 5 in dimension 0 (one a class), got shape (4,)",
    ),
    (
        {"sample_weight": torch.ones(5)}, ValueError,
        "`sample_weight` must have size 4 in dimension 0 (one an example), got shape (5,)",
    ),
    ({"class_weight": torch.ones(1, 5)}, ValueError, "`class_weight` must have shape (C,), got (1, 5)"),
    (
        {"sample_weight": torch.ones(4, dtype=torch.int64)}, TypeError,
        "`sample_weight` must be float64, float32, bfloat16 or float16, got torch.int64",
    ),
]  # fmt: skip
OF_LOGITS = [
    ({"logits": None}, TypeError, "`logits` must be a tensor of shape (B, C), got NoneType"),
    ({"logits": torch.randn(4)}, ValueError, "`logits` must have shape (B, C), got (4,)"),
    ({"logits": torch.ones(4, 5, dtype=torch.int32)}, TypeError, "`logits` must be float64, float32, bfloat16"),
    ({"logits": torch.randn(4, 0)}, ValueError, "C, the number of classes, must be at least 1, got 0"),
    (
        {"logits": torch.randn(4, 5, requires_grad=True), "gradient_overwrites_logits": True}, ValueError,
        "`logits` must not be a leaf that requires grad with `gradient_overwrites_logits`, got a leaf",
    ),
    (
        {"logits": torch.randn(4, 1).expand(4, 5), "gradient_overwrites_logits": True}, ValueError,
        "`logits` must have memory of their own with `gradient_overwrites_logits`, got an expanded tensor",
    ),
    (
        {"gradient_overwrites_logits": 1}, TypeError,
        "`gradient_overwrites_logits` must be True or False, got int",
    ),
    ({"target": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "`target` must be on cpu as `logits`"),
]  # fmt: skip
OF_HIDDEN = [
    ({"hidden": torch.randn(4)}, ValueError, "`hidden` must have shape (B, D), got (4,)"),
    (
        {"weight": torch.randn(5, 4)}, ValueError,
        "`weight` must have size 3 in dimension 1 (the width of `hidden`), got shape (5, 4)",
    ),
    ({"weight": torch.randn(0, 3)}, ValueError, "C, the number of classes, must be at least 1, got 0"),
    ({"bias": torch.randn(4)}, ValueError, "`bias` must have size 5 in dimension 0 (one a row of `weight`)"),
    ({"bias": torch.ones(5, 1)}, ValueError, "`bias` must have shape (C,), got (5, 1)"),
    ({"bias": 1.0}, TypeError, "`bias` must be a tensor of shape (C,), got float"),
    ({"weight": torch.randn(5, 3, device="meta")}, ValueError, "`weight` must be on cpu as `hidden`, got meta"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "text"), SHARED + OF_LOGITS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("function", LOSSES)
def test_on_logits(function: str, change: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=re.escape(f"{function}: {text}")):
        getattr(fastloss, function)(**{**LOGITS, **change})


@pytest.mark.parametrize(("change", "kind", "text"), SHARED + OF_HIDDEN, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("function", LINEAR)
def test_on_hidden_states(function: str, change: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=re.escape(f"{function}: {text}")):
        getattr(fastloss, function)(**{**HIDDEN, **change})


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"a": 0.0}, ValueError, "`a` must be finite and greater than 0, got 0.0"),
        ({"a": torch.ones(())}, TypeError, "`a` must be a float, got Tensor"),
        ({"b": float("inf")}, ValueError, "`b` must be finite, got inf"),
        ({"eps": -1.0}, ValueError, "`eps` must be finite and at least 0, got -1.0"),
        ({"eps": True}, TypeError, "`eps` must be a float, got bool"),
        ({"a": 10**400}, ValueError, "`a` must be finite and greater than 0, got an integer of 1329 bits"),
        ({"a": 1e300}, ValueError, "`a` must be in the range of torch.float32, 1.18e-38 to 3.4e+38, got 1e+300"),
        ({"a": 1e-300}, ValueError, "`a` must be in the range of torch.float32, 1.18e-38 to 3.4e+38, got 1e-300"),
        ({"b": -1e300}, ValueError, "`b` must be in the range of torch.float32, -3.4e+38 to 3.4e+38, got -1e+300"),
        ({"eps": 1e300}, ValueError, "`eps` must be in the range of torch.float32, -3.4e+38 to 3.4e+38, got 1e+300"),
    ],
)
def test_numbers_of_the_z_loss(change: dict[str, Any], kind: type[Exception], text: str) -> None:
    for function, arguments in (("z_loss", LOGITS), ("linear_z_loss", HIDDEN)):
        with pytest.raises(kind, match=re.escape(f"{function}: {text}")):
            getattr(fastloss, function)(**{**arguments, **change})


def test_epsilon_of_the_spherical_softmax() -> None:
    for function, arguments in (("spherical_softmax_loss", LOGITS), ("linear_spherical_softmax_loss", HIDDEN)):
        with pytest.raises(ValueError, match=f"{function}: `eps` must be finite and greater than 0, got 0"):
            getattr(fastloss, function)(**arguments, eps=0)
        for eps in (1e-300, 1e300):
            with pytest.raises(ValueError, match=rf"{function}: `eps` must be in the range of torch\.float32"):
                getattr(fastloss, function)(**arguments, eps=eps)


def test_numbers_in_the_range_of_float64() -> None:
    target = LOGITS["target"]
    logits, hidden, weight = (torch.randn(4, n, dtype=torch.float64) for n in (5, 3, 3))
    weight = weight.float()  # the wider dtype counts
    for eps in (1e-300, 1e300):
        assert fastloss.spherical_softmax_loss(logits, target, eps=eps).isfinite()
        assert fastloss.linear_spherical_softmax_loss(hidden, weight, target, eps=eps).isfinite()
    for a in (1e-300, 1e300):
        assert fastloss.z_loss(logits, target, a).isfinite()
        assert fastloss.linear_z_loss(hidden, weight, target, a=a).isfinite()


def test_numbers_of_numpy() -> None:
    number = np.float32(0.5)
    for arguments, name in ((LOGITS, "z_loss"), (HIDDEN, "linear_z_loss")):
        got = getattr(fastloss, name)(**arguments, a=np.int64(2), b=number, eps=np.float16(0.5))
        assert torch.equal(got, getattr(fastloss, name)(**arguments, a=2, b=0.5, eps=0.5))
        with pytest.raises(TypeError, match="`b` must be a float, got bool"):
            getattr(fastloss, name)(**arguments, b=np.bool_(True))
    weights = []
    for value in (number, 0.5):
        torch.manual_seed(0)
        layer = fastloss.FactoredOutput(5, 9, a=value, b=value, eps=value, max_scale=2 / value)
        optimizer = fastloss.FactoredSGD(layer, lr=value, weight_decay=value)
        for by_layer in (False, True):
            layer(torch.eye(4, 5), torch.arange(4)).backward()
            if by_layer:
                layer.step(value, value)
            else:
                optimizer.step()
        weights.append(layer.weight())
    assert torch.equal(*weights)


def test_overwriting_is_refused_under_function_transforms() -> None:
    def loss(logits: torch.Tensor) -> torch.Tensor:
        return fastloss.z_loss(logits, LOGITS["target"], gradient_overwrites_logits=True)

    with pytest.raises(RuntimeError, match=r"z_loss: `gradient_overwrites_logits` must be False under torch\.func"):
        torch.func.grad(loss)(LOGITS["logits"])


def test_a_bad_target_is_found_in_compiled_code_too() -> None:
    compiled = torch.compile(fastloss.z_loss, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="z_loss: `target` must hold classes 0 to 4"):
        compiled(LOGITS["logits"], torch.tensor([0, 9, 0, 0]))


def test_a_view_of_a_leaf_is_not_overwritten() -> None:
    leaf = torch.randn(4, 5, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(ValueError, match="got a view of a leaf"):
        fastloss.z_loss(leaf.view(4, 5), torch.arange(4), gradient_overwrites_logits=True).backward()
    assert torch.equal(leaf.detach(), before)


def test_classes_that_are_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"`classes` must be an integer tensor of shape \(N,\), got list"):
        fastloss.FactoredOutput(8, 500).logits(torch.randn(2, 8), [1])  # type: ignore[arg-type]
