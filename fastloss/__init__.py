"""Fast, memory-flat loss functions for PyTorch."""

from fastloss import reference
from fastloss._backends import backends, use_backend
from fastloss.contrastive import ClipLoss, InfoNCE, NTXentLoss, clip_loss, info_nce, nt_xent

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "InfoNCE",
    "NTXentLoss",
    "__version__",
    "backends",
    "clip_loss",
    "info_nce",
    "nt_xent",
    "reference",
    "use_backend",
]
