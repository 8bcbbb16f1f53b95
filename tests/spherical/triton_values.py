"""The Triton kernels against the dense formula in float64: on a GPU, or interpreted (see `tests/test_triton.py`).

The interpreter takes 64 numbers of a row at a time, so that a hundred classes cross every edge.
"""

from collections.abc import Iterator

import pytest
import torch

import fastloss
from fastloss import _triton
from fastloss.spherical import triton as kernels
from tests.spherical.problems import DTYPES, LINEAR, LOSSES, OPTIONS, Problem, make

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what a mask leaves out
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with fastloss.use_backend("triton"):
        yield


def problem_of(*args: object, **options: object) -> Problem:
    return make(*args, **options).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("function", LOSSES)
def test_every_loss(function: str, options: str, dtype: torch.dtype) -> None:
    problem_of(function, rows=21, dtype=dtype, options=options).check()


@pytest.mark.parametrize("classes", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300])
@pytest.mark.parametrize("rows", [1, 3])
def test_classes_at_every_edge(rows: int, classes: int) -> None:
    problem_of("z_loss", rows=rows, classes=classes).check()
    problem_of("spherical_softmax_loss", rows=rows, classes=classes).check()


def test_no_rows() -> None:
    problem = problem_of("z_loss", rows=0).with_options(reduction="sum")
    loss, gradients = problem(fastloss)
    assert float(loss) == 0
    assert gradients["logits"].shape == (0, 101)


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 127, 128, 129])
def test_rows_at_every_edge(rows: int) -> None:
    problem_of("taylor_softmax_loss", rows=rows, classes=3).check()


@pytest.mark.parametrize("multiprocessors", [1, 2, 100])
def test_rows_in_parts(multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "multiprocessors", lambda device: multiprocessors)
    problem_of("z_loss", rows=3, classes=1000, offset=1e4).check(magnitude=1e4)


@pytest.mark.parametrize("offset", [100.0, 10_000.0])
@pytest.mark.parametrize("function", ["z_loss"])
def test_an_offset_costs_no_digits(function: str, offset: float) -> None:
    """Of the deviations: the logits as given, rounded, are the truth."""
    problem = problem_of(function, offset=offset)
    loss, gradients = problem(fastloss)
    exact, truths = problem(fastloss.reference, torch.float64)
    eps = torch.finfo(torch.float32).eps
    assert float((loss - exact).abs().max()) <= 16 * eps * max(1.0, float(exact.abs().max()))
    largest = float(truths["logits"].abs().max())
    assert float((gradients["logits"] - truths["logits"]).abs().max()) <= 16 * eps * largest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_may_overwrite_the_logits(dtype: torch.dtype) -> None:
    problem = problem_of("z_loss", dtype=dtype)
    logits = problem.tensors["logits"].clone().requires_grad_()
    (want,) = torch.autograd.grad(fastloss.z_loss(logits, problem.target), [logits])
    copy = logits * 1
    loss = fastloss.z_loss(copy, problem.target, gradient_overwrites_logits=True)
    (gradient,) = torch.autograd.grad(loss, [copy])
    assert gradient.data_ptr() == copy.data_ptr()
    assert torch.equal(gradient, want)


@pytest.mark.parametrize("function", LOSSES)
def test_strides(function: str) -> None:
    problem = problem_of(function)
    logits = problem.tensors["logits"]
    want, wanted = problem(fastloss)
    for moved in (logits.T.contiguous().T, torch.stack([logits, logits], 2)[:, :, 0]):
        loss, gradients = Problem(function, {"logits": moved}, problem.target, problem.options)(fastloss)
        assert torch.equal(loss, want)
        assert torch.equal(gradients["logits"], wanted["logits"])


@pytest.mark.parametrize("function", LINEAR)
def test_linear_losses(function: str) -> None:
    problem_of(function).check()


def test_an_ignored_row_may_hold_anything() -> None:
    problem = problem_of("z_loss")
    logits = problem.tensors["logits"].clone()
    logits[2] = float("nan")
    _, gradients = Problem("z_loss", {"logits": logits}, problem.target, problem.options)(fastloss)
    assert torch.count_nonzero(gradients["logits"][2]) == 0
    assert gradients["logits"].isfinite().all()


def test_it_is_these_kernels_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("reached")

    monkeypatch.setattr(kernels._Kernels, "moments", fail)
    with pytest.raises(AssertionError, match="reached"):
        problem_of("z_loss")(fastloss)
