"""A short form of examples/force_field.py: its symmetries, its parts, its files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("force_field", ROOT / "examples" / "force_field.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["force_field"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_energy_is_invariant_and_forces_are_equivariant(example: ModuleType) -> None:
    generator = torch.Generator().manual_seed(1)
    batch = example.collate([example.crystal(generator) for _ in range(3)])
    torch.manual_seed(0)
    assert example.broken_symmetry(example.Potential(example.PRODUCTS["fastloss"]), batch, 1) < 1e-10


def test_forces_are_the_slope_of_the_energy(example: ModuleType) -> None:
    torch.manual_seed(0)
    potential = example.Potential(example.PRODUCTS["fastloss"]).double()
    batch = example.collate([example.crystal(torch.Generator().manual_seed(1))])
    batch = example.Batch(**{k: v.double() if v.is_floating_point() else v for k, v in vars(batch).items()})
    _, forces = potential.energies_and_forces(batch, training=False)
    step = 1e-5 * torch.randn(batch.positions.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        change = potential(batch, batch.positions + step) - potential(batch, batch.positions - step)
    torch.testing.assert_close(change.sum(), -2 * (forces * step).sum(), rtol=1e-6, atol=0)


def test_short_run(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--epochs", "1", "--crystals", "8", "--batch-size", "4", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["force_field.py", *arguments])
    example.main()  # two steps teach no forces: whether they were learned is not asked here
    saved = json.loads((tmp_path / "force_field.json").read_text())
    assert set(saved["runs"]) == {"fastloss", "e3nn"}
    assert all(len(run["losses"]) == 2 and run["step_seconds"] > 0 for run in saved["runs"].values())
    assert saved["broken_symmetry"]["fastloss"] < 1e-10
    assert (tmp_path / "force_field.png").stat().st_size > 1000
