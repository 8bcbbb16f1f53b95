"""Drop-in proof: the same call gives the same loss, gradients and errors as the library it stands in for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastloss
import fastloss.reference
from tests import peers
from tests.contrastive.problems import upstream_of
from tests.support import assert_as_accurate_as_torch, assert_equal_to_rounding

pytestmark = pytest.mark.usefixtures("backend")

Loss = Callable[..., Tensor]
ROWS, WIDTH, NEGATIVES = 37, 24, 11
LARGEST_LOGIT = 20.0  # of all calls below: 1 / 0.05, or a scale of 14.3 times unit vectors


def features(*shape: int, seed: int, unit: bool = False) -> Tensor:
    x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1) if unit else x


def gradients(loss: Loss, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    leaves = tuple(x.to(dtype).requires_grad_() for x in tensors)
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream_of(value))


def assert_same(ours: Loss, theirs: Loss, *tensors: Tensor) -> None:
    """Equal in float64 to rounding; in float32 as accurate as the peer. Losses and gradients of all tensors."""
    truth = gradients(theirs, tensors, torch.float64)
    terms = 2 * ROWS + NEGATIVES + WIDTH
    names = ["loss", *(f"gradient of argument {i}" for i in range(len(tensors)))]
    for name, a, b in zip(names, gradients(ours, tensors, torch.float64), truth, strict=True):
        magnitude = LARGEST_LOGIT * max(1.0, float(b.abs().max()))
        assert_equal_to_rounding(a, b, terms=terms, magnitude=magnitude, name=name)
    single = zip(
        names, gradients(ours, tensors, torch.float32), truth, gradients(theirs, tensors, torch.float32), strict=True
    )
    for name, a, b, c in single:
        magnitude = LARGEST_LOGIT * max(1.0, float(b.abs().max()))
        assert_as_accurate_as_torch(a, b, c, magnitude=magnitude, name=name)


# The reference is what the other tests measure against, so it has to pass the oracles too.
INFO_NCE = pytest.mark.parametrize(
    "info_nce", [fastloss.info_nce, fastloss.reference.info_nce], ids=["fast", "reference"]
)
CLIP_LOSS = pytest.mark.parametrize(
    "clip_loss", [fastloss.clip_loss, fastloss.reference.clip_loss], ids=["fast", "reference"]
)
NT_XENT = pytest.mark.parametrize("nt_xent", [fastloss.nt_xent, fastloss.reference.nt_xent], ids=["fast", "reference"])

NEGATIVE_MODES: dict[str, tuple[dict[str, Any], tuple[Tensor, ...]]] = {
    "in-batch": ({}, ()),
    "in-batch, paired has no effect": ({"negative_mode": "paired"}, ()),
    "unpaired": ({}, (features(NEGATIVES, seed=3),)),
    "unpaired, named": ({"negative_mode": "unpaired"}, (features(NEGATIVES, seed=3),)),
    "paired": ({"negative_mode": "paired"}, (features(ROWS, NEGATIVES, seed=4),)),
    "one negative": ({}, (features(1, seed=5),)),
    "one paired negative": ({"negative_mode": "paired"}, (features(ROWS, 1, seed=6),)),
}


class TestInfoNCEPackage:
    pair = (features(ROWS, seed=1), features(ROWS, seed=2))

    @INFO_NCE
    @pytest.mark.parametrize("mode", NEGATIVE_MODES)
    def test_defaults(self, info_nce: Loss, mode: str) -> None:
        options, negatives = NEGATIVE_MODES[mode]
        assert_same(
            lambda *x: info_nce(*x, **options), lambda *x: peers.info_nce(*x, **options), *self.pair, *negatives
        )

    @INFO_NCE
    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    @pytest.mark.parametrize("mode", NEGATIVE_MODES)
    def test_options(self, info_nce: Loss, mode: str, reduction: str) -> None:
        options, negatives = NEGATIVE_MODES[mode]
        options = {**options, "reduction": reduction, "temperature": 0.05}
        assert_same(
            lambda *x: info_nce(*x, **options), lambda *x: peers.info_nce(*x, **options), *self.pair, *negatives
        )

    def test_positional_arguments_have_the_same_order(self) -> None:
        negatives = features(ROWS, NEGATIVES, seed=4)
        arguments = (*self.pair, negatives, 0.2, "sum", "paired")
        torch.testing.assert_close(fastloss.info_nce(*arguments), peers.info_nce(*arguments))

    @INFO_NCE
    @pytest.mark.parametrize("shape", [(), (ROWS, 1)], ids=str)
    @pytest.mark.parametrize("mode", NEGATIVE_MODES)
    def test_temperature_tensor(self, info_nce: Loss, mode: str, shape: tuple[int, ...]) -> None:
        options, negatives = NEGATIVE_MODES[mode]
        temperature = 0.06 + 0.3 * torch.rand(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

        def call(loss: Loss) -> Loss:
            return lambda t, *x: loss(*x, temperature=t, reduction="none", **options)

        assert_same(call(info_nce), call(peers.info_nce), temperature, *self.pair, *negatives)

    @pytest.mark.parametrize(
        "arguments", [(), (0.05,), (0.05, "sum"), (0.05, "none", "paired"), (0.05, "mean", "unpaired")], ids=str
    )
    def test_module(self, arguments: tuple[Any, ...]) -> None:
        negatives = features(ROWS, NEGATIVES, seed=4) if "paired" in arguments else features(NEGATIVES, seed=3)
        ours, theirs = fastloss.InfoNCE(*arguments), peers.InfoNCE(*arguments)
        assert (ours.temperature, ours.reduction, ours.negative_mode) == (
            theirs.temperature, theirs.reduction, theirs.negative_mode,
        )  # fmt: skip
        assert_same(ours, theirs, *self.pair)
        assert_same(ours, theirs, *self.pair, negatives)

    @pytest.mark.parametrize(
        ("shapes", "options"),
        [
            pytest.param([(5,), (4, 5)], {}, id="query of rank 1"),
            pytest.param([(2, 4, 5), (4, 5)], {}, id="query of rank 3"),
            pytest.param([(4, 5), (5,)], {}, id="positive_key of rank 1"),
            pytest.param([(4, 5), (2, 4, 5)], {}, id="positive_key of rank 3"),
            pytest.param([(4, 5), (3, 5)], {}, id="numbers of samples differ"),
            pytest.param([(4, 5), (4, 6)], {}, id="widths differ"),
            pytest.param([(4, 5), (4, 5), (5,)], {}, id="unpaired negatives of rank 1"),
            pytest.param([(4, 5), (4, 5), (4, 3, 5)], {}, id="unpaired negatives of rank 3"),
            pytest.param([(4, 5), (4, 5), (3, 6)], {}, id="width of unpaired negatives"),
            pytest.param([(4, 5), (4, 5), (3, 5)], {"negative_mode": "paired"}, id="paired negatives of rank 2"),
            pytest.param([(4, 5), (4, 5), (3, 2, 5)], {"negative_mode": "paired"}, id="samples of paired negatives"),
            pytest.param([(4, 5), (4, 5), (4, 2, 6)], {"negative_mode": "paired"}, id="width of paired negatives"),
            pytest.param([(4, 5), (4, 5)], {"reduction": "median"}, id="unknown reduction"),
        ],
    )
    @pytest.mark.parametrize("info_nce", [fastloss.info_nce, peers.info_nce], ids=["fast", "peer"])
    def test_value_errors(self, info_nce: Loss, shapes: list[tuple[int, ...]], options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"."):
            info_nce(*(torch.randn(shape) for shape in shapes), **options)


class TestOpenClip:
    pair = (features(ROWS, seed=1, unit=True), features(ROWS, seed=2, unit=True))
    scale = torch.tensor(14.3, dtype=torch.float64)

    @CLIP_LOSS
    def test_function(self, clip_loss: Loss) -> None:
        assert_same(clip_loss, peers.OpenClipLoss(), *self.pair, self.scale)

    @pytest.mark.parametrize(
        "options", [{}, {"cache_labels": True}, {"local_loss": True, "gather_with_grad": True}], ids=str
    )
    def test_module(self, options: dict[str, bool]) -> None:
        assert_same(fastloss.ClipLoss(**options), peers.OpenClipLoss(**options), *self.pair, self.scale)

    @CLIP_LOSS
    def test_bias(self, clip_loss: Loss) -> None:
        bias = torch.tensor(-3.0, dtype=torch.float64)
        assert_same(clip_loss, peers.OpenClipLoss(), *self.pair, self.scale, bias)

    def test_output_dict(self) -> None:
        ours = fastloss.ClipLoss()(*self.pair, self.scale, None, True)
        theirs = peers.OpenClipLoss()(*self.pair, self.scale, None, True)
        assert ours.keys() == theirs.keys()
        torch.testing.assert_close(ours["contrastive_loss"], theirs["contrastive_loss"])
        named = fastloss.clip_loss(*self.pair, logit_scale=self.scale, output_dict=True)
        assert torch.equal(named["contrastive_loss"], ours["contrastive_loss"])

    def test_unnormalized_features(self) -> None:
        """Features are taken as they come, by both."""
        pair = (features(ROWS, seed=1) / 4, features(ROWS, seed=2) / 4)
        assert_same(fastloss.clip_loss, peers.OpenClipLoss(), *pair, self.scale)


class TestLinearCrossEntropy:
    @CLIP_LOSS
    def test_both_directions(self, clip_loss: Loss) -> None:
        def with_torch(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
            targets = torch.arange(len(image))
            if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
                directions = (
                    F.linear_cross_entropy(scale * image, text, targets),
                    F.linear_cross_entropy(scale * text, image, targets),
                )
            else:
                directions = (
                    F.cross_entropy(F.linear(scale * image, text), targets),
                    F.cross_entropy(F.linear(scale * text, image), targets),
                )
            return sum(directions) / 2

        assert_same(clip_loss, with_torch, *TestOpenClip.pair, TestOpenClip.scale)


class TestLightly:
    pair = (features(ROWS, seed=1), features(ROWS, seed=2))

    @NT_XENT
    @pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0])
    def test_function(self, nt_xent: Loss, temperature: float) -> None:
        assert_same(lambda *z: nt_xent(*z, temperature), peers.LightlyNTXentLoss(temperature), *self.pair)

    @NT_XENT
    def test_default_temperature(self, nt_xent: Loss) -> None:
        assert_same(nt_xent, peers.LightlyNTXentLoss(), *self.pair)

    @pytest.mark.parametrize("arguments", [(), (0.1,), (0.1, 0), (0.1, 0, False)], ids=str)
    def test_module(self, arguments: tuple[Any, ...]) -> None:
        assert_same(fastloss.NTXentLoss(*arguments), peers.LightlyNTXentLoss(*arguments), *self.pair)

    @pytest.mark.parametrize("temperature", [0.0, 1e-9, -1e-9])
    @pytest.mark.parametrize("module", [fastloss.NTXentLoss, peers.LightlyNTXentLoss], ids=["fast", "peer"])
    def test_temperature_next_to_zero(self, module: type[nn.Module], temperature: float) -> None:
        with pytest.raises(ValueError, match=r"1e-0?8"):
            module(temperature)


class TestMetricLearning:
    pair = (features(ROWS, seed=1), features(ROWS, seed=2))

    @NT_XENT
    @pytest.mark.parametrize("temperature", [0.07, 0.5])
    @pytest.mark.parametrize("peer", [peers.MetricNTXentLoss, peers.SupConLoss], ids=["NTXentLoss", "SupConLoss"])
    def test_two_views(self, nt_xent: Loss, peer: type[nn.Module], temperature: float) -> None:
        theirs = peers.SelfSupervisedLoss(peer(temperature=temperature))
        assert_same(lambda *z: nt_xent(*z, temperature), theirs, *self.pair)

    @INFO_NCE
    @pytest.mark.parametrize("temperature", [0.07, 0.5])
    def test_one_direction(self, info_nce: Loss, temperature: float) -> None:
        theirs = peers.SelfSupervisedLoss(peers.MetricNTXentLoss(temperature=temperature), symmetric=False)
        assert_same(lambda *z: info_nce(*z, temperature=temperature), theirs, *self.pair)
