"""Calls kernel.c."""

from __future__ import annotations

import torch

from ... import native
from ..prf.keys import unsigned_key
from .reference import Drawn


def gumbel_sample(
    logits_BV: torch.Tensor,
    context_BH: torch.Tensor | None,
    key: int,
    seeds: torch.Tensor | None,
    positions: torch.Tensor | None,
    temperature: float,
    temperature_B: torch.Tensor | None,
    top_k: int,
    top_p: float,
    min_p: float,
    rows: torch.Tensor | None,
    want_logprob: bool,
) -> Drawn:
    batch, vocabulary = logits_BV.shape
    ids_B = torch.empty(batch, dtype=torch.int64)
    logprob_B = torch.empty(batch, dtype=torch.float32)
    if batch == 0:
        return ids_B, logprob_B
    native.for_rows(
        native.function("fl_gumbel_sample", "qqpqqiqpqqqQpqpqdpqqddpqipp"),
        batch,
        vocabulary * 4,
        logits_BV.data_ptr(),
        *logits_BV.stride(),
        native.DTYPE_CODES[logits_BV.dtype],
        vocabulary,
        None if context_BH is None else context_BH.data_ptr(),
        *((0, 0, 0) if context_BH is None else (*context_BH.stride(), context_BH.shape[1])),
        unsigned_key(key),
        None if seeds is None else seeds.data_ptr(),
        0 if seeds is None else seeds.stride(0),
        None if positions is None else positions.data_ptr(),
        0 if positions is None else positions.stride(0),
        temperature,
        None if temperature_B is None else temperature_B.data_ptr(),
        0 if temperature_B is None else temperature_B.stride(0),
        top_k,
        top_p,
        min_p,
        None if rows is None else rows.data_ptr(),
        0 if rows is None else rows.stride(0),
        int(want_logprob),
        ids_B.data_ptr(),
        logprob_B.data_ptr(),
    )
    if int(ids_B.min()) == -3:
        raise MemoryError(f"gumbel_sample: no memory for rows of {vocabulary} logits")
    return ids_B, logprob_B


def gumbel_uniform(context_BH: torch.Tensor, key: int, vocabulary: int) -> torch.Tensor:
    batch, width = context_BH.shape
    out_BV = torch.empty((batch, vocabulary), dtype=torch.float32)
    native.for_rows(
        native.function("fl_gumbel_uniform", "qqpqqqQqp"),
        batch,
        vocabulary * 4,
        context_BH.data_ptr(),
        *context_BH.stride(),
        width,
        unsigned_key(key),
        vocabulary,
        out_BV.data_ptr(),
    )
    return out_BV
