"""Scores of the Gumbel watermark for whole texts: S = sum over scored tokens of -ln(1 - u), Gamma(n, 1) without the mark.

u is the keyed uniform of `gumbel_sample`, float32, and 1 - u and its logarithm are float64; u is never 1, so a score is at
most ln 2^24 = 16.64. The p-value of S is the upper regularised gamma function Q(n, S). Repeated draws carry no new evidence
and make p-values too small (Fernandez et al. 2023, arXiv:2308.00113), so each is scored once. Under the mark a context that
comes back takes the same token again, which is why contexts rather than pairs are told apart by default.
"""

from __future__ import annotations

import torch

from ... import checks, library
from ..prf.keys import signed_key
from .spec import SPECS

library.define(SPECS)
_gumbel_score = torch.ops.fairlead.gumbel_score.default
WIDEST = 4096
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
    ids_BT = checks.ids(ids_BT, "ids_BT", "batch, tokens")
    if lengths_B is not None:
        lengths_B = checks.per_row(lengths_B, "lengths_B", "integer", ids_BT)
    if context_BH is not None:
        context_BH = checks.ids(context_BH, "context_BH", "batch, context")
        checks.beside(context_BH, "context_BH", ids_BT, "ids_BT")
    checks.one_of(dedup, "dedup", DEDUP)
    if isinstance(context_width, bool) or not isinstance(context_width, int):
        raise TypeError(f"context_width: an integer is needed, not {checks.describe(context_width)}")
    if not 0 <= context_width <= WIDEST:
        raise ValueError(f"context_width: 0 to {WIDEST} is needed, not {context_width}")
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _gumbel_score(
        ids_BT, lengths_B, context_BH, signed_key(key), context_width, dedup, checks.flag(pad_left, "pad_left")
    )
    return result
