"""Pose a molecule against a deformed copy of itself by minimising the sliced Wasserstein distance of their surfaces.

The shape is the stack of adenine and thymine, two neighbouring bases of DNA, from the S22 set that ships with ASE
(``ase.collections.s22``, optimised geometries): thirty atoms without any symmetry, so that one pose is right. Its van
der Waals surface is a cloud of points. The copy is twisted, sampled with fewer points, disturbed, turned and shifted;
sizes differ and nothing says which point belongs to which. All starting rotations are improved together, as one batch
of clouds, and the best is kept.

The correspondence of the atoms, which the loss never sees, is the judge: the root mean square distance of the atoms to
their copies, beside that of the best rigid motion (Kabsch), which only knowing the correspondence gives. Exits with 1
when the pose found is worse than that by more than half.

    python examples/shape_matching.py --output reports/shape
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase.collections import s22
from ase.data import vdw_radii
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastloss

MOLECULE = "Adenine-thymine_complex_stack"
ALLOWED = 1.5  # times the distance of the best rigid motion


@dataclass
class Shape:
    atoms: Tensor  # (a, 3) centres, in angstrom
    surface: Tensor  # (n, 3)


def surface_of(atoms: Tensor, radii: Tensor, density: float) -> Tensor:
    """Points on the spheres around the atoms that lie in no other sphere, about `density` a square angstrom."""
    points = []
    for centre, radius in zip(atoms, radii, strict=True):
        count = int(density * 4 * math.pi * float(radius) ** 2)
        height = 1 - (2 * torch.arange(count) + 1) / count  # a Fibonacci lattice: even over the sphere
        angle = torch.arange(count) * math.pi * (3 - math.sqrt(5))
        ring = (1 - height.square()).sqrt()
        sphere = centre + radius * torch.stack([ring * angle.cos(), ring * angle.sin(), height], 1)
        outside = (torch.cdist(sphere, atoms) >= radii - 1e-4).all(1)
        points.append(sphere[outside])
    return torch.cat(points)


def twisted(points: Tensor, degrees: float, half_length: float) -> Tensor:
    """Turned about the first axis, by `degrees` more at one end than at the other."""
    angle = math.radians(degrees) * points[:, 0] / (2 * half_length)
    y, z = points[:, 1], points[:, 2]
    return torch.stack([points[:, 0], angle.cos() * y - angle.sin() * z, angle.sin() * y + angle.cos() * z], 1)


def rotations(quaternions: Tensor) -> Tensor:
    """(S, 3, 3) of quaternions (S, 4) of any length but zero."""
    w, x, y, z = torch.nn.functional.normalize(quaternions, dim=1).unbind(1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def shapes(density: float, twist: float, noise: float, generator: torch.Generator) -> tuple[Shape, Shape]:
    """The molecule, centred and along its axes, and the deformed copy in another pose."""
    molecule = s22[MOLECULE]
    atoms = torch.from_numpy(molecule.get_positions()).float()
    atoms = atoms - atoms.mean(0)
    atoms = atoms @ torch.linalg.svd(atoms, full_matrices=False)[2].T
    radii = torch.from_numpy(np.asarray(vdw_radii[molecule.numbers])).float()
    shape = Shape(atoms, surface_of(atoms, radii, density))
    half_length = float(shape.surface[:, 0].abs().max())
    surface = surface_of(atoms, radii, 0.7 * density)
    turn = rotations(torch.randn(1, 4, generator=generator))[0]
    shift = 3 * torch.randn(3, generator=generator)
    moved = [twisted(points, twist, half_length) @ turn.T + shift for points in (atoms, surface)]
    moved[1] = moved[1] + noise * torch.randn(moved[1].shape, generator=generator)
    return shape, Shape(*moved)


def rms(difference: Tensor) -> float:
    return float(difference.square().sum(-1).mean().sqrt())


def best_rigid(atoms: Tensor, copies: Tensor) -> float:
    """Root mean square distance after the rigid motion that makes it smallest."""
    a, b = atoms - atoms.mean(0), copies - copies.mean(0)
    u, _, vt = torch.linalg.svd(a.T @ b)
    signs = torch.tensor([1.0, 1.0, float(torch.det(u @ vt))])
    return rms(a @ (u * signs) @ vt - b)


@dataclass
class Result:
    rotation: Tensor
    shift: Tensor
    curves: Tensor  # (steps, starts) losses
    seconds: float


def match(shape: Shape, copy: Shape, starts: int, steps: int, slices: int, generator: torch.Generator) -> Result:
    quaternions = torch.randn(starts, 4, generator=generator)
    quaternions[0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    quaternions.requires_grad_()
    shifts = (copy.surface.mean(0) - shape.surface.mean(0)).repeat(starts, 1).requires_grad_()
    optimizer = torch.optim.Adam([quaternions, shifts], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    curves, start = [], time.perf_counter()
    for _ in range(steps):
        posed = shape.surface @ rotations(quaternions).mT + shifts[:, None]  # (starts, n, 3)
        losses = fastloss.sliced_wasserstein(
            posed, copy.surface, n_projections=slices, sampler="orthogonal", generator=generator, reduction="none"
        )
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        schedule.step()
        curves.append(losses.detach())
    seconds = time.perf_counter() - start
    with torch.no_grad():
        turns = rotations(quaternions)
        posed = shape.surface @ turns.mT + shifts[:, None]
        final = fastloss.sliced_wasserstein(
            posed, copy.surface, n_projections=999, sampler="orthogonal", generator=generator, reduction="none"
        )
        best = final.argmin()
    return Result(turns[best], shifts[best].detach(), torch.stack(curves), seconds)


def judge(shape: Shape, copy: Shape) -> dict[str, float]:
    distance = fastloss.sliced_wasserstein(
        shape.surface, copy.surface, n_projections=999, sampler="orthogonal", generator=torch.Generator().manual_seed(0)
    )
    return {
        "sliced distance of the surfaces [A]": math.sqrt(float(distance)),
        "atoms to their copies, root mean square [A]": rms(shape.atoms - copy.atoms),
    }


def save(
    folder: Path, clouds: dict[str, Shape], copy: Shape, curves: Tensor, table: dict[str, dict[str, float]]
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    middle, radius = copy.surface.mean(0), float((copy.surface - copy.surface.mean(0)).abs().max())
    limits = [(float(m) - radius, float(m) + radius) for m in middle]
    for k, (name, cloud) in enumerate(clouds.items()):
        axes = figure.add_subplot(1, 3, k + 1, projection="3d")
        for shape, colour, label in ((copy, "0.5", "deformed copy"), (cloud, "tab:blue", "molecule")):
            axes.scatter(*shape.surface.T.numpy(), s=4, c=colour, alpha=0.5, linewidths=0)
            axes.scatter(*shape.atoms.T.numpy(), s=30, c=colour, label=f"{label}: atoms, surface")
        for ends in torch.stack([cloud.atoms, copy.atoms], 1):
            axes.plot(*ends.T.numpy(), c="tab:red", linewidth=1)
        axes.set(title=name, xlim=limits[0], ylim=limits[1], zlim=limits[2], box_aspect=(1, 1, 1))
        axes.legend()
    axes = figure.add_subplot(1, 3, 3)
    axes.plot(curves.sqrt().numpy(), c="0.7", linewidth=0.8)
    axes.plot(curves[:, curves[-1].argmin()].sqrt().numpy(), c="tab:blue", label="best")
    axes.set(xlabel="step", ylabel="sliced distance [A]", yscale="log", title=f"{curves.shape[1]} starts")
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "shape_matching.png", dpi=140)
    (folder / "shape_matching.json").write_text(json.dumps(table, indent=1))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description="Pose a molecule against a deformed copy by sliced Wasserstein.")
    parser.add_argument("--steps", type=positive, default=120)
    parser.add_argument("--starts", type=positive, default=24, help="rotations to start from, as one batch")
    parser.add_argument("--slices", type=positive, default=30, help="directions a step")
    parser.add_argument("--density", type=float, default=3.0, help="points a square angstrom")
    parser.add_argument("--twist", type=float, default=40.0, help="degrees between the ends of the copy")
    parser.add_argument("--noise", type=float, default=0.1, help="standard deviation of the copy's points, in angstrom")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="DIR", help="save shape_matching.png and .json here")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(arguments.seed)
    shape, copy = shapes(arguments.density, arguments.twist, arguments.noise, generator)
    if not len(copy.surface):
        parser.error(f"argument --density: must give the surface some points, got {arguments.density}")

    result = match(shape, copy, arguments.starts, arguments.steps, arguments.slices, generator)
    centred = copy.surface.mean(0) - shape.surface.mean(0)
    poses = {
        "before": (torch.eye(3), centred),
        "after": (result.rotation, result.shift),
    }
    posed = {
        name: Shape(*(t @ turn.T + shift for t in (shape.atoms, shape.surface)))
        for name, (turn, shift) in poses.items()
    }
    table = {name: judge(each, copy) for name, each in posed.items()}
    floor = best_rigid(shape.atoms, copy.atoms)

    title = f"{MOLECULE}: {len(shape.surface)} points, copy {len(copy.surface)}"
    shown = Table("", *table, title=title)
    for row in table["before"]:
        shown.add_row(row, *(f"{values[row]:.3f}" for values in table.values()))
    shown.add_row("best rigid motion of the atoms (knows who is who)", "", f"{floor:.3f}")
    console = Console()
    console.print(shown)
    per_step = 1e3 * result.seconds / arguments.steps
    console.print(f"{arguments.steps} steps of {arguments.starts} starts, {per_step:.0f} ms each")
    if arguments.output:
        save(arguments.output, posed, copy, result.curves, table)

    reached = table["after"]["atoms to their copies, root mean square [A]"]
    if not reached <= ALLOWED * floor:  # written so that NaN fails
        print(f"failed: the atoms are {reached:.3f} A from their copies, {floor:.3f} is possible", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
