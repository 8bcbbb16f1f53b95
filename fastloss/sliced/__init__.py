"""Sliced optimal transport between point clouds, at the speed of a sort."""

from fastloss.sliced.functional import (
    energy_sliced_wasserstein,
    max_sliced_wasserstein,
    sliced_gromov_wasserstein,
    sliced_wasserstein,
    sliced_wasserstein_matrix,
    soft_correspondence,
)
from fastloss.sliced.modules import SlicedWassersteinLoss
from fastloss.sliced.plans import TransportPlan, expected_sliced_plan, min_sliced_transport_plan, sliced_plans
from fastloss.sliced.pot import max_sliced_wasserstein_distance, sliced_wasserstein_distance
from fastloss.sliced.sphere import sliced_wasserstein_sphere, sliced_wasserstein_sphere_unif

__all__ = [
    "SlicedWassersteinLoss",
    "TransportPlan",
    "energy_sliced_wasserstein",
    "expected_sliced_plan",
    "max_sliced_wasserstein",
    "max_sliced_wasserstein_distance",
    "min_sliced_transport_plan",
    "sliced_gromov_wasserstein",
    "sliced_plans",
    "sliced_wasserstein",
    "sliced_wasserstein_distance",
    "sliced_wasserstein_matrix",
    "sliced_wasserstein_sphere",
    "sliced_wasserstein_sphere_unif",
    "soft_correspondence",
]
