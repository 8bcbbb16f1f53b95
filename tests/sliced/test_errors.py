"""Every documented error, by its text, before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastloss

X = torch.zeros(3, 2)
W = torch.full((3,), 1 / 3)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"p": 0.5}, ValueError, "`p` must be finite and at least 1, got 0.5"),
        ({"p": "2"}, TypeError, "`p` must be a number, got str"),
        ({"x": [1.0]}, TypeError, "`x` must be a tensor of shape (..., points, d), got list"),
        ({"x": X.long()}, TypeError, "`x` must be float64, float32, bfloat16 or float16, got torch.int64"),
        ({"x": X[:0]}, ValueError, "`x` must have shape (..., points, d) with at least one point"),
        ({"y": torch.zeros(3, 4)}, ValueError, "`y` must have the width of `x`, 2, got 4"),
        ({"x_weights": 2 * W}, ValueError, "`x_weights` must sum to one (to 1e-04), got a sum of 2"),
        ({"x_weights": 0 * W}, ValueError, "`x_weights` must sum to one (to 1e-04), got a sum of 0"),
        ({"y_weights": torch.tensor([1.5, -0.5, 0])}, ValueError, "`y_weights` must not be negative, got -0.5"),
        ({"y_weights": W * torch.nan}, ValueError, "`y_weights` must be finite, got NaN or infinity"),
        ({"x_weights": W[:2]}, ValueError, "`x_weights` must have shape (..., 3), got (2,)"),
        ({"x_weights": W.long()}, TypeError, "`x_weights` must be a floating-point tensor, got torch.int64"),
        ({"x_weights": [1.0]}, TypeError, "`x_weights` must be a tensor of shape (..., 3), got list"),
        ({"n_projections": 0}, ValueError, "`n_projections` must be an integer >= 1, got 0"),
        ({"sampler": "grid"}, ValueError, "`sampler` must be 'random', 'orthogonal' or 'qmc', got 'grid'"),
        ({"projections": torch.ones(4, 3)}, ValueError, "`projections` must have shape (L, 2), L >= 1, got (4, 3)"),
        ({"projections": torch.tensor([[1.0, 0], [0, 0]])}, ValueError, "no row of zero norm, got zeros in row 1"),
        ({"projections": [1]}, TypeError, "`projections` must be a tensor of shape (L, 2), got list"),
        ({"projections": torch.ones(1, 2).long()}, TypeError, "`projections` must be a floating-point tensor"),
        ({"projections": torch.ones(1, 2), "streaming": True}, ValueError, "`projections` must be None with"),
        ({"reduction": "max"}, ValueError, "`reduction` must be 'none', 'sum' or 'mean', got 'max'"),
        ({"x": torch.zeros(2, 3, 2), "y": torch.zeros(4, 3, 2)}, ValueError, "must broadcast, got (2,), (4,)"),
        ({"x": X.to_sparse()}, TypeError, "`x` must be a dense tensor, got torch.sparse_coo"),
        ({"generator": 3}, TypeError, "`generator` must be None or a torch.Generator, got int"),
        ({"root": "yes"}, TypeError, "`root` must be True or False, got str"),
        ({"streaming": 1}, TypeError, "`streaming` must be True or False, got int"),
    ],
)
def test_sliced_wasserstein(options: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"x": X, "y": X, **options}
    with pytest.raises(error) as caught:
        fastloss.sliced_wasserstein(arguments.pop("x"), arguments.pop("y"), **arguments)
    assert text in str(caught.value)
    assert str(caught.value).startswith("sliced_wasserstein: ")


@pytest.mark.parametrize(
    ("function", "arguments", "options", "error", "text"),
    [
        ("max_sliced_wasserstein", (X, X), {"n_steps": -1}, ValueError, "`n_steps` must be an integer >= 0, got -1"),
        ("max_sliced_wasserstein", (X, X), {"step_size": 0.0}, ValueError, "`step_size` must be finite and greater"),
        ("max_sliced_wasserstein", (X, X), {"step_size": torch.inf}, ValueError, "`step_size` must be finite and gre"),
        ("max_sliced_wasserstein", (X, X), {"step_size": "a"}, TypeError, "`step_size` must be a float, got str"),
        ("max_sliced_wasserstein", (X, X), {"generator": "a"}, TypeError, "`generator` must be None or a torch.Gen"),
        ("max_sliced_wasserstein", (X, X), {"root": None}, TypeError, "`root` must be True or False, got NoneType"),
        ("max_sliced_wasserstein", (X, X), {"x_weights": W[None]}, ValueError, "must have shape (3,), got (1, 3)"),
        ("energy_sliced_wasserstein", (X, X), {"detach_weights": 1}, TypeError, "`detach_weights` must be True or"),
        ("energy_sliced_wasserstein", (X, X), {"root": 1}, TypeError, "`root` must be True or False, got int"),
        ("energy_sliced_wasserstein", (X, X), {"generator": 1}, TypeError, "`generator` must be None or a torch.Gen"),
        ("sliced_wasserstein_matrix", (X[None],), {"root": 1}, TypeError, "`root` must be True or False, got int"),
        ("sliced_wasserstein_distance", (X, X), {"log": 1}, TypeError, "`log` must be True or False, got int"),
        ("max_sliced_wasserstein_distance", (X, X), {"log": 1}, TypeError, "`log` must be True or False, got int"),
        ("sliced_wasserstein_distance", (X, X), {"seed": 2**64}, ValueError, "`seed` must be from -2**63 to 2**64 - 1"),
        ("sliced_wasserstein_distance", (X, X, W.repeat(2, 1)), {}, ValueError, "`a` must have shape (3,), got (2, 3)"),
        ("max_sliced_wasserstein_distance", (X, X, W, W[None]), {}, ValueError, "`b` must have shape (3,), got (1, 3)"),
        (
            "sliced_wasserstein_distance",
            (X, X),
            {"projections": torch.ones(2, 0)},
            ValueError,
            "`projections` must have shape (2, L), L >= 1, got (2, 0)",
        ),
        (
            "sliced_wasserstein_distance",
            (X, X),
            {"projections": torch.tensor([[1.0, 0], [0, 0]])},
            ValueError,
            "`projections` must have no column of zero norm, got zeros in column 1",
        ),
        (
            "sliced_wasserstein_distance",
            (X, X),
            {"projections": [1]},
            TypeError,
            "`projections` must be a tensor of shape (2, L), got list",
        ),
        ("max_sliced_wasserstein", (X[None], X), {}, ValueError, "`x` must have shape (points, d), got (1, 3, 2)"),
        ("energy_sliced_wasserstein", (X, X), {"energy": "log"}, ValueError, "`energy` must be 'exp', 'identity' or"),
        ("sliced_wasserstein_matrix", (X,), {}, ValueError, "`xs` must have shape (clouds, points, d) with at least"),
        ("sliced_wasserstein_matrix", (torch.zeros(0, 3, 2),), {}, ValueError, "at least one cloud, got (0, 3, 2)"),
        ("sliced_gromov_wasserstein", (X, X[:2]), {}, ValueError, "`y` must have as many points as `x`, 3, got 2"),
        ("soft_correspondence", (X, X, 0.0), {}, ValueError, "`temperature` must be finite and positive, got 0.0"),
        ("soft_correspondence", (X, X, "1"), {}, TypeError, "`temperature` must be a float or a tensor, got str"),
        ("soft_correspondence", (X, X, W), {}, ValueError, "`temperature` must be a 0-dim tensor, got shape (3,)"),
        ("soft_correspondence", (X, X[None]), {}, ValueError, "`y` must have the leading dimensions of `x`"),
        ("sliced_wasserstein_distance", (X, X), {"seed": "a"}, TypeError, "`seed` must be None, an int or a"),
        ("sliced_wasserstein_distance", (X, X), {"scaler": 3}, TypeError, "`scaler` must have `transform` or be"),
        (
            "sliced_wasserstein_distance",
            (X, X, 2 * W),
            {},
            ValueError,
            "`a` must sum to one (to 1e-04), got a sum of 2",
        ),
        (
            "max_sliced_wasserstein_distance",
            (X, X),
            {"projections": torch.ones(3, 2)},
            ValueError,
            "`projections` must have shape (2, L), L >= 1, got (3, 2)",
        ),
    ],
)
def test_variants(
    function: str, arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        getattr(fastloss, function)(*arguments, **options)
    assert text in str(caught.value)
    assert str(caught.value).startswith(f"{function}: ")


def test_second_derivative_of_a_stream_raises() -> None:
    x = torch.randn(4, 2, requires_grad=True)
    value = fastloss.sliced_wasserstein(x, X, n_projections=3, streaming=True)
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(slope.sum(), x)
