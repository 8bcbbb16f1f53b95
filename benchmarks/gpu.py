"""The benchmark on a GPU: ``python -m fastloss bench --device cuda``; on the CPU with ``--smoke`` only, to see it run.

Every time is also given as a share of what this card's own products (`torch.mm` in the case's dtype) and copies reach
in the same run. Kernels are tuned first. Providers take turns; the checks are those of `harness`.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastloss

from . import contrastive, factored_step, gaunt, sliced, spherical
from .harness import (
    GIB,
    Case,
    Inputs,
    Provider,
    Schedule,
    Sizes,
    Suite,
    Unavailable,
    check,
    describe_machine,
    summarise,
    synchronize,
)
from .report import duration, size, write_atomically

BUDGET = 270.0  # seconds; what would begin later is named as not measured. Of the ten minutes of `make gpu`
SUITES: dict[str, Suite] = {
    "contrastive": contrastive.SUITE,
    "spherical": spherical.SUITE,
    "sliced": sliced.SUITE,
    "gaunt": gaunt.SUITE,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RIVALS = frozenset({"eager", "torch.compile"})
# A rival that rounds its logits to 16 bits may miss a small loss by a third. Its error stands beside its time.
RIVAL_TOLERANCE = {torch.bfloat16: (1.0, 1.0)}
ALL = None


@dataclass(frozen=True)
class GpuCase:
    """A case of a suite at the sizes of a card. `bytes`: what any method must move, for those that memory bounds."""

    case: Case
    rivals: frozenset[str] | None = RIVALS  # None: every provider of the suite
    rounds: int = 20
    bytes: Callable[[Sizes], float] | None = None


def _contrastive(
    op: str, rows: int, dim: int, dtype: torch.dtype, rivals: frozenset[str] | None = RIVALS, rounds: int = 20
) -> GpuCase:
    pattern = next(c for c in contrastive.CASES if c.op == op)
    name = f"{op.replace('_', '-')}-{rows}x{dim}-{str(dtype).removeprefix('torch.')}"
    return GpuCase(
        replace(pattern, name=name, sizes={"rows": rows, "dim": dim}, dtype=dtype, full=Schedule(rounds)),
        rivals,
        rounds,
    )


def _z_loss(rows: int, classes: int, dtype: torch.dtype) -> GpuCase:
    pattern = next(c for c in spherical.CASES if c.op == "z_loss")
    name = f"z-logits-{rows}x{classes}-{str(dtype).removeprefix('torch.')}"
    case = replace(pattern, name=name, sizes={"rows": rows, "classes": classes, "dim": 1}, dtype=dtype)
    return GpuCase(case, rounds=20, bytes=lambda s: 3.0 * s["rows"] * s["classes"] * dtype.itemsize)


def _linear(rows: int, classes: int, dim: int) -> GpuCase:
    pattern = next(c for c in spherical.CASES if c.op == "linear_z_loss")
    sizes = {"rows": rows, "classes": classes, "dim": dim}
    return GpuCase(replace(pattern, name=f"z-linear-{rows}x{classes}x{dim}", sizes=sizes), rounds=10)


def _sliced(batch: int, rows: int, dim: int, slices: int) -> GpuCase:
    pattern = next(c for c in sliced.CASES if c.op == sliced.EQUAL_OP)
    sizes = {"batch": batch, "rows": rows, "dim": dim, "slices": slices}
    return GpuCase(replace(pattern, name=f"sliced-{batch}x{rows}x{dim}-{slices}", sizes=sizes))


def _gaunt(degree: int, rows: int) -> GpuCase:
    pattern = next(c for c in gaunt.CASES if c.name == f"gaunt-l{degree}")
    case = replace(pattern, name=f"gaunt-l{degree}-{rows}", sizes={"rows": rows, "dim": 1})
    inputs, output = 2 * (degree + 1) ** 2, (2 * degree + 1) ** 2
    # Read and written forward; read and written backward.
    return GpuCase(
        case,
        frozenset({"eager", "e3nn", "fastloss[portable]"}),
        bytes=lambda s: 4.0 * s["rows"] * (3 * inputs + 2 * output),
    )


CASES: tuple[GpuCase, ...] = (
    _contrastive("clip_loss", 32_768, 1024, torch.bfloat16, rounds=10),
    _contrastive("clip_loss", 8192, 512, torch.bfloat16, ALL),
    _contrastive("clip_loss", 1024, 512, torch.bfloat16, rounds=50),
    _contrastive("clip_loss", 8192, 512, torch.float32),
    _contrastive("info_nce", 8192, 512, torch.bfloat16, ALL),
    _contrastive("nt_xent", 8192, 512, torch.bfloat16, ALL),
    _contrastive("nt_xent", 32_768, 1024, torch.bfloat16, rounds=5),
    _z_loss(4096, 50_257, torch.bfloat16),
    _z_loss(4096, 50_257, torch.float32),
    _linear(2048, 50_257, 512),
    _sliced(16, 8192, 64, 512),
    _sliced(1, 50_000, 3, 256),
    _gaunt(2, 100_000),
    _gaunt(4, 100_000),
    _contrastive("clip_loss", 1_048_576, 512, torch.bfloat16, frozenset(), rounds=1),
)

STEP = (793_471, 512, 256)  # classes, width, batch of a training step


# ---------------------------------------------------------------- the device


def moved(case: Case, device: torch.device) -> Case:
    """The case with its inputs on the device."""

    def setup(sizes: Sizes, dtype: torch.dtype, seed: int) -> Inputs:
        inputs = case.setup(sizes, dtype, seed)
        return tuple(x.detach().to(device).requires_grad_(x.requires_grad) for x in inputs)

    return replace(case, setup=setup)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds by the device's own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def peaks(device: torch.device, smoke: bool) -> dict[str, float]:
    """TFLOP/s of `torch.mm` by dtype, and GB/s of a copy, bytes read and written."""

    def best(run: Callable[[], object]) -> float:
        return min(timed(run, device) for _ in range(3 if smoke else 20))

    n = 64 if smoke else 8192
    found = {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        found[name] = 2 * n**3 / best(partial(torch.mm, a, b)) / 1e12
    source = torch.empty(1 << (16 if smoke else 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * source.numel() / best(partial(target.copy_, source)) / 1e9
    return found


def extra_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that one pass holds at most beside inputs and gradients."""
    if device.type != "cuda":
        return None
    gc.collect()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = int(torch.cuda.memory_allocated(device))
    _, gradients = run()
    synchronize(device)
    own: int = sum(g.numel() * g.element_size() for g in gradients)
    return int(torch.cuda.max_memory_allocated(device)) - before - own


def describe_card(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "runtime": torch.version.hip or torch.version.cuda,
    }


# ---------------------------------------------------------------- providers


def ours(suite: Suite, device: torch.device) -> Provider:
    """The suite's own provider on the device's backend."""
    backend = fastloss.use_backend
    name = _backend(device)
    pattern = next(p for p in suite.providers if p.name == "fastloss[portable]")
    return replace(
        pattern, name="fastloss", description=f"this library, backend {name}", full_only=False, peak_bytes={},
        context=partial(backend, name),
    )  # fmt: skip


def _backend(device: torch.device) -> str:
    """Triton's, on the CPU where it is interpreted."""
    known = fastloss.backends()
    names = ("triton", "portable") if device.type == "cuda" else ("triton", "native", "portable")
    return next(name for name in names if known[name].startswith("available"))


def providers(suite: Suite, item: GpuCase, device: torch.device) -> list[Provider]:
    others = [p for p in suite.providers if not p.name.startswith("fastloss")]
    portable = next(p for p in suite.providers if p.name == "fastloss[portable]")
    chosen = others if item.rivals is None else [p for p in others if p.name in item.rivals]
    return [ours(suite, device), *chosen, *([portable] if item.rivals is None or portable.name in item.rivals else [])]


def tuning(device: torch.device) -> AbstractContextManager[object]:
    if _backend(device) != "triton":
        return nullcontext()
    from fastloss import _triton

    return _triton.tuning()


# ---------------------------------------------------------------- running


def run(
    device: torch.device, smoke: bool, seed: int, tick: Callable[[str], None], save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The report, which is also saved after every case: a kernel that hangs takes nothing along that was measured."""
    start = time.perf_counter()
    tick("measuring products and copies")
    before = after = peaks(device, smoke)
    rows: list[dict[str, Any]] = []
    step: dict[str, Any] = {"status": "not measured", "detail": "the run ended before"}

    def report() -> dict[str, Any]:
        best = {name: max(before[name], after[name]) for name in before}
        for row in rows:
            if row["status"] == "ok":
                _conclude(row, best)
        return {
            "schema": 1,
            "machine": describe_machine(),
            "card": describe_card(device),
            "settings": {"smoke": smoke, "seed": seed, "seconds": time.perf_counter() - start},
            "peaks": {"before": before, "after": after, "used": best},
            "rows": rows,
            "step": step,
        }

    def add(item: GpuCase) -> None:
        case = moved(item.case.smoke() if smoke else item.case, device)
        rows.extend(_run_case(item, case, SUITES[case.family], device, seed, start + BUDGET, tick))
        save(report())  # before anything that a broken device would refuse
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    *most, longest = CASES
    for item in most:
        add(item)
    step = _step(device, smoke, start + BUDGET, tick)
    add(longest)
    after = peaks(device, smoke)
    return report()


def _step(device: torch.device, smoke: bool, deadline: float, tick: Callable[[str], None]) -> dict[str, Any]:
    """A training step of an output layer, see `factored_step`; the host's clock, for that is what a step waits for."""
    row: dict[str, Any] = {"status": "ok", "detail": "", "seconds": {}}
    tick("a training step of an output layer")

    def measure() -> None:
        with fastloss.use_backend(_backend(device)):
            sizes, rounds = ((300, 8, 4), (1, 2)) if smoke else (STEP, (5, 40))
            row.update(factored_step.measure(*sizes, *rounds, device))

    _attempt(row, measure, deadline, "")
    return row


def _run_case(
    item: GpuCase,
    case: Case,
    suite: Suite,
    device: torch.device,
    seed: int,
    deadline: float,
    tick: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Every step looks at the clock: tuning and compiling may take most of a minute each."""
    chosen = providers(suite, item, device)
    results = {p.name: _new_row(item, case, p) for p in chosen}

    def survivors(alive: list[Provider], step: Callable[[Provider], Any], into: str = "") -> list[Provider]:
        return [p for p in alive if _attempt(results[p.name], partial(step, p), deadline, into)]

    tick(f"{case.name}: checking")
    alive = survivors(chosen, lambda p: _admit(suite, p, case, device, seed), "check")
    inputs = case.inputs(seed) if alive else ()
    tick(f"{case.name}: compiling and tuning")
    alive = survivors(alive, lambda p: _warm(p, case, inputs, device))
    tick(f"{case.name}: measuring")
    alive = survivors(alive, lambda p: extra_memory(partial(p.step, case.op, inputs), device), "extra_memory")
    for turn in range(min(item.rounds, 2) if device.type == "cpu" else item.rounds):
        if turn and time.perf_counter() > deadline:
            break  # the rounds so far count
        alive = survivors(alive, lambda p: timed(partial(p.step, case.op, inputs), device), "seconds")
    return list(results.values())


def _warm(provider: Provider, case: Case, inputs: Inputs, device: torch.device) -> None:
    """Compiled and, if it is ours, tuned at this size."""
    with tuning(device) if provider.name == "fastloss" else nullcontext():
        provider.step(case.op, inputs)
    synchronize(device)


def _new_row(item: GpuCase, case: Case, provider: Provider) -> dict[str, Any]:
    return {
        "case": case.name, "provider": provider.name, "status": "ok", "detail": "", "op": case.op,
        "sizes": dict(case.sizes), "dtype": str(case.dtype).removeprefix("torch."), "flops": case.flops.of(case.sizes),
        "bytes": item.bytes(case.sizes) if item.bytes else None, "seconds": [], "extra_memory": None, "check": None,
    }  # fmt: skip


def _attempt(row: dict[str, Any], run: Callable[[], Any], deadline: float, into: str) -> bool:
    """Runs before the deadline, keeping the value `into` the row; what fails is named there and not tried again."""
    if time.perf_counter() > deadline and not row["seconds"]:
        row["status"], row["detail"] = "not measured", "out of time"
        return False
    try:
        value = run()
    except Unavailable as reason:
        row["status"], row["detail"] = "not available", str(reason)
        return False
    except Exception as error:  # an out-of-memory error of a rival, too
        row["status"], row["detail"] = "failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return False
    if into == "seconds":
        row["seconds"].append(value)
    elif into:
        row[into] = value
    return True


def _admit(suite: Suite, provider: Provider, case: Case, device: torch.device, seed: int) -> dict[str, float]:
    provider.build(case.op)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 8 * GIB
    if (needs := provider.needs(case)) > free:
        raise Unavailable(f"needs {size(needs)}, {size(free)} are free")
    ours = provider.name.startswith("fastloss")
    found = check(suite, provider, case, seed, None if ours else RIVAL_TOLERANCE.get(case.dtype))
    return {"loss_error": found.loss_error, "gradient_error": found.gradient_error}


def _conclude(row: dict[str, Any], best: dict[str, float]) -> None:
    summary = summarise(row["seconds"])
    row["time"] = {"median": summary.median, "q20": summary.q20, "q80": summary.q80}
    row["tflops"] = row["flops"] / summary.median / 1e12
    row["mm_share"] = row["tflops"] / best[row["dtype"]]
    row["copy_share"] = row["bytes"] and row["bytes"] / summary.median / 1e9 / best["copy"]


# ---------------------------------------------------------------- the report


def markdown(report: dict[str, Any]) -> str:
    card, used = report["card"], report["peaks"]["used"]
    machine = report["machine"]
    lines = [
        f"# fastloss on {card['name']}",
        "",
        f"{machine['timestamp']}; torch {machine['torch']}, runtime {card.get('runtime', 'none')}, "
        f"Python {machine['python']}, fastloss {machine['fastloss']}",
        "",
        *(f"- `torch.mm`, {name}: {used[name]:.3g} TFLOP/s" for name in DTYPES),
        f"- copy: {used['copy']:.4g} GB/s, read and written",
        "",
        "One time is a forward and a backward pass, the median of the rounds; memory is beside inputs and gradients.",
        "",
        "| case | provider | time [q20, q80] | of `mm` peak | of copy peak | extra memory | gradient error |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_cells(row) for row in report["rows"]), "", *_step_lines(report["step"]), ""])


def _step_lines(step: dict[str, Any]) -> list[str]:
    title = "## One training step of an output layer"
    if step["status"] != "ok":
        return [title, "", f"{step['status']}: {step['detail']}"]
    own = step["seconds"]["FactoredOutput"]["median"]
    return [
        title,
        "",
        f"{step['classes']:,} classes, width {step['width']}, batch {step['batch']}, float32; with the update by SGD",
        "",
        "| layer | time [q20, q80] | over FactoredOutput |",
        "|---|---|---|",
        *(
            f"| {name} | {duration(t['median'])} [{duration(t['q20'])}, {duration(t['q80'])}] "
            f"| {t['median'] / own:.1f}x |"
            for name, t in step["seconds"].items()
        ),
    ]


def _cells(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"| {row['case']} | {row['provider']} | {row['status']}: {row['detail']} | | | | |"
    t = row["time"]
    copied = "" if row["copy_share"] is None else f"{100 * row['copy_share']:.0f}%"
    return (
        f"| {row['case']} | {row['provider']} | {duration(t['median'])} [{duration(t['q20'])}, {duration(t['q80'])}] "
        f"| {100 * row['mm_share']:.0f}% | {copied} "
        f"| {'' if row['extra_memory'] is None else size(row['extra_memory'])} | {row['check']['gradient_error']:.1e} |"
    )


def write(report: dict[str, Any], folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {"gpu.json": json.dumps(report, indent=1, allow_nan=False), "gpu.md": markdown(report)}
    for name, text in files.items():
        write_atomically(folder / name, text.encode())
        yield folder / name


def main(device_type: str, smoke: bool, seed: int, output: Path) -> int:
    device = torch.device(device_type)

    def save(report: dict[str, Any]) -> None:
        for _ in write(report, output):
            pass

    report = run(device, smoke, seed, lambda text: print(text, flush=True), save)
    for path in write(report, output):
        print(path)
    print(markdown(report))
    ours = [r for r in report["rows"] if r["provider"].startswith("fastloss")] + [report["step"]]
    return int(any(r["status"] == "failed" for r in ours))
