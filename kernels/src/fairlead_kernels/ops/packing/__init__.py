"""Sequences of different lengths in one row without padding, and back.

    for members in best_fit(lengths, token_budget=8192):
        batch = pack([sequences[i] for i in members])
        ...model over batch.input_ids, batch.position_ids, batch.cu_seqlens...
        padded_ST = unpack(per_token_N, batch)

`best_fit` chooses who shares a row, `pack` joins ids (or padded ids, or padded rows of any kind), `unpack` pads again.
Copies are one pass per call, differentiable; attention must stay within segments, which is the model's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from ... import checks, library
from .best_fit import best_fit
from .spec import SPECS

library.define(SPECS)
_pack_rows = torch.ops.fairlead.pack_rows.default
_unpack_rows = torch.ops.fairlead.unpack_rows.default

__all__ = ["PackedBatch", "best_fit", "pack", "unpack"]


@dataclass(frozen=True)
class PackedBatch:
    """S sequences in one row of N tokens.

    input_ids: [N], or [N, ...] where rows other than ids were packed. position_ids: int64 [N], from 0 in each sequence.
    cu_seqlens: int32 [S + 1], sequence s is [cu_seqlens[s], cu_seqlens[s + 1]). max_length: of a sequence.
    seg_to_group: int32 [S] or None, the group (prompt) of each. response_start: int32 [S] or None, where its response
    begins, counted inside the sequence (the length of its prompt).
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int
    seg_to_group: torch.Tensor | None = None
    response_start: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> torch.Tensor:
        """int32 [S]."""
        return self.cu_seqlens.diff()

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in values.items()}
        return PackedBatch(**moved)


def pack(
    sequences: Sequence[Sequence[int] | torch.Tensor] | torch.Tensor,
    lengths: Sequence[int] | torch.Tensor | None = None,
    *,
    left: bool = False,
    seg_to_group: Sequence[int] | torch.Tensor | None = None,
    response_start: Sequence[int] | torch.Tensor | None = None,
) -> PackedBatch:
    """Join sequences, in their order.

    sequences: a list of token lists or integer tensors [T_s]; or one padded tensor [B, T, ...] of any dtype with
    lengths [B] (0 is allowed), its padding to the right, or to the `left` of the tokens.
    Lengths come from you, never from a pad id: that may be a token. Differentiable in a padded floating tensor.
    ValueError: an empty sequence in a list, lengths outside [0, T], seg_to_group or response_start that do not fit.
    """
    if isinstance(sequences, torch.Tensor):
        rows_N, position_N, cu_seqlens, longest = _pack_padded(sequences, lengths, left)
    else:
        if lengths is not None or left:
            raise ValueError("lengths: only for a padded tensor; a list of sequences has its own")
        rows_N, position_N, cu_seqlens, longest = _pack_list(sequences)
    count = cu_seqlens.shape[0] - 1
    group_S = _per_sequence(seg_to_group, "seg_to_group", count, cu_seqlens)
    start_S = _per_sequence(response_start, "response_start", count, cu_seqlens)
    if start_S is not None and start_S.device.type == "cpu" and bool((start_S > cu_seqlens.diff()).any()):
        raise ValueError("response_start: at most the length of the sequence is needed")
    return PackedBatch(rows_N, position_N, cu_seqlens, longest, group_S, start_S)


def unpack(
    values_N: torch.Tensor,
    batch: PackedBatch | torch.Tensor,
    *,
    width: int | None = None,
    fill: float = 0,
    left: bool = False,
) -> torch.Tensor:
    """Pad packed rows again: [N, ...] -> [S, width, ...], the inverse of `pack`.

    batch: the PackedBatch, or cu_seqlens [S + 1]. width: at least the longest sequence, which is the default.
    fill: what stands in the padding, to the right or to the `left`. Differentiable in values_N.
    """
    if not isinstance(values_N, torch.Tensor) or values_N.dim() < 1:
        raise TypeError(f"values_N: a tensor [N, ...] is needed, not {checks.describe(values_N)}")
    edges = batch.cu_seqlens if isinstance(batch, PackedBatch) else batch
    offsets = checks.offsets(edges, "batch", values_N.shape[0], values_N.device)
    if isinstance(batch, PackedBatch):
        longest = batch.max_length
    else:
        longest = int(offsets.diff().max()) if offsets.shape[0] > 1 else 0
    width = longest if width is None else width
    if isinstance(width, bool) or not isinstance(width, int) or width < longest:
        raise ValueError(
            f"width: an integer of at least the longest sequence, {longest}, is needed, not {checks.describe(width)}"
        )
    checks.number(fill, "fill")
    flat_ND = values_N.reshape(values_N.shape[0], _depth(values_N))
    padded_STD: torch.Tensor = _unpack_rows(flat_ND, offsets, width, fill, bool(left))
    return padded_STD.reshape(offsets.shape[0] - 1, width, *values_N.shape[1:])


def _depth(values: torch.Tensor, dimension: int = 1) -> int:
    return int(torch.Size(values.shape[dimension:]).numel())


def _pack_padded(
    values_BT: torch.Tensor, lengths: Any, left: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    if values_BT.dim() < 2:
        raise ValueError(f"sequences: a padded tensor [B, T, ...] is needed, not {checks.describe(values_BT)}")
    batch, width = values_BT.shape[:2]
    if lengths is None:
        raise ValueError("lengths: a padded tensor needs the number of tokens of each row")
    try:
        lengths_B = (
            lengths if isinstance(lengths, torch.Tensor) else torch.tensor(list(lengths), device=values_BT.device)
        )
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"lengths: {batch} integers are needed, not {checks.describe(lengths)}") from error
    if lengths_B.numel() == 0:
        lengths_B = lengths_B.to(torch.int64)
    if lengths_B.shape != (batch,) or not checks.is_integer(lengths_B.dtype) or lengths_B.device != values_BT.device:
        raise ValueError(
            f"lengths: integers [{batch}] on {values_BT.device} are needed, not {checks.describe(lengths_B)}"
        )
    # One wait for the device: the size of the packed tensor must be known.
    total, low, longest = (
        int(x) for x in (lengths_B.sum(), *(lengths_B.aminmax() if batch else (lengths_B.sum(),) * 2))
    )
    if low < 0 or longest > width:
        raise ValueError(f"lengths: in [0, {width}] are needed, not {low if low < 0 else longest}")
    offsets = torch.zeros(batch + 1, dtype=torch.int64, device=values_BT.device)
    offsets[1:] = lengths_B.cumsum(0)
    flat_BTD = values_BT.reshape(batch, width, _depth(values_BT, 2))
    rows_ND, position_N = _pack_rows(flat_BTD, offsets, total, bool(left))
    return rows_ND.reshape(total, *values_BT.shape[2:]), position_N, offsets.to(torch.int32), longest


def _pack_list(sequences: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    try:
        parts = [x if isinstance(x, torch.Tensor) else torch.tensor(list(x)) for x in sequences]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError("sequences: lists of integers or integer tensors are needed") from error
    for i, part in enumerate(parts):
        if part.dim() == 1 and part.shape[0] == 0:
            raise ValueError(f"sequences: number {i} is empty")
        if part.dim() != 1 or not checks.is_integer(part.dtype):
            raise TypeError(f"sequences: integer ids [T] are needed, number {i} is {checks.describe(part)}")
        if part.device != parts[0].device:
            raise ValueError(f"sequences: number {i} is on {part.device}, the first on {parts[0].device}")
    sizes = [part.shape[0] for part in parts]
    device = parts[0].device if parts else torch.device("cpu")
    offsets = torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0).to(device)
    ids_N = torch.cat([part.to(torch.int64) for part in parts]) if parts else torch.empty(0, dtype=torch.int64)
    starts_N = torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=sum(sizes))
    position_N = torch.arange(sum(sizes), device=device) - starts_N
    return ids_N, position_N, offsets.to(torch.int32), max(sizes, default=0)


def _per_sequence(value: Any, name: str, count: int, beside: torch.Tensor) -> torch.Tensor | None:
    if value is None:
        return None
    try:
        given = value if isinstance(value, torch.Tensor) else torch.as_tensor(list(value), device=beside.device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name}: {count} integers are needed") from error
    if given.shape != (count,) or (count and not checks.is_integer(given.dtype)) or given.device != beside.device:
        raise ValueError(f"{name}: integers [{count}] on {beside.device} are needed, not {checks.describe(given)}")
    if given.device.type == "cpu" and count and int(given.min()) < 0:
        raise ValueError(f"{name}: at least 0 is needed, not {int(given.min())}")
    return given.to(torch.int32)
