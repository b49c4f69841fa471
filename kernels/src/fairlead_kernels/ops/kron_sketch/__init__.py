"""A sketch of each sample's gradient of a linear layer that keeps inner products: P_o G P_a^T / sqrt(k).

Each side is projected before the outer product, so that no gradient is made: sum_t (P_o g_t)(P_a a_t)^T. P_o and P_a hold
+-1 drawn by the keyed function `prf` from (seed, layer) and are made again at each call, never stored. The expectation of
<phi_b, phi_c> over seeds is <G_b, G_c> (Johnson and Lindenstrauss 1984; factored as in LoGra, arXiv 2405.13954), with a
higher variance than a dense projection of the same k. Sketches are comparable at equal seed, layer and sizes only.
"""

from __future__ import annotations

from typing import Any

import torch

from ... import library
from ..fisher_diag_linear.layout import rows
from ..prf.keys import signed_key
from .spec import SPECS

library.define(SPECS)
_kron_sketch = torch.ops.fairlead.kron_sketch.default

__all__ = ["kron_sketch"]


def kron_sketch(
    activations_BTI: torch.Tensor,
    output_grads_BTO: torch.Tensor,
    mask_BT: torch.Tensor | None = None,
    *,
    seed: int,
    layer: int = 0,
    size: tuple[int, int] = (32, 32),
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """A row of k = k_o k_a numbers per sample.

    activations_BTI, output_grads_BTO, mask_BT, cu_seqlens: as of `fisher_diag_linear`. seed: an integer in [0, 2^64), to
    be saved beside the sketches. layer: an integer in [0, 2^31), another one per layer. size: (k_o, k_a).
    Returns float32 [B, k] (float64 of float64): row-major [k_o, k_a]. Not differentiable.
    """
    try:
        key = signed_key(seed)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("key:", "seed:")) from None
    number(layer, "layer", 0)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError("size: two integers (k_o, k_a) are needed")
    k_out, k_in = (number(value, "size", 1) for value in size)
    given = rows(activations_BTI, output_grads_BTO, mask_BT, cu_seqlens)
    out_BK: torch.Tensor = _kron_sketch(
        given.activations, given.grads, given.offsets, given.mask, key, layer, k_out, k_in, given.single
    )
    return out_BK


def number(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        found = value if isinstance(value, (int, float)) else type(value).__name__
        raise ValueError(f"{name}: an integer in [{least}, 2^31) is needed, not {found}")
    return value
