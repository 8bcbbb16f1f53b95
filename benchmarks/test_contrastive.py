"""The contrastive cases under pytest-benchmark, which keeps a history and compares runs: ``make bench-pytest``.

Quick cases by default; FASTLOSS_BENCH=full or FASTLOSS_BENCH=smoke chooses as the command line's options do.
"""

import os
from typing import Any

import pytest

from .contrastive import SUITE
from .harness import Case, Provider, Runner, Settings, Unavailable, check, memory_limit

RUNNER = Runner(SUITE, Settings(os.environ.get("FASTLOSS_BENCH", "quick"), seed=0, threads=0), lambda text: None)


@pytest.mark.parametrize("provider", SUITE.providers, ids=lambda provider: provider.name)
@pytest.mark.parametrize("case", RUNNER.cases(), ids=lambda case: case.name)
def test_forward_and_backward(benchmark: Any, case: Case, provider: Provider) -> None:
    schedule = RUNNER.schedule(case)
    try:
        provider.build(case.op)
    except Unavailable as reason:
        pytest.skip(f"not available: {reason}")
    if (needs := provider.needs(case)) > memory_limit():
        pytest.skip(f"refused: needs {needs / 2**30:.1f} GiB by the model {provider.peak_bytes[case.op].text}")
    if RUNNER.leaves_to_full(schedule, provider):
        pytest.skip("left to FASTLOSS_BENCH=full")
    benchmark.group = case.name
    benchmark.extra_info.update(check=vars(check(SUITE, provider, case, seed=0)), flops=case.flops.of(case.sizes))
    inputs = case.inputs(seed=0)
    rounds = max(1, schedule.rounds_of(provider))
    benchmark.pedantic(provider.step, (case.op, inputs), rounds=rounds, warmup_rounds=schedule.warmup_of(provider))
