"""Every test that takes the `backend` fixture runs once for each backend expected in this environment."""

import os
from collections.abc import Iterator

import pytest
import torch

import fastloss

# A backend that is expected but missing fails its tests: a build that lost its kernels must not look green. Where one
# cannot exist (no compiler), say so: FASTLOSS_EXPECT_BACKENDS=portable.
EXPECTED_BACKENDS = os.environ.get("FASTLOSS_EXPECT_BACKENDS", "native,portable").split(",")


def pytest_report_header() -> list[str]:
    return [f"fastloss backend {name}: {status}" for name, status in fastloss.backends().items()] + [
        f"backends tested: {', '.join(EXPECTED_BACKENDS)}"
    ]


@pytest.fixture(params=EXPECTED_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastloss.use_backend(request.param):
        yield request.param


def pytest_runtest_logfinish() -> None:
    """A kernel's fault breaks its process for good: under pytest-xdist another one takes over."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
