"""The results for people: table cells (of the terminal and the Markdown report), Markdown, plots, atomic files."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .harness import GIB

Report = Mapping[str, Any]

COLUMNS = (
    "provider",
    "median time [q20, q80]",
    "speed-up over eager",
    "% of mm peak",
    "extra memory",
    "gradient error (times eager's)",
)
METHOD = """\
- One time is one forward and one backward pass, or the forward pass of a case without gradients; of cases below a
  millisecond, the mean of several passes in a row. Providers take turns; the speed-up is the median, over rounds, of
  the ratio within a round (in brackets: 20% and 80% quantiles).
- "% of mm peak": the case's flop model divided by the median time, as a share of the best `torch.mm` measured in this
  run. The model is the same for all providers, whatever they really compute. Where memory traffic and not arithmetic
  is the floor, the share of the copy bandwidth is given as well: the bytes that any implementation must move, divided
  by the median time and by the best of `torch.Tensor.copy_` in this run.
- "extra memory": growth of the resident set's high-water mark (VmHWM) over one pass, less the gradients, in a process
  of its own, counted from the level after the inputs exist and a smaller pass has run (for compiled code: a full pass).
- "gradient error": largest difference from dense float64, relative to the largest entry, at the reduced size of the
  check; in brackets as a multiple of the error of the plain PyTorch code.
"""


# ---------------------------------------------------------------- cells


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{_three_digits(seconds / factor)} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def size(count: float) -> str:
    for unit, factor in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(count) >= factor:
            return f"{_three_digits(count / factor)} {unit}"
    return f"{count:.0f} B"


def case_heading(case: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{name} {value}" for name, value in case["sizes"].items())
    return f"{case['name']}: {case['op']}, {sizes}, {case['dtype']}"


def models(case: Mapping[str, Any]) -> str:
    traffic = case["traffic_formula"]
    return f"flop model: {case['flops_formula']}" + (f"; traffic model: {traffic}" if traffic else "")


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of one result, in the order of COLUMNS; a row without measurements says why in the second one."""
    if row["status"] != "ok":
        reason = row["status"] + (f": {row['detail']}" if row["detail"] else "")
        return (row["provider"], reason, "", "", "", "")
    time, speedup, check = row["time"], row["speedup"], row["check"]
    shown = duration(time["median"])
    if row["timed_in"] != "rounds":
        shown += f" (once, in the {row['timed_in']})"
    elif time["count"] > 1:
        shown += f" [{duration(time['q20'])}, {duration(time['q80'])}]"
    memory = size(row["memory"]["extra"]) if row["memory"] else row["memory_detail"]
    ratio = check["gradient_error_over_baseline"]
    return (
        row["provider"],
        shown,
        f"{speedup['median']:.2f}x [{speedup['q20']:.2f}, {speedup['q80']:.2f}]" if speedup else "",
        peak_share(row),
        memory,
        f"{check['gradient_error']:.1e}" + (f" ({ratio:.2g}x)" if ratio is not None else ""),
    )


def peak_share(row: Mapping[str, Any]) -> str:
    traffic = row["traffic_share"]
    return f"{100 * row['peak_share']:.0f}%" + (f", {100 * traffic:.0f}% of copy" if traffic is not None else "")


def not_measured(report: Report, case: Mapping[str, Any]) -> list[str]:
    """One line per reason, for the terminal, where a reason does not fit a table cell."""
    reasons: dict[str, list[str]] = {}
    for row in rows_of(report, case):
        if row["status"] != "ok":
            reasons.setdefault(cells(row)[1], []).append(row["provider"])
    return [f"{', '.join(providers)}: {reason}" for reason, providers in reasons.items()]


def rows_of(report: Report, case: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["case"] == case["name"]]


def machine_lines(report: Report) -> list[str]:
    machine, peak = report["machine"], report["peak_gflops"]
    commit = machine["git"]
    revision = "not a checkout" if commit is None else commit["commit"][:12] + (" (dirty)" if commit["dirty"] else "")
    lines = [
        f"{machine['cpu']}, {machine['usable_cores']} of {machine['cores']} cores usable, {machine['threads']} threads",
        f"fastloss {machine['fastloss']} ({revision}), torch {machine['torch']} ({machine['torch_isa']}), "
        f"Python {machine['python']}, {machine['system']}",
    ]
    lines += [f"backend {name}: {status}" for name, status in machine["backends"].items()]
    for name, meaning in (("square", "large square product"), ("tile", "one similarity tile")):
        before, after = peak["before"][name], peak["after"][name]
        lines.append(f"torch.mm, {meaning}: {before:.0f} GFLOP/s before the cases, {after:.0f} after")
    lines.append(f"copy: {peak['before']['copy']:.1f} GB/s read and written before, {peak['after']['copy']:.1f} after")
    return lines


# ---------------------------------------------------------------- Markdown


def markdown(report: Report, plots: Mapping[str, str]) -> str:
    """`plots`: title -> file name, relative to the report."""
    parts = ["# fastloss benchmark", f"{report['machine']['timestamp']}, mode: {report['settings']['mode']}", ""]
    parts += [f"- {line}" for line in machine_lines(report)]
    parts += ["", "## How it was measured", "", METHOD]
    for case in report["cases"]:
        parts += [f"## {case_heading(case)}", "", f"{case['reason']}; {models(case)}.", ""]
        parts += [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
        parts += [_line(cells(row)) for row in rows_of(report, case)]
        parts.append("")
    parts += [f"![{title}]({name})\n" for title, name in plots.items()]
    parts += ["## Providers", ""]
    parts += [f"- `{name}`: {description}" for name, description in report["providers"].items()]
    return "\n".join(parts) + "\n"


def _line(texts: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"


# ---------------------------------------------------------------- plots

_QUANTITIES: dict[str, tuple[str, Callable[[Mapping[str, Any]], float | None]]] = {
    "time": ("time of one forward and backward pass [s]", lambda row: row["time"] and row["time"]["median"]),
    "memory": ("extra memory of one pass [bytes]", lambda row: row["memory"] and row["memory"]["extra"]),
}


def plots(report: Report) -> dict[str, tuple[str, bytes]]:
    """Title -> (file name, PNG): each quantity against the batch size for every sweep of at least two cases."""
    from matplotlib.figure import Figure

    drawn: dict[str, tuple[str, bytes]] = {}
    for sweep in dict.fromkeys(case["sweep"] for case in report["cases"] if case["sweep"]):
        rows_by_case = {case["name"]: case["sizes"]["rows"] for case in report["cases"] if case["sweep"] == sweep}
        for quantity, (label, value) in _QUANTITIES.items():
            curves: dict[str, list[tuple[int, float]]] = {}
            for row in report["rows"]:
                # A growth of zero (below a page) has no place on a logarithmic axis.
                if row["case"] in rows_by_case and (y := value(row)) and y > 0:
                    curves.setdefault(row["provider"], []).append((rows_by_case[row["case"]], y))
            figure = Figure(figsize=(7, 4.5), layout="constrained")
            axes = figure.add_subplot()
            for provider, points in curves.items():
                axes.plot(*zip(*sorted(points), strict=True), marker="o", label=provider)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set(xlabel="batch size", ylabel=label, title=sweep)
            axes.grid(visible=True, which="both", alpha=0.3)
            if curves:
                axes.legend(fontsize="small")
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=140)
            slug = re.sub(r"[^a-z0-9]+", "-", sweep.lower())
            drawn[f"{sweep}: {quantity} against batch size"] = (f"{slug}-{quantity}.png", buffer.getvalue())
    return drawn


# ---------------------------------------------------------------- files


def write_atomically(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, never half of one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the report from others
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write(report: Report, folder: Path) -> list[Path]:
    """Write benchmark.json, benchmark.md and the plots; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots(report)
    files = dict(drawn.values())
    text = markdown(report, {title: name for title, (name, _) in drawn.items()})
    files["benchmark.md"] = text.encode()
    # Python's json writes NaN, which no other reader accepts; a measurement that is not finite deserves a traceback.
    files["benchmark.json"] = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False).encode()
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def failures(report: Report) -> list[str]:
    return [
        f"{row['case']} / {row['provider']}: {row['detail']}" for row in report["rows"] if row["status"] == "failed"
    ]
