"""Fast, memory-flat loss functions for PyTorch."""

from fastloss import reference
from fastloss._backends import backends, use_backend
from fastloss.contrastive import ClipLoss, InfoNCE, NTXentLoss, clip_loss, info_nce, nt_xent
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
    "InfoNCE",
    "NTXentLoss",
    "__version__",
    "backends",
    "clip_loss",
    "info_nce",
    "linear_one_hot_mse_loss",
    "linear_spherical_softmax_loss",
    "linear_taylor_softmax_loss",
    "linear_z_loss",
    "nt_xent",
    "one_hot_mse_loss",
    "reference",
    "spherical_softmax_loss",
    "taylor_softmax_loss",
    "use_backend",
    "z_loss",
]
