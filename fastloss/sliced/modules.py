"""The sliced losses as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastloss._checks import check_reduction
from fastloss.sliced.functional import sliced_wasserstein


class SlicedWassersteinLoss(nn.Module):
    """:func:`fastloss.sliced_wasserstein` as a module; fresh directions at every call unless `projections` are given.

    Args:
        n_projections, p, projections, sampler, generator, root, streaming, reduction: as
            :func:`fastloss.sliced_wasserstein`. `projections` become a buffer, or stay the parameter they are, and move
            with the module.

    Example:
        >>> loss = fastloss.SlicedWassersteinLoss(projections=torch.eye(2))
        >>> loss(torch.zeros(3, 2), torch.ones(3, 2))
        tensor(1.)
    """

    projections: Tensor | None

    def __init__(
        self,
        n_projections: int = 128,
        p: float = 2.0,
        *,
        projections: Tensor | None = None,
        sampler: str = "random",
        generator: torch.Generator | None = None,
        root: bool = False,
        streaming: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_reduction("SlicedWassersteinLoss", reduction)
        self.n_projections = n_projections
        self.p = p
        if isinstance(projections, nn.Parameter):
            self.projections = projections
        else:
            self.register_buffer("projections", projections)
        self.sampler = sampler
        self.generator = generator
        self.root = root
        self.streaming = streaming
        self.reduction = reduction

    def forward(
        self, x: Tensor, y: Tensor, *, x_weights: Tensor | None = None, y_weights: Tensor | None = None
    ) -> Tensor:
        return sliced_wasserstein(
            x,
            y,
            n_projections=self.n_projections,
            p=self.p,
            x_weights=x_weights,
            y_weights=y_weights,
            projections=self.projections,
            sampler=self.sampler,
            generator=self.generator,
            root=self.root,
            streaming=self.streaming,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        drawn = f"n_projections={self.n_projections}, sampler={self.sampler!r}"
        given = drawn if self.projections is None else f"projections={tuple(self.projections.shape)}"
        return f"{given}, p={self.p}, root={self.root}"
