"""The spherical distances against POT and the reference."""

from __future__ import annotations

import ot
import pytest
import torch
from torch import Tensor

import fastloss
from tests import support


def assert_equal_to_rounding(actual: Tensor, expected: Tensor, **options: float) -> None:
    support.assert_equal_to_rounding(actual.detach(), expected.detach(), **options)


def sphere(n: int, seed: int, d: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    return torch.nn.functional.normalize(x, dim=1).requires_grad_()


def weights(n: int, seed: int) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(0)


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_sphere_is_the_reference_and_pot(p: int, weighted: bool) -> None:
    x, y = sphere(13, 0), sphere(9, 1)
    ab = (weights(13, 2).requires_grad_(), weights(9, 3).requires_grad_()) if weighted else (None, None)
    value, log = fastloss.sliced_wasserstein_sphere(x, y, *ab, n_projections=6, p=p, seed=4, log=True)
    want, expected = fastloss.reference.sliced_wasserstein_sphere(x, y, *ab, n_projections=6, p=p, seed=4, log=True)
    assert_equal_to_rounding(value.detach(), want.detach(), terms=1000)
    assert_equal_to_rounding(log["projected_emds"].detach(), expected["projected_emds"].detach(), terms=1000)
    fixed = [None if w is None else w.detach() for w in ab]
    peer = ot.sliced_wasserstein_sphere(x, y, *fixed, n_projections=6, p=p, seed=4)
    assert abs(float((value - peer).detach())) < 1e-6  # POT stops its search at 1e-6
    if p > 1:  # at p = 1 the best shift is an interval, and any of its ends a subgradient
        leaves = [t for t in (x, y, *ab) if t is not None]
        for g, w in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(want, leaves), strict=True):
            assert_equal_to_rounding(g, w, terms=4000)


@pytest.mark.parametrize("weighted", [False, True])
def test_uniform_is_the_reference_and_pot(weighted: bool) -> None:
    x = sphere(40, 0)
    a = weights(40, 2) if weighted else None
    value = fastloss.sliced_wasserstein_sphere_unif(x, a, seed=4)
    want = fastloss.reference.sliced_wasserstein_sphere_unif(x, a, seed=4)
    assert_equal_to_rounding(value.detach(), want.detach(), terms=400)
    for g, w in zip(torch.autograd.grad(value, x), torch.autograd.grad(want, x), strict=True):
        assert_equal_to_rounding(g, w, terms=4000)
    if a is None:  # POT leaves weights in the order of the points while it sorts the points
        peer = ot.sliced_wasserstein_sphere_unif(x, seed=4)
        assert_equal_to_rounding(value.detach(), peer.detach(), terms=4000)


def test_identical_clouds_give_zero_and_gradient_zero() -> None:
    x = sphere(20, 0)
    value = fastloss.sliced_wasserstein_sphere(x, x.detach(), seed=1)
    (grad,) = torch.autograd.grad(value, x)
    assert float(value.detach()) < 1e-6
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("name", ["sliced_wasserstein_sphere", "sliced_wasserstein_sphere_unif"])
def test_errors(name: str) -> None:
    x = sphere(4, 0).detach()
    clouds = (x, x) if name == "sliced_wasserstein_sphere" else (x,)
    function = getattr(fastloss, name)
    with pytest.raises(ValueError, match=r"`X_s` must consist of unit vectors \(to 1e-4\), got others"):
        function(2 * x, *clouds[1:])
    with pytest.raises(ValueError, match=r"`projections` must be a tensor of shape \(L, 3, 2\), L >= 1, got \(3, 5\)"):
        function(*clouds, projections=torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"`projections` .* L >= 1, got \(0, 3, 2\)"):
        function(*clouds, projections=torch.ones(0, 3, 2))
    with pytest.raises(TypeError, match=r"`projections` must be a floating-point tensor, got torch\.int64"):
        function(*clouds, projections=torch.ones(1, 3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"`X_s` must be float64 or float32, got torch\.float16"):
        function(*(cloud.half() for cloud in clouds))
    with pytest.raises(TypeError, match=r"`seed` must be None, an int or a torch\.Generator, got str"):
        function(*clouds, seed="a")
    with pytest.raises(ValueError, match="`a` must sum to one"):
        function(*clouds, a=torch.ones(4))
    with pytest.raises(ValueError, match=r"`a` must have shape \(4,\), got \(1, 4\)"):
        function(*clouds, a=torch.full((1, 4), 0.25))
    with pytest.raises(TypeError, match="`log` must be True or False, got int"):
        function(*clouds, log=1)
    frames = torch.eye(3, dtype=torch.float64)[:, :2].repeat(2, 1, 1)
    function(*clouds, projections=frames)
    for bad in (0 * frames, torch.ones_like(frames), frames * torch.tensor([1.0, 1 + 1e-7]), frames * torch.nan):
        frames[1] = bad[1]
        with pytest.raises(ValueError, match=r"`projections` must have orthonormal columns \(to 1e-08\), .* plane 1"):
            function(*clouds, projections=frames)
    function(*clouds, projections=torch.linalg.qr(torch.randn(50, 3, 2))[0].bfloat16())
    line = torch.ones(4, 1)
    with pytest.raises(ValueError, match="`X_s` must have at least two dimensions"):
        function(*(line for _ in clouds))


def test_clouds_of_two_dtypes_meet_in_the_wider() -> None:
    x, y = sphere(13, 0).detach(), sphere(9, 1).detach().float()
    expected = fastloss.sliced_wasserstein_sphere(x, y.double(), seed=4)
    assert torch.equal(fastloss.sliced_wasserstein_sphere(x, y, seed=4), expected)
    assert fastloss.sliced_wasserstein_sphere(y, x, seed=4).dtype == torch.float64


@pytest.mark.parametrize("weighted", [False, True])
def test_derivatives_are_finite_differences(weighted: bool) -> None:
    x, y = sphere(6, 0).detach(), sphere(5, 1).detach()
    logits = [weights(n, n).log() for n in (6, 5)] if weighted else []

    def values(*leaves: Tensor) -> Tensor:
        points = [torch.nn.functional.normalize(t, dim=1) for t in leaves[:2]]
        ab = [t.softmax(0) for t in leaves[2:]]
        uniform = fastloss.sliced_wasserstein_sphere_unif(points[0], *ab[:1], n_projections=4, seed=4)
        return torch.stack([fastloss.sliced_wasserstein_sphere(*points, *ab, n_projections=4, seed=4), uniform])

    leaves = [t.requires_grad_() for t in (x, y, *logits)]
    assert torch.autograd.gradcheck(values, leaves)
    assert torch.autograd.gradgradcheck(values, leaves)
