"""FactoredOutput over many steps, and in two processes."""

from __future__ import annotations

import copy
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

import fastloss
from fastloss import FactoredOutput, FactoredSGD, reference
from fastloss.spherical import modules

STEPS = 20_000


def dense_step(weight: Tensor, x: Tensor, y: Tensor, lr: float) -> None:
    """SGD on the Z-loss of the logits x weight^T, by hand: autograd would take most of the test's time."""
    classes, rows = len(weight), torch.arange(len(x))
    logits = x @ weight.T
    centre = logits - logits.mean(1, keepdim=True)
    variance = centre.square().mean(1)
    deviation = variance.sqrt()
    z = centre[rows, y] / deviation
    share = torch.sigmoid(-z) / len(x)
    g = centre.mul_((share * z / (classes * variance))[:, None]).add_((share / (classes * deviation))[:, None])
    g[rows, y] -= share / deviation
    weight.addmm_(g.T, x, alpha=-lr)


def test_twenty_thousand_steps_in_float32() -> None:
    """The loss falls by half; the weight stays within 1e-3 of a float64 run of the dense layer."""
    torch.manual_seed(0)
    classes, width, batch, lr = 500, 32, 16, 0.5
    linear = torch.nn.Linear(width, classes, bias=False)
    weight = linear.weight.detach().double()
    centres = torch.randn(classes, width)
    layer = FactoredOutput.from_linear(linear)
    losses = []
    for _ in range(STEPS):
        y = (torch.rand(batch) ** 3 * classes).long()
        x = 0.3 * centres[y] + torch.randn(batch, width)
        loss = layer(x, y)
        loss.backward()
        layer.step(lr)
        dense_step(weight, x.double(), y, lr)
        losses.append(float(loss.detach()))
    assert sum(losses[-500:]) / 500 < 0.5 * sum(losses[:50]) / 50
    error = float((layer.weight().double() - weight).norm() / weight.norm())
    assert error < 1e-3, error  # written so that NaN fails
    assert layer.drift() < 1e-5


def test_drift_is_seen_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "CHECK_EVERY", 4)
    monkeypatch.setattr(modules, "PROBE_EVERY", 8)
    monkeypatch.setattr(modules, "FEW", 0)
    torch.manual_seed(0)
    layer = FactoredOutput(6, 40, dtype=torch.float64)
    weight = layer.weight()
    layer.inverse += 1e-9
    layer.gram += 1e-9 * torch.eye(7, dtype=torch.float64)
    for _ in range(8):
        layer(torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 1, 1])).backward()
        layer.step(0.0)
    assert (layer.inversions, layer.refreshes) == (1, 1)
    assert layer.drift() < 1e-13
    eye = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(layer.inverse @ layer.u, eye, rtol=0, atol=1e-13)
    torch.testing.assert_close(layer.weight(), weight, rtol=1e-12, atol=1e-12)


def data(rank: int, step: int, rows: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(rows, 4, generator=gen, dtype=torch.float64), torch.randint(5, (rows,), generator=gen)


def make(classes: int) -> tuple[Any, FactoredOutput]:
    torch.manual_seed(5)
    return torch.nn.Linear(4, 6, dtype=torch.float64), FactoredOutput(6, classes, dtype=torch.float64)


def worker(rank: int, folder: str, classes: int) -> None:
    try:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
        )
        group = distributed.group.WORLD
        body, layer = make(classes)
        body = DistributedDataParallel(body, broadcast_buffers=False)
        ours = FactoredSGD(layer, lr=0.3, weight_decay=0.1, group=group)
        theirs = torch.optim.SGD(body.parameters(), lr=0.3)
        for step in range(20):
            x, y = data(rank, step, 3)
            theirs.zero_grad()
            layer(body(x), y).backward()
            ours.step()
            theirs.step()
        saved = layer.weight(), [p.detach() for p in body.parameters()]
        if rank == 0:  # a rank without a gradient takes part
            x, y = data(rank, 20, 3)
            layer(body.module(x), y).backward()
        ours.step()
        ours.step()  # nobody has one: nothing happens
        assert layer.steps == 21
        with pytest.raises(ValueError, match="must be the same on all ranks"):
            layer.step(0.1 * (rank + 1), group=group)
        with pytest.raises(RuntimeError, match="no gradient"):
            layer.step(0.1, group=group)
        torch.save((*saved, layer.weight()), f"{folder}/{rank}.pt")
        distributed.destroy_process_group()
    except BaseException:
        Path(f"{folder}/{rank}.error").write_text(traceback.format_exc())
        raise


@pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("classes", [20, 100], ids=["few classes", "many classes"])
def test_two_processes_are_one_with_both_batches(classes: int, tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=worker, args=(rank, str(tmp_path), classes)) for rank in range(2)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(120)
    errors = [path.read_text() for path in tmp_path.glob("*.error")]
    assert not errors, errors[0]
    body, layer = make(classes)
    theirs = torch.optim.SGD(body.parameters(), lr=0.3)
    for step in range(20):
        x, y = (torch.cat(part) for part in zip(*(data(rank, step, 3) for rank in range(2)), strict=True))
        theirs.zero_grad()
        layer(body(x), y).backward()
        layer.step(0.3, 0.1)
        theirs.step()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[2], second[2])
    torch.testing.assert_close(first[0], layer.weight(), rtol=1e-11, atol=1e-12)
    for got, want in zip(first[1], body.parameters(), strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-11, atol=1e-12)


def own_loss(layer: FactoredOutput, x: Tensor, y: Tensor) -> Tensor:
    """The loss of the layer's weight on float64 logits."""
    weight, bias = layer.weight().double(), layer.bias()
    assert bias is not None
    names = {"z": "z_loss", "spherical": "spherical_softmax_loss"}
    loss: Tensor = getattr(reference, names[str(layer.loss)])(x.double() @ weight.T + bias.double(), y)
    return loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("loss", "classes"), [("z", c) for c in (1, 2, 3, 4, 6, 10)] + [("spherical", 1)], ids=lambda x: str(x)
)
def test_few_classes(loss: str, classes: int, dtype: torch.dtype) -> None:
    """The layer's loss is that of its own logits, and its weight is as near to SGD in float64 as that in float32.

    Rows of hidden states that are almost orthogonal to a weight of two or three classes have gradients of 1e4 and more;
    three classes then part any two runs.
    """
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, classes, dtype=dtype)
    layer = FactoredOutput.from_linear(linear, loss=loss)
    exact = reference.FactoredOutput(copy.deepcopy(linear).double(), loss)
    plain = reference.FactoredOutput(copy.deepcopy(linear).float(), loss)
    eps = torch.finfo(dtype).eps
    for _ in range(400):
        x, y = torch.randn(16, 8, dtype=dtype), torch.randint(classes, (16,))
        value = layer(x, y)
        value.backward()
        assert abs(float(value.detach() - own_loss(layer, x, y))) < 1024 * eps
        layer.step(0.1)
        for dense in (exact, plain):
            dense.zero_grad()
            dense(x.to(dense.linear.weight.dtype), y).backward()
            with torch.no_grad():
                for p in dense.parameters():
                    p -= 0.1 * p.grad
    assert layer.drift() < 64 * eps
    if classes != 3:
        truth = exact.linear.weight.detach()
        error = float((layer.weight() - truth).norm())
        allowed = float((plain.linear.weight.detach() - truth).norm()) * eps / torch.finfo(torch.float32).eps
        assert error <= 4 * allowed + 64 * eps * float(truth.norm()), (error, allowed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_expanding_steps_make_the_gram_anew(dtype: torch.dtype) -> None:
    """Random targets: what is standardised stays small by the sparse part of the gradient alone, and U grows."""
    torch.manual_seed(0)
    layer = FactoredOutput(8, 100, dtype=dtype)
    again = FactoredOutput(8, 100, dtype=dtype)
    allowed = 4 * modules.DRIFT * torch.finfo(dtype).eps  # DRIFT is what one error grows to; each step has its own
    for step in range(1000):
        if step == 300:  # well before the next time
            again.load_state_dict(layer.state_dict())
            before = layer.refreshes
        x, y = torch.randn(16, 8, dtype=dtype), torch.randint(100, (16,))
        if step >= 300:
            again(x, y).backward()
            again.step(1.0)
        value = layer(x, y)
        value.backward()
        assert abs(float(value.detach() - own_loss(layer, x, y))) < allowed
        layer.step(1.0)
        assert layer.drift() < allowed
    assert again.refreshes == layer.refreshes > before > 0
    assert torch.equal(again.gram, layer.gram)


def test_group_must_be_a_process_group() -> None:
    layer = fastloss.FactoredOutput(4, 9)
    layer(torch.randn(2, 4), torch.tensor([0, 1])).backward()
    with pytest.raises(TypeError, match="`group` must be None or a process group, got str"):
        layer.step(0.1, group="world")
    assert layer.steps == 0
