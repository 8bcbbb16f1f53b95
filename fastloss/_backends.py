"""Which implementation of the ops runs where, and why the others do not.

An op is registered with the dispatcher once per device; its kernel asks :func:`implementation` for the module that
does the work. The choice is one dictionary lookup, so `use_backend` can change it without touching registrations.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import platform
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch  # first: its OpenMP runtime must be the one that fastloss._C binds to

__all__ = ["backends", "implementation", "native_core", "use_backend"]

PORTABLE, NATIVE = "portable", "native"
_PREFERRED = {"cpu": NATIVE}  # device type -> backend; every other device runs the portable one

_core: Any = None
_native_status: str
try:
    _core = importlib.import_module("fastloss._C")
    _native_status = f"available (CPU kernels, {_core.isa()}; this processor also runs: {_core.supported_isas()})"
except ModuleNotFoundError as error:
    if os.environ.get("FASTLOSS_CPU_ISA"):
        raise RuntimeError("FASTLOSS_CPU_ISA is set, but fastloss was installed without its native core") from error
    _native_status = "not available: the package was installed without a C++ compiler, so fastloss._C was not built"
except ImportError as error:
    # FASTLOSS_CPU_ISA that cannot be honoured lands here as well, and must not degrade silently.
    if os.environ.get("FASTLOSS_CPU_ISA"):
        raise RuntimeError(str(error)) from error
    _native_status = f"not available: fastloss._C does not load on this {platform.machine()} machine ({error})"

_forced: str | None = None


def native_core() -> Any:
    """The extension module ``fastloss._C``."""
    if _core is None:
        raise RuntimeError(f"the native backend is {_native_status}")
    return _core


def backends() -> dict[str, str]:
    """What is loaded, and why the rest is not.

    Returns:
        One entry a backend, in order of preference: ``"available (...)"`` or ``"not available: reason"``.

    Example:
        >>> sorted(fastloss.backends())
        ['native', 'portable']
    """
    return {NATIVE: _native_status, PORTABLE: "available (tiled PyTorch, any device)"}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on one backend inside the ``with`` block, for tests, debugging and benchmarks.

    The setting is process-wide, so that the backward pass, which autograd may run on another thread, obeys it too.

    Args:
        name: a key of :func:`backends`.

    Raises:
        ValueError: `name` is not a backend.
        RuntimeError: the backend is not available here; or, when an op runs, does not serve the tensors' device.
    """
    global _forced
    known = backends()
    if name not in known:
        raise ValueError(f"use_backend: `name` must be one of {sorted(known)}, got {name!r}")
    if not known[name].startswith("available"):
        raise RuntimeError(f"use_backend: backend {name!r} is {known[name]}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def implementation(family: str, device: torch.device) -> ModuleType:
    """The module with the kernels of `family` for tensors on `device`."""
    name = _forced
    if name is None:
        name = _PREFERRED.get(device.type, PORTABLE)
        if name == NATIVE and _core is None:
            name = PORTABLE
    elif name == NATIVE and device.type != "cpu":
        raise RuntimeError(f"use_backend: backend 'native' serves CPU tensors only, got a tensor on {device}")
    return _module(family, name)


@functools.cache
def _module(family: str, backend: str) -> ModuleType:
    return importlib.import_module(f"fastloss.{family}.{backend}")
