"""The Triton kernels against the dense formula in float64: on a GPU, or interpreted (see `tests/test_triton.py`).

The interpreter takes 64 numbers of a row at a time, so that a hundred classes cross every edge.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fastloss.benchmarks import roofline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

import fastloss
from fastloss import _triton
from fastloss.spherical import portable
from fastloss.spherical import triton as kernels
from tests.spherical.problems import DTYPES, LINEAR, LOSSES, OPTIONS, Problem, make
from tests.support import assert_as_accurate_as_torch

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


# ---------------------------------------------------------------- the step of a factored layer

CLASSES = 9  # few: targets repeat
ROWS = [0, 1, 15, 16, 17, 31, 32, 33]
WIDTHS = [1, 5, 17, 65]
TARGETS = [1, 2, 3]
# A tile of the chip, to its edge and past it, where the chip runs the kernels.
SIZES = [(rows, 1 + rows % 3, 17) for rows in ROWS] + [(5, k, width) for k in TARGETS for width in WIDTHS]
SIZES += [(129, 2, 1025)] if DEVICE == "cuda" else []
every_size = pytest.mark.parametrize(("rows", "targets", "width"), SIZES)
Run = Callable[[Any, dict[str, Any]], tuple[Tensor, ...]]


def numbers(rows: int, targets: int, width: int) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(rows + 100 * width)
    shapes = {
        "rows": (rows, targets, width), "product": (rows, width), "hidden": (rows, width), "weighted": (rows, width),
        "mean": (width,), "g_t": (rows, targets), "g_v": (rows,), "g_mean": (rows,), "v": (CLASSES, width),
        "square": (width, width), "small": (rows, rows),
    }  # fmt: skip
    made = {name: torch.randn(shape, generator=gen).to(DEVICE) for name, shape in shapes.items()}
    return made | {"target": torch.randint(CLASSES, (rows, targets), generator=gen).to(DEVICE)}


def agree(run: Run, x: dict[str, Tensor]) -> None:
    """With the portable functions in float64, about as well as these in float32."""
    double = {name: v.double() if v.is_floating_point() else v for name, v in x.items()}
    truths, baselines = run(portable, double), run(portable, copy.deepcopy(x))
    for i, (got, truth, baseline) in enumerate(zip(run(kernels, copy.deepcopy(x)), truths, baselines, strict=True)):
        assert_as_accurate_as_torch(got, truth, baseline, name=f"result {i}")


def factors(module: Any, x: dict[str, Any]) -> tuple[Tensor, ...]:
    out = tuple(torch.full_like(x["hidden"], float("nan")) for _ in range(3))
    module.factored_factors(x["hidden"], x["product"], x["weighted"], x["g_v"], 0.3, 0.9, out)
    return out


def pairs(module: Any, x: dict[str, Any]) -> tuple[Tensor, ...]:
    module.factored_pairs(x["small"], x["target"], x["g_t"], x["g_v"], 0.3, CLASSES)
    return (x["small"],)


def inverse(module: Any, x: dict[str, Any]) -> tuple[Tensor, ...]:
    gram = x["hidden"] @ x["hidden"].T / x["hidden"].shape[1]
    result, exists = module.factored_inverse(gram, x["g_v"].abs(), -0.3, 0.9)
    assert exists
    return (result,)


def scatter(module: Any, x: dict[str, Any]) -> tuple[Tensor, ...]:
    module.factored_scatter(x["v"], x["target"], x["g_t"], x["product"], 0.3)
    return (x["v"],)


def symmetric(module: Any, x: dict[str, Any]) -> tuple[Tensor, ...]:
    gram = x["square"] + x["square"].T
    module.symmetric_update(gram, x["square"], 0.9)
    assert torch.equal(gram, gram.T)
    return (gram,)


def growth(module: Any, x: dict[str, Any]) -> tuple[Tensor, ...]:
    verdict = module.factored_verdict(
        x["weighted"], x["g_mean"], 0.3, torch.tensor(True, device=DEVICE), x["product"], x["hidden"], x["weighted"]
    )
    assert verdict.finite
    return x["hidden"].new_tensor(verdict.growth), verdict.shares


def losses(kind: str, weighted: bool) -> Run:
    def run(module: Any, x: dict[str, Any]) -> tuple[Tensor, ...]:
        rows = len(x["target"])
        share: Any = x["rows"][:, :, 0] if weighted else 1 / max(rows, 1)
        share = share[:, :1] if weighted and rows % 2 else share
        v = x["g_v"].abs() * (torch.arange(rows, device=DEVICE) % 5 > 0)  # and 0
        found = module.factored_losses(4 * x["g_t"], v, x["g_mean"], share, kind, CLASSES, 3.0, 0.1, 1e-3)
        return tuple(found)

    return run


PIECES: dict[str, Run] = {
    "statistics": lambda m, x: m.factored_statistics(x["rows"], x["product"], x["hidden"], x["mean"]),
    "gradient": lambda m, x: m.factored_gradient(
        x["rows"], x["product"], x["mean"], *(x[g] for g in ("g_t", "g_v", "g_mean"))
    ),
    "factors": factors, "pairs": pairs, "inverse": inverse, "scatter": scatter, "symmetric": symmetric,
    "growth": growth,
    **{f"{kind} {weighted}": losses(kind, weighted) for kind in ("z", "spherical", "taylor", "mse")
       for weighted in (False, True)},
}  # fmt: skip


@every_size
@pytest.mark.parametrize("piece", PIECES)
def test_pieces_of_a_step(piece: str, rows: int, targets: int, width: int) -> None:
    agree(PIECES[piece], numbers(rows, targets, width))


@pytest.mark.parametrize("piece", ["pairs", "scatter"])
def test_pairs_beyond_what_is_compared(piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PAIRED_TARGETS", 1)
    monkeypatch.setattr(kernels, "SCATTERED_PAIRS", 1)
    agree(PIECES[piece], numbers(33, 2, 17))


def test_one_class_many_times() -> None:
    x = numbers(33, 3, 5)
    x["target"].fill_(4)
    agree(scatter, x)
    agree(pairs, x)


def test_gradients_may_have_strides() -> None:
    x = numbers(5, 3, 17)
    x["g_v"], x["g_t"] = x["g_v"][:1].expand(5), torch.randn(3, 5, device=DEVICE).T
    agree(PIECES["gradient"], x)
    agree(scatter, x)


def test_losses_of_a_step_at_their_ends() -> None:
    """Small losses keep their digits, large ones do not overflow, and nothing is known where the squares overflow."""
    x = {"t": torch.tensor([[30.0], [-200], [1], [2]], device=DEVICE), "v": torch.full((4,), 9.0, device=DEVICE)}
    x["v"][2], x["v"][3] = float("inf"), 0
    for row in range(4):

        def run(module: Any, x: dict[str, Any], row: int = row) -> tuple[Tensor, ...]:
            part = slice(row, row + 1)
            t, v = x["t"][part], x["v"][part]
            loss, *gradients = module.factored_losses(t, v, torch.zeros_like(v), 1.0, "z", 9, 1.0, 0.0, 1e-12)
            assert bool(loss.isnan()) == (row == 2)
            return tuple(g for g in (loss, *gradients) if row != 2)

        agree(run, x)


def test_rounding_makes_no_sum_of_squares_negative_and_hides_no_nan() -> None:
    rows, ones = torch.ones(2, 1, 3, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    product = -ones
    product[1, 2] = float("nan")
    square = kernels.factored_statistics(rows, product, ones, ones[0])[1]
    assert float(square[0]) == 0
    assert bool(square[1].isnan())


def test_verdict() -> None:
    ones = torch.ones(2, 3, device=DEVICE)

    def ask(
        full: Tensor = ones, g_mean: Tensor = ones, exists: bool = True, s: Tensor = ones, h: Tensor = ones
    ) -> tuple[bool, float]:
        verdict = kernels.factored_verdict(full, g_mean[:, 2].contiguous(), 0.5, exists, s, h, 2 * ones)
        assert verdict.shares.tolist() == [float(2 * h[0].sum())] * 2
        return verdict.finite, verdict.growth

    assert ask() == (True, 1.0)
    assert ask(exists=False) == (True, float("inf"))
    assert ask(h=torch.zeros_like(ones)) == (True, 0.0)
    for bad in (float("nan"), float("inf")):
        wrong = ones.clone()
        wrong[1, 2] = bad
        assert not ask(full=wrong)[0]
        assert not ask(g_mean=wrong)[0]
        assert not ask(s=wrong)[1] <= 1e30


@pytest.mark.parametrize("batch", [3, 12], ids=["low rank", "full rank"])
@pytest.mark.parametrize("targets", [1, 2])
def test_training_follows_the_portable_layer(targets: int, batch: int) -> None:
    gen = torch.Generator().manual_seed(1)
    layers = {}
    for name, dtype in (("triton", torch.float32), ("portable", torch.float32), ("exact", torch.float64)):
        torch.manual_seed(0)
        linear = torch.nn.Linear(6, 100).to(DEVICE)
        layers[name] = fastloss.FactoredOutput.from_linear(linear.to(dtype), loss="z", ignore_index=99)
    losses: dict[str, list[Tensor]] = {name: [] for name in layers}
    for _ in range(12):
        hidden = torch.randn(batch, 6, generator=gen).to(DEVICE)
        target = torch.randint(5, (batch,) if targets == 1 else (batch, targets), generator=gen).to(DEVICE)
        target[0] = 99
        weight = None if targets == 1 else torch.rand(batch, targets, generator=gen).to(DEVICE)
        for name, layer in layers.items():
            with fastloss.use_backend("triton" if name == "triton" else "portable"):
                x = hidden.to(layer.v.dtype)
                loss = layer(x, target, None if weight is None else weight.to(x.dtype))
                loss.backward()
                layer.step(0.1, 0.01)
                losses[name].append(loss.detach())
    found = {name: torch.stack(values) for name, values in losses.items()}
    assert_as_accurate_as_torch(found["triton"], found["exact"], found["portable"], name="losses")
    weights = {name: layer.weight() for name, layer in layers.items()}
    assert_as_accurate_as_torch(weights["triton"], weights["exact"], weights["portable"], name="weight")


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    layer = fastloss.FactoredOutput(4, 100, device=DEVICE)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.ones(3, 4, device=DEVICE), torch.tensor([1, 2, 2], device=DEVICE)).backward()
    with pytest.raises(RuntimeError, match="the step is not finite"):
        layer.step(1e30)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


class Calls(TorchDispatchMode):
    """Counts what starts a kernel; `copy_` and what follows a read are the interpreter's, or the host's."""

    SILENT = frozenset({
        "copy_", "detach", "diagonal", "empty", "empty_like", "expand", "new_empty", "permute", "select", "set_",
        "slice", "unbind", "unsqueeze", "view", "_local_scalar_dense",
    })  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name not in self.SILENT
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the launches of the interpreter")
@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_calls_of_a_step_are_those_of_the_roofline(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    launch = GridExecutor.__call__
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *a, **k: (launches.append(self), launch(self, *a, **k)))
    layer = fastloss.FactoredOutput(8, 100, bias=False)
    hidden, target = torch.randn(4, 8, requires_grad=True), torch.arange(4)
    with fastloss.use_backend(backend):
        layer(hidden, target).backward()
        layer.step(0.1)
        hidden.grad = None
        found = []
        losses: list[Tensor] = []
        stages: list[Callable[[], Any]] = [
            lambda: losses.append(layer(hidden, target)), lambda: losses[0].backward(), lambda: layer.step(0.1)
        ]  # fmt: skip
        for stage in stages:
            launches.clear()
            with Calls() as calls:
                stage()
            found.append(calls.count + len(launches))
    # The host sums up what it has read: the total, and the largest growth.
    found[2] -= 2 if backend == "triton" else 0
    assert found == [s.calls[backend == "triton"] for s in roofline.factored_step(256, 512)]
