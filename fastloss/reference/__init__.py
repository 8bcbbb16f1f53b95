"""The losses as dense textbook formulas: what every backend must compute, and what the tests measure against.

Each function stores the whole similarity matrix, is differentiated by plain autograd, and computes in the dtype of
its inputs (call it with float64 for a reference value). None of its code is shared with the kernels.
"""

from fastloss.reference.contrastive import clip_loss, info_nce, nt_xent
from fastloss.reference.sliced import (
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

__all__ = [
    "clip_loss",
    "energy_sliced_wasserstein",
    "info_nce",
    "max_sliced_wasserstein",
    "max_sliced_wasserstein_distance",
    "nt_xent",
    "sliced_gromov_wasserstein",
    "sliced_wasserstein",
    "sliced_wasserstein_distance",
    "sliced_wasserstein_matrix",
    "sliced_wasserstein_sphere",
    "sliced_wasserstein_sphere_unif",
    "soft_correspondence",
]
