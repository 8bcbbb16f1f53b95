"""Hostile input, transforms, dtypes and memory: what the values in test_values.py do not touch."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

import fastloss
from fastloss.sliced import ops
from tests import support

reference = fastloss.reference
THETA = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]], dtype=torch.float64)


def assert_equal_to_rounding(actual: Tensor, expected: Tensor, **options: float) -> None:
    support.assert_equal_to_rounding(actual.detach(), expected.detach(), **options)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clouds(n: int = 30, m: int = 20, d: int = 2) -> tuple[Tensor, Tensor]:
    g = generator()
    return torch.randn(n, d, generator=g, dtype=torch.float64), torch.randn(m, d, generator=g, dtype=torch.float64) + 1


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("p", [1, 2, 2.5])
@pytest.mark.parametrize("m", [7, 5])
def test_gradients_in_points_weights_and_projections_are_finite_differences(
    backend: str, m: int, p: float, weighted: bool
) -> None:
    x, y = clouds(7, m)
    a, b = (torch.randn(n, dtype=torch.float64, generator=generator(n)) for n in (7, m))

    def loss(x: Tensor, y: Tensor, theta: Tensor, *logits: Tensor) -> Tensor:
        names = ("x_weights", "y_weights")
        weights = dict(zip(names, (w.softmax(0) for w in logits), strict=False))  # every perturbation sums to one
        return fastloss.sliced_wasserstein(x, y, p=p, projections=theta, root=True, **weights)

    leaves = [t.clone().requires_grad_() for t in (x, y, THETA, *((a, b) if weighted else ()))]
    assert torch.autograd.gradcheck(loss, leaves)
    if p == 2:

        def energy(*leaves: Tensor) -> Tensor:
            x, y, theta, *logits = leaves
            weights = dict(zip(("x_weights", "y_weights"), (w.softmax(0) for w in logits), strict=False))
            return fastloss.energy_sliced_wasserstein(x, y, projections=theta, detach_weights=False, **weights)

        assert torch.autograd.gradcheck(energy, leaves)


def test_second_derivatives_raise() -> None:
    x, y = clouds()
    x.requires_grad_()
    for call in (
        lambda: fastloss.sliced_wasserstein(x, y, projections=THETA),
        lambda: fastloss.energy_sliced_wasserstein(x, y, projections=THETA),
        lambda: fastloss.sliced_wasserstein_matrix(x[None], y[None], projections=THETA).sum(),
        lambda: fastloss.sliced_gromov_wasserstein(x, y.repeat(2, 1)[:30], projections=THETA),
    ):
        # The value raises for being asked to keep a graph, or its gradient for being differentiated.
        with pytest.raises(RuntimeError, match="the sliced losses have no second derivative"):
            torch.autograd.grad(torch.autograd.grad(call(), x, create_graph=True)[0].sum(), x)


# ---------------------------------------------------------------- hostile values


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_identical_clouds_give_every_function_zero_and_gradient_zero(p: int, weighted: bool) -> None:
    x = clouds()[0].requires_grad_()
    y = x.detach()
    a = torch.randn(30, dtype=torch.float64, generator=generator(2)).softmax(0) if weighted else None
    theta = {"projections": THETA}
    values = {
        "sliced_wasserstein": fastloss.sliced_wasserstein(
            x, y, p=p, x_weights=a, y_weights=a, n_projections=7, streaming=True, root=True
        ),
        "max": fastloss.max_sliced_wasserstein(x, y, p=p, x_weights=a, y_weights=a, root=True),
        "distance": fastloss.sliced_wasserstein_distance(x, y, a, a, p=p, projections=THETA.T),
        "log": fastloss.sliced_wasserstein_distance(x, y, a, a, p=p, projections=THETA.T, log=True)[0],
        "max distance": fastloss.max_sliced_wasserstein_distance(x, y, a, a, p=p, projections=THETA.T),
        "matrix": fastloss.sliced_wasserstein_matrix(x[None], y[None], p=p, root=True, **theta).sum(),
        "gromov": fastloss.sliced_gromov_wasserstein(x, y, **theta),
        "plan": fastloss.min_sliced_transport_plan(x, y, a, a, metric="minkowski", p=p, projections=THETA.T)[1],
    }
    for energy in ("exp", "identity", "square"):
        values[energy] = fastloss.energy_sliced_wasserstein(
            x, y, p=p, x_weights=a, y_weights=a, energy=energy, root=True, **theta
        )
    scale = 100 * torch.finfo(torch.float64).eps
    for name, value in values.items():
        (grad,) = torch.autograd.grad(value, x)
        assert float(value.detach()) <= (scale if name == "gromov" else 0), name
        assert float(grad.abs().max()) <= (scale if name == "gromov" else 0), name


@pytest.mark.parametrize("weighted", [False, True])
def test_all_equal_projections_and_duplicated_points(backend: str, weighted: bool) -> None:
    """Every projection ties: any pairing is right, and the loss is that of the shift."""
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64).expand(40, 2)
    y = x[:25] + torch.tensor([3.0, 4.0], dtype=torch.float64)
    weights = {}
    if weighted:
        weights = {"x_weights": torch.rand(40, generator=generator(), dtype=torch.float64).softmax(0)}
    got = fastloss.sliced_wasserstein(x, y, projections=THETA, **weights)
    want = (THETA @ torch.tensor([3.0, 4.0], dtype=torch.float64)).square().mean()
    assert_equal_to_rounding(got, want, terms=100)
    mixed = torch.cat([x, x + 1])[torch.randperm(80, generator=generator(1))].requires_grad_()
    got, want = (f.sliced_wasserstein(mixed, y, projections=THETA) for f in (fastloss, reference))
    assert_equal_to_rounding(got, want, terms=200)
    # Points that tie may be paired in any order: the sums of their gradients are what is defined.
    g, w = (torch.autograd.grad(value, mixed)[0] for value in (got, want))
    for member in (mixed[:, 0] == 1, mixed[:, 0] == 2):
        assert_equal_to_rounding(g[member].sum(0), w[member].sum(0), terms=800)


def test_infinite_points_give_an_infinite_or_undefined_loss_and_nothing_worse(backend: str) -> None:
    x, y = clouds(30, 30)
    x, y, theta = x[:, :1].clone(), y[:, :1].clone(), torch.ones(1, 1, dtype=torch.float64)
    x[3] = torch.inf
    assert fastloss.sliced_wasserstein(x, y, projections=theta) == torch.inf
    assert fastloss.sliced_wasserstein(x, y[:20], projections=theta) == torch.inf
    y[7] = torch.inf  # inf - inf
    assert fastloss.sliced_wasserstein(x, y, projections=theta).isnan()
    a = torch.full((30,), 1 / 29, dtype=torch.float64)
    a[3] = 0  # no mass, no cost
    y[7] = 0
    for far in (torch.inf, -torch.inf):
        x[3] = far
        assert fastloss.sliced_wasserstein(x, y, projections=theta, x_weights=a).isfinite()
        assert fastloss.sliced_wasserstein(y, x, projections=theta, y_weights=a).isfinite()
        assert fastloss.min_sliced_transport_plan(x, y, a, projections=theta)[1].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_denormals_and_signed_zeros(backend: str, dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    x = torch.arange(-20, 20, dtype=dtype)[:, None] * (tiny / 64)
    theta = torch.ones(1, 1, dtype=dtype)
    order = torch.randperm(40, generator=generator())
    assert fastloss.sliced_wasserstein(x[order], x, p=1, projections=theta) == 0
    shifted = fastloss.sliced_wasserstein(x[order], x + tiny / 64, p=1, projections=theta)
    assert_equal_to_rounding(shifted.double(), torch.tensor(tiny / 64, dtype=torch.float64), terms=40)
    zero = torch.zeros(40, 1, dtype=dtype)
    signs = torch.where(torch.rand(40, 1, generator=generator()) < 0.5, zero, -zero)
    assert fastloss.sliced_wasserstein(signs, zero[:33], p=1, projections=theta) == 0


def test_soft_correspondence_of_nothing_finite_is_nan_as_in_the_reference() -> None:
    x, y = (t.float() for t in clouds(6, 5, 3))
    for row, value in ((1, torch.nan), (3, torch.inf), (4, -torch.inf)):
        x[row, 1] = value
    y[:, 1] = y[:, 1].abs()  # every similarity of -inf is -inf
    got: list[Tensor] = []
    want: list[Tensor] = []
    gradients = []
    for function, results in ((fastloss.soft_correspondence, got), (reference.soft_correspondence, want)):
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        results.append(function(*leaves))
        gradients.append([g.isfinite() for g in torch.autograd.grad(results[0].sum(), leaves)])
    assert got[0].isnan().all(1).tolist() == want[0].isnan().any(1).tolist() == [row in (1, 3, 4) for row in range(6)]
    for finite, expected in zip(*gradients, strict=True):
        assert torch.equal(finite, expected)


@pytest.mark.parametrize("p", [1500.0, 1e9])
def test_powers_beyond_the_range_are_zero_or_infinite(backend: str, p: float) -> None:
    x, theta = torch.zeros(2, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for far in (0.3, 0.5, 0.72, 1.0, 1.4, 1.45, 5.0):
        want = torch.tensor(far, dtype=torch.float64) ** p
        for y in (x + far, x[:1] + far):
            got = fastloss.sliced_wasserstein(x, y, p=p, projections=theta)
            assert got == want or abs(got / want - 1) < p * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("energy", ["exp", "identity", "square"])
@pytest.mark.parametrize("scale", [1e-12, 1e10, 1e19])
def test_energies_of_tiny_and_huge_costs(scale: float, energy: str) -> None:
    x, y = (t.float() for t in clouds())
    options = {"projections": THETA.float(), "p": 1, "energy": energy, "detach_weights": False}
    if scale < 1e19:
        options["p"] = 2
    x = (x * scale).requires_grad_()
    y = y * scale
    results = []
    for function, dtype in ((fastloss, torch.float32), (reference, torch.float64)):
        wide = {**options, "projections": THETA.to(dtype)}
        value = function.energy_sliced_wasserstein(x.to(dtype), y.to(dtype), **wide)
        results.append((value.detach().double(), torch.autograd.grad(value, x)[0].double()))
    for got, want in zip(*results, strict=True):
        assert float((got - want).abs().max()) <= 200 * torch.finfo(torch.float32).eps * float(want.abs().max())


# ---------------------------------------------------------------- conventions


@pytest.mark.parametrize("name", ["sliced_wasserstein_distance", "max_sliced_wasserstein_distance"])
def test_seed_may_be_a_generator_and_none_draws_from_torch(name: str) -> None:
    x, y = clouds()
    ours, theirs = generator(11), generator(11)
    function, peer = getattr(fastloss, name), getattr(ot, name)
    for _ in range(2):  # the generator advances
        assert_equal_to_rounding(function(x, y, seed=ours), peer(x, y, seed=theirs), terms=500)
    torch.manual_seed(3)
    first = function(x, y)
    torch.manual_seed(3)
    assert torch.equal(function(x, y), first)
    assert not torch.equal(function(x, y), first)
    before = torch.get_rng_state()
    function(x, y, seed=5)
    assert torch.equal(torch.get_rng_state(), before), "a seed is for its call alone"


@pytest.mark.parametrize(
    "name", ["sliced_wasserstein_distance", "max_sliced_wasserstein_distance", "sliced_wasserstein_sphere"]
)
def test_signatures_are_pots(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(package, name)).parameters for package in (fastloss, ot))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


@pytest.mark.parametrize("name", ["sliced_plans", "min_sliced_transport_plan", "expected_sliced_plan"])
def test_signatures_of_plans_are_pots_but_for_dense(name: str) -> None:
    ours = inspect.signature(getattr(fastloss, name)).parameters
    theirs = inspect.signature(getattr(ot.sliced, name)).parameters
    assert list(ours) == list(theirs)
    assert {p.name for p in ours.values() if p.default != theirs[p.name].default} <= {"dense"}


def test_same_generator_same_directions() -> None:
    x, y = clouds()
    for sampler in ("random", "orthogonal", "qmc"):
        one, two, other = (
            fastloss.sliced_wasserstein(x, y, sampler=sampler, generator=generator(seed)) for seed in (1, 1, 2)
        )
        assert torch.equal(one, two)
        assert not torch.equal(one, other)


def test_module_is_the_function() -> None:
    x, y = clouds()
    a, b = (torch.rand(k, dtype=torch.float64, generator=generator(k)) for k in (30, 20))
    weights = {"x_weights": a / a.sum(), "y_weights": b / b.sum()}
    options = {"n_projections": 9, "p": 1.5, "sampler": "orthogonal", "root": True, "streaming": True}
    module = fastloss.SlicedWassersteinLoss(**options, generator=generator(4))
    want = fastloss.sliced_wasserstein(x, y, **options, generator=generator(4), **weights)
    assert torch.equal(module(x, y, **weights), want)
    batch = x.expand(3, -1, -1)
    module = fastloss.SlicedWassersteinLoss(projections=THETA, reduction="none")
    assert torch.equal(module(batch, y), fastloss.sliced_wasserstein(batch, y, projections=THETA, reduction="none"))
    assert list(module.state_dict()) == ["projections"]
    assert copy.deepcopy(module).to(torch.float32).projections.dtype == torch.float32
    parameters = inspect.signature(fastloss.SlicedWassersteinLoss.__init__).parameters
    function = inspect.signature(fastloss.sliced_wasserstein).parameters
    assert set(parameters) - {"self"} == set(function) - {"x", "y", "x_weights", "y_weights"}
    assert all(p.default == function[p.name].default for p in parameters.values() if p.name != "self")
    assert "projections=(3, 2)" in repr(module)
    assert "n_projections" not in repr(module)
    learned = fastloss.SlicedWassersteinLoss(projections=torch.nn.Parameter(THETA.clone()))
    assert [name for name, _ in learned.named_parameters()] == list(learned.state_dict()) == ["projections"]
    learned(x, y).backward()
    assert bool(learned.projections.grad.any())
    with pytest.raises(ValueError, match="SlicedWassersteinLoss: `reduction` must be"):
        fastloss.SlicedWassersteinLoss(reduction="max")


# ---------------------------------------------------------------- transforms


def test_compile_func_and_vmap() -> None:
    x, y = clouds()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return fastloss.sliced_wasserstein(x, y, projections=THETA, root=True)

    want = torch.autograd.grad(loss(x.requires_grad_(), y), x)[0]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(x, y), x)[0], want)
    assert torch.equal(torch.func.grad(loss)(x.detach(), y), want)
    batch = torch.stack([x.detach(), 2 * x.detach(), -x.detach()])
    got = torch.func.vmap(loss, in_dims=(0, None))(batch, y)
    assert_equal_to_rounding(got, torch.stack([loss(one, y) for one in batch]), terms=10)
    per_cloud = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(batch, y)
    assert_equal_to_rounding(per_cloud[0], want, terms=100)


def best_direction(x: Tensor, y: Tensor) -> Tensor:
    return fastloss.max_sliced_wasserstein(x, y, projections=THETA, n_steps=5)


def streamed(x: Tensor, y: Tensor) -> Tensor:
    return fastloss.sliced_wasserstein(x, y, n_projections=300, streaming=True, generator=generator(1), root=True)


def best_plan(x: Tensor, y: Tensor) -> Tensor:
    return fastloss.min_sliced_transport_plan(x, y, projections=THETA.T, log=True)[1]


@pytest.mark.parametrize("loss", [best_direction, streamed, best_plan])
@pytest.mark.parametrize("mode", ["inference", "grad", "vmap", "vmap of grad", "compile"])
def test_every_mode_gives_the_same_numbers(loss: Any, mode: str) -> None:
    x, y = clouds()
    batch = torch.stack([x, 2 * x, -x])

    def gradient(one: Tensor) -> Tensor:
        leaf = one.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, y), leaf)[0]

    if mode == "inference":
        with torch.inference_mode():
            got, want = loss(x.clone(), y), loss(x, y)
    elif mode == "grad":
        got, want = torch.func.grad(loss)(x, y), gradient(x)
    elif mode == "vmap":
        got = torch.func.vmap(loss, in_dims=(0, None), randomness="same")(batch, y)
        want = torch.stack([loss(one, y) for one in batch])
    elif mode == "vmap of grad":
        got = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None), randomness="same")(batch, y)
        want = torch.stack([gradient(one) for one in batch])
    else:
        leaf = x.clone().requires_grad_()
        seeded = loss is streamed  # Dynamo does not trace generators

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            return fastloss.sliced_wasserstein(x, y, streaming=True, n_projections=300) if seeded else loss(x, y)

        torch.manual_seed(0)
        got = torch.autograd.grad(torch.compile(loss_of, backend="aot_eager", fullgraph=True)(leaf, y), leaf)[0]
        torch.manual_seed(0)
        want = torch.autograd.grad(loss_of(leaf, y), leaf)[0]
    assert_equal_to_rounding(got, want, terms=200)


def test_compiled_with_numbers_that_vary() -> None:
    x, y = clouds()

    def loss(x: Tensor, y: Tensor, p: float) -> Tensor:
        return fastloss.sliced_wasserstein(x, y, p=p, projections=THETA)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for p in (1.5, 2.5, 3.5):
        assert torch.equal(compiled(x, y, p), loss(x, y, p))


def test_random_directions_of_each_element_of_vmap() -> None:
    x, y = clouds()
    batch = x.expand(3, -1, -1)
    for streaming in (False, True):

        def loss(x: Tensor, sampler: str = "random", streaming: bool = streaming) -> Tensor:
            return fastloss.sliced_wasserstein(x, y, n_projections=300, streaming=streaming, sampler=sampler)

        assert len(torch.func.vmap(loss, randomness="different")(batch).unique()) == 3
        same = torch.func.vmap(lambda x, f=loss: f(x, "qmc"), randomness="same")(batch)
        assert len(same.unique()) == 1
        with pytest.raises(RuntimeError, match='sliced_wasserstein: `sampler` "qmc" draws one'):
            torch.func.vmap(lambda x, f=loss: f(x, "qmc"), randomness="different")(batch)


def test_autocast_leaves_every_function_alone() -> None:
    x, y = (t.float() for t in clouds(20, 13, 3))
    unit = torch.nn.functional.normalize(x, dim=1)
    theta = torch.randn(4, 3, generator=generator())

    def everything() -> list[Tensor]:
        return [
            fastloss.sliced_wasserstein_matrix(torch.stack([x, x * x]), y[None], projections=theta),
            fastloss.sliced_wasserstein_sphere(unit, unit[:7], seed=1),
            fastloss.sliced_wasserstein_sphere_unif(unit, seed=1),
            *fastloss.sliced_plans(x, y, projections=theta.T, log=True)[2].values(),
            fastloss.min_sliced_transport_plan(x, y, projections=theta.T, log=True)[2]["X_min_projection"],
            fastloss.soft_correspondence(x, y),
        ]

    want = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = everything()
    for one, other in zip(got, want, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_matrix_of_one_list_is_exactly_symmetric() -> None:
    for seed in range(8):
        xs = torch.randn(5, 17, 2, generator=generator(seed))
        matrix = fastloss.sliced_wasserstein_matrix(xs, n_projections=7, p=1.5, generator=generator(seed))
        assert torch.equal(matrix, matrix.T)
        assert torch.equal(matrix.diagonal(), torch.zeros(5))


def test_numbers_of_numpy() -> None:
    x, y = clouds()
    want = fastloss.sliced_wasserstein_distance(x, y, n_projections=9, p=3, seed=4)
    got = fastloss.sliced_wasserstein_distance(x, y, n_projections=np.int64(9), p=np.float32(3), seed=np.int64(4))
    assert torch.equal(got, want)
    plan = fastloss.min_sliced_transport_plan(x, y, n_projections=9, seed=4, metric="minkowski", p=3)[1]
    options: dict[str, Any] = {
        "n_projections": np.int32(9),
        "seed": np.uint8(4),
        "p": np.int64(3),
        "batch_size": np.int64(5),
    }
    assert_equal_to_rounding(
        fastloss.min_sliced_transport_plan(x, y, metric="minkowski", **options)[1], plan, terms=200
    )
    unit = torch.nn.functional.normalize(x, dim=1)
    want = fastloss.sliced_wasserstein_sphere(unit, unit[:9], n_projections=9, p=3, seed=4)
    options = {"n_projections": np.int64(9), "p": np.float32(3), "seed": np.int64(4)}
    got = fastloss.sliced_wasserstein_sphere(unit, unit[:9], **options)
    assert torch.equal(got, want)
    theta = torch.eye(x.shape[1])
    step, beta = np.float32(0.5), np.int64(2)
    got = fastloss.max_sliced_wasserstein(x, y, projections=theta, step_size=step)
    assert torch.equal(got, fastloss.max_sliced_wasserstein(x, y, projections=theta, step_size=0.5))
    got = fastloss.expected_sliced_plan(x, y, projections=theta, beta=beta)[1]
    assert torch.equal(got, fastloss.expected_sliced_plan(x, y, projections=theta, beta=2)[1])


def test_tensors_without_values_pass() -> None:
    x, y, w = torch.empty(20, 3, device="meta"), torch.empty(13, 3, device="meta"), torch.empty(20, device="meta")
    assert fastloss.sliced_wasserstein(x, y, x_weights=w, projections=x[:4]).is_meta
    assert fastloss.sliced_wasserstein_sphere(x, y, w, projections=torch.empty(4, 3, 2, device="meta")).is_meta
    assert fastloss.sliced_wasserstein_sphere_unif(x).is_meta


def test_autocast_and_strides(backend: str) -> None:
    x, y = (t.float() for t in clouds(40, 40, 6))
    theta = torch.randn(5, 6, generator=generator())
    want = fastloss.sliced_wasserstein(x, y, projections=theta)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fastloss.sliced_wasserstein(x, y, projections=theta), want)
    wide = torch.zeros(40, 12)
    wide[:, ::2] = x
    strided = wide[:, ::2]
    flipped = y.T.contiguous().T
    assert not strided.is_contiguous()
    got = fastloss.sliced_wasserstein(strided, flipped, projections=theta.T.contiguous().T)
    assert_equal_to_rounding(got, want, terms=40)
    mixed = fastloss.sliced_wasserstein(x.double(), y, projections=theta)
    assert mixed.dtype == torch.float64
    assert fastloss.sliced_wasserstein(x.bfloat16(), y.half(), projections=theta).dtype == torch.float32


# ---------------------------------------------------------------- memory


def test_streaming_memory_does_not_grow_with_the_number_of_directions() -> None:
    x, y = (t.float().requires_grad_() for t in clouds(50, 40, 512))

    def peak(count: int, streaming: bool) -> int:
        def run() -> None:
            loss = fastloss.sliced_wasserstein(x, y, n_projections=count, streaming=streaming, generator=generator())
            torch.autograd.grad(loss, (x, y))

        return support.peak_bytes(run)

    few, many = peak(1024, True), peak(8192, True)
    assert many <= few * 1.01
    assert peak(8192, False) > few + 8192 * 512 * 4  # without it, the directions are stored


def test_soft_correspondence_does_not_store_the_matrix() -> None:
    n, d = 4096, 32
    x, y = (torch.randn(n, d, generator=generator(seed)).requires_grad_() for seed in (0, 1))

    def run(function: Any) -> int:
        return support.peak_bytes(lambda: torch.autograd.grad(function(x, y, 0.5).square().sum(), (x, y)))

    assert run(fastloss.soft_correspondence) < n * n * 4 / 4
    assert run(reference.soft_correspondence) > n * n * 4  # the test can fail


def test_shape_matching_pipeline_is_linear_in_memory() -> None:
    """The pipeline of the paper: soft correspondence, then the distance."""
    n, d = 4096, 32
    x, y = (torch.randn(n, d, generator=generator(seed)).requires_grad_() for seed in (0, 1))

    def run() -> None:
        loss = fastloss.sliced_wasserstein(x, fastloss.soft_correspondence(x, y, 0.5), generator=generator(2))
        torch.autograd.grad(loss, (x, y))

    assert support.peak_bytes(run) < n * n * 4 / 2


def test_matrix_sorts_every_slice_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastloss.sliced import functional

    calls: list[int] = []

    def counted(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(x))
        return ops.sort_slices(x, theta)

    monkeypatch.setattr(functional, "sort_slices", counted)
    xs = torch.randn(5, 30, 2, generator=generator(), dtype=torch.float64)
    fastloss.sliced_wasserstein_matrix(xs, projections=THETA)
    assert calls == [30] * 5


def test_weights_that_sum_to_one_but_for_rounding_are_divided_by_their_sum(backend: str) -> None:
    """float32 allows 1e-4: the loss is that of the normalised weights, and its gradient has their factor."""
    x, y = (t.float() for t in clouds())
    exact = [torch.rand(k, generator=generator(k)).softmax(0) for k in (30, 20)]
    scale = 1 + 8e-5
    results = []
    for factor in (1.0, scale):
        a, b = (w.mul(factor).requires_grad_() for w in exact)
        loss = fastloss.sliced_wasserstein(x, y, projections=THETA.float(), x_weights=a, y_weights=b)
        results.append([loss.detach(), *(factor * g for g in torch.autograd.grad(loss, (a, b)))])
    for got, want in zip(*results, strict=True):
        assert_equal_to_rounding(got, want, terms=200)


def test_nan_without_weight_is_still_nan(backend: str) -> None:
    x, y = clouds()
    x[3, 0] = torch.nan
    a = torch.full((30,), 1 / 29, dtype=torch.float64)
    a[3] = 0
    x.requires_grad_()
    loss = fastloss.sliced_wasserstein(x, y, projections=THETA[:2], x_weights=a)
    assert bool(loss.isnan())
    assert bool(torch.autograd.grad(loss, x)[0].isnan().all())
    with torch.no_grad():
        assert bool(fastloss.sliced_wasserstein(x, y, projections=THETA[:2], x_weights=a).isnan())
