"""The Triton kernels against the textbook formula in float64: on a GPU, or interpreted (see `tests/test_triton.py`).

The interpreter sorts slices of up to 16 numbers in a program, and longer ones by `torch.sort`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import _triton
from fastloss.sliced import ops
from fastloss.sliced import triton as kernels
from tests.support import assert_as_accurate_as_torch

reference = fastloss.reference
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what a mask leaves out
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LONGEST = _triton.pick(kernels._TABLE, torch.device(DEVICE)).blocks[1]
EDGES = [1, 2, 3, LONGEST // 2 - 1, LONGEST // 2, LONGEST // 2 + 1, LONGEST - 1, LONGEST, LONGEST + 1, 2 * LONGEST + 3]
POWERS = [1, 2, 1.5, 3]


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with fastloss.use_backend("triton"):
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def problem(n: int, m: int, slices: int = 5, batch: tuple[int, ...] = (), weighted: bool = False) -> dict[str, Tensor]:
    tensors = {"x": normal(*batch, n, 3), "y": normal(*batch, m, 3, seed=1), "projections": normal(slices, 3, seed=2)}
    if weighted:
        tensors |= {
            "x_weights": normal(*batch, n, seed=3).softmax(-1),
            "y_weights": normal(*batch, m, seed=4).softmax(-1),
        }
    return tensors


def value_and_gradients(loss: Any, tensors: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
    value = loss(**leaves, **options)
    weight = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64, device=DEVICE).reshape(value.shape)
    return [value.detach(), *torch.autograd.grad((value * weight).sum(), list(leaves.values()))]


def check(name: str, tensors: dict[str, Tensor], **options: Any) -> None:
    """Value and gradients are as near the reference in float64 as the reference in float32."""
    dtype = tensors["x"].dtype
    got = value_and_gradients(getattr(fastloss, name), tensors, dtype, **options)
    exact = {key: t.double() for key, t in tensors.items()}
    truth = value_and_gradients(getattr(reference, name), exact, torch.float64, **options)
    wide = torch.promote_types(dtype, torch.float32)
    plain = value_and_gradients(getattr(reference, name), {k: t.to(wide) for k, t in tensors.items()}, wide, **options)
    for key, g, t, b in zip(("value", *tensors), got, truth, plain, strict=True):
        # Pairs whose projections tie within rounding may swap: each moves a gradient by the difference it ties to.
        assert_as_accurate_as_torch(g, t, b.to(g.dtype), magnitude=float(truth[0].max()), name=f"{name} {key}")


@pytest.mark.parametrize("n", EDGES)
def test_atoms_at_every_edge(n: int) -> None:
    check(
        "sliced_wasserstein", problem(n, n), p=1 if n < 100 and n % 2 else 2
    )  # many atoms: signs near a tie may differ
    for p in POWERS:
        tensors = problem(n, n)
        with torch.no_grad():  # keys are sorted without their indices
            alone = fastloss.sliced_wasserstein(**tensors, p=p)
        truth = reference.sliced_wasserstein(**{k: t.double() for k, t in tensors.items()}, p=p)
        plain = reference.sliced_wasserstein(**tensors, p=p)
        assert_as_accurate_as_torch(alone, truth, plain)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("n", [16, 17])
def test_powers(n: int, p: float) -> None:
    check("sliced_wasserstein", problem(n, n), p=p, root=True)


@pytest.mark.parametrize("slices", [1, 2, 3, 4, 5, 17])
def test_slices_at_every_edge(slices: int) -> None:
    """Programs take four slices of 16 atoms under the interpreter."""
    check("sliced_wasserstein", problem(16, 16, slices))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [20, 13])
def test_other_dtypes(m: int, dtype: torch.dtype) -> None:
    check("sliced_wasserstein", {name: t.to(dtype) for name, t in problem(20, m).items()})


@pytest.mark.parametrize("n", [LONGEST + 1, LONGEST + 8, 3 * LONGEST])
def test_tiles_of_long_slices(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_TILE", 8)
    check("sliced_wasserstein", problem(n, n))


@pytest.mark.parametrize(("n", "m", "p"), [(1, 1, 1), (1, 7, 2), (16, 16, 1), (17, 9, 1.5), (LONGEST + 1, LONGEST, 2)])
def test_weights_and_unequal_sizes(n: int, m: int, p: float) -> None:
    check("sliced_wasserstein", problem(n, m, weighted=True), p=p)
    check("sliced_wasserstein", problem(n, m), p=p)


@pytest.mark.parametrize("m", [16, 11])
def test_blocks_and_batches(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels._Epilogue, "block_bytes", 6 * 4 * (16 + m))  # six slices, the last block ragged
    check("sliced_wasserstein", problem(16, m, slices=15, batch=(2,)), reduction="none")


@pytest.mark.parametrize("loss", ["energy_sliced_wasserstein", "sliced_gromov_wasserstein"])
def test_costs_of_slices(loss: str) -> None:
    check(loss, problem(16, 16))


def test_all_pairs() -> None:
    tensors = {"xs": normal(3, 16, 4), "projections": normal(5, 4, seed=2)}
    results = []
    for matrix, dtype in (
        (fastloss.sliced_wasserstein_matrix, torch.float32),
        (reference.sliced_wasserstein_matrix, torch.float64),
        (reference.sliced_wasserstein_matrix, torch.float32),
    ):
        leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
        value = matrix(**leaves)
        results.append([value.detach(), torch.autograd.grad(value.sum(), leaves["xs"])[0]])
    for got, truth, plain in zip(*results, strict=True):
        assert_as_accurate_as_torch(got, truth, plain, magnitude=float(results[1][0].max()))


ROWS = {
    "normal": lambda n: normal(n),
    "duplicates": lambda n: normal(n).round(),
    "one value": lambda n: normal(1).expand(n),
    "signed zeros": lambda n: torch.where(normal(n) > 0, 0.0, -0.0),
    "infinities": lambda n: torch.where(normal(n).abs() > 1, normal(n) * torch.inf, normal(n).round()),
    "denormals": lambda n: normal(n) * 1e-40,
    "whole range": lambda n: normal(n).sign() * 10 ** normal(n, seed=1).mul(10).clamp(-37, 38),
    "descending": lambda n: torch.arange(float(n), 0, -1, device=DEVICE),
}


@pytest.mark.parametrize("n", [14, LONGEST + 1])
@pytest.mark.parametrize("name", ROWS)
def test_rows_sort_as_torch_sorts_them(name: str, n: int) -> None:
    rows = torch.stack([ROWS[name](n), ROWS[name](n).flip(0), -ROWS[name](n)])
    expected, index = (t.to(DEVICE) for t in rows.cpu().sort(dim=1, stable=True))
    values, order = kernels._epilogue.sort(rows.contiguous())
    assert torch.equal(values, expected)
    assert torch.equal(order.long(), index), "stable"


@pytest.mark.parametrize("n", [14, 16, LONGEST + 1])
def test_nan_is_nan_throughout_its_row_only(n: int) -> None:
    rows = normal(3, n)
    rows[1, n // 2] = torch.nan
    rows[1, 0] = -torch.nan
    values, order = kernels._epilogue.sort(rows)
    assert values.isnan().all(1).tolist() == [False, True, False]
    assert not values[::2].isnan().any()
    assert torch.equal(order[1], torch.arange(n, dtype=torch.int32, device=DEVICE))
    assert torch.equal(values[2], rows[2].sort()[0])


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("n", [16, LONGEST + 1])
@pytest.mark.parametrize("side", ["x", "y"])
def test_nan_in_a_cloud_is_nan_in_its_loss_and_gradients_only(side: str, n: int, p: float) -> None:
    tensors = problem(n, n, slices=2, batch=(2,))
    tensors[side][0, n // 2, 1] = torch.nan
    del tensors["projections"]
    value, *gradients = value_and_gradients(
        fastloss.sliced_wasserstein, tensors, torch.float32, n_projections=2, p=p, reduction="none"
    )
    for t in (value, *gradients):
        assert bool(t[0].isnan().all())
        assert bool(t[1].isfinite().all())
    with torch.no_grad():
        alone = fastloss.sliced_wasserstein(**tensors, n_projections=2, p=p, reduction="none")
    assert alone.isnan().tolist() == [True, False]


def test_the_largest_nan_stays_in_its_row() -> None:
    """Padding sorts after it: no gradient goes beyond the row's end."""
    buffers = normal(2, 3, 14)
    u, v = buffers[:, :2]
    u.view(torch.int32)[1, 3] = 0x7FFFFFFF
    factor, cost = torch.ones(2, 2, dtype=torch.float64, device=DEVICE)
    want = buffers.clone()
    want[:, 1] = torch.nan
    d = u[0].sort()[0] - v[0].sort()[0]
    for side, sign in ((0, 1), (1, -1)):
        want[side, 0, buffers[side, 0].argsort()] = sign * 2 * d / 14
    kernels._pair(u, v, 2.0, factor, cost, True, True)
    assert cost.isnan().tolist() == [False, True]
    torch.testing.assert_close(buffers, want, equal_nan=True)


@pytest.mark.parametrize("p", POWERS)
def test_identical_clouds_give_zero_and_gradient_zero(p: float) -> None:
    tensors = problem(16, 16)
    tensors["y"] = tensors["x"].clone()
    for t in value_and_gradients(fastloss.sliced_wasserstein, tensors, torch.float32, p=p):
        assert torch.equal(t, torch.zeros_like(t))


def test_results_do_not_change_from_run_to_run() -> None:
    for n in (16, LONGEST + 1):
        first, second = (value_and_gradients(fastloss.sliced_wasserstein, problem(n, n), torch.float32) for _ in "ab")
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["_sort_kernel", "_pair_kernel"])
def test_it_is_these_kernels_that_ran(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails:
        def __getitem__(self, grid: object) -> Any:
            raise AssertionError("reached")

    monkeypatch.setattr(kernels, name, Fails())
    with pytest.raises(AssertionError, match="reached"):
        fastloss.sliced_wasserstein(**problem(8, 8))
    ops.sort_slices(normal(LONGEST + 1, 3), normal(2, 3))  # not by these
