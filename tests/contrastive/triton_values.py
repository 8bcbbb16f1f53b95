"""The Triton kernels against the dense formula in float64: on a GPU, or interpreted (see `tests/test_triton.py`).

The interpreter has tiles of 32 x 32 with 16 features at a time, and panels are made small here, so that a few dozen
rows cross every edge.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastloss
import fastloss.reference
from fastloss import _triton
from fastloss.contrastive import ops
from fastloss.contrastive import triton as kernels
from tests.contrastive.problems import REDUCED, VARIANTS, Problem, check, evaluate, make_problem

# NumPy, which interprets, warns of what kernels leave out by a mask afterwards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EDGES = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65]  # tiles 32 x 32 in two parts, panels 32 x 64
FUNCTIONS = ["info_nce mean", "info_nce symmetric", "info_nce unpaired", "clip_loss", "nt_xent"]


@pytest.fixture(autouse=True)
def small_panels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "PANEL_ROWS", 32)
    monkeypatch.setattr(kernels, "PANEL_COLS", 64)
    with fastloss.use_backend("triton"):
        yield


def problem_of(variant: str, **options: object) -> Problem:
    return make_problem(variant, **options).to(DEVICE)


# Paired negatives are not on these ops.
MODES = [variant for variant in (*VARIANTS, *REDUCED) if " paired" not in variant]


@pytest.mark.parametrize(("index", "variant"), list(enumerate(MODES)))
def test_every_mode(index: int, variant: str) -> None:
    """Each in one of the dtypes, in turn."""
    check(problem_of(variant, rows=20, columns=37, width=19, dtype=DTYPES[index % len(DTYPES)]))


@pytest.mark.parametrize("rows", EDGES)
def test_rows_at_every_edge(rows: int) -> None:
    check(problem_of("info_nce symmetric ids", rows=rows, width=5))


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 32, 33])
def test_views_at_every_edge(rows: int) -> None:
    check(problem_of("nt_xent ids", rows=rows, width=5))


@pytest.mark.parametrize("variant", ["info_nce symmetric ids", "nt_xent ids"])
def test_tiles_of_small_batches(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "multiprocessors", lambda device: 100)
    check(problem_of(variant, rows=20, dtype=torch.bfloat16))


@pytest.mark.parametrize("columns", [0, *EDGES])
def test_columns_at_every_edge(columns: int) -> None:
    check(problem_of("info_nce unpaired key_ids row_temperature", rows=33, columns=columns, width=5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 32, 1030])
def test_widths(width: int, dtype: torch.dtype) -> None:
    check(problem_of("info_nce symmetric", rows=20, width=width, dtype=dtype))


@pytest.mark.parametrize("variant", ["info_nce mean", "info_nce symmetric ids row_temperature", "nt_xent"])
def test_each_gradient_alone(variant: str) -> None:
    problem = problem_of(variant, rows=20)
    for name in problem.tensors:
        check(problem, requires_grad=[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["info_nce symmetric ids row_temperature", "info_nce unpaired", "nt_xent ids"])
def test_sums_that_do_not_fit(variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep for dQ and one for dK; a self-similarity by whole rows."""
    monkeypatch.setattr(kernels, "ACCUMULATOR_BYTES", 0)
    problem = problem_of(variant, rows=40, columns=70, width=5, dtype=dtype)
    check(problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.005, 10.0])
@pytest.mark.parametrize("variant", ["clip_loss", "nt_xent"])
def test_temperatures(variant: str, temperature: float, dtype: torch.dtype) -> None:
    check(problem_of(variant, rows=20, dtype=dtype, temperature=temperature))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["info_nce symmetric", "nt_xent"])
def test_rows_of_zeros_and_of_every_length(variant: str, dtype: torch.dtype) -> None:
    """Powers of two leave a normalised row as it is, whatever the range of float16."""
    problem = problem_of(variant, rows=20, dtype=dtype, temperature=0.5)
    want = evaluate(problem)
    name = next(iter(problem.features))
    if problem.normalizes:
        factor = (2.0 ** (torch.arange(20) % 9 - 4.0)).to(DEVICE)[:, None].to(dtype)
        got = evaluate(problem.with_tensors(**{name: problem.tensors[name] * factor}))
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=1e-6)
    changed = problem.tensors[name].clone()
    changed[::5] = 0
    check(problem.with_tensors(**{name: changed}))


@pytest.mark.parametrize("variant", ["info_nce ids", "info_nce mean ids", "clip_loss ids", "nt_xent ids"])
def test_all_negatives_left_out(variant: str) -> None:
    problem = problem_of(variant)
    same = {name: torch.full_like(x, 3) for name, x in problem.options.items() if name.endswith("ids")}
    result = check(problem.with_options(**same))
    assert torch.count_nonzero(result.loss) == 0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in result.gradients.values())


@pytest.mark.parametrize("normalize", [False, True])
def test_an_expanded_upstream(normalize: bool) -> None:
    """Of a sum."""
    problem = problem_of("info_nce", rows=20)
    gradients = []
    for backend in ("triton", "portable"):
        q, k = (x.clone().requires_grad_() for x in problem.features.values())
        with fastloss.use_backend(backend):
            outputs = ops.similarity_lse(q, k, torch.ones((), device=DEVICE), normalize=normalize)
            gradients.append(torch.autograd.grad(outputs[0].sum() + outputs[2].sum(), (q, k)))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


def test_ids_beyond_32_bits_stay_apart() -> None:
    problem = problem_of("info_nce", rows=4)
    assert torch.equal(problem(fastloss), problem(fastloss, query_ids=(torch.arange(4) << 32).to(DEVICE)))


@pytest.mark.parametrize("variant", ["info_nce symmetric", "info_nce mean", "nt_xent"])
@pytest.mark.parametrize(("upstream", "length"), [(2.0**17, 64.0), (2.0**-13, 1 / 64)])
def test_upstream_outside_the_range_of_float16(variant: str, upstream: float, length: float) -> None:
    """Loss scaling: only the product has to be a float16."""
    problem = problem_of(variant, rows=8, dtype=torch.float16, temperature=1.0)
    name = next(iter(problem.features))
    gradients = []
    for api, dtype in ((fastloss, torch.float16), (fastloss.reference, torch.float32)):
        leaf = (problem.tensors[name] * length).to(dtype).requires_grad_()
        features = {key: x.to(dtype) for key, x in problem.features.items()}
        (problem(api, {**problem.tensors, **features, name: leaf}).float() * upstream).sum().backward()
        gradients.append(leaf.grad.double())
    largest = float(gradients[1].abs().max())
    # G, each product's other factor, and the result are rounded to float16.
    assert float((gradients[0] - gradients[1]).abs().max()) <= 2 * torch.finfo(torch.float16).eps * largest


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("variant", ["info_nce symmetric", "info_nce unpaired", "nt_xent"])
def test_one_bad_row_stays_in_its_row_and_column(variant: str, bad: float) -> None:
    problem = problem_of(variant, rows=20)
    name = next(iter(problem.features))
    broken = problem.tensors[name].clone()
    broken[3, 0] = bad
    got, want = (
        problem(fastloss, {**problem.tensors, name: broken}),
        problem(fastloss.reference, {**problem.tensors, name: broken}),
    )
    assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("length", [2e19, math.inf], ids=["overflow", "infinite"])
@pytest.mark.parametrize("variant", ["info_nce dot", "info_nce dot mean", "info_nce dot symmetric mean", "nt_xent dot"])
def test_infinite_similarity_of_a_positive(variant: str, length: float) -> None:
    """+inf: NaN, loss and gradients; -inf: the loss is +inf."""
    problem = problem_of(variant, rows=20)
    first, second = list(problem.features)[:2]
    anchor, key = problem.tensors[first].clone(), problem.tensors[second].clone()
    anchor[5], key[5] = 0, 0
    anchor[5, 0], key[5, 0] = min(length, 1e30), length
    for sign in (1, -1):
        given = problem.with_tensors(**{first: anchor, second: sign * key})
        result, want = evaluate(given), evaluate(given, fastloss.reference).loss
        assert torch.equal(result.loss.isnan(), want.isnan())
        assert torch.equal(result.loss == math.inf, want == math.inf)
        row = want if want.dim() == 0 else want[5]
        assert bool(row.isnan() if sign == 1 else row == math.inf)
        if sign == 1:
            assert bool(result.gradients[first][5].isnan().all())


@pytest.mark.parametrize("variant", FUNCTIONS)
def test_results_do_not_change_from_run_to_run(variant: str) -> None:
    problem = problem_of(variant, rows=40, dtype=torch.bfloat16)
    first, second = evaluate(problem), evaluate(problem)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(g, second.gradients[name]) for name, g in first.gradients.items())


def test_float64_runs_portable() -> None:
    problem = problem_of("info_nce symmetric ids", dtype=torch.float64)
    got = evaluate(problem)
    with fastloss.use_backend("portable"):
        want = evaluate(problem)
    assert torch.equal(got.loss, want.loss)


def test_similarities_are_not_kept() -> None:
    x, scale = torch.randn(4, 3, device=DEVICE), torch.ones((), device=DEVICE)
    with pytest.raises(RuntimeError, match="keeps no similarities"):
        ops.similarity_lse_fwd(x, x, scale, None, None, None, False, False, 16)


def test_tuning_happens_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOSS_CACHE", str(tmp_path))
    monkeypatch.setattr(_triton, "_measured", {})
    monkeypatch.setattr(_triton, "_loaded", set())
    problem = problem_of("info_nce symmetric")
    want = evaluate(problem)
    assert not list(tmp_path.iterdir())
    with _triton.tuning():
        check(problem)
    (path,) = tmp_path.iterdir()
    assert {key.split()[0] for key in json.loads(path.read_text())} == {"lse", "grad"}
    # Another process would read the file.
    monkeypatch.setattr(_triton, "_measured", {})
    monkeypatch.setattr(_triton, "_loaded", set())
    torch.testing.assert_close(evaluate(problem).loss, want.loss)
    assert len(_triton._measured) == len(json.loads(path.read_text())) > 0


def test_float32_precision_is_named_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOSS_FLOAT32", "tf32")
    with pytest.raises(RuntimeError, match="must be 'tf32x3' or 'ieee', got 'tf32'"):
        evaluate(problem_of("info_nce symmetric"))
