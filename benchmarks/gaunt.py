"""Cases and providers of the Gaunt family.

One loss for everybody: the coefficients of the product, each weighted by the same number in all rows, and summed. It
is linear in the product: its gradient is handed over and not computed, so that only the products are timed, and a
library that returns each path by itself takes part by weighting its paths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import fastloss
from fastloss.gaunt import tables as tables_of
from fastloss.gaunt.program import degree_of_size
from fastloss.reference import gaunt as reference

from .harness import Case, Formula, Inputs, Loss, Provider, Schedule, Sizes, Suite, Unavailable, Weighted

FAMILY = "gaunt"
DEGREES = (1, 2, 3, 4, 5, 6, 7, 8, 16, 24)
MANY_DEGREE, BODIES = 3, 4


def _op(degree: int) -> str:
    return f"product L={degree}"


MANY = f"{BODIES} bodies L={MANY_DEGREE}"


@cache
def _weights(degree: int) -> Tensor:
    return torch.linspace(1, 0.5, (degree + 1) ** 2, dtype=torch.float64)


@lru_cache(maxsize=8)
def _in_all_rows(weights: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return weights.to(device, dtype).expand(shape).contiguous()


def _weighted(product: Tensor, weights: Tensor | None = None) -> Weighted:
    """The loss, by default of the product's own coefficients."""
    if weights is None:
        weights = _weights(degree_of_size(product.shape[-1]))
    return Weighted(product, _in_all_rows(weights, product.shape, product.dtype, product.device))


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
def _grid(degree: int, total: int, back: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Harmonics on the smallest exact grid, (coefficients, points), or with the weights of the quadrature."""
    nodes = total // 2 + 1
    x, weight = tables_of.gauss_legendre(nodes)
    x, weight = torch.cat((x, -x[: nodes // 2])), torch.cat((weight, weight[: nodes // 2]))
    if nodes % 2:
        weight[nodes // 2] *= 2
    angle = 2 * math.pi * torch.arange(total + 1, dtype=torch.float64) / (total + 1)
    sine = (1 - x * x).sqrt()[:, None]
    points = torch.stack((sine * angle.sin(), x[:, None].expand(-1, total + 1), sine * angle.cos()), -1)
    table = reference.spherical_harmonics(points.flatten(0, 1), degree).T
    if back:
        table = table * (weight * 2 * math.pi / (total + 1)).repeat_interleave(total + 1)
    return table.to(device, dtype).contiguous()


def _dense(*xs: Tensor) -> Weighted:
    """Matrix products to the values on a grid, their product, and one matrix product back."""
    degrees = [degree_of_size(x.shape[-1]) for x in xs]
    out, where = sum(degrees), (xs[0].dtype, xs[0].device)
    values = [x @ _grid(degree, 2 * out, False, *where) for x, degree in zip(xs, degrees, strict=True)]
    product = math.prod(values[1:], start=values[0])
    return _weighted(product @ _grid(out, 2 * out, True, *where).T)


def _chained(*xs: Tensor) -> Weighted:
    """Several bodies as products of two, each on a grid of its own."""
    product, degree = xs[0], MANY_DEGREE
    for x in xs[1:]:
        out, where = degree + MANY_DEGREE, (x.dtype, x.device)
        left, right = (_grid(d, 2 * out, False, *where) for d in (degree, MANY_DEGREE))
        product, degree = ((product @ left) * (x @ right)) @ _grid(out, 2 * out, True, *where).T, out
    return _weighted(product)


def _fastloss(method: str) -> Loss:
    def run(*xs: Tensor) -> Weighted:
        return _weighted(
            fastloss.gaunt_tensor_product(*xs, method=method) if len(xs) == 2 else fastloss.gaunt_product(xs)
        )

    return run


EAGER: Mapping[str, Loss] = {**{_op(degree): _dense for degree in DEGREES}, MANY: _chained}
TRUTH: Mapping[str, Loss] = dict.fromkeys(EAGER, _dense)


def _ours(
    name: str, description: str, backend: str, method: str, ops: Mapping[str, Any], *, full: bool = False
) -> Provider:
    def build() -> Loss:
        status = fastloss.backends().get(backend, "not available: unknown backend")
        if status.startswith("not available"):
            raise Unavailable(f"backend {backend}: {status.removeprefix('not available: ')}")
        return _fastloss(method)

    def context() -> AbstractContextManager[object]:
        return fastloss.use_backend(backend)

    return Provider(name, description, dict.fromkeys(ops, build), full_only=full, context=context)


def _coefficient(a: int, b: int, c: int) -> float:
    """e3nn's paths of even l1 + l2 + l3, each times this constant, are the Gaunt product."""
    root = math.sqrt((2 * a + 1) * (2 * b + 1) * (2 * c + 1) / (4 * math.pi))
    return root * abs(reference.wigner_3j(a, b, c, 0, 0, 0))


def _e3nn(degree: int) -> Loss:
    from e3nn import o3

    irreps = o3.Irreps([(1, (n, (-1) ** n)) for n in range(degree + 1)])
    out = o3.Irreps([(1, (n, (-1) ** n)) for n in range(2 * degree + 1)])
    paths = [
        (a, b, c, "uuu", False, _coefficient(a, b, c) ** 2)
        for a in range(degree + 1)
        for b in range(degree + 1)
        for c in range(abs(a - b), a + b + 1, 2)
    ]
    module = o3.TensorProduct(irreps, irreps, out, paths, irrep_normalization="none", path_normalization="none")
    return lambda x, y: _weighted(module.to(x.device)(x, y))


def _e3nn_full(degree: int) -> Loss:
    from e3nn import o3

    irreps = o3.Irreps([(1, (n, (-1) ** n)) for n in range(degree + 1)])
    module = o3.FullTensorProduct(irreps, irreps)
    weights = torch.zeros(module.irreps_out.dim, dtype=torch.float64)
    # Component normalisation multiplies a path by sqrt(2 c + 1).
    places = module.irreps_out.slices()
    each = _weights(2 * degree)
    for path in module.instructions:
        a, b, c = irreps[path.i_in1].ir.l, irreps[path.i_in2].ir.l, module.irreps_out[path.i_out].ir.l
        if (a + b + c) % 2 == 0:
            weights[places[path.i_out]] = each[c * c : (c + 1) ** 2] * _coefficient(a, b, c) / math.sqrt(2 * c + 1)
    return lambda x, y: _weighted(module(x, y), weights)


def _with_path_weights(module: Callable[..., Tensor], degree: int, count: int) -> Loss:
    """A layer of `count` path weights, with those that make it the Gaunt product: found by least squares."""
    x, y = (torch.randn(50, (degree + 1) ** 2, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    each = torch.stack([module(x, y, unit[None]).flatten() for unit in torch.eye(count)], 1).double()
    product = reference.gaunt_tensor_product(x.double(), y.double()).flatten()
    weights = torch.linalg.lstsq(each, product[:, None]).solution.T

    def run(x: Tensor, y: Tensor) -> Weighted:
        return _weighted(module(x.flatten(0, -2), y.flatten(0, -2), weights.to(x.dtype)))

    return run


def _e3nn_connected(degree: int) -> Loss:
    from e3nn import o3

    irreps, out = (o3.Irreps([(1, (n, (-1) ** n)) for n in range(d + 1)]) for d in (degree, 2 * degree))
    module = o3.FullyConnectedTensorProduct(irreps, irreps, out, shared_weights=True, internal_weights=False)
    return _with_path_weights(lambda x, y, w: module(x, y, w[0]), degree, module.weight_numel)


def _cuequivariance(degree: int) -> Loss:
    import cuequivariance as cue
    import cuequivariance_torch as cuet

    irreps, out = (
        cue.Irreps("O3", "+".join(f"1x{n}{'eo'[n % 2]}" for n in range(d + 1))) for d in (degree, 2 * degree)
    )
    module = cuet.FullyConnectedTensorProduct(
        irreps,
        irreps,
        out,
        layout=cue.mul_ir,
        shared_weights=True,
        internal_weights=False,
        device="cpu",
        method="naive",
    )
    return _with_path_weights(module, degree, module.weight_numel)


def _dense_fourier(degree: int) -> Loss:
    """Luo et al.'s own route: dense tables between coefficients and double Fourier series, an FFT in between."""
    device, band = torch.device("cpu"), 2 * degree
    size = 2 * band + 1

    @cache
    def tables(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        there = tables_of.fourier(degree, dtype, device)
        integrals, orders = tables_of.from_fourier(band, band, dtype, device)
        into = torch.einsum("mlu,mv->mluv", there.to_fourier, there.orders).flatten(0, 1)
        back = torch.einsum("mlu,mv->mluv", integrals, orders).flatten(0, 1)
        return (
            into[tables_of.columns(degree, device)].flatten(1),
            back[tables_of.columns(band, device)].flatten(1).T.contiguous(),
        )

    def run(x: Tensor, y: Tensor) -> Weighted:
        into, back = tables(x.dtype)

        def series(x: Tensor) -> Tensor:
            grid = (x.to(into.dtype) @ into).reshape(*x.shape[:-1], 2 * degree + 1, 2 * degree + 1)
            result: Tensor = torch.fft.fft2(grid, s=(size, size))
            return result

        return _weighted((torch.fft.ifft2(series(x) * series(y)).flatten(-2) @ back).real)

    return run


def _compiled(degree: int) -> Loss:
    # The tables are built outside: Dynamo ignores caches and would compile how they are made.
    there, back = (_grid(n, 4 * degree, n > degree, torch.float32, torch.device("cpu")) for n in (degree, 2 * degree))

    @partial(torch.compile, fullgraph=True)
    def product(x: Tensor, y: Tensor) -> Tensor:
        return ((x @ there) * (y @ there)) @ back.T

    return lambda x, y: _weighted(product(x, y))


_PRODUCTS = {_op(degree): degree for degree in DEGREES}
_SMALL = {op: degree for op, degree in _PRODUCTS.items() if degree <= 4}


def _up_to(degree: int, build: Callable[[int], Loss]) -> dict[str, Callable[[], Loss]]:
    return {op: partial(build, n) for op, n in _PRODUCTS.items() if n <= degree}


PROVIDERS = (
    _ours("fastloss", "the native kernels; rings or, at small degrees, the sparse tensor", "native", "auto", EAGER),
    _ours("fastloss[portable]", "the same in PyTorch", "portable", "auto", EAGER, full=True),
    _ours("fastloss[ring]", "by rings", "native", "ring", _PRODUCTS),
    _ours("fastloss[direct]", "by the sparse Gaunt tensor", "native", "direct", _SMALL),
    _ours("fastloss[fft]", "by double Fourier series", "native", "fft", _PRODUCTS),
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
    Provider("fourier[dense]", "dense double Fourier series, as published", _up_to(6, _dense_fourier), full_only=True),
    Provider("e3nn", "o3.TensorProduct with the paths of the Gaunt product", _up_to(4, _e3nn), full_only=True),
    Provider(
        "e3nn[full]", "o3.FullTensorProduct: odd paths as well, nothing added up", _up_to(6, _e3nn_full), slow=True
    ),
    Provider(
        "e3nn[connected]",
        "o3.FullyConnectedTensorProduct, one channel a row",
        _up_to(4, _e3nn_connected),
        full_only=True,
    ),
    Provider(
        "cuequivariance", "its FullyConnectedTensorProduct on the CPU", _up_to(4, _cuequivariance), full_only=True
    ),
)

# ---------------------------------------------------------------- cases


def _ring_flops(s: Sizes, degree: int) -> float:
    # Forward 22 L^3 multiply-adds (see fastloss/gaunt/ops.py), backward twice the products and the ways.
    return 3 * 2 * 22.0 * degree**3 * s["rows"] * s["dim"]


def _case(degree: int, rows: int, reason: str, quick: int = 0) -> Case:
    """`quick`: rounds of the quick run, where the Fourier route, which takes its time, has its turn at one degree."""
    timed = frozenset({"fastloss", "fastloss[ring]", "eager", "e3nn[full]"})
    passes = max(1, 24 // degree**2)
    schedule = Schedule(
        quick,
        warmup=2,
        passes=passes,
        slow_rounds=2,
        budget=4,
        timed=None if degree == 4 else timed,
        memory=frozenset({"fastloss", "eager"}) if degree == 4 else frozenset(),
    )
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
        full=Schedule(15, warmup=2, slow_rounds=3, passes=passes),
        quick=schedule if quick else None,
    )


CASES = (
    _case(1, 10000, "The smallest product: what a call costs"),
    _case(2, 10000, "The degree of most models in use", quick=15),
    _case(3, 10000, "Where the sparse tensor gives way to the rings"),
    _case(4, 10000, "A degree that Clebsch-Gordan products make expensive", quick=7),
    _case(5, 10000, "Growth with the degree"),
    _case(6, 10000, "A degree that they make prohibitive", quick=7),
    _case(7, 10000, "Growth with the degree"),
    _case(8, 10000, "Growth with the degree"),
    _case(16, 2000, "Growth with the degree"),
    _case(24, 500, "Growth with the degree; the Fourier route beside the rings"),
    Case(
        name="gaunt-4-bodies",
        family=FAMILY,
        op=MANY,
        reason="Many-body features: four functions at once, against three products of two",
        sizes={"rows": 10000, "dim": 1},
        setup=partial(inputs_of, MANY_DEGREE, BODIES),
        flops=Formula("132·3·L³·rows", lambda s: 3 * _ring_flops(s, MANY_DEGREE)),
        full=Schedule(9, warmup=2),
        quick=Schedule(7, warmup=2, budget=4, memory=frozenset({"fastloss", "eager"})),
    ),
)

SUITE = Suite(family=FAMILY, cases=CASES, providers=PROVIDERS, truth=TRUTH, baseline="eager")
