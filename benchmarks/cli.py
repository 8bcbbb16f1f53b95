"""The command line ``python -m fastloss bench``: options, progress bar, the terminal's tables."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from . import SUITES, report
from .harness import Settings, run


def _cases() -> list[str]:
    return [case.name for suite in SUITES.values() for case in suite.cases]


def _providers() -> list[str]:
    return list(dict.fromkeys(provider.name for suite in SUITES.values() for provider in suite.providers))


def _names(kind: str, known: Callable[[], Iterable[str]]) -> Callable[[str], frozenset[str]]:
    def parse(text: str) -> frozenset[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = sorted(set(names) - set(known()))
        if not names or unknown:
            problem = f"unknown {kind} {', '.join(unknown)}" if unknown else f"no {kind} named"
            raise argparse.ArgumentTypeError(f"{problem}; known: {', '.join(known())}")
        return frozenset(names)

    return parse


def _integer(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return parse


def _writable_folder(text: str) -> Path:
    """The folder may be missing; its nearest existing parent must then be a writable folder."""
    path = Path(text)
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise argparse.ArgumentTypeError(f"{existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{existing} is not writable")
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    mode = parser.add_mutually_exclusive_group()
    for name, text in (
        ("quick", "the main cases with few repetitions, about three minutes on two cores (default)"),
        ("full", "every case and provider with more repetitions"),
        ("smoke", "every case and provider at tiny sizes, to see that all of it runs; the numbers mean nothing"),
    ):
        mode.add_argument(f"--{name}", dest="mode", action="store_const", const=name, help=text)
    parser.set_defaults(mode="quick")
    parser.add_argument("--list", action="store_true", help="list the cases and providers and stop")
    parser.add_argument(
        "--cases",
        metavar="A,B",
        type=_names("case", _cases),
        help="only these cases, in quick mode even full-only ones",
    )
    parser.add_argument(
        "--providers", metavar="A,B", type=_names("provider", _providers), help="only these providers and the baseline"
    )
    parser.add_argument("--seed", type=_integer(0), default=0, help="of the inputs (default: %(default)s)")
    parser.add_argument("--threads", type=_integer(1), default=None, help="default: torch.get_num_threads()")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=_writable_folder,
        default="reports",
        help="folder of benchmark.json, benchmark.md and the plots (default: %(default)s)",
    )


def list_everything() -> None:
    for suite in SUITES.values():
        print(f"cases of {suite.family}:")
        for case in suite.cases:
            print(f"  {case.name:<20} {case.op:<10} {'/'.join(case.tags):<11} {case.reason}")
        print(f"providers of {suite.family}:")
        for provider in suite.providers:
            print(f"  {provider.name:<36} {provider.description}")


def main(arguments: argparse.Namespace) -> int:
    if arguments.list:
        list_everything()
        return 0
    try:
        import matplotlib  # noqa: F401 - a missing one must be known before minutes of measuring
        import rich  # noqa: F401
    except ImportError as error:
        print(
            f"fastloss bench: {error}; install what the benchmark needs with: pip install 'fastloss[bench]'",
            file=sys.stderr,
        )
        return 1
    settings = Settings(
        mode=arguments.mode,
        seed=arguments.seed,
        threads=arguments.threads or torch.get_num_threads(),
        cases=arguments.cases,
        providers=arguments.providers,
    )
    results = _run_with_progress(settings)
    _print_tables(results)
    for path in report.write(results, arguments.output):
        print(path)
    failures = report.failures(results)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _run_with_progress(settings: Settings) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.completed}/{task.total} cases"), TimeElapsedColumn())
    suites = list(SUITES.values())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def tick(text: str, done: int, total: int) -> None:
            bar.update(task, description=text, completed=done, total=total)

        return run(suites, settings, tick)


def _print_tables(results: report.Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A pipe or a file has no width of its own; the tables need about this much.
    console = Console(width=None if sys.stdout.isatty() else 140)
    for line in report.machine_lines(results):
        console.print(Text(line))
    for case in results["cases"]:
        caption = "\n".join([report.models(case), *report.not_measured(results, case)])
        table = Table(
            *report.COLUMNS,
            title=Text(report.case_heading(case)),
            caption=Text(caption),
            caption_justify="left",
        )
        table.columns[0].overflow = "fold"
        for row in report.rows_of(results, case):
            if row["status"] == "ok":
                # Text: the brackets in names and quantiles are not markup.
                table.add_row(*(Text(cell) for cell in report.cells(row)))
        console.print(table)
