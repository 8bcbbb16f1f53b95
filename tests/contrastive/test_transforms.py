"""Under autograd's checks, torch.func, torch.compile, copying and serialisation."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastloss
from fastloss.contrastive.ops import pair_nll, similarity_lse
from tests.contrastive.problems import REDUCED, VARIANTS, Problem, evaluate, make_problem, upstream_of
from tests.support import assert_equal_to_rounding, peak_bytes

pytestmark = pytest.mark.usefixtures("backend")

# One of each path: symmetric op, ids, extra op, rectangular op, paired, self-similarity, per-row scales.
MODES = [
    "info_nce",
    "info_nce mean",
    "info_nce sum key_ids row_temperature",
    "info_nce symmetric key_ids row_temperature",
    "info_nce extra extra_ids row_temperature",
    "info_nce unpaired",
    "info_nce paired",
    "clip_loss",
    "nt_xent",
    "nt_xent ids row_temperature",
]


def call(problem: Problem) -> Callable[..., Tensor]:
    """The loss as a function of the differentiable tensors."""
    return lambda *tensors: problem(fastloss, dict(zip(problem.tensors, tensors, strict=True)))


class TestGradcheck:
    @pytest.mark.parametrize("variant", [*VARIANTS, *REDUCED])
    def test_first_derivative(self, variant: str) -> None:
        problem = make_problem(variant, rows=5, columns=4, width=3, dtype=torch.float64, temperature=0.5)
        leaves = [x.clone().requires_grad_() for x in problem.tensors.values()]
        assert torch.autograd.gradcheck(call(problem), leaves)

    @pytest.mark.parametrize("variant", [mode for mode in MODES if "paired" not in mode.split()])
    def test_second_derivative_is_refused(self, variant: str) -> None:
        problem = make_problem(variant, rows=5, columns=4, width=3)
        leaves = [x.clone().requires_grad_() for x in problem.tensors.values()]
        gradients = torch.autograd.grad(call(problem)(*leaves).sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(gradients[0].sum(), leaves, allow_unused=True)

    def test_second_derivative_with_paired_negatives(self) -> None:
        problem = make_problem("info_nce paired", rows=5, columns=4, width=3, dtype=torch.float64, temperature=0.5)
        leaves = [x.clone().requires_grad_() for x in problem.tensors.values()]
        assert torch.autograd.gradgradcheck(call(problem), leaves)

    @pytest.mark.parametrize("variant", MODES)
    def test_create_graph_gives_the_same_first_derivative(self, variant: str) -> None:
        """Training loops that always pass create_graph=True still train."""
        problem = make_problem(variant)
        leaves = [x.clone().requires_grad_() for x in problem.tensors.values()]
        plain = torch.autograd.grad(call(problem)(*leaves).sum(), leaves)
        again = torch.autograd.grad(call(problem)(*leaves).sum(), leaves, create_graph=True)
        for name, a, b in zip(problem.tensors, plain, again, strict=True):
            assert torch.equal(a, b.detach()), name


class TestFunc:
    @pytest.mark.parametrize("variant", MODES)
    def test_grad(self, variant: str) -> None:
        problem = make_problem(variant)
        tensors = tuple(problem.tensors.values())
        everything = tuple(range(len(tensors)))
        gradients = torch.func.grad(lambda *x: call(problem)(*x).sum(), argnums=everything)(*tensors)
        leaves = [x.clone().requires_grad_() for x in tensors]
        expected = torch.autograd.grad(call(problem)(*leaves).sum(), leaves)
        for name, a, b in zip(problem.tensors, gradients, expected, strict=True):
            assert torch.equal(a, b), name

    @pytest.mark.parametrize("variant", MODES)
    def test_forward_mode_is_refused_but_with_paired_negatives(self, variant: str) -> None:
        problem = make_problem(variant, rows=4, columns=3, width=2, dtype=torch.float64)
        name, x = next(iter(problem.features.items()))

        def loss(api: Any) -> Callable[[Tensor], Tensor]:
            return lambda x: problem(api, {**problem.tensors, name: x}).sum()

        transforms = (torch.func.hessian, lambda f: lambda x: torch.func.jvp(f, (x,), (x,)))
        for transform in transforms:
            if "paired" in variant.split():
                expected = transform(loss(fastloss.reference))(x)
                torch.testing.assert_close(transform(loss(fastloss))(x), expected, rtol=1e-11, atol=1e-11)
            else:
                with pytest.raises(RuntimeError, match="jvp"):
                    transform(loss(fastloss))(x)

    @pytest.mark.parametrize("variant", MODES)
    def test_vmap_over_nothing(self, variant: str) -> None:
        """ "sum" and the features alone: torch itself does not multiply scalars of a batch of nothing."""
        problem = make_problem(variant, rows=4, columns=3)
        scale = {name: x for name, x in problem.tensors.items() if name not in problem.features}
        batch = [x.new_zeros((0, *x.shape)) for x in problem.features.values()]

        def loss(*features: Tensor, reduction: str = "sum") -> Tensor:
            given = dict(zip(problem.features, features, strict=True))
            return problem(fastloss, {**given, **scale}, reduction=reduction)

        assert torch.func.vmap(loss)(*batch).shape == (0,)
        losses = problem(fastloss, reduction="none")
        assert torch.func.vmap(partial(loss, reduction="none"))(*batch).shape == (0, *losses.shape)
        assert torch.func.vmap(torch.func.grad(loss))(*batch).shape == batch[0].shape

    @pytest.mark.parametrize("variant", MODES)
    def test_vjp(self, variant: str) -> None:
        problem = make_problem(variant)
        loss, pull_back = torch.func.vjp(call(problem), *problem.tensors.values())
        upstream = upstream_of(loss)
        leaves = [x.clone().requires_grad_() for x in problem.tensors.values()]
        expected = torch.autograd.grad(call(problem)(*leaves), leaves, upstream)
        for name, a, b in zip(problem.tensors, pull_back(upstream), expected, strict=True):
            assert torch.equal(a, b), name

    @staticmethod
    def batch_of(problem: Problem, size: int = 3) -> tuple[Tensor, ...]:
        """Batches with a leading dimension whose elements differ."""
        noise = torch.Generator().manual_seed(11)

        def batch(x: Tensor) -> Tensor:
            return torch.stack([x * (1 + torch.rand((), generator=noise)) + 0.01 * i * x.roll(i) for i in range(size)])

        return tuple(batch(x) for x in problem.tensors.values())

    @pytest.mark.parametrize("variant", MODES)
    def test_vmap_is_a_loop(self, variant: str) -> None:
        problem = make_problem(variant)
        batch = self.batch_of(problem)
        mapped = torch.func.vmap(call(problem))(*batch)
        looped = torch.stack([call(problem)(*(x[i] for x in batch)) for i in range(3)])
        self.assert_same(mapped, looped, problem)

    @pytest.mark.parametrize("variant", MODES)
    def test_vmap_over_one_argument(self, variant: str) -> None:
        problem = make_problem(variant)
        batch = self.batch_of(problem)
        first, rest = batch[0], tuple(problem.tensors.values())[1:]
        mapped = torch.func.vmap(call(problem), in_dims=(0, *[None] * len(rest)))(first, *rest)
        looped = torch.stack([call(problem)(x, *rest) for x in first])
        self.assert_same(mapped, looped, problem)

    @pytest.mark.parametrize("variant", MODES)
    def test_vmap_of_grad_is_a_loop(self, variant: str) -> None:
        problem = make_problem(variant)
        batch = self.batch_of(problem)
        gradient = torch.func.grad(lambda *x: call(problem)(*x).mean(), argnums=tuple(range(len(batch))))
        mapped = torch.func.vmap(gradient)(*batch)
        looped = [gradient(*(x[i] for x in batch)) for i in range(3)]
        for a, *b in zip(mapped, *looped, strict=True):
            self.assert_same(a, torch.stack(b), problem)

    @pytest.mark.parametrize("variant", MODES)
    def test_backward_through_vmap(self, variant: str) -> None:
        problem = make_problem(variant)
        batch = [x.requires_grad_() for x in self.batch_of(problem)]
        mapped = torch.autograd.grad(torch.func.vmap(call(problem))(*batch).sum(), batch)
        looped = torch.autograd.grad(sum(call(problem)(*(x[i] for x in batch)).sum() for i in range(3)), batch)
        for a, b in zip(mapped, looped, strict=True):
            self.assert_same(a, b, problem)

    @staticmethod
    def assert_same(actual: Tensor, expected: Tensor, problem: Problem) -> None:
        # The paired mode is plain torch, whose batched products may sum in another order.
        terms = sum(x.shape[-2] for x in problem.features.values()) + problem.width
        assert_equal_to_rounding(actual, expected, terms=terms, magnitude=problem.largest_logit)


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def assert_compiled_is_eager(self, problem: Problem, api: Any) -> None:
        compiled, eager = evaluate(problem, api), evaluate(problem)
        assert torch.equal(compiled.loss, eager.loss)
        assert compiled.gradients.keys() == eager.gradients.keys()
        for name, gradient in compiled.gradients.items():
            terms = sum(x.shape[-2] for x in problem.features.values()) + problem.width
            magnitude = problem.largest_logit * max(1.0, float(eager.gradients[name].abs().max()))
            assert_equal_to_rounding(gradient, eager.gradients[name], terms=terms, magnitude=magnitude, name=name)

    @staticmethod
    def compiled_api(function: str, **options: Any) -> Any:
        class Api:
            pass

        api = Api()
        setattr(
            api, function, torch.compile(getattr(fastloss, function), fullgraph=True, backend="aot_eager", **options)
        )
        return api

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("variant", MODES)
    def test_full_graph(self, variant: str, dtype: torch.dtype) -> None:
        problem = make_problem(variant, dtype=dtype)
        self.assert_compiled_is_eager(problem, self.compiled_api(problem.function))

    @pytest.mark.parametrize("variant", ["info_nce mean", "info_nce symmetric", "info_nce unpaired", "nt_xent"])
    def test_dynamic_shapes(self, variant: str) -> None:
        api = self.compiled_api(variant.split()[0], dynamic=True)
        for rows in (33, 40, 70):
            self.assert_compiled_is_eager(make_problem(variant, rows=rows, columns=rows + 3), api)

    @pytest.mark.parametrize("variant", MODES)
    def test_no_graph_break_in_a_model(self, variant: str) -> None:
        problem = make_problem(variant)
        layer = nn.Linear(16, 16)
        first = next(iter(problem.tensors))

        def step(x: Tensor) -> Tensor:
            return problem(fastloss, {**problem.tensors, first: layer(x)}, reduction="mean")

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        weights = []
        for function in (step, compiled):
            layer.zero_grad()
            function(problem.tensors[first]).backward()
            weights.append(layer.weight.grad.clone())
        assert_equal_to_rounding(weights[1], weights[0], terms=100, magnitude=problem.largest_logit)

    @pytest.mark.parametrize(
        ("module", "arguments"),
        [(fastloss.InfoNCE, ()), (fastloss.NTXentLoss, ()), (fastloss.ClipLoss, (10.0,))],
    )
    def test_modules(self, module: type[nn.Module], arguments: tuple[Any, ...]) -> None:
        loss = module()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        q, k, _ = make_problem("info_nce").tensors.values()
        assert torch.equal(compiled(q, k, *arguments), loss(q, k, *arguments))

    def test_without_gradient(self) -> None:
        problem = make_problem("info_nce symmetric")
        with torch.no_grad():
            compiled = problem(self.compiled_api("info_nce"))
        assert torch.equal(compiled, problem(fastloss))


MODULES: list[tuple[Callable[[], nn.Module], tuple[Any, ...]]] = [
    (lambda: fastloss.InfoNCE(0.2, "sum", "paired", normalize=False, symmetric=True), ()),
    (lambda: fastloss.InfoNCE(nn.Parameter(torch.tensor(0.3))), ()),
    (lambda: fastloss.NTXentLoss(0.2, reduction="sum", normalize=False), ()),
    (lambda: fastloss.NTXentLoss(nn.Parameter(torch.tensor(0.3))), ()),
    (lambda: fastloss.ClipLoss(cache_labels=True, reduction="none"), (10.0,)),
]


@pytest.mark.parametrize(("make", "arguments"), MODULES)
class TestModules:
    def pair(self) -> tuple[Tensor, Tensor]:
        q, k, _ = make_problem("info_nce").tensors.values()
        return q, k

    def assert_copy(self, module: nn.Module, other: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert type(other) is type(module)
        assert torch.equal(module(*self.pair(), *arguments), other(*self.pair(), *arguments))
        assert repr(module) == repr(other)

    def test_deepcopy(self, make: Callable[[], nn.Module], arguments: tuple[Any, ...]) -> None:
        module = make()
        other = copy.deepcopy(module)
        self.assert_copy(module, other, arguments)
        assert not {id(p) for p in module.parameters()} & {id(p) for p in other.parameters()}

    def test_pickle(self, make: Callable[[], nn.Module], arguments: tuple[Any, ...]) -> None:
        module = make()
        self.assert_copy(module, pickle.loads(pickle.dumps(module)), arguments)

    def test_save_and_load(self, make: Callable[[], nn.Module], arguments: tuple[Any, ...]) -> None:
        module = make()
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        self.assert_copy(module, torch.load(file, weights_only=False), arguments)

    def test_state_dict(self, make: Callable[[], nn.Module], arguments: tuple[Any, ...]) -> None:
        """A learned temperature is the only state."""
        module, other = make(), make()
        assert list(module.state_dict()) == [name for name, _ in module.named_parameters()]
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.5)
        other.load_state_dict(module.state_dict())
        self.assert_copy(module, other, arguments)

    def test_works_in_a_container(self, make: Callable[[], nn.Module], arguments: tuple[Any, ...]) -> None:
        module = make()
        holder = nn.ModuleDict({"loss": module})
        assert torch.equal(holder["loss"](*self.pair(), *arguments), module(*self.pair(), *arguments))


@pytest.mark.parametrize(
    ("module", "shown"),
    [
        (fastloss.InfoNCE(0.2, "sum"), ["InfoNCE(", "temperature=0.2", "reduction='sum'"]),
        (fastloss.InfoNCE(negative_mode="paired", normalize=False), ["negative_mode='paired'", "normalize=False"]),
        (fastloss.InfoNCE(symmetric=True), ["temperature=0.1", "symmetric=True"]),
        (fastloss.InfoNCE(nn.Parameter(torch.tensor(0.3))), ["InfoNCE(", "temperature"]),
        (fastloss.NTXentLoss(0.2), ["NTXentLoss(", "temperature=0.2"]),
        (fastloss.NTXentLoss(nn.Parameter(torch.tensor(0.3))), ["NTXentLoss(", "temperature"]),
        (fastloss.ClipLoss(), ["ClipLoss("]),
    ],
)
def test_repr_shows_what_the_loss_depends_on(module: nn.Module, shown: list[str]) -> None:
    for part in shown:
        assert part in repr(module)


def test_modules_pass_everything_on() -> None:
    q, k, _ = make_problem("info_nce").tensors.values()
    ids, others = torch.arange(33) // 2, torch.arange(33) // 3
    info = fastloss.InfoNCE(0.2, "none", normalize=False)
    expected = fastloss.info_nce(q, k, None, 0.2, "none", normalize=False, query_ids=ids, key_ids=others)
    assert torch.equal(info(q, k, query_ids=ids, key_ids=others), expected)
    clip = fastloss.ClipLoss(reduction="none")
    expected = fastloss.clip_loss(q, k, 3.0, reduction="none", image_ids=ids, text_ids=others)
    assert torch.equal(clip(q, k, 3.0, image_ids=ids, text_ids=others), expected)
    xent = fastloss.NTXentLoss(0.2, (0, 128), reduction="none", normalize=False)
    assert torch.equal(xent(q, k, ids=ids), fastloss.nt_xent(q, k, 0.2, reduction="none", normalize=False, ids=ids))


@pytest.mark.parametrize("module", [fastloss.InfoNCE, fastloss.NTXentLoss])
def test_learned_temperature_gets_a_gradient(module: type[nn.Module]) -> None:
    temperature = nn.Parameter(torch.tensor(0.3))
    loss = module(temperature)
    assert list(loss.parameters()) == [temperature]
    q, k, _ = make_problem("info_nce").tensors.values()
    loss(q, k).backward()
    assert float(temperature.grad) != 0


CALLS = {
    "info_nce": lambda a, b, reduction: fastloss.info_nce(a, b, reduction=reduction),
    "clip_loss": lambda a, b, reduction: fastloss.clip_loss(a, b, 5.0, reduction=reduction),
    "nt_xent": lambda a, b, reduction: fastloss.nt_xent(a, b, reduction=reduction),
}
every_call = pytest.mark.parametrize("name", list(CALLS))


@every_call
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpointing_gives_the_same_gradient(name: str, reduction: str) -> None:
    q = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    k = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = CALLS[name](q, k, reduction).sum()
    kept = torch.utils.checkpoint.checkpoint(CALLS[name], q, k, reduction, use_reentrant=False).sum()
    assert torch.equal(torch.autograd.grad(kept, q)[0], torch.autograd.grad(plain, q)[0])


@every_call
def test_the_widest_dtype_wins_whichever_comes_first(name: str) -> None:
    narrow = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    wide = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).double()
    for reduction in ("mean", "none"):
        expected = CALLS[name](narrow.double(), wide, reduction)
        assert torch.equal(CALLS[name](narrow, wide, reduction), expected)
        assert CALLS[name](wide, narrow, reduction).dtype == torch.float64


def test_extra_negatives_of_a_wider_dtype_widen_the_loss() -> None:
    q, extra = torch.randn(6, 4), torch.randn(3, 4).double()
    expected = fastloss.info_nce(q.double(), q.double(), extra_negatives=extra)
    assert torch.equal(fastloss.info_nce(q, q, extra_negatives=extra), expected)
    expected = fastloss.info_nce(q.double(), q.double(), extra)
    assert torch.equal(fastloss.info_nce(q, q, extra), expected)


def test_a_temperature_schedule_compiles_without_a_graph_break() -> None:
    q, k = torch.randn(8, 4), torch.randn(8, 4)
    compiled = torch.compile(lambda q, k, t: fastloss.info_nce(q, k, temperature=t), fullgraph=True, backend="eager")
    for temperature in (0.1, 0.2, 0.3):
        assert torch.equal(compiled(q, k, temperature), fastloss.info_nce(q, k, temperature=temperature))
    dynamic = torch.compile(fastloss.NTXentLoss(0.1), fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(dynamic(q, k), fastloss.nt_xent(q, k, 0.1))
    whole = torch.compile(lambda q, k, t: fastloss.nt_xent(q, k, t), fullgraph=True, dynamic=True, backend="eager")
    for temperature in (1, 2, 3, 0.5, 0.25):
        assert torch.equal(whole(q, k, temperature), fastloss.nt_xent(q, k, temperature))


def test_many_keys_keep_the_memory_of_one_direction_bounded() -> None:
    """128 rows of them would take 586 MiB of float32: no panel of whole rows, but tiles."""
    q, k = torch.randn(130, 1, requires_grad=True), torch.randn(1_200_000, 1, requires_grad=True)
    tile, vectors = 1024 * 512 * 4 * 9 // 8, 8 * 4 * len(k)
    allowed = tile + vectors
    assert peak_bytes(lambda: pair_nll(q, k, torch.tensor(5.0)).backward()) <= allowed < 4 * 128 * len(k)


def kept_bytes(loss: Tensor) -> int:
    """The largest tensor that a graph holds for its backward pass."""
    sizes, stack = [0], [loss.grad_fn]
    while stack:
        node = stack.pop()
        sizes += [x.nbytes for x in getattr(node, "saved_tensors", ()) if x is not None]
        stack += [following for following, _ in node.next_functions if following is not None]
    return max(sizes)


def test_similarities_are_kept_up_to_a_bound_where_they_are_half_of_all() -> None:
    width = 70_000
    for rows, kept in ((900, 4 * 900 * width), (1000, 256 << 20), (1900, 256 << 20), (1950, 0)):
        q, k = torch.zeros(rows, 1, requires_grad=True), torch.zeros(width, 1, requires_grad=True)
        loss = similarity_lse(q, k, torch.tensor(5.0))[0].sum()
        assert kept_bytes(loss) == max(kept, 4 * width), rows
