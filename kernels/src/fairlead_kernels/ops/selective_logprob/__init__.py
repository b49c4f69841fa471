"""Log-probabilities of given tokens from logits: logp_n = l_{n,y} / T - ln sum_v exp(l_{n,v} / T).

One pass per row with an online log-sum-exp, float32 sums; nothing of the logits' size is made. The backward pass keeps
the log-sum-exp alone and recomputes exp(l / T - lse): dl = g (onehot - p) / T.
"""

from __future__ import annotations

import torch

from ... import checks, library
from .spec import SPECS

library.define(SPECS)
_selective_logprob = torch.ops.fairlead.selective_logprob.default

__all__ = ["selective_logprob"]


def selective_logprob(logits_NV: torch.Tensor, ids_N: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of each row's token.

    logits_NV: float32, float16, bfloat16 (float64 by the reference), shape [..., V], any strides; -inf is allowed.
    ids_N: integer ids in [0, V), shape [...]. temperature: above 0.
    Returns float32 (float64 for float64 logits) of the shape of ids_N. Differentiable in the logits.
    ValueError / TypeError on anything else; ids are checked on the CPU only (on a GPU that would wait for the device).
    """
    if not isinstance(logits_NV, torch.Tensor) or logits_NV.dim() < 1 or not logits_NV.dtype.is_floating_point:
        raise TypeError(f"logits_NV: a floating tensor [..., vocabulary] is needed, not {checks.describe(logits_NV)}")
    if not isinstance(ids_N, torch.Tensor) or not checks.is_integer(ids_N.dtype):
        raise TypeError(f"ids_N: integer ids are needed, not {checks.describe(ids_N)}")
    if ids_N.shape != logits_NV.shape[:-1] or ids_N.device != logits_NV.device:
        wanted = f"{list(logits_NV.shape[:-1])} on {logits_NV.device}"
        raise ValueError(f"ids_N: ids of shape {wanted} are needed, not {list(ids_N.shape)} on {ids_N.device}")
    if not 0 < checks.number(temperature, "temperature") < float("inf"):
        raise ValueError(f"temperature: a finite number above 0 is needed, not {temperature}")
    vocabulary = logits_NV.shape[-1]
    if not torch.compiler.is_compiling() and ids_N.device.type == "cpu" and ids_N.numel():
        low, high = int(ids_N.min()), int(ids_N.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"ids_N: ids in [0, {vocabulary}) are needed, not {low if low < 0 else high}")
    logp, _ = _selective_logprob(
        logits_NV.reshape(-1, vocabulary), ids_N.reshape(-1).to(torch.int64), float(temperature)
    )
    result: torch.Tensor = logp.reshape(ids_N.shape)
    return result
