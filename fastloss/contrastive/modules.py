"""The contrastive losses as modules, with the constructors of the libraries they stand in for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastloss._checks import check_choice, check_flag, check_group, check_reduction, check_scale
from fastloss._distributed import SCHEDULES
from fastloss.contrastive.functional import MIN_TEMPERATURE, clip_loss, info_nce, nt_xent

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class InfoNCE(nn.Module):
    """:func:`fastloss.info_nce` as a module; a drop-in for ``info_nce.InfoNCE``.

    Args:
        temperature, reduction, negative_mode, normalize, symmetric, group, schedule: as :func:`fastloss.info_nce`. A
            temperature that is an ``nn.Parameter`` is learned, with `group` the same on all ranks.

    Example:
        >>> loss = fastloss.InfoNCE(temperature=nn.Parameter(torch.tensor(0.1)))
        >>> loss(torch.eye(3), torch.eye(3)).requires_grad
        True
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
        *,
        normalize: bool = True,
        symmetric: bool = False,
        group: ProcessGroup | DeviceMesh | None = None,
        schedule: str = "auto",
    ) -> None:
        super().__init__()
        check_scale("InfoNCE", "temperature", temperature, positive=True)
        check_reduction("InfoNCE", reduction)
        check_choice("InfoNCE", "negative_mode", negative_mode, ("unpaired", "paired"))
        check_flag("InfoNCE", "normalize", normalize)
        check_flag("InfoNCE", "symmetric", symmetric)
        group = check_group("InfoNCE", group)
        check_choice("InfoNCE", "schedule", schedule, SCHEDULES)
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode
        self.normalize = normalize
        self.symmetric = symmetric
        self.group = group
        self.schedule = schedule

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        *,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        extra_negatives: Tensor | None = None,
    ) -> Tensor:
        """(B, D) queries and keys, (M, D) or (B, M, D) negatives: a loss of shape () or, for "none", (B,)."""
        return info_nce(
            query,
            positive_key,
            negative_keys,
            self.temperature,
            self.reduction,
            self.negative_mode,
            normalize=self.normalize,
            symmetric=self.symmetric,
            query_ids=query_ids,
            key_ids=key_ids,
            extra_negatives=extra_negatives,
            group=self.group,
            schedule=self.schedule,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={_shown(self.temperature)}, reduction={self.reduction!r}, "
            f"negative_mode={self.negative_mode!r}, normalize={self.normalize}, symmetric={self.symmetric}"
        )


class ClipLoss(nn.Module):
    """:func:`fastloss.clip_loss` as a module; a drop-in for ``open_clip.ClipLoss``.

    Args:
        local_loss, gather_with_grad: accepted for compatibility: the value and the gradients are always those of the
            loss over all ranks, as open_clip's with ``gather_with_grad=True``.
        cache_labels: accepted for compatibility; there are no labels to cache.
        rank, world_size: with a `world_size` above 1, those of the group.
        reduction, group, schedule: as :func:`fastloss.clip_loss`; by default the group is that of all processes if
            `world_size` is above 1.

    Raises:
        ValueError: `rank` and `world_size` are not those of the group, or there is none.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        reduction: str = "mean",
        group: ProcessGroup | DeviceMesh | None = None,
        schedule: str = "auto",
    ) -> None:
        super().__init__()
        check_reduction("ClipLoss", reduction)
        if use_horovod:
            raise ValueError("ClipLoss: `use_horovod` must be False, got True")
        group = check_group("ClipLoss", group)
        check_choice("ClipLoss", "schedule", schedule, SCHEDULES)
        if world_size != 1:
            group = _group_of("ClipLoss", group, rank, world_size)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.reduction = reduction
        self.group = group
        self.schedule = schedule

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """(B, D) features of images and texts, (B,) ids: a loss of shape () or, for "none", (B,); maybe in a dict."""
        return clip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            output_dict,
            reduction=self.reduction,
            image_ids=image_ids,
            text_ids=text_ids,
            group=self.group,
            schedule=self.schedule,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class NTXentLoss(nn.Module):
    """:func:`fastloss.nt_xent` as a module; a drop-in for ``lightly.loss.NTXentLoss`` without a memory bank.

    Args:
        temperature, reduction, normalize: as :func:`fastloss.nt_xent`. A float must be positive, at least 1e-8; an
            ``nn.Parameter`` is learned.
        memory_bank_size: must be 0, or a shape that begins with 0; a bank of negatives is
            ``fastloss.info_nce(..., extra_negatives=bank)``.
        gather_distributed: True asks for the loss over all ranks of `group`, where processes are initialised.
        group: a process group or a mesh of one dimension; by default, with `gather_distributed`, that of all processes.
        schedule: as :func:`fastloss.nt_xent`.

    Raises:
        TypeError, ValueError: a temperature that is not finite or below 1e-8, or a memory bank.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | tuple[int, int] = 0,
        gather_distributed: bool = False,
        *,
        reduction: str = "mean",
        normalize: bool = True,
        group: ProcessGroup | DeviceMesh | None = None,
        schedule: str = "auto",
    ) -> None:
        super().__init__()
        check_scale("NTXentLoss", "temperature", temperature, positive=True, least=MIN_TEMPERATURE)
        check_reduction("NTXentLoss", reduction)
        check_flag("NTXentLoss", "normalize", normalize)
        rows = memory_bank_size[:1] if isinstance(memory_bank_size, (tuple, list)) else (memory_bank_size,)
        if tuple(rows) != (0,):
            raise ValueError(
                "NTXentLoss: `memory_bank_size` must be 0; pass a bank as `extra_negatives` of info_nce, "
                f"got {memory_bank_size}"
            )
        self.temperature = temperature
        group = check_group("NTXentLoss", group)
        check_choice("NTXentLoss", "schedule", schedule, SCHEDULES)
        self.gather_distributed = gather_distributed
        self.reduction = reduction
        self.normalize = normalize
        self.group = group
        self.schedule = schedule

    def forward(self, out0: Tensor, out1: Tensor, *, ids: Tensor | None = None) -> Tensor:
        """(B, D) views and (B,) ids: a loss of shape () or, for "none", (2B,)."""
        group = self.group
        if group is None and self.gather_distributed and _initialised():
            group = torch.distributed.group.WORLD
        return nt_xent(
            out0,
            out1,
            self.temperature,
            reduction=self.reduction,
            normalize=self.normalize,
            ids=ids,
            group=group,
            schedule=self.schedule,
        )

    def extra_repr(self) -> str:
        return f"temperature={_shown(self.temperature)}, reduction={self.reduction!r}, normalize={self.normalize}"


def _shown(temperature: float | Tensor) -> str:
    return "learned" if isinstance(temperature, Tensor) else str(temperature)


def _initialised() -> bool:
    """Whether there are processes; there may be no `is_initialized` where PyTorch was built without them."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _group_of(module: str, group: Any, rank: int, world_size: int) -> Any:
    """The group that `rank` and `world_size` describe."""
    if group is None:
        if not _initialised():
            raise ValueError(f"{module}: `world_size` must be 1 without initialised processes, got {world_size}")
        group = torch.distributed.group.WORLD
    is_rank, is_size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    if (rank, world_size) != (is_rank, is_size):
        raise ValueError(
            f"{module}: `rank` and `world_size` must be {is_rank} and {is_size}, those of the group, "
            f"got {rank} and {world_size}"
        )
    return group
