"""Relations between the losses and invariances that hold whatever the numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss
from tests.contrastive.problems import VARIANTS, Problem, evaluate, make_problem
from tests.support import assert_equal_to_rounding

pytestmark = pytest.mark.usefixtures("backend")

FUNCTIONS = ["info_nce", "info_nce symmetric", "clip_loss", "nt_xent"]


def double(variant: str, **sizes: int) -> Problem:
    return make_problem(variant, dtype=torch.float64, **sizes)


def assert_same(actual: Tensor, expected: Tensor, problem: Problem) -> None:
    terms = 4 * sum(x.shape[-2] for x in problem.features.values()) + problem.width
    assert_equal_to_rounding(actual, expected, terms=terms, magnitude=problem.largest_logit)


class TestDirections:
    @pytest.mark.parametrize("variant", ["info_nce", "info_nce key_ids", "info_nce key_ids row_temperature"])
    def test_both_directions_averaged_are_symmetric(self, variant: str) -> None:
        problem = double(variant)
        q, k, t = problem.tensors.values()
        ids = {name: x for name, x in problem.options.items() if name.endswith("ids")}
        swapped = {"query_ids": ids["key_ids"], "key_ids": ids["query_ids"]} if ids else {}
        forth = fastloss.info_nce(q, k, temperature=t, reduction="none", **ids)
        back = fastloss.info_nce(k, q, temperature=t, reduction="none", **swapped)
        both = fastloss.info_nce(q, k, temperature=t, reduction="none", symmetric=True, **ids)
        assert_same(both, (forth + back) / 2, problem)

    @pytest.mark.parametrize("variant", ["info_nce", "info_nce ids", "info_nce key_ids"])
    def test_symmetric_is_clip_loss_of_unit_vectors(self, variant: str) -> None:
        problem = double(variant)
        q, k, t = problem.tensors.values()
        ids = [problem.options.get(name) for name in ("query_ids", "key_ids")]
        clip = fastloss.clip_loss(
            F.normalize(q), F.normalize(k), 1 / t, reduction="none", image_ids=ids[0], text_ids=ids[1]
        )
        assert_same(problem(fastloss, symmetric=True), clip, problem)

    @pytest.mark.parametrize("variant", ["clip_loss", "clip_loss key_ids row_temperature"])
    def test_clip_loss_is_symmetric_in_its_arguments(self, variant: str) -> None:
        problem = double(variant)
        image, text, scale = problem.tensors.values()
        ids = problem.options.get("image_ids"), problem.options.get("text_ids")
        swapped = fastloss.clip_loss(text, image, scale, reduction="none", image_ids=ids[1], text_ids=ids[0])
        assert_same(swapped, problem(fastloss), problem)

    @pytest.mark.parametrize("variant", ["nt_xent", "nt_xent ids row_temperature"])
    def test_nt_xent_is_symmetric_in_its_arguments(self, variant: str) -> None:
        problem = double(variant)
        z0, z1, _ = problem.tensors.values()
        swapped = problem(fastloss, {**problem.tensors, "z0": z1, "z1": z0})
        assert_same(swapped.roll(len(z0)), problem(fastloss), problem)

    def test_nt_xent_is_info_nce_with_the_own_view_as_negatives(self) -> None:
        """Anchors of z0: their negatives are the other z1 (in-batch) and the other z0 (extra, but not themselves)."""
        problem = double("nt_xent")
        z0, z1, t = problem.tensors.values()
        ids = torch.arange(len(z0))
        info = fastloss.info_nce(
            z0, z1, temperature=t, reduction="none", query_ids=ids, key_ids=ids.repeat(2), extra_negatives=z0
        )
        assert_same(problem(fastloss)[: len(z0)], info, problem)


class TestNegatives:
    def test_in_batch_is_paired_with_the_other_keys(self) -> None:
        problem = double("info_nce row_temperature")
        q, k, t = problem.tensors.values()
        others = torch.stack([torch.cat([k[:i], k[i + 1 :]]) for i in range(len(k))])
        paired = fastloss.info_nce(q, k, others, t, "none", "paired")
        assert_same(paired, problem(fastloss), problem)

    def test_unpaired_is_paired_with_the_same_keys(self) -> None:
        problem = double("info_nce unpaired")
        q, k, t, negatives = problem.tensors.values()
        paired = fastloss.info_nce(q, k, negatives.expand(len(q), -1, -1), t, "none", "paired")
        assert_same(paired, problem(fastloss), problem)

    def test_extra_negatives_are_more_unpaired_ones(self) -> None:
        problem = double("info_nce extra")
        q, k, t, extra = problem.tensors.values()
        ids = torch.arange(len(q))
        key_ids = torch.cat([ids, torch.full((len(extra),), -1)])
        unpaired = fastloss.info_nce(q, k, torch.cat([k, extra]), t, "none", query_ids=ids, key_ids=key_ids)
        assert_same(unpaired, problem(fastloss), problem)

    @pytest.mark.parametrize(("variant", "names"), [
        ("info_nce", ("query_ids",)), ("info_nce symmetric", ("query_ids", "key_ids")),
        ("clip_loss", ("image_ids",)), ("nt_xent", ("ids",)),
    ])  # fmt: skip
    def test_distinct_ids_change_nothing(self, variant: str, names: tuple[str, ...]) -> None:
        problem = double(variant)
        ids = torch.randperm(33, generator=torch.Generator().manual_seed(0)) - 7
        assert_same(problem(fastloss, **dict.fromkeys(names, ids)), problem(fastloss), problem)

    @pytest.mark.parametrize(("variant", "name"), [
        ("info_nce", "query_ids"), ("info_nce symmetric", "query_ids"), ("clip_loss", "image_ids"), ("nt_xent", "ids"),
    ])  # fmt: skip
    def test_two_samples_of_one_id_each_lose_the_other(self, variant: str, name: str) -> None:
        """The loss of the rest does not change, that of the two falls."""
        problem = double(variant)
        ids = torch.arange(33)
        ids[7] = 20
        given, plain = problem(fastloss, **{name: ids}), problem(fastloss)
        sample = torch.arange(33).repeat(len(plain) // 33)
        two = (sample == 7) | (sample == 20)
        assert_same(given[~two], plain[~two], problem)
        assert bool((given[two] < plain[two]).all())


class TestInvariances:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_permutation_of_the_batch(self, variant: str) -> None:
        rows = 33
        problem = double(variant, rows=rows, columns=17)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(3))

        def permute(x: object) -> object:
            if not isinstance(x, Tensor) or x.dim() == 0 or len(x) not in (rows, rows + 17):
                return x
            return torch.cat([x[:rows][order], x[rows:]])

        permuted = Problem(
            problem.function,
            {name: permute(x) for name, x in problem.tensors.items()},
            {name: permute(x) for name, x in problem.options.items()},
        )
        loss, plain = permuted(fastloss), problem(fastloss)
        views = len(plain) // rows
        expected = torch.cat([part[order] for part in plain.chunk(views)])
        assert_same(loss, expected, problem)

    @pytest.mark.parametrize("factor", [2.0, 1e-3, 1e6])
    @pytest.mark.parametrize("variant", ["info_nce symmetric", "info_nce unpaired", "info_nce paired", "nt_xent"])
    def test_scale_of_normalized_features(self, variant: str, factor: float) -> None:
        problem = double(variant)
        scaled = problem.with_tensors(**{name: factor * x for name, x in problem.features.items()})
        assert_same(scaled(fastloss), problem(fastloss), problem)

    @pytest.mark.parametrize(
        "variant", ["info_nce", "info_nce symmetric", "info_nce unpaired", "info_nce paired", "nt_xent"]
    )
    def test_gradient_of_normalized_features_is_orthogonal_to_them(self, variant: str) -> None:
        problem = double(variant)
        for name, gradient in evaluate(problem).gradients.items():
            if name in problem.features:
                along = (gradient * problem.tensors[name]).sum(-1)
                assert_same(along, torch.zeros_like(along), problem)

    @pytest.mark.parametrize("variant", ["info_nce dot", "nt_xent dot", "info_nce unpaired dot", "info_nce paired dot"])
    def test_temperature_is_the_scale_of_dot_products(self, variant: str) -> None:
        problem = double(variant)
        scaled = {name: 3 * x for name, x in problem.features.items()}
        warmer = problem.with_tensors(**scaled, temperature=9 * problem.tensors["temperature"])
        assert_same(warmer(fastloss), problem(fastloss), problem)

    @pytest.mark.parametrize("variant", ["info_nce dot", "info_nce unpaired dot", "info_nce paired dot"])
    def test_shift_of_all_keys(self, variant: str) -> None:
        """The same vector added to all keys adds the same number to all logits of a query."""
        problem = double(variant)
        shift = torch.ones(16, dtype=torch.float64)
        keys = {name: x + shift for name, x in problem.features.items() if name != "query"}
        shifted = problem.with_tensors(**keys)
        assert_same(shifted(fastloss), problem(fastloss), shifted)

    @pytest.mark.parametrize("bias", [-10.0, 0.0, 3.5])
    def test_logit_bias_changes_nothing(self, bias: float) -> None:
        problem = double("clip_loss")
        given = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
        loss = problem(fastloss, logit_bias=given)
        assert_same(loss.detach(), problem(fastloss), problem)
        assert float(torch.autograd.grad(loss.sum(), given)[0]) == 0
        assert_same(problem(fastloss, logit_bias=bias), problem(fastloss), problem)

    @pytest.mark.parametrize("variant", ["info_nce symmetric", "clip_loss", "nt_xent"])
    def test_rotation_of_all_features(self, variant: str) -> None:
        problem = double(variant)
        rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(5)).double()).Q
        rotated = problem.with_tensors(**{name: x @ rotation for name, x in problem.features.items()})
        assert_same(rotated(fastloss), problem(fastloss), problem)

    @pytest.mark.parametrize("variant", FUNCTIONS)
    def test_uniform_similarities_give_the_log_of_the_number_of_candidates(self, variant: str) -> None:
        problem = double(variant)
        first = next(iter(problem.features.values()))[:1].expand(33, -1)
        same = problem.with_tensors(**dict.fromkeys(problem.features, first))
        candidates = 65.0 if variant == "nt_xent" else 33.0
        loss = same(fastloss)
        assert_same(loss, torch.full_like(loss, candidates).log(), problem)


class TestReductions:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_sum_and_mean(self, variant: str) -> None:
        problem = double(variant)
        losses = problem(fastloss)
        assert losses.shape == ((66,) if problem.function == "nt_xent" else (33,))
        assert bool((losses >= 0).all())
        total, mean = problem(fastloss, reduction="sum"), problem(fastloss, reduction="mean")
        assert total.shape == mean.shape == ()
        many = torch.finfo(torch.float64).eps * len(losses)
        torch.testing.assert_close(total, losses.sum(), rtol=many, atol=0)
        torch.testing.assert_close(total, len(losses) * mean, rtol=many, atol=0)
