"""Scores of the Gumbel watermark for whole texts: S = sum over scored tokens of -ln(1 - u), Gamma(n, 1) without the mark.

u is the keyed uniform of `gumbel_sample`, float32, and 1 - u and its logarithm are float64. Repeated draws carry no new
evidence and make p-values too small (Fernandez et al. 2023, arXiv:2308.00113), so each is scored once.
"""

from __future__ import annotations

import torch

from ... import library
from ..prf.keys import signed_key
from .spec import SPECS

library.define(SPECS)
_gumbel_score = torch.ops.fairlead.gumbel_score.default
DEDUP = ("pair", "context", "none")

__all__ = ["gumbel_score"]


def gumbel_score(
    ids_BT: torch.Tensor,
    lengths_B: torch.Tensor | None = None,
    *,
    key: int,
    context_width: int = 4,
    dedup: str = "context",
    context_BH: torch.Tensor | None = None,
    pad_left: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum the scores of each row.

    ids_BT: integer ids; a negative one is not scored and, in a context, missing. lengths_B: integer, tokens of each row
    (default all). key: in [0, 2^64). context_width: tokens of context. dedup: "context" scores each context once, "pair"
    each (context, token) once, "none" everything. context_BH: the ids before column 0, oldest first, -1 = missing.
    pad_left: score tokens whose context has missing ids as well, with -1 in their places.
    Returns score_B (float64), scored_B (int64) and tokens_BT (float64, NaN = not scored).
    ValueError / TypeError on anything else.
    """
    if not isinstance(ids_BT, torch.Tensor) or ids_BT.dim() != 2 or ids_BT.dtype.is_floating_point:
        raise TypeError("ids_BT: integer ids of shape [batch, tokens] are needed")
    batch = ids_BT.shape[0]
    if lengths_B is not None and (lengths_B.dtype.is_floating_point or lengths_B.shape != (batch,)):
        raise ValueError(f"lengths_B: integers of shape [{batch}] are needed, not {list(lengths_B.shape)}")
    if context_BH is not None and (
        context_BH.dim() != 2 or context_BH.dtype.is_floating_point or context_BH.shape[0] != batch
    ):
        raise ValueError(f"context_BH: integer ids of shape [{batch}, width] are needed, not {list(context_BH.shape)}")
    if dedup not in DEDUP:
        raise ValueError(f"dedup: one of {', '.join(DEDUP)} is needed, not {dedup!r}")
    if context_width < 0:
        raise ValueError(f"context_width: 0 or more is needed, not {context_width}")
    as_int64 = [None if value is None else value.to(torch.int64) for value in (lengths_B, context_BH)]
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _gumbel_score(
        ids_BT.to(torch.int64), *as_int64, signed_key(key), int(context_width), dedup, pad_left
    )
    return result
