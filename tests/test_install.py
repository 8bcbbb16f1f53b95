"""The package as a user gets it: built with pip, with and without compilers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# An editable install of this checkout would lend its own _C to the copy under test.
PROBE = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
import torch, fastloss
q = torch.eye(4, requires_grad=True)
fastloss.info_nce(q, torch.eye(4)).backward()
assert q.grad.isfinite().all()
print(fastloss.__file__)
print(fastloss.backends()["native"])
print(fastloss.backends()["cuda"])
"""
# PyTorch built without processes has none of these names, and so no `torch.distributed.is_initialized`.
WITHOUT_PROCESSES = """
import sys

class Finder:
    def find_spec(name, path, target=None):
        if name == "torch.distributed":
            import torch._C
            for name in {"_c10d_init", "_rpc_init", "_dist_autograd_init", "_faulty_agent_init"} & set(dir(torch._C)):
                delattr(torch._C, name)

sys.meta_path.insert(0, Finder)
import torch, fastloss
assert not hasattr(torch.distributed, "is_initialized")
x = torch.eye(3)
fastloss.NTXentLoss(gather_distributed=True)(x, x)
layer = fastloss.FactoredOutput(3, 9)
layer(x, torch.arange(3)).backward()
fastloss.FactoredSGD(layer).step()
for call in (lambda: fastloss.nt_xent(x, x, group=3), lambda: fastloss.ClipLoss(world_size=2)):
    try:
        call()
    except (TypeError, ValueError) as error:
        print(error)
"""
NO_COMPILER = {"CXX": "/nonexistent/c++", "FASTLOSS_REQUIRE_NATIVE": "0"}
NO_NVCC = {
    "CUDA_HOME": "/nonexistent",
    "PATH": os.pathsep.join(d for d in os.environ["PATH"].split(os.pathsep) if not (Path(d) / "nvcc").exists()),
}
NOT_BUILT = "not available: the package was installed without nvcc, or with FASTLOSS_CUDA=0"


def install(target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # --no-build-isolation: the tests need no network. A copy of the build tree keeps this checkout clean.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    sources = target.parent / "sources"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(sources)], check=True)
    return subprocess.run(
        [*command, "--target", str(target), str(sources)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def probe(target: Path, tmp_path: Path) -> tuple[str, str]:
    """The status of the native core, and of the kernels in CUDA C++."""
    environment = {**os.environ, "PYTHONPATH": str(target)}
    environment.pop("FASTLOSS_CPU_ISA", None)
    run = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    location, native, cuda = run.stdout.splitlines()
    assert Path(location).is_relative_to(target)
    return native, cuda


def test_with_compilers(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") is not None
    target = tmp_path / "site"
    run = install(target, FASTLOSS_REQUIRE_NATIVE="1", FASTLOSS_CUDA="1" if nvcc else "auto")
    assert run.returncode == 0, run.stderr
    native, cuda = probe(target, tmp_path)
    assert native.startswith("available (CPU kernels")
    assert cuda.startswith(NOT_BUILT) != nvcc
    assert (target / "fastloss" / "benchmarks" / "cli.py").exists()


@pytest.mark.parametrize(
    "environment", [{"FASTLOSS_CUDA": "0"}, {"FASTLOSS_CUDA": "auto", **NO_NVCC}], ids=["unwanted", "no nvcc"]
)
def test_without_compilers_it_installs_and_says_so(environment: dict[str, str], tmp_path: Path) -> None:
    target = tmp_path / "site"
    run = install(target, **NO_COMPILER, **environment)
    assert run.returncode == 0, run.stderr
    native, cuda = probe(target, tmp_path)
    assert native.startswith("not available: fastloss._C was not built: there was no C++ compiler")
    assert cuda.startswith(NOT_BUILT)


@pytest.mark.parametrize(
    "environment",
    [
        {**NO_COMPILER, "FASTLOSS_REQUIRE_NATIVE": "1"},
        {**NO_COMPILER, **NO_NVCC, "FASTLOSS_CUDA": "1"},
        {**NO_COMPILER, "FASTLOSS_CUDA": "yes"},
    ],
    ids=["core", "cuda", "nonsense"],
)
def test_it_refuses_without_what_is_required(environment: dict[str, str], tmp_path: Path) -> None:
    assert install(tmp_path / "site", **environment).returncode != 0


@pytest.mark.skipif(not all(map(shutil.which, ("make", "bash", "timeout"))), reason="needs make, bash and timeout")
def test_pytorch_without_processes() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_PROCESSES], capture_output=True, text=True)
    assert run.stdout.splitlines() == [
        "nt_xent: `group` must be None or a process group, got int",
        "ClipLoss: `world_size` must be 1 without initialised processes, got 2",
    ], run.stderr


def test_make_gpu_runs_every_part_whatever_became_of_the_one_before(tmp_path: Path) -> None:
    """With a Python that notes its arguments and fails in the tests and in the benchmark."""
    calls, python = tmp_path / "calls", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >>{calls}\necho found\ncase "$*" in *pytest*|*bench*) exit 3; esac\n')
    python.chmod(0o755)
    command = ["make", "gpu", f"PYTHON={python}", f"REPORTS={tmp_path / 'reports'}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    *_, tests, bench = calls.read_text().splitlines()
    assert bench == f"-m fastloss bench --device cuda --output {tmp_path / 'reports'}"
    options, files = tests.split(" -n 12 ")  # the stub says yes to pytest-xdist
    assert options.startswith("-m pytest ")
    assert {"tests/test_gpu.py", "tests/gaunt/triton_values.py"} <= set(files.split())
    assert all((ROOT / name).is_file() for name in files.split())
    assert (tmp_path / "reports" / "gpu-tests.txt").read_text() == "found\n"
