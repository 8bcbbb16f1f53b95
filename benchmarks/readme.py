"""Writes the measured block of the README from a committed results file.

python -m benchmarks.readme benchmarks/results/FILE.json README.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .report import Report, duration, machine_lines, peak_share, rows_of, size, write_atomically

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
OURS = "fastloss"


def block(report: Report, source: str) -> str:
    """Markdown: one row a case that fastloss was timed in, with the speed-up over each rival that was."""
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


def main(results: str, readme: str) -> None:
    report = json.loads(Path(results).read_text())
    path = Path(readme)
    write_atomically(path, insert(path.read_text(), block(report, results)).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
