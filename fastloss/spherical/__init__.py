"""The spherical losses: functions of the sum, the sum of squares and the target's entry of a row of logits."""

from fastloss.spherical.functional import (
    linear_one_hot_mse_loss,
    linear_spherical_softmax_loss,
    linear_taylor_softmax_loss,
    linear_z_loss,
    one_hot_mse_loss,
    spherical_softmax_loss,
    taylor_softmax_loss,
    z_loss,
)
from fastloss.spherical.modules import FactoredOutput, FactoredSGD

__all__ = [
    "FactoredOutput",
    "FactoredSGD",
    "linear_one_hot_mse_loss",
    "linear_spherical_softmax_loss",
    "linear_taylor_softmax_loss",
    "linear_z_loss",
    "one_hot_mse_loss",
    "spherical_softmax_loss",
    "taylor_softmax_loss",
    "z_loss",
]
