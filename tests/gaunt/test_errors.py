"""Bad input raises TypeError or ValueError, and the message names the argument, what was expected and what came."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import fastloss


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


VALID: dict[str, dict[str, Any]] = {
    "gaunt_tensor_product": {"x1": x(5, 9), "x2": x(5, 4)},
    "gaunt_product": {"xs": [x(5, 9), x(5, 4)]},
    "gaunt_power": {"x": x(5, 9), "degree": 2},
    "gaunt_convolution": {"x": x(5, 2, 9), "vectors": x(5, 3), "lmax_filter": 2},
    "spherical_harmonics": {"vectors": x(5, 3), "lmax": 2},
}
CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("gaunt_tensor_product", {"x1": [1.0]}, TypeError, "`x1` must be a tensor of shape (..., (l + 1)²), got list"),
    ("gaunt_tensor_product", {"x1": x(5, 9, dtype=torch.int64)}, TypeError, "`x1` must be float64, float32"),
    ("gaunt_tensor_product", {"x1": x(5, 8)}, ValueError, "`x1` must have a square (l + 1)² of coefficients"),
    ("gaunt_tensor_product", {"x1": x(5, 0)}, ValueError, "got 0 in shape (5, 0)"),
    ("gaunt_tensor_product", {"x1": x()}, ValueError, "`x1` must have shape (..., (l + 1)²), got ()"),
    ("gaunt_tensor_product", {"x2": x(5, 4, dtype=torch.float64)}, TypeError, "`x2` must be torch.float32 as `x1`"),
    ("gaunt_tensor_product", {"x2": x(5, 4, device="meta")}, ValueError, "`x2` must be on cpu as `x1`, got meta"),
    ("gaunt_tensor_product", {"x2": x(4, 4)}, ValueError, "leading dimensions do not broadcast, got (5,) and (4,)"),
    ("gaunt_tensor_product", {"lmax_out": -1}, ValueError, "`lmax_out` must be at least 0, got -1"),
    ("gaunt_tensor_product", {"lmax_out": 1.0}, TypeError, "`lmax_out` must be an int, got float"),
    ("gaunt_tensor_product", {"method": "grid"}, ValueError, "`method` must be one of 'auto', 'ring', 'direct', 'fft'"),
    ("gaunt_tensor_product", {"normalization": "x"}, ValueError, "`normalization` must be one of 'integral'"),
    ("gaunt_tensor_product", {"dim": 1}, ValueError, "`dim` must be -1 or -2, got 1"),
    ("gaunt_tensor_product", {"dim": -2}, ValueError, "coefficients in dimension -2, got 5"),
    ("gaunt_tensor_product", {"weights": (None, None)}, ValueError, "`weights` must be three tensors or Nones"),
    ("gaunt_tensor_product", {"weights": (x(2), None, None)}, ValueError, "`weights[0]` must have shape (..., 3)"),
    ("gaunt_tensor_product", {"weights": (None, None, [1.0])}, TypeError, "`weights[2]` must be a floating-point"),
    ("gaunt_tensor_product", {"weights": (None, x(2, device="meta"), None)}, ValueError, "`weights[1]` must be on cpu"),
    ("gaunt_tensor_product", {"dim": -1.0}, ValueError, "`dim` must be -1 or -2, got -1.0"),
    ("gaunt_tensor_product", {"x1": x(5, 9).to_sparse()}, TypeError, "`x1` must be a dense tensor"),
    ("gaunt_tensor_product", {"weights": (x(3).to_sparse(), None, None)}, TypeError, "`weights[0]` must be a dense"),
    (
        "gaunt_tensor_product",
        {"weights": (x(4, 3), None, None)},
        ValueError,
        "`weights[0]` must have leading dimensions that broadcast with (5,), got shape (4, 3)",
    ),
    (
        "gaunt_tensor_product",
        {"x1": x(2, 5, 9), "weights": (None, None, x(2, 4, 4))},
        ValueError,
        "`weights[2]` must have leading dimensions that broadcast with (2, 5), got shape (2, 4, 4)",
    ),
    (
        "gaunt_tensor_product",
        {"x1": x(4, 9, 5), "x2": x(4, 4, 5), "dim": -2, "weights": (None, x(4, 2, 2), None)},
        ValueError,
        "`weights[1]` must have leading dimensions that broadcast with (4, 5), got shape (4, 2, 2)",
    ),
    ("gaunt_power", {"degree": True}, TypeError, "`degree` must be an int, got bool"),
    ("spherical_harmonics", {"normalize": "no"}, TypeError, "`normalize` must be True or False, got str"),
    ("spherical_harmonics", {"vectors": x(5, 3).to_sparse()}, TypeError, "`vectors` must be a dense tensor"),
    ("gaunt_product", {"xs": x(2, 5, 9)}, TypeError, "`xs` must be a list or tuple of tensors, got Tensor"),
    ("gaunt_product", {"xs": []}, ValueError, "`xs` must hold 1 to 16 tensors, got 0"),
    ("gaunt_product", {"xs": [x(5, 9), x(5, 5)]}, ValueError, "`xs[1]` must have a square"),
    ("gaunt_product", {"xs": [x(5, 9), x(5, 4).double()]}, TypeError, "`xs[1]` must be torch.float32 as `xs[0]`"),
    ("gaunt_product", {"lmax_out": -2}, ValueError, "`lmax_out` must be at least 0, got -2"),
    ("gaunt_power", {"degree": 0}, ValueError, "`degree` must be from 1 to 16, got 0"),
    ("gaunt_power", {"degree": 2.0}, TypeError, "`degree` must be an int, got float"),
    ("gaunt_power", {"x": x(5, 3)}, ValueError, "`x` must have a square"),
    ("gaunt_convolution", {"x": x(2, 5, 2, 9)}, ValueError, "`x` must have shape (E, (l + 1)²) or (E, C, (l + 1)²)"),
    ("gaunt_convolution", {"vectors": x(5, 2)}, ValueError, "`vectors` must have shape (..., 3), got (5, 2)"),
    ("gaunt_convolution", {"vectors": x(4, 3)}, ValueError, "`vectors` must have shape (5, 3), got (4, 3)"),
    ("gaunt_convolution", {"vectors": x(5, 3).double()}, TypeError, "`vectors` must be torch.float32 as `x`"),
    ("gaunt_convolution", {"lmax_filter": -1}, ValueError, "`lmax_filter` must be at least 0, got -1"),
    ("gaunt_convolution", {"weights": x(2)}, ValueError, "`weights` must have shape (..., 3)"),
    ("gaunt_convolution", {"weights": x(4, 3)}, ValueError, "`weights` must have shape (3,), (5, 3) or (5, 2, 3)"),
    (
        "spherical_harmonics",
        {"vectors": [0.0] * 3},
        TypeError,
        "`vectors` must be a tensor of shape (..., 3)",
    ),
    ("spherical_harmonics", {"vectors": x(3).int()}, TypeError, "`vectors` must be float64, float32"),
    ("spherical_harmonics", {"vectors": x(3, 4)}, ValueError, "`vectors` must have shape (..., 3), got (3, 4)"),
    ("spherical_harmonics", {"lmax": -1}, ValueError, "`lmax` must be at least 0, got -1"),
    ("spherical_harmonics", {"lmax": None}, TypeError, "`lmax` must be an int, got NoneType"),
    ("spherical_harmonics", {"normalization": "x"}, ValueError, "`normalization` must be one of"),
]


@pytest.mark.parametrize("name", VALID)
def test_valid(name: str) -> None:
    getattr(fastloss, name)(**VALID[name])


@pytest.mark.parametrize(("name", "arguments", "error", "message"), CASES, ids=lambda v: str(v)[:40])
def test_bad_input(name: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{name}: .*{re.escape(message)}"):
        getattr(fastloss, name)(**{**VALID[name], **arguments})
