"""RRHF (arXiv 2304.05302) and what CycleAlign (arXiv 2310.16271) adds: the ranking on which two rankers agree.

RRHF: L = sum over pairs i better than j of max(0, a_j - a_i + margin) - sft_weight a_best. Lengths are true lengths (the
published code divides by padded ones), pairs are summed, equal ranks make no pair, the best is the first of the highest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from fairlead.errors import InputError
from fairlead.kinds import Objective, SequenceStats

from .common import NoConfig, group_weight
from .ranking import list_metrics, listed


class RRHFConfig(NoConfig):
    """Settings of RRHF."""

    margin: float = Field(0.0, ge=0, description="margin of the hinge, in nats a token")
    sft_weight: float = Field(1.0, ge=0, description="weight of the mean log-likelihood of the best sequence")


class RRHF(Objective):
    """Hinges over all ordered pairs of a list, and the likelihood of its best.

    On an order that the policy has already (agreement with its own ranking) every hinge is zero: `rrhf/active`, the share
    of pairs whose hinge is not, shows it.
    """

    needs = ("group",)
    Config = RRHFConfig
    config: RRHFConfig

    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        index, taken, wanted = listed(batch)
        if not len(index):
            return batch.logp.new_zeros(0), {"lists": 0.0}
        a_GN, r_GN = (batch.logp / batch.length)[index], wanted[index]
        better = (r_GN[:, :, None] > r_GN[:, None, :]) & taken[:, :, None] & taken[:, None, :]
        hinge = (a_GN[:, None, :] - a_GN[:, :, None] + self.config.margin).clamp(min=0)
        hinge = torch.where(better, hinge, 0.0)
        losses = hinge.sum((1, 2)) - self.config.sft_weight * a_GN[:, 0]
        active = float((hinge.detach() > 0).sum() / better.sum().clamp(min=1))
        return losses * group_weight(batch, index, taken), {**list_metrics(a_GN, taken), "rrhf/active": active}


def agreement(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The longest common subsequence of two rankings of the same n things, best first.

    first, second: permutations of range(n). Of several longest ones, the one whose elements come first in `first`.
    InputError for rankings that are no permutations of the same things. O(n^2).
    """
    n = len(first)
    for name, ranking in (("first", first), ("second", second)):
        if sorted(ranking) != list(range(n)):
            raise InputError(f"{name}: must be a permutation of 0..{n - 1}, got {list(ranking)}")
    place = {item: k for k, item in enumerate(second)}
    sequence = [place[item] for item in first]
    length = [1] * n  # of the longest increasing subsequence that starts at k
    for k in range(n - 2, -1, -1):
        length[k] += max((length[j] for j in range(k + 1, n) if sequence[j] > sequence[k]), default=0)
    kept: list[int] = []
    last, left = -1, max(length, default=0)
    for k in range(n):
        if sequence[k] > last and length[k] == left:
            kept.append(first[k])
            last, left = sequence[k], left - 1
    return kept
