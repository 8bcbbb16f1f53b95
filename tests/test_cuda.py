"""The kernels in CUDA C++ on a machine without a GPU: compiled for chips that are not there, and found or not."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastloss
from fastloss import _backends

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))


def build_setting(name: str) -> object:
    """A constant of setup.py, read without running it."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(name)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", KERNELS, ids=lambda p: p.name)
def test_kernels_compile_for_every_chip_and_spill_nothing(source: Path, tmp_path: Path) -> None:
    chips = [f"sm_{name}" for name in build_setting("ARCHITECTURES")]
    options = [f"-gencode=arch={chip.replace('sm', 'compute')},code={chip}" for chip in chips]
    command = ["nvcc", *str(build_setting("CUDA_FLAGS")).split(), *options, "-Xptxas", "-v"]
    run = subprocess.run(
        [*command, "-c", str(source), "-o", str(tmp_path / "kernels.o")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert set(re.findall(r"for '(sm_\d+)'", run.stderr)) == set(chips)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    assert len(spills) >= len(re.findall(r"^__global__", source.read_text(), re.M)) * len(chips)
    assert set(spills) == {("0", "0", "0")}


class TestStatus:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_backends, "_cuda_core", _backends._cuda_core.__wrapped__)

    def built(self, monkeypatch: pytest.MonkeyPatch, driver: int, device: bool = True) -> object:
        core = SimpleNamespace(
            runtime_version=lambda: 13000, driver_version=lambda: driver, architectures="sm_80 sm_90"
        )
        monkeypatch.setitem(sys.modules, "fastloss._cuda", core)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
        return core

    @pytest.mark.parametrize("driver", [13000, 13010, 14000])
    def test_it_is_used_where_the_driver_runs_it(self, driver: int, monkeypatch: pytest.MonkeyPatch) -> None:
        core = self.built(monkeypatch, driver)
        assert _backends.cuda_core() is core
        expected = "available (CUDA 13.0, sm_80 sm_90; sorts slices too long for Triton)"
        assert _backends._cuda_core()[1] == expected

    def test_an_old_driver_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built(monkeypatch, 12080)
        assert _backends.cuda_core() is None
        assert _backends._cuda_core()[1] == "not available: fastloss._cuda needs a driver of CUDA 13.0, got 12.8"

    def test_so_is_a_machine_without_a_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built(monkeypatch, 0, device=False)
        assert _backends.cuda_core() is None
        assert fastloss.backends()["cuda"] == "not available: PyTorch sees no CUDA device"

    def test_and_an_installation_without_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "fastloss._cuda", None)  # as if it were not there
        assert _backends.cuda_core() is None
        assert fastloss.backends()["cuda"].startswith("not available: the package was installed without nvcc")

    def test_it_is_no_backend_to_ask_for(self) -> None:
        with pytest.raises(ValueError, match="'native', 'portable', 'triton'"), fastloss.use_backend("cuda"):
            pass
