"""linear_logprob over tiles of tokens x vocabulary: the matrix products are torch's, what is done to a tile is a step.

A step is the one thing that backends differ in: plain torch here, one C pass (c.py), one Triton program per row
(triton.py). One tile of logits exists at a time and its memory is used again for the next.
"""

from __future__ import annotations

import functools
import math
from typing import Protocol

import torch

from .reference import Triple, accumulator, nothing

TOKENS = 2048  # of a tile
CPU_ELEMENTS, CUDA_ELEMENTS = 1 << 23, 1 << 26  # of a tile: 32 MiB and 256 MiB in float32
COLUMNS = 32768  # of a tile, at most; of 16-bit weights on CPU, which are widened block by block, an eighth


class ForwardStep(Protocol):
    """Take a tile of logits (before the temperature) into the running maximum and sum; pick the targets' logits.

    local_N: the target's column in the tile, outside of it for most. rescale_N: None, or room for the factor that sums
    under the old maximum need; the tile then becomes exp(scale (logits - top))."""

    def __call__(
        self,
        tile_NV: torch.Tensor,
        local_N: torch.Tensor,
        scale: float,
        top_N: torch.Tensor,
        total_N: torch.Tensor,
        chosen_N: torch.Tensor,
        rescale_N: torch.Tensor | None,
    ) -> None: ...


class BackwardStep(Protocol):
    """Turn a tile of logits into factor (onehot - exp(scale logits - lse)), in place."""

    def __call__(
        self, tile_NV: torch.Tensor, local_N: torch.Tensor, scale: float, lse_N: torch.Tensor, factor_N: torch.Tensor
    ) -> None: ...


def forward_step(
    tile_NV: torch.Tensor,
    local_N: torch.Tensor,
    scale: float,
    top_N: torch.Tensor,
    total_N: torch.Tensor,
    chosen_N: torch.Tensor,
    rescale_N: torch.Tensor | None,
) -> None:
    inside_N = (local_N >= 0) & (local_N < tile_NV.shape[1])
    picked_N = tile_NV.gather(1, local_N.clamp(0, tile_NV.shape[1] - 1)[:, None])[:, 0]
    chosen_N.copy_(torch.where(inside_N, picked_N, chosen_N))
    most_N = torch.maximum(top_N, tile_NV.amax(1))
    safe_N = most_N.masked_fill(most_N == -math.inf, 0.0)
    shrink_N = ((top_N - safe_N) * scale).exp()
    tile_NV.sub_(safe_N[:, None]).mul_(scale).exp_()
    total_N.mul_(shrink_N).add_(tile_NV.sum(1))
    top_N.copy_(most_N)
    if rescale_N is not None:
        rescale_N.copy_(shrink_N)


def backward_step(
    tile_NV: torch.Tensor, local_N: torch.Tensor, scale: float, lse_N: torch.Tensor, factor_N: torch.Tensor
) -> None:
    tile_NV.mul_(scale).sub_(lse_N[:, None]).exp_().mul_(-factor_N[:, None])
    inside_N = (local_N >= 0) & (local_N < tile_NV.shape[1])
    tile_NV.scatter_add_(
        1, local_N.clamp(0, tile_NV.shape[1] - 1)[:, None], (factor_N * inside_N.to(factor_N.dtype))[:, None]
    )


def tile_shape(hidden_ND: torch.Tensor, vocabulary: int) -> tuple[int, int]:
    """Tokens and columns of a tile."""
    rows = max(1, min(TOKENS, hidden_ND.shape[0]))
    elements = CUDA_ELEMENTS if hidden_ND.device.type == "cuda" else CPU_ELEMENTS
    widened = hidden_ND.device.type != "cuda" and hidden_ND.element_size() == 2
    return rows, max(1, min(vocabulary, elements // rows, COLUMNS // 8 if widened else COLUMNS))


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool = False) -> torch.Tensor:
    """a @ b in out's dtype, into out or added to it. On CUDA 16-bit factors stay so and are summed in float32."""
    if a.device.type == "cuda" and a.element_size() == b.element_size() == 2:
        value = torch.mm(a, b, out_dtype=out.dtype)
        return out.add_(value) if add else out.copy_(value)
    a, b = a.to(out.dtype), b.to(out.dtype)
    return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)


def logits_of(
    h_ND: torch.Tensor, block_VD: torch.Tensor, bias_V: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    tile_NV = product(h_ND, block_VD.T, out)
    return tile_NV if bias_V is None else tile_NV.add_(bias_V)


def widened(hidden_ND: torch.Tensor) -> torch.Tensor:
    """Hidden states as the products want them: float32 on CPU, once and not once per tile."""
    return hidden_ND if hidden_ND.device.type == "cuda" else hidden_ND.to(accumulator(hidden_ND.dtype))


def narrowed(tile_NV: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tile as a factor beside `like`: 16-bit on CUDA (tensor cores), else as it is."""
    return tile_NV.to(like.dtype) if like.device.type == "cuda" and like.element_size() == 2 else tile_NV


def linear_logprob(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature: float,
    unit: bool,
    step: ForwardStep = forward_step,
) -> Triple:
    """Online log-sum-exp over the tiles. With `unit` also W[y] - sum_v p_v W_v, kept under the running maximum and
    rescaled when that rises, so that a frozen head needs no logits in its backward pass."""
    (count, width), vocabulary, wide = hidden_ND.shape, weight_VD.shape[0], accumulator(hidden_ND.dtype)
    new = functools.partial(torch.empty, device=hidden_ND.device)
    logp_N, lse_N = new(count, dtype=wide), new(count, dtype=wide)
    unit_ND = new((count if unit else 0, width), dtype=hidden_ND.dtype)
    rows, columns = tile_shape(hidden_ND, vocabulary)
    memory = new(rows * columns, dtype=wide)
    bias_V = None if bias_V is None else bias_V.to(wide)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        h_ND, y_N = widened(hidden_ND[part]), target_N[part]
        size = len(y_N)
        top_N = new(size, dtype=wide).fill_(-math.inf)
        total_N, chosen_N = new(size, dtype=wide).zero_(), new(size, dtype=wide).zero_()
        rescale_N = new(size, dtype=wide) if unit else None
        mass_ND = new((size, width), dtype=wide).zero_() if unit else None
        for first in range(0, vocabulary, columns):
            block_VD = weight_VD[first : first + columns]
            tile_NV = memory[: size * len(block_VD)].view(size, len(block_VD))
            logits_of(h_ND, block_VD, None if bias_V is None else bias_V[first : first + columns], tile_NV)
            step(tile_NV, y_N - first, 1.0 / temperature, top_N, total_N, chosen_N, rescale_N)
            if mass_ND is not None and rescale_N is not None:
                product(narrowed(tile_NV, block_VD), block_VD, mass_ND.mul_(rescale_N[:, None]), add=True)
        lse_N[part] = top_N / temperature + total_N.log()
        logp_N[part] = chosen_N / temperature - lse_N[part]
        if mass_ND is not None:
            unit_ND[part] = (weight_VD[y_N].to(wide) - mass_ND.div_(total_N[:, None])).div_(temperature)
    return logp_N, lse_N, unit_ND


def linear_logprob_backward(
    grad_N: torch.Tensor,
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    lse_N: torch.Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    step: BackwardStep = backward_step,
) -> Triple:
    """Each tile's logits once more, then its share of the gradients. The vocabulary is the outer loop, so that a block
    of d weight is finished before the next is begun."""
    (count, width), vocabulary, wide = hidden_ND.shape, weight_VD.shape[0], accumulator(hidden_ND.dtype)
    d_hidden, d_weight, d_bias = nothing(hidden_ND, weight_VD, bias_V)
    new = functools.partial(torch.empty, device=hidden_ND.device)
    rows, columns = tile_shape(hidden_ND, vocabulary)
    memory = new(rows * columns, dtype=wide)
    if need_hidden:
        d_hidden = new((count, width), dtype=wide).zero_()
    if need_weight:
        d_weight = new((vocabulary, width), dtype=weight_VD.dtype)
    if need_bias and bias_V is not None:
        d_bias = bias_V.new_empty(vocabulary)
    wide_V = None if bias_V is None else bias_V.to(wide)
    factor_N, lse_N = (grad_N / temperature).to(wide), lse_N.to(wide)
    h_ND = widened(hidden_ND)
    for first in range(0, vocabulary, columns):
        block_VD = weight_VD[first : first + columns]
        here, size = slice(first, first + columns), len(block_VD)
        sum_VD = d_weight[here] if weight_VD.dtype == wide else new((size, width), dtype=wide) if need_weight else None
        sum_V = new(size, dtype=wide).zero_()
        if need_weight and sum_VD is not None and count == 0:
            sum_VD.zero_()
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            tokens = len(target_N[part])
            tile_NV = memory[: tokens * size].view(tokens, size)
            logits_of(h_ND[part], block_VD, None if wide_V is None else wide_V[here], tile_NV)
            step(tile_NV, target_N[part] - first, 1.0 / temperature, lse_N[part], factor_N[part])
            slope_NV = narrowed(tile_NV, block_VD)
            if need_hidden:
                product(slope_NV, block_VD, d_hidden[part], add=True)
            if need_weight and sum_VD is not None:
                product(slope_NV.T, h_ND[part], sum_VD, add=start > 0)
            if need_bias:
                sum_V.add_(tile_NV.sum(0))
        if need_weight and sum_VD is not None and weight_VD.dtype != wide:
            d_weight[here] = sum_VD
        if need_bias and bias_V is not None:
            d_bias[here] = sum_V
    return d_hidden.to(hidden_ND.dtype), d_weight, d_bias
