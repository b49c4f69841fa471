"""group_normalize in Triton: one program per group. Rewards are few, so float64 costs nothing that matters."""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .reference import batch_deviation, result_dtype

BLOCK = 128


@triton.jit
def group_normalize_kernel(
    rewards_ptr, stride, offsets_ptr, offsets_stride, deviation_ptr, eps_ptr, out_ptr,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + group * offsets_stride)
    end = tl.load(offsets_ptr + (group + 1) * offsets_stride)
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    known = tl.zeros([BLOCK], tl.float64)
    top = tl.full([BLOCK], -float("inf"), tl.float64)
    low = tl.full([BLOCK], float("inf"), tl.float64)
    for first in range(begin, end, BLOCK):
        at = first + lanes
        value = tl.load(rewards_ptr + at * stride, mask=at < end, other=float("nan")).to(tl.float32).to(tl.float64)
        there = value == value
        total += tl.where(there, value, 0.0)
        known += tl.where(there, 1.0, 0.0)
        top = tl.where(there & (value > top), value, top)
        low = tl.where(there & (value < low), value, low)
    count = tl.sum(known, 0)
    mean = tl.sum(total, 0) / tl.maximum(count, 1.0)
    flat = tl.max(top, 0) == tl.min(low, 0)
    rest = tl.maximum(count - 1.0, 1.0)
    squares = tl.zeros([BLOCK], tl.float64)
    if KIND == "grpo":
        for first in range(begin, end, BLOCK):
            at = first + lanes
            value = tl.load(rewards_ptr + at * stride, mask=at < end, other=float("nan")).to(tl.float32).to(tl.float64)
            gap = tl.where(value == value, value - mean, 0.0)
            squares += gap * gap
    for first in range(begin, end, BLOCK):
        at = first + lanes
        value = tl.load(rewards_ptr + at * stride, mask=at < end, other=float("nan")).to(tl.float32).to(tl.float64)
        there = value == value
        if (KIND == "quantile") | (KIND == "midrank"):
            below = tl.zeros([BLOCK], tl.float64)
            for start in range(begin, end, BLOCK):
                near = start + lanes
                other = tl.load(rewards_ptr + near * stride, mask=near < end, other=float("nan")).to(tl.float32)
                other = other.to(tl.float64)
                lower = tl.where(other[None, :] < value[:, None], 1.0, 0.0)
                same = tl.where(other[None, :] == value[:, None], 0.5 if KIND == "midrank" else 1.0, 0.0)
                below += tl.sum(lower + same, 1).to(tl.float64)
            result = tl.where(there, below / tl.maximum(count, 1.0), 0.0)
        else:
            gap = value - mean
            if KIND == "grpo":
                gap = gap / (tl.sqrt(tl.sum(squares, 0) / rest) + tl.load(eps_ptr))
            if KIND == "batch":
                gap = gap / (tl.load(deviation_ptr) + tl.load(eps_ptr))
            if KIND == "rloo":
                gap = gap * (count / rest)
            result = tl.where(there & (flat == 0), gap, 0.0)
        tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=at < end)


def group_normalize(rewards_N: torch.Tensor, offsets: torch.Tensor, kind: str, eps: float) -> torch.Tensor:
    out_N = torch.empty(rewards_N.shape, dtype=result_dtype(rewards_N), device=rewards_N.device)
    if out_N.numel():
        # As a tensor: a float argument of a kernel would be rounded to float32.
        eps_1 = torch.full((1,), eps, dtype=torch.float64, device=rewards_N.device)
        deviation_1 = batch_deviation(rewards_N).reshape(1) if kind == "batch" else eps_1
        group_normalize_kernel[(offsets.shape[0] - 1,)](
            rewards_N, rewards_N.stride(0), offsets, offsets.stride(0), deviation_1, eps_1, out_N,
            KIND=kind, BLOCK=BLOCK,
        )  # fmt: skip
    return out_N
