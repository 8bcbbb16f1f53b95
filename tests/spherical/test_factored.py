"""The factored weight against dense SGD by autograd, with repeated classes, weight decay and bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastloss import use_backend
from fastloss._backends import implementation, native_core
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
        rows, actual = factored.gradient(state.mean, rows, product, g_t, g_v, g_mean)
        torch.testing.assert_close(actual, g_hidden, rtol=1e-8, atol=1e-11)
        grads = factored.Gradients(hidden, target[:, None], g_t, g_v, g_mean, rows, product)
        factored.commit(factored.plan(state, grads, lr, decay, 1e6, factored.Scratch()))
        with torch.no_grad():
            dense -= lr * (g_dense + decay * dense)
    error = (factored.to_dense(state) - dense).norm() / dense.norm()
    assert error < 1e-12, error


def random_state(classes: int = 50, width: int = 6, seed: int = 2) -> factored.State:
    gen = torch.Generator().manual_seed(seed)
    return factored.from_dense(torch.randn(classes, width, generator=gen, dtype=torch.float64))


def set_u(state: factored.State, s: list[float]) -> None:
    """U with the singular values s, and all that depends on it."""
    gen = torch.Generator().manual_seed(3)
    left, _, right = torch.linalg.svd(torch.randn(len(s), len(s), generator=gen, dtype=torch.float64))
    state.u.copy_(left @ torch.diag(torch.tensor(s, dtype=torch.float64)) @ right)
    factored.refresh(state)


@pytest.mark.parametrize(("s", "scale"), [([3.0, 2, 1, 1, 0.5, 0.4], 3.0), ([3.0, 2, 1, 1, 0.5, 0.1], 10.0)])
def test_watch_sees_scale_and_error(s: list[float], scale: float) -> None:
    state = random_state()
    set_u(state, s)
    seen, error = factored.watch(state)
    assert 0.98 * scale <= seen <= scale * (1 + 1e-12)
    assert error < 1e-14
    state.inverse += 1e-3 * torch.eye(6, dtype=torch.float64)
    assert 1e-4 < factored.watch(state)[1] < 1e-2
    for wrong in (1e-3, 5.0):  # a Newton step squares a small error; a large one is past it
        state.inverse.copy_(torch.linalg.inv(state.u) + wrong * torch.eye(6, dtype=torch.float64))
        before = factored.watch(state)[1]
        factored.invert(state, before)
        assert factored.watch(state)[1] < max(before**2 * 10, 1e-13) if wrong < 1 else 1e-13


def test_drift_sees_gram_and_means() -> None:
    state = random_state()
    set_u(state, [3.0, 2, 1, 1, 0.5, 0.4])
    assert factored.drift(state) < 1e-14
    for buffer in (state.gram, state.delta):
        exact = buffer.clone()
        buffer += 1e-3 * state.gram.diagonal().mean().sqrt()
        weight = factored.to_dense(state)
        assert 1e-5 < factored.drift(state) < 1.0
        factored.refresh(state)
        assert factored.drift(state) < 1e-14
        torch.testing.assert_close(factored.to_dense(state), weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(buffer, exact, rtol=1e-12, atol=1e-12)
    assert factored.drift(factored.from_dense(torch.zeros(4, 2))) == 0


def test_stabilise_and_refresh_keep_the_weight() -> None:
    state = random_state()
    gen = torch.Generator().manual_seed(2)
    left, _, right = torch.linalg.svd(torch.randn(6, 6, generator=gen, dtype=torch.float64))
    state.u.copy_(left @ torch.diag(torch.tensor([1e3, 5.0, 1.0, 0.3, 1e-3, 0.0], dtype=torch.float64)) @ right)
    before = factored.to_dense(state)
    assert factored.stabilise(state, 10.0) == 3
    s = torch.linalg.svdvals(state.u)
    torch.testing.assert_close(s, torch.tensor([5.0, 1.0, 1.0, 1.0, 1.0, 0.3], dtype=torch.float64))
    torch.testing.assert_close(factored.to_dense(state), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.inverse @ state.u, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-13)
    factored.refresh(state)
    torch.testing.assert_close(factored.to_dense(state), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        state.gram, (before - before.mean(0)).T @ (before - before.mean(0)), rtol=1e-9, atol=1e-8
    )


KERNEL_SIZES = [(1, 1, 1), (5, 1, 7), (33, 3, 40), (128, 1, 130), (200, 2, 17)]


@pytest.mark.parametrize("isa", native_core().supported_isas().split(","))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "targets", "width"), KERNEL_SIZES)
def test_kernels_agree_with_their_twins(rows: int, targets: int, width: int, dtype: torch.dtype, isa: str) -> None:
    """Both backends, on the same numbers, within eight times the rounding of a sum of so many terms."""
    gen = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)

    entries, product, hidden, mean = (
        normal(rows, targets, width),
        normal(rows, width),
        normal(rows, width),
        normal(width),
    )
    g_t, g_v, g_mean, v = normal(rows, targets), normal(rows), normal(rows), normal(9, width)
    target = torch.randint(9, (rows, targets), generator=gen)
    square, gram = normal(width, width), normal(width, width)
    gram = gram + gram.T
    core, results = native_core(), []
    before = core.isa()
    try:
        core.choose_isa(isa)
        for backend in ("native", "portable"):
            with use_backend(backend):
                kernels = implementation("spherical", torch.device("cpu"))
                out = [torch.empty_like(hidden) for _ in range(3)]
                kernels.factored_factors(hidden, product, entries[:, 0].contiguous(), g_v, 0.3, 0.9, tuple(out))
                pairs = hidden @ hidden.T
                kernels.factored_pairs(pairs, target, g_t, g_v, 0.3, 9)
                inverse, exists = kernels.factored_inverse(hidden @ hidden.T / width, g_v.abs(), -0.3, 0.9)
                assert exists
                written = v.clone()
                kernels.factored_scatter(written, target, g_t, product, 0.3)
                updated = gram.clone()
                kernels.symmetric_update(updated, square, 0.9)
                assert torch.equal(updated, updated.T)
                growth = torch.tensor(kernels.factored_growth(product, hidden), dtype=dtype)
                statistics = kernels.factored_statistics(entries, product, hidden, mean)
                gradients = kernels.factored_gradient(entries, product, mean, g_t, g_v, g_mean)
                results.append([*statistics, *gradients, *out, pairs, inverse, written, updated, growth])
    finally:
        core.choose_isa(before)
    for one, other in zip(*results, strict=True):
        bound = 8 * max(rows * targets, width) ** 0.5 * torch.finfo(dtype).eps * max(1.0, float(other.abs().max()))
        assert float((one - other).abs().max()) <= bound


def test_inverse_with_pivots_and_without() -> None:
    for backend in ("native", "portable"):
        with use_backend(backend):
            kernels = implementation("spherical", torch.device("cpu"))
            turn = torch.tensor([[0.0, 0, 2], [1, 0, 0], [0, 4, 0]], dtype=torch.float64)  # no pivot on the diagonal
            inverse, exists = kernels.factored_inverse(
                turn.clone(), torch.full((3,), -0.5, dtype=torch.float64), 1.0, 0.0
            )
            assert exists
            torch.testing.assert_close(inverse, torch.linalg.inv(turn))
            singular = torch.ones(2, 2, dtype=torch.float64)
            assert not kernels.factored_inverse(singular, torch.full((2,), -0.5, dtype=torch.float64), 1.0, 0.0)[1]
            growth = kernels.factored_growth(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 2))
            assert not growth <= 1e30
            assert kernels.factored_growth(torch.ones(1, 2), torch.zeros(1, 2)) == 0
            square = kernels.factored_statistics(
                torch.ones(1, 1, 2), -torch.ones(1, 2), torch.ones(1, 2), torch.ones(2)
            )[1]
            assert float(square) == 0  # rounding must not make a sum of squares negative
