"""Log-probabilities of given tokens from hidden states and the head: logp_n = z_{n,y} - ln sum_v exp(z_{n,v}),
z = (hidden weight^T + bias) / temperature, without the [N, V] logits.

Tiles of tokens x vocabulary (32 MiB in float32 on CPU) with an online log-sum-exp. A head that is trained keeps the
log-sum-exp alone and computes its tiles again in the backward pass: 4 products instead of the dense 3, but no [N, V]
memory. A frozen head (a reference model, LoRA) gets d logp / d hidden = (W_y - sum_v p_v W_v) / T in the forward pass,
rescaled as the maximum rises (as FlashAttention does, arXiv 2205.14135): its backward pass is one scaling. Without
gradients it is one product. Memory beyond the results: one tile, and a float32 copy of its weights if they have 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch

from ... import checks, library
from .spec import SPECS

library.define(SPECS)
_linear_logprob = torch.ops.fairlead.linear_logprob.default

__all__ = ["linear_logprob"]


def linear_logprob(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Log-probability of each row's token under the head.

    hidden_ND: float32, float16, bfloat16 or float64, shape [..., D]: pass the rows that are scored, not the prompt's.
    weight_VD, bias [V] (or None): the head, of the same dtype. target_N: integer ids in [0, V), shape [...].
    temperature: a number above 0.
    Returns float32 (float64 for float64) of the shape of target_N. Differentiable once in hidden, weight and bias.
    ValueError / TypeError on anything else; ids are checked on the CPU only (on a GPU that would wait for the device).
    """
    _check(hidden_ND, weight_VD, target_N, bias)
    if not checks.number(temperature, "temperature") > 0 or temperature == float("inf"):
        raise ValueError(f"temperature: a finite number above 0 is needed, not {temperature}")
    trained = weight_VD.requires_grad or (bias is not None and bias.requires_grad)
    unit = torch.is_grad_enabled() and hidden_ND.requires_grad and not trained
    rows_ND, ids_N = hidden_ND.reshape(-1, hidden_ND.shape[-1]), target_N.reshape(-1).to(torch.int64)
    logp_N, _, _ = _linear_logprob(rows_ND, weight_VD, ids_N, bias, float(temperature), unit)
    result: torch.Tensor = logp_N.reshape(target_N.shape)
    return result


def _check(hidden_ND: Any, weight_VD: Any, target_N: Any, bias: Any) -> None:
    if not isinstance(hidden_ND, torch.Tensor) or hidden_ND.dim() < 1 or not hidden_ND.dtype.is_floating_point:
        raise TypeError(f"hidden_ND: a floating tensor [..., D] is needed, not {checks.describe(hidden_ND)}")
    width, kind = hidden_ND.shape[-1], str(hidden_ND.dtype).removeprefix("torch.")
    for name, value, shape in (("weight_VD", weight_VD, 2), ("bias", bias, 1)):
        if name == "bias" and value is None:
            continue
        if not isinstance(value, torch.Tensor) or value.dim() != shape or value.dtype != hidden_ND.dtype:
            raise TypeError(f"{name}: {kind} of {shape} dimension(s), as hidden_ND, not {checks.describe(value)}")
        if value.device != hidden_ND.device:
            raise ValueError(f"{name} is on {value.device}, hidden_ND on {hidden_ND.device}")
    if weight_VD.shape[1] != width or weight_VD.shape[0] < 1:
        raise ValueError(f"weight_VD: [V, {width}] with V >= 1 is needed, not {list(weight_VD.shape)}")
    if bias is not None and bias.shape[0] != weight_VD.shape[0]:
        raise ValueError(f"bias: [{weight_VD.shape[0]}] is needed, not {list(bias.shape)}")
    if not isinstance(target_N, torch.Tensor) or not checks.is_integer(target_N.dtype):
        raise TypeError(f"target_N: integer ids are needed, not {checks.describe(target_N)}")
    if target_N.shape != hidden_ND.shape[:-1] or target_N.device != hidden_ND.device:
        raise ValueError(f"target_N: shape {list(hidden_ND.shape[:-1])} on {hidden_ND.device} is needed")
    if not torch.compiler.is_compiling() and target_N.device.type == "cpu" and target_N.numel():
        low, high = int(target_N.min()), int(target_N.max())
        if low < 0 or high >= weight_VD.shape[0]:
            raise ValueError(f"target_N: ids in [0, {weight_VD.shape[0]}) are needed, not {low if low < 0 else high}")
