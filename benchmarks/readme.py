"""Writes the measured block of the README from a committed results file.

python -m benchmarks.readme benchmarks/results/FILE.json README.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .report import Report, duration, machine_lines, rows_of, size, write_atomically

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
RIVALS = ("eager", "torch.compile", "linear_cross_entropy[chunked]")


def block(report: Report, source: str) -> str:
    """Markdown: one row a case that fastloss was timed in, with the speed-up over each rival that was."""
    lines = [
        f"float32, forward and backward, from [`{source}`]({source}) ({report['machine']['timestamp'][:10]}):",
        "",
        *(f"- {line}" for line in machine_lines(report)),
        "",
        f"| case | fastloss | {' | '.join(f'over {r}' for r in RIVALS)} | of `mm` peak | extra memory | eager's |",
        f"|---{'|---' * (len(RIVALS) + 4)}|",
    ]
    for case in report["cases"]:
        rows = {row["provider"]: row for row in rows_of(report, case)}
        ours = rows["fastloss"]
        if ours["status"] != "ok" or case["sweep"] or case["dtype"] != "float32":
            continue
        sizes = "x".join(str(case["sizes"][name]) for name in ("rows", "dim"))
        cells = [f"`{case['op']}` {sizes}", duration(ours["time"]["median"])]
        cells += [_ratio(rows.get(rival), ours) for rival in RIVALS]
        cells += [f"{100 * ours['peak_share']:.0f}%", _memory(ours), _memory(rows["eager"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(rival: dict[str, Any] | None, ours: dict[str, Any]) -> str:
    if rival is None or rival["status"] != "ok":
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
