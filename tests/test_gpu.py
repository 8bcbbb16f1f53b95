"""What only a GPU can show; `make gpu` runs it beside the values of `tests/*/triton_values.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn

import fastloss
from tests.contrastive.problems import check, make_problem

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no CUDA or ROCm device", allow_module_level=True)

MIB = 1 << 20
Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {
    "clip_loss": lambda a, b: fastloss.clip_loss(a, b, logit_scale=20.0),
    "info_nce": lambda a, b: fastloss.info_nce(a, b, temperature=0.07),
    "nt_xent": lambda a, b: fastloss.nt_xent(a, b, temperature=0.5),
    "z_loss": lambda a, b: fastloss.z_loss(a @ b.T, torch.arange(len(a), device="cuda")),
    "sliced_wasserstein": lambda a, b: fastloss.sliced_wasserstein(a, b, projections=directions(a)),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def directions(like: Tensor) -> Tensor:
    """The same in every call, and without a generator, which torch.compile does not trace."""
    numbers = torch.arange(16 * like.shape[1], dtype=torch.float64, device="cuda")
    return numbers.square().sin().view(16, -1).to(like.dtype)


def pair(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows)
    first, second = (torch.randn(rows, width, device="cuda", generator=generator) for _ in range(2))
    unit = torch.nn.functional.normalize
    return [x.to(dtype).requires_grad_() for x in (unit(first), unit(first + second))]


def gradients(loss: Loss, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*inputs), inputs)


def test_cards_run_triton() -> None:
    assert fastloss.backends()["triton"].startswith("available")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "variant", ["info_nce symmetric ids row_temperature", "info_nce unpaired", "nt_xent", "nt_xent ids"]
)
def test_values_of_large_tiles(variant: str, dtype: torch.dtype) -> None:
    """The configurations that small problems do not reach, ragged in all three sizes."""
    check(make_problem(variant, rows=3001, columns=4099, width=200, dtype=dtype).to("cuda"))


@every_loss
def test_gradcheck_in_float64(loss: Loss) -> None:
    assert torch.autograd.gradcheck(loss, pair(7, 5, torch.float64))


@every_loss
def test_derivative_along_the_gradient(loss: Loss) -> None:
    """Of the kernels themselves: the central difference of a step h is right to h^2, and rounds to eps / h."""
    inputs = pair(300, 70, torch.float32)
    found = gradients(loss, inputs)
    slope = float(torch.stack([g.square().sum() for g in found]).sum().sqrt())
    eps = torch.finfo(torch.float32).eps
    step = eps ** (1 / 3)
    up, down = (
        float(loss(*(x.detach() + sign * step / slope * g for x, g in zip(inputs, found, strict=True))))
        for sign in (1, -1)
    )
    tolerance = 8 * (step**2 * max(1.0, slope) + eps * abs(up) / step)
    assert tolerance < 0.2 * slope  # else nothing would be tested
    assert abs((up - down) / (2 * step) - slope) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_loss
def test_compiled_code_gives_the_same(loss: Loss, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    inputs = pair(600, 96, dtype)
    want = gradients(loss, inputs)
    for got, expected in zip(gradients(torch.compile(loss, fullgraph=True), inputs), want, strict=True):
        torch.testing.assert_close(got, expected)


# Directions that are given are looked at.
DRAWN = {"directions drawn": lambda a, b: fastloss.sliced_wasserstein(a, b, n_projections=16)}


@pytest.mark.parametrize("name", ["clip_loss", "info_nce", "nt_xent", *DRAWN])
def test_nothing_waits_for_the_device(name: str) -> None:
    loss, inputs = (LOSSES | DRAWN)[name], pair(2000, 128)
    gradients(loss, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(loss, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_loss
def test_results_do_not_change_from_run_to_run(loss: Loss) -> None:
    inputs = pair(5000, 256)
    first, second = gradients(loss, inputs), gradients(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def peak(run: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in result)


@pytest.mark.parametrize("name", ["clip_loss", "info_nce", "nt_xent"])
def test_memory_beside_inputs_and_gradients(name: str) -> None:
    """A panel of 256 MiB, sums in float32, partial statistics, vectors."""
    rows, width = 32_768, 256
    inputs = pair(rows, width)
    sums = 4 * width * (2 * rows + 8192)  # of NT-Xent, both views
    views = 2 * 2 * rows * width * 2  # and their concatenation and its gradient
    assert peak(lambda: gradients(LOSSES[name], inputs)) <= 256 * MIB + sums + views + 64 * MIB


@pytest.mark.parametrize("rows", [8192, 60_000])
def test_memory_of_many_directions(rows: int) -> None:
    """Blocks of projections, the sorted ones and, of long slices, the sort's scratch; not a number a direction."""
    inputs, theta = pair(rows, 3), torch.randn(16_384, 3, device="cuda")
    loss = functools.partial(fastloss.sliced_wasserstein, projections=theta.bfloat16())
    assert peak(lambda: torch.autograd.grad(loss(*inputs), inputs)) <= 6 * 64 * MIB < 2 * rows * len(theta) * 4


def test_cards_of_nvidia_sort_long_slices_by_cub() -> None:
    if torch.version.hip:
        pytest.skip("CUDA C++ is for NVIDIA's cards")
    assert fastloss.backends()["cuda"].startswith("available")


def test_a_million_rows_fit_beside_a_gibibyte() -> None:
    inputs = pair(1 << 20, 64)
    assert peak(lambda: gradients(LOSSES["clip_loss"], inputs)) <= 1024 * MIB


RANKED: dict[str, Callable[..., Tensor]] = {
    "clip_loss": lambda a, b, **options: fastloss.clip_loss(a, b, logit_scale=20.0, **options),
    "info_nce": lambda a, b, **options: fastloss.info_nce(a, b, temperature=0.07, symmetric=True, **options),
    "nt_xent": lambda a, b, **options: fastloss.nt_xent(a, b, temperature=0.5, **options),
}


def on_nccl(rank: int, world: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = {}
    for name, loss in RANKED.items():
        for schedule in ("all-gather", "ring"):
            mine = [x.detach().tensor_split(world)[rank].clone().requires_grad_() for x in pair(1001, 64)]
            value = loss(*mine, group=distributed.group.WORLD, schedule=schedule)
            found[name, schedule] = [x.cpu() for x in (value, *torch.autograd.grad(value, mine))]
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_ranks_on_nccl_find_what_one_process_finds(tmp_path: Path) -> None:
    world = min(4, torch.cuda.device_count())
    spawn(on_nccl, (world, str(tmp_path)), world)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for name, loss in RANKED.items():
        inputs = pair(1001, 64)
        value = loss(*inputs)
        want = [value, *torch.autograd.grad(value, inputs)]
        for schedule in ("all-gather", "ring"):
            values, *found = zip(*(part[name, schedule] for part in parts), strict=True)
            for got in values:
                torch.testing.assert_close(got, want[0].detach().cpu())
            for gradients, expected in zip(found, want[1:], strict=True):
                torch.testing.assert_close(torch.cat(gradients) / world, expected.cpu())


def test_offsets_beyond_32_bits() -> None:
    """The last rows of 2.4e9 logits, beside the same rows alone."""
    rows, classes, few = 3000, 793_471, 8
    logits = torch.empty(rows, classes, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    target = torch.arange(rows, device="cuda")
    alone = logits.detach()[-few:].clone().requires_grad_()
    loss = fastloss.z_loss(logits, target, reduction="none")
    want = fastloss.z_loss(alone, target[-few:], reduction="none")
    torch.testing.assert_close(loss[-few:], want)
    (gradient,) = torch.autograd.grad(loss.sum(), [logits])
    (wanted,) = torch.autograd.grad(want.sum(), [alone])
    # Most entries are a millionth; they are rounded to bfloat16.
    torch.testing.assert_close(gradient[-few:], wanted, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-9)


def test_a_stream_that_is_not_the_default_one() -> None:
    inputs = pair(5000, 256)
    want = gradients(LOSSES["clip_loss"], inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what follows on the default stream would overtake the kernels
        copies = [(x.detach() * 1).requires_grad_() for x in inputs]
        got = gradients(LOSSES["clip_loss"], copies)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_a_card_that_is_not_the_current_one() -> None:
    want = gradients(LOSSES["clip_loss"], pair(500, 64))
    got = gradients(LOSSES["clip_loss"], [x.detach().to("cuda:1").requires_grad_() for x in pair(500, 64)])
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()
