"""What the ops must compute and move on three cards, and the time that leaves: writes ``benchmarks/roofline.md``.

python -m fastloss.benchmarks.roofline
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastloss.gaunt.tables import parities

from .report import duration, size, write_atomically

SHEET = Path(__file__).parent / "roofline.md"
# What `fastloss.contrastive.triton` does; that they agree is tested.
IEEE = "IEEE float32"
PANEL_ROWS, PANEL_COLS, ACCUMULATOR_BYTES = 8192, 16384, 512 << 20
# Of `fastloss.sliced.triton`: instructions a thread, which sorts 8 of 8192 numbers, as `make kernels` counts for sm_90.
SORT_INSTRUCTIONS, PAIR_INSTRUCTIONS, NUMBERS_A_THREAD = 5928, 6352, 8
ISSUES = 128  # instructions of threads a clock and multiprocessor: four schedulers, a warp each
TILE = 16  # coefficients and points of `fastloss.gaunt.triton`
EXPONENTIALS = 16  # a clock and multiprocessor: the CUDA C++ programming guide, throughput of arithmetic instructions


@dataclass(frozen=True)
class Card:
    """Dense peaks as published: FLOP/s by dtype of the inputs (float32: in three tf32 products), bytes/s of memory."""

    name: str
    source: str
    bfloat16: float
    tf32: float
    float32: float
    memory: float
    multiprocessors: int
    clock: float  # boost

    def products(self, dtype: str) -> float:
        return {"bfloat16": self.bfloat16, "float32": self.tf32 / 3, IEEE: self.float32}[dtype]

    def issues(self) -> float:
        return ISSUES * self.multiprocessors * self.clock

    def exponentials(self) -> float:
        return EXPONENTIALS * self.multiprocessors * self.clock


CARDS = (
    Card("A100 80GB SXM", "NVIDIA A100 data sheet and architecture white paper",
         312e12, 156e12, 19.5e12, 2.039e12, 108, 1.41e9),
    Card("H100 SXM", "NVIDIA H100 data sheet and architecture white paper",
         989.4e12, 494.7e12, 66.9e12, 3.35e12, 132, 1.83e9),
    Card("H200 SXM", "NVIDIA H200 data sheet; multiprocessors and clock as the H100",
         989.4e12, 494.7e12, 66.9e12, 4.8e12, 132, 1.83e9),
)  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """A launch or several of a kind. Products, exponentials and bytes of one phase overlap at best, phases never do."""

    name: str
    flops: float = 0.0
    exponentials: float = 0.0
    bytes: float = 0.0
    instructions: float = 0.0  # of a sort, all of its threads'


@dataclass(frozen=True)
class Work:
    title: str
    dtype: str
    flops: float  # that any method without the matrix does
    bytes: float  # inputs and gradients, once
    phases: Sequence[Phase]

    def floor(self, card: Card) -> float:
        return max(self.flops / card.products(self.dtype), self.bytes / card.memory)

    def predicted(self, card: Card, overlap: bool) -> float:
        """Seconds: every phase at the published peaks, its exponentials beside its products or after them."""
        total = 0.0
        for phase in self.phases:
            products, exponentials = phase.flops / card.products(self.dtype), phase.exponentials / card.exponentials()
            arithmetic = max(products, exponentials) if overlap else products + exponentials
            total += max(arithmetic, phase.bytes / card.memory, phase.instructions / card.issues())
        return total


def _panels(n: int) -> int:
    return -(-n // PANEL_ROWS)


def contrastive(rows: int, width: int, dtype: str) -> Work:
    """Symmetric InfoNCE, rows = columns."""
    item, pairs = (2 if dtype == "bfloat16" else 4), float(rows) ** 2
    product = 2 * pairs * width
    features = rows * width * item
    fits = rows * width * 4 <= ACCUMULATOR_BYTES
    sweeps = 1 if fits else 2
    panel = pairs * item  # written once, read by each of the products
    # Sums of dK: written, and added to once a block of rows (read twice, written twice: the product, then the sum).
    sums = rows * width * 4 * (1 + 4 * (_panels(rows) - 1)) if fits else 0.0
    return Work(
        f"symmetric InfoNCE {rows} x {rows}, D = {width}", dtype, 4 * product, 4 * features,
        (
            Phase("statistics", product, 2 * pairs, 2 * features),
            Phase("G", sweeps * product, sweeps * 2 * pairs, sweeps * (2 * features + panel)),
            Phase("dQ and dK", 2 * product, 0.0, 2 * panel + 2 * features + sums),
            Phase("gradients of the rows", 0.0, 0.0, 2 * rows * width * 4 + 6 * features),
        ),
    )  # fmt: skip


def self_similarity(rows: int, width: int, dtype: str) -> Work:
    """NT-Xent: each pair once."""
    item, pairs = (2 if dtype == "bfloat16" else 4), float(rows) ** 2 / 2
    product = 2 * pairs * width
    features = rows * width * item
    panel = 2 * pairs * item
    sums = rows * width * 4 * (1 + 4 * (_panels(rows) - 1))
    return Work(
        f"NT-Xent of {rows} rows, D = {width}", dtype, 4 * product, 2 * features,
        (
            Phase("statistics", product, 2 * pairs, 2 * features),
            Phase("G", product, 2 * pairs, 2 * features + panel),
            Phase("dX", 2 * product, 0.0, 2 * panel + 2 * features + sums),
            Phase("gradients of the rows", 0.0, 0.0, rows * width * 4 + 3 * features),
        ),
    )  # fmt: skip


def moments(rows: int, classes: int, dtype: str) -> Work:
    """Losses of logits through their moments: read; read and written."""
    bytes_ = float(rows) * classes * (2 if dtype == "bfloat16" else 4)
    return Work(
        f"Z-loss of {rows} x {classes} logits", dtype, 0.0, 3 * bytes_,
        (Phase("moments", bytes=bytes_), Phase("gradient", bytes=2 * bytes_)),
    )  # fmt: skip


def sliced(batch: int, atoms: int, width: int, slices: int) -> Work:
    """Clouds of equal size, gradients in points and directions."""
    numbers = float(batch) * atoms * slices  # projections of one cloud
    product = 4 * numbers * width  # of both
    points = 2 * batch * atoms * width * 4
    threads = numbers / NUMBERS_A_THREAD
    return Work(
        f"sliced Wasserstein, {batch} pairs of {atoms} points, D = {width}, {slices} directions", IEEE,
        3 * product, 2 * points,
        (
            Phase("projections", product, bytes=points + 2 * numbers * 4),
            Phase("sort of one cloud", bytes=3 * numbers * 4, instructions=SORT_INSTRUCTIONS * threads),
            Phase("sort of the other, pairs", bytes=5 * numbers * 4, instructions=PAIR_INSTRUCTIONS * threads),
            Phase("gradients of points and directions", 2 * product, bytes=2 * points + 4 * numbers * 4),
        ),
    )  # fmt: skip


def gaunt(degree: int, lanes: int) -> Work:
    """Products of degrees L, L to 2 L, by dense transforms on half a grid."""
    columns = {n: sum(-(-len(places) // TILE) * TILE for places in parities(n)) for n in (degree, 2 * degree)}
    nodes, azimuths = 2 * degree + 1, 4 * degree + 1
    points = -(-((nodes + 1) // 2 * azimuths) // TILE) * TILE
    each, out = (degree + 1) ** 2, (2 * degree + 1) ** 2

    def flops(count: int) -> float:
        return 2.0 * lanes * points * (count * columns[degree] + columns[2 * degree])

    forward, backward = 4.0 * lanes * (2 * each + out), 4.0 * lanes * (4 * each + out)
    return Work(
        f"Gaunt product of {lanes} pairs, L = {degree}", "float32", 132.0 * degree**3 * lanes, forward + backward,
        (Phase("product", flops(2), bytes=forward), Phase("gradients", flops(4), bytes=backward)),
    )  # fmt: skip


WORKS = (
    contrastive(32_768, 1024, "bfloat16"),
    contrastive(8192, 512, "bfloat16"),
    contrastive(1_048_576, 512, "bfloat16"),
    contrastive(8192, 512, "float32"),
    self_similarity(8192, 512, "bfloat16"),
    self_similarity(32_768, 1024, "bfloat16"),
    moments(4096, 50_257, "bfloat16"),
    moments(4096, 50_257, "float32"),
    sliced(16, 8192, 64, 512),
    gaunt(2, 100_000),
    gaunt(4, 100_000),
)


@dataclass(frozen=True)
class Stage:
    """Of a training step with `FactoredOutput`. Calls: each starts a kernel or several; (portable, Triton), tested."""

    name: str
    flops: float
    bytes: float
    calls: tuple[int, int]
    reads: tuple[int, int]  # of the device by the host, which waits for it


def factored_step(rows: int, width: int) -> tuple[Stage, ...]:
    """Z-loss, one target, no bias, fewer rows than features: m d, d^2 and m^2 numbers in and out of the calls."""
    wide, square, small = float(rows) * width, float(width) ** 2, float(rows) ** 2
    by_rows = 2 * rows * square  # flops of a product with a matrix of d^2
    return (
        Stage("forward", 2 * by_rows, 4 * (11 * wide + 2 * square), (42, 10), (1, 1)),
        Stage("backward", 0.0, 4 * 4 * wide, (8, 5), (0, 0)),
        Stage(
            "step", 6 * by_rows + 4 * 2 * small * width + 2 * small * rows,
            4 * (31 * wide + 11 * square + 10 * small), (54, 28), (5, 1),
        ),
    )  # fmt: skip


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def sheet() -> str:
    lines = [
        "# Roofline of the Triton kernels",
        "",
        "Computed by `python -m fastloss.benchmarks.roofline` from published peaks; nothing here is measured.",
        "",
        _line(("card", "bfloat16", "float32 (tf32 / 3)", IEEE, "memory", "exponentials", "source")),
        "|---" * 7 + "|",
        *(
            _line((
                card.name, f"{card.bfloat16 / 1e12:.0f} TFLOP/s", f"{card.tf32 / 3e12:.0f} TFLOP/s",
                f"{card.float32 / 1e12:.1f} TFLOP/s", f"{card.memory / 1e12:.2f} TB/s",
                f"{card.exponentials() / 1e12:.2f} T/s", card.source,
            ))
            for card in CARDS
        ),
        "",
        "The floor is what remains if arithmetic and memory overlap wholly: the larger of the flops (8MND for InfoNCE,",
        "half of it for NT-Xent, 132 L^3 a Gaunt product) at the peak of the products, and of the inputs and gradients",
        "(of the Gaunt products, the products as well) at that of memory.",
        "Predicted is the time of the schedule: its phases one after the other, each at the larger of its arithmetic",
        "and bytes, with the exponentials of a tile beside the products of others (first share) or after its own",
        "(second). Both shares are of the floor. A product below the published peak, as every library's is, lowers the",
        "measured share of the published peak, but not that of the card's own `mm`.",
        "A sort is bound by its instructions, of which four warps' are issued a clock; no floor counts it.",
        "",
    ]  # fmt: skip
    for work in WORKS:
        lines += [
            f"## {work.title}, {work.dtype}",
            "",
            _line(("phase", "flops", "exponentials", "instructions", "bytes")),
            "|---" * 5 + "|",
            *(_line(_phase(p)) for p in work.phases),
            "",
            _line(("card", "floor", "predicted", "share of the floor")),
            "|---" * 4 + "|",
            *(_line(_prediction(work, card)) for card in CARDS),
            "",
        ]
    return "\n".join([*lines, *_step(256, 512)])


def _step(rows: int, width: int) -> list[str]:
    stages = factored_step(rows, width)
    return [
        f"## training step of `FactoredOutput`, {rows} rows, D = {width}, float32",
        "",
        "Its numbers stay in the second cache of these cards and its flops take microseconds: it waits for its",
        "launches, and for the host. Calls of PyTorch and of kernels are counted here; the inverse is one call and",
        "several launches. Of V only the rows of the targets are touched.",
        "",
        _line(("stage", "flops", "bytes", "calls, portable", "calls, Triton", "reads, portable", "reads, Triton")),
        "|---" * 7 + "|",
        *(_line((s.name, f"{s.flops:.3g}", size(s.bytes), *(str(n) for n in (*s.calls, *s.reads)))) for s in stages),
        "",
    ]


def _phase(phase: Phase) -> tuple[str, ...]:
    numbers = (phase.flops, phase.exponentials, phase.instructions)
    return (phase.name, *(f"{number:.3g}" for number in numbers), size(phase.bytes))


def _prediction(work: Work, card: Card) -> tuple[str, ...]:
    floor, beside, after = work.floor(card), work.predicted(card, True), work.predicted(card, False)
    return (
        card.name, duration(floor), f"{duration(beside)} to {duration(after)}",
        f"{100 * floor / beside:.0f}% to {100 * floor / after:.0f}%",
    )  # fmt: skip


if __name__ == "__main__":
    write_atomically(SHEET, sheet().encode())
