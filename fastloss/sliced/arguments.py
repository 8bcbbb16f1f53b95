"""What the sliced functions share: checked arguments, directions, roots and reductions."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss._checks import FLOATS, check_device
from fastloss._ops import accumulation_dtype

SAMPLERS = ("random", "orthogonal", "qmc")

# ---------------------------------------------------------------- checks


def check_p(function: str, p: Any) -> float:
    if isinstance(p, bool) or not isinstance(p, (int, float, numbers.Real)):  # NumPy's as well
        raise TypeError(f"{function}: `p` must be a number, got {type(p).__name__}")
    power = float(p)
    if not 1 <= power < math.inf:  # comparisons: torch.compile traces them for a number that it made dynamic
        raise ValueError(f"{function}: `p` must be finite and at least 1, got {p}")
    return power


def check_count(function: str, count: Any, name: str = "n_projections") -> int:
    if isinstance(count, bool) or not isinstance(count, (int, numbers.Integral)) or int(count) < 1:
        raise ValueError(f"{function}: `{name}` must be an integer >= 1, got {count!r}")
    return int(count)


def check_flags(function: str, **flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{function}: `{name}` must be True or False, got {type(value).__name__}")


def check_generator(function: str, generator: Any) -> None:
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(f"{function}: `generator` must be None or a torch.Generator, got {type(generator).__name__}")


def check_sampler(function: str, sampler: Any) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"{function}: `sampler` must be 'random', 'orthogonal' or 'qmc', got {sampler!r}")


def check_cloud(function: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: `{name}` must be a tensor of shape (..., points, d), got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{function}: `{name}` must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{function}: `{name}` must be a dense tensor, got {x.layout}")
    if x.dim() < 2 or x.shape[-1] == 0 or x.shape[-2] == 0:
        raise ValueError(
            f"{function}: `{name}` must have shape (..., points, d) with at least one point and one dimension, "
            f"got {tuple(x.shape)}"
        )


def check_dims(function: str, *clouds: tuple[str, Any]) -> None:
    for name, x in clouds:
        if isinstance(x, Tensor) and x.dim() != 2:
            raise ValueError(f"{function}: `{name}` must have shape (points, d), got {tuple(x.shape)}")


def check_width(function: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{function}: `{name}` must have the width of `{other_name}`, {other.shape[-1]}, got {x.shape[-1]}"
        )
    check_device(function, name, x, other_name, other)


def values_are_known(x: Tensor) -> bool:
    """Whether numbers can be looked at here: not while tracing, nor under vmap, nor where there are none."""
    return not (torch.compiler.is_compiling() or x.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(x))


def sum_tolerance(dtype: torch.dtype) -> float:
    """How far numbers of this dtype, as users compute them, may be from one."""
    return {torch.float64: 1e-8, torch.float32: 1e-4}.get(dtype, 1e-2)


def check_weights(function: str, name: str, weights: Any, x: Tensor, *, batched: bool) -> Tensor:
    """Weights (n,), or (..., n) if `batched`, of the points of x, in its accumulation dtype."""
    n = x.shape[-2]
    shape = f"(..., {n})" if batched else f"({n},)"
    if not isinstance(weights, Tensor):
        raise TypeError(f"{function}: `{name}` must be a tensor of shape {shape}, got {type(weights).__name__}")
    if weights.dtype not in FLOATS:
        raise TypeError(f"{function}: `{name}` must be a floating-point tensor, got {weights.dtype}")
    if weights.dim() < 1 or weights.shape[-1] != n or not (batched or weights.dim() == 1):
        raise ValueError(f"{function}: `{name}` must have shape {shape}, got {tuple(weights.shape)}")
    check_device(function, name, weights, "the points", x)
    if values_are_known(weights):
        seen = weights.detach().double()
        if not bool(seen.isfinite().all()):
            raise ValueError(f"{function}: `{name}` must be finite, got NaN or infinity")
        if bool((seen < 0).any()):
            raise ValueError(f"{function}: `{name}` must not be negative, got {float(seen.min()):.6g}")
        total = seen.sum(-1)
        tolerance = sum_tolerance(weights.dtype)
        if bool(((total - 1).abs() > tolerance).any()):
            worst = float(total.flatten()[(total - 1).abs().argmax()])
            raise ValueError(
                f"{function}: `{name}` must sum to one (to {tolerance:.0e}), got a sum of {worst:.6g}; "
                f"divide the weights by their sum"
            )
    return weights.to(accumulation_dtype(x.dtype))


def paired_clouds(
    function: str,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    names: str = "x y x_weights y_weights",
    *,
    batched: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, torch.Size]:
    """Checked clouds (B, n, d) and (B, m, d) of one dtype, weights (B, n) and (B, m), and the leading dimensions."""
    x_name, y_name, a_name, b_name = names.split()
    if not batched:
        check_dims(function, (x_name, x), (y_name, y))
    check_cloud(function, x_name, x)
    check_cloud(function, y_name, y)
    check_width(function, y_name, y, x_name, x)
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if a is not None:
        a = check_weights(function, a_name, a, x, batched=batched)
    if b is not None:
        b = check_weights(function, b_name, b, y, batched=batched)
    leads = [x.shape[:-2], y.shape[:-2], *(w.shape[:-1] for w in (a, b) if w is not None)]
    if not any(leads):  # one pair of clouds: small calls are spared the general case
        a, b = (None if w is None else w.unsqueeze(0) for w in (a, b))
        return x.unsqueeze(0), y.unsqueeze(0), a, b, torch.Size()
    try:
        lead = torch.broadcast_shapes(*leads)
    except RuntimeError:
        raise ValueError(
            f"{function}: the leading dimensions of the clouds and weights must broadcast, got "
            + ", ".join(str(tuple(s)) for s in leads)
        ) from None
    x, y = (t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (x, y))
    a, b = (None if w is None else w.expand(*lead, w.shape[-1]).reshape(-1, w.shape[-1]) for w in (a, b))
    return x, y, a, b, lead


# ---------------------------------------------------------------- directions


def seeded(function: str, seed: Any) -> torch.Generator | None:
    if seed is None or isinstance(seed, torch.Generator):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, (int, numbers.Integral)):
        raise TypeError(f"{function}: `seed` must be None, an int or a torch.Generator, got {type(seed).__name__}")
    number = int(seed)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"{function}: `seed` must be from -2**63 to 2**64 - 1, got {seed}")
    return torch.Generator().manual_seed(number)


def draw(
    function: str,
    count: int,
    d: int,
    sampler: str,
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """(count, d) unit vectors, drawn where the generator lives."""
    source = device if generator is None else generator.device
    if sampler == "random":
        theta = torch.randn(count, d, dtype=dtype, generator=generator, device=source)
        return F.normalize(theta, dim=1).to(device)
    if sampler == "orthogonal":
        blocks = []
        for _ in range(-(-count // d)):
            normal = torch.randn(d, d, dtype=torch.float64, generator=generator, device=source)
            q, r = torch.linalg.qr(normal)
            blocks.append((q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T)  # signs make it uniform
        return torch.cat(blocks)[:count].to(device=device, dtype=dtype)
    drawn = torch.randint(2**31 - 1, (), generator=generator, device=source)
    try:
        seed = int(drawn)
    except RuntimeError as error:
        raise RuntimeError(
            f'{function}: `sampler` "qmc" draws one sequence a call; under torch.func.vmap it needs randomness="same"'
        ) from error
    uniform = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    edge = 2.0**-33  # half the spacing of the sequence: its end points are not quantiles
    normal = math.sqrt(2) * torch.erfinv(2 * uniform.clamp(edge, 1 - edge) - 1)
    return F.normalize(normal, dim=1).to(device=device, dtype=dtype)


def directions(
    function: str,
    x: Tensor,
    count: int | None,
    projections: Tensor | None,
    sampler: str,
    generator: torch.Generator | None,
) -> Tensor:
    """(L, d) in the accumulation dtype of x."""
    check_sampler(function, sampler)
    check_generator(function, generator)
    if projections is not None:
        return given_directions(function, x, projections)
    count = check_count(function, count)
    return draw(function, count, x.shape[-1], sampler, generator, accumulation_dtype(x.dtype), x.device)


def given_directions(function: str, x: Tensor, projections: Any, *, columns: bool = False) -> Tensor:
    """The user's (L, d), or (d, L) if they are `columns`, as (L, d) in the accumulation dtype of x."""
    d = x.shape[-1]
    shape, one, across = (f"({d}, L)", "column", 0) if columns else (f"(L, {d})", "row", 1)
    if not isinstance(projections, Tensor):
        got = type(projections).__name__
        raise TypeError(f"{function}: `projections` must be a tensor of shape {shape}, got {got}")
    if projections.dtype not in FLOATS:
        raise TypeError(f"{function}: `projections` must be a floating-point tensor, got {projections.dtype}")
    if projections.dim() != 2 or projections.shape[across] != d or projections.numel() == 0:
        raise ValueError(f"{function}: `projections` must have shape {shape}, L >= 1, got {tuple(projections.shape)}")
    check_device(function, "projections", projections, "the points", x)
    if values_are_known(projections):
        zero = ~projections.detach().any(across)
        if bool(zero.any()):
            index = int(zero.nonzero()[0])
            raise ValueError(f"{function}: `projections` must have no {one} of zero norm, got zeros in {one} {index}")
    return (projections.t() if columns else projections).to(accumulation_dtype(x.dtype))


# ---------------------------------------------------------------- results


def rooted(mean: Tensor, p: float) -> Tensor:
    """mean^(1/p). Its infinite derivative at zero is defined as zero, the right one at a minimum."""
    zero = mean == 0
    return torch.where(zero, 0, torch.where(zero, 1, mean).pow(1 / p))


def reduced(loss: Tensor, lead: torch.Size, reduction: str) -> Tensor:
    """Losses (B,) of B pairs of clouds, over their leading dimensions."""
    if not lead:
        return loss.squeeze(0)
    loss = loss.reshape(lead)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()
