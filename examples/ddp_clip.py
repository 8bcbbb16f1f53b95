"""Train two towers on pairs of image halves, over any number of processes, with the curve of one process.

The pairs are the left and the right halves of scikit-learn's handwritten digits (1,797 of 8 x 8 pixels, part of that
package). Each process takes its part of every batch, the last one what is left over, DistributedDataParallel averages
the gradients, and the loss is over the pairs of all processes (`group=`). The first process trains the same model alone
as well; the example exits with 1 when the two curves part, or when a run of the default length has not learned which
halves belong together.

    torchrun --nproc-per-node 2 examples/ddp_clip.py
    python examples/ddp_clip.py
"""

from __future__ import annotations

import argparse
import math
import os
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fastloss

WIDTH, FEATURES = 128, 32
STEPS, BATCH_SIZE = 200, 250
CURVE_TOLERANCE = 1e-3  # float32: another order of summation is amplified by training
# Of 297 held-out right halves, the one that belongs to a left half is among the first ten; chance: 0.034. Asked of
# STEPS steps with BATCH_SIZE pairs.
RECALL = 0.2


class Towers(nn.Module):
    # Layer norm, not batch norm: an example's features must not depend on which process has the others.
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = self.tower(), self.tower()
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    @staticmethod
    def tower() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(32, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, FEATURES)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left, right = images.split(4, dim=-1)
        return F.normalize(self.left(left), dim=1), F.normalize(self.right(right), dim=1), self.log_scale.exp()


def train(images: Tensor, steps: int, batch_size: int, group: distributed.ProcessGroup | None) -> list[float]:
    """The loss of every step. All processes draw the same batches; each keeps its part."""
    torch.manual_seed(0)
    towers = Towers()
    rank, world = (0, 1) if group is None else (distributed.get_rank(group), distributed.get_world_size(group))
    model = towers if group is None else DistributedDataParallel(towers, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    share = -(-batch_size // world)
    losses = []
    for _ in range(steps):
        batch = torch.randperm(len(images), generator=generator)[:batch_size]
        mine = images[batch[rank * share : (rank + 1) * share]]
        loss = fastloss.clip_loss(*model(mine), group=group)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    recall = recall_at_10(towers, load()[1])
    if rank == 0:
        name = "1 process" if world == 1 else f"{world} processes"
        measured = f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last; recall at 10 {recall:.3f}"
        print(f"{name}, {steps} steps: {measured} (a run of {STEPS} steps of {BATCH_SIZE} pairs must reach {RECALL})")
    if (steps, batch_size) == (STEPS, BATCH_SIZE) and recall < RECALL:
        sys.exit(f"failed: recall at 10 {recall:.3f} is below {RECALL} after {steps} steps")
    return losses


@torch.no_grad()
def recall_at_10(towers: Towers, images: Tensor) -> float:
    left, right, _ = towers(images)
    best = (left @ right.T).topk(10).indices
    return float((best == torch.arange(len(images))[:, None]).any(1).float().mean())


def load() -> tuple[Tensor, Tensor]:
    """Images to train on and held-out ones."""
    images = torch.from_numpy(load_digits().images).float() / 16
    return images[:1500], images[1500:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    arguments = parser.parse_args()
    images, _ = load()
    if "RANK" not in os.environ:  # not started by torchrun
        train(images, arguments.steps, arguments.batch_size, None)
        return
    distributed.init_process_group("gloo")
    try:
        together = train(images, arguments.steps, arguments.batch_size, distributed.group.WORLD)
        if distributed.get_rank() == 0:
            alone = train(images, arguments.steps, arguments.batch_size, None)
            difference = max(abs(a - b) / b for a, b in zip(together, alone, strict=True))
            print(f"largest relative difference of the curves: {difference:.1e} (allowed {CURVE_TOLERANCE:.0e})")
            if not difference <= CURVE_TOLERANCE:
                sys.exit("failed: the curves part")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
