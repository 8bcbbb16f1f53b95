"""Losses over the ranks of a process group against one process with all their rows.

Four processes run every case once, in groups of two, three and four of them; the tests compare what they wrote.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

import fastloss
import fastloss.reference
from tests.support import assert_as_accurate_as_torch

WORLDS = {2: [2, 0], 3: [1, 2, 3], 4: [0, 1, 2, 3]}  # group size: its processes; of two, in reverse
ROWS = {
    2: [(4, 4), (6, 3), (0, 5)],
    3: [(3, 3, 3), (5, 0, 2)],
    4: [(3, 3, 3, 3), (2, 5, 1, 0), (0, 0, 7, 0)],
}
SCHEDULES = ["all-gather", "ring"]
VARIANTS = [
    "info_nce",
    "info_nce dot ids",
    "info_nce key_ids row_scale",
    "info_nce extra key_ids",
    "info_nce symmetric",
    "info_nce symmetric key_ids row_scale extra",
    "info_nce unpaired ids",
    "clip_loss",
    "clip_loss key_ids row_scale",
    "nt_xent",
    "nt_xent dot ids row_scale",
]
D, M = 6, 3
SCALE = {"info_nce": "temperature", "clip_loss": "logit_scale", "nt_xent": "temperature"}
FEATURES = {
    "info_nce": ("query", "positive_key"),
    "clip_loss": ("image_features", "text_features"),
    "nt_xent": ("z0", "z1"),
}


@dataclass(frozen=True)
class Case:
    variant: str
    rows: tuple[int, ...]
    schedule: str
    reduction: str = "mean"
    dtype: torch.dtype = torch.float64
    width: int = D

    @property
    def function(self) -> str:
        return self.variant.split()[0]

    def __str__(self) -> str:
        return f"{self.variant} {self.rows} {self.schedule} {self.reduction} {self.dtype}".replace("torch.", "")


CASES = [
    *(
        Case(variant, rows, schedule)
        for variant in VARIANTS
        for world in WORLDS
        for rows in ROWS[world]
        for schedule in SCHEDULES
    ),
    *(
        Case(variant, (3, 5, 2), schedule, reduction)
        for variant in ("info_nce symmetric row_scale", "nt_xent")
        for schedule in SCHEDULES
        for reduction in ("sum", "none")
    ),
    *(
        Case(variant, (300, 700), schedule, dtype=dtype, width=33)
        for variant in ("info_nce", "clip_loss", "nt_xent")
        for schedule in SCHEDULES
        for dtype in (torch.float32, torch.bfloat16)
    ),
]


def arguments(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The rows of all ranks: tensors with a gradient, those without, options. Extra negatives are one block a rank."""
    words = set(case.variant.split())
    generator = torch.Generator().manual_seed(sum(case.rows))
    n = sum(case.rows)

    def features(*shape: int) -> Tensor:
        return torch.randn(*shape, case.width, generator=generator, dtype=torch.float64).div(2).to(case.dtype)

    tensors = {name: features(n) for name in FEATURES[case.function]}
    scale = torch.tensor(0.7, dtype=torch.float64)
    if "row_scale" in words:
        scale = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
    tensors[SCALE[case.function]] = scale if case.dtype == torch.float64 else scale.float()
    fixed: dict[str, Tensor] = {}
    names = {"info_nce": ("query_ids", "key_ids"), "clip_loss": ("image_ids", "text_ids"), "nt_xent": ("ids", "")}
    first, second = names[case.function]
    if words & {"ids", "key_ids"}:
        fixed[first] = torch.randint(4, (n,), generator=generator)
    if "key_ids" in words:
        fixed[second] = torch.randint(4, (n,), generator=generator)
    if "extra" in words:
        tensors["extra_negatives"] = features(len(case.rows), M)
    if "unpaired" in words:
        tensors["negative_keys"] = features(len(case.rows), M)
        fixed["key_ids"] = torch.randint(4, (len(case.rows), M), generator=generator)
    options: dict[str, Any] = {"reduction": case.reduction}
    if "dot" in words:
        options["normalize"] = False
    if "symmetric" in words:
        options["symmetric"] = True
    return tensors, fixed, options


def of_rank(case: Case, rank: int, x: Tensor) -> Tensor:
    """A rank's part: of what has a row for each of all ranks, its rows; of what has a block a rank, its block."""
    if x.dim() == 0:
        return x
    if len(x) == len(case.rows) != sum(case.rows):
        return x[rank]
    start = sum(case.rows[:rank])
    return x[start : start + case.rows[rank]]


def upstream(case: Case) -> Tensor:
    """What reaches the loss: one number a row without a reduction."""
    if case.reduction != "none":
        return torch.tensor(1.7)
    views = 2 if case.function == "nt_xent" else 1
    return torch.linspace(0.3, 1.9, views * sum(case.rows), dtype=torch.float64)


def own_upstream(case: Case, rank: int) -> Tensor:
    full = upstream(case)
    if case.function == "nt_xent" and full.dim():
        return torch.cat([of_rank(case, rank, view) for view in full.chunk(2)])
    return of_rank(case, rank, full)


def run_case(case: Case, group: Any) -> dict[str, Tensor]:
    rank = distributed.get_rank(group)
    tensors, fixed, options = arguments(case)
    leaves = {name: of_rank(case, rank, x).clone().requires_grad_() for name, x in tensors.items()}
    fixed = {name: of_rank(case, rank, x) for name, x in fixed.items()}
    loss = getattr(fastloss, case.function)(**leaves, **fixed, **options, group=group, schedule=case.schedule)
    loss.backward(own_upstream(case, rank).to(loss.dtype))
    return {"loss": loss.detach(), **{name: x.grad for name, x in leaves.items()}}


def one_process(case: Case, api: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The loss of all rows and its gradients; the extra negatives of a rank join the queries of that rank."""
    tensors, fixed, options = arguments(case)
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in tensors.items()}
    if not {"extra_negatives", "negative_keys"} & set(leaves):
        loss = getattr(api, case.function)(**leaves, **fixed, **options)
    else:
        per_rank = []
        for rank in range(len(case.rows)):
            mine = {name: x[rank] for name, x in leaves.items() if name in ("extra_negatives", "negative_keys")}
            ids = {"key_ids": fixed["key_ids"][rank]} if "negative_keys" in mine else {}
            full = getattr(api, case.function)(**{**leaves, **mine, **fixed, **ids, **options, "reduction": "none"})
            per_rank.append(of_rank(case, rank, full))
        loss = torch.cat(per_rank).mean()
    loss.backward(upstream(case).to(loss.dtype))
    return {"loss": loss.detach(), **{name: x.grad for name, x in leaves.items()}}


def join(case: Case, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the ranks found, as one process would hold it, with gradients averaged as DistributedDataParallel does."""
    world = len(parts)
    joined: dict[str, Tensor] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name == "loss" and case.reduction == "none" and case.function == "nt_xent":
            views = [value.chunk(2) for value in values]
            joined[name] = torch.cat([torch.cat([view[v] for view in views]) for v in range(2)])
        elif name == "loss" and case.reduction == "none":
            joined[name] = torch.cat(values)
        elif values[0].dim() == 0:
            assert all(torch.equal(value, values[0]) for value in values), f"{name} differs between ranks"
            # Without a reduction the objective is the average over the ranks of what each makes of its rows.
            joined[name] = values[0] * (world if case.reduction == "none" and name != "loss" else 1)
        else:
            stacked = name in ("extra_negatives", "negative_keys")
            whole = torch.stack(values) if stacked else torch.cat(values)
            joined[name] = whole if case.reduction == "none" else whole / world
    return joined


def mean_gradients_of_ddp(group: Any) -> dict[str, Tensor]:
    """An encoder and a learned scale under DistributedDataParallel, with other rows on each rank."""
    rank = distributed.get_rank(group)
    model = DistributedDataParallel(towers(), process_group=group)
    x = batch()
    start = sum(DDP_ROWS[:rank])
    features = model(x[start : start + DDP_ROWS[rank]])
    loss = fastloss.clip_loss(*features, group=group)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.module.named_parameters()}}


DDP_ROWS = (4, 2, 3, 5)


class Towers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = torch.nn.Linear(D, D), torch.nn.Linear(D, D)
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normalize = torch.nn.functional.normalize
        return normalize(self.image(x)), normalize(self.text(x)), self.logit_scale.exp()


def towers() -> Towers:
    torch.manual_seed(3)
    return Towers().double()


def batch() -> Tensor:
    return torch.randn(sum(DDP_ROWS), D, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def refusals(group: Any, rank: int) -> dict[str, str]:
    """What a rank hears when the arguments of one do not fit, by name of the fault."""
    x = torch.ones(3, D)
    odd = rank == 1
    calls: dict[str, Any] = {
        "width": lambda: fastloss.clip_loss(x[:, : D - odd], x[:, : D - odd], 1.0, group=group),
        "dtype": lambda: fastloss.clip_loss(x.double() if odd else x, x.double() if odd else x, 1.0, group=group),
        "reduction": lambda: fastloss.info_nce(x, x, reduction="sum" if odd else "mean", group=group),
        "symmetric": lambda: fastloss.info_nce(x, x, symmetric=odd, group=group),
        "temperature": lambda: fastloss.nt_xent(x, x, 0.5 + odd, group=group),
        "gradient": lambda: fastloss.nt_xent(x.clone().requires_grad_(odd), x, group=group),
        "ids": lambda: fastloss.nt_xent(x, x, ids=torch.arange(3) if odd else None, group=group),
        "schedule": lambda: fastloss.nt_xent(x, x, group=group, schedule="ring" if odd else "auto"),
        "function": lambda: fastloss.nt_xent(x, x, group=group) if odd else fastloss.clip_loss(x, x, 1.0, group=group),
        "refused": lambda: fastloss.clip_loss(x, x[: 3 - odd], 1.0, group=group),
    }
    heard = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, TypeError, RuntimeError) as error:
            heard[name] = f"{type(error).__name__}: {error}"
    return heard


TIMEOUT = timedelta(seconds=20)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4, timeout=TIMEOUT
        )
        groups = {
            size: distributed.new_group(ranks, timeout=TIMEOUT, sort_ranks=False) for size, ranks in WORLDS.items()
        }
        found: dict[str, Any] = {}
        for case in CASES:
            if rank in WORLDS[len(case.rows)]:
                found[str(case)] = run_case(case, groups[len(case.rows)])
        found["ddp"] = mean_gradients_of_ddp(groups[4])
        if rank in WORLDS[3]:
            found["refusals"] = refusals(groups[3], distributed.get_rank(groups[3]))
        torch.save(found, f"{folder}/{rank}.pt")
        distributed.barrier()
        if rank == 3:
            return  # this one is gone: the others must not wait for ever
        try:
            fastloss.clip_loss(torch.eye(3), torch.eye(3), 1.0, group=groups[4])
        except Exception as error:
            Path(f"{folder}/{rank}.lost").write_text(repr(error))
    except BaseException:
        Path(f"{folder}/{rank}.error").write_text(traceback.format_exc())
        raise


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("needs gloo")
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=worker, args=(rank, str(folder))) for rank in range(4)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(120)
    assert not [process for process in workers if process.is_alive()], "a rank hangs"
    errors = [path.read_text() for path in folder.glob("*.error")]
    assert not errors, errors[0]
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_find_what_one_process_finds(ranks: tuple[Path, list[dict[str, Any]]], case: Case) -> None:
    parts = [ranks[1][process][str(case)] for process in WORLDS[len(case.rows)]]
    actual = join(case, parts)
    truth = one_process(case, fastloss.reference, torch.float64)
    if case.dtype == torch.float64:
        for name, expected in truth.items():
            scale = max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
            assert actual[name].dtype == torch.float64
            torch.testing.assert_close(
                actual[name], expected, rtol=0, atol=1e-12 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )
        return
    baseline = one_process(case, fastloss, case.dtype)
    for name, expected in truth.items():
        assert_as_accurate_as_torch(
            actual[name], expected, baseline[name].to(actual[name].dtype), magnitude=1.0, name=name
        )


def test_averaged_gradients_of_an_encoder_are_those_of_one_process(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    model = towers()
    loss = fastloss.reference.clip_loss(*model(batch()))
    loss.backward()
    for part in (found["ddp"] for found in ranks[1]):
        torch.testing.assert_close(part["loss"], loss.detach(), rtol=1e-12, atol=0)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(part[name], parameter.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("width", "ValueError: clip_loss: the width must be the same on all ranks of `group`, got 6, 5, 6"),
        (
            "dtype",
            "ValueError: clip_loss: the dtype must be the same on all ranks of `group`, got torch.float32, torch.f",
        ),
        ("reduction", "ValueError: info_nce: `reduction` must be the same on all ranks"),
        (
            "symmetric",
            "ValueError: info_nce: `symmetric` must be the same on all ranks of `group`, got False, True, False",
        ),
        (
            "temperature",
            "ValueError: nt_xent: the scale must be the same on all ranks of `group`, got 2, 0.66",
        ),
        ("gradient", "ValueError: nt_xent: which tensors need a gradient must be the same on all ranks"),
        (
            "ids",
            "ValueError: nt_xent: whether `ids` is given must be the same on all ranks of `group`, got False, True",
        ),
        ("schedule", "ValueError: nt_xent: `schedule` must be the same on all ranks of `group`"),
        ("function", "must call the same function"),
    ],
)
def test_ranks_that_disagree_all_hear_of_it(ranks: tuple[Path, list[dict[str, Any]]], fault: str, message: str) -> None:
    for process in WORLDS[3]:
        assert message in ranks[1][process]["refusals"][fault]


def test_bad_input_of_one_rank_ends_the_call_on_all(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    heard = [ranks[1][process]["refusals"]["refused"] for process in WORLDS[3]]
    assert heard[1].startswith("ValueError: clip_loss: `text_features` must have size 3 in dimension 0")
    for message in (heard[0], heard[2]):
        assert message.startswith("RuntimeError: clip_loss: rank 1 of `group` refused its arguments")


def test_rank_that_is_gone_is_an_error_on_the_others(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    assert sorted(path.name for path in ranks[0].glob("*.lost")) == ["0.lost", "1.lost", "2.lost"]
