"""Argument checks shared by the families: each error names the argument, what was expected and what came."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_reduction(function: str, reduction: Any) -> None:
    check_choice(function, "reduction", reduction, ("none", "sum", "mean"))


def check_flag(function: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{function}: `{name}` must be True or False, got {type(value).__name__}")


def check_strided(function: str, name: str, x: Tensor) -> None:
    """A tensor with numbers at every place; not sparse, not nested."""
    if x.is_nested or x.layout != torch.strided:
        got = "a nested tensor" if x.is_nested else str(x.layout)
        raise TypeError(f"{function}: `{name}` must be a dense tensor, of layout torch.strided, got {got}")


def check_floating(function: str, name: str, x: Any, shape: str, dims: int) -> None:
    """A floating-point tensor of `dims` dimensions; `shape` is how the message writes it, as in "(B, D)"."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: `{name}` must be a tensor of shape {shape}, got {type(x).__name__}")
    if type(x).__name__ == "DTensor":  # by name: the class is missing where PyTorch was built without distributed
        raise TypeError(
            f"{function}: `{name}` must be a plain tensor, got a DTensor; of rows sharded over a mesh, pass the rank's "
            "own as `to_local()`, with the mesh as `group` if the loss takes one"
        )
    check_strided(function, name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{function}: `{name}` must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() != dims:
        raise ValueError(f"{function}: `{name}` must have shape {shape}, got {tuple(x.shape)}")


def check_size(function: str, name: str, x: Tensor, dim: int, size: int, why: str) -> None:
    if x.shape[dim] != size:
        raise ValueError(
            f"{function}: `{name}` must have size {size} in dimension {dim} ({why}), got shape {tuple(x.shape)}"
        )


def check_device(function: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{function}: `{name}` must be on {other.device} as `{other_name}`, got {x.device}")


def check_ids(function: str, name: str, ids: Any, shape: tuple[int, ...], other_name: str, other: Tensor) -> Tensor:
    """Integer ids of the given shape, as contiguous int64."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{function}: `{name}` must be an integer tensor of shape {shape}, got {type(ids).__name__}")
    check_strided(function, name, ids)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"{function}: `{name}` must be an integer tensor, got {ids.dtype}")
    if tuple(ids.shape) != shape:
        raise ValueError(f"{function}: `{name}` must have shape {shape}, got {tuple(ids.shape)}")
    check_device(function, name, ids, other_name, other)
    return ids.to(torch.int64).contiguous()


def check_scale(
    function: str, name: str, value: Any, *, positive: bool, least: float = 0.0, dtype: torch.dtype = torch.float64
) -> None:
    """A temperature or scale: a floating-point tensor, or a number that `dtype` holds, with its reciprocal if positive.

    Of a tensor, only what it is: its values may be on another device.
    """
    if isinstance(value, Tensor):
        check_strided(function, name, value)
        if value.dtype not in FLOATS:
            raise TypeError(f"{function}: `{name}` must be a float or a floating-point tensor, got {value.dtype}")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{function}: `{name}` must be a float or a floating-point tensor, got {type(value).__name__}")
    if not isinstance(value, (int, float)):
        value = float(value)
    # Comparisons, not math.isfinite: torch.compile traces them for a float that it made dynamic.
    limit = torch.finfo(torch.float64).max
    if not -limit <= value <= limit or (positive and (value <= 0 or value < least)):
        bound = f" and at least {least}" if least else " and positive" if positive else ""
        raise ValueError(f"{function}: `{name}` must be finite{bound}, got {_shown(value)}")
    limit = torch.finfo(dtype).max
    if not -limit <= value <= limit or (positive and value < 1 / limit):
        bound = f"{1 / limit if positive else -limit:.3g} to {limit:.3g}"
        raise ValueError(f"{function}: `{name}` must be in the range of {dtype}, {bound}, got {value}")


def _shown(value: float) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return str(value)


def check_scalar_or_rows(
    function: str, name: str, value: Any, rows: int | None, x: Tensor, *, positive: bool, least: float = 0.0
) -> Tensor:
    """A temperature or scale as a 0-dim or (rows,) tensor in the accumulation dtype of x, differentiable if it was."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    check_scale(function, name, value, positive=positive, least=least, dtype=dtype)
    if not isinstance(value, Tensor):
        return torch.full((), float(value), dtype=dtype, device=x.device)
    result: Tensor
    if value.numel() == 1:
        result = value.reshape(())
    elif rows is not None and tuple(value.shape) in ((rows,), (rows, 1)):
        result = value.reshape(rows)
    else:
        per_row = "" if rows is None else f", or one value a row ({rows},)"
        raise ValueError(
            f"{function}: `{name}` must be a float or a tensor of one element{per_row}, got shape {tuple(value.shape)}"
        )
    if result.dim() or result.device.type != "cpu":
        check_device(function, name, result, "the features", x)
    return result.to(device=x.device, dtype=dtype)


def check_number(
    function: str,
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> float:
    """A number, NumPy's as Python's, finite, and greater than `above` or at least `least`; in `dtype`, too."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{function}: `{name}` must be a float, got {type(value).__name__}")
    x: float = value if isinstance(value, (int, float)) else float(value)
    limit = torch.finfo(torch.float64).max
    if not -limit <= x <= limit or (above is not None and x <= above) or (least is not None and x < least):
        bound = (
            f" and greater than {above}" if above is not None else f" and at least {least}" if least is not None else ""
        )
        raise ValueError(f"{function}: `{name}` must be finite{bound}, got {_shown(x)}")
    limit, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    if not -limit <= x <= limit or (above == 0 and x < tiny):
        bound = f"{tiny if above == 0 else -limit:.3g} to {limit:.3g}"
        raise ValueError(f"{function}: `{name}` must be in the range of {dtype}, {bound}, got {x}")
    return x


def check_int(function: str, name: str, value: Any, *, least: int = -(2**63), most: int = 2**63 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{function}: `{name}` must be an int, got {type(value).__name__}")
    if not least <= value <= most:
        bound = f"at least {least}" if value < least else f"at most {most}"
        raise ValueError(f"{function}: `{name}` must be {bound}, got {_shown(value)}")


def check_group(function: str, group: Any) -> Any:
    """None, or a process group; that of a one-dimensional DeviceMesh may be given as the mesh."""
    if type(group).__name__ == "DeviceMesh":
        if group.ndim != 1:
            raise ValueError(
                f"{function}: `group` must be a mesh of one dimension, got {group.ndim}; name one: mesh[name]"
            )
        return group.get_group()
    if group is not None and not (
        torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)
    ):
        raise TypeError(f"{function}: `group` must be None or a process group, got {type(group).__name__}")
    return group


def check_choice(function: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        shown = ", ".join(repr(choice) for choice in choices[:-1])
        raise ValueError(f"{function}: `{name}` must be {shown} or {choices[-1]!r}, got {value!r}")
