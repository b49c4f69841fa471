"""segment_reduce in plain torch: index_add and scatter_reduce over each value's segment."""

from __future__ import annotations

import math

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def result_dtype(dtype: torch.dtype, op: str) -> torch.dtype:
    """Sums in the accumulator's dtype, picked values in their own, indices int64."""
    if op == "argmax":
        return torch.int64
    return dtype if op in ("max", "last") else accumulator(dtype)


def segment_of(offsets: torch.Tensor, count: int) -> torch.Tensor:
    """The segment of each of `count` values."""
    segments = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(segments, offsets.diff(), output_size=count)


def largest(values_ND: torch.Tensor, segment_N: torch.Tensor, segments: int) -> torch.Tensor:
    index_ND = segment_N[:, None].expand_as(values_ND)
    floor_SD = values_ND.new_full((segments, values_ND.shape[1]), -math.inf)
    return floor_SD.scatter_reduce(0, index_ND, values_ND, "amax")


def segment_reduce(values_ND: torch.Tensor, offsets: torch.Tensor, op: str) -> torch.Tensor:
    count, segments = values_ND.shape[0], offsets.shape[0] - 1
    segment_N = segment_of(offsets, count)
    if op in ("sum", "mean"):
        wide_ND = values_ND.to(accumulator(values_ND.dtype))
        total_SD = wide_ND.new_zeros(segments, values_ND.shape[1]).index_add_(0, segment_N, wide_ND)
        return total_SD if op == "sum" else total_SD / offsets.diff()[:, None]
    if op == "last":
        empty_S1 = (offsets.diff() == 0)[:, None]
        if count == 0:
            return values_ND.new_full((segments, values_ND.shape[1]), math.nan)
        return values_ND[(offsets[1:] - 1).clamp(min=0)].masked_fill(empty_S1, math.nan)
    if op == "max":
        return largest(values_ND, segment_N, segments)
    if op == "argmax":
        known_ND = values_ND.masked_fill(values_ND.isnan(), -math.inf)
        best_ND = largest(known_ND, segment_N, segments)[segment_N]
        position_N1 = torch.arange(count, device=values_ND.device)[:, None]
        position_ND = torch.where((values_ND == best_ND), position_N1, count)
        index_ND = segment_N[:, None].expand_as(position_ND)
        nobody_SD = position_ND.new_full((segments, values_ND.shape[1]), count)
        first_SD = nobody_SD.scatter_reduce(0, index_ND, position_ND, "amin")
        return first_SD.masked_fill(first_SD == count, -1)
    wide_ND = values_ND.to(accumulator(values_ND.dtype))
    top_SD = largest(wide_ND, segment_N, segments)
    safe_SD = torch.where(top_SD.isfinite(), top_SD, 0.0)
    share_ND = (wide_ND - safe_SD[segment_N]).exp()
    return torch.zeros_like(top_SD).index_add_(0, segment_N, share_ND).log() + safe_SD
