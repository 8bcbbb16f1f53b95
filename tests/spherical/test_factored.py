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
        rows, actual = factored.gradient(state, rows, product, g_t, g_v, g_mean)
        torch.testing.assert_close(actual, g_hidden, rtol=1e-8, atol=1e-11)
        grads = factored.Gradients(hidden, target[:, None], g_t, g_v, g_mean, rows, product)
        factored.commit(factored.plan(state, grads, lr, decay, factored.Scratch()), 1e6)
        with torch.no_grad():
            dense -= lr * (g_dense + decay * dense)
    error = (factored.to_dense(state) - dense).norm() / dense.norm()
    assert error < 1e-10, error


