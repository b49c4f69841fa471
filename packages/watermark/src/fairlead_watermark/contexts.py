"""What stands before a token: context windows recomputed from the ids at every step, repeats, padding on any side.

-1 is padding or "nothing there". Shape suffixes: B rows, T tokens, H context tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fairlead.errors import InputError

MISSING = -1


def last(ids_BT: torch.Tensor, width: int) -> torch.Tensor:
    """The context of the next token: the last `width` ids, [B, H], with -1 where the text is shorter."""
    if width <= ids_BT.shape[1]:
        return ids_BT[:, ids_BT.shape[1] - width :]
    missing = ids_BT.new_full((ids_BT.shape[0], width - ids_BT.shape[1]), MISSING)
    return torch.cat([missing, ids_BT], 1)


def hide_padding(ids_BT: torch.Tensor, pad_token_id: int | None) -> torch.Tensor:
    """Leading padding tokens become -1, so that a left-padded row has the contexts of the row alone."""
    if pad_token_id is None or ids_BT.numel() == 0:
        return ids_BT
    begun_BT = (ids_BT != pad_token_id).cumsum(1) > 0
    return ids_BT.masked_fill(~begun_BT, MISSING)


def answers(ids_BT: torch.Tensor, start: int | torch.Tensor) -> torch.Tensor:
    """The ids with everything before column `start` (one number, or one per row) hidden as -1."""
    before_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < _per_row(start)
    return ids_BT.masked_fill(before_BT, MISSING)


def repeats(ids_BT: torch.Tensor, width: int, start: int | torch.Tensor = 0) -> torch.Tensor:
    """Whether the next token's context stood before an earlier token in a column >= start (one number, or int64 [B])
    of the row: bool [B]."""
    length = ids_BT.shape[1]
    first = max(int(start) if not isinstance(start, torch.Tensor) else int(start.min()) if len(start) else 0, width)
    if length <= first or width == 0:
        earlier = torch.as_tensor(start, device=ids_BT.device) < length
        return (earlier & (width == 0)).expand(ids_BT.shape[0])
    context_BH = ids_BT[:, length - width :]
    # Window j - width .. j - 1 is the context of token j, for first <= j < length.
    same_BT = torch.ones((ids_BT.shape[0], length - first), dtype=torch.bool, device=ids_BT.device)
    for offset in range(width):
        same_BT &= ids_BT[:, first - width + offset : length - width + offset] == context_BH[:, offset, None]
    if isinstance(start, torch.Tensor):
        same_BT &= torch.arange(first, length, device=ids_BT.device) >= _per_row(start)
    return same_BT.any(1)


def _per_row(start: int | torch.Tensor) -> int | torch.Tensor:
    return start[:, None] if isinstance(start, torch.Tensor) else start


def as_tensor(values: Any, name: str) -> torch.Tensor:
    """A tensor of numbers in any form; InputError when the form is ragged or holds something else."""
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name}: a tensor or rectangular nested list of numbers is needed, got {type(values).__name__}") from None


@dataclass(frozen=True)
class Texts:
    """Texts aligned to the left: ids_BT with -1 behind the end, lengths_B, and `source_BT`, the column of the input that
    each token came from. `whole`: there was no padding."""

    ids_BT: torch.Tensor
    lengths_B: torch.Tensor
    source_BT: torch.Tensor
    shape: torch.Size
    whole: bool = False

    def restore(self, values_BT: torch.Tensor) -> torch.Tensor:
        """Per-token values float64 back in the columns of the input, NaN where there is no token."""
        if values_BT.dtype == torch.float64 and self.whole:
            return values_BT
        width = max(self.shape[1], 1)
        out = torch.full((self.shape[0], width), torch.nan, dtype=torch.float64, device=values_BT.device)
        inside = torch.arange(self.ids_BT.shape[1], device=values_BT.device) < self.lengths_B[:, None]
        rows, columns = inside.nonzero(as_tuple=True)
        out[rows, self.source_BT[rows, columns]] = values_BT[rows, columns].double()
        return out[:, : self.shape[1]]


def texts(ids: torch.Tensor, attention_mask: torch.Tensor | None, vocab_size: int) -> Texts:
    """Check ids [B, T] (or [T]) and move every row's tokens to the left. InputError for ids outside the vocabulary,
    shapes that do not fit, ids that are no integers, and a mask with a gap inside a row."""
    ids = as_tensor(ids, "ids")
    if ids.dim() == 1:
        ids = ids[None]
        attention_mask = None if attention_mask is None else as_tensor(attention_mask, "attention_mask").reshape(1, -1)
    if ids.dim() != 2 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        if ids.dim() == 2 and ids.numel() == 0:
            ids = ids.to(torch.int64)
        else:
            raise InputError(f"ids: integer token ids of shape [B, T] are needed, got {ids.dtype} {list(ids.shape)}")
    ids = ids.to(torch.int64)
    if attention_mask is None:
        if ids.numel() == 0 or (int(ids.amin()) >= 0 and int(ids.amax()) < vocab_size):
            return _whole(ids)
        real_BT = torch.ones_like(ids, dtype=torch.bool)
    else:
        real_BT = as_tensor(attention_mask, "attention_mask").to(ids.device).bool()
        if real_BT.shape != ids.shape:
            raise InputError(f"attention_mask: shape {list(ids.shape)} of the ids is needed, got {list(real_BT.shape)}")
    outside_BT = real_BT & ((ids < 0) | (ids >= vocab_size))
    if bool(outside_BT.any()):
        row, column = (int(i) for i in outside_BT.nonzero()[0])
        raise InputError(
            f"ids: row {row}, column {column} holds {int(ids[row, column])}, outside the vocabulary of {vocab_size}; "
            "mask padding with attention_mask, or use the vocabulary the text was made with"
        )
    if bool(real_BT.all()):
        return _whole(ids)
    begins_B = (real_BT & ~torch.nn.functional.pad(real_BT[:, :-1], (1, 0))).sum(1)
    if bool((begins_B > 1).any()):
        row = int((begins_B > 1).nonzero()[0])
        raise InputError(f"attention_mask: row {row} has a gap between tokens; padding may stand on either side alone")
    order_BT = (~real_BT).to(torch.int8).sort(dim=1, stable=True).indices
    aligned_BT = ids.masked_fill(~real_BT, MISSING).gather(1, order_BT)
    return Texts(aligned_BT, real_BT.sum(1), order_BT, ids.shape)


def _whole(ids: torch.Tensor) -> Texts:
    """Texts without padding."""
    columns_BT = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    lengths_B = torch.full((ids.shape[0],), ids.shape[1], dtype=torch.int64, device=ids.device)
    return Texts(ids, lengths_B, columns_BT, ids.shape, whole=True)
