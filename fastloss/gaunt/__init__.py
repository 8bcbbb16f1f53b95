"""Products of functions on the sphere (Gaunt tensor products) in O(L³), any degree, with derivatives of high order."""

from fastloss.gaunt.functional import (
    gaunt_convolution,
    gaunt_power,
    gaunt_product,
    gaunt_tensor_product,
    spherical_harmonics,
)
from fastloss.gaunt.modules import GauntTensorProduct

__all__ = [
    "GauntTensorProduct",
    "gaunt_convolution",
    "gaunt_power",
    "gaunt_product",
    "gaunt_tensor_product",
    "spherical_harmonics",
]
