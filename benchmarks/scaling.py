"""How the losses over a process group scale: bytes sent, flops and memory of a rank, from a model that the tests check.

``python -m fastloss.benchmarks.scaling`` writes ``benchmarks/scaling.md``. The counts of `sent_bytes` and `flops` are
compared with counters of the implementation on 2 to 4 ranks (tests/test_distributed.py). Times are counts over the
rates named in `LINKS` and `PROCESSORS`: assumptions, not measurements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastloss._distributed import GATHER_BYTES, HEADER
from fastloss.contrastive.tiles import KEEP_BYTES, SELF_TILE

LOSSES = ("info_nce", "clip_loss", "nt_xent")
# Bytes a second that a rank sends, one way, with all ranks sending at once.
LINKS = {
    "NVLink": 450e9,  # 900 GB/s both ways, of an H100 in one machine
    "InfiniBand": 50e9,  # one port of 400 Gbit/s a rank
    "Ethernet": 3.125e9,  # 25 Gbit/s a rank
}
# Flops a second of the products of one rank.
PROCESSORS = {
    "bfloat16": 400e12,  # two fifths of an H100's peak of 989e12
    "float32": 30e12,  # not quite half of an H100's peak of 67e12 without tensor cores
}
WIDTH = 512
WORLDS = (8, 64, 512, 4096)
BATCHES = (1 << 16, 1 << 20, 1 << 24)


@dataclass(frozen=True)
class Problem:
    """A loss with the same number of rows on every rank; its gradients are needed in the rows and in the scale."""

    loss: str
    world: int
    rows: int  # of a rank: pairs, in nt_xent of two rows each
    width: int
    itemsize: int = 4
    accumulation: int = 4  # bytes of a statistic, or of a number of a gradient on its way

    @property
    def block(self) -> int:
        return 2 * self.rows if self.loss == "nt_xent" else self.rows

    @property
    def hops(self) -> int:
        """Blocks of others that a rank visits."""
        return self.world // 2 if self.loss == "nt_xent" else self.world - 1

    @property
    def remote_pairs(self) -> int:
        pairs = self.hops * self.block**2
        return pairs - self.block**2 // 2 if self.loss == "nt_xent" and self.world % 2 == 0 else pairs

    @property
    def schedule(self) -> str:
        """What "auto" chooses."""
        gathered = self.world * self.block * self.width * self.itemsize
        return "all-gather" if self.hops > 1 and gathered <= GATHER_BYTES else "ring"


def sent_bytes(problem: Problem, schedule: str) -> float:
    """Bytes that a rank sends in a forward and a backward pass.

    Collectives of scalars count as the ring algorithm sends them; they do not grow with the batch.
    """
    world, block = problem.world, problem.block
    rows = block * problem.width * problem.itemsize
    gradients = block * problem.width * problem.accumulation
    statistics = 2 * block * problem.accumulation  # maximum and sum
    upstream = 0 if problem.loss == "info_nce" else 3 * block * problem.accumulation  # statistics and their gradient
    back = problem.hops * (gradients + (0 if problem.loss == "info_nce" else statistics))
    everyone = world - 1 if schedule == "all-gather" else problem.hops
    once = schedule == "all-gather" or problem.hops == 1
    header = (world - 1) * HEADER * 8
    scalars = 3 * 2 * (world - 1) / world * problem.accumulation  # loss, its gradient, the gradient of the scale
    return everyone * (rows * (1 if once else 2) + upstream) + back + header + scalars


def flops(problem: Problem) -> float:
    """Of the matrix products of a rank in a forward and a backward pass."""
    block, width = problem.block, problem.width
    own = 0.0
    pairs = problem.remote_pairs
    if problem.loss == "nt_xent":
        tile = min(block, SELF_TILE)
        covered = (block**2 + block * tile) / 2
        own = width * (6 * covered + 2 * (covered - block * tile))
    else:
        pairs += block**2
    most = KEEP_BYTES // problem.accumulation
    kept = min(pairs, most) if pairs <= 2 * most else 0
    return own + width * (8 * pairs - 2 * kept)


def memory(problem: Problem, schedule: str) -> float:
    """Bytes of rows and gradients that a rank holds at once beside its own, in the backward pass."""
    rows = problem.block * problem.width * problem.itemsize
    gradients = problem.block * problem.width * problem.accumulation
    if schedule == "ring":
        return 2 * rows + 2 * gradients
    return problem.world * rows + 2 * problem.hops * gradients


def hidden_from(link: float, processor: float, itemsize: int) -> tuple[float, float]:
    """Rows a rank from which a hop of the ring takes no longer than the products of its block: forward, backward.

    Forward 2 n^2 D flops and n D numbers of rows, backward 6 n^2 D flops and n D numbers of rows and of gradients
    (float32): neither depends on the width or the number of ranks.
    """
    return itemsize * processor / (2 * link), (itemsize + 4) * processor / (6 * link)


def sheet() -> Iterator[str]:
    yield "# Scaling of the losses over a process group"
    yield ""
    yield "Written by `python -m fastloss.benchmarks.scaling`: a model, not a measurement. Its bytes and flops are"
    yield "compared with counters of the implementation on 2 to 4 ranks in `tests/test_distributed.py`; times divide"
    yield "them by rates that are assumed:"
    yield ""
    yield "| assumed | a second |"
    yield "|---|---|"
    for name, rate in LINKS.items():
        yield f"| {name}, bytes a rank sends | {rate / 1e9:g} GB |"
    for name, rate in PROCESSORS.items():
        yield f"| products of a rank, {name} | {rate / 1e12:g} TFLOP |"
    yield ""
    yield "## Where the ring is hidden"
    yield ""
    yield "Rows a rank from which the transfer of a block takes no longer than the products of one block, forward and"
    yield "backward. It depends neither on the width nor on the number of ranks."
    yield ""
    yield "| link | rows in | forward | backward |"
    yield "|---|---|---|---|"
    for link, rate in LINKS.items():
        for name, processor in PROCESSORS.items():
            forward, backward = hidden_from(rate, processor, 2 if name == "bfloat16" else 4)
            yield f"| {link} | {name} | {forward:,.0f} | {backward:,.0f} |"
    for loss in ("clip_loss", "nt_xent"):
        yield ""
        yield f"## `{loss}`, width {WIDTH}, rows in bfloat16, forward and backward, a rank"
        yield ""
        yield "The last columns: time of the transfers over time of the products. Below 1, the ring can hide them."
        yield ""
        yield "| ranks | batch | rows a rank | auto | TFLOP | sent | held beside own rows | " + " | ".join(LINKS) + " |"
        yield "|---|---|---|---|---|---|---|" + "---|" * len(LINKS)
        for world in WORLDS:
            for batch in BATCHES:
                problem = Problem(loss, world, batch // world, WIDTH, itemsize=2)
                schedule = problem.schedule
                sent, work = sent_bytes(problem, schedule), flops(problem)
                shares = [sent / rate / (work / PROCESSORS["bfloat16"]) for rate in LINKS.values()]
                held = memory(problem, schedule) / 2**20
                yield (
                    f"| {world:,} | {batch:,} | {problem.rows:,} | {schedule} | {work / 1e12:,.2f} | "
                    f"{sent / 2**20:,.0f} MiB | {held:,.1f} MiB | " + " | ".join(f"{s:.3g}" for s in shares) + " |"
                )


def main() -> None:
    path = Path(__file__).parent / "scaling.md"
    path.write_text("\n".join(sheet()) + "\n")
    print(path)


if __name__ == "__main__":
    main()
