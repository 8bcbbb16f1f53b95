"""The factored weight against dense SGD by autograd, with repeated classes, weight decay and bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastloss.spherical import factored


def z_loss(t: Tensor, v: Tensor, classes: int) -> Tensor:
    return softplus(1.0 - t / (v / classes).sqrt()).mean()


@pytest.mark.parametrize("batch", [6, 12], ids=["low rank", "full rank"])
def test_step_matches_dense_sgd(batch: int) -> None:
    gen = torch.Generator().manual_seed(0)
    classes, width, lr, decay = 40, 7, 0.1, 1e-3
    dense = torch.randn(classes, width + 1, generator=gen, dtype=torch.float64, requires_grad=True)
    state = factored.from_dense(dense.detach().clone())
    for _ in range(1000):
        x = torch.randn(batch, width, generator=gen, dtype=torch.float64)
        hidden = torch.cat([x, x.new_ones(batch, 1)], 1)  # the bias is the last column
        target = torch.randint(5, (batch,), generator=gen)
        leaf = hidden.clone().requires_grad_()
        logits = leaf @ dense.T
        centred = logits - logits.mean(1, keepdim=True)
        expected = z_loss(centred.gather(1, target[:, None])[:, 0], centred.square().sum(1), classes)
        g_dense, g_hidden = torch.autograd.grad(expected, (dense, leaf))

        t, v, mean, rows, product = factored.statistics(state, hidden, target[:, None])
        t.requires_grad_()
        v.requires_grad_()
        loss = z_loss(t[:, 0], v, classes)
        g_t, g_v = torch.autograd.grad(loss, (t, v))
        g_mean = torch.zeros_like(mean)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        actual = factored.input_gradient(state, rows, product, g_t, g_v, g_mean)
        torch.testing.assert_close(actual, g_hidden, rtol=1e-8, atol=1e-11)
        grads = factored.Gradients(hidden, torch.arange(batch), target, g_t[:, 0], g_v, g_mean)
        state, _ = factored.step(state, grads, lr, decay, 1e6)
        with torch.no_grad():
            dense -= lr * (g_dense + decay * dense)
    error = (factored.to_dense(state) - dense).norm() / dense.norm()
    assert error < 1e-10, error


def test_scale_bound_is_a_bound() -> None:
    gen = torch.Generator().manual_seed(1)
    for _ in range(5):
        u = torch.randn(9, 9, generator=gen, dtype=torch.float64)
        s = torch.linalg.svdvals(u)
        true = max(float(s.max()), 1 / float(s.min()))
        assert true <= factored.scale_bound(u) * (1 + 1e-9) <= true * 9 ** (1 / 16) * (1 + 1e-8)
    assert factored.scale_bound(torch.zeros(3, 3)) == float("inf")


def test_stabilise_and_refresh_keep_the_weight() -> None:
    gen = torch.Generator().manual_seed(2)
    state = factored.from_dense(torch.randn(50, 6, generator=gen, dtype=torch.float64))
    left, _, right = torch.linalg.svd(torch.randn(6, 6, generator=gen, dtype=torch.float64))
    state.u = left @ torch.diag(torch.tensor([1e3, 5.0, 1.0, 0.3, 1e-3, 0.0], dtype=torch.float64)) @ right
    state = factored.refresh(state)
    before = factored.to_dense(state)
    state.u, moved = factored.stabilise(state.v, state.u, 10.0)
    assert moved == 3
    s = torch.linalg.svdvals(state.u)
    torch.testing.assert_close(s, torch.tensor([5.0, 1.0, 1.0, 1.0, 1.0, 0.3], dtype=torch.float64))
    torch.testing.assert_close(factored.to_dense(state), before, rtol=1e-12, atol=1e-12)
    gram = factored.refresh(state).gram
    torch.testing.assert_close(factored.to_dense(factored.refresh(state)), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram, (before - before.mean(0)).T @ (before - before.mean(0)), rtol=1e-9, atol=1e-8)
