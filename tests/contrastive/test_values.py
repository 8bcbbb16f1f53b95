"""Values and gradients against the dense formula in float64, within the error of the same formula in plain torch."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastloss
import fastloss.reference
from fastloss.contrastive import ops
from tests.contrastive.problems import (
    DTYPES,
    REDUCED,
    VARIANTS,
    Problem,
    accumulation_dtype,
    check,
    compare,
    evaluate,
    make_problem,
)
from tests.support import blas_repeats

pytestmark = pytest.mark.usefixtures("backend")

# One below, at and above the edges of the kernels' vectors, inner blocks (32 rows, 256 columns) and tiles (512, 1024).
EDGES = [1, 2, 31, 32, 33, 255, 256, 257, 511, 512, 513, 1023, 1025]
FUNCTIONS = ["info_nce mean", "info_nce symmetric", "clip_loss", "nt_xent"]
KEY_MODES = ["info_nce extra", "info_nce unpaired", "info_nce symmetric", "nt_xent"]
DOT_PRODUCTS = [
    *(f"info_nce dot {mode}" for mode in ("", "mean", "symmetric", "symmetric mean", "extra", "unpaired", "paired")),
    "clip_loss",
    "clip_loss mean",
    "nt_xent dot",
    "nt_xent dot mean",
]
FUNCTIONS_AND_MODES = [*FUNCTIONS, "info_nce unpaired", "info_nce paired", "info_nce extra"]


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def strided(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def offset(x: Tensor) -> Tensor:
    """Rows that are contiguous but neither adjacent nor aligned."""
    padded = torch.full((*x.shape[:-1], x.shape[-1] + 3), math.nan, dtype=x.dtype)
    padded[..., 1:-2] = x
    return padded[..., 1:-2]


def expanded(x: Tensor) -> Tensor:
    """All rows are one row of memory."""
    return x[:1].expand_as(x)


class TestModesAndDtypes:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("variant", [*VARIANTS, *REDUCED])
    def test_every_mode(self, variant: str, dtype: torch.dtype) -> None:
        check(make_problem(variant, rows=65, columns=40, dtype=dtype))

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("variant", FUNCTIONS_AND_MODES)
    def test_reductions(self, variant: str, reduction: str) -> None:
        check(make_problem(variant, dtype=torch.float64).with_options(reduction=reduction))

    @pytest.mark.parametrize("variant", FUNCTIONS_AND_MODES)
    def test_features_of_different_dtypes_are_promoted(self, variant: str) -> None:
        problem = make_problem(variant)
        name = next(iter(problem.features))
        mixed = problem.with_tensors(**{name: problem.tensors[name].bfloat16()})
        check(mixed)


class TestSizes:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("rows", EDGES)
    @pytest.mark.parametrize("variant", ["info_nce symmetric ids", "info_nce mean ids", "clip_loss", "nt_xent"])
    def test_square(self, variant: str, rows: int, dtype: torch.dtype) -> None:
        check(make_problem(variant, rows=rows, dtype=dtype))

    @pytest.mark.parametrize("variant", ["info_nce unpaired", "info_nce extra extra_ids", "info_nce paired"])
    @pytest.mark.parametrize("rows", EDGES)
    def test_rows(self, variant: str, rows: int) -> None:
        check(make_problem(variant, rows=rows, columns=7))

    @pytest.mark.parametrize("variant", ["info_nce unpaired key_ids row_temperature", "info_nce extra"])
    @pytest.mark.parametrize("columns", [0, *EDGES])
    def test_columns(self, variant: str, columns: int) -> None:
        check(make_problem(variant, rows=35, columns=columns))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("width", [1, 3, 64, 129])
    @pytest.mark.parametrize(
        "variant", ["info_nce symmetric", "info_nce mean", "info_nce unpaired dot", "clip_loss", "nt_xent"]
    )
    def test_width(self, variant: str, width: int, dtype: torch.dtype) -> None:
        check(make_problem(variant, rows=40, width=width, dtype=dtype))

    @pytest.mark.parametrize("fifths", [2, 3, 5])
    @pytest.mark.parametrize("variant", ["info_nce symmetric ids row_temperature", "clip_loss"])
    def test_similarities_that_are_not_kept(self, variant: str, fifths: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Room for two fifths keeps none; what the backward pass does not find, it computes again."""
        rows = 2930  # 33 MiB, more than the panel of both directions
        monkeypatch.setattr(ops, "KEEP_BYTES", 4 * rows**2 * fifths // 5)
        check(make_problem(variant, rows=rows, width=3))

    def test_larger_than_any_panel(self) -> None:
        check(make_problem("nt_xent ids", rows=2100, width=3))

    @pytest.mark.parametrize(("rows", "width"), [(4400, 2), (70, 65536)])
    def test_reduced_beyond_its_buffers(self, rows: int, width: int) -> None:
        """Rows of which 1024 no longer fit the panel of similarities; gradients too large to wait for backward."""
        check(make_problem("info_nce mean ids", rows=rows, width=width))

    def test_large_unpaired(self) -> None:
        check(make_problem("info_nce unpaired key_ids row_temperature", rows=1030, columns=4100, width=3))


class TestEmpty:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("variant", [*VARIANTS, *REDUCED])
    def test_no_rows(self, variant: str, dtype: torch.dtype) -> None:
        problem = make_problem(variant, rows=0, columns=5, dtype=dtype)
        assert problem(fastloss, reduction="none").shape == (0,)
        mean = problem(fastloss, reduction="mean")
        assert mean.isnan()
        assert mean.dtype == accumulation_dtype(dtype)
        total = evaluate(problem.with_options(reduction="sum"))
        assert float(total.loss) == 0
        for name, gradient in total.gradients.items():
            assert torch.equal(gradient, torch.zeros_like(problem.tensors[name])), name

    @pytest.mark.parametrize("variant", [*VARIANTS, *REDUCED])
    def test_one_row(self, variant: str) -> None:
        check(make_problem(variant, rows=1, columns=5))

    @pytest.mark.parametrize("variant", ["info_nce unpaired", "info_nce paired", "info_nce extra"])
    def test_no_negatives(self, variant: str) -> None:
        check(make_problem(variant, columns=0))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "variant",
        [
            "info_nce ids",
            "info_nce mean ids",
            "info_nce symmetric ids",
            "info_nce extra extra_ids",
            "clip_loss ids",
            "nt_xent ids",
        ],
    )
    def test_all_negatives_left_out(self, variant: str, dtype: torch.dtype) -> None:
        problem = make_problem(variant, dtype=dtype)
        same = {name: torch.full_like(x, 3) for name, x in problem.options.items() if name.endswith("ids")}
        result = check(problem.with_options(**same))
        assert torch.count_nonzero(result.loss) == 0
        assert all(torch.count_nonzero(gradient) == 0 for gradient in result.gradients.values())

    @pytest.mark.parametrize("variant", ["info_nce unpaired key_ids", "info_nce paired key_ids"])
    def test_all_explicit_negatives_left_out(self, variant: str) -> None:
        problem = make_problem(variant)
        same = {name: torch.full_like(problem.options[name], 3) for name in ("query_ids", "key_ids")}
        assert torch.count_nonzero(check(problem.with_options(**same)).loss) == 0


class TestLayouts:
    @pytest.mark.parametrize("layout", [transposed, strided, offset, expanded])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("variant", [*FUNCTIONS_AND_MODES, "info_nce unpaired dot", "nt_xent dot"])
    def test_non_contiguous(self, variant: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        problem = make_problem(variant, rows=37, columns=21, dtype=dtype)
        # One argument at a time: a kernel could handle the one and not the other.
        for name, x in problem.features.items():
            changed = layout(x)
            assert layout is expanded or torch.equal(changed, x)
            check(problem.with_tensors(**{name: changed}))

    def test_expanded_temperature(self) -> None:
        check(make_problem("info_nce symmetric").with_tensors(temperature=torch.tensor(0.2).expand(33)))

    @pytest.mark.parametrize("variant", FUNCTIONS_AND_MODES)
    def test_scale_of_one_element(self, variant: str) -> None:
        problem = make_problem(variant)
        name = "logit_scale" if variant == "clip_loss" else "temperature"
        value = problem.tensors[name]
        for shape in ((1,), (1, 1), (1, 1, 1)):
            assert torch.equal(problem(fastloss, {**problem.tensors, name: value.reshape(shape)}), problem(fastloss))
        check(problem.with_tensors(**{name: value.reshape(1, 1)}))

    @pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64, Fraction, int], ids=str)
    @pytest.mark.parametrize("variant", FUNCTIONS)
    def test_numbers_of_other_types(self, variant: str, kind: Callable[[int], Any]) -> None:
        problem = make_problem(variant)
        name = "logit_scale" if variant == "clip_loss" else "temperature"
        tensors = {key: x for key, x in problem.tensors.items() if key != name}
        assert torch.equal(problem(fastloss, tensors, **{name: kind(2)}), problem(fastloss, tensors, **{name: 2.0}))

    def test_temperature_as_a_column(self) -> None:
        problem = make_problem("info_nce row_temperature")
        check(problem.with_tensors(temperature=problem.tensors["temperature"][:, None]))

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
    def test_integer_ids(self, dtype: torch.dtype) -> None:
        problem = make_problem("info_nce extra extra_ids")
        narrow = {name: problem.options[name].to(dtype) for name in ("query_ids", "key_ids")}
        assert torch.equal(problem(fastloss), problem.with_options(**narrow)(fastloss))

    def test_ids_beyond_32_bits_stay_apart(self) -> None:
        """Ids equal in their low 32 bits are different ids."""
        problem = make_problem("info_nce", rows=4)
        ids = torch.arange(4) << 32
        assert torch.equal(problem(fastloss), problem(fastloss, query_ids=ids))

    @pytest.mark.parametrize("variant", ["info_nce ids", "info_nce key_ids", "clip_loss ids", "nt_xent ids"])
    def test_strided_ids(self, variant: str) -> None:
        problem = make_problem(variant)
        wide = {name: torch.stack([x, x + 1], 1)[:, 0] for name, x in problem.options.items() if name.endswith("ids")}
        assert torch.equal(problem(fastloss), problem(fastloss, **wide))


class TestPartialGradients:
    @pytest.mark.parametrize("variant", [*FUNCTIONS_AND_MODES, "info_nce extra symmetric ids row_temperature"])
    def test_each_gradient_alone(self, variant: str) -> None:
        problem = make_problem(variant)
        for name in problem.tensors:
            check(problem, requires_grad=[name])

    @pytest.mark.parametrize("variant", FUNCTIONS_AND_MODES)
    def test_all_but_one(self, variant: str) -> None:
        problem = make_problem(variant)
        for name in problem.tensors:
            check(problem, requires_grad=set(problem.tensors) - {name})

    @pytest.mark.parametrize("variant", FUNCTIONS_AND_MODES)
    def test_no_gradient(self, variant: str) -> None:
        problem = make_problem(variant)
        loss = problem(fastloss)
        assert not loss.requires_grad
        with torch.no_grad():
            leaves = {name: x.detach().requires_grad_() for name, x in problem.tensors.items()}
            assert not problem(fastloss, leaves).requires_grad
        assert torch.equal(loss, evaluate(problem).loss)

    @pytest.mark.parametrize("variant", FUNCTIONS_AND_MODES)
    def test_no_upstream_gradient(self, variant: str) -> None:
        """A loss that is multiplied by zero leaves gradients of zero."""
        problem = make_problem(variant)
        leaves = {name: x.clone().requires_grad_() for name, x in problem.tensors.items()}
        (0 * problem(fastloss, leaves)).sum().backward()
        assert all(torch.count_nonzero(leaf.grad) == 0 for leaf in leaves.values())

    @pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
    @pytest.mark.parametrize(("upstream", "length"), [(2.0**17, 64.0), (2.0**-13, 1 / 64)])
    @pytest.mark.parametrize("variant", ["info_nce", "info_nce symmetric", "info_nce unpaired", "nt_xent"])
    def test_upstream_outside_the_range_of_float16(
        self, variant: str, upstream: float, length: float, reduction: str
    ) -> None:
        """Loss scaling multiplies by 2^16 and more, loss weights by little: only the product has to be a float16.

        The gradient of rows of `length` is divided by it, so that the product is in the middle of the range.
        """
        problem = make_problem(variant, rows=8, dtype=torch.float16, temperature=1.0).with_options(reduction=reduction)
        name = next(iter(problem.features))
        gradients = []
        for api, dtype in ((fastloss, torch.float16), (fastloss.reference, torch.float32)):
            leaf = (problem.tensors[name] * length).to(dtype).requires_grad_()
            features = {key: x.to(dtype) for key, x in problem.features.items()}
            loss = problem(api, {**problem.tensors, **features, name: leaf})
            (loss.float() * upstream).sum().backward()
            gradients.append(leaf.grad.double())
        largest = float(gradients[1].abs().max())
        assert 2**-13 < largest < 2**14
        # Rounded to float16 up to three times: two parts of a sum, the scaled result.
        assert float((gradients[0] - gradients[1]).abs().max()) <= 1.5 * torch.finfo(torch.float16).eps * largest

    @pytest.mark.parametrize("variant", FUNCTIONS_AND_MODES)
    def test_backward_twice_with_retain_graph(self, variant: str) -> None:
        problem = make_problem(variant)
        leaves = {name: x.clone().requires_grad_() for name, x in problem.tensors.items()}
        loss = problem(fastloss, leaves).sum()
        first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        second = torch.autograd.grad(loss, list(leaves.values()))
        for name, a, b in zip(leaves, first, second, strict=True):
            assert torch.equal(a, b), name

    @pytest.mark.parametrize("variant", FUNCTIONS_AND_MODES)
    def test_inputs_are_left_alone(self, variant: str) -> None:
        problem = make_problem(variant)
        before = {name: x.clone() for name, x in problem.tensors.items()}
        evaluate(problem)
        for name, x in problem.tensors.items():
            assert torch.equal(x, before[name]), name

    def test_one_tensor_in_both_arguments(self) -> None:
        x = make_problem("info_nce").tensors["query"].double()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        fastloss.info_nce(a, a).backward()
        fastloss.reference.info_nce(b, b).backward()
        torch.testing.assert_close(a.grad, b.grad)


class TestRanges:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("temperature", [0.005, 0.05, 10.0])
    @pytest.mark.parametrize("variant", FUNCTIONS_AND_MODES)
    def test_temperatures(self, variant: str, temperature: float, dtype: torch.dtype) -> None:
        check(make_problem(variant, dtype=dtype, temperature=temperature))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("variant", FUNCTIONS_AND_MODES)
    def test_planted_identical_pairs(self, variant: str, dtype: torch.dtype) -> None:
        """Half of the rows meet their exact copy, at the sharpest temperature in use."""
        problem = make_problem(variant, rows=64, dtype=dtype, temperature=0.005)
        first, second = list(problem.features)[:2]
        planted = problem.tensors[second].clone()
        planted[::2] = problem.tensors[first][::2]
        check(problem.with_tensors(**{second: planted}))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "variant", ["info_nce dot", "info_nce mean dot", "info_nce unpaired dot", "info_nce paired dot", "nt_xent dot"]
    )
    def test_long_vectors_without_normalization(self, variant: str, dtype: torch.dtype) -> None:
        """Norm 100 at temperature 1: logits up to 10,000."""
        problem = make_problem(variant, dtype=dtype, temperature=1.0)
        check(problem.with_tensors(**{name: 100 * x for name, x in problem.features.items()}))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, -3.0])
    def test_logit_scale(self, scale: float, dtype: torch.dtype) -> None:
        """100 is where CLIP clamps it; nothing forbids a zero or negative one."""
        problem = make_problem("clip_loss", rows=64, dtype=dtype)
        given = torch.full_like(problem.tensors["logit_scale"], scale)
        tensors = {**problem.tensors, "logit_scale": given}
        magnitude = problem.with_tensors(logit_scale=given.abs().clamp_min(1))  # for the tolerance
        results = [
            evaluate(Problem("clip_loss", tensors, problem.options)),
            evaluate(Problem("clip_loss", tensors, problem.options), fastloss.reference, leaf_dtype=torch.float64),
            evaluate(
                Problem("clip_loss", tensors, problem.options),
                fastloss.reference,
                compute_dtype=accumulation_dtype(dtype),
            ),
        ]
        compare(magnitude, *results)

    @pytest.mark.parametrize(
        "variant", ["info_nce", "info_nce mean", "info_nce symmetric", "info_nce unpaired", "nt_xent"]
    )
    def test_lengths_do_not_matter_when_normalized(self, variant: str) -> None:
        """Rows from 1e-15 (under the epsilon of the norm) to 1e15."""
        problem = make_problem(variant, rows=31, dtype=torch.float64)
        name = next(iter(problem.features))
        lengths = torch.logspace(-15, 15, 31, dtype=torch.float64)[:, None]
        changed = problem.with_tensors(**{name: problem.tensors[name] * lengths})
        actual, truth = evaluate(changed), evaluate(changed, fastloss.reference)
        torch.testing.assert_close(actual.loss, truth.loss, rtol=1e-12, atol=0)
        # Gradients scale with 1 / length: compare them row by row.
        torch.testing.assert_close(
            actual.gradients[name] * lengths, truth.gradients[name] * lengths, rtol=1e-11, atol=1e-13
        )

    @pytest.mark.parametrize(
        ("dtype", "longest", "smallest"),
        [(torch.float32, 1.8e19, 2.6e-23), (torch.bfloat16, 1.8e19, 2.6e-23), (torch.float64, 1.3e154, 1.6e-162)],
        ids=str,
    )
    @pytest.mark.parametrize("variant", ["info_nce", "info_nce mean", "info_nce paired", "nt_xent"])
    def test_squares_beyond_the_range_make_zeros(
        self, variant: str, dtype: torch.dtype, longest: float, smallest: float
    ) -> None:
        problem = make_problem(variant, rows=9, dtype=dtype)
        name = next(iter(problem.features))
        x = problem.tensors[name].double()
        long, short = longest * x / x.norm(dim=1, keepdim=True), smallest * x / x.abs().amax(1, keepdim=True)
        zeros = evaluate(problem.with_tensors(**{name: torch.zeros_like(problem.tensors[name])}))
        for rows, outside in ((1.05 * long, True), (0.95 * long, False), (1.05 * short, False), (0.95 * short, True)):
            result = evaluate(problem.with_tensors(**{name: rows.to(dtype)}))
            same = torch.equal(result.gradients[name], zeros.gradients[name]) and torch.equal(result.loss, zeros.loss)
            assert same == outside
        assert torch.count_nonzero(zeros.gradients[name]) == 0

    @pytest.mark.parametrize(
        "variant", ["info_nce", "info_nce mean", "info_nce unpaired", "info_nce paired", "nt_xent"]
    )
    def test_all_rows_beyond_the_range(self, variant: str) -> None:
        """Their products overflow, too."""
        problem = make_problem(variant, rows=9, dtype=torch.float32)
        long, zeros = (
            evaluate(problem.with_tensors(**{name: factor * x for name, x in problem.features.items()}))
            for factor in (1e25, 0.0)
        )
        assert torch.equal(long.loss, zeros.loss)
        for name in problem.features:
            assert torch.count_nonzero(long.gradients[name]) == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("variant", [*FUNCTIONS_AND_MODES, "info_nce extra symmetric ids"])
    def test_zero_rows(self, variant: str, dtype: torch.dtype) -> None:
        """A zero row is a zero vector with zero gradient; the other rows are as accurate as ever."""
        problem = make_problem(variant, dtype=dtype)
        for name, x in problem.features.items():
            zeroed = x.clone()
            zeroed[:3] = 0
            changed = problem.with_tensors(**{name: zeroed})
            actual = check(changed)
            assert all(bool(g.isfinite().all()) for g in actual.gradients.values())
            if changed.options.get("normalize", True) and changed.function != "clip_loss":
                assert torch.count_nonzero(actual.gradients[name][:3]) == 0

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("variant", FUNCTIONS_AND_MODES)
    def test_all_rows_zero(self, variant: str, dtype: torch.dtype) -> None:
        problem = make_problem(variant, dtype=dtype)
        check(problem.with_tensors(**{name: torch.zeros_like(x) for name, x in problem.features.items()}))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("variant", ["info_nce", "info_nce mean", "info_nce symmetric", "clip_loss", "nt_xent"])
    def test_hardest_positives(self, variant: str, dtype: torch.dtype) -> None:
        """Opposite positives: the loss is more than 1 / T = 50, and a float16 logarithm would saturate at 9.7."""
        x = torch.nn.functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(1)), dim=1)
        problem = make_problem(variant, rows=40, dtype=dtype, temperature=0.02)
        first, second = problem.features
        opposite = problem.with_tensors(**{first: x.to(dtype), second: -x.to(dtype)})
        result = check(opposite)
        assert float(result.loss.min()) > 50
        assert all(torch.count_nonzero(g) > 0 for name, g in result.gradients.items() if name in problem.features)

    @pytest.mark.parametrize("variant", ["info_nce", "info_nce mean", "info_nce symmetric", "clip_loss", "nt_xent"])
    def test_nearly_solved_losses_are_precise(self, variant: str) -> None:
        """Orthonormal pairs at T = 0.05: the loss is (B - 1 or 2B - 2) exp(-20), about 1e-8, and has relative accuracy.

        A difference of two float32 logarithms would be a multiple of 1e-7: no digit of it would be right.
        """
        rows = 16
        negatives = 2 * rows - 2 if variant == "nt_xent" else rows - 1
        problem = make_problem(variant, rows=rows, width=rows, temperature=0.05)
        first, second = problem.features
        solved = problem.with_tensors(**{first: torch.eye(rows), second: torch.eye(rows)})
        expected = math.log1p(negatives * math.exp(-20))
        actual = evaluate(solved)
        # The exponent 20 / ln 2 is rounded to float32 once or twice: that is the relative error of the exponential.
        tolerance = 4 * 20 * torch.finfo(torch.float32).eps
        assert float((actual.loss.double() / expected - 1).abs().max()) <= tolerance
        truth = evaluate(solved, fastloss.reference, leaf_dtype=torch.float64)
        for name, gradient in truth.gradients.items():
            error = (actual.gradients[name].double() - gradient).abs().max() / gradient.abs().max()
            assert float(error) <= tolerance, name


class TestNonFinite:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
    @pytest.mark.parametrize(
        "variant", ["info_nce", "info_nce mean", "info_nce extra", "info_nce unpaired", "info_nce paired"]
    )
    def test_bad_query_spoils_its_own_loss_only(self, variant: str, bad: float, dtype: torch.dtype) -> None:
        problem = make_problem(variant, dtype=dtype)
        clean = evaluate(problem)
        query = problem.tensors["query"].clone()
        query[5, 2] = bad
        spoilt = evaluate(problem.with_tensors(query=query))
        others = torch.arange(len(query)) != 5
        if spoilt.loss.dim():
            assert spoilt.loss[5].isnan()
            assert torch.equal(spoilt.loss[others], clean.loss[others])
        else:
            assert spoilt.loss.isnan()
        assert spoilt.gradients["query"][5].isnan().all()
        assert torch.equal(spoilt.gradients["query"][others], clean.gradients["query"][others])

    # Without normalisation an infinite key may be infinitely far away, which is a finite loss: NaN only.
    @pytest.mark.parametrize(
        ("variant", "bad"),
        [
            *((mode, bad) for mode in KEY_MODES for bad in (math.nan, math.inf)),
            ("clip_loss", math.nan),
            ("info_nce unpaired dot", math.nan),
        ],
    )
    def test_bad_key_spoils_every_loss_that_uses_it(self, variant: str, bad: float) -> None:
        problem = make_problem(variant)
        for name in set(problem.features) - {"query", "positive_key"} or {"positive_key"}:
            key = problem.tensors[name].clone()
            key[5, 2] = bad
            loss = evaluate(problem.with_tensors(**{name: key})).loss
            assert not loss.isfinite().any()

    def test_bad_paired_key_spoils_its_row_only(self) -> None:
        problem = make_problem("info_nce paired")
        keys = problem.tensors["negative_keys"].clone()
        keys[5, 3, 2] = math.nan
        spoilt, clean = problem.with_tensors(negative_keys=keys)(fastloss), problem(fastloss)
        others = torch.arange(len(keys)) != 5
        assert spoilt[5].isnan()
        assert torch.equal(spoilt[others], clean[others])

    @pytest.mark.parametrize("variant", [*VARIANTS, *REDUCED])
    def test_inf_and_nan_do_not_crash(self, variant: str) -> None:
        problem = make_problem(variant)
        for name, x in problem.tensors.items():
            for bad in (math.nan, math.inf, -math.inf):
                changed = x.clone()
                changed.view(-1)[0] = bad
                result = evaluate(problem.with_tensors(**{name: changed}))
                assert result.loss.shape == problem(fastloss).shape

    @pytest.mark.parametrize("length", [2e19, math.inf], ids=["overflow", "infinite"])
    @pytest.mark.parametrize("variant", DOT_PRODUCTS)
    def test_infinite_similarity_of_a_positive(self, variant: str, length: float) -> None:
        """+inf: exp(inf) / (exp(inf) + ...) is NaN, loss and gradients. -inf: the probability is 0, the loss +inf."""
        problem = make_problem(variant)
        first, second = list(problem.features)[:2]
        anchor, key = problem.tensors[first].clone(), problem.tensors[second].clone()
        anchor[5], key[5] = 0, 0
        anchor[5, 0], key[5, 0] = min(length, 1e30), length
        for sign, rule in ((1, Tensor.isnan), (-1, lambda loss: loss == math.inf)):
            given = problem.with_tensors(**{first: anchor, second: sign * key})
            result = evaluate(given)
            assert bool(rule(result.loss if result.loss.dim() == 0 else result.loss[5]))
            reference = evaluate(given, fastloss.reference).loss
            assert torch.equal(result.loss.isnan(), reference.isnan())
            assert torch.equal(result.loss == math.inf, reference == math.inf)
            if sign == 1:
                assert bool(result.gradients[first][5].isnan().all())

    @pytest.mark.parametrize("variant", FUNCTIONS)
    def test_nan_temperature_is_nan(self, variant: str) -> None:
        problem = make_problem(variant)
        name = "logit_scale" if variant == "clip_loss" else "temperature"
        assert problem(fastloss, {**problem.tensors, name: torch.tensor(math.nan)}).isnan().all()


class TestPerRowTemperature:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("mode", ["", "mean", "symmetric", "unpaired", "paired", "extra", "extra symmetric ids"])
    def test_gradients(self, mode: str, dtype: torch.dtype) -> None:
        check(make_problem(f"info_nce row_temperature {mode}", rows=70, dtype=dtype))

    def test_equal_temperatures_are_one_temperature(self) -> None:
        problem = make_problem("info_nce symmetric", dtype=torch.float64)
        rows = torch.full((33,), float(problem.tensors["temperature"]), dtype=torch.float64)
        torch.testing.assert_close(problem(fastloss), problem(fastloss, {**problem.tensors, "temperature": rows}))

    @pytest.mark.parametrize("variant", FUNCTIONS_AND_MODES)
    def test_float_is_the_zero_dim_tensor(self, variant: str) -> None:
        problem = make_problem(variant, temperature=0.25)
        name = "logit_scale" if variant == "clip_loss" else "temperature"
        value = float(problem.tensors[name])
        tensors = {key: x for key, x in problem.tensors.items() if key != name}
        assert torch.equal(problem(fastloss), problem(fastloss, tensors, **{name: value}))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_gradient_has_the_dtype_of_the_temperature(self, dtype: torch.dtype) -> None:
        problem = make_problem("info_nce")
        result = evaluate(problem.with_tensors(temperature=torch.tensor(0.125, dtype=dtype)))
        assert result.gradients["temperature"].dtype == dtype
        assert result.loss.dtype == torch.float32


class TestEnvironment:
    @pytest.fixture
    def threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        yield
        torch.set_num_threads(before)

    @pytest.mark.usefixtures("threads")
    @pytest.mark.parametrize("rows", [33, 700, 1100])
    @pytest.mark.parametrize("variant", [*FUNCTIONS_AND_MODES, "info_nce symmetric row_temperature ids"])
    def test_same_bits_for_any_number_of_threads(self, variant: str, rows: int) -> None:
        problem = make_problem(variant, rows=rows, columns=60 if "paired" in variant.split() else 600)
        repeats = blas_repeats()
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(evaluate(problem))
        assert torch.equal(results[0].loss, results[1].loss)
        for name, gradient in results[0].gradients.items():
            if repeats:
                assert torch.equal(gradient, results[1].gradients[name]), name
            else:
                torch.testing.assert_close(gradient, results[1].gradients[name])

    @pytest.mark.parametrize("variant", [*FUNCTIONS_AND_MODES, "info_nce unpaired dot"])
    @pytest.mark.parametrize("features", [torch.float32, torch.bfloat16], ids=str)
    def test_autocast(self, variant: str, features: torch.dtype) -> None:
        """Under autocast the results are no worse than outside it: the loss is computed in float32 either way."""
        problem = make_problem(variant, dtype=features)
        check(problem, evaluate(problem, forward=torch.autocast("cpu", torch.bfloat16)))

    @pytest.mark.parametrize("variant", FUNCTIONS_AND_MODES)
    def test_backward_under_autocast(self, variant: str) -> None:
        """torch advises against it, but it is a common mistake, and must not round the gradients to bfloat16."""
        problem = make_problem(variant)
        with torch.autocast("cpu", torch.bfloat16):
            actual = evaluate(problem)
        check(problem, actual)

    @pytest.mark.parametrize("variant", FUNCTIONS)
    def test_autocast_of_a_model(self, variant: str) -> None:
        """The features of a linear layer under autocast are bfloat16; its float32 weights receive their gradient."""
        problem = make_problem(variant)
        layer = torch.nn.Linear(16, 16)
        first = next(iter(problem.features))
        with torch.autocast("cpu", torch.bfloat16):
            features = layer(problem.tensors[first])
            assert features.dtype == torch.bfloat16
            loss = problem(fastloss, {**problem.tensors, first: features}, reduction="mean")
        assert loss.dtype == torch.float32
        loss.backward()
        assert layer.weight.grad.dtype == torch.float32
        assert bool(layer.weight.grad.isfinite().all())
        assert torch.count_nonzero(layer.weight.grad) > 0

    @pytest.mark.parametrize("variant", FUNCTIONS_AND_MODES)
    def test_inference_mode(self, variant: str) -> None:
        problem = make_problem(variant)
        with torch.inference_mode():
            loss = problem(fastloss)
        assert torch.equal(loss, evaluate(problem).loss)
