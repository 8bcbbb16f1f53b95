"""The contrastive losses as dense formulas.

All three are one expression, the cross-entropy of picking the positive among the candidates of an anchor:

    loss_i = log(exp(S_ip) + sum over kept negatives j of exp(S_ij)) - S_ip

They differ in what the candidates are. Arguments are documented in `fastloss.contrastive.functional` and are taken
here as valid.
"""

import math

import torch
from torch import Tensor


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    normalize: bool = True,
    symmetric: bool = False,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    extra_negatives: Tensor | None = None,
) -> Tensor:
    """InfoNCE: query i against its positive key i and either the other positive keys or explicit negative keys.

    S_ij = <query_i, key_j> / T_i, with rows scaled to unit length if `normalize`.
    """
    if normalize:
        query, positive_key = _unit(query), _unit(positive_key)
        negative_keys = None if negative_keys is None else _unit(negative_keys)
        extra_negatives = None if extra_negatives is None else _unit(extra_negatives)
    rows = len(query)
    row_temperature = _column(temperature)
    positive = (query * positive_key).sum(1, keepdim=True) / row_temperature

    if negative_keys is not None:
        negative = query @ negative_keys.T if negative_mode == "unpaired" else (query[:, None] * negative_keys).sum(-1)
        kept = torch.ones_like(negative, dtype=torch.bool)
        if query_ids is not None and key_ids is not None:
            kept = query_ids[:, None] != key_ids
        return _reduce(_cross_entropy(positive, negative / row_temperature, kept), reduction)

    extra = query.new_empty(0, query.shape[1]) if extra_negatives is None else extra_negatives
    kept = _other_samples(rows, query_ids, key_ids, query.device)
    kept_extra = kept.new_ones(rows, len(extra))
    if query_ids is not None and key_ids is not None and len(key_ids) > rows:
        kept_extra = query_ids[:, None] != key_ids[rows:]
    similarity = query @ positive_key.T
    negative = torch.cat([similarity, query @ extra.T], 1) / row_temperature
    losses = _cross_entropy(positive, negative, torch.cat([kept, kept_extra], 1))
    if symmetric:
        losses = (losses + _cross_entropy(positive, similarity.T / row_temperature, kept.T)) / 2
    return _reduce(losses, reduction)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    output_dict: bool = False,
    *,
    reduction: str = "mean",
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
) -> Tensor | dict[str, Tensor]:
    """CLIP: mean of the cross-entropies of picking the text of each image and the image of each text.

    S_ij = logit_scale_i * <image_i, text_j> + logit_bias; the features are used as they come.
    """
    scale = _column(logit_scale)
    bias = 0.0 if logit_bias is None else logit_bias
    similarity = image_features @ text_features.T
    kept = _other_samples(len(similarity), image_ids, text_ids, similarity.device)
    positive = scale * similarity.diagonal()[:, None] + bias
    from_images = _cross_entropy(positive, scale * similarity + bias, kept)
    from_texts = _cross_entropy(positive, scale * similarity.T + bias, kept.T)
    loss = _reduce((from_images + from_texts) / 2, reduction)
    return {"contrastive_loss": loss} if output_dict else loss


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    normalize: bool = True,
    ids: Tensor | None = None,
) -> Tensor:
    """NT-Xent: each of the 2B views against all others; the positive is the other view of the same sample."""
    z = torch.cat([z0, z1])
    if normalize:
        z = _unit(z)
    if isinstance(temperature, Tensor) and temperature.numel() > 1:
        temperature = temperature.flatten().repeat(2)  # one value a sample serves both of its views
    logits = z @ z.T / _column(temperature)
    positive = torch.cat([logits.diagonal(len(z0)), logits.diagonal(-len(z0))])[:, None]
    sample = (torch.arange(len(z0), device=z.device) if ids is None else ids).repeat(2)
    # Equal samples are the anchor itself, its positive, and other samples of the same id: none is a negative.
    return _reduce(_cross_entropy(positive, logits, sample[:, None] != sample), reduction)


def _unit(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) row by row; a row of zeros stays zero and gets zero gradient."""
    zero = (x == 0).all(-1, keepdim=True)
    norm = torch.linalg.vector_norm(torch.where(zero, 1.0, x), dim=-1, keepdim=True).clamp_min(1e-12)
    return torch.where(zero, 0.0, x / norm)


def _column(value: float | Tensor) -> float | Tensor:
    """One value for all rows, or one a row, as a factor of (rows, columns)."""
    return value.reshape(-1, 1) if isinstance(value, Tensor) else value


def _other_samples(rows: int, ids: Tensor | None, key_ids: Tensor | None, device: torch.device) -> Tensor:
    """(rows, rows) mask of the keys that are negatives: not the anchor's own, and of another id."""
    kept = ~torch.eye(rows, dtype=torch.bool, device=device)
    if ids is not None:
        kept = kept & (ids[:, None] != (ids if key_ids is None else key_ids[:rows]))
    return kept


def _cross_entropy(positive: Tensor, negative: Tensor, kept: Tensor) -> Tensor:
    """log(exp(positive) + sum over kept of exp(negative)) - positive, from (B, 1) and (B, N) logits to (B,).

    Written as log(1 + exp(difference)), which keeps its relative accuracy when the loss is next to zero.
    """
    others = torch.logsumexp(torch.where(kept, negative, -math.inf), 1, keepdim=True)
    difference = others - positive - 0 * positive.clamp(min=0)  # +inf - +inf is NaN, also with the positive left out
    return torch.logaddexp(torch.zeros_like(positive), difference).squeeze(1)


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean()
