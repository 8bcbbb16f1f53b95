"""What a benchmark is made of (cases, providers, results) and how it is measured. Knows no loss family.

One measurement is one forward and one backward pass, or the forward pass alone where no input requires a gradient. What
makes the numbers comparable:

- the providers of a case take turns (A B C, A B C, ...), so that a machine that slows down slows all of them, and a
  provider's speed-up is the median of the ratios within rounds, not the ratio of two medians;
- before anything is timed, every provider's loss and gradients are compared with a dense float64 computation;
- the machine's own ``torch.mm`` peak is measured before and after the cases, and every time is also given as a share of
  it;
- memory is measured in a process of its own, as the growth of the resident set's high-water mark over one pass.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCHEMA = 1
GIB = 1 << 30
MEMORY_LIMIT = 10 * GIB
LEFT_TO_FULL = "left to --full"
# Several tiles of every blocked implementation, and a multiple of none.
CHECK_ROWS = 1250
CHECK_LOGITS = 1 << 23  # rows times classes: float64 truths of more would take longer than the timings
# Largest error of the loss (relative) and of a gradient (relative to its largest entry) that still counts as correct.
# float32: sums of ~1000 terms of size <= 1; bfloat16: 8 bits of result, and logits of size ~10 rounded to them.
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (3e-2, 6e-2)}

Sizes = Mapping[str, int]
Inputs = tuple[Tensor, ...]


class Weighted(NamedTuple):
    """The loss sum(output * weights), for ops that are no losses: the gradient of the output is given, not computed."""

    output: Tensor
    weights: Tensor


Loss = Callable[..., Tensor | Weighted]


def value_of(loss: Tensor | Weighted) -> Tensor:
    return loss if isinstance(loss, Tensor) else (loss.output.double() * loss.weights).sum()


class Unavailable(Exception):
    """Raised when a provider's loss is built; the message is the reason shown in the results."""


@dataclass(frozen=True)
class Formula:
    """A model of cost: the text is what the report prints, `of` what it computes."""

    text: str
    of: Callable[[Sizes], float]


@dataclass(frozen=True)
class Schedule:
    """How much of a case is measured. Sets of provider names; None stands for all of them."""

    rounds: int  # 0: timed once, in the memory probe (for cases whose single pass takes long)
    warmup: int = 1
    slow_rounds: int = 1  # for providers marked slow
    # In a row, timed as one, after one that is not timed: for what takes less than a millisecond. Slow providers: one.
    passes: int = 1
    budget: float = 60.0  # seconds; no further round starts after it, but the first two always run
    timed: frozenset[str] | None = None
    memory: frozenset[str] | None = None

    def rounds_of(self, provider: Provider) -> int:
        return min(self.rounds, self.slow_rounds) if provider.slow else self.rounds

    def passes_of(self, provider: Provider) -> int:
        return 1 if provider.slow else self.passes

    def warmup_of(self, provider: Provider) -> int:
        """Passes at full size before the clock counts; the check has already run everybody at a reduced size."""
        return 0 if provider.slow else max(self.warmup, int(provider.compiles))


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    op: str
    reason: str
    sizes: Sizes  # "rows": the batch, along which cases are shrunk and plotted
    setup: Callable[[Sizes, torch.dtype, int], Inputs]  # (sizes, dtype, seed) -> leaves; all or none require grad
    flops: Formula
    full: Schedule
    traffic: Formula | None = None  # bytes that any implementation must move, where they are the floor
    quick: Schedule | None = None
    dtype: torch.dtype = torch.float32
    sweep: str | None = None  # cases of the same sweep are plotted as one curve against "rows"

    @property
    def tags(self) -> tuple[str, ...]:
        return ("full",) if self.quick is None else ("quick", "full")

    def inputs(self, seed: int) -> Inputs:
        return self.setup(self.sizes, self.dtype, seed)

    def at(self, **sizes: int) -> Case:
        return replace(self, sizes={**self.sizes, **sizes})

    def smoke(self) -> Case:
        tiny = {k: max(8, v // 64) if k == "rows" else max(8, v // 8) for k, v in self.sizes.items()}
        return self.at(**tiny)


@dataclass(frozen=True, eq=False)
class Provider:
    """An implementation of some of a family's ops."""

    name: str
    description: str
    losses: Mapping[str, Callable[[], Loss]]  # op -> builder, which raises Unavailable or ImportError
    peak_bytes: Mapping[str, Formula] = field(default_factory=dict)  # op -> model; nothing for memory-flat ops
    compiles: bool = False  # the first call at a size may take seconds
    slow: bool = False
    full_only: bool = False
    context: Callable[[], AbstractContextManager[object]] = nullcontext

    @cache  # noqa: B019 - providers live as long as the process, and a rebuilt torch.compile would compile again
    def build(self, op: str) -> Loss:
        if op not in self.losses:
            raise Unavailable(f"has no {op}")
        try:
            return self.losses[op]()
        except ImportError as error:
            raise Unavailable(str(error)) from error

    def step(self, op: str, inputs: Inputs) -> tuple[Tensor | Weighted, Inputs]:
        """The loss and its gradients, if the inputs have any."""
        run = self.build(op)
        with self.context():
            loss = run(*inputs)
            output, weights = loss if isinstance(loss, Weighted) else (loss, None)
            return loss, torch.autograd.grad(output, inputs, weights) if output.requires_grad else ()

    def needs(self, case: Case) -> float:
        model = self.peak_bytes.get(case.op)
        return model.of({**case.sizes, "itemsize": case.dtype.itemsize}) if model else 0.0


def relative_error(value: Tensor, truth: Tensor) -> float:
    """max |value - truth| / max |truth|; NaN and infinity in `value` stay visible."""
    scale = truth.abs().max().item()
    return (value.double() - truth).abs().max().item() / (scale or 1.0)


def relative_norm_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| of the whole tensors, for gradients that jump.

    Where two values tie within rounding their order, and with it a few entries of the gradient, is up to the dtype.
    """
    return float((value.double() - truth).norm() / (truth.norm().item() or 1.0))


@dataclass(frozen=True)
class Suite:
    family: str
    cases: Sequence[Case]
    providers: Sequence[Provider]
    truth: Mapping[str, Loss]  # op -> dense computation that follows the dtype of its inputs
    baseline: str
    gradient_error: Callable[[Tensor, Tensor], float] = relative_error


@dataclass(frozen=True)
class Summary:
    median: float
    q20: float
    q80: float
    count: int


@dataclass(frozen=True)
class Check:
    """Errors against dense float64, at the sizes given."""

    sizes: Sizes
    loss_error: float
    gradient_error: float
    gradient_error_over_baseline: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of one pass in a process of its own; extra = growth - gradients."""

    growth: int
    gradients: int
    extra: int


@dataclass
class Result:
    case: str
    provider: str
    status: str = "ok"  # "ok", "not available", "refused", "left to --full" or "failed"; detail says why
    detail: str = ""
    seconds: list[float] = field(default_factory=list)
    timed_in: str = "rounds"
    time: Summary | None = None
    speedup: Summary | None = None
    gflops: float | None = None
    peak_share: float | None = None
    traffic_share: float | None = None  # of the copy bandwidth, where the case has a traffic model
    memory: Memory | None = None
    memory_detail: str = ""
    computed_bytes: float | None = None
    check: Check | None = None

    def set(self, status: str, detail: str = "") -> None:
        self.status, self.detail = status, detail


@dataclass(frozen=True)
class Settings:
    mode: str  # "quick", "full" or "smoke"
    seed: int
    threads: int
    cases: frozenset[str] | None = None  # None: those of the mode
    providers: frozenset[str] | None = None


# ---------------------------------------------------------------- statistics


def quantile(samples: Sequence[float], q: float) -> float:
    """Quantile with linear interpolation between order statistics."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def summarise(samples: Sequence[float]) -> Summary:
    return Summary(quantile(samples, 0.5), quantile(samples, 0.2), quantile(samples, 0.8), len(samples))


def paired_speedup(baseline: Sequence[float], samples: Sequence[float]) -> Summary:
    """Baseline / sample, round by round; a provider that ran fewer rounds is paired with the first ones."""
    return summarise([b / s for b, s in zip(baseline, samples, strict=False)])


# ---------------------------------------------------------------- machine


def _read(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def _status_bytes(key: str) -> int:
    value = _read("/proc/self/status", key)
    if value is None:
        raise Unavailable(f"{key} needs Linux's /proc")
    return int(value.split()[0]) * 1024


def memory_limit() -> float:
    available = _read("/proc/meminfo", "MemAvailable")
    return MEMORY_LIMIT if available is None else min(MEMORY_LIMIT, 0.8 * int(available.split()[0]) * 1024)


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout this file is tracked in, None for an installed copy."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine() -> dict[str, Any]:
    import fastloss

    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _read("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": affinity,
        "threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "backends": fastloss.backends(),
        "fastloss": fastloss.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "git": git_state(),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def measure_peak(smoke: bool) -> dict[str, float]:
    """Best float32 GFLOP/s of `torch.mm` on a large square and on a similarity tile (1024 x 1024, depth 512).

    "copy": best GB/s, read and written, of a copy that no cache holds.
    """

    def best(m: int, k: int, repeats: int) -> float:
        a, b, out = torch.randn(m, k), torch.randn(k, m), torch.empty(m, m)
        seconds = math.inf
        for _ in range(repeats + 1):  # the first one touches the pages
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            seconds = min(seconds, time.perf_counter() - start)
        return 2 * m * m * k / seconds / 1e9

    def copy(count: int) -> float:
        a, b = torch.zeros(count), torch.empty(count)
        seconds = math.inf
        for _ in range(4):
            start = time.perf_counter()
            b.copy_(a)
            seconds = min(seconds, time.perf_counter() - start)
        return 2 * a.nbytes / seconds / 1e9

    if smoke:
        return {"square": best(256, 256, 3), "tile": best(128, 64, 3), "copy": copy(1 << 20)}
    return {"square": best(4096, 4096, 3), "tile": best(1024, 512, 30), "copy": copy(1 << 27)}


# ---------------------------------------------------------------- correctness


def check_rows(case: Case) -> int:
    return min(case.sizes["rows"], CHECK_ROWS, CHECK_LOGITS // case.sizes.get("classes", 1))


def check(
    suite: Suite, provider: Provider, case: Case, seed: int, tolerance: tuple[float, float] | None = None
) -> Check:
    """Compare loss and gradients with dense float64 on a reduced copy of the case; ArithmeticError when wrong."""
    small = case.at(rows=check_rows(case))
    inputs = small.inputs(seed)
    exact = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
    expected = value_of(suite.truth[case.op](*exact))
    gradients = torch.autograd.grad(expected, exact) if expected.requires_grad else ()
    loss, actual = provider.step(case.op, inputs)
    result = Check(
        small.sizes,
        relative_error(value_of(loss).detach(), expected.detach()),
        max((suite.gradient_error(a, g) for a, g in zip(actual, gradients, strict=True)), default=0.0),
    )
    loss_tolerance, gradient_tolerance = tolerance or TOLERANCE[case.dtype]
    # Written so that NaN fails.
    if not (result.loss_error <= loss_tolerance and result.gradient_error <= gradient_tolerance):
        raise ArithmeticError(
            f"differs from dense float64: loss {result.loss_error:.1e} (allowed {loss_tolerance:.0e}), "
            f"gradient {result.gradient_error:.1e} (allowed {gradient_tolerance:.0e})"
        )
    return result


# ---------------------------------------------------------------- memory


def _probe(
    sender: Connection, family: str, case_name: str, provider_name: str, sizes: Sizes, seed: int, threads: int
) -> None:
    """Body of the probe process: sends (growth, gradient bytes, seconds) or an error text."""
    try:
        from . import SUITES

        torch.set_num_threads(threads)
        suite = SUITES[family]
        case = next(c for c in suite.cases if c.name == case_name).at(**sizes)
        provider = next(p for p in suite.providers if p.name == provider_name)
        inputs = case.inputs(seed)
        # Code pages, thread stacks and library buffers belong to the process, not to the loss.
        provider.step(case.op, case.at(rows=check_rows(case)).inputs(seed))
        if provider.compiles:
            provider.step(case.op, inputs)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to the present VmRSS
        before = _status_bytes("VmRSS")
        start = time.perf_counter()
        _, gradients = provider.step(case.op, inputs)
        seconds = time.perf_counter() - start
        growth = max(0, _status_bytes("VmHWM") - before)
        sender.send((growth, sum(g.numel() * g.element_size() for g in gradients), seconds))
    except Exception as error:  # reported by the parent
        sender.send(f"{type(error).__name__}: {error}")


def probe_memory(case: Case, provider: Provider, seed: int, threads: int) -> tuple[Memory, float]:
    """Measure one pass in a process that holds nothing but the inputs; also returns its seconds.

    The processes are forked from a server that has imported torch and run nothing.
    """
    if platform.system() != "Linux":
        raise Unavailable("peak memory needs Linux's /proc")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, case.family, case.name, provider.name, dict(case.sizes), seed, threads)
    process = context.Process(target=_probe, args=arguments, daemon=True)
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = None
    process.join()
    if answer is None:
        raise RuntimeError(f"memory probe ended with exit code {process.exitcode}")
    if isinstance(answer, str):
        raise RuntimeError(f"memory probe: {answer}")
    growth, gradients, seconds = answer
    return Memory(growth, gradients, growth - gradients), seconds


# ---------------------------------------------------------------- running


class Runner:
    """Runs the chosen cases of one suite. `tick(text)` is called before every unit of work."""

    def __init__(self, suite: Suite, settings: Settings, tick: Callable[[str], None]) -> None:
        self.suite, self.settings, self.tick = suite, settings, tick
        self._checks: dict[tuple[object, ...], Check | ArithmeticError] = {}

    def cases(self) -> list[Case]:
        """The cases to run; one named explicitly runs in quick mode too."""
        chosen, mode = self.settings.cases, self.settings.mode
        if chosen is not None:
            cases = [c for c in self.suite.cases if c.name in chosen]
        else:
            cases = [c for c in self.suite.cases if mode != "quick" or c.quick is not None]
        return [c.smoke() for c in cases] if mode == "smoke" else cases

    def providers(self) -> list[Provider]:
        chosen = self.settings.providers
        # The baseline always runs: every ratio is to it.
        return [p for p in self.suite.providers if chosen is None or p.name in chosen or p.name == self.suite.baseline]

    def schedule(self, case: Case) -> Schedule:
        if self.settings.mode == "smoke":
            return Schedule(rounds=2, budget=5.0, memory=frozenset({"fastloss", self.suite.baseline}))
        return case.quick if self.settings.mode == "quick" and case.quick is not None else case.full

    def run_case(self, case: Case) -> list[Result]:
        schedule = self.schedule(case)
        results = {p.name: Result(case.name, p.name) for p in self.providers()}
        running = [p for p in self.providers() if self._admit(case, schedule, p, results[p.name])]
        if schedule.rounds:
            running = self._time(case, schedule, running, results)
        for provider in running:
            self._memory(case, schedule, provider, results[provider.name])
        baseline = results[self.suite.baseline]
        for result in results.values():
            self._conclude(case, result, baseline)
        return list(results.values())

    def _admit(self, case: Case, schedule: Schedule, provider: Provider, result: Result) -> bool:
        """Whether the provider runs in this case: it exists, is scheduled, fits in memory and is correct."""
        try:
            provider.build(case.op)
        except Unavailable as reason:
            result.set("not available", str(reason))
            return False
        needs, limit = provider.needs(case), memory_limit()
        if needs:
            result.computed_bytes = needs
        if needs > limit:
            text = provider.peak_bytes[case.op].text
            result.set(
                "refused", f"needs {needs / GIB:.1f} GiB by the model {text}; the limit is {limit / GIB:.1f} GiB"
            )
            return False
        if self.leaves_to_full(schedule, provider):
            result.set(LEFT_TO_FULL)
            return False
        return self._check(case, provider, result)

    def leaves_to_full(self, schedule: Schedule, provider: Provider) -> bool:
        """Whether a quick run skips this provider; one named explicitly runs."""
        if self.settings.mode != "quick" or provider.name in (self.settings.providers or ()):
            return False
        return provider.full_only or (schedule.timed is not None and provider.name not in schedule.timed)

    def _check(self, case: Case, provider: Provider, result: Result) -> bool:
        key = (case.op, case.dtype, check_rows(case), case.sizes["dim"], provider.name)
        if key not in self._checks:
            self.tick(f"{case.name}: checking {provider.name}")
            try:
                self._checks[key] = check(self.suite, provider, case, self.settings.seed)
            except ArithmeticError as error:
                self._checks[key] = error
            except Exception as error:
                result.set("failed", f"{type(error).__name__}: {error}")
                return False
        outcome = self._checks[key]
        if isinstance(outcome, ArithmeticError):
            result.set("failed", str(outcome))
            return False
        result.check = outcome
        return True

    def _time(
        self, case: Case, schedule: Schedule, running: Sequence[Provider], results: Mapping[str, Result]
    ) -> list[Provider]:
        inputs = case.inputs(self.settings.seed)
        alive = list(running)

        def timed(provider: Provider, text: str) -> float | None:
            self.tick(f"{case.name}: {text} {provider.name}")
            passes = schedule.passes_of(provider)
            try:
                if passes > 1:  # a row of passes is timed as in a loop, whose first one finds caches and heap like new
                    provider.step(case.op, inputs)
                start = time.perf_counter()
                for _ in range(passes):
                    provider.step(case.op, inputs)
                return (time.perf_counter() - start) / passes
            except Exception as error:
                results[provider.name].set("failed", f"{type(error).__name__}: {error}")
                alive.remove(provider)
                return None

        for provider in running:
            for _ in range(schedule.warmup_of(provider)):
                if provider in alive:
                    timed(provider, "warming up")
        gc.collect()
        start = time.perf_counter()
        for turn in range(schedule.rounds):
            if turn >= 2 and time.perf_counter() - start > schedule.budget:
                break
            for provider in list(alive):
                if turn >= schedule.rounds_of(provider):
                    continue
                seconds = timed(provider, f"round {turn + 1} of {schedule.rounds},")
                if seconds is not None:
                    results[provider.name].seconds.append(seconds)
        return alive

    def _memory(self, case: Case, schedule: Schedule, provider: Provider, result: Result) -> None:
        if schedule.memory is not None and provider.name not in schedule.memory:
            result.memory_detail = LEFT_TO_FULL
            return
        self.tick(f"{case.name}: memory of {provider.name}")
        try:
            result.memory, seconds = probe_memory(case, provider, self.settings.seed, self.settings.threads)
        except Unavailable as reason:
            result.memory_detail = f"not available: {reason}"
        except Exception as error:
            result.set("failed", str(error))
        else:
            if not schedule.rounds:
                result.seconds, result.timed_in = [seconds], "memory probe"

    def _conclude(self, case: Case, result: Result, baseline: Result) -> None:
        if result.seconds:
            result.time = summarise(result.seconds)
            result.gflops = case.flops.of(case.sizes) / result.time.median / 1e9
            if baseline.seconds:
                result.speedup = paired_speedup(baseline.seconds, result.seconds)
        if result.check and baseline.check and baseline.check.gradient_error:
            ratio = result.check.gradient_error / baseline.check.gradient_error
            result.check = replace(result.check, gradient_error_over_baseline=ratio)


def run(suites: Sequence[Suite], settings: Settings, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Run everything and return the JSON-ready report. `progress(text, cases done, cases in all)`."""
    torch.set_num_threads(settings.threads)
    smoke = settings.mode == "smoke"
    results: list[Result] = []
    done = 0

    def tick(text: str) -> None:
        progress(text, done, total)

    runners = [Runner(suite, settings, tick) for suite in suites]
    total = sum(len(runner.cases()) for runner in runners)
    tick("measuring the mm peak")
    before = measure_peak(smoke)
    for runner in runners:
        for case in runner.cases():
            results += runner.run_case(case)
            done += 1
    tick("measuring the mm peak")
    after = measure_peak(smoke)
    peak, copy = (max(before[kind], after[kind]) for kind in ("square", "copy"))
    cases = {case.name: case for runner in runners for case in runner.cases()}
    for result in results:
        if result.gflops is not None:
            result.peak_share = result.gflops / peak
        traffic = cases[result.case].traffic
        if result.time is not None and traffic is not None:
            result.traffic_share = traffic.of(cases[result.case].sizes) / result.time.median / 1e9 / copy
    return {
        "schema": SCHEMA,
        "machine": describe_machine(),
        "settings": {"mode": settings.mode, "seed": settings.seed},
        "peak_gflops": {"before": before, "after": after, "used": peak, "copy_gb": copy},
        "cases": [describe_case(case) for case in cases.values()],
        "providers": {p.name: p.description for runner in runners for p in runner.providers()},
        "rows": [asdict(result) for result in results],
    }


def describe_case(case: Case) -> dict[str, Any]:
    return {
        "name": case.name,
        "family": case.family,
        "op": case.op,
        "reason": case.reason,
        "sizes": dict(case.sizes),
        "dtype": str(case.dtype).removeprefix("torch."),
        "flops": case.flops.of(case.sizes),
        "flops_formula": case.flops.text,
        "traffic_formula": case.traffic.text if case.traffic else None,
        "sweep": case.sweep,
        "tags": list(case.tags),
    }
