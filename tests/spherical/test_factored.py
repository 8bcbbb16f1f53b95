"""The factored weight against dense SGD by autograd, with repeated classes, weight decay and bias."""

import torch
from torch.nn.functional import softplus

from fastloss.spherical import factored


def z_loss(t, v, classes):
    return softplus(1.0 - t / (v / classes).sqrt()).mean()


def test_step_matches_dense_sgd() -> None:
    gen = torch.Generator().manual_seed(0)
    classes, width, batch, lr, decay = 40, 7, 6, 0.1, 1e-3
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

        t, v, mean = (s.requires_grad_() for s in factored.statistics(state, hidden, target))
        loss = z_loss(t, v, classes)
        g_t, g_v = torch.autograd.grad(loss, (t, v))
        g_mean = torch.zeros_like(mean)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        actual = factored.input_gradient(state, hidden, target, g_t, g_v, g_mean)
        torch.testing.assert_close(actual, g_hidden, rtol=1e-8, atol=1e-11)
        state = factored.step(state, hidden, target, g_t, g_v, g_mean, lr, decay)
        with torch.no_grad():
            dense -= lr * (g_dense + decay * dense)
    error = (factored.to_dense(state) - dense).norm() / dense.norm()
    assert error < 1e-10, error
