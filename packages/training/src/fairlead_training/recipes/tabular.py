"""Tabular policies: a world of prompts and answers in which win rates are exact.

Quality is N(0, 1), reference logits are N(0, 0.5^2); pairs are drawn from the reference and labelled by Bradley-Terry with
slope 2. What is trained, and what is compared, is left to the recipes.

Shapes: P prompts, A answers, N pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fairlead import registry
from fairlead.kinds import SequenceStats


class World(NamedTuple):
    """Reference logits and quality [P, A], float64; pairs (prompt, winner, loser) [N, 3], int64."""

    reference: torch.Tensor
    quality: torch.Tensor
    pairs: torch.Tensor


def world(seed: int, swapped: float = 0.0, *, prompts: int = 40, answers: int = 6, pairs: int = 4000) -> World:
    """A world; `swapped` is the share of pairs whose label is turned round."""
    g = torch.Generator().manual_seed(seed)
    reference, quality = (scale * torch.randn(prompts, answers, generator=g, dtype=torch.float64) for scale in (0.5, 1))
    prompt = torch.randint(0, prompts, (pairs,), generator=g)
    drawn = torch.multinomial(reference.softmax(-1)[prompt], 2, replacement=True, generator=g)
    values = quality[prompt[:, None], drawn]
    first = torch.rand(pairs, generator=g, dtype=torch.float64) < torch.sigmoid(2 * (values[:, 0] - values[:, 1]))
    first = first ^ (torch.rand(pairs, generator=g) < swapped)
    winner, loser = torch.where(first, drawn[:, 0], drawn[:, 1]), torch.where(first, drawn[:, 1], drawn[:, 0])
    return World(reference, quality, torch.stack([prompt, winner, loser], 1))


def train_pairs(world: World, objective: str, *, steps: int = 400, learning_rate: float = 0.05, **settings: Any) -> torch.Tensor:
    """Logits [P, A] after full-batch Adam steps of a pair objective from the reference."""
    triples, count = world.pairs.unique(dim=0, return_counts=True)
    items = len(triples)
    prompt, answer = triples[:, :1].expand(-1, 2).flatten(), triples[:, 1:].flatten()
    weight = torch.ones(2 * items, dtype=torch.float64)
    weight[::2] = count * items / len(world.pairs)  # equal pairs once, so that the mean is that of all pairs
    ref_logp, group = world.reference.log_softmax(-1)[prompt, answer], torch.arange(2 * items) // 2
    role = torch.tensor([1, -1] * items)
    loss = registry.create("objective", objective, **settings)
    policy = world.reference.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([policy], lr=learning_rate)
    for _ in range(steps):
        logp = policy.log_softmax(-1)[prompt, answer]
        optimizer.zero_grad()
        loss(SequenceStats(logp, torch.ones_like(group), ref_logp, group, role, weight=weight)).loss.backward()
        optimizer.step()
    return policy.detach()


def win_rate(world: World, policy: torch.Tensor) -> float:
    """P(an answer of the policy, logits [P, A], is better than one of the reference), ties half."""
    trained, base, q = policy.softmax(-1), world.reference.softmax(-1), world.quality
    better = (q[:, :, None] > q[:, None, :]) + 0.5 * (q[:, :, None] == q[:, None, :])
    return float((trained[:, :, None] * base[:, None, :] * better).sum((1, 2)).mean())
