"""The house's rules, checked on the sources and on the compiled kernels."""

from __future__ import annotations

import ast
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    **dict.fromkeys(("functional", "modules", "arguments", "pot", "plans", "sphere"), 0),
    "distributed": 0.5,
    **dict.fromkeys(("ops", "methods", "harmonics"), 1),
    **dict.fromkeys(("tiles", "factored", "dense", "constants", "portable", "native", "triton"), 2),
    **dict.fromkeys(("tables", "program"), 3),
}


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: absolute imports only"
            found.add(node.module or "")
    return found - {"__future__"}


@pytest.mark.parametrize("path", sorted((ROOT / "fastloss").glob("*/*.py")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_arrows_go_down_only(path: Path) -> None:
    family = path.parent.name
    if family == "reference":
        return
    floor = FLOORS.get(path.stem)
    assert path.stem == "__init__" or floor is not None, f"{path.name} belongs to no floor"
    for module in imports_of(path):
        if match := re.fullmatch(r"fastloss\.(\w+)\.(\w+)", module):
            assert match[1] == family, f"{path.name} imports another family: {module}"
            assert floor is None or FLOORS[match[2]] >= floor, f"{path.name} imports upwards: {module}"
        assert module != "fastloss._C", "only _backends.py loads the native core"


@pytest.mark.parametrize("path", sorted((ROOT / "fastloss" / "reference").glob("*.py")), ids=lambda p: p.name)
def test_reference_stands_apart(path: Path) -> None:
    if path.stem != "__init__":
        assert {m.split(".")[0] for m in imports_of(path)} <= {"torch", "math", "typing", "collections"}
    for other in (ROOT / "fastloss").rglob("*.py"):
        if "reference" not in other.parts and other != ROOT / "fastloss" / "__init__.py":
            assert not any("reference" in m for m in imports_of(other)), f"{other} imports the reference"


@pytest.mark.parametrize(
    "path", sorted(p for p in (ROOT / "csrc").rglob("*.*") if p.suffix in (".cpp", ".cu", ".h")), ids=lambda p: p.name
)
def test_kernels_do_not_know_torch(path: Path) -> None:
    includes = re.findall(r"#include\s+[<\"]([^>\"]+)", path.read_text())
    assert not any("torch" in name or "ATen" in name or "c10" in name for name in includes)
    if path.name.endswith("_kernels.cpp") or path.name == "simd.h":
        assert set(includes) <= {"stdint.h", "simd.h", f"{path.stem.removesuffix('_kernels')}.h"}
    if path.parent.name != "csrc":
        assert not any("pybind11" in name or "Python.h" in name for name in includes)


KERNELS = sorted((ROOT / "csrc/cpu").glob("*_kernels.cpp"))


def object_file(tmp_path: Path, source: Path, isa: str) -> Path:
    compiler = shutil.which("c++")
    assert compiler, "the tests need a C++ compiler"
    assert shutil.which("objdump"), "the tests need binutils"
    flags = build_flags()
    output = tmp_path / f"{isa}.o"
    command = [compiler, *flags["common"], *flags[isa], f"-DFASTLOSS_ISA={isa}"]
    subprocess.run([*command, "-c", str(source), "-o", str(output)], check=True)
    return output


def build_flags() -> dict[str, list[str]]:
    """COMMON, KERNEL and ISA_FLAGS of setup.py, read without running it."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    flags: dict[str, list[str]] = {"common": [], "baseline": []}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            target = node.targets[0]
            if isinstance(target, ast.Name) and target.id in ("COMMON", "KERNEL"):
                flags["common"] += node.value.value.split()
            elif isinstance(target, ast.Subscript) and ast.unparse(target.value) == "ISA_FLAGS":
                flags[ast.literal_eval(target.slice)] = node.value.value.split()
    return flags


@pytest.mark.parametrize("isa", [name for name in build_flags() if name != "common"])
@pytest.mark.parametrize("source", KERNELS, ids=lambda p: p.stem)
def test_kernels_use_their_instruction_set_and_leak_nothing(tmp_path: Path, source: Path, isa: str) -> None:
    if isa != "baseline" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("x86 kernels are not built on this architecture")
    code = object_file(tmp_path, source, isa)
    symbols = subprocess.run(["nm", "-C", code], capture_output=True, text=True, check=True).stdout.splitlines()
    defined = [line.split(None, 2) for line in symbols if not line.startswith(" ")]
    assert not [s for s in defined if s[1] in "WVu"], "a weak symbol could replace the baseline's code"
    visible = {s[2] for s in defined if s[1] in "TRDB"}
    family = source.stem.removesuffix("_kernels")
    assert visible == {f"fastloss::cpu::{isa}::{family}_{t}" for t in ("float", "double")}
    assembly = subprocess.run(["objdump", "-d", code], capture_output=True, text=True, check=True).stdout
    if platform.machine() in ("x86_64", "AMD64"):
        assert bool(re.search(r"vfn?m[as].*%zmm", assembly)) == (isa == "avx512")
        assert bool(re.search(r"vfn?m[as].*%ymm", assembly)) == (isa == "avx2") or isa == "avx512"
        assert bool(re.search(r"%[yz]mm", assembly)) == (isa != "baseline")
