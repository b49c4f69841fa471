"""Distillation losses from hidden states, a tile of tokens at a time: values, and in the same pass the gradients of hidden
states and head, so logits of all tokens never exist together.

The losses are those of `distillation`. Left out: tvdpp-sampled (a tile holds the whole vocabulary, so the exact sum costs the
same and has no noise).

Shape suffixes: N scored tokens, C of a tile, V vocabulary, K kept tokens, B bins (V, or K and one for the rest), D hidden width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from fairlead.errors import InputError
from fairlead.logprobs import Head
from fairlead_kernels.ops.linear_logprob.tiles import narrowed, product

Loss = Literal["fkl", "rkl", "gkd", "tvd", "tvdpp"]
CHUNK = 256
LEAST = 1e-8  # of the missing mass, which rounding may lose


class FromHead(NamedTuple):
    """A target given by its hidden states [..., D] and its head (weight [V, D], bias [V] or None); no gradient."""

    hidden: torch.Tensor
    head: Head


class TopK(NamedTuple):
    """A stored target: ids int [..., K] and log-probabilities float [..., K] of its likeliest tokens at `temperature`.

    What they lack of 1 is one bin, on the draft's side too. A loss of bins is a lower bound of the loss; for TVD it is equal
    where q - p has one sign in the rest."""

    ids: torch.Tensor
    logp: torch.Tensor
    temperature: float = 1.0


class Distilled(NamedTuple):
    """loss: scalar with gradient. acceptance: sum min(p, q) at each position, float [...], 0 where masked.
    ahead: share of the vocabulary where q > p, mean over positions."""

    loss: torch.Tensor
    acceptance: torch.Tensor
    ahead: float


def chunked_distillation(
    hidden: torch.Tensor, head: Head, target: FromHead | TopK, mask: torch.Tensor | None = None, *, loss: Loss = "tvd",
    temperature: float = 1.0, beta: float = 0.5, reduction: Literal["token_mean", "sequence_mean"] = "token_mean", chunk: int = CHUNK,
) -> Distilled:  # fmt: skip
    """A distillation loss from hidden states, at most `chunk` tokens x V logits of each model at a time.

    hidden: the draft's states float [..., T, D], gradient. head: its weight [V, D] and bias, gradient where they ask for it.
    target: FromHead with the same V, or TopK. mask: bool [..., T], positions that count; others cost nothing. loss, temperature,
    beta, reduction: as in `objectives.distillation`; "none" has the dense functions alone, for the gradient is made on the way.
    Sums are float32, float64 where the states are. InputError for shapes, widths or settings that do not fit, and NaN.
    """
    if loss not in BINS:
        raise InputError(f"loss: must be one of {', '.join(BINS)}, got {loss!r}")
    if temperature <= 0 or chunk < 1 or not 0 <= beta <= 1:
        raise InputError(f"temperature above 0, chunk at least 1, beta in [0, 1] are needed, got {temperature}, {chunk}, {beta}")
    mask = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device) if mask is None else mask.bool()
    given = target.hidden if isinstance(target, FromHead) else target.ids
    if mask.shape != hidden.shape[:-1] or given.shape[:-1] != hidden.shape[:-1]:
        raise InputError(f"hidden: positions {list(hidden.shape[:-1])}, target {list(given.shape[:-1])}, mask {list(mask.shape)}; they must agree")
    width = len(head[0])
    if isinstance(target, FromHead) and len(target.head[0]) != width:
        raise InputError(f"target: its head has {len(target.head[0])} tokens, the draft's {width}; cut both to the tokens that they share")
    if isinstance(target, TopK) and (target.temperature != temperature or int(target.ids.max()) >= width):
        raise InputError(f"target: stored at temperature {target.temperature} with ids to {int(target.ids.max())}; needed: {temperature}, ids below {width}")
    flat_ND = hidden[mask]
    acceptance = torch.zeros(mask.shape, dtype=_wide(hidden), device=hidden.device)
    if not len(flat_ND):
        warnings.warn("mask: no position counts, the loss is 0", stacklevel=2)
        return Distilled(flat_ND.sum(), acceptance, 0.0)
    scale_N = _scale(mask.to(acceptance.dtype), reduction)[mask]
    if isinstance(target, TopK):
        chosen: FromHead | TopK = TopK(target.ids[mask].long(), target.logp[mask].detach(), temperature)
    else:
        chosen = FromHead(target.hidden[mask].detach(), target.head)
    need = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (flat_ND, *head)]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        value, acceptance_N, ahead, slopes = _tiles(flat_ND, head, chosen, scale_N, loss, temperature, beta, chunk, need)
    if not bool(value.isfinite()):
        raise InputError(f"loss: {float(value)}; the states or heads are not finite, or {loss} meets tokens that the target rules out")
    acceptance[mask] = acceptance_N
    carried = _Carried.apply(value, slopes, flat_ND, *head) if any(need) else value  # type: ignore[no-untyped-call]
    return Distilled(carried, acceptance, ahead)


class _Carried(torch.autograd.Function):
    """A number whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, slopes: Sequence[torch.Tensor | None], *inputs: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(*(None if s is None or x is None else s.to(x.dtype) for s, x in zip(slopes, inputs, strict=True)))
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(None if s is None else grad.to(s.dtype) * s for s in ctx.saved_tensors)


def _tiles(
    hidden_ND: torch.Tensor, head: Head, target: FromHead | TopK, scale_N: torch.Tensor, loss: str, temperature: float, beta: float,
    chunk: int, need: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, float, list[torch.Tensor | None]]:  # fmt: skip
    """(loss, acceptance [N], share of bins with q > p, gradients of states, weight and bias)."""
    weight_VD = head[0]
    slopes = [torch.zeros_like(x, dtype=scale_N.dtype) if n and x is not None else None for n, x in zip(need, (hidden_ND, *head), strict=True)]
    value, pull, entropy = (scale_N.new_zeros(()) for _ in range(3))
    parts, ahead, entries = [], 0, 0
    for start in range(0, len(hidden_ND), chunk):
        part = slice(start, start + chunk)
        lp_CV = _log_law(hidden_ND[part], head, temperature)
        lp_CB, lq_CB = _both_laws(lp_CV, target, part, temperature)
        p_CB = lp_CB.exp()
        value_C, slope_CB = BINS[loss](lp_CB, lq_CB, p_CB, beta)
        value += (value_C * scale_N[part]).sum()
        parts.append(torch.minimum(p_CB, lq_CB.exp()).sum(-1))
        reward_CB = lq_CB > lp_CB
        ahead, entries = ahead + int(reward_CB.sum()), entries + reward_CB.numel()
        if loss == "tvdpp":
            each_CB = torch.where(p_CB == 0, 0.0, p_CB * lp_CB)
            pull += ((each_CB * reward_CB).sum(-1) * scale_N[part]).sum()
            entropy += (each_CB.sum(-1) * scale_N[part]).sum()
        if not any(need):
            continue
        slope_CB.mul_((scale_N[part] / temperature)[:, None])
        slope_CV = _spread(slope_CB, lp_CV, lp_CB, target.ids[part]) if isinstance(target, TopK) and lp_CB is not lp_CV else slope_CB
        factor_CV = narrowed(slope_CV, weight_VD)
        if slopes[0] is not None:
            product(factor_CV, weight_VD, slopes[0][part])
        if slopes[1] is not None:
            product(factor_CV.T, hidden_ND[part].to(weight_VD.dtype), slopes[1], add=True)
        if slopes[2] is not None:
            slopes[2] += slope_CV.sum(0)
    share = ahead / entries
    if loss == "tvdpp":  # rewards are 0 or 1, so their number gives their mean and deviation
        sigma = math.sqrt(share * (1 - share))
        value = -(pull - share * entropy) / sigma if sigma else torch.zeros_like(value)
        for slope in slopes:
            if slope is not None:
                slope.mul_(1 / sigma if sigma else 0.0)
    return value, torch.cat(parts), share, slopes


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scale(mask: torch.Tensor, reduction: str) -> torch.Tensor:
    """The factor of each position in the loss; mask holds 0 and 1."""
    if reduction == "token_mean":
        return mask / mask.sum()
    if reduction == "sequence_mean":
        count = mask.sum(-1, keepdim=True)
        return mask / count.clamp(min=1) / (count > 0).sum()
    raise InputError(f"reduction: must be token_mean or sequence_mean, got {reduction!r}")


def _log_law(hidden_CD: torch.Tensor, head: Head, temperature: float) -> torch.Tensor:
    """Log-probabilities [C, V] of a tile of tokens."""
    weight_VD, bias_V = head
    out = torch.empty(len(hidden_CD), len(weight_VD), dtype=_wide(hidden_CD), device=hidden_CD.device)
    logits_CV = product(hidden_CD.to(weight_VD.dtype), weight_VD.detach().T, out)
    if bias_V is not None:
        logits_CV.add_(bias_V)
    return torch.log_softmax(logits_CV.div_(temperature), -1)


def _both_laws(lp_CV: torch.Tensor, target: FromHead | TopK, part: slice, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [C, B] of draft and target over the vocabulary, or over the kept tokens and the rest."""
    if isinstance(target, FromHead):
        return lp_CV, _log_law(target.hidden[part], target.head, temperature)
    ids_CK, logp_CK = target.ids[part], target.logp[part].to(lp_CV.dtype)
    if ids_CK.shape[1] == lp_CV.shape[1]:
        return lp_CV, torch.empty_like(lp_CV).scatter_(1, ids_CK, logp_CK)
    rest_C1 = lp_CV.scatter(1, ids_CK, -torch.inf).logsumexp(-1, keepdim=True)
    missing_C1 = (1 - logp_CK.exp().sum(-1, keepdim=True)).clamp(min=LEAST).log()
    return torch.cat([lp_CV.gather(1, ids_CK), rest_C1], 1), torch.cat([logp_CK, missing_C1], 1)


def _spread(slope_CB: torch.Tensor, lp_CV: torch.Tensor, lp_CB: torch.Tensor, ids_CK: torch.Tensor) -> torch.Tensor:
    """The gradient of the logits from that of the bins: the rest's goes to its tokens in proportion to their chances."""
    share_CV = torch.where(lp_CB[:, -1:] == -torch.inf, 0.0, (lp_CV - lp_CB[:, -1:]).exp())
    return share_CV.mul_(slope_CB[:, -1:]).scatter_(1, ids_CK, slope_CB[:, :-1])


Slope = tuple[torch.Tensor, torch.Tensor]


def _fkl(lp: torch.Tensor, lq: torch.Tensor, p: torch.Tensor, beta: float) -> Slope:
    q = lq.exp()
    return torch.where(q == 0, 0.0, q * (lq - lp)).sum(-1), p - q


def _rkl(lp: torch.Tensor, lq: torch.Tensor, p: torch.Tensor, beta: float) -> Slope:
    gap = torch.where(p == 0, 0.0, lp - lq)
    value = (p * gap).sum(-1)
    return value, p * (gap - value[..., None])


def _gkd(lp: torch.Tensor, lq: torch.Tensor, p: torch.Tensor, beta: float) -> Slope:
    """d/dp = (1 - beta) log(p / m) up to a constant: what m moves cancels."""
    if beta in (0, 1):
        return (_rkl if beta else _fkl)(lp, lq, p, beta)
    lm = torch.logaddexp(lq + math.log(beta), lp + math.log(1 - beta))
    q, gap = lq.exp(), torch.where(p == 0, 0.0, lp - lm)
    from_draft = (p * gap).sum(-1)
    value = beta * torch.where(q == 0, 0.0, q * (lq - lm)).sum(-1) + (1 - beta) * from_draft
    return value, (1 - beta) * p * (gap - from_draft[..., None])


def _tvd(lp: torch.Tensor, lq: torch.Tensor, p: torch.Tensor, beta: float) -> Slope:
    """p_i (sum_j p_j r_j - r_i), with r 1 where q > p, 0 where q < p and 1/2 at ties, as autograd has it."""
    gap = p - lq.exp()
    value = 0.5 * gap.abs().sum(-1)
    pull = gap.sign_().mul_(0.5).mul_(p)
    return value, pull - p * pull.sum(-1, keepdim=True)


BINS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], Slope]] = {
    "fkl": _fkl, "rkl": _rkl, "gkd": _gkd, "tvd": _tvd, "tvdpp": _tvd,
}  # fmt: skip
"""Value [C] and gradient in the logits [C, B] of laws over bins; tvdpp's is divided by sigma in the end."""
