"""The rows of a linear layer's per-sample statistics, however they come: padded, packed or one per sample.

Activations [N, I], output gradients [N, O], and edges of the samples: what the operations on per-sample gradients take.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ... import checks


@dataclass(frozen=True)
class Rows:
    """activations [N, I], grads [N, O], offsets int64 [B + 1], mask bool [N] or None, single: each row is a sample."""

    activations: torch.Tensor
    grads: torch.Tensor
    offsets: torch.Tensor
    mask: torch.Tensor | None
    single: bool


def rows(
    activations: torch.Tensor,
    output_grads: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> Rows:
    """Check the arguments of a public function and flatten them.

    [B, T, I] and [B, T, O]: padded, mask [B, T]. [N, I] and [N, O] with cu_seqlens [B + 1]: packed, mask [N]. The same
    without cu_seqlens: one row per sample.
    """
    for name, value in (("activations_BTI", activations), ("output_grads_BTO", output_grads)):
        if not isinstance(value, torch.Tensor) or value.dim() not in (2, 3) or not value.is_floating_point():
            found = checks.describe(value)
            raise TypeError(f"{name}: a floating tensor of 3 dimensions, or 2 (packed), is needed, not {found}")
    shape = activations.shape[:-1]
    if output_grads.shape[:-1] != shape:
        raise ValueError(
            f"output_grads_BTO: {list(shape)} rows, as activations_BTI, not {list(output_grads.shape[:-1])}"
        )
    if output_grads.dtype != activations.dtype or output_grads.device != activations.device:
        found = f"{checks.describe(output_grads)} on {output_grads.device}"
        wanted = f"{checks.describe(activations)} on {activations.device}"
        raise ValueError(
            f"output_grads_BTO: the dtype and device of activations_BTI are needed ({wanted}), not {found}"
        )
    count = int(shape[0]) * int(shape[1]) if len(shape) == 2 else int(shape[0])
    kept = _mask(mask, shape, activations.device)
    if len(shape) == 2:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens: for packed rows [N, I] alone, these are padded [B, T, I]")
        step = int(shape[1])
        offsets = torch.arange(int(shape[0]) + 1, device=activations.device) * step
    elif cu_seqlens is None:
        step, offsets = 1, torch.arange(count + 1, device=activations.device)
    else:
        step, offsets = 0, checks.offsets(cu_seqlens, "cu_seqlens", count, activations.device)
    a_NI = activations.detach().reshape(count, activations.shape[-1])
    g_NO = output_grads.detach().reshape(count, output_grads.shape[-1])
    return Rows(a_NI, g_NO, offsets, kept, step == 1)


def _mask(mask: torch.Tensor | None, shape: torch.Size, device: torch.device) -> torch.Tensor | None:
    if mask is None:
        return None
    good = isinstance(mask, torch.Tensor) and mask.shape == shape and mask.device == device
    if not good or not (mask.dtype == torch.bool or checks.is_integer(mask.dtype)):
        raise ValueError(f"mask_BT: bools or 0/1 {list(shape)} on {device} are needed, not {checks.describe(mask)}")
    return mask.reshape(-1) != 0


def dense_samples(
    activations_NI: torch.Tensor, grads_NO: torch.Tensor, offsets: torch.Tensor, mask_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Rows that count, wide enough to be summed (float32, or float64), and their edges as numbers."""
    wide = torch.float64 if activations_NI.dtype == torch.float64 else torch.float32
    if mask_N is not None:
        before = torch.cat([mask_N.new_zeros(1, dtype=torch.int64), mask_N.cumsum(0)])
        activations_NI, grads_NO, offsets = activations_NI[mask_N], grads_NO[mask_N], before[offsets]
    return activations_NI.to(wide), grads_NO.to(wide), offsets.tolist()


def without_masked(values_ND: torch.Tensor, mask_N: torch.Tensor | None) -> torch.Tensor:
    """Masked rows as zeros, whatever they held."""
    return values_ND if mask_N is None else values_ND.masked_fill(~mask_N[:, None], 0.0)
