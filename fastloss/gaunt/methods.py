"""The product in tensor code, differentiable by autograd: the Fourier route."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.gaunt.constants import table


def fft(x1: Tensor, x2: Tensor, l1: int, l2: int, l3: int) -> Tensor:
    """(lanes, d1), (lanes, d2) -> (lanes, d3) by double Fourier series, of Luo, Chen and Krishnapriyan (2024)."""
    band = l1 + l2
    size = 2 * band + 1

    def series(x: Tensor, degree: int) -> Tensor:
        gather, to_fourier, orders = (
            table(f"fourier.{part}", [degree], x) for part in ("gather", "to_fourier", "orders")
        )
        by_order = F.pad(x, (0, 1))[:, gather]
        by_u = torch.einsum("nml,mlu->num", by_order.to(to_fourier.dtype), to_fourier)
        padded: Tensor = torch.fft.fft2(by_u @ orders, s=(size, size))
        return padded

    product = torch.fft.ifft2(series(x1, l1) * series(x2, l2))
    integrals, orders = (table(f"from_fourier.{part}", [band, l3], x1) for part in (0, 1))
    by_order = product @ orders.T
    coefficients = torch.einsum("num,mlu->nml", by_order, integrals).real
    result: Tensor = coefficients.flatten(1)[:, table("columns", [l3], x1)]
    return result
