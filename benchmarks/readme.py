"""Writes the measured block of the README from the committed results files.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from .report import Report, duration, machine_lines, peak_share, rows_of, size, write_atomically

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
OURS = "fastloss"
ROOT = Path(__file__).parent.parent


def block() -> str:
    """Markdown: the table of the cases, and a line for each kind of results that has a file of its own."""
    kinds = {"cpu": _cases, "factored-step": _factored_step, "distributed": _distributed}
    lines = []
    for kind, written in kinds.items():
        (path,) = (ROOT / "benchmarks" / "results").glob(f"{kind}-*.json")
        lines.append(written(json.loads(path.read_text()), path.relative_to(ROOT).as_posix()))
    return "\n\n".join(lines)


def _cases(report: Report, source: str) -> str:
    """One row a case that fastloss was timed in, with the speed-up over each rival that was."""
    lines = [
        f"float32, forward and backward, from [`{source}`]({source}) ({report['machine']['timestamp'][:10]}):",
        "",
        *(f"- {line}" for line in machine_lines(report)),
        "",
        "| case | fastloss | over eager | over others | of `mm` peak | extra memory | eager's |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        rows = {row["provider"]: row for row in rows_of(report, case)}
        ours = rows.pop(OURS)
        if ours["status"] != "ok" or case["sweep"] or case["dtype"] != "float32":
            continue
        sizes = ", ".join(f"{name} {size}" for name, size in case["sizes"].items() if size > 1)
        eager = rows.pop("eager")
        others = [
            f"{name} {_ratio(row, ours)}"
            for name, row in rows.items()
            if row["status"] == "ok" and not name.startswith(f"{OURS}[")
        ]
        cells = [
            f"`{case['op']}`, {sizes}",
            duration(ours["time"]["median"]),
            _ratio(eager, ours),
            ", ".join(others) or "not measured",
            peak_share(ours) if ours["peak_share"] else "not counted",
            _memory(ours),
            _memory(eager),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _factored_step(report: Report, source: str) -> str:
    ours = "FactoredOutput"
    medians = [{name: time["median"] for name, time in case["seconds"].items()} for case in report["results"]]
    (beside,) = (i for i, names in enumerate(medians) if len(names) > 1)
    case, time = report["results"][beside], medians[beside].pop(ours)
    rivals = ", ".join(f"{other / time:.0f}x {name}" for name, other in medians[beside].items())
    few, many = (
        statistics.fmean(names[ours] for names, c in zip(medians, report["results"], strict=True) if c["classes"] == n)
        for n in (10_000, 1_000_000)
    )
    return (
        f"Training steps of an output layer, {_origin(report, source)}: `FactoredOutput` of width {case['width']}, "
        f"batch {case['batch']}, {case['classes']:,} classes, {duration(time)}: {rivals}. A step with 1,000,000 "
        f"classes takes {many / few:.2f} times one with 10,000."
    )


def _distributed(report: Report, source: str) -> str:
    timed, sent = report["timed"], report["traffic"]["auto"]
    most = max(found["auto"] for found in report["memory"]["extra_bytes_by_rank"])
    return (
        f"Two processes of one thread each, {_origin(report, source)}: `clip_loss` with {timed['rows']} rows in all, "
        f"width {timed['width']}, is {timed['speedup_over_one_process']:.2f}x as fast as one process of one thread, "
        f"and {timed['speedup_over_open_clip']:.2f}x as fast as open_clip's in the same two processes. A rank sends "
        f"{sent['over_least']:.3f} of the least bytes; it needs {size(most)} of extra memory with "
        f"{report['memory']['rows']} rows in all, width {report['memory']['width']}."
    )


def _origin(report: Report, source: str) -> str:
    machine = report["machine"]
    return (
        f"from [`{source}`]({source}) ({machine['cpu']}, {machine['git']['commit'][:12]}, {machine['timestamp'][:10]})"
    )


def _ratio(rival: dict[str, Any], ours: dict[str, Any]) -> str:
    if rival["status"] != "ok":
        return "not measured"
    if rival["provider"] == "eager":
        return f"{ours['speedup']['median']:.2f}x"  # by rounds, against drift
    return f"{rival['time']['median'] / ours['time']['median']:.2f}x"


def _memory(row: dict[str, Any]) -> str:
    return size(row["memory"]["extra"]) if row["memory"] else "not measured"


def insert(readme: str, text: str) -> str:
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main() -> None:
    path = ROOT / "README.md"
    write_atomically(path, insert(path.read_text(), block()).encode())


if __name__ == "__main__":
    main()
