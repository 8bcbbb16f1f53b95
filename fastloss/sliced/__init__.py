"""Sliced optimal transport between point clouds, at the speed of a sort."""

from fastloss.sliced.functional import (
    energy_sliced_wasserstein,
    max_sliced_wasserstein,
    max_sliced_wasserstein_distance,
    sliced_gromov_wasserstein,
    sliced_wasserstein,
    sliced_wasserstein_distance,
    sliced_wasserstein_matrix,
    sliced_wasserstein_sphere,
    sliced_wasserstein_sphere_unif,
    soft_correspondence,
)
from fastloss.sliced.modules import SlicedWassersteinLoss

__all__ = [
    "SlicedWassersteinLoss",
    "energy_sliced_wasserstein",
    "max_sliced_wasserstein",
    "max_sliced_wasserstein_distance",
    "sliced_gromov_wasserstein",
    "sliced_wasserstein",
    "sliced_wasserstein_distance",
    "sliced_wasserstein_matrix",
    "sliced_wasserstein_sphere",
    "sliced_wasserstein_sphere_unif",
    "soft_correspondence",
]
