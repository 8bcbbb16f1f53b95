"""Train a small generator of digits whose only loss is the sliced Wasserstein distance to real ones.

The images are scikit-learn's handwritten digits (1,797 of 8 x 8 pixels, part of that package). A multilayer perceptron
turns noise into images, and every step draws fresh directions in the space of pixels: no discriminator, no likelihood.
It is trained twice, with the textbook loss in plain PyTorch and with fastloss, from the same weights, batches and
directions.

Held-out digits, never trained on, are the judge: their distance to generated digits, before and after, beside the
distance to real training digits, which no generator is expected to beat. Exits with 1 when the generated digits come no
closer than twice that (``--allowed``), or when some digit is never generated (by a nearest-neighbour classifier of real
digits).

    python examples/digits_generative.py --output reports/generative
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

import fastloss

NOISE, PIXELS, CLASSES = 16, 64, 10

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager_sliced(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    return ((directions @ x.T).sort(1)[0] - (directions @ y.T).sort(1)[0]).square().mean()


def fast_sliced(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    return fastloss.sliced_wasserstein(x, y, projections=directions)


LOSSES: dict[str, Loss] = {"eager": eager_sliced, "fastloss": fast_sliced}


def generator_network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(NOISE, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, PIXELS), nn.Sigmoid()
    )


@dataclass
class Run:
    losses: list[float]
    loss_seconds: float  # forward and backward of the loss alone, over all steps
    before: float  # distance of generated to held-out digits
    after: float
    counts: list[int]  # generated digits of each class


def distance(x: Tensor, y: Tensor) -> float:
    """Of any two sets of images: sizes differ."""
    generator = torch.Generator().manual_seed(0)
    value = fastloss.sliced_wasserstein(x, y, n_projections=1024, sampler="orthogonal", generator=generator)
    return math.sqrt(float(value))


def train(
    loss: Loss,
    real: Tensor,
    held_out: Tensor,
    judge: KNeighborsClassifier,
    steps: int,
    batch: int,
    slices: int,
    seed: int,
) -> tuple[Run, Tensor]:
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    network = generator_network()
    fixed = torch.randn(1024, NOISE, generator=random)
    with torch.no_grad():
        before = distance(network(fixed), held_out)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses, seconds = [], 0.0
    for _ in range(steps):
        images = network(torch.randn(batch, NOISE, generator=random))
        chosen = real[torch.randperm(len(real), generator=random)[:batch]]
        directions = F.normalize(torch.randn(slices, PIXELS, generator=random), dim=1)
        cut = images.detach().requires_grad_()  # so that the clock sees the loss and nothing of the network
        start = time.perf_counter()
        value = loss(cut, chosen, directions)
        (gradient,) = torch.autograd.grad(value, cut)
        seconds += time.perf_counter() - start
        optimizer.zero_grad()
        images.backward(gradient)
        optimizer.step()
        schedule.step()
        losses.append(value.item())
    with torch.no_grad():
        images = network(fixed)
    counts = torch.bincount(torch.from_numpy(judge.predict(images.numpy())), minlength=CLASSES).tolist()
    return Run(losses, seconds, before, distance(images, held_out), counts), images


def save(folder: Path, runs: dict[str, Run], images: Tensor, real: Tensor, floor: float) -> None:
    from matplotlib.figure import Figure

    def sheet(rows: Tensor) -> Tensor:
        """Ten by ten images as one."""
        return F.pad(rows[:100].reshape(10, 10, 8, 8), (1, 1, 1, 1), value=1).permute(0, 2, 1, 3).reshape(100, 100)

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    for k, (title, rows) in enumerate((("real", real), ("generated", images))):
        axes = figure.add_subplot(1, 3, k + 1)
        axes.imshow(sheet(rows), cmap="gray_r", vmin=0, vmax=1)
        axes.set(title=title, xticks=[], yticks=[])
    axes = figure.add_subplot(1, 3, 3)
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        axes.plot(torch.tensor(run.losses).sqrt(), style, linewidth=0.8, label=name)
    axes.axhline(floor, color="0.5", linestyle=":", label="real to held-out digits")
    axes.set(xlabel="step", ylabel="sliced distance", yscale="log", title="training")
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "digits_generative.png", dpi=140)
    content = {"floor": floor, "runs": {name: asdict(run) for name, run in runs.items()}}
    (folder / "digits_generative.json").write_text(json.dumps(content, indent=1))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a generator of digits by the sliced Wasserstein distance.")
    parser.add_argument("--steps", type=positive, default=800)
    parser.add_argument("--batch-size", type=positive, default=1024)
    parser.add_argument("--slices", type=positive, default=128, help="directions a step")
    parser.add_argument("--allowed", type=float, default=2.0, help="times the distance of real digits, else exit 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="DIR", help="save digits_generative.png and .json here")
    arguments = parser.parse_args()
    digits = load_digits()
    rows = train_test_split(
        range(len(digits.data)), test_size=0.25, stratify=digits.target, random_state=arguments.seed
    )
    pixels = torch.from_numpy(digits.data).float() / 16
    real, held_out = (pixels[torch.tensor(part)] for part in rows)
    if arguments.batch_size > len(real):
        parser.error(f"argument --batch-size: must be at most the {len(real)} training images")
    judge = KNeighborsClassifier(n_neighbors=5).fit(real.numpy(), digits.target[rows[0]])

    runs: dict[str, Run] = {}
    for name, loss in LOSSES.items():
        size = (arguments.steps, arguments.batch_size, arguments.slices, arguments.seed)
        runs[name], images = train(loss, real, held_out, judge, *size)
    floor = distance(real, held_out)

    console = Console()
    table = Table("", *runs, title=f"{arguments.steps} steps of {arguments.batch_size} images")
    described: dict[str, Callable[[Run], str]] = {
        "generated to held-out digits, before": lambda run: f"{run.before:.4f}",
        "generated to held-out digits, after": lambda run: f"{run.after:.4f}",
        "real to held-out digits": lambda _: f"{floor:.4f}",
        "rarest digit, of 1024 generated": lambda run: f"{min(run.counts)}",
        "loss forward + backward, mean of the steps": lambda run: f"{1e3 * run.loss_seconds / len(run.losses):.2f} ms",
    }
    for row, text in described.items():
        table.add_row(row, *(text(run) for run in runs.values()))
    console.print(table)
    if arguments.output:
        save(arguments.output, runs, images, real, floor)

    failures = []
    for name, run in runs.items():
        if not run.after <= arguments.allowed * floor:  # written so that NaN fails
            failures.append(f"{name}: generated digits are {run.after:.4f} from held-out ones, real ones {floor:.4f}")
        if min(run.counts) == 0:
            failures.append(f"{name}: the digit {run.counts.index(0)} is never generated")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
