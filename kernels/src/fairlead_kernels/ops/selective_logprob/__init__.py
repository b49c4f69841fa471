"""Log-probabilities of given tokens from logits: logp_n = l_{n,y} / T - ln sum_v exp(l_{n,v} / T).

One pass per row with an online log-sum-exp, float32 sums; nothing of the logits' size is made. The backward pass keeps
the log-sum-exp alone and recomputes exp(l / T - lse): dl = g (onehot - p) / T.
"""

from __future__ import annotations

import torch

from ... import library
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
        raise TypeError("logits_NV: a floating tensor of shape [..., vocabulary] is needed")
    if not isinstance(ids_N, torch.Tensor) or ids_N.dtype.is_floating_point or ids_N.shape != logits_NV.shape[:-1]:
        raise ValueError(f"ids_N: integer ids of shape {list(logits_NV.shape[:-1])} are needed, not {list(ids_N.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature: above 0 is needed, not {temperature}")
    vocabulary = logits_NV.shape[-1]
    if not torch.compiler.is_compiling() and ids_N.device.type == "cpu" and ids_N.numel():
        low, high = int(ids_N.min()), int(ids_N.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"ids_N: ids in [0, {vocabulary}) are needed, not {low if low < 0 else high}")
    logp, _ = _selective_logprob(logits_NV.reshape(-1, vocabulary), ids_N.reshape(-1).to(torch.int64), float(temperature))
    result: torch.Tensor = logp.reshape(ids_N.shape)
    return result
