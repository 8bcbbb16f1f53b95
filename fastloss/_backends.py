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
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch  # first: its OpenMP runtime must be the one that fastloss._C binds to

__all__ = ["backend_of", "backends", "cuda_core", "implementation", "native_core", "use_backend"]

FAMILIES = ("contrastive", "spherical", "gaunt", "sliced")
PORTABLE, NATIVE, TRITON = "portable", "native", "triton"
CUDA = "cuda"  # not a backend of its own: kernels in CUDA C++ that the Triton backend calls
TRITON_VERSION = (3, 6)
CAPABILITY = (8, 0)  # the first with matrix units for bfloat16
HIP_CARDS = ("gfx90a", "gfx942", "gfx950")

_core: Any = None
_native_status: str
try:
    _core = importlib.import_module("fastloss._C")
    _native_status = f"available (CPU kernels, {_core.isa()}; this processor also runs: {_core.supported_isas()})"
except ModuleNotFoundError as error:
    if os.environ.get("FASTLOSS_CPU_ISA"):
        raise RuntimeError("FASTLOSS_CPU_ISA is set, but fastloss was installed without its native core") from error
    _native_status = (
        "not available: fastloss._C was not built: there was no C++ compiler, or no pybind11 in an install without "
        "build isolation, or this is a source tree that is not installed"
    )
except ImportError as error:
    # FASTLOSS_CPU_ISA that cannot be honoured lands here as well, and must not degrade silently.
    if os.environ.get("FASTLOSS_CPU_ISA"):
        raise RuntimeError(str(error)) from error
    _native_status = f"not available: fastloss._C does not load on this {platform.machine()} machine ({error})"

_forced: str | None = None
# Device type -> backend, filled at first use: finding out imports Triton and asks the driver.
_preferred = {"cpu": PORTABLE if _core is None else NATIVE}


def native_core() -> Any:
    """The extension module ``fastloss._C``."""
    if _core is None:
        raise RuntimeError(f"the native backend is {_native_status}")
    return _core


@functools.cache
def _cuda_core() -> tuple[Any, str]:
    try:
        core = importlib.import_module("fastloss._cuda")
    except ModuleNotFoundError:
        reason = "the package was installed without nvcc, or with FASTLOSS_CUDA=0, so fastloss._cuda was not built"
        return None, f"not available: {reason}"
    except ImportError as error:
        return None, f"not available: fastloss._cuda does not load ({error})"
    if torch.version.hip:
        return None, "not available: this PyTorch is one for ROCm"
    if not torch.cuda.is_available():
        return None, "not available: PyTorch sees no CUDA device"
    built, driver = core.runtime_version(), core.driver_version()
    if driver // 1000 < built // 1000:
        return None, f"not available: fastloss._cuda needs a driver of CUDA {_version(built)}, got {_version(driver)}"
    return core, f"available (CUDA {_version(built)}, {core.architectures}; sorts slices too long for Triton)"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def cuda_core() -> Any:
    """The extension module ``fastloss._cuda``, or None where it was not built or cannot run."""
    return _cuda_core()[0]


@functools.cache
def _triton_status() -> str:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    # All questions to the driver first: Triton costs a tenth of a second to import.
    if not interpreted:
        if not torch.cuda.is_available():
            return "not available: PyTorch sees no CUDA or ROCm device"
        for index in range(torch.cuda.device_count()):
            if problem := _card_problem(index):
                return f"not available: {problem}"
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"not available: Triton does not import ({error})"
    if tuple(int(part) for part in version.split(".")[:2]) < TRITON_VERSION:
        return f"not available: Triton is {version}, the kernels need {'.'.join(map(str, TRITON_VERSION))} or later"
    where = "interpreted on the CPU" if interpreted else "CUDA and ROCm devices"
    return f"available (Triton {version}, {where})"


def _card_problem(index: int) -> str | None:
    name = torch.cuda.get_device_name(index)
    if torch.version.hip:
        chip = str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
        return None if chip in HIP_CARDS else f"{name} is {chip}, the kernels need one of {', '.join(HIP_CARDS)}"
    capability = torch.cuda.get_device_capability(index)
    if capability < CAPABILITY:
        return f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 or later"
    return None


def backends() -> dict[str, str]:
    """What is loaded, and why the rest is not.

    Returns:
        One entry a backend, and ``"cuda"`` for the kernels in CUDA C++ that backend ``"triton"`` calls where they
        were built: ``"available (...)"`` or ``"not available: reason"``.

    Example:
        >>> sorted(fastloss.backends())
        ['cuda', 'native', 'portable', 'triton']
    """
    return {
        NATIVE: _native_status,
        TRITON: _triton_status(),
        CUDA: _cuda_core()[1],
        PORTABLE: "available (tiled PyTorch, any device)",
    }


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on one backend inside the ``with`` block, for tests, debugging and benchmarks.

    The setting is process-wide, so that the backward pass, which autograd may run on another thread, obeys it too.

    Args:
        name: ``"native"``, ``"triton"`` or ``"portable"``.

    Raises:
        ValueError: `name` is not a backend.
        RuntimeError: the backend is not available here; or, when an op runs, does not serve the tensors' device.
    """
    global _forced
    known = {key: status for key, status in backends().items() if key != CUDA}
    if name not in known:
        raise ValueError(f"use_backend: `name` must be one of {sorted(known)}, got {name!r}")
    if not known[name].startswith("available"):
        raise RuntimeError(f"use_backend: backend {name!r} is {known[name]}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choose(device_type: str) -> str:
    name = PORTABLE
    if device_type == "cuda":
        status = _triton_status()
        if status.startswith("available"):
            name = TRITON
        else:
            warnings.warn(
                f"fastloss: CUDA tensors run on the portable backend; backend 'triton' is {status}", stacklevel=2
            )
    _preferred[device_type] = name
    return name


def backend_of(device: torch.device) -> str:
    """The name of the backend that runs the ops of tensors on `device`."""
    if _forced is not None:
        return _forced
    return _preferred.get(device.type) or _choose(device.type)


def implementation(family: str, device: torch.device) -> ModuleType:
    """The module with the kernels of `family` for tensors on `device`."""
    return _module(family, backend_of(device), device.type)


@functools.cache
def _module(family: str, backend: str, device_type: str) -> ModuleType:
    if backend == NATIVE and device_type != "cpu":
        raise RuntimeError(f"use_backend: backend 'native' serves CPU tensors only, got a tensor on {device_type}")
    if backend == TRITON and device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"use_backend: backend 'triton' serves CUDA tensors only, got a tensor on {device_type}")
    return importlib.import_module(f"fastloss.{family}.{backend}")
