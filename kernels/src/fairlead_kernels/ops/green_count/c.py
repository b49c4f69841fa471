"""Calls kernel.c."""

from __future__ import annotations

import torch

from ... import native
from ..prf.keys import unsigned_key
from ..watermark_bias.c import SCHEME_CODES
from ..watermark_bias.reference import threshold
from .reference import Counts, columns

DEDUP_CODES = {"pair": 0, "context": 1, "none": 2}


def green_count(
    ids_BT: torch.Tensor,
    lengths_B: torch.Tensor | None,
    context_BH: torch.Tensor | None,
    key: int,
    gamma: float,
    context_width: int,
    scheme: str,
    dedup: str,
    pad_left: bool,
) -> Counts:
    batch, tokens = ids_BT.shape
    count_B = torch.empty(batch, dtype=torch.int64)
    scored_B = torch.empty(batch, dtype=torch.int64)
    marks_BT = torch.empty((batch, tokens), dtype=torch.int8)
    native.for_rows(
        native.function("fl_green_count", "qqpqqqpqpqqqqQIiiippp"),
        batch,
        tokens * 16,
        ids_BT.data_ptr(),
        *ids_BT.stride(),
        tokens,
        None if lengths_B is None else lengths_B.data_ptr(),
        0 if lengths_B is None else lengths_B.stride(0),
        None if context_BH is None else context_BH.data_ptr(),
        *((0, 0) if context_BH is None else context_BH.stride()),
        0 if context_BH is None else context_BH.shape[1],
        columns(context_width, scheme),
        unsigned_key(key),
        threshold(gamma),
        SCHEME_CODES[scheme],
        DEDUP_CODES[dedup],
        int(pad_left),
        count_B.data_ptr(),
        scored_B.data_ptr(),
        marks_BT.data_ptr(),
    )
    if batch and int(count_B.min()) < 0:
        raise MemoryError(f"green_count: no memory for rows of {tokens} tokens")
    return count_B, scored_B, marks_BT
