"""Soft and hard green lists in one pass over the logits: l'_v = l_v + delta * [v is green after the context].

Kirchenbauer et al. 2023 (arXiv:2301.10226), with lists drawn by the counter-based function mix32 of `prf` instead of a
permutation: word(v) < floor(gamma 2^32) makes v green, so list sizes are binomial and nothing of length V is stored.
With word_c the mix32 word after context c (Kirchenbauer et al. 2024, arXiv:2306.04634, for the second and third):
  lefthash  green iff word_(w_1..w_h)(v) < T
  minhash   green iff word_(w*)(v) < T, w* = the context token of smallest word_()(w), ties to the first
  selfhash  green iff word_()(m(v)) < T, m(v) = min of word_()(v) and word_(w_i)(v) over the context tokens
A missing context token (-1) counts as the token 2^32 - 1.
"""

from __future__ import annotations

import math

import torch

from ... import library
from ..prf.keys import signed_key
from .spec import SPECS

library.define(SPECS)
_functional = torch.ops.fairlead.watermark_bias.default
_in_place = torch.ops.fairlead.watermark_bias_.default
_to_out = torch.ops.fairlead.watermark_bias_out.default
SCHEMES = ("lefthash", "minhash", "selfhash")

__all__ = ["watermark_bias"]


def watermark_bias(
    logits_BV: torch.Tensor,
    context_BH: torch.Tensor,
    *,
    key: int,
    gamma: float = 0.25,
    delta: float = 2.0,
    scheme: str = "lefthash",
    rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add delta to the green tokens of each row's context; delta = inf makes every red token -inf (a hard list).

    logits_BV: float32, float16, bfloat16 (float64 by the reference), any strides; the sum is made in float32 and
    rounded once. -inf stays -inf, NaN stays NaN. context_BH: integer ids, oldest first, -1 = missing; selfhash with a
    context width of h counts the candidate, so H = h - 1. key: in [0, 2^64). gamma: share of green tokens, in (0, 1).
    rows: bool [B], False = leave this row alone. out: written and returned; `out=logits_BV` works in place (other
    overlaps of the two do not). Differentiable without `out` (red tokens of a hard list have no gradient).
    ValueError / TypeError on anything else.
    """
    _check(logits_BV, context_BH, gamma, delta, scheme, rows)
    if context_BH.dtype != torch.int64:
        context_BH = context_BH.to(torch.int64)
    settings = (context_BH, signed_key(key), float(gamma), float(delta), scheme, rows)
    if out is None:
        biased_BV: torch.Tensor = _functional(logits_BV, *settings)
        return biased_BV
    if out is logits_BV:
        _in_place(logits_BV, *settings)
        return out
    if out.shape != logits_BV.shape or out.dtype != logits_BV.dtype or out.device != logits_BV.device:
        raise ValueError(
            f"out: {logits_BV.dtype} {tuple(logits_BV.shape)} on {logits_BV.device} is needed, "
            f"not {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    _to_out(logits_BV, *settings, out)
    return out


def _check(
    logits_BV: torch.Tensor,
    context_BH: torch.Tensor,
    gamma: float,
    delta: float,
    scheme: str,
    rows: torch.Tensor | None,
) -> None:
    if not isinstance(logits_BV, torch.Tensor) or logits_BV.dim() != 2 or not logits_BV.dtype.is_floating_point:
        raise TypeError("logits_BV: a floating tensor of shape [batch, vocabulary] is needed")
    if not isinstance(context_BH, torch.Tensor) or context_BH.dim() != 2 or context_BH.dtype.is_floating_point:
        raise TypeError("context_BH: integer ids of shape [batch, context] are needed")
    if context_BH.shape[0] != logits_BV.shape[0]:
        raise ValueError(f"context_BH has {context_BH.shape[0]} rows, logits_BV has {logits_BV.shape[0]}")
    if context_BH.device != logits_BV.device:
        raise ValueError(f"context_BH is on {context_BH.device}, logits_BV on {logits_BV.device}")
    if not 0.0 < gamma < 1.0:
        raise ValueError(f"gamma: a share in (0, 1) is needed, not {gamma}")
    if math.isnan(delta) or delta < 0:
        raise ValueError(f"delta: 0 or more (inf = hard list) is needed, not {delta}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: one of {', '.join(SCHEMES)} is needed, not {scheme!r}")
    if scheme == "minhash" and context_BH.shape[1] == 0:
        raise ValueError("context_BH: minhash needs at least one context token")
    if rows is not None and (rows.dtype != torch.bool or rows.shape != logits_BV.shape[:1]):
        raise ValueError(f"rows: bool [{logits_BV.shape[0]}] is needed, not {rows.dtype} {list(rows.shape)}")
