"""segment_reduce in Triton: one program per segment and block of columns, values in blocks; no atomics."""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .reference import result_dtype

ELEMENTS = 2048  # of a block


@triton.jit
def segment_reduce_kernel(
    values_ptr, row_stride, column_stride, width, offsets_ptr, offsets_stride, out_ptr,
    OP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(offsets_ptr + segment * offsets_stride)
    end = tl.load(offsets_ptr + (segment + 1) * offsets_stride)
    rows = tl.arange(0, ROWS).to(tl.int64)
    most = tl.full([COLUMNS], -float("inf"), tl.float32)
    wrong = tl.zeros([COLUMNS], tl.int32)
    best = tl.full([COLUMNS], 9223372036854775807, tl.int64)
    total = tl.zeros([COLUMNS], tl.float32)
    place = segment * width + columns
    if OP == "last":
        held = (columns < width) & (columns * 0 + end > begin)
        value = tl.load(values_ptr + (end - 1) * row_stride + columns * column_stride, mask=held, other=float("nan"))
        tl.store(out_ptr + place, value, mask=columns < width)
    else:
        for first in range(begin, end, ROWS):
            at = first + rows
            inside = (at < end)[:, None] & (columns < width)[None, :]
            pointers = values_ptr + at[:, None] * row_stride + columns[None, :] * column_stride
            values = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
            if (OP == "sum") | (OP == "mean"):
                total += tl.sum(values, 0)
            else:
                unknown = inside & (values != values)
                wrong = tl.maximum(wrong, tl.max(unknown.to(tl.int32), 0))
                known = tl.where(inside & (values == values), values, -float("inf"))
                here = tl.max(known, 0)
                if OP == "argmax":
                    hit = inside & (values == values) & (known == here[None, :])
                    place_here = tl.min(tl.where(hit, at[:, None], 9223372036854775807), 0)
                    better = (here > most) | ((best == 9223372036854775807) & (here == most))
                    best = tl.where(better, place_here, best)
                higher = tl.maximum(most, here)
                if OP == "logsumexp":
                    finite = (higher > -float("inf")) & (higher < float("inf"))
                    safe = tl.where(finite, higher, 0.0)
                    shares = tl.where(inside, tl.exp(values - safe[None, :]), 0.0)
                    before = tl.where(most == -float("inf"), 0.0, total * tl.exp(most - safe))
                    before = tl.where(most == float("inf"), total, before)
                    total = before + tl.sum(shares, 0)
                most = higher
        if OP == "sum":
            tl.store(out_ptr + place, total, mask=columns < width)
        if OP == "mean":
            count = tl.maximum(end - begin, 1).to(tl.float32)
            tl.store(out_ptr + place, tl.where(end > begin, total / count, float("nan")), mask=columns < width)
        if OP == "max":
            value = tl.where(wrong > 0, float("nan"), most)
            tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=columns < width)
        if OP == "argmax":
            tl.store(out_ptr + place, tl.where(best == 9223372036854775807, -1, best), mask=columns < width)
        if OP == "logsumexp":
            finite = (most > -float("inf")) & (most < float("inf"))
            value = tl.log(total) + tl.where(finite, most, 0.0)
            tl.store(out_ptr + place, tl.where(wrong > 0, float("nan"), value), mask=columns < width)


def segment_reduce(values_ND: torch.Tensor, offsets: torch.Tensor, op: str) -> torch.Tensor:
    width, segments = values_ND.shape[1], offsets.shape[0] - 1
    out_SD = torch.empty((segments, width), dtype=result_dtype(values_ND.dtype, op), device=values_ND.device)
    if out_SD.numel():
        columns = min(128, triton.next_power_of_2(width))
        segment_reduce_kernel[(segments, triton.cdiv(width, columns))](
            values_ND, *values_ND.stride(), width, offsets, offsets.stride(0), out_SD,
            OP=op, ROWS=ELEMENTS // columns, COLUMNS=columns,
        )  # fmt: skip
    return out_SD
