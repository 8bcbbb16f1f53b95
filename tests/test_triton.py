"""The Triton kernels on a machine without a GPU: interpreted, and compiled for chips that are not there."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import fastloss
from fastloss import _backends

if TYPE_CHECKING:
    from fastloss._triton import Resources

pytest.importorskip("triton", reason="the kernels need Triton; `pip install triton`")

ROOT = Path(__file__).parent.parent
CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")


def interpret(family: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: Triton reads the variable when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{family}/triton_values.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, subprocess.CompletedProcess[str]]:
    families = _backends.FAMILIES
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(families, pool.map(interpret, families), strict=True))


@pytest.mark.parametrize("family", _backends.FAMILIES)
def test_values_under_the_interpreter(family: str, interpreted: dict[str, subprocess.CompletedProcess[str]]) -> None:
    run = interpreted[family]
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Resources]]:
    """All chips at once, anew: nothing that another run compiled is taken."""
    from fastloss import kernels

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield list(kernels.compile_all(CHIPS))


@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_fit_the_chip_and_use_its_matrix_units(chip: str, compiled: list[Resources]) -> None:
    results = [r for r in compiled if r.target == chip]
    assert len(results) > 10
    assert [f"{r.specimen}: {', '.join(r.faults)}" for r in results if r.faults] == []


@pytest.mark.parametrize("family", _backends.FAMILIES)
def test_kernels_take_sizes_of_one(family: str) -> None:
    from fastloss import _triton

    for specimen in importlib.import_module(f"fastloss.{family}.triton").specimens("sm_90", False):
        _triton.read_with_sizes_of_one(specimen, "sm_90")


@pytest.mark.parametrize("family", _backends.FAMILIES)
def test_kernels_take_every_flag(family: str) -> None:
    """Only some are compiled, and the interpreter reads a branch as Python does."""
    from fastloss import _triton

    for specimen in importlib.import_module(f"fastloss.{family}.triton").specimens("sm_90", False):
        for name, value in specimen.constants.items():
            if isinstance(value, bool):
                _triton.read(specimen, "sm_90", {name: not value})


def test_a_kernel_that_does_not_take_a_size_of_one_is_seen() -> None:
    import triton

    from fastloss import _triton

    @triton.jit
    def kernel(x, count):  # type: ignore[no-untyped-def]
        count.to(x.dtype.element_ty)

    specimen = _triton.Specimen("conversion", kernel, {"x": "*fp32", "count": "i32"}, {}, _triton.Config((1,)))
    _triton.read(specimen, "sm_90", {})
    with pytest.raises(triton.compiler.errors.CompilationError, match="no attribute 'to'"):
        _triton.read_with_sizes_of_one(specimen, "sm_90")


def test_a_kernel_that_spills_or_does_not_fit_is_seen() -> None:
    from fastloss import _triton
    from fastloss.contrastive import triton as contrastive

    large = _triton.Config((256, 128, 128, 1), 4, 4)
    lse = contrastive._tile_specimen("lse", torch.bfloat16, False, large, "", "sm_80")
    faults = " ".join(_triton.resources(lse, "sm_80").faults)
    assert "spills" in faults
    assert "bytes of shared memory" in faults
    sums = next(s for s in contrastive.specimens("sm_90", False) if s.name == "scale gradient")
    assert _triton.resources(replace(sums, matrix=True), "sm_90").faults == ("does not use the matrix units",)


class TestChoice:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_backends, "_preferred", {"cpu": "native"})

    def test_cards_run_triton_where_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_backends, "_triton_status", lambda: "available (Triton 3.6.0)")
        assert _backends.backend_of(torch.device("cuda:1")) == "triton"
        assert _backends.implementation("contrastive", torch.device("cuda")).__name__ == "fastloss.contrastive.triton"
        assert _backends.backend_of(torch.device("mps")) == "portable"

    def test_otherwise_they_run_portable_after_one_warning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_backends, "_triton_status", lambda: "not available: Triton is 3.2.0")
        with pytest.warns(UserWarning, match="portable backend; backend 'triton' is not available: Triton is 3.2.0"):
            assert _backends.backend_of(torch.device("cuda")) == "portable"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert _backends.backend_of(torch.device("cuda")) == "portable"

    @pytest.mark.parametrize(
        ("capability", "version", "status"),
        [
            ((9, 0), "3.6.0", "available (Triton 3.6.0"),
            ((9, 0), "3.5.1", "not available: Triton is 3.5.1, the kernels need 3.6 or later"),
            ((7, 5), "3.6.0", "not available: Card has compute capability 7.5, the kernels need 8.0 or later"),
        ],
    )
    def test_status(
        self, capability: tuple[int, int], version: str, status: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import triton

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(triton, "__version__", version)
        assert _backends._triton_status.__wrapped__().startswith(status)

    def test_without_a_card_it_says_so_and_refuses(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a card")
        assert fastloss.backends()["triton"] == "not available: PyTorch sees no CUDA or ROCm device"
        with pytest.raises(RuntimeError, match="backend 'triton' is not available"), fastloss.use_backend("triton"):
            pass
