"""Sampling by the Gumbel-max trick with counter-based noise: argmax_v (l_v / T + g_v), g_v = -ln(-ln u_v).

The uniforms u_v are a function (`stream.py` has it) of the token and of either
  the key and the context   the watermark of Aaronson: over keys P(v) = softmax(l / T)_v, given a key the token is fixed.
                            Bit for bit vLLM's native Gumbel watermark ("philox4x32-10-v1").
  a seed and a position     ordinary sampling that does not depend on the batch; a stream that never meets the key's.

Truncation comes before the noise, in Hugging Face's order: temperature; top-k (ties with the k-th stay); top-p (the
smallest set of most probable tokens with at least that mass, ties with its last member stay, never empty); min-p (at least
that share of the largest probability). No probability and no noise of length V is stored: maxima of blocks bound which
tokens can win, and logarithms are taken of those alone (about 0.3 % of 150,000).
"""

from __future__ import annotations

import math

import torch

from ... import checks, library
from ..prf.keys import signed_key
from .spec import SPECS

library.define(SPECS)
_gumbel_sample = torch.ops.fairlead.gumbel_sample.default
_gumbel_uniform = torch.ops.fairlead.gumbel_uniform.default
COLDEST = 1e-30

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
    integer [B] (64 bits). temperature: at least 1e-30, a number or float [B]; greedy decoding is `argmax`, and carries no
    watermark. top_k >= 1, top_p in (0, 1], min_p in [0, 1]: None = off. rows: bool [B]; a False row is neither drawn nor
    checked and gets -1.
    Returns ids_B (int64) and, with return_logprob, the float32 [B] log-probability of each drawn token under the
    tempered, truncated distribution (0 where none is drawn).
    Every backend draws the float64 reference's tokens; Triton scores in float32, so two tokens closer than 1e-5 may swap.
    ValueError / TypeError on anything else, also for a row with NaN, +inf or nothing but -inf. On a GPU and inside
    torch.compile the values are not looked at, for that would wait for them: such a row gets the id -2, and what a
    temperature tensor holds is the caller's.
    """
    batch = _check(logits_BV)
    if (context_BH is None) == (seeds is None):
        raise ValueError("noise: either context_BH with key, or seeds with positions is needed")
    if context_BH is not None:
        context_BH = checks.ids(context_BH, "context_BH", "batch, context")
        checks.beside(context_BH, "context_BH", logits_BV, "logits_BV")
        if key is None or positions is not None:
            raise ValueError("key: is needed with context_BH" if key is None else "positions: go with seeds only")
        key = signed_key(key)
    else:
        if positions is None or key is not None:
            raise ValueError(
                "positions: are needed with seeds" if positions is None else "key: goes with context_BH only"
            )
        seeds = checks.per_row(seeds, "seeds", "integer", logits_BV)
        positions = checks.per_row(positions, "positions", "integer", logits_BV)
        key = 0
    looks = logits_BV.device.type == "cpu" and not torch.compiler.is_compiling()
    single, per_row = _temperature(temperature, logits_BV, looks)
    if rows is not None:
        rows = checks.per_row(rows, "rows", "bool", logits_BV)
    ids_B, logprob_B = _gumbel_sample(
        logits_BV, context_BH, key, seeds, positions, single, per_row, _top_k(top_k), _top_p(top_p), _min_p(min_p), rows,
        checks.flag(return_logprob, "return_logprob"),
    )  # fmt: skip
    if looks and batch:
        worst, at = ids_B.min(0)
        if int(worst) < -1:
            raise ValueError(f"logits_BV: row {int(at)} has NaN, +inf or nothing above -inf, so no token can be drawn")
    return (ids_B, logprob_B) if return_logprob else ids_B


def gumbel_uniform(context_BH: torch.Tensor, vocab_size: int, *, key: int) -> torch.Tensor:
    """The keyed uniforms u_v of the whole vocabulary after each context, float32 [B, V] in (0, 1): the numbers behind
    `gumbel_sample`'s noise, for schemes that need more of them than the winner.

    context_BH: integer ids, oldest first, -1 = missing; H may be 0. key: in [0, 2^64). vocab_size: 1 to 2^24.
    ValueError / TypeError on anything else.
    """
    context_BH = checks.ids(context_BH, "context_BH", "batch, context")
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size: an integer is needed, not {checks.describe(vocab_size)}")
    if not 1 <= vocab_size <= 1 << 24:
        raise ValueError(f"vocab_size: 1 to 2^24 is needed, not {vocab_size}")
    u_BV: torch.Tensor = _gumbel_uniform(context_BH, signed_key(key), vocab_size)
    return u_BV


def _check(logits_BV: torch.Tensor) -> int:
    if not isinstance(logits_BV, torch.Tensor) or logits_BV.dim() != 2 or not logits_BV.dtype.is_floating_point:
        raise TypeError(f"logits_BV: floats of shape [batch, vocabulary] are needed, not {checks.describe(logits_BV)}")
    batch, vocabulary = logits_BV.shape
    if vocabulary == 0 and batch:
        raise ValueError("logits_BV: a vocabulary of at least one token is needed")
    return batch


def _temperature(
    value: float | torch.Tensor, logits_BV: torch.Tensor, looks: bool
) -> tuple[float, torch.Tensor | None]:
    if isinstance(value, torch.Tensor):
        batch, device = logits_BV.shape[0], logits_BV.device
        if value.shape != (batch,) or not value.dtype.is_floating_point or value.device != device:
            raise ValueError(
                f"temperature: a number or float [{batch}] on {device} is needed, not {checks.describe(value)}"
            )
        value_B = value.to(torch.float32)
        if looks and batch and not (float(value_B.min()) >= COLDEST and math.isfinite(float(value_B.max()))):
            raise ValueError(
                f"temperature: finite numbers of at least {COLDEST:g} are needed, not {float(value.min())}"
            )
        return 1.0, value_B
    if not (checks.number(value, "temperature") >= COLDEST and math.isfinite(value)):
        raise ValueError(f"temperature: a finite number of at least {COLDEST:g} is needed, not {value}")
    return float(value), None


def _top_k(value: int | None) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"top_k: an integer is needed, not {checks.describe(value)}")
    if value < 1:
        raise ValueError(f"top_k: 1 or more is needed, not {value}")
    return min(value, (1 << 63) - 1)


def _top_p(value: float | None) -> float:
    if value is not None and not 0.0 < checks.number(value, "top_p") <= 1.0:
        raise ValueError(f"top_p: a mass in (0, 1] is needed, not {value}")
    return 1.0 if value is None else float(value)


def _min_p(value: float | None) -> float:
    if value is not None and not 0.0 <= checks.number(value, "min_p") <= 1.0:
        raise ValueError(f"min_p: a share in [0, 1] is needed, not {value}")
    return 0.0 if value is None else float(value)
