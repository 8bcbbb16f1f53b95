"""The Gaunt tensor product between irreps, as a module."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastloss._checks import check_flag
from fastloss.gaunt.constants import table
from fastloss.gaunt.functional import METHODS, check_one_of, gaunt_tensor_product
from fastloss.gaunt.tables import NORMALIZATIONS

_IRREP = re.compile(r"(?:(\d+)\s*x\s*)?(\d+)\s*([eoy])")


class _Signal(NamedTuple):
    """Channels of functions on the sphere that lack some degrees."""

    channels: int
    degrees: tuple[int, ...]  # in the order of the irreps
    parity: int  # 1: degree l is even or odd as l is (a function of points); -1: the other way round

    @property
    def lmax(self) -> int:
        return max(self.degrees)

    @property
    def dim(self) -> int:
        return self.channels * sum(2 * n + 1 for n in self.degrees)

    def __str__(self) -> str:
        letter = {1: "e", -1: "o"}
        return "+".join(f"{self.channels}x{n}{letter[self.parity * (-1) ** n]}" for n in self.degrees)


def _parse(argument: str, irreps: Any) -> _Signal:
    name = "GauntTensorProduct"
    text = str(irreps)
    entries = [part.strip() for part in text.split("+")]
    matches = [_IRREP.fullmatch(entry) for entry in entries]
    if not all(matches):
        raise ValueError(f'{name}: `{argument}` must be irreps such as "16x0e + 16x1o" or e3nn Irreps, got {text!r}')
    channels = {int(m[1] or 1) for m in matches if m}
    degrees = tuple(int(m[2]) for m in matches if m)
    parities = {{"e": 1, "o": -1, "y": (-1) ** int(m[2])}[m[3]] * (-1) ** int(m[2]) for m in matches if m}
    if len(channels) > 1 or channels == {0}:
        raise ValueError(
            f"{name}: `{argument}` must have one multiplicity, of at least 1, for all degrees: the product is channel "
            f"by channel; got {text!r}"
        )
    if len(set(degrees)) < len(degrees):
        raise ValueError(f"{name}: `{argument}` must name each degree once, got {text!r}")
    if len(parities) > 1:
        raise ValueError(
            f"{name}: `{argument}` must have the parities of one function, 0e + 1o + 2e + ... or all of them reversed, "
            f"got {text!r}"
        )
    return _Signal(channels.pop(), degrees, parities.pop())


def _couples(a: _Signal, b: _Signal, degree: int) -> bool:
    return any(abs(m - n) <= degree <= m + n and (m + n + degree) % 2 == 0 for m in a.degrees for n in b.degrees)


class GauntTensorProduct(nn.Module):
    """Channel by channel :func:`fastloss.gaunt_tensor_product` between irreps, in e3nn's layout and parity.

    Path (l1, l2, l3) of channel c has the weight w1[c, l1] w2[c, l2] w3[c, l3]: three factors, not a number of its own
    as in e3nn, since a number for each path would take one product a path instead of one in all. Nor are there paths
    with odd l1 + l2 + l3 (no cross product).

    Args:
        irreps_in1: irreps of the first input, as a string ("16x0e + 16x1o + 16x2e") or e3nn ``Irreps``: one
            multiplicity, the number of channels; each degree at most once; parities those of a function on the sphere
            (0e, 1o, 2e, ...) or all reversed (0o, 1e, 2o, ...). Degrees may be left out, and come in any order.
        irreps_in2: the same for the second input; its multiplicity is the same or 1 (shared by all channels).
        irreps_out: what is returned; None for all that couple, in the order of degrees. Parities multiply.
        internal_weights: learn the weights, initially 1: `weight1`, `weight2` and `weight3`, each (multiplicity of its
            irreps, their largest degree + 1); those of degrees that are left out do nothing. False: all are 1.
        normalization, method: as :func:`fastloss.gaunt_tensor_product`.

    Raises:
        TypeError: `internal_weights` is not a bool.
        ValueError: irreps that cannot be read, that are not those of channels of functions, or that do not couple.

    Example:
        >>> product = fastloss.GauntTensorProduct("8x0e + 8x1o", "1x0e + 1x1o + 1x2e", "8x0e + 8x1o + 8x2e")
        >>> product(torch.randn(10, 32), torch.randn(10, 9)).shape
        torch.Size([10, 72])
    """

    weight1: Tensor | None
    weight2: Tensor | None
    weight3: Tensor | None

    def __init__(
        self,
        irreps_in1: Any,
        irreps_in2: Any,
        irreps_out: Any = None,
        *,
        internal_weights: bool = True,
        normalization: str = "integral",
        method: str = "auto",
    ) -> None:
        super().__init__()
        name = "GauntTensorProduct"
        check_flag(name, "internal_weights", internal_weights)
        check_one_of(name, "normalization", normalization, NORMALIZATIONS)
        check_one_of(name, "method", method, METHODS)
        a, b = _parse("irreps_in1", irreps_in1), _parse("irreps_in2", irreps_in2)
        if b.channels not in (a.channels, 1):
            raise ValueError(
                f"{name}: `irreps_in2` must have multiplicity {a.channels} (as `irreps_in1`) or 1, got {b.channels}"
            )
        if irreps_out is None:
            degrees = tuple(n for n in range(a.lmax + b.lmax + 1) if _couples(a, b, n))
            out = _Signal(a.channels, degrees, a.parity * b.parity)
        else:
            out = _parse("irreps_out", irreps_out)
        if out.channels != a.channels:
            raise ValueError(
                f"{name}: `irreps_out` must have multiplicity {a.channels} (that of `irreps_in1`), got {out.channels}"
            )
        lost = [n for n in out.degrees if not _couples(a, b, n)]
        if lost or out.parity != a.parity * b.parity:
            why = f"nothing couples to degree {lost[0]}" if lost else "the parities multiply to the others"
            raise ValueError(f"{name}: `irreps_out` must come from {a} times {b}, but {why}; got {out}")
        self.irreps_in1, self.irreps_in2, self.irreps_out = str(a), str(b), str(out)
        self._signals = a, b, out
        self.lmax_out, self.normalization, self.method = out.lmax, normalization, method
        for key, signal in (("weight1", a), ("weight2", b), ("weight3", out)):
            shape = (signal.channels, signal.lmax + 1)
            weight = nn.Parameter(torch.ones(shape)) if internal_weights else None
            self.register_parameter(key, weight)

    def extra_repr(self) -> str:
        return f"{self.irreps_in1} x {self.irreps_in2} -> {self.irreps_out}"

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """(..., size of irreps_in1), (..., size of irreps_in2): (..., size of irreps_out), as the function's result."""
        *signals, out = self._signals
        for argument, x, signal in zip(("x1", "x2"), (x1, x2), signals, strict=True):
            if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] != signal.dim:
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(
                    f"GauntTensorProduct: `{argument}` must have shape (..., {signal.dim}) for {signal}, got {got}"
                )
        # Tables, not buffers: they are not lost where a module comes from the meta device.
        functions = [
            F.pad(x, (0, 1))[..., table("irreps_columns", [signal.channels, *signal.degrees], x)]
            for x, signal in zip((x1, x2), signals, strict=True)
        ]
        product = gaunt_tensor_product(
            functions[0],
            functions[1],
            self.lmax_out,
            weights=None if self.weight1 is None else (self.weight1, self.weight2, self.weight3),
            method=self.method,
            normalization=self.normalization,
        )
        return product.flatten(-2)[..., table("irreps_entries", [out.channels, *out.degrees], product)]
