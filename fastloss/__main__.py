"""Command line: ``python -m fastloss info`` and ``python -m fastloss bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

import fastloss
from fastloss.benchmarks import cli


def info() -> int:
    print(f"fastloss {fastloss.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, status in fastloss.backends().items():
        print(f"{name}: {status}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastloss", description=fastloss.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version and backends: what is loaded, and why the rest is not")
    bench = commands.add_parser("bench", help="measure the losses against plain PyTorch and other libraries")
    cli.add_arguments(bench)
    arguments = parser.parse_args(argv)
    return info() if arguments.command == "info" else cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
