"""Sampling by the Gumbel-max trick with counter-based noise: argmax_v (l_v / T + g_v), g = -ln(-ln u).

u_v = (floor(w_v / 2^8) + 1) / (2^24 + 1), divided in float64 and rounded once to float32; w_v is the word of token v
  keyed     by the context: w = prf(context, v, key, "philox"), the watermark of Aaronson, bit for bit that of vLLM's
            native Gumbel watermark (function "philox4x32-10-v1"): P(v) over keys is softmax(l / T), given a key fixed
  seeded    by (seed, position): the same token words under the state Philox((0x464C5331, position, position >> 32, 0),
            seed), a stream that never meets the key's; ordinary sampling that does not depend on the batch

Truncation comes before the noise, in Hugging Face's order: temperature, top-k (ties with the k-th stay), top-p (the
smallest set with at least that mass, ties stay, never empty), min-p (at least that share of the largest probability).
No probability and no noise of length V is stored: block maxima bound which tokens can win, and logarithms are taken of
those alone.
"""

from __future__ import annotations

import math

import torch

from ... import library
from ..prf import prf
from ..prf.keys import signed_key
from .reference import uniforms
from .spec import SPECS

library.define(SPECS)
_gumbel_sample = torch.ops.fairlead.gumbel_sample.default

__all__ = ["gumbel_sample", "gumbel_uniform"]


def gumbel_sample(
    logits_BV: torch.Tensor,
    context_BH: torch.Tensor | None = None,
    *,
    key: int | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    rows: torch.Tensor | None = None,
    return_logprob: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row; ties go to the lowest id.

    logits_BV: float32, float16, bfloat16 (float64 by the reference), any strides; -inf is never drawn.
    Noise: either context_BH (integer ids, oldest first, -1 = missing) with key in [0, 2^64), or seeds and positions, both
    integer [B]. temperature: above 0, a number or float [B]. top_k >= 1, top_p in (0, 1], min_p in [0, 1]: None = off.
    rows: bool [B], False = this row is not drawn and gets -1.
    Returns ids_B (int64) and, with return_logprob, the float32 [B] log-probability of each drawn token under the
    tempered, truncated distribution (0 for rows that are not drawn).
    ValueError / TypeError on anything else; on the CPU also for a row with NaN, +inf or nothing but -inf (on a GPU,
    where a check would wait for the device, such a row gets the id -2).
    """
    batch = _check(logits_BV, rows)
    if (context_BH is None) == (seeds is None):
        raise ValueError("noise: either context_BH with key, or seeds with positions is needed")
    if context_BH is not None:
        if key is None:
            raise ValueError("key: is needed with context_BH")
        if context_BH.dim() != 2 or context_BH.shape[0] != batch or context_BH.dtype.is_floating_point:
            raise ValueError(f"context_BH: integer ids of shape [{batch}, width] are needed, not {list(context_BH.shape)}")
        context_BH, key = context_BH.to(torch.int64), signed_key(key)
    else:
        if seeds is None or positions is None:
            raise ValueError("positions: are needed with seeds")
        for name, value in (("seeds", seeds), ("positions", positions)):
            if value.shape != (batch,) or value.dtype.is_floating_point:
                raise ValueError(f"{name}: integers of shape [{batch}] are needed, not {list(value.shape)}")
        seeds, positions, key = seeds.to(torch.int64), positions.to(torch.int64), 0
    single, per_row = _temperature(temperature, batch, logits_BV.device)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: 1 or more is needed, not {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: a mass in (0, 1] is needed, not {top_p}")
    if min_p is not None and not 0.0 <= min_p <= 1.0:
        raise ValueError(f"min_p: a share in [0, 1] is needed, not {min_p}")
    ids_B, logprob_B = _gumbel_sample(
        logits_BV, context_BH, key, seeds, positions, single, per_row, int(top_k or 0),
        1.0 if top_p is None else float(top_p), 0.0 if min_p is None else float(min_p), rows, return_logprob,
    )  # fmt: skip
    if not torch.compiler.is_compiling() and logits_BV.device.type == "cpu" and batch:
        worst, at = ids_B.min(0)
        if int(worst) < -1:
            raise ValueError(f"logits_BV: row {int(at)} has NaN, +inf or nothing above -inf, so no token can be drawn")
    return (ids_B, logprob_B) if return_logprob else ids_B


def gumbel_uniform(context_BH: torch.Tensor, vocab_size: int, *, key: int) -> torch.Tensor:
    """The keyed uniforms u_v of the whole vocabulary after each context, float32 [B, V] in (0, 1): the numbers behind
    `gumbel_sample`'s noise, for schemes that need more of them than the winner."""
    if vocab_size < 1:
        raise ValueError(f"vocab_size: 1 or more is needed, not {vocab_size}")
    tokens_BV = torch.arange(vocab_size, device=context_BH.device).expand(context_BH.shape[0], vocab_size)
    return uniforms(prf(context_BH, tokens_BV, key=key, function="philox"))


def _check(logits_BV: torch.Tensor, rows: torch.Tensor | None) -> int:
    if not isinstance(logits_BV, torch.Tensor) or logits_BV.dim() != 2 or not logits_BV.dtype.is_floating_point:
        raise TypeError("logits_BV: a floating tensor of shape [batch, vocabulary] is needed")
    batch, vocabulary = logits_BV.shape
    if vocabulary == 0 and batch:
        raise ValueError("logits_BV: a vocabulary of at least one token is needed")
    if rows is not None and (rows.dtype != torch.bool or rows.shape != (batch,)):
        raise ValueError(f"rows: bool [{batch}] is needed, not {rows.dtype} {list(rows.shape)}")
    return batch


def _temperature(
    temperature: float | torch.Tensor, batch: int, device: torch.device
) -> tuple[float, torch.Tensor | None]:
    if isinstance(temperature, torch.Tensor):
        if temperature.shape != (batch,):
            raise ValueError(f"temperature: a number or float [{batch}] is needed, not {list(temperature.shape)}")
        if not torch.compiler.is_compiling() and device.type == "cpu" and batch and not float(temperature.min()) > 0:
            raise ValueError(f"temperature: above 0 is needed, not {float(temperature.min())}")
        return 1.0, temperature.to(device=device, dtype=torch.float32)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: a finite number above 0 is needed, not {temperature}")
    return float(temperature), None
