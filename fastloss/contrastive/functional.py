"""The contrastive losses: checks, one or two calls of the streaming ops, and a softplus.

With S_ij = c_ij / T_i and the positive p of row i, every loss of the family is
    loss_i = -log( exp(S_ip) / (exp(S_ip) + sum_{j kept} exp(S_ij)) ) = softplus( log sum_{j kept} exp(S_ij) - S_ip ),
where j runs over negatives only. The softplus form keeps full relative precision when the loss is close to zero, where
a difference of two nearly equal logarithms has none.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastloss._checks import (
    check_choice,
    check_device,
    check_flag,
    check_floating,
    check_group,
    check_ids,
    check_reduction,
    check_scalar_or_rows,
    check_size,
)
from fastloss._distributed import SCHEDULES, World, agree, announced, shared, total
from fastloss._ops import accumulation_dtype
from fastloss.contrastive import distributed
from fastloss.contrastive.ops import nll, pair_nll, self_similarity_lse, similarity_lse
from fastloss.contrastive.tiles import NORM_EPS

# nt_xent up to this rows^2 * width takes one op at 6 flops for each instead of three ops at 4: the calls that are saved
# are worth more there. 512 rows at width 256, tried on two Zen 4 cores (no committed measurement).
SMALL_SELF_SIMILARITY = 1 << 26
MIN_TEMPERATURE = 1e-8  # of nt_xent, as lightly's

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


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
    group: ProcessGroup | DeviceMesh | None = None,
    schedule: str = "auto",
) -> Tensor:
    r"""InfoNCE loss, without the batch-by-batch matrix of similarities.

    .. math::
        \ell_i = -\log \frac{\exp(c_{ii} / T_i)}{\exp(c_{ii} / T_i) + \sum_{j \in N(i)} \exp(c_{ij} / T_i)},
        \qquad c_{ij} = \frac{q_i \cdot k_j}{\max(|q_i|, 10^{-12}) \max(|k_j|, 10^{-12})}

    A drop-in for ``info_nce`` of the package *info-nce-pytorch*; the keyword-only arguments are additions.

    Args:
        query: (B, D), float64, float32, bfloat16 or float16; any strides.
        positive_key: (B, D); row i is the positive of query i.
        negative_keys: None: the negatives of query i are the other rows of `positive_key`. Else the only negatives:
            (M, D) shared by all queries ("unpaired") or (B, M, D), M for each ("paired").
        temperature: float > 0, or a tensor, differentiable: of one element, or one value a query, (B,) or (B, 1).
        reduction: "none" gives (B,); "sum"; "mean".
        negative_mode: "unpaired" or "paired"; matters only with `negative_keys`.
        normalize: False takes dot products for c_ij instead of cosines.
        symmetric: average of both directions, query to key and key to query, in one sweep (in-batch only). Key j is
            an anchor with the temperature of sample j.
        query_ids: (B,) integers; a negative whose id equals the query's is left out (a false negative).
        key_ids: ids of the keys; by default `query_ids`. In-batch (B,), or (B + M,) with those of `extra_negatives`;
            (M,) for "unpaired" and (B, M) for "paired" negatives.
        extra_negatives: (M, D) more negatives for every query beside the in-batch ones: a queue, a memory bank, mined
            ones. They join the query-to-key direction. Without ids they are never left out.
        group: None, or a process group or a mesh of one dimension: the rows are those of its rank, and the loss is that
            of the rows of all ranks, see Several processes. `negative_keys` and `extra_negatives` stay with the queries
            of their rank.
        schedule: "all-gather", "ring" or "auto": how rows travel between the ranks.

    Returns:
        float64 for float64 inputs, float32 otherwise (16-bit inputs are multiplied and summed in float32).
        A query with no negatives left has loss 0. B = 0 gives 0 for "sum" and NaN for "mean".
        A row of zeros has cosine 0 with everything, and gradient 0. So has a row longer than 1.8e19 (float64: 1.3e154)
        or without an entry above 2.6e-23 (1.6e-162): the sum of its squares is infinite or zero.
        NaN in a row makes every loss that uses it NaN. So does a positive of similarity +inf, also by overflow; one of
        -inf makes its loss +inf.

    Raises:
        TypeError: not dense tensors, or not of a floating (ids: integer) dtype; a flag that is no bool.
        ValueError: shapes or devices that do not fit, a float temperature that is not finite and positive,
            unknown `reduction` or `negative_mode`, options that exclude each other.
        RuntimeError: a second derivative or a forward-mode one (``torch.func.jvp``, ``hessian``) is asked for, except
            with "paired" negatives, which are plain PyTorch and have both.

    Memory:
        O((B + M) D): the gradients, one tile of 2 MiB, and normalised keys of up to 16 MiB or blocks of 3072 D
        numbers. Up to 512 MiB of similarities, the first 256 MiB of them are kept for the backward pass; of more,
        none. With "sum" or "mean", gradients of up to 32 MiB (in both directions: and similarities of up to 32 MiB)
        are found in the forward pass and held twice, with a panel of whole rows, at most 32 MiB.
        "paired" stores its (B, M) logits, fewer than its inputs.

    Several processes:
        With `group` every rank calls with its own rows, any number of them, also none. "sum" and "mean" return the loss
        of the rows of all ranks on every rank, "none" the losses of the rank's own rows. Gradients are those of the sum
        over the ranks of what they return, so that averages over the ranks come out right: DistributedDataParallel and
        FSDP, which average, give a model the gradient that one process with all rows would. So the gradient of a
        rank's rows, or of one temperature a row, is W times that of one process with W ranks; the gradient of a 0-dim
        temperature is, on every rank, that of one process, averaged again or not. Without either of them, average the
        gradients of the model over the ranks.

        Losses and their backward passes come in the same order on all ranks. A rank without rows passes tensors that
        require gradients as those of the others do. With one row on every rank, a temperature of one element is one for
        all rows. The transforms of ``torch.func`` do not work with `group`, and raise.

        A queue that is the same on all ranks, as `extra_negatives`, is what it is in one process; negatives of a rank's
        own are seen by its queries alone. A 0-dim temperature must be the same on all ranks.

        Before any work the ranks show each other sizes, dtypes and options in one small all-gather: where they do not
        fit, every rank raises. A rank that does not come is an error after the group's timeout.

        "all-gather" sends rows to all ranks at once, and gradients back by one all-to-all, (W - 1) n D numbers each,
        and holds the rows of all ranks. "ring" passes them on from rank to rank while the last ones are computed with,
        holds two blocks of rows and two of gradients, and sends the rows again in the backward pass, unless there is
        but one block to visit (two ranks; in nt_xent also three). "auto" is "ring" then, and for rows of more than
        64 MiB of all ranks together; else it is "all-gather". Similarities are never sent; each is computed on one
        rank, in the backward pass again but for those kept. Rows travel in their dtype, gradients in the accumulation
        dtype.
        ``torch.compile`` breaks its graph at a loss with `group` (with ``fullgraph=True`` it raises).

    Determinism:
        The result does not depend on the number of threads as far as the BLAS library's products do not (MKL's do on
        some processors, for deep and narrow ones).

    Source:
        van den Oord, Li and Vinyals, *Representation learning with contrastive predictive coding*, 2018.

    Example:
        >>> q, k = torch.eye(3), torch.eye(3)
        >>> fastloss.info_nce(q, k, temperature=1.0)  # log(e + 2) - 1
        tensor(0.5514)
    """
    name = "info_nce"
    group = check_group(name, group)
    query, positive_key, negative_keys, extra_negatives, temperature, query_ids, key_ids, extra_ids = announced(
        name, group, _info_nce_arguments, query, positive_key, negative_keys, temperature, reduction, negative_mode,
        normalize, symmetric, query_ids, key_ids, extra_negatives, schedule,
    )  # fmt: skip
    world = None
    if group is not None:
        facts = {
            "`reduction`": reduction,
            "`normalize`": normalize,
            "`symmetric`": symmetric,
            "whether `negative_keys` is given": negative_keys is not None,
            "whether `query_ids` is given": query_ids is not None,
        }
        differentiable = {
            "query": query,
            "positive_key": positive_key,
            "temperature": temperature,
            "negative_keys": negative_keys,
            "extra_negatives": extra_negatives,
        }
        world = agree(name, group, query, ("temperature", temperature), differentiable, schedule, facts)
    scale = (temperature if world is None else shared(world, temperature)).reciprocal()

    if negative_keys is not None:
        positive = scale * _row_similarity(query, positive_key, normalize)
        if negative_keys.dim() == 2:
            negatives, _, _ = similarity_lse(
                query, negative_keys, scale, q_ids=query_ids, k_ids=key_ids, normalize=normalize
            )
        else:
            logits = scale.expand(len(query)).unsqueeze(1) * _row_similarity(
                query.unsqueeze(1), negative_keys, normalize
            )
            if query_ids is not None and key_ids is not None:
                logits = logits.masked_fill(query_ids.unsqueeze(1) == key_ids, -math.inf)
            negatives = logits.logsumexp(1)
        return _reduce(nll(negatives, positive), reduction, world)

    if reduction != "none" and extra_negatives is None and world is None:
        value = pair_nll(
            query, positive_key, scale, q_ids=query_ids, k_ids=key_ids, normalize=normalize, symmetric=symmetric
        )
        return value if reduction == "sum" else value / len(query)
    row, col, diagonal = _sweep(world)(
        query,
        positive_key,
        scale,
        scale if symmetric else None,
        q_ids=query_ids,
        k_ids=key_ids,
        normalize=normalize,
    )
    positive = scale * diagonal
    if extra_negatives is not None:
        ids = None if extra_ids is None else query_ids
        extra, _, _ = similarity_lse(query, extra_negatives, scale, q_ids=ids, k_ids=extra_ids, normalize=normalize)
        row = _add_exp(row, extra)
    loss = nll(row, positive)
    if symmetric:
        loss = (loss + nll(col, positive)) / 2
    return _reduce(loss, reduction, world)


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
    group: ProcessGroup | DeviceMesh | None = None,
    schedule: str = "auto",
) -> Tensor | dict[str, Tensor]:
    r"""CLIP's symmetric contrastive loss, both directions from one sweep over the similarities.

    .. math::
        \ell_i = -\tfrac12 \log\frac{e^{s\, x_i \cdot y_i}}{\sum_j e^{s\, x_i \cdot y_j}}
                 -\tfrac12 \log\frac{e^{s\, x_i \cdot y_i}}{\sum_j e^{s\, x_j \cdot y_i}}

    A drop-in for open_clip's ``ClipLoss()(image_features, text_features, logit_scale, logit_bias, output_dict)``.

    Args:
        image_features: (B, D), normalised by the caller; float64, float32, bfloat16 or float16; any strides.
        text_features: (B, D), likewise; row i belongs to image i.
        logit_scale: s, the factor itself (open_clip's models return ``logit_scale.exp()``): float, or a
            differentiable tensor, of one element or one value a row (B,).
        logit_bias: a constant added to all logits, float or tensor of one element. The loss does not depend on it; its
            gradient is zero.
        output_dict: True returns ``{"contrastive_loss": loss}``.
        reduction: "none" gives (B,); "sum"; "mean".
        image_ids: (B,) integers; pairs of equal id other than (i, i) are left out (false negatives).
        text_ids: (B,) integers; by default `image_ids`.
        group: None, or a process group or a mesh of one dimension: the rows are those of its rank, and the loss is that
            of the rows of all ranks, see :func:`info_nce`.
        schedule: "all-gather", "ring" or "auto": how rows travel between the ranks, see :func:`info_nce`.

    Returns:
        float64 for float64 inputs, float32 otherwise; B = 0 gives 0 for "sum" and NaN for "mean".

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`info_nce`.

    Memory, determinism:
        As :func:`info_nce`.

    Source:
        Radford et al., *Learning transferable visual models from natural language supervision*, 2021.

    Example:
        >>> x = torch.nn.functional.normalize(torch.eye(4), dim=-1)
        >>> fastloss.clip_loss(x, x, 10.0)  # log(1 + 3 exp(-10))
        tensor(0.0001)
    """
    name = "clip_loss"
    group = check_group(name, group)
    image_features, text_features, scale, bias, image_ids, text_ids = announced(
        name, group, _clip_arguments, image_features, text_features, logit_scale, logit_bias, output_dict, reduction,
        image_ids, text_ids, schedule,
    )  # fmt: skip
    world = None
    if group is not None:
        facts = {
            "`reduction`": reduction,
            "whether `image_ids` is given": image_ids is not None,
        }
        differentiable = {
            "image_features": image_features,
            "text_features": text_features,
            "logit_scale": scale,
        }
        world = agree(name, group, image_features, ("logit_scale", scale), differentiable, schedule, facts)
    if world is not None:
        scale = shared(world, scale)
    if reduction == "none" or world is not None:
        row, col, diagonal = _sweep(world)(image_features, text_features, scale, scale, q_ids=image_ids, k_ids=text_ids)
        positive = scale * diagonal
        loss = _reduce((nll(row, positive) + nll(col, positive)) / 2, reduction, world)
    else:
        loss = pair_nll(image_features, text_features, scale, q_ids=image_ids, k_ids=text_ids, symmetric=True)
        loss = loss if reduction == "sum" else loss / len(image_features)
    if bias is not None:
        loss = loss + 0 * bias.reshape(())
    return {"contrastive_loss": loss} if output_dict else loss


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    normalize: bool = True,
    ids: Tensor | None = None,
    group: ProcessGroup | DeviceMesh | None = None,
    schedule: str = "auto",
) -> Tensor:
    r"""NT-Xent, the loss of SimCLR: 2B anchors, each against its other view and the 2B - 2 views of the others.

    .. math::
        \ell_i = -\log \frac{\exp(c_{i,p(i)} / T)}{\sum_{j \ne i} \exp(c_{ij} / T)}, \qquad
        z = [z^0; z^1],\; p(i) = i \pm B,\; c = \text{cosine}

    A drop-in for lightly's ``NTXentLoss(temperature)(z0, z1)``, and the same as pytorch-metric-learning's
    ``SelfSupervisedLoss(NTXentLoss(temperature))(z0, z1)``. Each pair of the symmetric (2B, 2B) matrix is computed
    once, except in small batches, (2B)^2 D up to 2^26 and a scalar reduction, where calls count for more than flops.

    Args:
        z0: (B, D) first views; float64, float32, bfloat16 or float16; any strides.
        z1: (B, D) second views.
        temperature: float >= 1e-8, or a differentiable tensor, of one element or one value a sample (B,).
        reduction: "none" gives (2B,), the anchors of z0 first; "sum"; "mean".
        normalize: False takes dot products for c_ij instead of cosines.
        ids: (B,) integers; both views of another sample of equal id are left out (false negatives).
        group: None, or a process group or a mesh of one dimension: the rows are those of its rank, and the loss is that
            of the rows of all ranks, see :func:`info_nce`.
        schedule: "all-gather", "ring" or "auto": how rows travel between the ranks, see :func:`info_nce`.

    Returns:
        float64 for float64 inputs, float32 otherwise; B = 0 gives 0 for "sum" and NaN for "mean".

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`info_nce`.

    Memory, determinism:
        As :func:`info_nce`.

    Source:
        Chen et al., *A simple framework for contrastive learning of visual representations*, 2020.

    Example:
        >>> z = torch.eye(2)
        >>> fastloss.nt_xent(z, z, temperature=1.0)  # log(e + 2) - 1
        tensor(0.5514)
    """
    name = "nt_xent"
    group = check_group(name, group)
    z0, z1, temperature, ids = announced(
        name, group, _nt_xent_arguments, z0, z1, temperature, reduction, normalize, ids, schedule
    )
    b, world = len(z0), None
    if group is not None:
        facts = {
            "`reduction`": reduction,
            "`normalize`": normalize,
            "whether `ids` is given": ids is not None,
        }
        differentiable = {"z0": z0, "z1": z1, "temperature": temperature}
        world = agree(name, group, z0, ("temperature", temperature), differentiable, schedule, facts)
    scale = (temperature if world is None else shared(world, temperature)).reciprocal()
    if world is not None:
        views = world.views(2)
        own = torch.arange(b, device=z0.device) if ids is None else ids
        negatives = distributed.self_similarity_lse(
            views,
            torch.cat((z0, z1)),
            _twice(scale),
            torch.cat((own, own)),
            None if ids is None else torch.cat((ids, ids)),
            normalize=normalize,
        )
        positive = scale * _row_similarity(z0, z1, normalize)
        return _reduce(nll(negatives, torch.cat((positive, positive))), reduction, views)
    if reduction != "none" and (2 * b) ** 2 * z0.shape[1] <= SMALL_SELF_SIMILARITY:
        own = torch.arange(b, device=z0.device) if ids is None else ids
        # Equal ids are left out but for the pair (i, i), which is (anchor, other view): also an anchor with itself.
        value = pair_nll(
            torch.cat((z0, z1)),
            torch.cat((z1, z0)),
            _twice(scale),
            q_ids=torch.cat((own, own)),
            k_ids=torch.cat((own, own)),
            normalize=normalize,
        )
        return value if reduction == "sum" else value / (2 * b)
    within0 = self_similarity_lse(z0, scale, ids=ids, normalize=normalize)
    within1 = self_similarity_lse(z1, scale, ids=ids, normalize=normalize)
    row, col, diagonal = similarity_lse(
        z0, z1, scale, scale, q_ids=ids, k_ids=ids, normalize=normalize, drop_diagonal=True
    )
    positive = scale * diagonal
    loss = torch.cat([nll(_add_exp(within0, row), positive), nll(_add_exp(within1, col), positive)])
    return _reduce(loss, reduction)


def _info_nce_arguments(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None, temperature: float | Tensor, reduction: str,
    negative_mode: str, normalize: bool, symmetric: bool, query_ids: Tensor | None, key_ids: Tensor | None,
    extra_negatives: Tensor | None, schedule: str,
) -> tuple[
    Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None
]:  # fmt: skip
    """Checked, in one dtype; the temperature as a tensor, and the ids of the extra negatives apart from the others."""
    name = "info_nce"
    check_flag(name, "normalize", normalize)
    check_flag(name, "symmetric", symmetric)
    check_reduction(name, reduction)
    check_choice(name, "schedule", schedule, SCHEDULES)
    check_choice(name, "negative_mode", negative_mode, ("unpaired", "paired"))
    _check_pair(name, "query", query, "positive_key", positive_key)
    b, d = query.shape
    if negative_keys is not None:
        paired = negative_mode == "paired"
        if symmetric:
            raise ValueError(f"{name}: `symmetric` must be False with `negative_keys`, got True")
        if extra_negatives is not None:
            raise ValueError(f"{name}: `extra_negatives` must be None with `negative_keys`, got a tensor")
        check_floating(name, "negative_keys", negative_keys, "(B, M, D)" if paired else "(M, D)", 3 if paired else 2)
        if paired:
            check_size(name, "negative_keys", negative_keys, 0, b, "one row of negatives a query")
        check_size(name, "negative_keys", negative_keys, -1, d, "the width of `query`")
        check_device(name, "negative_keys", negative_keys, "query", query)
    if extra_negatives is not None:
        check_floating(name, "extra_negatives", extra_negatives, "(M, D)", 2)
        check_size(name, "extra_negatives", extra_negatives, 1, d, "the width of `query`")
        check_device(name, "extra_negatives", extra_negatives, "query", query)
    if negative_keys is not None:
        query, positive_key, negative_keys = _common_dtype(query, positive_key, negative_keys)
    elif extra_negatives is not None:
        query, positive_key, extra_negatives = _common_dtype(query, positive_key, extra_negatives)
    else:
        query, positive_key = _common_dtype(query, positive_key)
    temperature = check_scalar_or_rows(name, "temperature", temperature, b, query, positive=True)
    extra_ids = None
    if query_ids is None:
        if key_ids is not None:
            raise ValueError(f"{name}: `query_ids` must be given with `key_ids`, got None")
    else:
        query_ids = check_ids(name, "query_ids", query_ids, (b,), "query", query)
        if negative_keys is not None:
            if key_ids is None:
                raise ValueError(f"{name}: `key_ids` must be given with `query_ids` and `negative_keys`, got None")
            key_ids = check_ids(name, "key_ids", key_ids, tuple(negative_keys.shape[:-1]), "query", query)
        elif key_ids is None:
            key_ids = query_ids
        elif extra_negatives is not None and isinstance(key_ids, Tensor) and tuple(key_ids.shape) != (b,):
            key_ids = check_ids(name, "key_ids", key_ids, (b + len(extra_negatives),), "query", query)
            key_ids, extra_ids = key_ids[:b], key_ids[b:]
        else:
            key_ids = check_ids(name, "key_ids", key_ids, (b,), "query", query)
    return query, positive_key, negative_keys, extra_negatives, temperature, query_ids, key_ids, extra_ids


def _clip_arguments(
    image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor | None,
    output_dict: bool, reduction: str, image_ids: Tensor | None, text_ids: Tensor | None, schedule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    name = "clip_loss"
    check_flag(name, "output_dict", output_dict)
    check_reduction(name, reduction)
    check_choice(name, "schedule", schedule, SCHEDULES)
    _check_pair(name, "image_features", image_features, "text_features", text_features)
    b = len(image_features)
    image_features, text_features = _common_dtype(image_features, text_features)
    scale = check_scalar_or_rows(name, "logit_scale", logit_scale, b, image_features, positive=False)
    if text_ids is not None and image_ids is None:
        raise ValueError(f"{name}: `image_ids` must be given with `text_ids`, got None")
    if image_ids is not None:
        image_ids = check_ids(name, "image_ids", image_ids, (b,), "image_features", image_features)
        text_ids = image_ids if text_ids is None else text_ids
        text_ids = check_ids(name, "text_ids", text_ids, (b,), "image_features", image_features)
    bias = None
    if logit_bias is not None:
        bias = check_scalar_or_rows(name, "logit_bias", logit_bias, None, image_features, positive=False)
    return image_features, text_features, scale, bias, image_ids, text_ids


def _nt_xent_arguments(
    z0: Tensor, z1: Tensor, temperature: float | Tensor, reduction: str, normalize: bool, ids: Tensor | None,
    schedule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    name = "nt_xent"
    check_flag(name, "normalize", normalize)
    check_reduction(name, reduction)
    check_choice(name, "schedule", schedule, SCHEDULES)
    _check_pair(name, "z0", z0, "z1", z1)
    b = len(z0)
    z0, z1 = _common_dtype(z0, z1)
    temperature = check_scalar_or_rows(name, "temperature", temperature, b, z0, positive=True, least=MIN_TEMPERATURE)
    if ids is not None:
        ids = check_ids(name, "ids", ids, (b,), "z0", z0)
    return z0, z1, temperature, ids


def _sweep(world: World | None) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Statistics over all pairs of rows but the positives, of this process or of all ranks."""
    if world is None:
        return partial(similarity_lse, drop_diagonal=True)
    return partial(distributed.similarity_lse, world)


def _twice(scale: Tensor) -> Tensor:
    return torch.cat((scale, scale)) if scale.dim() else scale


def _check_pair(function: str, name: str, x: Any, other_name: str, other: Any) -> None:
    check_floating(function, name, x, "(B, D)", 2)
    check_floating(function, other_name, other, "(B, D)", 2)
    check_size(function, other_name, other, 0, x.shape[0], f"the rows of `{name}`")
    check_size(function, other_name, other, 1, x.shape[1], f"the width of `{name}`")
    check_device(function, other_name, other, name, x)


def _common_dtype(first: Tensor, *others: Tensor) -> list[Tensor]:
    """The widest dtype among the inputs, as torch promotes it (autocast may hand over mixed ones)."""
    dtype = first.dtype
    for x in others:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in (first, *others)]


def _row_similarity(q: Tensor, k: Tensor, normalize: bool) -> Tensor:
    """Dot products or cosines along the last dimension, broadcast, in the accumulation dtype."""
    dtype = accumulation_dtype(q.dtype)
    q, k = q.to(dtype), k.to(dtype)
    if normalize:  # before the product, which would overflow for long rows; of k, of which there may be many, after it
        q = q * _inverse_norm(q)
    dot = (q * k).sum(-1)  # autocast would round the products of einsum and vecdot
    return dot * _inverse_norm(k).squeeze(-1) if normalize else dot


def _inverse_norm(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm == 0, 0, norm.clamp(min=NORM_EPS).reciprocal())


def _add_exp(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), with gradient zero, not NaN, where both are -inf."""
    nothing = (a == -math.inf) & (b == -math.inf)
    return torch.where(nothing, -math.inf, torch.logaddexp(a.masked_fill(nothing, 0), b))


def _reduce(loss: Tensor, reduction: str, world: World | None = None) -> Tensor:
    """With a world, of the losses of all ranks."""
    if reduction == "none":
        return loss
    if world is None:
        return loss.sum() if reduction == "sum" else loss.mean()
    summed = total(world, loss.sum())
    return summed if reduction == "sum" else summed / sum(world.rows)
