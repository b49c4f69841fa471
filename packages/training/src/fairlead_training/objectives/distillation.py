"""Distillation of a teacher's next-token distributions: KL both ways, GKD (arXiv 2306.13649), TVD and TVD++ (2403.00858).

Functions of logits, p the student's and q the teacher's distribution, because no sum over a sequence's own tokens can give
them. With full vocabularies TVD++ is TVD with its gradient divided by sigma (>= 2 times it); only sampling gives its
baseline something to do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch

from fairlead.errors import InputError

Reduction = Literal["token_mean", "sequence_mean", "none"]


def fkl(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, *, temperature: float = 1.0,
    reduction: Reduction = "token_mean",
) -> torch.Tensor:  # fmt: skip
    """Forward KL, sum_v q log(q / p).

    student: float [..., T, V] logits, carry the gradient. teacher: float [..., T, V] logits, no gradient; where V differs,
    the longer one's tail must be masked out (below -1e4). mask: bool [..., T], positions that count, all by default.
    temperature: divides both logits; no factor of its square. reduction: "token_mean" over counted positions,
    "sequence_mean" (mean over sequences that have a position), "none" [..., T], 0 where masked.

    InputError for NaN, another shape or a bad setting. A batch without a position gives 0, and a warning.
    """
    lp, lq = log_probs(student, teacher, temperature)
    return reduced(_kl(lq, lp), mask, reduction)


def rkl(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, *, temperature: float = 1.0,
    reduction: Reduction = "token_mean",
) -> torch.Tensor:  # fmt: skip
    """Reverse KL, sum_v p log(p / q); arguments as `fkl`."""
    lp, lq = log_probs(student, teacher, temperature)
    return reduced(_kl(lp, lq), mask, reduction)


def gkd(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, *, beta: float = 0.5,
    temperature: float = 1.0, reduction: Reduction = "token_mean",
) -> torch.Tensor:  # fmt: skip
    """GKD's generalised Jensen-Shannon: beta KL(q||m) + (1-beta) KL(p||m), m = beta q + (1-beta) p; arguments as `fkl`.

    beta 0 is fkl and beta 1 is rkl by definition; the values jump there (jsd / beta tends to fkl).
    """
    if not 0 <= beta <= 1:
        raise InputError(f"beta: must be between 0 and 1, got {beta}")
    if beta in (0, 1):
        return (rkl if beta else fkl)(student, teacher, mask, temperature=temperature, reduction=reduction)
    lp, lq = log_probs(student, teacher, temperature)
    logs = torch.tensor([beta, 1 - beta], dtype=lp.dtype, device=lp.device).log()
    lm = torch.logaddexp(lq + logs[0], lp + logs[1])
    return reduced(beta * _kl(lq, lm) + (1 - beta) * _kl(lp, lm), mask, reduction)


def tvd(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, *, temperature: float = 1.0,
    reduction: Reduction = "token_mean",
) -> torch.Tensor:  # fmt: skip
    """Total variation, 1/2 sum_v |p - q|: the chance that speculative sampling refuses a token; arguments as `fkl`."""
    lp, lq = log_probs(student, teacher, temperature)
    return reduced(0.5 * (lp.exp() - lq.exp()).abs().sum(-1), mask, reduction)


def tvdpp(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, *, temperature: float = 1.0,
    reduction: Reduction = "token_mean",
) -> torch.Tensor:  # fmt: skip
    """TVD++ over the whole vocabulary: a surrogate whose gradient is that of TVD divided by sigma; arguments as `fkl`.

    - sum_v [p A] log p, A = (r - mu) / sigma, r = 1[q > p]; mu and sigma are r's mean and population standard deviation over
    counted positions and the vocabulary. Only the gradient has a meaning.
    """
    lp, lq = log_probs(student, teacher, temperature)
    with torch.no_grad():
        reward = (lq > lp).to(lp.dtype)
        counted = reward if mask is None else reward[mask.to(torch.bool)]
        sigma = counted.std(correction=0) if counted.numel() else counted.new_zeros(())
        advantage = (reward - counted.mean()) / sigma if float(sigma) > 0 else torch.zeros_like(reward)
        pull = lp.exp() * advantage
    return reduced(-torch.where(pull == 0, 0.0, pull * lp).sum(-1), mask, reduction)


def tvdpp_sampled(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, *, samples: int = 8,
    baseline: Literal["leave-one-out", "mean", "none"] = "leave-one-out", scale: bool = True, temperature: float = 1.0,
    reduction: Reduction = "token_mean", generator: torch.Generator | None = None,
) -> torch.Tensor:  # fmt: skip
    """TVD++ with `samples` tokens drawn from the student at each position: -(1/K) sum_k A(x_k) log p(x_k).

    baseline: subtracted from the rewards; "leave-one-out" over all drawn tokens keeps the gradient unbiased, "mean" shrinks
    it. scale: divide by the standard deviation of the drawn rewards. Other arguments as `fkl`.
    """
    if samples < 1:
        raise InputError(f"samples: must be at least 1, got {samples}")
    lp, lq = log_probs(student, teacher, temperature)
    with torch.no_grad():
        flat = lp.exp().reshape(-1, lp.shape[-1])
        drawn = torch.multinomial(flat, samples, replacement=True, generator=generator).reshape(*lp.shape[:-1], samples)
        reward = (lq.gather(-1, drawn) > lp.gather(-1, drawn)).to(lp.dtype)
        counted = torch.ones_like(reward, dtype=torch.bool) if mask is None else mask.to(torch.bool)[..., None].expand_as(reward)
        rewards, count = reward[counted], int(counted.sum())
        advantage = reward
        if baseline == "mean" and count:
            advantage = reward - rewards.mean()
        elif baseline == "leave-one-out" and count > 1:
            advantage = (count * reward - rewards.sum()) / (count - 1)
        sigma = float(rewards.std(correction=0)) if scale and count else 1.0
        advantage = advantage / sigma if sigma > 0 else torch.zeros_like(advantage)
    return reduced(-(advantage * lp.gather(-1, drawn)).mean(-1), mask, reduction)


DISTILLATION: dict[str, Callable[..., torch.Tensor]] = {
    "fkl": fkl, "rkl": rkl, "gkd": gkd, "tvd": tvd, "tvdpp": tvdpp, "tvdpp-sampled": tvdpp_sampled,
}  # fmt: skip
"""The functions by name."""


def log_probs(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of both, in float32 or more, over the vocabulary that they share."""
    if temperature <= 0:
        raise InputError(f"temperature: must be above 0, got {temperature}")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise InputError(f"teacher: shape {list(teacher.shape)} for student logits of shape {list(student.shape)}")
    shared = min(student.shape[-1], teacher.shape[-1])
    found = []
    for name, logits in (("student", student), ("teacher", teacher.detach())):
        if bool(logits.isnan().any()):
            raise InputError(f"{name}: logits must not be NaN")
        if bool((logits[..., shared:] > -1e4).any()):
            raise InputError(f"{name}: has {logits.shape[-1]} entries where the other has {shared}; mask the tail with -inf")
        logits = logits[..., :shared]
        found.append(torch.log_softmax((logits if logits.dtype == torch.float64 else logits.float()) / temperature, -1))
    return found[0], found[1]


def _kl(lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    """sum p (log p - log q) over the last dimension; entries of p = 0 add nothing, also to the gradient."""
    none = lp == -torch.inf
    p = lp.masked_fill(none, -torch.inf).exp()
    return torch.where(none, 0.0, p * (lp.masked_fill(none, 0.0) - lq.masked_fill(none, 0.0))).sum(-1)


def reduced(values: torch.Tensor, mask: torch.Tensor | None, reduction: str) -> torch.Tensor:
    """Values at positions [..., T] as the reduction says."""
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    mask = mask.to(torch.bool)
    if mask.shape != values.shape:
        raise InputError(f"mask: shape {list(mask.shape)} for positions of shape {list(values.shape)}")
    values = torch.where(mask, values, 0.0)
    if reduction == "none":
        return values
    if not bool(mask.any()):
        warnings.warn("mask: no position counts, the loss is 0", stacklevel=3)
        return values.sum()
    if reduction == "token_mean":
        return values.sum() / mask.sum()
    if reduction == "sequence_mean":
        count = mask.sum(-1)
        return (values.sum(-1) / count.clamp(min=1)).sum() / (count > 0).sum()
    raise InputError(f"reduction: must be token_mean, sequence_mean or none, got {reduction!r}")
