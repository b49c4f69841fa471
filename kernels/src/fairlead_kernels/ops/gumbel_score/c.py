"""Calls kernel.c."""

from __future__ import annotations

import torch

from ... import native
from ..green_count.c import DEDUP_CODES
from ..prf.keys import unsigned_key
from .reference import Scores


def gumbel_score(
    ids_BT: torch.Tensor,
    lengths_B: torch.Tensor | None,
    context_BH: torch.Tensor | None,
    key: int,
    context_width: int,
    dedup: str,
    pad_left: bool,
) -> Scores:
    batch, tokens = ids_BT.shape
    sums_B = torch.empty(batch, dtype=torch.float64)
    scored_B = torch.empty(batch, dtype=torch.int64)
    marks_BT = torch.empty((batch, tokens), dtype=torch.float64)
    native.for_rows(
        native.function("fl_gumbel_score", "qqpqqqpqpqqqqQiippp"),
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
        context_width,
        unsigned_key(key),
        DEDUP_CODES[dedup],
        int(pad_left),
        sums_B.data_ptr(),
        scored_B.data_ptr(),
        marks_BT.data_ptr(),
    )
    if batch and int(scored_B.min()) < 0:
        raise MemoryError(f"gumbel_score: no memory for rows of {tokens} tokens")
    return sums_B, scored_B, marks_BT
