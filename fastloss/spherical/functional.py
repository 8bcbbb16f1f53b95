"""The spherical losses: checks, one call of an op for four statistics of each row, and a formula of these.

With the mean m of a row's C logits, the sum of squares v about it, and the target's logit o_t,
    sum o_k = C m,    sum o_k^2 = v + C m^2,    o_t - m,
every loss of the family is a function of these four numbers. Variances come as v / C, never as a difference of squares,
and sums of squares as sums of two squares, so nothing cancels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss._checks import (
    check_device,
    check_flag,
    check_floating,
    check_group,
    check_ids,
    check_int,
    check_number,
    check_reduction,
    check_size,
)
from fastloss._distributed import World, agree, announced
from fastloss.spherical.distributed import facts_of, split_class_weight, split_linear_moments
from fastloss.spherical.ops import class_ids, linear_moments, row_moments
from fastloss.spherical.tiles import accumulation_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def z_loss(
    logits: Tensor,
    target: Tensor,
    a: float = 1.0,
    b: float = 0.0,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
    gradient_overwrites_logits: bool = False,
) -> Tensor:
    r"""The Z-loss: a classification loss that no shift and no scaling up of a row of logits changes.

    .. math::
        \ell = \tfrac1a \log\bigl(1 + e^{a (b - z_t)}\bigr), \qquad z_t = \frac{o_t - \mu}{\sigma + \varepsilon},
        \quad \mu = \tfrac1C \sum_k o_k, \quad \sigma^2 = \tfrac1C \sum_k (o_k - \mu)^2

    Args:
        logits: (B, C), float64, float32, bfloat16 or float16; any strides.
        target: (B,) integers, the classes; 0 <= target < C, or `ignore_index`.
        a: float > 0, the sharpness of the softplus.
        b: float, the margin: the standardised logit that a target should exceed.
        class_weight: (C,) a factor for each class, the ``weight`` of ``F.cross_entropy``.
        sample_weight: (B,) a factor for each example; both multiply, and both are differentiable.
        ignore_index: rows with this target have loss 0 and gradient 0, and count nowhere.
        reduction: "none" gives (B,); "sum"; "mean", the weighted mean over the rows that are not ignored.
        eps: float >= 0, added to the standard deviation.
        gradient_overwrites_logits: True writes the gradient into the memory of `logits`, which saves (B, C) numbers.
            The logits are lost then, and autograd refuses whoever else has saved them. `logits` must not be a leaf.
            Not under torch.func; under torch.compile, whose graphs own their buffers, it changes nothing.

    Returns:
        float64 for float64 inputs, float32 otherwise (16-bit inputs are summed in float32).
        A row whose logits are all equal (one class is such a row) has z = 0, loss log(1 + exp(a b)) / a and gradient 0;
        the gradient has no limit there, and grows as 1 / sigma close to it.
        A row whose sum of squares about the mean overflows (in float32, beyond 3.4e38) has loss NaN. Where sigma is
        not far above eps, or the squares underflow, z tends to 0.
        B = 0, or all rows ignored, gives 0 for "sum" and NaN for "mean". NaN in a row makes its loss NaN.

    Raises:
        TypeError: not tensors, or not of a floating (target: integer) dtype.
        ValueError: shapes or devices that do not fit, no classes, a target out of range, a float out of its range,
            unknown `reduction`, a leaf to overwrite.
        RuntimeError: a second derivative is asked for, or overwritten logits are used in a backward pass.

    Memory:
        O(B) beyond the gradient, which has the shape of the logits; 16-bit or strided logits pass through blocks of 2
        MiB. The logits are read once in the forward pass, and once in the backward pass, which writes the gradient
        once.

    Determinism:
        The result does not depend on the number of threads.

    Source:
        de Brébisson and Vincent, *The Z-loss: a shift and scale invariant classification loss belonging to the
        spherical family*, 2016.

    Example:
        >>> o = torch.tensor([[3.0, 0.0, 0.0, 0.0]])
        >>> fastloss.z_loss(o, torch.tensor([0]))  # z = sqrt(3): log(1 + exp(-sqrt(3)))
        tensor(0.1629)
    """
    name = "z_loss"
    a, b, eps = check_z(name, a, b, eps, _dtype(logits))
    rows = _rows(name, logits, target, class_weight, sample_weight, ignore_index, reduction, gradient_overwrites_logits)
    return rows.reduce(_z(rows, a, b, eps), reduction)


def spherical_softmax_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-6,
    gradient_overwrites_logits: bool = False,
) -> Tensor:
    r"""Log-loss of the spherical softmax, whose probabilities are proportional to squares of the logits.

    .. math::
        \ell = -\log \frac{o_t^2 + \varepsilon}{\sum_k (o_k^2 + \varepsilon)}

    Args:
        logits: (B, C), float64, float32, bfloat16 or float16; any strides.
        target: (B,) integers, the classes; 0 <= target < C, or `ignore_index`.
        class_weight: (C,) a factor for each class, the ``weight`` of ``F.cross_entropy``.
        sample_weight: (B,) a factor for each example; both multiply, and both are differentiable.
        ignore_index: rows with this target have loss 0 and gradient 0, and count nowhere.
        reduction: "none" gives (B,); "sum"; "mean", the weighted mean over the rows that are not ignored.
        eps: float > 0, added to each square. It bounds the gradient, by 1 / sqrt(eps).
        gradient_overwrites_logits: True writes the gradient into the memory of `logits`, which saves (B, C) numbers.
            The logits are lost then, and autograd refuses whoever else has saved them. `logits` must not be a leaf.
            Not under torch.func; under torch.compile, whose graphs own their buffers, it changes nothing.

    Returns:
        float64 for float64 inputs, float32 otherwise (16-bit inputs are summed in float32).
        Logits that are all 0 have loss log C and gradient 0. The sign of a logit does not matter.
        B = 0, or all rows ignored, gives 0 for "sum" and NaN for "mean". NaN in a row makes its loss NaN.

    Raises:
        TypeError: not tensors, or not of a floating (target: integer) dtype.
        ValueError: shapes or devices that do not fit, no classes, a target out of range, a float out of its range,
            unknown `reduction`, a leaf to overwrite.
        RuntimeError: a second derivative is asked for, or overwritten logits are used in a backward pass.

    Memory, determinism:
        As :func:`z_loss`.

    Source:
        Vincent, de Brébisson and Bouthillier, *Efficient exact gradient update for training deep networks with very
        large sparse targets*, 2015; de Brébisson and Vincent, *An exploration of softmax alternatives belonging to the
        spherical loss family*, 2016.

    Example:
        >>> o = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
        >>> fastloss.spherical_softmax_loss(o, torch.tensor([0]))  # -log(4 / 6)
        tensor(0.4055)
    """
    name = "spherical_softmax_loss"
    eps = _check_eps(name, eps, _dtype(logits))
    rows = _rows(name, logits, target, class_weight, sample_weight, ignore_index, reduction, gradient_overwrites_logits)
    return rows.reduce(_spherical(rows, eps), reduction)


def taylor_softmax_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    gradient_overwrites_logits: bool = False,
) -> Tensor:
    r"""Log-loss of the Taylor softmax, which takes 1 + o + o^2 / 2 for exp(o).

    .. math::
        \ell = -\log \frac{1 + o_t + o_t^2 / 2}{\sum_k (1 + o_k + o_k^2 / 2)}

    Args:
        logits: (B, C), float64, float32, bfloat16 or float16; any strides.
        target: (B,) integers, the classes; 0 <= target < C, or `ignore_index`.
        class_weight: (C,) a factor for each class, the ``weight`` of ``F.cross_entropy``.
        sample_weight: (B,) a factor for each example; both multiply, and both are differentiable.
        ignore_index: rows with this target have loss 0 and gradient 0, and count nowhere.
        reduction: "none" gives (B,); "sum"; "mean", the weighted mean over the rows that are not ignored.
        gradient_overwrites_logits: True writes the gradient into the memory of `logits`, which saves (B, C) numbers.
            The logits are lost then, and autograd refuses whoever else has saved them. `logits` must not be a leaf.
            Not under torch.func; under torch.compile, whose graphs own their buffers, it changes nothing.

    Returns:
        float64 for float64 inputs, float32 otherwise (16-bit inputs are summed in float32).
        One class has loss 0. Equal logits have loss log C; the polynomial is at least 1/2, so all is finite.
        B = 0, or all rows ignored, gives 0 for "sum" and NaN for "mean". NaN in a row makes its loss NaN.

    Raises:
        TypeError: not tensors, or not of a floating (target: integer) dtype.
        ValueError: shapes or devices that do not fit, no classes, a target out of range, a float out of its range,
            unknown `reduction`, a leaf to overwrite.
        RuntimeError: a second derivative is asked for, or overwritten logits are used in a backward pass.

    Memory, determinism:
        As :func:`z_loss`.

    Source:
        de Brébisson and Vincent, *An exploration of softmax alternatives belonging to the spherical loss family*, 2016.

    Example:
        >>> o = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
        >>> fastloss.taylor_softmax_loss(o, torch.tensor([0]))  # -log(5 / 8)
        tensor(0.4700)
    """
    name = "taylor_softmax_loss"
    rows = _rows(name, logits, target, class_weight, sample_weight, ignore_index, reduction, gradient_overwrites_logits)
    return rows.reduce(_taylor(rows), reduction)


def one_hot_mse_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    gradient_overwrites_logits: bool = False,
) -> Tensor:
    r"""Squared error to a one-hot target, summed over the classes.

    .. math::
        \ell = \sum_k (o_k - [k = t])^2 = \sum_k o_k^2 - 2 o_t + 1

    Args:
        logits: (B, C), float64, float32, bfloat16 or float16; any strides.
        target: (B,) integers, the classes; 0 <= target < C, or `ignore_index`.
        class_weight: (C,) a factor for each class, the ``weight`` of ``F.cross_entropy``.
        sample_weight: (B,) a factor for each example; both multiply, and both are differentiable.
        ignore_index: rows with this target have loss 0 and gradient 0, and count nowhere.
        reduction: "none" gives (B,); "sum"; "mean", the weighted mean over the rows that are not ignored.
        gradient_overwrites_logits: True writes the gradient into the memory of `logits`, which saves (B, C) numbers.
            The logits are lost then, and autograd refuses whoever else has saved them. `logits` must not be a leaf.
            Not under torch.func; under torch.compile, whose graphs own their buffers, it changes nothing.

    Returns:
        float64 for float64 inputs, float32 otherwise (16-bit inputs are summed in float32).
        "mean" is over rows: the result is C times ``F.mse_loss(logits, one_hot)``. The error of the loss is a few units
        in the last place of sum o_k^2 + 1, also where the loss is close to 0.
        B = 0, or all rows ignored, gives 0 for "sum" and NaN for "mean". NaN in a row makes its loss NaN.

    Raises:
        TypeError: not tensors, or not of a floating (target: integer) dtype.
        ValueError: shapes or devices that do not fit, no classes, a target out of range, a float out of its range,
            unknown `reduction`, a leaf to overwrite.
        RuntimeError: a second derivative is asked for, or overwritten logits are used in a backward pass.

    Memory, determinism:
        As :func:`z_loss`.

    Source:
        Vincent, de Brébisson and Bouthillier, *Efficient exact gradient update for training deep networks with very
        large sparse targets*, 2015.

    Example:
        >>> o = torch.tensor([[3.0, 1.0, 1.0]])
        >>> fastloss.one_hot_mse_loss(o, torch.tensor([0]))  # 2^2 + 1 + 1
        tensor(6.)
    """
    name = "one_hot_mse_loss"
    rows = _rows(name, logits, target, class_weight, sample_weight, ignore_index, reduction, gradient_overwrites_logits)
    return rows.reduce(_one_hot_mse(rows), reduction)


def linear_z_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    a: float = 1.0,
    b: float = 0.0,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
    class_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    r"""The Z-loss of a linear layer without its logits: no shift and no scaling up of a row of logits changes it.

    .. math::
        \ell = \tfrac1a \log\bigl(1 + e^{a (b - z_t)}\bigr), \qquad z_t = \frac{o_t - \mu}{\sigma + \varepsilon},
        \quad \mu = \tfrac1C \sum_k o_k, \quad \sigma^2 = \tfrac1C \sum_k (o_k - \mu)^2,
        \qquad o = W h + \beta

    Args:
        hidden: (B, D), float64, float32, bfloat16 or float16; any strides.
        weight: (C, D), one row a class, as in ``nn.Linear``; any of these dtypes.
        target: (B,) integers, the classes; 0 <= target < C, or `ignore_index`.
        bias: (C,) or None.
        a: float > 0, the sharpness of the softplus.
        b: float, the margin: the standardised logit that a target should exceed.
        class_weight: (C,) a factor for each class, the ``weight`` of ``F.cross_entropy``.
        sample_weight: (B,) a factor for each example; both multiply, and both are differentiable.
        ignore_index: rows with this target have loss 0 and gradient 0, and count nowhere.
        reduction: "none" gives (B,); "sum"; "mean", the weighted mean over the rows that are not ignored.
        eps: float >= 0, added to the standard deviation.
        class_group: None, or a process group or a mesh of one dimension, whose ranks split the classes; see Split
            classes.

    Returns:
        float64 for float64 inputs, float32 otherwise (16-bit inputs are summed in float32).
        A row whose logits are all equal (one class is such a row) has z = 0, loss log(1 + exp(a b)) / a and gradient 0;
        the gradient has no limit there, and grows as 1 / sigma close to it.
        A row whose sum of squares about the mean overflows (in float32, beyond 3.4e38) has loss NaN. Where sigma is
        not far above eps, or the squares underflow, z tends to 0.
        B = 0, or all rows ignored, gives 0 for "sum" and NaN for "mean". NaN in a row makes its loss NaN.

    Raises:
        TypeError: not tensors, or not of a floating (target: integer) dtype.
        ValueError: shapes or devices that do not fit, no classes, a target out of range, a float out of its range,
            unknown `reduction`.
        RuntimeError: a second derivative is asked for.

    Memory:
        No (B, C) tensor. Beyond inputs and gradients: (B, D) numbers kept for the backward pass, a tile of 4 MiB, up
        to four more blocks of 4 MiB, two (D, D) matrices, and O(B + C + D). 16-bit inputs: a (B, D) copy in float32.

    Routes:
        With W and b centred about their means (so that a shift of all logits costs no digits), T = W - mean, the sum of
        squares about the mean is |T h|^2. Two orders of the same products give it and its gradients; the fewer flops
        run. Forward: the logits T h, tile by tile, 4BCD flops (2BCD if `hidden` needs no gradient), or the Gram matrix
        T^T T once, 1.25 CD^2 for D >= 256 and 2CD^2 below. Backward: T H^T again, 4BCD, or T (H^T diag H), 2CD^2. So
        batches beyond about D / 2 rows take the Gram route, and cost what D / 2 rows cost. Rows in which the Gram
        route loses 8 bits or more to cancellation, |T h|^2 < |T^T T| |h|^2 / 256, are found and done by logits.

    Split classes:
        With `class_group` each rank passes its rows of `weight`, `bias` and `class_weight`, at least one class, and the
        classes of the ranks follow each other; `hidden`, `sample_weight` and `target`, whose classes are among all,
        are the same on all ranks. So are the loss and the gradients of `hidden` and `sample_weight`, and those of
        `weight` and `bias` are the ranks' rows of them: all are those of one process, to be averaged over other groups
        (of data) only. Sent are 4 or 5 numbers an example and the gradient of `hidden`. Disagreement, absence and
        ``torch.compile`` as in :func:`fastloss.info_nce`.

    Determinism:
        The result does not depend on the number of threads as far as the BLAS library's products do not.

    Source:
        de Brébisson and Vincent, *The Z-loss: a shift and scale invariant classification loss belonging to the
        spherical family*, 2016.

    Example:
        >>> h, w = torch.tensor([[3.0, 0.0]]), torch.eye(4, 2)
        >>> fastloss.linear_z_loss(h, w, torch.tensor([0]))  # the logits are 3, 0, 0, 0
        tensor(0.1629)
    """
    name = "linear_z_loss"
    class_group = check_group(name, class_group)
    a, b, eps = announced(name, class_group, check_z, name, a, b, eps, _dtype(hidden, weight, bias))
    rows = _linear_rows(
        name, hidden, weight, target, bias, class_weight, sample_weight, ignore_index, reduction, class_group,
        {"`a`": a, "`b`": b, "`eps`": eps},
    )  # fmt: skip
    return rows.reduce(_z(rows, a, b, eps), reduction)


def linear_spherical_softmax_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-6,
    class_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    r"""Log-loss of the spherical softmax of a linear layer without its logits: probabilities go as their squares.

    .. math::
        \ell = -\log \frac{o_t^2 + \varepsilon}{\sum_k (o_k^2 + \varepsilon)},
        \qquad o = W h + \beta

    Args:
        hidden: (B, D), float64, float32, bfloat16 or float16; any strides.
        weight: (C, D), one row a class, as in ``nn.Linear``; any of these dtypes.
        target: (B,) integers, the classes; 0 <= target < C, or `ignore_index`.
        bias: (C,) or None.
        class_weight: (C,) a factor for each class, the ``weight`` of ``F.cross_entropy``.
        sample_weight: (B,) a factor for each example; both multiply, and both are differentiable.
        ignore_index: rows with this target have loss 0 and gradient 0, and count nowhere.
        reduction: "none" gives (B,); "sum"; "mean", the weighted mean over the rows that are not ignored.
        eps: float > 0, added to each square. It bounds the gradient, by 1 / sqrt(eps).
        class_group: None, or a process group or a mesh of one dimension, whose ranks split the classes; see
            :func:`linear_z_loss`.

    Returns:
        float64 for float64 inputs, float32 otherwise (16-bit inputs are summed in float32).
        Logits that are all 0 have loss log C and gradient 0. The sign of a logit does not matter.
        B = 0, or all rows ignored, gives 0 for "sum" and NaN for "mean". NaN in a row makes its loss NaN.

    Raises:
        TypeError: not tensors, or not of a floating (target: integer) dtype.
        ValueError: shapes or devices that do not fit, no classes, a target out of range, a float out of its range,
            unknown `reduction`.
        RuntimeError: a second derivative is asked for.

    Memory, routes, determinism:
        As :func:`linear_z_loss`.

    Source:
        Vincent, de Brébisson and Bouthillier, *Efficient exact gradient update for training deep networks with very
        large sparse targets*, 2015; de Brébisson and Vincent, *An exploration of softmax alternatives belonging to the
        spherical loss family*, 2016.

    Example:
        >>> h, w = torch.eye(2), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
        >>> fastloss.linear_spherical_softmax_loss(h[:1], w, torch.tensor([0]))  # the logits are 2, 1: -log(4 / 5)
        tensor(0.2231)
    """
    name = "linear_spherical_softmax_loss"
    class_group = check_group(name, class_group)
    eps = announced(name, class_group, _check_eps, name, eps, _dtype(hidden, weight, bias))
    rows = _linear_rows(
        name, hidden, weight, target, bias, class_weight, sample_weight, ignore_index, reduction, class_group,
        {"`eps`": eps},
    )  # fmt: skip
    return rows.reduce(_spherical(rows, eps), reduction)


def linear_taylor_softmax_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    class_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    r"""Log-loss of the Taylor softmax of a linear layer, without its logits, which takes 1 + o + o^2 / 2 for exp(o).

    .. math::
        \ell = -\log \frac{1 + o_t + o_t^2 / 2}{\sum_k (1 + o_k + o_k^2 / 2)},
        \qquad o = W h + \beta

    Args:
        hidden: (B, D), float64, float32, bfloat16 or float16; any strides.
        weight: (C, D), one row a class, as in ``nn.Linear``; any of these dtypes.
        target: (B,) integers, the classes; 0 <= target < C, or `ignore_index`.
        bias: (C,) or None.
        class_weight: (C,) a factor for each class, the ``weight`` of ``F.cross_entropy``.
        sample_weight: (B,) a factor for each example; both multiply, and both are differentiable.
        ignore_index: rows with this target have loss 0 and gradient 0, and count nowhere.
        reduction: "none" gives (B,); "sum"; "mean", the weighted mean over the rows that are not ignored.
        class_group: None, or a process group or a mesh of one dimension, whose ranks split the classes; see
            :func:`linear_z_loss`.

    Returns:
        float64 for float64 inputs, float32 otherwise (16-bit inputs are summed in float32).
        One class has loss 0. Equal logits have loss log C; the polynomial is at least 1/2, so all is finite.
        B = 0, or all rows ignored, gives 0 for "sum" and NaN for "mean". NaN in a row makes its loss NaN.

    Raises:
        TypeError: not tensors, or not of a floating (target: integer) dtype.
        ValueError: shapes or devices that do not fit, no classes, a target out of range, a float out of its range,
            unknown `reduction`.
        RuntimeError: a second derivative is asked for.

    Memory, routes, determinism:
        As :func:`linear_z_loss`.

    Source:
        de Brébisson and Vincent, *An exploration of softmax alternatives belonging to the spherical loss family*, 2016.

    Example:
        >>> h, w = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> fastloss.linear_taylor_softmax_loss(h[:1], w, torch.tensor([0]))  # the logits are 2, 0: -log(5 / 6)
        tensor(0.1823)
    """
    name = "linear_taylor_softmax_loss"
    rows = _linear_rows(
        name, hidden, weight, target, bias, class_weight, sample_weight, ignore_index, reduction, class_group
    )
    return rows.reduce(_taylor(rows), reduction)


def linear_one_hot_mse_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    class_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    r"""Squared error of a linear layer, without its logits to a one-hot target, summed over the classes.

    .. math::
        \ell = \sum_k (o_k - [k = t])^2 = \sum_k o_k^2 - 2 o_t + 1,
        \qquad o = W h + \beta

    Args:
        hidden: (B, D), float64, float32, bfloat16 or float16; any strides.
        weight: (C, D), one row a class, as in ``nn.Linear``; any of these dtypes.
        target: (B,) integers, the classes; 0 <= target < C, or `ignore_index`.
        bias: (C,) or None.
        class_weight: (C,) a factor for each class, the ``weight`` of ``F.cross_entropy``.
        sample_weight: (B,) a factor for each example; both multiply, and both are differentiable.
        ignore_index: rows with this target have loss 0 and gradient 0, and count nowhere.
        reduction: "none" gives (B,); "sum"; "mean", the weighted mean over the rows that are not ignored.
        class_group: None, or a process group or a mesh of one dimension, whose ranks split the classes; see
            :func:`linear_z_loss`.

    Returns:
        float64 for float64 inputs, float32 otherwise (16-bit inputs are summed in float32).
        "mean" is over rows: the result is C times ``F.mse_loss(logits, one_hot)``. The error of the loss is a few units
        in the last place of sum o_k^2 + 1, also where the loss is close to 0.
        B = 0, or all rows ignored, gives 0 for "sum" and NaN for "mean". NaN in a row makes its loss NaN.

    Raises:
        TypeError: not tensors, or not of a floating (target: integer) dtype.
        ValueError: shapes or devices that do not fit, no classes, a target out of range, a float out of its range,
            unknown `reduction`.
        RuntimeError: a second derivative is asked for.

    Memory, routes, determinism:
        As :func:`linear_z_loss`.

    Source:
        Vincent, de Brébisson and Bouthillier, *Efficient exact gradient update for training deep networks with very
        large sparse targets*, 2015.

    Example:
        >>> h, w = torch.eye(2), torch.tensor([[3.0, 0.0], [1.0, 1.0]])
        >>> fastloss.linear_one_hot_mse_loss(h[:1], w, torch.tensor([0]))  # the logits are 3, 1: 2^2 + 1
        tensor(5.)
    """
    name = "linear_one_hot_mse_loss"
    rows = _linear_rows(
        name, hidden, weight, target, bias, class_weight, sample_weight, ignore_index, reduction, class_group
    )
    return rows.reduce(_one_hot_mse(rows), reduction)


def check_z(function: str, a: Any, b: Any, eps: Any, dtype: torch.dtype) -> tuple[float, float, float]:
    """The numbers of the Z-loss of statistics in `dtype`."""
    return (
        check_number(function, "a", a, above=0, dtype=dtype),
        check_number(function, "b", b, dtype=dtype),
        check_number(function, "eps", eps, least=0, dtype=dtype),
    )


def _check_eps(function: str, eps: Any, dtype: torch.dtype) -> float:
    return check_number(function, "eps", eps, above=0, dtype=dtype)


def _dtype(*inputs: Any) -> torch.dtype:
    """Of the statistics; what is no tensor is refused later."""
    return accumulation_dtype(*(x for x in inputs if isinstance(x, Tensor)))


@dataclass(frozen=True)
class _Rows:
    """Statistics of the rows, with harmless ones in ignored rows, and the rows' weights."""

    classes: int
    mean: Tensor  # all (B,)
    square: Tensor
    centred: Tensor
    logit: Tensor
    ignored: Tensor
    weight: Tensor | None

    def reduce(self, loss: Tensor, reduction: str) -> Tensor:
        if self.weight is not None:
            loss = loss * self.weight
        loss = loss.masked_fill(self.ignored, 0)
        if reduction == "none":
            return loss
        if reduction == "sum":
            return loss.sum()
        return loss.sum() / ((~self.ignored).sum() if self.weight is None else self.weight.sum())


def _rows(
    name: str,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    overwrite: bool,
) -> _Rows:
    check_reduction(name, reduction)
    check_floating(name, "logits", logits, "(B, C)", 2)
    target = _check_labels(name, "logits", logits, logits.shape[1], target, class_weight, sample_weight, ignore_index)
    check_flag(name, "gradient_overwrites_logits", overwrite)
    if overwrite:
        _check_overwritten(name, logits)
    moments = row_moments(logits, target, name, overwrite=overwrite)
    return _weighted(logits.shape[1], moments, target, class_weight, sample_weight)


def _check_overwritten(name: str, logits: Tensor) -> None:
    option = "with `gradient_overwrites_logits`"
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{name}: `gradient_overwrites_logits` must be False under torch.func, got True")
    base = logits if logits._base is None else logits._base
    if base.is_leaf and base.requires_grad:
        got = "a leaf" if base is logits else "a view of a leaf"
        raise ValueError(f"{name}: `logits` must not be a leaf that requires grad {option}, got {got}")
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError(f"{name}: `logits` must have memory of their own {option}, got an expanded tensor")


def _linear_rows(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    class_group: Any,
    options: Mapping[str, float] | None = None,
) -> _Rows:
    class_group = check_group(name, class_group)
    target = announced(
        name, class_group, _linear_targets, name, hidden, weight, target, bias, class_weight, sample_weight,
        ignore_index, reduction,
    )  # fmt: skip
    world = None
    if class_group is not None:
        facts = {
            "the number of rows of `hidden`": len(hidden),
            "the dtype of `hidden`": hidden.dtype,
            "`reduction`": reduction,
            "whether `bias` is given": bias is not None,
            "whether `class_weight` is given": class_weight is not None,
            "whether `sample_weight` is given": sample_weight is not None,
            "`ignore_index`": ignore_index,
            **facts_of(target),
            **(options or {}),
        }
        differentiable = {"hidden": hidden, "weight": weight, "bias": bias}
        world = agree(name, class_group, weight, None, differentiable, "auto", facts)
    if world is None:
        classes, moments = weight.shape[0], linear_moments(hidden, weight, bias, target, name)
    else:
        classes, moments = sum(world.rows), split_linear_moments(world, hidden, weight, bias, target, name)
    return _weighted(classes, moments, target, class_weight, sample_weight, world)


def _linear_targets(
    name: str, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, class_weight: Tensor | None,
    sample_weight: Tensor | None, ignore_index: int, reduction: str,
) -> Tensor:  # fmt: skip
    """The targets as the ops take them, all arguments checked."""
    check_reduction(name, reduction)
    check_floating(name, "hidden", hidden, "(B, D)", 2)
    check_floating(name, "weight", weight, "(C, D)", 2)
    check_size(name, "weight", weight, 1, hidden.shape[1], "the width of `hidden`")
    check_device(name, "weight", weight, "hidden", hidden)
    classes = weight.shape[0]
    if bias is not None:
        check_floating(name, "bias", bias, "(C,)", 1)
        check_size(name, "bias", bias, 0, classes, "one a row of `weight`")
        check_device(name, "bias", bias, "hidden", hidden)
    return _check_labels(name, "hidden", hidden, classes, target, class_weight, sample_weight, ignore_index)


def _check_labels(
    function: str,
    name: str,
    x: Tensor,
    classes: int,
    target: Any,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: Any,
) -> Tensor:
    """The targets as the ops take them: -1 for ignored rows."""
    if classes == 0:
        raise ValueError(f"{function}: C, the number of classes, must be at least 1, got 0")
    check_int(function, "ignore_index", ignore_index)
    target = check_ids(function, "target", target, (x.shape[0],), name, x)
    check_weights(function, class_weight, sample_weight, classes, name, x)
    return class_ids(target, ignore_index)


def check_weights(
    function: str, class_weight: Tensor | None, sample_weight: Tensor | None, classes: int, name: str, x: Tensor
) -> None:
    """`x` has a row for each example, and is called `name`."""
    for label, w, size, shape, why in (
        ("class_weight", class_weight, classes, "(C,)", "one a class"),
        ("sample_weight", sample_weight, len(x), "(B,)", "one an example"),
    ):
        if w is not None:
            check_floating(function, label, w, shape, 1)
            check_size(function, label, w, 0, size, why)
            check_device(function, label, w, name, x)


def _weighted(
    classes: int,
    moments: tuple[Tensor, Tensor, Tensor, Tensor],
    target: Tensor,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    world: World | None = None,
) -> _Rows:
    ignored = target < 0
    mean, square, centred, logit = moments
    # NaN in an ignored row must not reach its gradient through 0 * NaN; 1, since a variance is divided by.
    mean, square, centred, logit = (torch.where(ignored, 1, x) for x in (mean, square, centred, logit))
    weight = None if sample_weight is None else sample_weight.to(mean.dtype)
    if class_weight is not None:
        class_weight = class_weight.to(mean.dtype)
        of_class = (
            class_weight[target.clamp(min=0)] if world is None else split_class_weight(world, class_weight, target)
        )
        weight = of_class if weight is None else weight * of_class
    if weight is not None:
        weight = torch.where(ignored, 0, weight)
    return _Rows(classes, mean, square, centred, logit, ignored, weight)


def _z(rows: _Rows, a: float, b: float, eps: float) -> Tensor:
    square = torch.where(rows.square.isinf(), torch.nan, rows.square)  # an overflow is no standardised logit of 0
    flat = square == 0  # false for NaN, which goes its way
    deviation = (torch.where(flat, 1, square) / rows.classes).sqrt()
    z = torch.where(flat, 0, rows.centred / (deviation + eps))
    return F.softplus(b - z, beta=a, threshold=40)  # softplus(x) = x beyond 40 to the last bit of float64


def _spherical(rows: _Rows, eps: float) -> Tensor:
    total = rows.square + rows.classes * (rows.mean.square() + eps)
    return total.log() - (rows.logit.square() + eps).log()


def _taylor(rows: _Rows) -> Tensor:
    # 1 + o + o^2 / 2 = ((o + 1)^2 + 1) / 2, and the halves cancel.
    total = rows.square + rows.classes * ((rows.mean + 1).square() + 1)
    return total.log() - ((rows.logit + 1).square() + 1).log()


def _one_hot_mse(rows: _Rows) -> Tensor:
    return rows.square + rows.classes * rows.mean.square() - 2 * rows.logit + 1
