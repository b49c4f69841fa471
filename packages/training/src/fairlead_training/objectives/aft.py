"""AFT: lift right chains of thought above wrong ones without crushing the wrong ones (arXiv 2309.02144).

L = log(1 + sum over i better than j of [e^{a_j - a_i} + e^{2 B_j - a_i - a_j}]), B_j = min over better i of a_i, less beta,
without gradient. The second term (boundary) pushes a wrong chain down above B_j and up below it; plain and detached have
only the first, and detached stops the gradient of a_j in it. Binary labels are two ranks. The boundary term is
reconstructed from the paper's stated property (a gradient that vanishes at B).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from fairlead.kinds import Objective, SequenceStats

from .common import NoConfig, group_weight, grouped, preference


class AFTConfig(NoConfig):
    """Settings of AFT."""

    variant: Literal["boundary", "detached", "plain"] = Field("boundary", description="what keeps wrong chains from falling")
    boundary_beta: float = Field(0.15, ge=0, description="how far below the worst right chain the boundary lies, nats a token")
    align_weight: float = Field(1.0, ge=0, description="weight of the alignment term against the reference chain's likelihood")


class AFT(Objective):
    """One item per group (question), 0 where it has no two chains of different rank; such groups count in the mean.

    The optional column `reference` of `extra` (bool [S]) marks chains that are no candidates but add their mean negative
    log-likelihood, the paper's fine-tuning term.
    """

    needs = ("group",)
    Config = AFTConfig
    config: AFTConfig

    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        assert batch.group is not None
        wanted = preference(batch)
        index, taken = grouped(batch.group)
        given = batch.extra.get("reference")
        reference = torch.zeros_like(taken) if given is None else taken & given.to(torch.bool)[index]
        a_GN, r_GN, chain = (batch.logp / batch.length)[index], wanted[index], taken & ~reference
        better = (r_GN[:, :, None] > r_GN[:, None, :]) & chain[:, :, None] & chain[:, None, :]
        losses = self.config.align_weight * self.align(a_GN, better)
        losses = losses - torch.where(reference, a_GN, 0.0).sum(1) / reference.sum(1).clamp(min=1)
        return losses * group_weight(batch, index, taken), self._shown(a_GN.detach(), better)

    def align(self, a_GN: torch.Tensor, better_GNN: torch.Tensor) -> torch.Tensor:
        """The alignment term [G] of mean log-probabilities; better[g, i, j]: i is to be above j."""
        lower = a_GN.detach() if self.config.variant == "detached" else a_GN
        terms = [lower[:, None, :] - a_GN[:, :, None]]
        if self.config.variant == "boundary":
            floor = boundary(a_GN, better_GNN, self.config.boundary_beta)
            terms.append(2 * floor[:, None, :] - a_GN[:, :, None] - a_GN[:, None, :])
        terms = [term.masked_fill(~better_GNN, -torch.inf).flatten(1) for term in terms]
        return torch.cat([torch.zeros_like(a_GN[:, :1]), *terms], 1).logsumexp(1)

    def _shown(self, a_GN: torch.Tensor, better_GNN: torch.Tensor) -> dict[str, float]:
        pairs = better_GNN.sum((1, 2))
        usable = pairs > 0
        right = ((a_GN[:, :, None] > a_GN[:, None, :]) & better_GNN).sum((1, 2))
        share = (right[usable] / pairs[usable]).mean() if bool(usable.any()) else torch.tensor(torch.nan)
        floor, lower = boundary(a_GN, better_GNN, self.config.boundary_beta), better_GNN.any(1)
        below = ((a_GN < floor) & lower).sum() / lower.sum().clamp(min=1)
        shown = {"aft/usable": float(usable.to(a_GN.dtype).mean()), "aft/below_boundary": float(below)}
        return shown | ({"aft/assessment_accuracy": float(share)} if bool(usable.any()) else {})


def boundary(a_GN: torch.Tensor, better_GNN: torch.Tensor, beta: float) -> torch.Tensor:
    """B_j [G, N]: the lowest of all chains better than j, less beta, without gradient; 0 where there is none."""
    lowest = a_GN.detach()[:, :, None].masked_fill(~better_GNN, torch.inf).min(1).values
    return torch.where(lowest.isfinite(), lowest - beta, 0.0)
