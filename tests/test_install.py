"""The package as a user gets it: built with pip, with and without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
"""


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


def probe(target: Path, tmp_path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(target)}
    environment.pop("FASTLOSS_CPU_ISA", None)
    run = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    location, status = run.stdout.splitlines()
    assert Path(location).is_relative_to(target)
    return status


def test_with_a_compiler(tmp_path: Path) -> None:
    target = tmp_path / "site"
    run = install(target, FASTLOSS_REQUIRE_NATIVE="1")
    assert run.returncode == 0, run.stderr
    assert probe(target, tmp_path).startswith("available (CPU kernels")
    assert (target / "fastloss" / "benchmarks" / "cli.py").exists()


def test_without_a_compiler_it_installs_and_says_so(tmp_path: Path) -> None:
    target = tmp_path / "site"
    run = install(target, CXX="/nonexistent/c++", FASTLOSS_REQUIRE_NATIVE="0")
    assert run.returncode == 0, run.stderr
    assert probe(target, tmp_path).startswith("not available: the package was installed without a C++ compiler")


def test_without_a_compiler_it_refuses_if_the_core_is_required(tmp_path: Path) -> None:
    run = install(tmp_path / "site", CXX="/nonexistent/c++", FASTLOSS_REQUIRE_NATIVE="1")
    assert run.returncode != 0
