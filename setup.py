"""Builds fastloss._C and fastloss._cuda with ninja: plain C++17 and CUDA C++ on raw pointers, no torch needed.

Both are optional. Without a working compiler the package installs without fastloss._C, says so, and runs on its
portable backend; FASTLOSS_REQUIRE_NATIVE=1 turns that into an error (wheels and tests set it).

FASTLOSS_CUDA says whether fastloss._cuda is built: "auto" (the default) where nvcc is, "0" never, "1" or an error. No
device is asked for: the code is for ARCHITECTURES, and for later ones through PTX. One sort is all that nvcc compiles,
which takes ten to fifteen seconds; that is why "auto" builds it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
COMMON = (
    "-O3 -std=c++17 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast "
    "-Wall -Wextra -Wno-psabi"
)
KERNEL = "-fno-exceptions -fno-rtti"  # neither is used, and both would bring weak symbols
ISA_FLAGS = {"baseline": ""}
X86 = platform.machine().lower() in ("x86_64", "amd64")
if X86:
    ISA_FLAGS["avx2"] = "-mavx2 -mfma"
    ISA_FLAGS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"
KERNELS = sorted((ROOT / "csrc/cpu").glob("*_kernels.cpp"))  # compiled once per instruction set
SOURCES = [*sorted((ROOT / "csrc").glob("bind*.cpp")), ROOT / "csrc/cpu/isa.cpp"]

ARCHITECTURES = ("80", "90", "100")
CUDA_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden"
CUDA_KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
CUDA_BINDINGS = ROOT / "csrc/cuda_bindings.cpp"


def quoted(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def includes() -> str:
    import pybind11

    return f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"


def native_rules(output: Path) -> str:
    define = "-DFASTLOSS_X86" if X86 else ""
    undefined = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"flags = {COMMON} {define} {os.environ.get('CXXFLAGS', '')}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = $cxx -shared -fopenmp {undefined} $in -o $out",
    ]
    objects = []

    def compile_to(name: str, source: Path, extra: str) -> None:
        objects.append(name)
        lines.extend([f"build {name}: compile {quoted(source.resolve())}", f"  extra = {extra}"])

    for source in SOURCES:
        compile_to(source.stem + ".o", source, includes())
    for source in KERNELS:
        for isa, flags in ISA_FLAGS.items():
            compile_to(f"{source.stem}.{isa}.o", source, f"{KERNEL} {flags} -DFASTLOSS_ISA={isa}")
    lines.append(f"build {quoted(output.resolve())}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if found is None:
        raise FileNotFoundError(f"no nvcc in {home}/bin or on the PATH")
    return found


def gencode(nvcc: str) -> tuple[str, str]:
    """Options for the architectures that this nvcc knows, and their names."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    known = [name for name in ARCHITECTURES if f"sm_{name}" in listed]
    if not known:
        raise OSError(f"{nvcc} knows none of the architectures {', '.join(ARCHITECTURES)}")
    options = [f"-gencode arch=compute_{name},code=sm_{name}" for name in known]
    options.append(f"-gencode arch=compute_{known[-1]},code=compute_{known[-1]}")
    return " ".join(options), " ".join(f"sm_{name}" for name in known)


def cuda_rules(output: Path) -> str:
    nvcc = find_nvcc()
    options, names = gencode(nvcc)
    lines = [
        "rule cuda",
        f"  command = {nvcc} -MD -MF $out.d {CUDA_FLAGS} {options} -c $in -o $out",
        "  depfile = $out.d",
        "rule bindings",
        f"  command = {os.environ.get('CXX', 'c++')} -MMD -MF $out.d {COMMON} {includes()} "
        f"-DFASTLOSS_CUDA_ARCHITECTURES='\"{names}\"' -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = {nvcc} -shared -cudart static $in -o $out",
        f"build bindings.o: bindings {quoted(CUDA_BINDINGS.resolve())}",
    ]
    objects = ["bindings.o"]
    for source in CUDA_KERNELS:
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: cuda {quoted(source.resolve())}")
    lines.append(f"build {quoted(output.resolve())}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if ext.name == "fastloss._C":
            without = "the native backend was not built ({}); installing with the portable backend only"
            self.build_optional(ext, native_rules, os.environ.get("FASTLOSS_REQUIRE_NATIVE") == "1", without)
            return
        wanted = os.environ.get("FASTLOSS_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise ValueError(f"FASTLOSS_CUDA must be 'auto', '0' or '1', got {wanted!r}")
        if wanted != "0":
            without = "fastloss._cuda was not built ({}); torch.sort sorts what is too long for the Triton kernels"
            self.build_optional(ext, cuda_rules, wanted == "1", without)

    def build_optional(self, ext: Extension, rules: Callable[[Path], str], required: bool, without: str) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        work = Path(self.build_temp) / ext.name
        work.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            (work / "build.ninja").write_text(rules(output))
            jobs = os.environ.get("MAX_JOBS", "2")
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(work), "-j", jobs], check=True)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if required:
                raise
            output.unlink(missing_ok=True)  # a stale binary must not pass for this build
            print(f"fastloss: {without.format(error)}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:  # editable installs; tolerate an optional extension's absence
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            target = Path(self.get_ext_fullpath(ext.name))
            if not built.exists():
                target.unlink(missing_ok=True)
            elif built.resolve() != target.resolve():
                self.copy_file(str(built), str(target))


setup(
    ext_modules=[Extension("fastloss._C", sources=[]), Extension("fastloss._cuda", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
