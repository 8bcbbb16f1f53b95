"""Values and gradients of the spherical losses against their dense formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastloss
from fastloss import reference
from fastloss.spherical import tiles
from tests.spherical.problems import DTYPES, LINEAR, LOSSES, OPTIONS, Problem, make
from tests.support import blas_repeats

# Rows and width on either side of where the routes change (width / 2, and strips from 256 on).
LINEAR_SIZES = [(1, 5, 3), (7, 40, 32), (40, 300, 32), (40, 300, 270), (300, 500, 270), (33, 1, 4), (5, 64, 1)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", LOSSES)
def test_on_logits(backend: str, function: str, dtype: torch.dtype, options: str) -> None:
    make(function, dtype=dtype, options=options).check()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", LINEAR)
def test_on_hidden_states(backend: str, function: str, dtype: torch.dtype, options: str) -> None:
    make(function, dtype=dtype, options=options).check()


@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (3, 1), (1, 2), (17, 16), (5, 2049), (2, 140_001), (300, 33)])
@pytest.mark.parametrize("function", LOSSES)
def test_sizes_of_logits(backend: str, function: str, rows: int, classes: int) -> None:
    problem = make(function, rows, classes, options="none")
    # The gradient of two standardised logits, +1 and -1, is the rounding of terms that cancel, of size 1 / sigma.
    magnitude = float(1 / problem.tensors["logits"].std(1, correction=0).min()) if classes == 2 else 0.0
    problem.check(magnitude)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", LINEAR_SIZES, ids=str)
@pytest.mark.parametrize("function", LINEAR)
def test_routes(function: str, sizes: tuple[int, int, int], bias: bool) -> None:
    for dtype in (torch.float64, torch.float32):
        problem = make(function, *sizes, dtype=dtype, bias=bias)
        magnitude = 0.0
        if sizes[1] == 1:
            # All gradients are 0, the rounding of terms that cancel; the largest are those of log o^2, 2 h / o.
            hidden, weight = problem.tensors["hidden"], problem.tensors["weight"]
            logits = hidden @ weight.T + (problem.tensors["bias"] if bias else 0)
            magnitude = float(2 * (hidden / logits).abs().max())
        elif sizes[2] == 1:
            # Scaling a row of logits nearly changes nothing: terms of size 2 / h cancel.
            magnitude = float(2 / problem.tensors["hidden"].abs().min())
        problem.check(magnitude)


def test_the_route_is_that_of_fewer_flops() -> None:
    gram, logits, thin = 1.25 * 512, 4, 2
    for rows in (1, 100, 159, 161, 319, 321, 4096):
        assert tiles._gram_forward(rows, 512, True) == (gram < logits * rows)
        assert tiles._gram_forward(rows, 512, False) == (gram < thin * rows)
        assert tiles._gram_backward(rows, 512) == (4 * rows > 2 * 512)


@pytest.mark.parametrize("function", [*LOSSES, *LINEAR])
def test_several_tiles(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    monkeypatch.setattr(tiles, "SCRATCH", 64 * 80)
    monkeypatch.setattr(tiles, "block_rows", lambda columns, dtype: 4)
    for rows in (20, 150):
        make(function, rows, 333, 80, dtype=torch.float64, options="none").check()
        with fastloss.use_backend("portable"):
            make(function, rows, 333, 80, dtype=torch.bfloat16, options="none").check()


@pytest.mark.parametrize("function", LOSSES)
def test_strides(backend: str, function: str) -> None:
    base = torch.randn(30, 24)
    target = torch.arange(12) % 10
    for logits in (base[:12, :10], base.T[:12, :10], base[::2, ::2][:12, :10], base[:1, :10].expand(12, 10)):
        want, wants = Problem(function, {"logits": logits.contiguous()}, target, {})(fastloss)
        leaf = logits.detach().requires_grad_()
        loss = getattr(fastloss, function)(leaf, target)
        assert torch.equal(loss, want)
        if logits.stride(0):
            assert torch.equal(torch.autograd.grad(0.5 * loss, leaf)[0], wants["logits"])


@pytest.mark.parametrize("function", ["z_loss", "linear_z_loss"])
def test_logits_shifted_by_ten_thousand_spreads(backend: str, function: str) -> None:
    problem = make(function, 64, 5000, dtype=torch.float32, offset=1e4, options="none")
    truth, truths = problem(reference, torch.float64)
    loss, gradients = problem(fastloss)
    kept = problem.target >= 0
    assert ((loss - truth)[kept] / truth[kept]).abs().max() < 1e-5
    for name, gradient in gradients.items():
        # A bias near 10,000 leaves the logits a spread of 1, which the reference sees too: the inputs are the same.
        assert (gradient - truths[name]).abs().max() < 1e-5 * truths[name].abs().max()


@pytest.mark.parametrize("function", [*LOSSES, *LINEAR])
def test_other_losses_of_shifted_logits_are_as_accurate_as_torch(backend: str, function: str) -> None:
    make(function, 64, 1000, offset=1e4, options="none").check()


def test_an_outlier_does_not_cost_the_others_their_digits(backend: str) -> None:
    logits = torch.randn(4, 5000)
    logits[0, 0] = logits[1, 2500] = logits[2, 4999] = 1e6
    target = torch.tensor([7, 7, 7, 7])
    problem = Problem("z_loss", {"logits": logits}, target, {"reduction": "none"})
    problem.check()


def test_rows_that_gram_cannot_resolve_are_done_by_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(n, 32, generator=generator, dtype=torch.float64) for n in (400, 64))
    weight[:, 0] *= 300  # one direction carries all of |T^T T|; half of the rows do not see it
    hidden[::2, 0] = 0
    turn = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64))[0]
    tensors = {"hidden": (hidden @ turn).float(), "weight": (weight @ turn).float()}
    assert tiles._gram_forward(64, 32, True)
    Problem("linear_z_loss", tensors, torch.arange(64), {"reduction": "none"}).check()


def test_rows_are_redone_only_if_gram_lost_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "GRAM_SHARE", 0.0)
    with pytest.raises(AssertionError):
        test_rows_that_gram_cannot_resolve_are_done_by_logits()


@pytest.mark.parametrize("classes", [500, 3000])  # one block; several that are merged
def test_logits_a_million_spreads_away_keep_their_digits(backend: str, classes: int) -> None:
    """Their mean is rounded to 1/16: what is left of it must not enter the sum of squares."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(8, classes, generator=generator) * 8).round() / 8 + 2.0**20  # exact in float32
    problem = Problem("z_loss", {"logits": logits}, torch.arange(8), {"reduction": "none"})
    truth, truths = problem(reference, torch.float64)
    loss, gradients = problem(fastloss)
    assert ((loss - truth) / truth).abs().max() < 1e-5
    assert (gradients["logits"] - truths["logits"]).abs().max() < 1e-5 * truths["logits"].abs().max()


@pytest.mark.parametrize("rows", [4, 64])  # by tiles of logits; by the Gram matrix
def test_a_mean_row_a_million_times_the_spread_costs_no_digits(backend: str, rows: int) -> None:
    """The mean row that is subtracted is itself rounded, to 1/16 here; what is left of it must not enter the spread."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(500, 16, generator=generator) * 8).round() / 8 + 2.0**20  # exact in float32
    hidden = (torch.randn(rows, 16, generator=generator) * 8).round() / 8
    assert tiles._gram_forward(rows, 16, True) == (rows == 64)
    problem = Problem("linear_z_loss", {"hidden": hidden, "weight": weight}, torch.arange(rows), {"reduction": "none"})
    truth, truths = problem(reference, torch.float64)
    loss, gradients = problem(fastloss)
    assert ((loss - truth) / truth).abs().max() < 1e-5
    assert (gradients["weight"] - truths["weight"]).abs().max() < 1e-5 * truths["weight"].abs().max()


def test_z_loss_by_hand(backend: str) -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    mean, spread = 7 / 3, math.sqrt((16 + 1 + 25) / 27)
    want = math.log1p(math.exp(2 * (0.5 - (4 - mean) / spread))) / 2
    assert fastloss.z_loss(logits, torch.tensor([2]), 2.0, 0.5).item() == pytest.approx(want, rel=1e-14)


def test_z_loss_ignores_shift_and_scale(backend: str) -> None:
    logits, target = torch.randn(5, 9, dtype=torch.float64), torch.arange(5)
    one = fastloss.z_loss(logits, target, reduction="none", eps=0.0)
    other = fastloss.z_loss(7 * logits - 3, target, reduction="none", eps=0.0)
    torch.testing.assert_close(one, other, rtol=1e-13, atol=0)
    logits.requires_grad_()
    (g,) = torch.autograd.grad(fastloss.z_loss(logits, target, eps=0.0), logits)
    assert g.sum(1).abs().max() < 1e-15
    assert (g * logits).sum(1).abs().max() < 1e-15


def test_far_and_near_targets_keep_their_digits(backend: str) -> None:
    logits = torch.zeros(2, 40_000, dtype=torch.float64)
    logits[:, 3] = torch.tensor([1.0, -1.0])
    got = fastloss.z_loss(logits, torch.tensor([3, 3]), reduction="none", eps=0.0)
    z = math.sqrt(39_999)
    assert got[0].item() == pytest.approx(math.exp(-z), rel=1e-10)  # 1e-87
    assert got[1].item() == pytest.approx(z, rel=1e-14)


@pytest.mark.parametrize("classes", [1, 6])
def test_equal_logits_have_a_finite_loss_and_no_gradient(backend: str, classes: int) -> None:
    logits = torch.full((3, classes), 0.1, requires_grad=True)
    target = torch.zeros(3, dtype=torch.int64)
    loss = fastloss.z_loss(logits, target, 2.0, 0.5, reduction="none")
    torch.testing.assert_close(loss, torch.full((3,), math.log1p(math.e) / 2))
    assert torch.equal(torch.autograd.grad(loss.sum(), logits)[0], torch.zeros(3, classes))


def test_zero_layer(backend: str) -> None:
    hidden, weight = torch.randn(9, 4, requires_grad=True), torch.zeros(6, 4, requires_grad=True)
    target = torch.arange(9) % 6
    for function in LINEAR:
        loss = getattr(fastloss, function)(hidden, weight, target)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert all(g.isfinite().all() for g in (loss, *gradients))
        assert torch.equal(gradients[0], torch.zeros(9, 4))
    torch.testing.assert_close(fastloss.linear_z_loss(hidden, weight, target), torch.tensor(math.log(2)))
    torch.testing.assert_close(fastloss.linear_spherical_softmax_loss(hidden, weight, target), torch.tensor(6.0).log())


def test_the_fourth_member_is_the_squared_error(backend: str) -> None:
    logits, target = torch.randn(6, 11, dtype=torch.float64), torch.arange(6)
    want = 11 * F.mse_loss(logits, F.one_hot(target, 11).double())
    torch.testing.assert_close(fastloss.one_hot_mse_loss(logits, target), want)


def test_weights_mean_what_cross_entropy_means_by_them(backend: str) -> None:
    """With a loss of 1 in each row the weighted mean is 1; the sum and the mean relate as cross_entropy's."""
    logits, target = torch.randn(8, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, -100, 0, 1])
    weight = torch.rand(5, dtype=torch.float64)
    ratio = fastloss.z_loss(logits, target, class_weight=weight, reduction="sum") / fastloss.z_loss(
        logits, target, class_weight=weight
    )
    same = F.cross_entropy(logits, target, weight, reduction="sum") / F.cross_entropy(logits, target, weight)
    torch.testing.assert_close(ratio, same)


def test_sample_weight_has_a_gradient() -> None:
    logits, target = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, -100, 2, 3])
    weight = torch.rand(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: fastloss.z_loss(logits, target, sample_weight=w), weight)


@pytest.mark.parametrize("function", [*LOSSES, *LINEAR])
def test_nan_stays_in_its_row_and_ignored_rows_do_not_count(backend: str, function: str) -> None:
    problem = make(function, 40, 31, 16, options="none")
    first = next(iter(problem.tensors.values()))
    first[1] = math.nan
    first[2] = math.nan  # ignored
    first[3, 0] = math.inf
    if function in LINEAR:
        loss, _ = problem(fastloss)
        assert loss[1].isnan()
        assert loss[2] == 0
        assert loss[4:].isfinite().all()
        return
    loss, gradients = problem(fastloss)
    assert loss[1].isnan()
    assert loss[2] == 0
    assert not loss[3].isfinite() or function == "taylor_softmax_loss"
    assert loss[4:].isfinite().all()
    assert gradients["logits"][1].isnan().any()
    assert torch.equal(gradients["logits"][2], torch.zeros(31))
    assert gradients["logits"][4:].isfinite().all()


def test_nan_of_an_ignored_row_does_not_reach_the_weights() -> None:
    problem = make("linear_z_loss", 40, 31, 16)
    want = problem(fastloss)[1]["weight"]
    problem.tensors["hidden"][2] = math.nan
    got = problem(fastloss)[1]
    torch.testing.assert_close(got["weight"], want)
    assert torch.equal(got["hidden"][2], torch.zeros(16))


@pytest.mark.parametrize("function", [*LOSSES, *LINEAR])
def test_no_rows(backend: str, function: str) -> None:
    problem = make(function, 0, 7, 4)
    for reduction, want in (("sum", 0.0), ("mean", math.nan)):
        loss, gradients = problem.with_options(reduction=reduction)(fastloss)
        torch.testing.assert_close(loss, torch.tensor(want), equal_nan=True)
        assert not gradients.get("weight", torch.zeros(1)).nan_to_num().any()
    assert problem.with_options(reduction="none")(fastloss)[0].shape == (0,)


@pytest.mark.parametrize("function", [*LOSSES, *LINEAR])
def test_all_rows_ignored(backend: str, function: str) -> None:
    problem = make(function, 5, 7, 4)
    problem.target.fill_(-100)
    loss, gradients = problem.with_options(reduction="sum")(fastloss)
    assert loss == 0
    assert all(not g.any() for g in gradients.values())
    assert problem(fastloss)[0].isnan()


def test_ignore_index_can_be_a_class() -> None:
    logits, target = torch.randn(4, 5), torch.tensor([0, 1, 0, 2])
    got = fastloss.z_loss(logits, target, ignore_index=0, reduction="none")
    assert got[0] == got[2] == 0
    assert torch.equal(got[1::2], fastloss.z_loss(logits[1::2], target[1::2], reduction="none"))


@pytest.mark.parametrize("function", [*LOSSES, *LINEAR])
def test_results_do_not_depend_on_the_number_of_threads(function: str) -> None:
    problem = make(function, 50, 333, 16) if function in LINEAR else make(function, 7, 70_000)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(problem(fastloss))
    finally:
        torch.set_num_threads(before)
    repeats = function in LOSSES or blas_repeats()
    for loss, gradients in results[1:]:
        for got, want in [(loss, results[0][0]), *((g, results[0][1][k]) for k, g in gradients.items())]:
            if repeats:
                assert torch.equal(got, want)
            else:
                torch.testing.assert_close(got, want)


def test_large_gradients_are_written_past_the_caches() -> None:
    """Rows of a gradient beyond 16 MiB begin anywhere in a line; every entry is written, none outside."""
    logits = torch.randn(70, 65_551 + 8)[:, 3:-5].requires_grad_()
    target = torch.arange(70) * 937 % logits.shape[1]
    (got,) = torch.autograd.grad(fastloss.z_loss(logits, target), logits)
    with fastloss.use_backend("portable"):
        (want,) = torch.autograd.grad(fastloss.z_loss(logits, target), logits)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()) * 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_whose_squares_overflow(dtype: torch.dtype) -> None:
    """Infinity is no standard deviation beyond which all losses are those of equal logits: it is seen in the loss."""
    root = torch.finfo(dtype).max ** 0.5
    logits = torch.tensor([[0.5, 0.0, 0.0], [4.0, 0.0, 0.0]], dtype=dtype) * root
    loss = fastloss.z_loss(logits.requires_grad_(), torch.tensor([0, 0]), reduction="none")
    expected = torch.tensor(2**0.5, dtype=torch.float64).neg().exp().log1p()
    torch.testing.assert_close(loss[0].double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0)
    assert loss[1].isnan()
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient[0].isfinite().all()
    assert gradient[1].isnan().all()
    hidden, weight = torch.eye(1, dtype=dtype) * 4 * root, torch.tensor([[1.0], [0.0], [0.0]], dtype=dtype)
    assert fastloss.linear_z_loss(hidden, weight, torch.tensor([0])).isnan()


@pytest.mark.parametrize("function", LOSSES)
def test_weights_of_classes_are_differentiated(function: str) -> None:
    logits, target = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 1, -100, 4, 4])
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    got, expected = (
        torch.autograd.grad(getattr(module, function)(logits, target, class_weight=weight), weight)[0]
        for module in (fastloss, reference)
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
