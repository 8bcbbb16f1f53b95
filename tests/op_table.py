"""One row an op; the gates of test_gates.py are generated from it. Each family lists its own in <family>/op_rows.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MIB = 1 << 20


@dataclass(frozen=True)
class Op:
    """A differentiable op.

    function: the autograd Function, or a function of the same arguments.
    sample: arguments of the op for problem sizes that cross no tile; `sizes` are passed to it for some that cross
        several.
    differentiable: positions of the arguments that have a gradient.
    large: arguments of the size at which memory is measured.
    memory_model: bytes that forward and backward may allocate at most at the same time, gradients included.
    dense: the same function storing the whole matrix; must exceed `memory_model`, or the gate could not fail.
    portable_slack: bytes that the portable backend may need beyond the model.
    twice: second derivatives are promised (else asking for one raises).
    closed: its derivatives are calls of itself: there is no backward op, and forward mode works.
    """

    name: str
    function: Any
    sample: Callable[..., tuple[Any, ...]]
    sizes: tuple[int, ...]
    differentiable: Sequence[int]
    large: Callable[[], tuple[Any, ...]]
    memory_model: Callable[..., int]
    dense: Callable[..., Tensor]
    portable_slack: int = 0
    twice: bool = False
    closed: bool = False
    raw_arguments: Callable[..., tuple[Any, ...]] = lambda *args: args  # of a sample, as the dispatcher takes them

    @property
    def raw(self) -> Any:
        return getattr(torch.ops.fastloss, self.name + "_fwd").default

    def outputs(self, *args: Any) -> list[Tensor]:
        """The differentiable ones."""
        out = self.function.apply(*args) if isinstance(self.function, type) else self.function(*args)
        return [out] if isinstance(out, Tensor) else [o for o in out if (o.requires_grad or self.closed) and o.numel()]

    def loss(self, *args: Any) -> Tensor:
        """A scalar of all differentiable outputs, with weights that differ from entry to entry."""
        outs = self.outputs(*args)
        return sum((o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).reshape(o.shape)).sum() for o in outs)

    def plain_sum(self, *args: Any) -> Tensor:
        """The same with weights of one."""
        return torch.cat([o.flatten() for o in self.outputs(*args)]).sum()


FAMILIES = sorted(p.parent.name for p in Path(__file__).parent.glob("*/op_rows.py"))


def all_ops() -> list[Op]:
    ops: list[Op] = []
    for family in FAMILIES:
        rows = importlib.import_module(f"tests.{family}.op_rows").OPS
        schemas = importlib.import_module(f"fastloss.{family}.ops")._SCHEMAS
        ways = {f"{op.name}_{way}" for op in rows for way in (("fwd",) if op.closed else ("fwd", "bwd"))}
        assert ways == set(schemas), "an op without a row"
        ops += rows
    return ops
