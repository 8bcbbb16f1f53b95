"""Fast, memory-flat loss functions for PyTorch."""

from fastloss import reference
from fastloss._backends import backends, use_backend
from fastloss.contrastive import ClipLoss, InfoNCE, NTXentLoss, clip_loss, info_nce, nt_xent
from fastloss.sliced import (
    SlicedWassersteinLoss,
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

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "InfoNCE",
    "NTXentLoss",
    "SlicedWassersteinLoss",
    "__version__",
    "backends",
    "clip_loss",
    "energy_sliced_wasserstein",
    "info_nce",
    "max_sliced_wasserstein",
    "max_sliced_wasserstein_distance",
    "nt_xent",
    "reference",
    "sliced_gromov_wasserstein",
    "sliced_wasserstein",
    "sliced_wasserstein_distance",
    "sliced_wasserstein_matrix",
    "sliced_wasserstein_sphere",
    "sliced_wasserstein_sphere_unif",
    "soft_correspondence",
    "use_backend",
]
