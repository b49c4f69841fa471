"""What the objectives share: pairs and groups of a batch, ready-made quantities of each side, stable functions.

Notation of all files here: s = logp (token sum), n = length, a = s / n, u = s - ref_logp, ub = u / n, sg = sigmoid,
ls = logsigmoid. Shape suffixes: S sequences, P pairs, G groups, N places in the largest group.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field

from fairlead.config import MethodConfig
from fairlead.errors import InputError
from fairlead.kinds import Objective, SequenceStats

PAIRED = ("group", "role")
REFERENCED = ("group", "role", "ref_logp")
_LINEAR_FROM = 30.0


class BetaConfig(MethodConfig):
    """Settings of an objective whose only one is its temperature."""

    beta: float = Field(0.1, gt=0, description="weight of the log-ratio: large keeps the policy close to the reference")


class NoConfig(MethodConfig):
    """Settings of an objective without any."""


@dataclass(frozen=True)
class Side:
    """One sequence of each of P pairs: s, n, ref (None without a reference) and weight, all [P]."""

    s: torch.Tensor
    n: torch.Tensor
    ref: torch.Tensor | None
    weight: torch.Tensor

    @property
    def a(self) -> torch.Tensor:
        """Mean log-probability of a token."""
        return self.s / self.n

    @property
    def u(self) -> torch.Tensor:
        """Log-ratio to the reference."""
        if self.ref is None:
            raise InputError("the batch lacks ref_logp, which this objective needs")
        return self.s - self.ref

    @property
    def ub(self) -> torch.Tensor:
        """Log-ratio of a token, on average."""
        return self.u / self.n


class PairObjective(Objective):
    """An objective of P pairs: a subclass writes `pair(w, l)`, chosen and rejected side -> loss [P].

    quantity: what beta multiplies to give the rewards of the metrics: "u", "ub", "a" or "s" of a side.
    """

    needs: tuple[str, ...] = REFERENCED
    quantity: ClassVar[str] = "u"

    @abstractmethod
    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741 - w and l are the field's names
        """The loss of each pair, [P]."""

    def item_weight(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        """The weight of each item, [P]: the product of its two sequences' weights."""
        return w.weight * l.weight

    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        chosen, rejected = sides(batch)
        losses = self.pair(chosen, rejected) * self.item_weight(chosen, rejected)
        scale = float(getattr(self.config, "beta", 1.0))
        with torch.no_grad():
            w, l = (scale * getattr(side, self.quantity) for side in (chosen, rejected))  # noqa: E741
            shown = torch.stack([w.mean(), l.mean(), (w - l).mean(), (w > l).to(w.dtype).mean(), chosen.s.mean(), rejected.s.mean()])
        names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
        return losses, dict(zip(names, shown.tolist(), strict=True)) if losses.numel() else {}


class MarginObjective(PairObjective):
    """A pair objective of D = u_w - u_l alone: a subclass writes `of_margin(D)`."""

    @abstractmethod
    def of_margin(self, margin: torch.Tensor) -> torch.Tensor:
        """The loss [P] of the margins D [P]."""

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return self.of_margin(w.u - l.u)


def sides(batch: SequenceStats) -> tuple[Side, Side]:
    """The chosen and the rejected sequence of every pair, in ascending order of the groups.

    InputError names the first group that has not exactly one of each.
    """
    assert batch.group is not None and batch.role is not None  # `needs` has been checked
    group, found = batch.group, []
    for role in (1, -1):
        index = (batch.role == role).nonzero().squeeze(-1)
        found.append(index[group[index].argsort(stable=True)])
    w, l = found  # noqa: E741
    if w.shape != l.shape or not torch.equal(group[w], group[l]) or len(group[w].unique()) != len(w):
        for name in group.unique().tolist():
            chosen, rejected = (int(((group == name) & (batch.role == role)).sum()) for role in (1, -1))
            if (chosen, rejected) not in ((1, 1), (0, 0)):
                raise InputError(f"group {name}: has {chosen} chosen and {rejected} rejected sequences, a pair needs one of each")
    if not len(w):
        raise InputError("role: no pair of a chosen and a rejected sequence in the batch")
    return side(batch, w), side(batch, l)


def side(batch: SequenceStats, index: torch.Tensor) -> Side:
    """The sequences at an index."""
    ref = None if batch.ref_logp is None else batch.ref_logp[index].detach()
    return Side(batch.logp[index], batch.length[index].to(batch.logp.dtype), ref, weights(batch)[index])


def weights(batch: SequenceStats) -> torch.Tensor:
    """Weights of the sequences, 1 where there are none, without gradient."""
    return torch.ones_like(batch.logp).detach() if batch.weight is None else batch.weight.detach().to(batch.logp.dtype)


def grouped(group: torch.Tensor, by: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups as rows: indices of the sequences [G, N] and which places are taken [G, N].

    Groups come in ascending order; within one the sequences are in descending order of `by` [S] (equal ones, and all
    without it, in the order of the batch).
    """
    order = torch.arange(len(group), device=group.device) if by is None else by.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    _, row, sizes = torch.unique_consecutive(group[order], return_inverse=True, return_counts=True)
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(len(order), device=group.device) - starts[row]
    width = int(sizes.max()) if len(sizes) else 0
    index = torch.zeros(len(sizes), width, dtype=torch.int64, device=group.device)
    taken = torch.zeros(len(sizes), width, dtype=torch.bool, device=group.device)
    index[row, place], taken[row, place] = order, True
    return index, taken


def preference(batch: SequenceStats) -> torch.Tensor:
    """How much each sequence is wanted, [S], higher is better: its reward, or else its rank, or else its role."""
    if batch.reward is not None:
        return batch.reward.detach().to(batch.logp.dtype)
    if batch.rank is not None:
        if bool((batch.rank < 0).any()):
            raise InputError(f"rank: must not be negative, got {int(batch.rank.min())}")
        return -batch.rank.to(batch.logp.dtype)
    if batch.role is not None:
        return batch.role.to(batch.logp.dtype)
    raise InputError("the batch lacks an order within its groups: give reward, rank or role")


def by_label(up: torch.Tensor, yes: float, no: float, dtype: torch.dtype) -> torch.Tensor:
    """One number for wanted sequences and another for the rest, [S]."""
    return torch.where(up, torch.tensor(yes, dtype=dtype, device=up.device), torch.tensor(no, dtype=dtype, device=up.device))


def group_weight(batch: SequenceStats, index: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """The weight of each group, [G]: the product of its sequences' weights."""
    return torch.where(taken, weights(batch)[index], 1.0).prod(1)


def log1mexp(a: torch.Tensor) -> torch.Tensor:
    """log(1 - e^a) for a < 0, exact at both ends; a is held at or below -1e-7, where the limit of the gradient is finite."""
    a = a.clamp(max=-1e-7)
    near, far = a.clamp(min=-math.log(2)), a.clamp(max=-math.log(2))
    return torch.where(a > -math.log(2), torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def soft_exp(x: torch.Tensor) -> torch.Tensor:
    """e^x, continued linearly from x = 30: finite with a finite gradient for all log-ratios of a language model."""
    return torch.exp(x.clamp(max=_LINEAR_FROM)) * (1 + (x - _LINEAR_FROM).clamp(min=0))
