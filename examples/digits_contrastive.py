"""Train the same encoder twice on real images, once with a hand-written loss and once with fastloss, and compare.

The images are scikit-learn's handwritten digits (1,797 of 8 x 8 pixels, part of that package). Labels are used only to
judge the features: a nearest-neighbour classifier on held-out digits. Both runs start from one seed, so they see the
same weights, batches and augmentations; after that nothing connects them. Exits with 1 when the loss curves part or the
features are bad.

    python examples/digits_contrastive.py --output reports/digits
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from fastloss.benchmarks import SUITES
from fastloss.benchmarks.harness import Unavailable, probe_memory
from fastloss.benchmarks.report import duration, size, write_atomically
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

import fastloss

TEMPERATURE = 0.1
FEATURES, PROJECTION = 128, 64
CURVE_TOLERANCE = 1e-4
ACCURACY = 0.95
LARGE_BATCH = 4096

Loss = Callable[[Tensor, Tensor], Tensor]


def eager_nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    z = F.normalize(torch.cat((z0, z1)), dim=1)
    logits = z @ z.T / TEMPERATURE
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z0)))


LOSSES: dict[str, Loss] = {"eager": eager_nt_xent, "fastloss": fastloss.NTXentLoss(temperature=TEMPERATURE)}


class Encoder(nn.Module):
    # Training amplifies roundings, so how long two float32 runs stay together depends on what is trained. Here they do
    # with a wide margin (4e-7 on four seeds, against the 1e-4 allowed), for three reasons:
    # - batch norm: without it all embeddings start almost equal, and the escape from that plateau multiplies a
    #   difference at every step (to 4e-4 on one seed of four);
    # - GELU is smooth: at the kink of a ReLU a rounding can switch a path on or off;
    # - SGD's step is linear in the gradient: Adam divides by the gradient's own size, which makes the rounding of a
    #   gradient near zero a step of full length.
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(32 * 16, FEATURES),
            nn.BatchNorm1d(FEATURES),
        )
        self.head = nn.Sequential(nn.GELU(), nn.Linear(FEATURES, PROJECTION))

    def forward(self, images: Tensor) -> Tensor:
        embedding: Tensor = self.head(self.body(images))
        return embedding


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to one pixel each way, erase a 2 x 2 patch, add noise; each image by itself."""
    count, _, height, width = images.shape
    shift = torch.randint(3, (count, 2), generator=generator)
    rows = shift[:, :1] + torch.arange(height)
    columns = shift[:, 1:] + torch.arange(width)
    padded = F.pad(images[:, 0], (1, 1, 1, 1))
    moved = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    corner = torch.randint(height - 1, (count, 2), generator=generator)
    inside_rows = (torch.arange(height) - corner[:, :1]).abs().le(1) & (torch.arange(height) >= corner[:, :1])
    inside_columns = (torch.arange(width) - corner[:, 1:]).abs().le(1) & (torch.arange(width) >= corner[:, 1:])
    moved = moved.masked_fill(inside_rows[:, :, None] & inside_columns[:, None, :], 0)
    return (moved + 0.1 * torch.randn(moved.shape, generator=generator))[:, None]


@dataclass
class Run:
    losses: list[float]
    loss_seconds: float  # forward and backward of the loss alone, over all steps
    accuracy: float


def train(loss: Loss, data: tuple[Tensor, Tensor, Tensor, Tensor], epochs: int, batch_size: int, seed: int) -> Run:
    train_images, test_images, train_labels, test_labels = data
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.05, momentum=0.9)
    batches = len(train_images) // batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    losses, loss_seconds = [], 0.0
    for _ in range(epochs):
        order = torch.randperm(len(train_images), generator=generator)
        for batch in order[: batches * batch_size].split(batch_size):
            views = [encoder(augment(train_images[batch], generator)) for _ in range(2)]
            # Cut at the embeddings, so that the clock sees the loss and nothing of the encoder.
            z = [view.detach().requires_grad_() for view in views]
            start = time.perf_counter()
            value = loss(*z)
            gradients = torch.autograd.grad(value, z)
            loss_seconds += time.perf_counter() - start
            optimizer.zero_grad()
            torch.autograd.backward(views, gradients)
            optimizer.step()
            schedule.step()
            losses.append(value.item())
    encoder.eval()
    with torch.no_grad():
        train_features, test_features = (
            F.normalize(encoder.body(images), dim=1).numpy() for images in (train_images, test_images)
        )
    neighbours = KNeighborsClassifier(n_neighbors=5).fit(train_features, train_labels.numpy())
    return Run(losses, loss_seconds, float(neighbours.score(test_features, test_labels.numpy())))


def loss_memory(name: str, batch_size: int, seed: int) -> int | str:
    """Peak memory of one pass of the loss beyond its gradients, by the benchmark's probe in a process of its own."""
    suite = SUITES["contrastive"]
    case = next(case for case in suite.cases if case.op == "nt_xent").at(rows=2 * batch_size, dim=PROJECTION)
    provider = next(provider for provider in suite.providers if provider.name == name)
    try:
        return probe_memory(case, provider, seed, torch.get_num_threads())[0].extra
    except Unavailable as reason:
        return f"not available: {reason}"


def load(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    labels = torch.from_numpy(digits.target)
    chosen = train_test_split(range(len(images)), test_size=0.25, stratify=digits.target, random_state=seed)
    train_rows, test_rows = (torch.tensor(rows) for rows in chosen)
    return images[train_rows], images[test_rows], labels[train_rows], labels[test_rows]


def save(folder: Path, runs: dict[str, Run], memory: dict[int, dict[str, int | str]], difference: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        axes.plot(run.losses, style, label=f"{name}: k-NN accuracy {run.accuracy:.3f}")
    axes.set(xlabel="step", ylabel="NT-Xent", title=f"digits, largest relative difference {difference:.1e}")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "digits.png", buffer.getvalue())
    content = {
        "largest_relative_difference": difference,
        "runs": {name: asdict(run) for name, run in runs.items()},
        "extra_memory_bytes": memory,
    }
    write_atomically(folder / "digits.json", json.dumps(content, indent=1).encode())


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description="Train on digits with a hand-written NT-Xent and with fastloss's.")
    parser.add_argument("--epochs", type=positive, default=40)
    parser.add_argument("--batch-size", type=positive, default=256, help="images a step; each gives two views")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="DIR", help="save digits.png and digits.json here")
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    data = load(arguments.seed)
    if arguments.batch_size > len(data[0]):
        parser.error(f"argument --batch-size: must be at most the {len(data[0])} training images")

    runs = {
        name: train(loss, data, arguments.epochs, arguments.batch_size, arguments.seed) for name, loss in LOSSES.items()
    }
    eager, ours = runs["eager"], runs["fastloss"]
    curves = torch.tensor([eager.losses, ours.losses], dtype=torch.float64)
    difference = ((curves[0] - curves[1]).abs() / curves[0].abs()).max().item()  # max of Python would hide a NaN
    memory = {
        batch: {name: loss_memory(name, batch, arguments.seed) for name in LOSSES}
        for batch in (arguments.batch_size, LARGE_BATCH)
    }

    def row(label: str, shown: dict[str, str]) -> None:
        print(f"{label:<48}" + "".join(f"{shown[name]:>14}" for name in LOSSES))

    row(f"{len(eager.losses)} steps of {arguments.batch_size} images", {name: name for name in LOSSES})
    row("first loss", {name: f"{run.losses[0]:.6f}" for name, run in runs.items()})
    row("last loss", {name: f"{run.losses[-1]:.6f}" for name, run in runs.items()})
    row("k-NN accuracy on held-out digits", {name: f"{run.accuracy:.4f}" for name, run in runs.items()})
    seconds = {name: duration(run.loss_seconds / len(run.losses)) for name, run in runs.items()}
    row("loss forward + backward, mean of the steps", seconds)
    for batch, extra in memory.items():
        shown = {name: size(value) if isinstance(value, int) else value for name, value in extra.items()}
        row(f"extra memory of the loss, {batch} images", shown)
    print(f"largest relative difference of the loss curves: {difference:.2e} (allowed {CURVE_TOLERANCE:.0e})")
    print("time: clock around the loss alone in training; memory: growth of the peak resident set in a fresh process")
    if arguments.output:
        save(arguments.output, runs, memory, difference)

    failures = [
        f"{name}: k-NN accuracy {run.accuracy:.4f} is below {ACCURACY}"
        for name, run in runs.items()
        if run.accuracy < ACCURACY
    ]
    if not difference <= CURVE_TOLERANCE:  # written so that NaN fails
        failures.append(f"the loss curves differ by {difference:.2e}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
