"""Compiles every Triton kernel for chips that need not be there: ``python -m fastloss.kernels``.

Writes what each needs (registers, shared memory, spills, the instruction of the matrix units) to kernels.json and
kernels.md, and exits with 1 if one spills, does not fit a chip, or leaves the matrix units unused.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from fastloss._backends import FAMILIES
from fastloss._triton import TARGETS, Resources, Specimen, resources, tuning

__all__ = ["compile_all", "main", "table", "tuning"]

CHECKED = ("sm_80", "sm_90", "sm_100", "gfx942")  # by the tests; --all adds the other chips and the candidates


def compile_all(targets: Sequence[str], *, candidates: bool = False, processes: int = 2) -> Iterator[Resources]:
    """In the order of the targets."""
    jobs = [
        (family, target, candidates, index)
        for target in targets
        for family in FAMILIES
        for index in range(len(_specimens(family, target, candidates)))
    ]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compile, jobs)


def _specimens(family: str, target: str, candidates: bool) -> list[Specimen]:
    found: list[Specimen] = importlib.import_module(f"fastloss.{family}.triton").specimens(target, candidates)
    return found


def _compile(job: tuple[str, str, bool, int]) -> Resources:
    family, target, candidates, index = job
    return resources(_specimens(family, target, candidates)[index], target)


def table(results: Sequence[Resources]) -> str:
    header = ("kernel", "chip", "blocks, warps, stages", "registers", "spills", "shared KiB", "matrix unit", "code")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for r in results:
        blocks = "x".join(map(str, r.config.blocks))
        cells = (
            r.specimen, r.target, f"{blocks}, {r.config.num_warps}, {r.config.num_stages}", r.registers, r.spills,
            f"{r.shared / 1024:.0f} of {r.shared_limit / 1024:.0f}", r.matrix or "none",
            "; ".join(r.faults) or f"{r.instructions} instructions",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(["# Triton kernels, compiled without a device", "", *lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastloss.kernels", description=__doc__)
    parser.add_argument("--all", action="store_true", help="all chips, and the configurations that tuning may choose")
    parser.add_argument("--output", type=Path, default=Path("reports"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    results = []
    for result in compile_all(tuple(TARGETS) if options.all else CHECKED, candidates=options.all):
        print(f"{result.target} {result.specimen}: {'; '.join(result.faults) or 'passed'}", flush=True)
        results.append(result)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "kernels.json").write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    (options.output / "kernels.md").write_text(table(results))
    return int(any(r.faults for r in results))


if __name__ == "__main__":
    sys.exit(main())
