"""The losses as dense textbook formulas: what every backend must compute, and what the tests measure against.

Each function stores the whole similarity matrix, is differentiated by plain autograd, and computes in the dtype of
its inputs (call it with float64 for a reference value). None of its code is shared with the kernels.
"""

from fastloss.reference.contrastive import clip_loss, info_nce, nt_xent
from fastloss.reference.gaunt import (
    gaunt_convolution,
    gaunt_power,
    gaunt_product,
    gaunt_tensor_product,
    spherical_harmonics,
)

__all__ = [
    "clip_loss",
    "gaunt_convolution",
    "gaunt_power",
    "gaunt_product",
    "gaunt_tensor_product",
    "info_nce",
    "nt_xent",
    "spherical_harmonics",
]
