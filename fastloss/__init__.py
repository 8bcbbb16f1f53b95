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

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "GauntTensorProduct",
    "InfoNCE",
    "NTXentLoss",
    "__version__",
    "backends",
    "clip_loss",
    "gaunt_convolution",
    "gaunt_power",
    "gaunt_product",
    "gaunt_tensor_product",
    "info_nce",
    "nt_xent",
    "reference",
    "spherical_harmonics",
    "use_backend",
]
