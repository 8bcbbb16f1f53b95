"""Cases and providers of the Gaunt family.

One loss for everybody: the coefficients of the product, weighted by the same numbers. It is linear in the product, so a
library that returns each path by itself takes part by weighting its paths; nothing is added up for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import fastloss
from fastloss.gaunt.program import degree_of_size
from fastloss.gaunt.tables import gauss_legendre
from fastloss.reference import gaunt as reference

from .harness import Case, Formula, Inputs, Loss, Provider, Schedule, Sizes, Suite, Unavailable

FAMILY = "gaunt"
DEGREES = (1, 2, 4, 6, 8, 16, 24)
MANY_DEGREE, BODIES = 3, 4


def _op(degree: int) -> str:
    return f"product L={degree}"


MANY = f"{BODIES} bodies L={MANY_DEGREE}"


def _weights(degree: int, x: Tensor) -> Tensor:
    return torch.linspace(1, 0.5, (degree + 1) ** 2, dtype=x.dtype)


# ---------------------------------------------------------------- inputs


def inputs_of(degree: int, count: int, sizes: Sizes, dtype: torch.dtype, seed: int) -> Inputs:
    """`dim` is the number of channels. The functions have a mean, so that the loss is not a sum that cancels."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(sizes["rows"], sizes["dim"], (degree + 1) ** 2, generator=generator) for _ in range(count)]
    for x in tensors:
        x[..., 0] += 3
    return tuple(x.to(dtype).requires_grad_() for x in tensors)


# ---------------------------------------------------------------- providers


@cache
def _grid(degree: int, total: int, back: bool, dtype: torch.dtype) -> Tensor:
    """Harmonics on the smallest exact grid, (coefficients, points), or with the weights of the quadrature."""
    nodes = total // 2 + 1
    x, weight = gauss_legendre(nodes)
    x, weight = torch.cat((x, -x[: nodes // 2])), torch.cat((weight, weight[: nodes // 2]))
    if nodes % 2:
        weight[nodes // 2] *= 2
    angle = 2 * math.pi * torch.arange(total + 1, dtype=torch.float64) / (total + 1)
    sine = (1 - x * x).sqrt()[:, None]
    points = torch.stack((sine * angle.sin(), x[:, None].expand(-1, total + 1), sine * angle.cos()), -1)
    table = reference.spherical_harmonics(points.flatten(0, 1), degree).T
    if back:
        table = table * (weight * 2 * math.pi / (total + 1)).repeat_interleave(total + 1)
    return table.to(dtype).contiguous()


def _dense(*xs: Tensor) -> Tensor:
    """Matrix products to the values on a grid, their product, and one matrix product back."""
    degrees = [degree_of_size(x.shape[-1]) for x in xs]
    out, dtype = sum(degrees), xs[0].dtype
    values = [x @ _grid(degree, 2 * out, False, dtype) for x, degree in zip(xs, degrees, strict=True)]
    product = math.prod(values[1:], start=values[0])
    return (product @ _grid(out, 2 * out, True, dtype).T @ _weights(out, xs[0])).sum()


def _chained(*xs: Tensor) -> Tensor:
    """Several bodies as products of two, each on a grid of its own."""
    product, degree = xs[0], MANY_DEGREE
    for x in xs[1:]:
        out, dtype = degree + MANY_DEGREE, x.dtype
        left, right = (_grid(d, 2 * out, False, dtype) for d in (degree, MANY_DEGREE))
        product, degree = ((product @ left) * (x @ right)) @ _grid(out, 2 * out, True, dtype).T, out
    return (product @ _weights(degree, xs[0])).sum()


def _fastloss(method: str) -> Loss:
    def run(*xs: Tensor) -> Tensor:
        product = fastloss.gaunt_tensor_product(*xs, method=method) if len(xs) == 2 else fastloss.gaunt_product(xs)
        return (product @ _weights(degree_of_size(product.shape[-1]), xs[0])).sum()

    return run


EAGER: Mapping[str, Loss] = {**{_op(degree): _dense for degree in DEGREES}, MANY: _chained}
TRUTH: Mapping[str, Loss] = dict.fromkeys(EAGER, _dense)


def _ours(name: str, description: str, backend: str, method: str, ops: Mapping[str, Any], full: bool) -> Provider:
    def build() -> Loss:
        status = fastloss.backends().get(backend, "not available: unknown backend")
        if status.startswith("not available"):
            raise Unavailable(f"backend {backend}: {status.removeprefix('not available: ')}")
        return _fastloss(method)

    def context() -> AbstractContextManager[object]:
        return fastloss.use_backend(backend)

    return Provider(name, description, dict.fromkeys(ops, build), full_only=full, context=context)


def _e3nn(degree: int, full: bool) -> Loss:
    """e3nn's paths of even l1 + l2 + l3 give the Gaunt product, each times a constant."""
    from e3nn import o3

    def constant(a: int, b: int, c: int) -> float:
        root = math.sqrt((2 * a + 1) * (2 * b + 1) * (2 * c + 1) / (4 * math.pi))
        return root * abs(reference.wigner_3j(a, b, c, 0, 0, 0))

    irreps = o3.Irreps([(1, (n, (-1) ** n)) for n in range(degree + 1)])
    if full:
        module = o3.FullTensorProduct(irreps, irreps)
        weights = torch.zeros(module.irreps_out.dim, dtype=torch.float64)
        # Component normalisation multiplies a path by sqrt(2 c + 1).
        places = module.irreps_out.slices()
        each = _weights(2 * degree, weights)
        for path in module.instructions:
            a, b, c = irreps[path.i_in1].ir.l, irreps[path.i_in2].ir.l, module.irreps_out[path.i_out].ir.l
            if (a + b + c) % 2 == 0:
                weights[places[path.i_out]] = each[c * c : (c + 1) ** 2] * constant(a, b, c) / math.sqrt(2 * c + 1)
    else:
        paths = [
            (a, b, c, "uuu", False, constant(a, b, c) ** 2)
            for a in range(degree + 1)
            for b in range(degree + 1)
            for c in range(abs(a - b), a + b + 1, 2)
        ]
        out = o3.Irreps([(1, (n, (-1) ** n)) for n in range(2 * degree + 1)])
        module = o3.TensorProduct(irreps, irreps, out, paths, irrep_normalization="none", path_normalization="none")
        weights = _weights(2 * degree, torch.zeros((), dtype=torch.float64))

    def run(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = (module(x, y) @ weights.to(x.dtype)).sum()
        return loss

    return run


def _compiled(degree: int) -> Loss:
    # The tables are built outside: Dynamo ignores caches and would compile how they are made.
    there, back = (_grid(n, 4 * degree, n > degree, torch.float32) for n in (degree, 2 * degree))
    weights = _weights(2 * degree, back)

    def run(x: Tensor, y: Tensor) -> Tensor:
        return (((x @ there) * (y @ there)) @ back.T @ weights).sum()

    return torch.compile(run, fullgraph=True)


_PRODUCTS = {_op(degree): degree for degree in DEGREES}
_SMALL = {op: degree for op, degree in _PRODUCTS.items() if degree <= 4}


def _up_to(degree: int, full: bool) -> dict[str, Callable[[], Loss]]:
    return {op: partial(_e3nn, n, full) for op, n in _PRODUCTS.items() if n <= degree}


PROVIDERS = (
    _ours("fastloss", "the native kernel, by rings", "native", "ring", EAGER, False),
    _ours("fastloss[portable]", "the same rings in PyTorch", "portable", "ring", EAGER, True),
    _ours("fastloss[fft]", "by double Fourier series", "native", "fft", _PRODUCTS, False),
    _ours("fastloss[direct]", "the sparse Gaunt tensor", "native", "direct", _SMALL, False),
    Provider(
        "eager",
        "the smallest exact grid, dense: matrix products there and back (bodies: two by two)",
        {op: partial(EAGER.__getitem__, op) for op in EAGER},
    ),
    Provider(
        "torch.compile",
        "the same, compiled",
        {_op(4): partial(_compiled, 4)},
        compiles=True,
        full_only=True,
    ),
    Provider("e3nn", "o3.TensorProduct with the paths of the Gaunt product", _up_to(4, False), slow=True),
    Provider("e3nn[full]", "o3.FullTensorProduct: odd paths as well, nothing added up", _up_to(6, True), slow=True),
)

# ---------------------------------------------------------------- cases


def _ring_flops(s: Sizes, degree: int) -> float:
    # Forward 22 L^3 multiply-adds (see fastloss/gaunt/ops.py), backward twice the products and the ways.
    return 3 * 2 * 22.0 * degree**3 * s["rows"] * s["dim"]


def _case(degree: int, rows: int, quick: bool, reason: str) -> Case:
    schedule = Schedule(3, warmup=1, budget=5, memory=frozenset({"fastloss", "eager"}) if degree == 4 else frozenset())
    return Case(
        name=f"gaunt-l{degree}",
        family=FAMILY,
        op=_op(degree),
        reason=reason,
        sizes={"rows": rows, "dim": 1},
        setup=partial(inputs_of, degree, 2),
        flops=Formula(
            "132·L³·rows (rings: 22·L³ multiply-adds forward, twice that backward)", partial(_ring_flops, degree=degree)
        ),
        full=Schedule(9, warmup=2, slow_rounds=3),
        quick=schedule if quick else None,
    )


CASES = (
    _case(1, 10000, False, "The smallest product: what a call costs"),
    _case(2, 10000, True, "The degree of most models in use"),
    _case(4, 10000, True, "A degree that Clebsch-Gordan products make expensive"),
    _case(6, 10000, True, "A degree that they make prohibitive"),
    _case(8, 10000, False, "Growth with the degree"),
    _case(16, 2000, False, "Growth with the degree"),
    _case(24, 500, True, "Growth with the degree; the Fourier route beside the rings"),
    Case(
        name="gaunt-4-bodies",
        family=FAMILY,
        op=MANY,
        reason="Many-body features: four functions at once, against three products of two",
        sizes={"rows": 10000, "dim": 1},
        setup=partial(inputs_of, MANY_DEGREE, BODIES),
        flops=Formula("132·3·L³·rows", lambda s: 3 * _ring_flops(s, MANY_DEGREE)),
        full=Schedule(9, warmup=2),
        quick=Schedule(3, warmup=1, budget=5, memory=frozenset({"fastloss", "eager"})),
    ),
)

SUITE = Suite(family=FAMILY, cases=CASES, providers=PROVIDERS, truth=TRUTH, baseline="eager")
