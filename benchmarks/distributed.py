"""`clip_loss` of two processes on this machine, one thread each: time, memory, bytes.

``python -m fastloss.benchmarks.distributed`` or ``python -m benchmarks.distributed``. Forward and backward on gloo,
each process with half of the rows, beside one process with one thread and all rows, and beside open_clip's ``ClipLoss``
with ``local_loss=True, gather_with_grad=True`` in the same two processes. They take turns, and a ratio is that of
medians. Bytes are those of the loopback interface, of both processes halved: nothing else may use it meanwhile.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn

import fastloss

from .harness import _status_bytes, describe_machine, summarise

WORLD = 2
SCHEDULES = ("auto", "all-gather", "ring")
SCALE = 20.0
Step = Callable[..., Any]


def open_clip_loss(rank: int, world: int = WORLD) -> Step:
    """From open_clip's file of losses alone: the package needs torchvision."""
    path = importlib.metadata.distribution("open_clip_torch").locate_file("open_clip/loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss: Step = module.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    return loss


def ours(group: Any, schedule: str = "auto") -> Step:
    return partial(fastloss.clip_loss, group=group, schedule=schedule)


def features(rows: int, width: int, part: slice) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(rows, width, generator=generator) for _ in range(2)]
    return [torch.nn.functional.normalize(x, dim=1)[part].clone().requires_grad_() for x in full]


def run(loss: Step, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    value = loss(*inputs, torch.tensor(SCALE))
    return value, *torch.autograd.grad(value, inputs)


def own(rows: int, rank: int) -> slice:
    half = rows // WORLD
    return slice(rank * half, (rank + 1) * half)


def timed(rank: int, rows: int, width: int, rounds: int) -> dict[str, list[float]]:
    """Seconds by name, of the slower rank; the other process waits while one works alone."""
    group = dist.group.WORLD
    mine = features(rows, width, own(rows, rank))
    alone = features(rows, width, slice(None)) if rank == 0 else []
    steps: dict[str, Step] = {
        "one process": ours(None),
        **{f"two processes, {schedule}": ours(group, schedule) for schedule in SCHEDULES},
        "open_clip, two processes": open_clip_loss(rank),
    }
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            if name != "one process":
                run(step, mine)
            elif rank == 0:
                run(step, alone)
            slowest = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if turn:  # the first is the warm-up
                samples[name].append(float(slowest))
    return samples


def loopback_bytes() -> int:
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def traffic(rank: int, rows: int, width: int) -> dict[str, dict[str, float]]:
    """Bytes a rank sends in one step, and the least: keys to the others and gradients back."""
    group = dist.group.WORLD
    mine = features(rows, width, own(rows, rank))
    least = 2 * (WORLD - 1) * len(mine[0]) * width * mine[0].element_size()
    found = {}
    for schedule in SCHEDULES:
        counts = []
        for _ in range(3):
            dist.barrier()
            time.sleep(0.2)
            before = loopback_bytes()
            run(ours(group, schedule), mine)
            dist.barrier()
            time.sleep(0.2)
            counts.append((loopback_bytes() - before) / WORLD)
        found[schedule] = {"sent": min(counts), "least": least, "over_least": min(counts) / least}
    return found


def extra_memory(rank: int, rows: int, width: int) -> dict[str, int]:
    """Growth of the peak resident set in one step, less the gradients."""
    group = dist.group.WORLD
    run(ours(group), features(256, width, own(256, rank)))
    mine = features(rows, width, own(rows, rank))
    found = {}
    for schedule in SCHEDULES:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to the present VmRSS
        before = _status_bytes("VmRSS")
        _, *gradients = run(ours(group, schedule), mine)
        growth = _status_bytes("VmHWM") - before
        found[schedule] = growth - sum(g.numel() * g.element_size() for g in gradients)
        del gradients
    return found


JOBS: dict[str, Callable[..., Any]] = {"timed": timed, "traffic": traffic, "extra_memory": extra_memory}


def worker(rank: int, folder: str, job: str, arguments: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(minutes=10)
    )
    result = JOBS[job](rank, *arguments)
    Path(f"{folder}/{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def in_two_processes(job: str, *arguments: int) -> list[Any]:
    """What each rank found, in processes that do nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(worker, (folder, job, arguments), WORLD)  # type: ignore[no-untyped-call]
        return [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(WORLD)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="distributed", description=__doc__.split("\n\n")[0])
    parser.add_argument("--timed", type=int, nargs=2, default=(8192, 512), metavar=("ROWS", "WIDTH"))
    parser.add_argument("--memory", type=int, nargs=2, default=(32768, 256), metavar=("ROWS", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("reports/distributed.json"))
    arguments = parser.parse_args()
    if platform.system() != "Linux":
        parser.error("memory and bytes are read from Linux's /proc")
    samples: dict[str, list[float]] = in_two_processes("timed", *arguments.timed, arguments.rounds)[0]
    sent: dict[str, dict[str, float]] = in_two_processes("traffic", *arguments.timed)[0]
    memory: list[dict[str, int]] = in_two_processes("extra_memory", *arguments.memory)
    seconds = {name: vars(summarise(times)) for name, times in samples.items()}
    auto = seconds["two processes, auto"]["median"]
    ratios = {
        "speedup_over_one_process": seconds["one process"]["median"] / auto,
        "speedup_over_open_clip": seconds["open_clip, two processes"]["median"] / auto,
    }
    rows, width = arguments.timed
    table = Table(title=f"clip_loss, forward and backward, {rows} rows in all, width {width}, float32")
    for column in ("run", "median", "of two processes, auto"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, summary in seconds.items():
        table.add_row(name, f"{summary['median'] * 1e3:.0f} ms", f"{summary['median'] / auto:.2f}x")
    Console().print(table)
    for schedule, counted in sent.items():
        Console().print(f"{schedule}: {counted['sent']:,.0f} bytes a rank, {counted['over_least']:.3f} of the least")
    for schedule in SCHEDULES:
        most = max(found[schedule] for found in memory)
        size = f"{arguments.memory[0]} rows, width {arguments.memory[1]}"
        Console().print(f"{schedule}: {most / 2**20:.0f} MiB extra a rank at {size}")
    report = {
        "machine": describe_machine(),
        "threads_a_process": 1,
        "timed": {"rows": rows, "width": width, "seconds": seconds, "samples": samples, **ratios},
        "traffic": {"rows": rows, "width": width, **sent},
        "memory": {"rows": arguments.memory[0], "width": arguments.memory[1], "extra_bytes_by_rank": memory},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    Console().print(str(arguments.output))


if __name__ == "__main__":
    main()
