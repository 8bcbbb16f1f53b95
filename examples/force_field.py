"""Train one small interatomic potential twice, with fastloss's Gaunt products and with e3nn's, on energies and forces.

The data are real crystals: face-centred cubic metals and alloys of them, strained and rattled, with energies and forces
of ASE's effective-medium calculator. The network is equivariant message passing: features of degree 0..2 on every atom,
two rounds of convolution along the edges and of products of the features with themselves. Both runs start from the same
seed and see the same batches; only the products differ. e3nn gives every path (l1, l2, l3) a weight of its own, the
Gaunt product one to every degree. Exits with 1 if the errors part by more than a factor, or a symmetry is broken.

    python examples/force_field.py --output reports/force_field
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.neighborlist import neighbor_list
from e3nn import o3
from fastloss.benchmarks.report import duration, size, write_atomically
from torch import Tensor, nn

import fastloss

METALS = ("Cu", "Ag", "Au", "Al", "Ni", "Pd")
CHANNELS, DEGREE, ROUNDS, WAVES = 8, 2, 2, 6
CUTOFF = 4.2  # Å
BAND = 1.5  # the two force errors may differ by this factor


# ---------------------------------------------------------------- data


@dataclass
class Batch:
    species: Tensor  # (atoms,)
    positions: Tensor  # (atoms, 3)
    crystal: Tensor  # (atoms,), the crystal each atom belongs to
    source: Tensor  # (edges,)
    target: Tensor  # (edges,)
    shift: Tensor  # (edges, 3), between periodic images
    energy: Tensor  # (crystals,)
    forces: Tensor  # (atoms, 3)


def crystal(generator: torch.Generator) -> Atoms:
    """Two metals on the sites of one fcc crystal of 8 atoms, strained by up to 3% and rattled by about 0.1 Å."""
    first, second = (METALS[int(torch.randint(len(METALS), (), generator=generator))] for _ in range(2))
    atoms = bulk(first, cubic=False).repeat((2, 2, 2))
    for site in range(len(atoms)):
        if torch.rand((), generator=generator) < 0.5:
            atoms.symbols[site] = second
    strain = torch.eye(3) + 0.03 * (2 * torch.rand(3, 3, generator=generator) - 1)
    atoms.set_cell(atoms.cell.array @ strain.numpy(), scale_atoms=True)
    atoms.positions += 0.1 * torch.randn(len(atoms), 3, generator=generator).numpy()
    atoms.calc = EMT()
    return atoms


def collate(crystals: Sequence[Atoms]) -> Batch:
    parts: dict[str, list[Tensor]] = {name: [] for name in Batch.__annotations__}
    start = 0
    for n, atoms in enumerate(crystals):
        i, j, images = neighbor_list("ijS", atoms, CUTOFF)
        values = {
            "species": torch.tensor([METALS.index(symbol) for symbol in atoms.get_chemical_symbols()]),
            "positions": torch.from_numpy(atoms.positions),
            "crystal": torch.full((len(atoms),), n),
            "source": torch.from_numpy(j) + start,
            "target": torch.from_numpy(i) + start,
            "shift": torch.from_numpy(images @ atoms.cell.array),
            "energy": torch.tensor([atoms.get_potential_energy()]),
            "forces": torch.from_numpy(atoms.get_forces()),
        }
        for name, value in values.items():
            parts[name].append(value.float() if value.is_floating_point() else value)
        start += len(atoms)
    return Batch(**{name: torch.cat(values) for name, values in parts.items()})


# ---------------------------------------------------------------- the products


class Gaunt(nn.Module):
    """Along the edges: a filter with a weight for each channel and degree. In place: squares."""

    radial_outputs = CHANNELS * (DEGREE + 1)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, CHANNELS, DEGREE + 1))

    def convolve(self, x: Tensor, vectors: Tensor, radial: Tensor) -> Tensor:
        weights = radial.unflatten(-1, (CHANNELS, DEGREE + 1))
        return fastloss.gaunt_convolution(x, vectors, DEGREE, DEGREE, weights=weights, normalization="component")

    def square(self, x: Tensor) -> Tensor:
        weights = self.weight.unbind()
        return fastloss.gaunt_tensor_product(x, x, DEGREE, weights=weights, normalization="component")


def paths() -> list[tuple[int, int, int]]:
    every = itertools.product(range(DEGREE + 1), repeat=3)
    return [(a, b, c) for a, b, c in every if abs(a - b) <= c <= a + b and (a + b + c) % 2 == 0]


class Clebsch(nn.Module):
    """The same by e3nn: parity allows the same paths, and each has its own weight."""

    radial_outputs = CHANNELS * len(paths())

    def __init__(self) -> None:
        super().__init__()
        features = o3.Irreps([(CHANNELS, (n, (-1) ** n)) for n in range(DEGREE + 1)])
        harmonics = o3.Irreps.spherical_harmonics(DEGREE)
        along = [(*path, "uvu", True) for path in paths()]
        inside = [(*path, "uuu", True) for path in paths()]
        options = {"shared_weights": False, "internal_weights": False}
        self.along = o3.TensorProduct(features, harmonics, features, along, **options)
        self.inside = o3.TensorProduct(features, features, features, inside)
        self.harmonics = o3.SphericalHarmonics(harmonics, normalize=True, normalization="component")

    def flat(self, x: Tensor) -> Tensor:
        """(..., C, (L + 1)²) to e3nn's layout, degree by degree."""
        return torch.cat([x[..., n * n : (n + 1) ** 2].flatten(-2) for n in range(DEGREE + 1)], -1)

    def square_layout(self, x: Tensor) -> Tensor:
        parts = x.split([CHANNELS * (2 * n + 1) for n in range(DEGREE + 1)], -1)
        return torch.cat([part.unflatten(-1, (CHANNELS, -1)) for part in parts], -1)

    def convolve(self, x: Tensor, vectors: Tensor, radial: Tensor) -> Tensor:
        return self.square_layout(self.along(self.flat(x), self.harmonics(vectors), radial))

    def square(self, x: Tensor) -> Tensor:
        x = self.flat(x)
        return self.square_layout(self.inside(x, x))


PRODUCTS: dict[str, type[Gaunt | Clebsch]] = {"e3nn": Clebsch, "fastloss": Gaunt}


# ---------------------------------------------------------------- the network


class PerDegree(nn.Module):
    """Mixes the channels, degree by degree."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DEGREE + 1, CHANNELS, CHANNELS) / CHANNELS**0.5)
        degrees = [n for n in range(DEGREE + 1) for _ in range(2 * n + 1)]
        self.register_buffer("degrees", torch.tensor(degrees), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ncd,dce->ned", x, self.weight[self.degrees])


class Potential(nn.Module):
    def __init__(self, product: type[Gaunt | Clebsch]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(METALS), CHANNELS)
        self.products = nn.ModuleList(product() for _ in range(ROUNDS))
        self.radial = nn.ModuleList(
            nn.Sequential(nn.Linear(WAVES, 32), nn.SiLU(), nn.Linear(32, product.radial_outputs)) for _ in range(ROUNDS)
        )
        self.mixing = nn.ModuleList(nn.ModuleList(PerDegree() for _ in range(3)) for _ in range(ROUNDS))
        self.gates = nn.ModuleList(nn.Linear(CHANNELS, CHANNELS) for _ in range(ROUNDS))
        self.readout = nn.Sequential(nn.Linear(CHANNELS, 32), nn.SiLU(), nn.Linear(32, 1))
        self.offset = nn.Embedding(len(METALS), 1)
        nn.init.zeros_(self.offset.weight)

    def forward(self, batch: Batch, positions: Tensor) -> Tensor:
        """(crystals,) energies."""
        vectors = positions[batch.source] - positions[batch.target] + batch.shift
        length = vectors.norm(dim=1)
        # Waves that vanish at the cutoff with their first two derivatives, so that energies are smooth.
        envelope = (1 - (length / CUTOFF) ** 2).clamp(min=0) ** 3
        order = torch.arange(1, WAVES + 1, dtype=length.dtype) * math.pi / CUTOFF
        waves = torch.sin(length[:, None] * order) * (envelope / length)[:, None] * 2
        x = nn.functional.pad(self.embedding(batch.species).unsqueeze(-1), (0, (DEGREE + 1) ** 2 - 1))
        for product, radial, mixing, gate in zip(self.products, self.radial, self.mixing, self.gates, strict=True):
            message = product.convolve(mixing[0](x)[batch.source], vectors, radial(waves) * envelope[:, None])
            x = x + torch.zeros_like(x).index_add(0, batch.target, message) / 4
            x = x + mixing[2](product.square(mixing[1](x))) / 4
            x = x * torch.sigmoid(gate(x[..., 0])).unsqueeze(-1) * 2
        atoms = self.readout(x[..., 0]).squeeze(-1) + self.offset(batch.species).squeeze(-1)
        return torch.zeros(int(batch.crystal.max()) + 1, dtype=atoms.dtype).index_add(0, batch.crystal, atoms)

    def energies_and_forces(self, batch: Batch, *, training: bool) -> tuple[Tensor, Tensor]:
        positions = batch.positions.clone().requires_grad_()
        energies = self(batch, positions)
        (gradient,) = torch.autograd.grad(energies.sum(), positions, create_graph=training)
        return energies, -gradient


# ---------------------------------------------------------------- training


@dataclass
class Run:
    losses: list[float]
    step_seconds: float  # median of a step: forward, forces, backward, update
    peak_bytes: int | None  # what a step needs at most beyond what is there before it
    energy_error: float  # mean absolute, eV an atom, held-out crystals
    force_error: float  # mean absolute, eV / Å


def status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def loss_of(potential: Potential, batch: Batch) -> Tensor:
    energies, forces = potential.energies_and_forces(batch, training=True)
    atoms = torch.bincount(batch.crystal)
    return ((energies - batch.energy) / atoms).square().mean() * 10 + (forces - batch.forces).square().mean() * 10


def peak_of_a_step(potential: Potential, batch: Batch) -> int | None:
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier steps left to the allocator would hide this one
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    except (OSError, AttributeError):
        return None
    before = status("VmRSS")
    loss_of(potential, batch).backward()
    after = status("VmHWM")
    return None if before is None or after is None else max(0, after - before)


def train(name: str, batches: Sequence[Batch], test: Batch, epochs: int, seed: int) -> tuple[Run, Potential]:
    torch.manual_seed(seed)
    potential = Potential(PRODUCTS[name])
    optimizer = torch.optim.Adam(potential.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    generator = torch.Generator().manual_seed(seed)
    losses, seconds = [], []
    for _ in range(epochs):
        for n in torch.randperm(len(batches), generator=generator).tolist():
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = loss_of(potential, batches[n])
            loss.backward()
            nn.utils.clip_grad_norm_(potential.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            seconds.append(time.perf_counter() - start)
            losses.append(loss.item())
    peak = peak_of_a_step(potential, batches[0])
    energies, forces = potential.energies_and_forces(test, training=False)
    energy_error = ((energies - test.energy) / torch.bincount(test.crystal)).abs().mean().item()
    force_error = (forces - test.forces).abs().mean().item()
    return Run(losses, sorted(seconds)[len(seconds) // 2], peak, energy_error, force_error), potential


def broken_symmetry(potential: Potential, batch: Batch, seed: int) -> float:
    """Largest change of the energies, and of the forces turned back, under rotations and a reflection, in float64."""
    potential = potential.double()
    batch = Batch(**{k: v.double() if v.is_floating_point() else v for k, v in vars(batch).items()})
    energies, forces = potential.energies_and_forces(batch, training=False)
    worst = 0.0
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))
        turned = Batch(**{**vars(batch), "positions": batch.positions @ turn.T, "shift": batch.shift @ turn.T})
        new_energies, new_forces = potential.energies_and_forces(turned, training=False)
        change = ((new_energies - energies).abs().max() / energies.abs().max()).item()
        worst = max(worst, change, ((new_forces @ turn - forces).abs().max() / forces.abs().max()).item())
    return worst


def save(folder: Path, runs: dict[str, Run], symmetry: dict[str, float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, run in runs.items():
        label = f"{name}: forces {1000 * run.force_error:.0f} meV/Å, {duration(run.step_seconds)} a step"
        axes.plot(run.losses, label=label)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="fcc alloys, energies and forces of ASE's EMT")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "force_field.png", buffer.getvalue())
    content = {"runs": {name: asdict(run) for name, run in runs.items()}, "broken_symmetry": symmetry}
    write_atomically(folder / "force_field.json", json.dumps(content, indent=1).encode())


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a potential with fastloss's products and with e3nn's.")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--crystals", type=int, default=192, help="to train on; a quarter as many are held out")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="DIR", help="save force_field.png and force_field.json here")
    arguments = parser.parse_args()
    if min(arguments.epochs, arguments.batch_size) < 1 or arguments.crystals < arguments.batch_size:
        parser.error("epochs and batch size must be at least 1, crystals at least the batch size")

    generator = torch.Generator().manual_seed(arguments.seed)
    crystals = [crystal(generator) for _ in range(arguments.crystals)]
    test = collate([crystal(generator) for _ in range(max(1, arguments.crystals // 4))])
    step = arguments.batch_size
    batches = [collate(crystals[i : i + step]) for i in range(0, len(crystals) - step + 1, step)]
    runs, symmetry = {}, {}
    for name in PRODUCTS:
        runs[name], potential = train(name, batches, test, arguments.epochs, arguments.seed)
        symmetry[name] = broken_symmetry(potential, test, arguments.seed)

    def row(label: str, shown: dict[str, str]) -> None:
        print(f"{label:<44}" + "".join(f"{shown[name]:>14}" for name in runs))

    row(f"{arguments.epochs * len(batches)} steps of {step} crystals", {name: name for name in runs})
    row("first loss", {name: f"{run.losses[0]:.3f}" for name, run in runs.items()})
    row("last loss", {name: f"{run.losses[-1]:.4f}" for name, run in runs.items()})
    row("energy error, held out [meV/atom]", {name: f"{1000 * run.energy_error:.1f}" for name, run in runs.items()})
    row("force error, held out [meV/Å]", {name: f"{1000 * run.force_error:.1f}" for name, run in runs.items()})
    zero = test.forces.abs().mean().item()
    row("  of no forces at all", dict.fromkeys(runs, f"{1000 * zero:.1f}"))
    row("a step, median", {name: duration(run.step_seconds) for name, run in runs.items()})
    peak = {name: "not available" if run.peak_bytes is None else size(run.peak_bytes) for name, run in runs.items()}
    row("peak memory of a step", peak)
    row("broken symmetry in float64", {name: f"{symmetry[name]:.1e}" for name in runs})
    if arguments.output:
        save(arguments.output, runs, symmetry)

    failures = []
    if not symmetry["fastloss"] < 1e-10:  # e3nn's constants were rounded to float32 with its module
        failures.append(f"fastloss: symmetry broken by {symmetry['fastloss']:.1e}")
    if not runs["fastloss"].force_error <= BAND * runs["e3nn"].force_error:
        failures.append("the force error is beyond the band of e3nn's")
    if not max(run.force_error for run in runs.values()) < 0.5 * zero:
        failures.append("the forces were not learned")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
