"""The transport plans against POT, the dense reference and finite differences."""

from __future__ import annotations

from typing import Any

import ot
import pytest
import torch
from torch import Tensor

import fastloss
from fastloss.sliced import plans as module
from tests import support

reference = fastloss.reference
METRICS = ["sqeuclidean", "euclidean", "cityblock", "minkowski"]


def assert_equal_to_rounding(actual: Tensor, expected: Tensor, **options: float) -> None:
    support.assert_equal_to_rounding(actual.detach(), expected.detach(), **options)


def clouds(n: int = 30, m: int = 30, d: int = 3, slices: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, y, theta = (torch.randn(*shape, dtype=torch.float64, generator=g) for shape in ((n, d), (m, d), (d, slices)))
    return x, y + 0.5, torch.nn.functional.normalize(theta, dim=0)


def weights(*sizes: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n, dtype=torch.float64, generator=g).softmax(0) for n in sizes]


def matrix(plan: Any, n: int, m: int) -> Tensor:
    data, rows, cols = plan
    return data.new_zeros(n * m).index_add(0, rows * m + cols, data).reshape(n, m)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "m", "weighted"), [(30, 30, False), (30, 21, False), (30, 30, True), (1, 7, True)])
def test_plans_and_costs_are_the_reference(backend: str, n: int, m: int, weighted: bool, metric: str) -> None:
    x, y, theta = clouds(n, m)
    ab = weights(n, m) if weighted else []
    leaves = [t.requires_grad_() for t in (x, y, *ab)]
    options: dict[str, Any] = {"metric": metric, "p": 3, "projections": theta}
    gentle = torch.linspace(0.5, 1.5, theta.shape[1], dtype=torch.float64)
    got, costs = fastloss.sliced_plans(*leaves, **options)
    want, expected = reference.sliced_plans(*leaves, **options)
    assert_equal_to_rounding(costs, expected, terms=10 * (n + m))
    for one, other in zip(got, want, strict=True):
        assert one.rows.dtype == one.cols.dtype == torch.int64
        assert_equal_to_rounding(matrix(one, n, m), matrix(other, n, m), terms=n + m, magnitude=1.0)
    gradients = torch.autograd.grad((gentle * costs).sum(), leaves)
    truth = torch.autograd.grad((gentle * expected).sum(), leaves)
    for k, (g, w) in enumerate(zip(gradients, truth, strict=True)):
        if k >= 2:  # in weights: up to a constant, which their normalisation takes away
            w = w - (leaves[k].detach() * w).sum()
        assert_equal_to_rounding(g, w, terms=100 * (n + m))


@pytest.mark.parametrize(("n", "m", "weighted"), [(30, 30, False), (30, 21, False), (25, 30, True)])
@pytest.mark.parametrize(
    ("name", "options"),
    [("min_sliced_transport_plan", {}), ("expected_sliced_plan", {}), ("expected_sliced_plan", {"beta": 2.5})],
)
def test_best_and_mean_plan_are_the_reference(
    backend: str, name: str, n: int, m: int, weighted: bool, options: dict[str, float]
) -> None:
    x, y, theta = clouds(n, m)
    leaves = [t.requires_grad_() for t in (x, y, *(weights(n, m) if weighted else []))]
    results = []
    for function in (getattr(fastloss, name), getattr(reference, name)):
        plan, cost, log = function(*leaves, projections=theta, dense=True, log=True, **options)
        arrays, again = function(*leaves, projections=theta, **options)
        assert_equal_to_rounding(matrix(arrays, n, m), plan, terms=n + m)
        assert torch.equal(again, cost)
        results.append([plan, cost, log["costs"], *torch.autograd.grad(cost, leaves)])
    for k, (got, want) in enumerate(zip(*results, strict=True)):
        if k >= 5:
            want = want - (leaves[k - 3].detach() * want).sum()
        assert_equal_to_rounding(got, want, terms=200 * (n + m))
    assert_equal_to_rounding(results[0][0].sum(), torch.ones((), dtype=torch.float64), terms=n + m)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # POT's matrix
def test_pot_gives_the_same_plans(given: bool, weighted: bool, metric: str) -> None:
    n, m = (30, 19) if weighted else (30, 30)
    x, y, theta = clouds(n, m, slices=8)
    ours = weights(n, m) if weighted else []
    # POT makes its own equal weights in float32, and 1/L for beta = 0: exact for L = 8.
    theirs = ours or [torch.full((k,), 1 / k, dtype=torch.float64) for k in (n, m)]
    options = {"metric": metric, "p": 3.0, **({"projections": theta} if given else {"seed": 5, "n_projections": 8})}

    plans, costs, log = fastloss.sliced_plans(x, y, *ours, **options, log=True)
    expected, expected_costs, expected_log = ot.sliced.sliced_plans(x, y, *theirs, **options, log=True)
    if not weighted:  # else POT multiplies distances by masses[rows], not by the masses
        assert_equal_to_rounding(costs, expected_costs, terms=500)
    assert set(log) == set(expected_log)
    for key in log:
        assert_equal_to_rounding(log[key], expected_log[key], terms=50)
    for plan, other in zip(plans, expected, strict=True):
        assert plan._fields == other._fields
        assert_equal_to_rounding(matrix(plan, n, m), matrix(other, n, m), terms=n + m)

    for name, more in (
        ("min_sliced_transport_plan", {}),
        ("expected_sliced_plan", {}),
        ("expected_sliced_plan", {"beta": 1.5}),
    ):
        if weighted and not (name == "expected_sliced_plan" and not more):
            continue  # POT chooses, or weighs, by its wrong costs
        plan, cost, log = getattr(fastloss, name)(x, y, *ours, **options, **more, dense=True, log=True)
        want, want_cost, want_log = getattr(ot, name)(x, y, *theirs, **options, **more, log=True)
        dtype = torch.float64 if want.dtype == torch.float64 else torch.float32  # POT's mean plan for beta = 0
        assert_equal_to_rounding(cost.to(dtype), want_cost.to(dtype), terms=500)
        assert_equal_to_rounding(plan.to(dtype), want.to(dtype), terms=500)
        assert set(log) == set(want_log)
        for key in set(log) - {"G", "costs" if weighted else "G"}:
            assert_equal_to_rounding(log[key], want_log[key].double(), terms=500)


def test_gradients_are_finite_differences() -> None:
    x, y, theta = clouds(7, 5)
    a, b = weights(7, 5)
    logits = [a.log(), b.log()]  # through softmax, so that every perturbation sums to one

    def costs(x: Tensor, y: Tensor, p: Tensor, q: Tensor) -> Tensor:
        options = {"projections": theta, "metric": "euclidean"}
        ab = p.softmax(0), q.softmax(0)
        every = fastloss.sliced_plans(x, y, *ab, **options)[1]
        best = fastloss.min_sliced_transport_plan(x, y, *ab, **options)[1]
        plan, mean = fastloss.expected_sliced_plan(x, y, *ab, **options, beta=0.5)
        return torch.cat([every, torch.stack([best, mean]), plan.data])

    assert torch.autograd.gradcheck(costs, [t.requires_grad_() for t in (x, y, *logits)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_sum_in_float32(dtype: torch.dtype) -> None:
    x, y, theta = (t.to(dtype) for t in clouds(40, 25))
    plans, costs = fastloss.sliced_plans(x, y, projections=theta)
    want = reference.sliced_plans(x.float(), y.float(), projections=theta.float())[1]
    assert costs.dtype == plans[0].data.dtype == torch.float32
    assert_equal_to_rounding(costs, want, terms=65)


def test_blocks_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, theta = clouds(30, 21)
    whole = fastloss.sliced_plans(x, y, projections=theta)
    for size in (1, 7, 10**9):
        plans, costs = fastloss.sliced_plans(x, y, projections=theta, batch_size=size)
        assert_equal_to_rounding(costs, whole[1], terms=51)
        assert all(torch.equal(p.cols, q.cols) for p, q in zip(plans, whole[0], strict=True))
    monkeypatch.setattr(module, "BLOCK_BYTES", 900)  # two slices of masses, pairs one slice at a time
    assert_equal_to_rounding(fastloss.sliced_plans(x, y, projections=theta)[1], whole[1], terms=51)
    assert_equal_to_rounding(fastloss.min_sliced_transport_plan(x, y, projections=theta)[1], whole[1].min(), terms=51)


def test_best_plan_stores_neither_the_matrix_nor_the_other_plans() -> None:
    n, slices = 20000, 64
    x, y, theta = (t.float() for t in clouds(n, n, slices=slices))
    ab = [torch.full((n,), 1 / n)] * 2
    one_block = module.BLOCK_BYTES
    for more in ((), ab):
        peak = support.peak_bytes(lambda more=more: fastloss.min_sliced_transport_plan(x, y, *more, projections=theta))
        # keys, indices and masses of a block: at most sixteen numbers of eight bytes an entry, and the points' blocks
        assert peak < 16 * one_block < n * n * 4 / 2
    plans = support.peak_bytes(lambda: fastloss.sliced_plans(x, y, *ab, projections=theta))
    assert plans > slices * 2 * n * 20  # the test can fail: all plans take more


def test_marginals_and_ties() -> None:
    """Equal weights, given: all cumulative weights coincide, and entries of no mass must not matter."""
    x, y, theta = clouds(12, 12)
    x[3], y[5] = x[8], y[0]
    equal = torch.full((12,), 1 / 12, dtype=torch.float64)
    given, costs = fastloss.sliced_plans(x, y, equal, equal, projections=theta)
    left, expected = fastloss.sliced_plans(x, y, projections=theta)
    assert_equal_to_rounding(costs, expected, terms=24)
    for plan, other in zip(given, left, strict=True):
        assert len(plan.data) == 23
        assert len(other.data) == 12
        assert_equal_to_rounding(matrix(plan, 12, 12), matrix(other, 12, 12), terms=24, magnitude=1.0)
        assert bool((plan.data >= 0).all())
        assert_equal_to_rounding(matrix(plan, 12, 12).sum(1), equal, terms=24, magnitude=1.0)
    # weights of zero, in the end and in between
    some = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    line = torch.arange(5, dtype=torch.float64)[:, None]
    plan, cost = fastloss.min_sliced_transport_plan(line, line + 1, some, some, projections=torch.ones(1, 1).double())
    assert cost == 1
    assert torch.equal(matrix(plan, 5, 5), torch.diag(some))


def test_nan_and_infinity() -> None:
    x, y, theta = clouds(10, 8)
    broken = x.clone()
    broken[4, 1] = torch.nan
    a = torch.full((10,), 1 / 9, dtype=torch.float64)
    a[4] = 0
    for weight in (None, a):
        assert bool(fastloss.sliced_plans(broken, y, weight, projections=theta)[1].isnan().all())
        assert bool(fastloss.min_sliced_transport_plan(broken, y, weight, projections=theta)[1].isnan())
    far = x.clone()
    far[4] = torch.inf
    theta = theta.abs()
    assert bool(fastloss.sliced_plans(far, y, projections=theta)[1].isposinf().all())
    assert bool(fastloss.sliced_plans(far, y, a, projections=theta)[1].isfinite().all()), "no mass, no cost"
    same = x.detach().clone().requires_grad_()
    for metric in METRICS:
        cost = fastloss.min_sliced_transport_plan(same, x, projections=theta, metric=metric, p=1.5)[1]
        (grad,) = torch.autograd.grad(cost, same)
        assert cost == 0
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("name", ["sliced_plans", "min_sliced_transport_plan", "expected_sliced_plan"])
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, ValueError, "`n_projections` must be given where `projections` is None"),
        ({"n_projections": 0}, ValueError, "`n_projections` must be an integer >= 1, got 0"),
        ({"n_projections": 2, "metric": "cosine"}, ValueError, "`metric` must be one of sqeuclidean, euclidean, cityb"),
        ({"n_projections": 2, "p": 0.5}, ValueError, "`p` must be finite and at least 1, got 0.5"),
        ({"n_projections": 2, "seed": "a"}, TypeError, "`seed` must be None, an int or a torch.Generator, got str"),
        ({"n_projections": 2, "batch_size": 0}, ValueError, "`batch_size` must be an integer >= 1, got 0"),
        ({"projections": torch.ones(3, 2)}, ValueError, "`projections` must have shape (2, L), L >= 1, got (3, 2)"),
        ({"n_projections": 2, "log": 1}, TypeError, "`log` must be True or False, got int"),
        ({"n_projections": 2, "a": torch.ones(2, 3) / 3}, ValueError, "`a` must have shape (3,), got (2, 3)"),
        ({"n_projections": 2, "a": torch.ones(3)}, ValueError, "`a` must sum to one"),
        ({"n_projections": 2, "b": -torch.ones(4)}, ValueError, "`b` must not be negative, got -1"),
        ({"n_projections": 2, "X_t": torch.ones(4, 3)}, ValueError, "`X_t` must have the width of `X_s`, 2, got 3"),
        ({"n_projections": 2, "X_s": torch.ones(1, 3, 2)}, ValueError, "`X_s` must have shape (points, d)"),
        ({"n_projections": 2, "X_s": torch.ones(0, 2)}, ValueError, "`X_s` must have shape (..., points, d) with at"),
    ],
)
def test_errors(name: str, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        getattr(fastloss, name)(**{"X_s": torch.zeros(3, 2), "X_t": torch.zeros(4, 2), **options})
    assert text in str(caught.value)
    assert str(caught.value).startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["min_sliced_transport_plan", "expected_sliced_plan"])
def test_error_of_dense(name: str) -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(TypeError, match=f"{name}: `dense` must be True or False, got int"):
        getattr(fastloss, name)(x, x, n_projections=2, dense=1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_projections_that_are_not_finite_give_nan(value: float, weighted: bool) -> None:
    x, y, theta = clouds(10, 10)
    ab = weights(10, 10) if weighted else []
    theta[1, 2] = value
    plans, costs = fastloss.sliced_plans(x, y, *ab, projections=theta)
    assert costs.isnan().tolist() == [k == 2 for k in range(6)]
    assert [bool(plan.data.isnan().all()) for plan in plans] == costs.isnan().tolist()
    for name in ("min_sliced_transport_plan", "expected_sliced_plan"):
        assert bool(getattr(fastloss, name)(x, y, *ab, projections=theta)[1].isnan()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_beta_chooses_the_cheapest_or_the_dearest_plan(dtype: torch.dtype) -> None:
    x, y, theta = (t.to(dtype) for t in clouds())
    costs = fastloss.sliced_plans(x, y, projections=theta)[1]
    x.requires_grad_()
    for beta in (1e30, 1e39, 1e308):
        for sign, want in ((1, costs.min()), (-1, costs.max())):
            cost = fastloss.expected_sliced_plan(x, y, projections=theta, beta=sign * beta)[1]
            assert_equal_to_rounding(cost, want, terms=60)
            assert bool(torch.autograd.grad(cost, x)[0].isfinite().all())


def test_second_derivatives_are_finite_differences() -> None:
    x, y, theta = clouds(5, 4)
    logits = [w.log() for w in weights(5, 4)]

    def costs(x: Tensor, y: Tensor, p: Tensor, q: Tensor) -> Tensor:
        options = {"projections": theta, "metric": "euclidean"}
        ab = p.softmax(0), q.softmax(0)
        every = fastloss.sliced_plans(x, y, *ab, **options)[1]
        best = fastloss.min_sliced_transport_plan(x, y, *ab, **options)[1]
        plan, mean = fastloss.expected_sliced_plan(x, y, *ab, **options, beta=0.5)
        return torch.cat([every, torch.stack([best, mean]), plan.data])

    assert torch.autograd.gradgradcheck(costs, [t.requires_grad_() for t in (x, y, *logits)])


def test_error_of_beta() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="expected_sliced_plan: `beta` must be finite, got inf"):
        fastloss.expected_sliced_plan(x, x, n_projections=2, beta=float("inf"))
    with pytest.raises(TypeError, match="expected_sliced_plan: `beta` must be a float, got str"):
        fastloss.expected_sliced_plan(x, x, n_projections=2, beta="1")


def test_weights_whose_sums_pass_one_too_early_give_no_negative_mass() -> None:
    """Rounding may take the sum of all but a tiny last weight beyond one; the plan still has no negative entry."""
    n, passed = 40, 0
    x = torch.arange(n, dtype=torch.float64)[:, None]
    y = torch.arange(3, dtype=torch.float64)[:, None]
    for seed in range(20):
        a = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        a[-1] = 1e-18
        a = a / a.sum()
        passed += bool((a / a.sum()).cumsum(0)[-2] > 1)
        (plan,), _ = fastloss.sliced_plans(x, y, a, projections=torch.ones(1, 1, dtype=torch.float64))
        assert bool((plan.data >= 0).all()), seed
    assert passed > 0
