"""Tables for tensor code: looked up in eager mode, an op in compiled graphs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fastloss._ops import LIBRARY
from fastloss.gaunt import tables
from fastloss.gaunt.tables import NORMALIZATIONS

LIBRARY.define("gaunt_table(str kind, int[] arguments, ScalarType dtype, Device device) -> Tensor")


def _build(kind: str, arguments: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    kind, _, part = kind.partition(".")
    if kind == "norms":
        return tables.norms(NORMALIZATIONS[arguments[0]], arguments[1], dtype, device)
    if kind == "degree_index":
        return tables.degree_index(arguments[0], device)
    if kind == "columns":
        return tables.columns(arguments[0], device)
    if kind == "order_columns":
        return tables.order_columns(arguments[0], device)
    if kind in ("irreps_columns", "irreps_entries"):
        channels, *degrees = arguments
        places: Tensor = getattr(tables, kind)(channels, tuple(degrees), device)
        return places
    result = getattr(tables, kind)(*arguments, dtype, device)
    table: Tensor = result[int(part)] if part.isdigit() else getattr(result, part)
    return table


# A copy, since the graph may write into the results of its ops.
LIBRARY.impl("gaunt_table", lambda *arguments: _build(*arguments).clone(), "CompositeExplicitAutograd")


@torch.library.register_fake("fastloss::gaunt_table", lib=LIBRARY)
def _(kind, arguments, dtype, device):  # type: ignore[no-untyped-def]
    with unset_fake_temporarily():
        real = _build(kind, arguments, dtype, device)
    return torch.empty(real.shape, dtype=real.dtype, device=device)


def table(kind: str, arguments: list[int], like: Tensor) -> Tensor:
    """`kind` is a function of tables.py, or one and a part of its result."""
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.fastloss.gaunt_table.default(kind, arguments, like.dtype, like.device)
        return result
    return _build(kind, arguments, like.dtype, like.device)


def norms(normalization: str, degree: int, like: Tensor) -> Tensor:
    return table("norms", [NORMALIZATIONS.index(normalization), degree], like)
