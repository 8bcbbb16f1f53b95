"""What the Triton kernels of all families share: launch configurations, tuning, and compilation without a device.

Interfaces of Triton that change between its versions are used in this file only.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

import fastloss

__all__ = ["Config", "Resources", "Specimen", "architecture", "best", "float32_precision", "on", "resources", "tuning"]

T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    """How a kernel is launched: its block sizes, and Triton's options."""

    blocks: tuple[int, ...]
    num_warps: int = 4
    num_stages: int = 1
    maxnreg: int | None = None  # registers a thread at most, so that two programs share a multiprocessor; CUDA only

    def options(self, hip: bool) -> dict[str, int]:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if hip or self.maxnreg is None else options | {"maxnreg": self.maxnreg}


# ---------------------------------------------------------------- devices

INTERPRETER = "interpreter"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Chips of one compute capability 8.x or 12.x have 99 KiB of shared memory a block, all others of the list 163 or more.
_ARCHITECTURES = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
SMALL = "sm_86"


def _repair_interpreter() -> None:
    """What Triton 3.6's interpreter does not do by itself.

    Loop bounds are arrays of one element there, of which NumPy 2.4 no longer makes integers. Products of bfloat16,
    which it holds as bits, are products of the bits. And float32 has digits that a chip's `tl.exp`, 2^(x log2(e)) with
    the product rounded, and quotient, a product with the reciprocal, do not have.
    """
    import numpy as np
    from triton.runtime import interpreter

    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def repaired(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def wide(x: Any) -> Any:
        if x.dtype.scalar != triton.language.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), triton.language.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    def exp(x: Any) -> Any:
        return np.exp2(x * np.float32(np.log2(np.e))) if x.dtype == np.float32 else np.exp(x)

    def quotient(x: Any, y: Any) -> Any:
        return x * (1 / y) if x.dtype == np.float32 else x / y

    interpreter._patch_lang_tensor = repaired
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.create_exp = lambda self, x: self.unary_op(x, exp)
    interpreter.InterpreterBuilder.create_fdiv = lambda self, x, y: self.binary_op(x, y, quotient)


if INTERPRETED:
    _repair_interpreter()


@functools.cache
def architecture(device: torch.device) -> str:
    """The key of the tables of configurations."""
    if device.type == "cpu":
        return INTERPRETER
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    return _ARCHITECTURES.get(torch.cuda.get_device_capability(device), SMALL)


def pick(table: Mapping[str, T], device: torch.device) -> T:
    """The entry of the device's architecture; cards that the table does not name get that of the smallest."""
    name = architecture(device)
    return table.get(name, table["gfx942" if name.startswith("gfx") else SMALL])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def on(x: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def float32_precision() -> str:
    """How `tl.dot` multiplies float32: "ieee" where the environment asks for it or the card has nothing near it.

    Three tf32 products (tf32x3) keep 21 bits of every factor.
    """
    wanted = os.environ.get("FASTLOSS_FLOAT32", "tf32x3")
    if wanted not in ("tf32x3", "ieee"):
        raise RuntimeError(f"FASTLOSS_FLOAT32 must be 'tf32x3' or 'ieee', got {wanted!r}")
    return "ieee" if torch.version.hip or INTERPRETED else wanted


# ---------------------------------------------------------------- tuning

_ASKED = False
_measured: dict[tuple[torch.device, str], Config] = {}
_loaded: set[torch.device] = set()


class tuning:
    """Inside the block, the first launch of a kernel at a new kind of size times its candidates and keeps the best.

    FASTLOSS_TUNE=1 is the same for a whole process. Nothing is tuned otherwise. What was found is written to
    FASTLOSS_CACHE (default: ~/.cache/fastloss), one file a card and versions of Triton and fastloss, and used by later
    processes.
    """

    def __enter__(self) -> None:
        global _ASKED
        self.before, _ASKED = _ASKED, True

    def __exit__(self, *_: object) -> None:
        global _ASKED
        _ASKED = self.before


def _cache_file(device: torch.device) -> Path:
    folder = Path(os.environ.get("FASTLOSS_CACHE", Path.home() / ".cache" / "fastloss"))
    card = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    versions = f"triton-{triton.__version__}-fastloss-{fastloss.__version__}"
    return folder / f"{re.sub('[^A-Za-z0-9]+', '-', card)}-{versions}.json"


def _load(device: torch.device) -> None:
    _loaded.add(device)
    path = _cache_file(device)
    if path.exists():
        for key, (blocks, *options) in json.loads(path.read_text()).items():
            _measured.setdefault((device, key), Config(tuple(blocks), *options))


def _save(device: torch.device) -> None:
    path = _cache_file(device)
    found = {key: config for (where, key), config in _measured.items() if where == device}
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "w") as file:
        json.dump({k: [c.blocks, c.num_warps, c.num_stages, c.maxnreg] for k, c in found.items()}, file, indent=1)
    os.replace(temporary, path)


def best(
    key: str, device: torch.device, default: Config, candidates: Sequence[Config], launch: Callable[[Config], None]
) -> Config:
    """The configuration for `launch`, which may run any number of times: what was measured for `key`, or `default`."""
    if device not in _loaded:
        _load(device)
    found = _measured.get((device, key))
    if found is None:
        if not (_ASKED or os.environ.get("FASTLOSS_TUNE") == "1"):
            return default
        times = {config: _time(launch, config, device) for config in (default, *candidates)}
        found = _measured[device, key] = min(times, key=times.__getitem__)
        _save(device)
    return found


def _time(launch: Callable[[Config], None], config: Config, device: torch.device) -> float:
    """Median of a few runs, in milliseconds; infinity for a configuration that the card cannot run."""
    errors = triton.runtime.errors
    try:
        launch(config)
        if device.type == "cpu":
            return 0.0
        return float(triton.testing.do_bench(lambda: launch(config), warmup=5, rep=25, return_mode="median"))
    except (errors.OutOfResources, errors.PTXASError, triton.compiler.errors.CompilationError):
        return float("inf")


def size_class(*sizes: int) -> str:
    """Sizes to the next power of two: one entry of the tuned table serves all of a class."""
    return "x".join(str(triton.next_power_of_2(size)) for size in sizes)


# ---------------------------------------------------------------- compilation without a device


@dataclass(frozen=True)
class Specimen:
    """A kernel as one architecture runs it, for the gates.

    types: of the arguments that are not constants, in Triton's notation ("*bf16", "i32"), or tuples of them.
    aligned: names of those that are multiples of 16 in the case that must be fast.
    matrix: it must use the matrix units.
    """

    name: str
    kernel: Any
    types: Mapping[str, Any]
    constants: Mapping[str, Any]
    config: Config
    aligned: frozenset[str] = frozenset()
    matrix: bool = False


@dataclass(frozen=True)
class Resources:
    specimen: str
    target: str
    config: Config
    registers: int
    spills: int  # bytes of local memory a thread; AMD: registers
    shared: int
    shared_limit: int
    matrix: str  # the instruction of the matrix units, or ""
    instructions: int
    faults: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Target:
    backend: str
    arch: int | str
    warp: int
    shared: int  # bytes a block may use


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10),
    "sm_86": Target("cuda", 86, 32, 99 << 10),
    "sm_90": Target("cuda", 90, 32, 227 << 10),
    "sm_100": Target("cuda", 100, 32, 227 << 10),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10),
}
_MATRIX = {
    "sm_80": r"\bHMMA\.[\w.]+",
    "sm_86": r"\bHMMA\.[\w.]+",
    "sm_90": r"\bHGMMA\.[\w.]+",
    "sm_100": r"\bUTC\w*MMA\b[\w.]*",
    "gfx942": r"\bv_mfma_\w+",
}
# float32 in three tf32 products: the unit of Hopper takes its operands from shared memory only, which a split cannot
# use; Triton then issues mma.sync.
_MATRIX_FLOAT32 = {"sm_90": r"\bHG?MMA\.[\w.]+", "sm_100": r"\b(?:UTC\w*MMA|HMMA)\b[\w.]*"}


def resources(specimen: Specimen, target_name: str) -> Resources:
    """Compiles for a chip that need not be there, and reads what the code needs and uses."""
    target = TARGETS[target_name]
    aligned = {(specimen.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in specimen.aligned}
    source = _source(specimen, specimen.constants, aligned)
    options = specimen.config.options(target.backend == "hip")
    compiled = triton.compile(source, _gpu(target), options)
    read = _read_cuda if target.backend == "cuda" else _read_hip
    registers, spills, assembly, loops = read(compiled)
    patterns = _MATRIX_FLOAT32 if specimen.constants.get("PRECISION") == "tf32x3" else {}
    found = re.search(patterns.get(target_name, _MATRIX[target_name]), assembly)
    shared = int(compiled.metadata.shared)
    faults = []
    if spills:
        faults.append(f"spills {spills}")
    if shared > target.shared:
        faults.append(f"needs {shared} bytes of shared memory, the chip has {target.shared}")
    if specimen.matrix and not found:
        faults.append("does not use the matrix units")
    return Resources(
        specimen.name, target_name, specimen.config, registers, spills, shared, target.shared,
        found[0] if found else "", loops, tuple(faults),
    )  # fmt: skip


def _gpu(target: Target) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(target.backend, target.arch, target.warp)


def _source(specimen: Specimen, constants: Mapping[str, Any], aligned: Mapping[tuple[int], Any]) -> Any:
    from triton.compiler import ASTSource

    names = specimen.kernel.arg_names
    unknown = set(specimen.types) | set(specimen.constants)
    assert unknown == set(names), f"{specimen.name}: arguments {sorted(unknown ^ set(names))}"
    signature = {name: "constexpr" if name in constants else specimen.types[name] for name in names}
    return ASTSource(specimen.kernel, signature, dict(constants), dict(aligned))


def read_with_sizes_of_one(specimen: Specimen, target_name: str) -> None:
    """Reads the kernel as a launch with such sizes does: Triton makes constants of integers that are one."""
    ones = {
        parameter.name: 1
        for parameter in specimen.kernel.params
        if specimen.types.get(parameter.name) in ("i32", "i64") and not parameter.do_not_specialize
    }
    read(specimen, target_name, ones)


def read(specimen: Specimen, target_name: str, constants: Mapping[str, Any]) -> None:
    """Reads the kernel with these arguments constant, or other constants, down to Triton's own language."""
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    target = TARGETS[target_name]
    backend, context = make_backend(_gpu(target)), ir.context()
    options = backend.parse_options(specimen.config.options(target.backend == "hip"))
    ir.load_dialects(context)
    backend.load_dialects(context)
    _source(specimen, {**specimen.constants, **constants}, {}).make_ir(
        _gpu(target), options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )


def _read_cuda(compiled: Any) -> tuple[int, int, str, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])

        def run(tool: str, *options: str) -> str:
            return subprocess.run(
                [str(tools / tool), *options, str(cubin)], check=True, capture_output=True, text=True
            ).stdout

        usage = run("cuobjdump", "-res-usage")
        assembly = run("nvdisasm", "-c")
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    # A spilled register is stored to and loaded from local memory, which is on the stack.
    spills = max(numbers["LOCAL"], numbers["STACK"] if re.search(r"\b(LDL|STL)\b", assembly) else 0)
    return numbers["REG"], spills, assembly, len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", assembly, re.M))


def _read_hip(compiled: Any) -> tuple[int, int, str, int]:
    assembly = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1])

    count = len(re.findall(r"^\t[vsgd][a-z0-9_]+\s", assembly, re.M))
    return number("vgpr_count"), number("vgpr_spill_count") + number("sgpr_spill_count"), assembly, count
