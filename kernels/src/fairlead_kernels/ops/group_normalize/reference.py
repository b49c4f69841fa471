"""group_normalize in plain torch, by index operations over each reward's group."""

from __future__ import annotations

import torch

from ..segment_reduce.reference import segment_of


def counter(value: torch.Tensor) -> torch.dtype:
    """Rewards are few and their differences small: float64, where the device has it."""
    return torch.float32 if value.device.type == "mps" else torch.float64


def batch_deviation(rewards_N: torch.Tensor) -> torch.Tensor:
    """Unbiased standard deviation of all rewards that are not NaN, as a float64 scalar; 0 of fewer than two."""
    wide_N = rewards_N.to(counter(rewards_N))
    known_N = ~wide_N.isnan()
    count = known_N.sum()
    mean = wide_N.nan_to_num(0.0).sum() / count.clamp(min=1)
    squares = torch.where(known_N, wide_N - mean, 0.0).square().sum()
    return (squares / (count - 1).clamp(min=1)).sqrt()


def group_normalize(rewards_N: torch.Tensor, offsets: torch.Tensor, kind: str, eps: float) -> torch.Tensor:
    """NaN: out of all statistics, and 0 itself."""
    wide_N, segments = rewards_N.to(counter(rewards_N)), offsets.shape[0] - 1
    known_N, group_N = ~wide_N.isnan(), segment_of(offsets, rewards_N.shape[0])
    if kind in ("quantile", "midrank"):
        result_N = quantile(wide_N, known_N, group_N, kind == "midrank")
        return result_N.to(result_dtype(rewards_N))
    value_N, zero_S = wide_N.nan_to_num(0.0), wide_N.new_zeros(segments)
    count_S = zero_S.index_add(0, group_N, known_N.to(wide_N.dtype))
    mean_S = zero_S.index_add(0, group_N, value_N) / count_S.clamp(min=1)
    gap_N = torch.where(known_N, wide_N - mean_S[group_N], 0.0)
    rest_S = (count_S - 1).clamp(min=1)
    if kind == "grpo":
        scale_S = 1 / ((zero_S.index_add(0, group_N, gap_N.square()) / rest_S).sqrt() + eps)
    elif kind == "batch":
        scale_S = (1 / (batch_deviation(rewards_N) + eps)).expand(segments)
    else:
        scale_S = count_S / rest_S if kind == "rloo" else torch.ones_like(zero_S)
    top_S = zero_S.scatter_reduce(0, group_N, wide_N.masked_fill(~known_N, -torch.inf), "amax", include_self=False)
    low_S = zero_S.scatter_reduce(0, group_N, wide_N.masked_fill(~known_N, torch.inf), "amin", include_self=False)
    # The mean of equal floats can differ from them by an ulp, which eps would not hide.
    flat_N = (top_S == low_S)[group_N] | ~known_N
    return (gap_N * scale_S[group_N]).masked_fill(flat_N, 0.0).to(result_dtype(rewards_N))


def result_dtype(rewards_N: torch.Tensor) -> torch.dtype:
    return torch.float64 if rewards_N.dtype == torch.float64 else torch.float32


def quantile(wide_N: torch.Tensor, known_N: torch.Tensor, group_N: torch.Tensor, midrank: bool) -> torch.Tensor:
    """Share of the group's rewards at or below each; midrank counts ties half. By sorting within groups."""
    count = wide_N.shape[0]
    if count == 0:
        return wide_N.clone()
    order_N = wide_N.argsort(stable=True)  # NaN last
    order_N = order_N[group_N[order_N].argsort(stable=True)]
    sorted_N, group_N = wide_N[order_N], group_N[order_N]  # the groups come back as they were, each in rising order
    place_N = torch.arange(count, device=wide_N.device)
    new_group_N = torch.ones_like(known_N)
    new_group_N[1:] = group_N[1:] != group_N[:-1]
    new_value_N = new_group_N.clone()
    new_value_N[1:] |= sorted_N[1:] != sorted_N[:-1]
    begin_N = torch.where(new_group_N, place_N, 0).cummax(0).values
    first_N = torch.where(new_value_N, place_N, 0).cummax(0).values
    run_N = new_value_N.cumsum(0) - 1
    end_N = first_N + torch.bincount(run_N, minlength=count)[run_N]
    scored_N = torch.zeros_like(wide_N).index_add(0, group_N, known_N[order_N].to(wide_N.dtype))[group_N]
    below_N = first_N - begin_N + (end_N - first_N) * (0.5 if midrank else 1.0)
    share_N = torch.where(sorted_N.isnan(), 0.0, below_N.to(wide_N.dtype) / scored_N.clamp(min=1))
    return torch.empty_like(wide_N).index_copy_(0, order_N, share_N)
