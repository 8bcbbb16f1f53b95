"""Sliced optimal transport between point clouds, at the speed of a sort."""

from fastloss.sliced.functional import (
    energy_sliced_wasserstein,
    max_sliced_wasserstein,
    sliced_gromov_wasserstein,
    sliced_wasserstein,
    sliced_wasserstein_matrix,
    soft_correspondence,
)

__all__ = [
    "energy_sliced_wasserstein",
    "max_sliced_wasserstein",
    "sliced_gromov_wasserstein",
    "sliced_wasserstein",
    "sliced_wasserstein_matrix",
    "soft_correspondence",
]
