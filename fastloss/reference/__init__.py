"""The losses as dense textbook formulas: what every backend must compute, and what the tests measure against.

Each function stores the whole similarity matrix, is differentiated by plain autograd, and computes in the dtype of
its inputs (call it with float64 for a reference value). None of its code is shared with the kernels.
"""

from fastloss.reference.contrastive import clip_loss, info_nce, nt_xent
from fastloss.reference.factored import FactoredOutput
from fastloss.reference.gaunt import (
    gaunt_convolution,
    gaunt_power,
    gaunt_product,
    gaunt_tensor_product,
    spherical_harmonics,
)
from fastloss.reference.sliced import (
    energy_sliced_wasserstein,
    expected_sliced_plan,
    max_sliced_wasserstein,
    max_sliced_wasserstein_distance,
    min_sliced_transport_plan,
    sliced_gromov_wasserstein,
    sliced_plans,
    sliced_wasserstein,
    sliced_wasserstein_distance,
    sliced_wasserstein_matrix,
    sliced_wasserstein_sphere,
    sliced_wasserstein_sphere_unif,
    soft_correspondence,
)
from fastloss.reference.spherical import (
    linear_one_hot_mse_loss,
    linear_spherical_softmax_loss,
    linear_taylor_softmax_loss,
    linear_z_loss,
    one_hot_mse_loss,
    spherical_softmax_loss,
    taylor_softmax_loss,
    z_loss,
)

__all__ = [
    "FactoredOutput",
    "clip_loss",
    "energy_sliced_wasserstein",
    "expected_sliced_plan",
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
    "min_sliced_transport_plan",
    "nt_xent",
    "one_hot_mse_loss",
    "sliced_gromov_wasserstein",
    "sliced_plans",
    "sliced_wasserstein",
    "sliced_wasserstein_distance",
    "sliced_wasserstein_matrix",
    "sliced_wasserstein_sphere",
    "sliced_wasserstein_sphere_unif",
    "soft_correspondence",
    "spherical_harmonics",
    "spherical_softmax_loss",
    "taylor_softmax_loss",
    "z_loss",
]
