"""Comparisons whose tolerances are derived from the arithmetic, not picked."""

from typing import Any

import torch
from torch import Tensor

# Two orders of summation of the same rounded terms obey the same error bound, and the largest error over an output
# differs between them by less than this factor.
ORDER_FACTOR = 2.0

# The result may be rounded a few times more than the baseline (scale in and out of base 2, one cast), each time by
# half a unit in the last place of the largest value involved.
ULPS = 4.0


def assert_as_accurate_as_torch(
    actual: Tensor,
    truth64: Tensor,
    baseline: Tensor,
    *,
    magnitude: float = 0.0,
    weight: Tensor | float = 1.0,
    name: str = "result",
) -> None:
    """`actual` is as close to the float64 truth as the plain torch `baseline` of the same inputs and dtype.

    max|actual - truth| <= ORDER_FACTOR * max|baseline - truth| + ULPS * ulp, with the ulp of the largest of the truth
    and `magnitude`, the largest intermediate whose rounding enters the result. Half precision outputs are computed in
    float32 and rounded once, so their floor is a single ulp. `weight` brings entries of different scale to one.
    """
    assert actual.dtype == baseline.dtype, f"{name}: {actual.dtype}, expected {baseline.dtype}"
    assert actual.shape == truth64.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth64.shape)}"
    if truth64.numel() == 0:
        return
    half = actual.dtype in (torch.float16, torch.bfloat16)
    info = torch.finfo(actual.dtype)
    actual, truth64, baseline = actual.double() * weight, truth64 * weight, baseline.double() * weight
    largest = float(truth64.abs().max())
    floor = ULPS * (torch.finfo(torch.float32).eps if half else info.eps) * max(largest, magnitude)
    if half:
        floor += info.eps * largest + info.smallest_normal * float(torch.as_tensor(weight).max())
    baseline_error = float((baseline - truth64).abs().max())
    assert baseline_error < float("inf"), f"{name}: the baseline itself is not finite"
    _assert_within(
        actual, truth64, ORDER_FACTOR * baseline_error + floor, name, f"; baseline error {baseline_error:.3e}"
    )


def assert_equal_to_rounding(
    actual: Tensor,
    expected: Tensor,
    *,
    terms: int,
    magnitude: float = 0.0,
    weight: Tensor | float = 1.0,
    name: str = "result",
) -> None:
    """Equal up to the rounding of a sum of `terms` terms: |difference| <= terms * eps * largest value involved.

    That is the standard bound of a sum in any order, with the largest of `expected` and `magnitude` for its terms.
    """
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps
    actual, expected = actual.double() * weight, expected.double() * weight
    _assert_within(actual, expected, terms * eps * max(float(expected.abs().max()), magnitude), name, "")


def _assert_within(actual: Tensor, expected: Tensor, tolerance: float, name: str, note: str) -> None:
    error = (actual - expected).abs()
    # A NaN compares false with everything, so it counts as the worst entry.
    worst = int(error.nan_to_num(nan=float("inf")).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    value = float(error.flatten()[worst])
    assert value <= tolerance, (
        f"{name}: error {value:.3e} at {index} exceeds {tolerance:.3e} by {value - tolerance:.3e}"
        f" (got {float(actual.flatten()[worst])!r}, expected {float(expected.flatten()[worst])!r}{note})"
    )


def peak_bytes(run: Any) -> int:
    """The most that torch's CPU allocator held at once during run() beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def blas_repeats() -> bool:
    """Whether products have the same bits with one thread and with two: MKL splits some deep ones over threads."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(188, 1024, generator=generator), torch.randn(1024, 16, generator=generator)
    products: dict[int, list[Tensor]] = {1: [], 2: []}
    before = torch.get_num_threads()
    for count, made in products.items():
        torch.set_num_threads(count)
        for rows in (16, 76, 188):
            for depth in (333, 512, 700, 1024):
                made += [a[:rows, :depth] @ b[:depth], a[:rows, :depth].t().contiguous().t() @ b[:depth]]
    torch.set_num_threads(before)
    return all(map(torch.equal, *products.values()))
