"""Reductions over segments of a flat tensor: segment s is values[offsets[s] : offsets[s + 1]].

sum, mean, max, argmax (the flat index, the lowest on ties), last, logsumexp. Deterministic: no atomics, each result is
made by one thread or program in order.
"""

from __future__ import annotations

import torch

from ... import checks, library
from .spec import OPS, SPECS

library.define(SPECS)
_segment_reduce = torch.ops.fairlead.segment_reduce.default

__all__ = ["segment_reduce"]


def segment_reduce(
    values_ND: torch.Tensor, offsets: torch.Tensor, op: str = "sum", mean_of_empty: float = float("nan")
) -> torch.Tensor:
    """One value (or row) per segment.

    values_ND: floating, [N] or [N, D], any strides. offsets: integer [S + 1], from 0 to N, never falling; equal
    neighbours are an empty segment. op: sum, mean, max, argmax, last, logsumexp.
    Returns [S] or [S, D]: sum, mean, logsumexp in float32 (float64 of float64); max, last in the dtype of the values;
    argmax int64. Of an empty segment: sum 0, mean `mean_of_empty`, max and logsumexp -inf, last NaN, argmax -1.
    NaN passes through all but argmax, where it never wins (nothing else there: -1).
    Differentiable except argmax; max gives its gradient to the argmax.
    ValueError / TypeError on anything else; the values of offsets are checked on the CPU only.
    """
    if not isinstance(values_ND, torch.Tensor) or values_ND.dim() not in (1, 2) or not values_ND.is_floating_point():
        raise TypeError(f"values_ND: a floating tensor [N] or [N, D] is needed, not {checks.describe(values_ND)}")
    checks.one_of(op, "op", OPS)
    empty = checks.number(mean_of_empty, "mean_of_empty")
    offsets = checks.offsets(offsets, "offsets", values_ND.shape[0], values_ND.device)
    rows_ND = values_ND if values_ND.dim() == 2 else values_ND[:, None]
    out_SD: torch.Tensor = _segment_reduce(rows_ND, offsets, op)
    if op == "mean" and empty == empty:
        out_SD = out_SD.masked_fill((offsets.diff() == 0)[:, None], empty)
    return out_SD if values_ND.dim() == 2 else out_SD[:, 0]
