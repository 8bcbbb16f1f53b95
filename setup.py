"""Builds fastloss._C with ninja: plain C++17 on raw pointers, no torch needed.

The extension is optional: without a working compiler the package installs without it, says so, and runs on its
portable backend. FASTLOSS_REQUIRE_NATIVE=1 turns that into an error (wheels and tests set it).
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
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
SOURCES = [*sorted((ROOT / "csrc").glob("*.cpp")), ROOT / "csrc/cpu/isa.cpp"]


def ninja_rules(output: Path) -> str:
    import pybind11

    def quoted(path: object) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    includes = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
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
        compile_to(source.stem + ".o", source, includes)
    for source in KERNELS:
        for isa, flags in ISA_FLAGS.items():
            compile_to(f"{source.stem}.{isa}.o", source, f"{KERNEL} {flags} -DFASTLOSS_ISA={isa}")
    lines.append(f"build {quoted(output.resolve())}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        work = Path(self.build_temp)
        work.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            (work / "build.ninja").write_text(ninja_rules(output))
            jobs = os.environ.get("MAX_JOBS", "2")
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(work), "-j", jobs], check=True)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if os.environ.get("FASTLOSS_REQUIRE_NATIVE") == "1":
                raise
            output.unlink(missing_ok=True)  # a stale binary must not pass for this build
            print(
                f"fastloss: the native backend was not built ({error}); installing with the portable backend only",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:  # editable installs; tolerate the optional extension's absence
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            target = Path(self.get_ext_fullpath(ext.name))
            if built.exists() and built.resolve() != target.resolve():
                self.copy_file(str(built), str(target))


setup(ext_modules=[Extension("fastloss._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
