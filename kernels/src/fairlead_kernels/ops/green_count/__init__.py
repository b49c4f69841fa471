"""Green tokens of whole texts, the statistic of every green-list detector: count and number of scored tokens per row.

A token is scored when its context is known, and only the first time that its random bit is drawn, because repeats carry
no new evidence and make p-values too small (Fernandez et al. 2023, arXiv:2308.00113). What draws the bit:
lefthash the pair (context, token); minhash the pair (selected context token, token); selfhash the minimum m(v), which
decides alone. The lists are those of `watermark_bias`.
"""

from __future__ import annotations

import torch

from ... import library
from ..prf.keys import signed_key
from .spec import SPECS

library.define(SPECS)
_green_count = torch.ops.fairlead.green_count.default
SCHEMES = ("lefthash", "minhash", "selfhash")
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
    if not isinstance(ids_BT, torch.Tensor) or ids_BT.dim() != 2 or ids_BT.dtype.is_floating_point:
        raise TypeError("ids_BT: integer ids of shape [batch, tokens] are needed")
    batch = ids_BT.shape[0]
    if lengths_B is not None and (lengths_B.dtype.is_floating_point or lengths_B.shape != (batch,)):
        raise ValueError(f"lengths_B: integers of shape [{batch}] are needed, not {list(lengths_B.shape)}")
    if context_BH is not None and (
        context_BH.dim() != 2 or context_BH.dtype.is_floating_point or context_BH.shape[0] != batch
    ):
        raise ValueError(f"context_BH: integer ids of shape [{batch}, width] are needed, not {list(context_BH.shape)}")
    if not 0.0 < gamma < 1.0:
        raise ValueError(f"gamma: a share in (0, 1) is needed, not {gamma}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: one of {', '.join(SCHEMES)} is needed, not {scheme!r}")
    if dedup not in DEDUP:
        raise ValueError(f"dedup: one of {', '.join(DEDUP)} is needed, not {dedup!r}")
    if context_width < (0 if scheme == "lefthash" else 1):
        raise ValueError(f"context_width: {scheme} needs at least {int(scheme != 'lefthash')}, not {context_width}")
    as_int64 = [None if value is None else value.to(torch.int64) for value in (lengths_B, context_BH)]
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _green_count(
        ids_BT.to(torch.int64), *as_int64, signed_key(key), float(gamma), int(context_width), scheme, dedup, pad_left
    )
    return result
