"""Similarity losses over large batches that never store the batch-by-batch matrix."""

from fastloss.contrastive.functional import clip_loss, info_nce, nt_xent
from fastloss.contrastive.modules import ClipLoss, InfoNCE, NTXentLoss

__all__ = ["ClipLoss", "InfoNCE", "NTXentLoss", "clip_loss", "info_nce", "nt_xent"]
