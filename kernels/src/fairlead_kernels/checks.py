"""Checks of arguments at the public edge: one line that says what was wrong and what would be right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def describe(value: Any) -> str:
    """A value as an error message shows it: tensors by dtype and shape."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__


def is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def ids(value: Any, name: str, shape: str) -> torch.Tensor:
    """Integer ids of two dimensions as int64."""
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or not is_integer(value.dtype):
        raise TypeError(f"{name}: integer ids of shape [{shape}] are needed, not {describe(value)}")
    return value if value.dtype == torch.int64 else value.to(torch.int64)


def beside(value: torch.Tensor, name: str, other: torch.Tensor, other_name: str) -> None:
    """Two tensors have as many rows as each other, on one device."""
    if value.shape[0] != other.shape[0]:
        raise ValueError(f"{name} has {value.shape[0]} rows, {other_name} has {other.shape[0]}")
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, {other_name} on {other.device}")


def per_row(value: Any, name: str, kind: str, other: torch.Tensor) -> torch.Tensor:
    """A "bool" or "integer" (made int64) for each row of `other`, on its device."""
    good = isinstance(value, torch.Tensor) and value.shape == other.shape[:1] and value.device == other.device
    if not good or not (value.dtype == torch.bool if kind == "bool" else is_integer(value.dtype)):
        raise ValueError(f"{name}: {kind} [{other.shape[0]}] on {other.device} is needed, not {describe(value)}")
    checked: torch.Tensor = value if kind == "bool" else value.to(torch.int64)
    return checked


def number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: a number is needed, not {describe(value)}")
    return float(value)


def share(value: Any, name: str = "gamma") -> float:
    """A number strictly between 0 and 1."""
    if not 0.0 < number(value, name) < 1.0:
        raise ValueError(f"{name}: a share in (0, 1) is needed, not {value}")
    return float(value)


def flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: True or False is needed, not {describe(value)}")
    return value


def one_of(value: Any, name: str, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: one of {', '.join(allowed)} is needed, not {describe(value)}")
    return value


def offsets(value: Any, name: str, total: int, device: torch.device) -> torch.Tensor:
    """Edges of segments over `total` rows as int64 [S + 1]: from 0 to total, never falling. Their values are checked on
    the CPU only and not while compiling: elsewhere that would wait for the device."""
    good = isinstance(value, torch.Tensor) and value.dim() == 1 and value.shape[0] >= 1 and is_integer(value.dtype)
    if not good:
        raise TypeError(f"{name}: integer edges of shape [S + 1] are needed, not {describe(value)}")
    edges: torch.Tensor = value.to(torch.int64)
    if edges.device != device:
        raise ValueError(f"{name} is on {edges.device}, the rows on {device}")
    if edges.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(edges[0]) != 0 or int(edges[-1]) != total:
            raise ValueError(f"{name}: from 0 to {total} is needed, not from {int(edges[0])} to {int(edges[-1])}")
        if bool((edges.diff() < 0).any()):
            raise ValueError(f"{name}: edges that never fall are needed")
    return edges
