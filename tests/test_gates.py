"""The gates that every op passes, generated from tests/op_table.py."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss._backends import native_core
from tests.op_table import MIB, Op, all_ops
from tests.support import peak_bytes

OPS = all_ops()
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def differentiable(op: Op, args: tuple[Any, ...], scalar: Any = Op.loss) -> tuple[list[Tensor], Any]:
    """The differentiable arguments, requiring grad, and a scalar of the op as a function of them."""
    leaves = [args[i].clone().requires_grad_() for i in op.differentiable]

    def loss(*values: Tensor) -> Tensor:
        full = list(args)
        for i, value in zip(op.differentiable, values, strict=True):
            full[i] = value
        return scalar(op, *full)

    return leaves, loss


@every_op
def test_opcheck(op: Op) -> None:
    for dtype in (torch.float32, torch.float64):
        torch.library.opcheck(op.raw, op.raw_arguments(*op.sample(dtype=dtype)))


@every_op
@pytest.mark.parametrize("backend", ["native", "portable"])
def test_gradcheck(op: Op, backend: str) -> None:
    leaves, loss = differentiable(op, op.sample())
    with fastloss.use_backend(backend):
        assert torch.autograd.gradcheck(loss, leaves)


@every_op
def test_second_derivatives_are_right_or_raise(op: Op) -> None:
    leaves, loss = differentiable(op, op.sample())
    if op.twice:
        for backend in ("native", "portable"):
            with fastloss.use_backend(backend):
                assert torch.autograd.gradgradcheck(loss, leaves)
        return
    (first,) = torch.autograd.grad(loss(*leaves), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@every_op
def test_forward_mode_is_right_or_raises(op: Op) -> None:
    leaves, loss = differentiable(op, op.sample())
    if op.closed:
        want = sum(g.sum() for g in torch.autograd.grad(loss(*leaves), leaves))
        for backend in ("native", "portable"):
            with fastloss.use_backend(backend):
                _, got = torch.func.jvp(loss, tuple(leaves), tuple(torch.ones_like(x) for x in leaves))
            torch.testing.assert_close(got, want)
        return
    with pytest.raises(RuntimeError, match="jvp function"):
        torch.func.jvp(loss, tuple(leaves), tuple(torch.ones_like(x) for x in leaves))


@every_op
def test_compiles_without_a_graph_break(op: Op) -> None:
    torch._dynamo.reset()  # all ops compile the same lines: the limit of recompilations would be theirs together
    leaves, loss = differentiable(op, op.sample())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert torch.equal(got, want)


@every_op
def test_vmap_equals_a_loop(op: Op) -> None:
    leaves, loss = differentiable(op, op.sample())
    batch = [torch.stack([x.detach(), x.detach() * 0.5]) for x in leaves]
    value = torch.func.vmap(torch.func.grad(loss))(*batch)
    for b in range(2):
        one = [x[b].clone().requires_grad_() for x in batch]
        (want,) = torch.autograd.grad(loss(*one), one[:1])
        torch.testing.assert_close(value[b], want, rtol=1e-14, atol=1e-14)


@every_op
def test_vmap_over_nothing_is_empty(op: Op) -> None:
    leaves, total = differentiable(op, op.sample(), Op.plain_sum)  # torch does not multiply scalars of such a batch
    batch = [x.detach().new_zeros((0, *x.shape)) for x in leaves]
    gradients = torch.func.vmap(torch.func.grad(total, argnums=tuple(range(len(batch)))))(*batch)
    for gradient, x in zip(gradients, batch, strict=True):
        assert gradient.shape == x.shape


@every_op
@pytest.mark.parametrize("isa", native_core().supported_isas().split(","))
def test_every_instruction_set_agrees_with_the_portable_backend(op: Op, isa: str) -> None:
    core = native_core()
    before = core.isa()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-4)):
        leaves, loss = differentiable(op, op.sample(*op.sizes, dtype=dtype))
        with fastloss.use_backend("portable"):
            want = torch.autograd.grad(loss(*leaves), leaves)
        try:
            assert core.choose_isa(isa) == isa
            got = torch.autograd.grad(loss(*leaves), leaves)
        finally:
            core.choose_isa(before)
        for g, w in zip(got, want, strict=True):
            # Sums in another order: as many roundings of the largest entry as the root of their length, times eight.
            bound = 8 * max(op.sizes) ** 0.5 * torch.finfo(dtype).eps * w.abs().max()
            assert (g - w).abs().max() <= bound < tolerance * max(1.0, w.abs().max().item())


def test_instruction_set_that_cannot_be_honoured_raises() -> None:
    environment = dict(os.environ, FASTLOSS_CPU_ISA="avx1024")
    run = subprocess.run([sys.executable, "-c", "import fastloss"], env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "FASTLOSS_CPU_ISA" in run.stderr
    assert "avx1024" in run.stderr


def test_instruction_set_can_be_chosen_by_environment() -> None:
    environment = dict(os.environ, FASTLOSS_CPU_ISA="baseline")
    code = "import fastloss; print(fastloss.backends()['native'])"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "baseline;" in run.stdout


def test_import_under_another_default_device() -> None:
    code = (
        "import torch; torch.set_default_device('meta'); import fastloss\n"
        "print([fastloss._ops.unobserved([torch.ones(1, device=d)]) for d in ('cpu', 'meta')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[True, False]"


@every_op
@pytest.mark.parametrize("backend", ["native", "portable"])
def test_memory_stays_within_the_model(op: Op, backend: str) -> None:
    args = op.large()
    leaves, loss = differentiable(op, args)
    allowed = op.memory_model(*args)
    if backend == "portable":
        allowed += op.portable_slack
    with fastloss.use_backend(backend):
        peak = peak_bytes(lambda: torch.autograd.grad(loss(*leaves), leaves))
    assert peak <= allowed, f"{peak / MIB:.1f} MiB, allowed {allowed / MIB:.1f} MiB"
    dense = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    assert peak_bytes(lambda: op.dense(*dense).backward()) > allowed
