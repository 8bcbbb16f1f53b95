"""Fast, memory-flat loss functions for PyTorch."""

from fastloss import reference
from fastloss._backends import backends, use_backend
from fastloss.contrastive import ClipLoss, InfoNCE, NTXentLoss, clip_loss, info_nce, nt_xent
from fastloss.gaunt import (
    GauntTensorProduct,
    gaunt_convolution,
    gaunt_power,
    gaunt_product,
    gaunt_tensor_product,
    spherical_harmonics,
)
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
from fastloss.spherical import (
    FactoredOutput,
    FactoredSGD,
    linear_one_hot_mse_loss,
    linear_spherical_softmax_loss,
    linear_taylor_softmax_loss,
    linear_z_loss,
    one_hot_mse_loss,
    spherical_softmax_loss,
    taylor_softmax_loss,
    z_loss,
)

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "FactoredOutput",
    "FactoredSGD",
    "GauntTensorProduct",
    "InfoNCE",
    "NTXentLoss",
    "SlicedWassersteinLoss",
    "__version__",
    "backends",
    "clip_loss",
    "energy_sliced_wasserstein",
    "gaunt_convolution",
    "gaunt_power",
    "gaunt_product",
    "gaunt_tensor_product",
    "info_nce",
    "linear_one_hot_mse_loss",
    "linear_spherical_softmax_loss",
    "linear_taylor_softmax_loss",
    "linear_z_loss",
    "max_sliced_wasserstein",
    "max_sliced_wasserstein_distance",
    "nt_xent",
    "one_hot_mse_loss",
    "reference",
    "sliced_gromov_wasserstein",
    "sliced_wasserstein",
    "sliced_wasserstein_distance",
    "sliced_wasserstein_matrix",
    "sliced_wasserstein_sphere",
    "sliced_wasserstein_sphere_unif",
    "soft_correspondence",
    "spherical_harmonics",
    "spherical_softmax_loss",
    "taylor_softmax_loss",
    "use_backend",
    "z_loss",
]
