"""Green tokens of whole texts, the statistic of every green-list detector: count and number of scored tokens per row.

A token is scored when its context is known, and only the first time that its random bit is drawn, because repeats carry
no new evidence and make p-values too small (Fernandez et al. 2023, arXiv:2308.00113). What draws the bit:
lefthash the pair (context, token); minhash the pair (selected context token, token); selfhash the minimum m(v), which
decides alone. The lists are those of `watermark_bias`.
"""

from __future__ import annotations

import torch

from ... import checks, library
from ..prf.keys import signed_key
from .spec import SPECS

library.define(SPECS)
_green_count = torch.ops.fairlead.green_count.default
SCHEMES = ("lefthash", "minhash", "selfhash")
WIDEST = 4096
DEDUP = ("pair", "context", "none")

__all__ = ["green_count"]


def green_count(
    ids_BT: torch.Tensor,
    lengths_B: torch.Tensor | None = None,
    *,
    key: int,
    gamma: float = 0.25,
    context_width: int = 1,
    scheme: str = "lefthash",
    dedup: str = "pair",
    context_BH: torch.Tensor | None = None,
    pad_left: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count the green tokens of each row.

    ids_BT: integer ids; a negative one is not scored and, in a context, missing. lengths_B: integer, tokens of each row
    (default all). key, gamma, scheme: as `watermark_bias`. context_width: tokens of context, for selfhash the candidate
    included. dedup: "pair" scores each draw once, "context" each context once (of selfhash: the context tokens without
    the candidate), "none" everything. context_BH: the ids before column 0, oldest first, -1 = missing. pad_left: score
    tokens whose context has missing ids as well, with -1 in their places.
    Returns count_B (int64, green), scored_B (int64) and tokens_BT (int8: 1 green, 0 red, -1 not scored).
    ValueError / TypeError on anything else.
    """
    ids_BT = checks.ids(ids_BT, "ids_BT", "batch, tokens")
    if lengths_B is not None:
        lengths_B = checks.per_row(lengths_B, "lengths_B", "integer", ids_BT)
    if context_BH is not None:
        context_BH = checks.ids(context_BH, "context_BH", "batch, context")
        checks.beside(context_BH, "context_BH", ids_BT, "ids_BT")
    gamma = checks.share(gamma)
    checks.one_of(scheme, "scheme", SCHEMES)
    checks.one_of(dedup, "dedup", DEDUP)
    least = int(scheme != "lefthash")
    if isinstance(context_width, bool) or not isinstance(context_width, int):
        raise TypeError(f"context_width: an integer is needed, not {checks.describe(context_width)}")
    if not least <= context_width <= WIDEST:
        raise ValueError(f"context_width: {least} to {WIDEST} is needed for {scheme}, not {context_width}")
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _green_count(
        ids_BT, lengths_B, context_BH, signed_key(key), gamma, context_width, scheme, dedup, bool(pad_left)
    )
    return result
