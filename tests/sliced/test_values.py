"""Values and gradients against the float64 reference, POT, and hand-made cases."""

from __future__ import annotations

from typing import Any

import ot
import pytest
import torch
from torch import Tensor

import fastloss
from fastloss._backends import native_core
from fastloss.sliced import native, ops
from tests import support
from tests.support import assert_as_accurate_as_torch

reference = fastloss.reference
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def assert_equal_to_rounding(actual: Tensor, expected: Tensor, **options: float) -> None:
    support.assert_equal_to_rounding(actual.detach(), expected.detach(), **options)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(n: int, m: int, d: int = 3, slices: int = 9, weighted: bool = False) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves (x, y, projections[, a, b]) in float64, and the keyword arguments that name the last ones."""
    g = generator()
    leaves = [torch.randn(n, d, generator=g, dtype=torch.float64), torch.randn(m, d, generator=g, dtype=torch.float64)]
    leaves.append(torch.nn.functional.normalize(torch.randn(slices, d, generator=g, dtype=torch.float64), dim=1))
    names = ["projections"]
    if weighted:
        leaves += [torch.randn(k, generator=g, dtype=torch.float64).softmax(0) for k in (n, m)]
        names += ["x_weights", "y_weights"]
    return leaves, {"names": names}


def value_and_gradients(function: Any, leaves: list[Tensor], names: list[str], **options: Any) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    value = function(leaves[0], leaves[1], **dict(zip(names, leaves[2:], strict=True)), **options)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("p", [1, 2, 1.5, 3])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (40, 40), (700, 700), (90, 61), (1, 7)])
def test_sliced_wasserstein_is_the_reference(backend: str, n: int, m: int, p: float, weighted: bool) -> None:
    leaves, names = problem(n, m, weighted=weighted)
    got = value_and_gradients(fastloss.sliced_wasserstein, leaves, **names, p=p, root=True)
    want = value_and_gradients(reference.sliced_wasserstein, leaves, **names, p=p, root=True)
    for g, w in zip(got, want, strict=True):
        assert_equal_to_rounding(g, w, terms=8 * (n + m), magnitude=float(want[0]) ** p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(300, 300), (300, 217)])
def test_every_dtype_is_as_accurate_as_torch(backend: str, n: int, m: int, dtype: torch.dtype) -> None:
    leaves, names = problem(n, m)
    inputs = [t.to(dtype) for t in leaves]
    got = value_and_gradients(fastloss.sliced_wasserstein, inputs, **names)
    truth = value_and_gradients(reference.sliced_wasserstein, [t.double() for t in inputs], **names)
    wide = [t.to(torch.promote_types(dtype, torch.float32)) for t in inputs]
    plain = value_and_gradients(reference.sliced_wasserstein, wide, **names)
    for k, (g, t, b) in enumerate(zip(got, truth, plain, strict=True)):
        # Pairs whose projections tie within rounding may swap: each moves a gradient by the difference it ties to.
        assert_as_accurate_as_torch(g, t, b.to(g.dtype), magnitude=float(truth[0]), name=f"output {k}")


@pytest.mark.parametrize("loss", ["energy_sliced_wasserstein", "sliced_gromov_wasserstein", "max_sliced_wasserstein"])
def test_variants_are_the_reference(backend: str, loss: str) -> None:
    leaves, names = problem(60, 60)
    if loss == "max_sliced_wasserstein":
        leaves, names, fixed = leaves[:2], {"names": []}, {"projections": leaves[2], "n_steps": 12}
    else:
        fixed = {}
    got = value_and_gradients(getattr(fastloss, loss), leaves, **names, **fixed)
    want = value_and_gradients(getattr(reference, loss), leaves, **names, **fixed)
    for g, w in zip(got, want, strict=True):
        assert_equal_to_rounding(g, w, terms=1000, magnitude=float(want[0]))


@pytest.mark.parametrize("energy", ["exp", "identity", "square"])
@pytest.mark.parametrize("detach", [False, True])
def test_energies(backend: str, energy: str, detach: bool) -> None:
    leaves, names = problem(50, 41, weighted=True)
    options = {"energy": energy, "detach_weights": detach}
    got = value_and_gradients(fastloss.energy_sliced_wasserstein, leaves, **names, **options)
    want = value_and_gradients(reference.energy_sliced_wasserstein, leaves, **names, **options)
    for g, w in zip(got, want, strict=True):
        assert_equal_to_rounding(g, w, terms=1000, magnitude=float(want[0]))


@pytest.mark.parametrize("p", [1, 2, 1.5])
@pytest.mark.parametrize("m", [None, 20, 15])
def test_matrix_is_all_pairs(backend: str, p: float, m: int | None) -> None:
    xs = torch.randn(3, 20, 4, dtype=torch.float64, generator=generator(), requires_grad=True)
    ys = None if m is None else torch.randn(2, m, 4, dtype=torch.float64, generator=generator(1))
    theta = torch.randn(5, 4, dtype=torch.float64, generator=generator(2))
    got = fastloss.sliced_wasserstein_matrix(xs, ys, p=p, projections=theta, root=True)
    want = reference.sliced_wasserstein_matrix(xs, ys, p=p, projections=theta, root=True)
    assert_equal_to_rounding(got.detach(), want.detach(), terms=200)
    weight = torch.linspace(0.5, 1.5, got.numel(), dtype=torch.float64).reshape(got.shape)
    (g,) = torch.autograd.grad((got * weight).sum(), xs)
    (w,) = torch.autograd.grad((want * weight).sum(), xs)
    assert_equal_to_rounding(g, w, terms=200)


def test_max_sliced_finds_the_direction_of_a_shift() -> None:
    x = torch.randn(200, 5, generator=generator(), dtype=torch.float64)
    shift = torch.tensor([3.0, -1.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    found = fastloss.max_sliced_wasserstein(x, x + shift, generator=generator(1), n_steps=80)
    assert found <= shift.square().sum() * (1 + 1e-12)
    assert found >= shift.square().sum() * (1 - 1e-3)


def test_soft_correspondence_is_the_dense_softmax() -> None:
    leaves = [torch.randn(2, k, 6, dtype=torch.float64, generator=generator(k), requires_grad=True) for k in (30, 20)]
    tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (fastloss.soft_correspondence, reference.soft_correspondence):
        out = function(*leaves, tau)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), [*leaves, tau])])
    for g, w in zip(*results, strict=True):
        assert_equal_to_rounding(g, w, terms=2000)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("name", ["sliced_wasserstein_distance", "max_sliced_wasserstein_distance"])
def test_pot_gives_the_same_numbers_for_the_same_seed(name: str, p: int, weighted: bool) -> None:
    leaves, _ = problem(120, 77, weighted=weighted)
    x, y = (t.requires_grad_() for t in leaves[:2])
    for keyword in ({"seed": 7}, {"projections": leaves[2].T}):
        got, log = getattr(fastloss, name)(x, y, *leaves[3:], p=p, log=True, **keyword)
        want, expected = getattr(ot, name)(x, y, *leaves[3:], p=p, log=True, **keyword)
        assert_equal_to_rounding(got, want, terms=500)
        for key in ("projections", "projected_emds"):
            assert_equal_to_rounding(log[key], expected[key], terms=500)
        plain = getattr(fastloss, name)(x, y, *leaves[3:], p=p, **keyword)
        assert_equal_to_rounding(plain, want, terms=500)
        for value in (got, plain):
            for g, w in zip(
                torch.autograd.grad(value, (x, y), retain_graph=True),
                torch.autograd.grad(want, (x, y), retain_graph=True),
                strict=True,
            ):
                assert_equal_to_rounding(g, w, terms=2000)


def test_pot_drop_ins_are_their_references() -> None:
    leaves, _ = problem(20, 15, weighted=True)
    for name in ("sliced_wasserstein_distance", "max_sliced_wasserstein_distance"):
        got = getattr(fastloss, name)(*leaves[:2], *leaves[3:], seed=3, scaler=lambda t: 2 * t)
        want = getattr(reference, name)(*leaves[:2], *leaves[3:], seed=3, scaler=lambda t: 2 * t)
        assert_equal_to_rounding(got, want, terms=200)


@pytest.mark.parametrize("sampler", ["random", "orthogonal", "qmc"])
def test_samplers(sampler: str) -> None:
    leaves, _ = problem(30, 30)
    options = {"n_projections": 7, "sampler": sampler}
    got = fastloss.sliced_wasserstein(*leaves[:2], **options, generator=generator(5))
    want = reference.sliced_wasserstein(*leaves[:2], **options, generator=generator(5))
    assert_equal_to_rounding(got, want, terms=100)
    # The mean over the sphere of the squared shift is |shift|^2 / d, exactly so for whole orthogonal bases.
    shifted = fastloss.sliced_wasserstein(leaves[0], leaves[0] + 1, n_projections=3072, sampler=sampler)
    tolerance = {"random": 0.1, "orthogonal": 1e-12, "qmc": 0.02}[sampler]  # 5 standard errors are 0.08
    assert abs(float(shifted) - 1) < tolerance


def test_streaming_is_the_mean_of_its_blocks(backend: str) -> None:
    leaves, _ = problem(50, 40, weighted=True)
    x, y, _, a, b = (t.requires_grad_() for t in leaves)
    options = {"x_weights": a, "y_weights": b, "n_projections": 300}
    got = fastloss.sliced_wasserstein(x, y, **options, streaming=True, generator=generator(1))
    g = generator(1)
    blocks = [
        torch.nn.functional.normalize(torch.randn(k, 3, dtype=torch.float64, generator=g), dim=1) for k in (256, 44)
    ]
    want = reference.sliced_wasserstein(x, y, x_weights=a, y_weights=b, projections=torch.cat(blocks))
    assert_equal_to_rounding(got, want, terms=500)
    for one, other in zip(torch.autograd.grad(got, (x, y, a, b)), torch.autograd.grad(want, (x, y, a, b)), strict=True):
        assert_equal_to_rounding(one, other, terms=500)


def test_batches_broadcast_and_reduce(backend: str) -> None:
    x = torch.randn(2, 3, 20, 4, dtype=torch.float64, generator=generator())
    y = torch.randn(15, 4, dtype=torch.float64, generator=generator(1))
    a = torch.rand(3, 20, dtype=torch.float64, generator=generator(2)).softmax(1)
    theta = torch.randn(6, 4, dtype=torch.float64, generator=generator(3))
    got = fastloss.sliced_wasserstein(x, y, x_weights=a, projections=theta, reduction="none")
    assert got.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            want = reference.sliced_wasserstein(x[i, j], y, x_weights=a[j], projections=theta)
            assert_equal_to_rounding(got[i, j], want, terms=100)
    total = fastloss.sliced_wasserstein(x, y, x_weights=a, projections=theta, reduction="sum")
    assert_equal_to_rounding(total, got.sum(), terms=10)
    assert fastloss.sliced_wasserstein(x[:0], y, projections=theta, reduction="none").shape == (0, 3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("p", [1, 2, 1.5])
def test_identical_clouds_give_zero_and_gradient_zero(backend: str, p: float, weighted: bool) -> None:
    leaves, names = problem(50, 50, weighted=weighted)
    leaves[1] = leaves[0].clone()
    if weighted:
        leaves[4] = leaves[3].clone()
    for t in value_and_gradients(fastloss.sliced_wasserstein, leaves, **names, p=p, root=True):
        assert torch.equal(t, torch.zeros_like(t))


def test_nan_in_a_cloud_is_nan_in_its_loss_and_gradient_only(backend: str) -> None:
    x = torch.randn(2, 40, 3, generator=generator())
    x[0, 7, 1] = torch.nan
    x.requires_grad_()
    y = torch.randn(2, 40, 3, generator=generator(1))
    loss = fastloss.sliced_wasserstein(x, y, generator=generator(2), reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert loss.isnan().tolist() == [True, False]
    assert bool(grad[0].isnan().all())
    assert bool(grad[1].isfinite().all())
    with torch.no_grad():
        again = fastloss.sliced_wasserstein(x, y, generator=generator(2), reduction="none")
    assert again.isnan().tolist() == [True, False]


def hard_rows(dtype: torch.dtype) -> dict[str, Tensor]:
    g = generator()
    normal = torch.randn(5000, generator=g, dtype=dtype)
    info = torch.finfo(dtype)
    infinite = normal.clone()
    infinite[::50], infinite[1::70] = torch.inf, -torch.inf
    outlier = normal.clone()
    outlier[17] = 1e30
    return {
        "normal": normal,
        "heavy tails": normal.pow(9) * 1e3,
        "outlier": outlier,
        "infinities": infinite,
        "duplicates": torch.randint(0, 5, (5000,), generator=g).to(dtype),
        "one value": torch.full((5000,), 3.0, dtype=dtype),
        "signed zeros": torch.where(normal > 0, 0.0, -0.0).to(dtype),
        "signed zeros beside infinities": torch.where(infinite.isinf(), infinite, torch.where(normal > 0, 0.0, -0.0)),
        "denormals": normal * info.smallest_normal / 8,
        "whole range": normal.sign() * info.max * torch.rand(5000, generator=g, dtype=dtype),
        "clusters": torch.randint(0, 3, (5000,), generator=g).to(dtype) * 1e6 + normal * 1e-3,
        "descending": torch.arange(5000, 0, -1).to(dtype),
        "long": torch.randn(70000, generator=g, dtype=dtype),
        "short": normal[:31],
        "two": normal[:2],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("isa", native_core().supported_isas().split(","))
@pytest.mark.parametrize("name", hard_rows(torch.float32))
def test_rows_sort_as_torch_sorts_them(isa: str, name: str, dtype: torch.dtype) -> None:
    row = hard_rows(dtype)[name]
    core, before = native_core(), native_core().isa()
    try:
        core.choose_isa(isa)
        values, order = ops.sort_slices(row[:, None], torch.ones(1, 1, dtype=dtype))
        keys_only = fastloss.sliced_wasserstein(row[:, None], torch.zeros(1, 1, dtype=dtype), p=1)
    finally:
        core.choose_isa(before)
    expected, index = row.sort(stable=True)
    assert torch.equal(values[0], expected)
    assert torch.equal(order[0].long(), index), "stable"
    assert not keys_only.isnan()  # infinite for infinities


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["signed zeros", "signed zeros beside infinities"])
def test_the_kernel_ties_signed_zeros(name: str, dtype: torch.dtype) -> None:
    """Given directly: a product may turn -0 into 0 before it comes to the sort."""
    row = hard_rows(dtype)[name]
    assert bool((row.signbit() & (row == 0)).any())
    _, order = native._epilogue.sort(row[None].clone())
    assert torch.equal(order[0].long(), row.sort(stable=True).indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["normal", "heavy tails", "outlier", "duplicates", "clusters", "long"])
def test_forward_without_gradients_is_the_forward_with(name: str, dtype: torch.dtype) -> None:
    row = hard_rows(dtype)[name][:, None].requires_grad_()
    other = row.detach().flip(0) * 0.5 + 1
    theta = torch.ones(1, 1, dtype=dtype)
    with torch.no_grad():
        keys_only = fastloss.sliced_wasserstein(row, other, projections=theta)
    assert torch.equal(fastloss.sliced_wasserstein(row, other, projections=theta).detach(), keys_only)


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    leaves, names = problem(3000, 2500, slices=37, weighted=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(value_and_gradients(fastloss.sliced_wasserstein, leaves, **names, p=1.5))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        for g, w in zip(other[1:], results[0][1:], strict=True):
            assert_equal_to_rounding(g, w, terms=37)  # the BLAS library's products


def test_large_clouds_take_the_path_that_sorts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, names = problem(50, 40, weighted=True)
    kept = value_and_gradients(fastloss.sliced_wasserstein, leaves, **names)
    monkeypatch.setattr(ops, "WAITING_BYTES", 0)
    again = value_and_gradients(fastloss.sliced_wasserstein, leaves, **names)
    for g, w in zip(again, kept, strict=True):
        assert_equal_to_rounding(g, w, terms=20)


@pytest.mark.parametrize("p", [1, 1.5, 2])
def test_gradient_in_weights_at_ties_is_the_mean_of_both_one_sided_ones(backend: str, p: float) -> None:
    """Equal weights: all steps of the two staircases coincide, and moving weight either way costs differently."""
    x = torch.tensor([0.0, 1.0, 2.5, 4.0, 7.0], dtype=torch.float64)[:, None]
    y = torch.tensor([0.5, 0.75, 3.5, 5.5, 6.0], dtype=torch.float64)[:, None]
    weights = torch.full((5,), 0.2, dtype=torch.float64, requires_grad=True)

    def cost(a: Tensor, b: Tensor) -> Tensor:
        theta = torch.ones(1, 1, dtype=torch.float64)
        return fastloss.sliced_wasserstein(x, y, x_weights=a, y_weights=b, p=p, projections=theta)

    held, step = weights.detach(), 1e-4
    for first in (True, False):

        def of(w: Tensor, first: bool = first) -> Tensor:
            return cost(w, held) if first else cost(held, w)

        (grad,) = torch.autograd.grad(of(weights), weights)
        for i in range(4):
            move = torch.zeros_like(held)
            move[i], move[i + 1] = -step, step
            central = (of(held + move) - of(held - move)) / (2 * step)
            assert (grad[i + 1] - grad[i]).item() == pytest.approx(central.item(), rel=1e-9, abs=1e-9)
