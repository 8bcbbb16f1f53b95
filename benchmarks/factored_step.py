"""One training step of an output layer: forward, gradient to the hidden states, SGD update of the weight.

``python -m fastloss.benchmarks.factored_step`` or ``python -m benchmarks.factored_step``; not a loss to be called with
forward and backward alone, so it is measured apart from the cases of the harness. `FactoredOutput` with the Z-loss
beside the dense layer with log-softmax, and with the dense Z-loss, on the same hidden states; the dense steps and the
factored ones take turns, and a ratio is that of medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastloss

from .harness import describe_machine, summarise, synchronize

LR = 1e-3
CPU = torch.device("cpu")


class Batches:
    """Hidden states, and targets that are others in every step: their rows of the weight are not in the caches."""

    def __init__(self, classes: int, width: int, batch: int, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.classes, self.device = classes, device
        self.hidden = torch.randn(batch, width, generator=self.generator).to(device).requires_grad_()

    def seconds(self, step: Callable[[Tensor, Tensor], None]) -> float:
        target = torch.randint(self.classes, (len(self.hidden),), generator=self.generator).to(self.device)
        self.hidden.grad = None
        synchronize(self.device)
        start = time.perf_counter()
        step(self.hidden, target)
        synchronize(self.device)
        return time.perf_counter() - start


def dense_step(linear: nn.Linear, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], None]:
    optimizer = torch.optim.SGD(linear.parameters(), lr=LR)

    def step(hidden: Tensor, target: Tensor) -> None:
        optimizer.zero_grad()
        loss(linear(hidden), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def factored_step(layer: fastloss.FactoredOutput) -> Callable[[Tensor, Tensor], None]:
    def step(hidden: Tensor, target: Tensor) -> None:
        layer(hidden, target).backward()
        layer.step(LR)

    return step


def dense_z_loss(logits: Tensor, target: Tensor) -> Tensor:
    z = (logits.gather(1, target[:, None]).squeeze(1) - logits.mean(1)) / (logits.std(1, correction=0) + 1e-12)
    return F.softplus(-z).mean()


def measure(
    classes: int, width: int, batch: int, dense_rounds: int, steps: int, device: torch.device = CPU
) -> dict[str, Any]:
    """Times by name. A dense step leaves the caches cold: the first factored step after it does not count."""
    batches = Batches(classes, width, batch, device)
    linear = nn.Linear(width, classes, bias=False, device=device)
    layer = fastloss.FactoredOutput.from_linear(linear, loss="z")
    ours = factored_step(layer)
    dense: dict[str, Callable[[Tensor, Tensor], None]] = {}
    if dense_rounds:
        dense = {
            "eager, log-softmax": dense_step(linear, F.cross_entropy),
            "eager, Z-loss": dense_step(linear, dense_z_loss),
        }
    else:
        del linear
    samples: dict[str, list[float]] = {"FactoredOutput": [], **{name: [] for name in dense}}
    for _ in range(3):
        batches.seconds(ours)
    for _ in range(max(1, dense_rounds)):
        for name, step in dense.items():
            samples[name].append(batches.seconds(step))
        batches.seconds(ours)
        samples["FactoredOutput"] += [batches.seconds(ours) for _ in range(steps)]
    gc.collect()
    return {
        "classes": classes,
        "width": width,
        "batch": batch,
        "seconds": {name: vars(summarise(times)) for name, times in samples.items()},
        "samples": samples,
    }


def main() -> None:
    from rich.console import Console  # here, since `python -m fastloss info` does without
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="factored_step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--classes", type=int, default=793_471, help="of the comparison (default: %(default)s)")
    parser.add_argument(
        "--growth", type=int, nargs=2, default=(10_000, 1_000_000), help="sizes of FactoredOutput alone"
    )
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="steps of the dense layers (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="factored steps a round (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("reports/factored_step.json"))
    arguments = parser.parse_args()
    shape = (arguments.width, arguments.batch)
    results = [measure(classes, *shape, 0, arguments.steps) for classes in arguments.growth]
    results.append(measure(arguments.classes, *shape, arguments.rounds, arguments.steps))
    results.append(measure(arguments.growth[0], *shape, 0, arguments.steps))  # once more: the machine may have changed
    table = Table(title=f"one training step, width {arguments.width}, batch {arguments.batch}, float32")
    for column in ("classes", "layer", "median step", "over FactoredOutput"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for result in results:
        own = result["seconds"]["FactoredOutput"]["median"]
        for name, summary in result["seconds"].items():
            median = summary["median"]
            table.add_row(f"{result['classes']:,}", name, f"{median * 1e3:.2f} ms", f"{median / own:.1f}x")
    Console().print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": describe_machine(), "results": results}, indent=1) + "\n")
    Console().print(str(arguments.output))


if __name__ == "__main__":
    main()
