"""Tabular policies: a world of prompts and answers in which win rates are exact.

Quality is N(0, 1), reference logits are N(0, 0.5^2); pairs are drawn from the reference and labelled by Bradley-Terry with
slope 2, and may be taken apart into unpaired rows. What is trained, and what is compared, is left to the recipes.

Shapes: P prompts, A answers, N pairs or rows.
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


class Rows(NamedTuple):
    """Unpaired rows: prompt and answer, int64 [N], and whether it is wanted, bool [N]."""

    prompt: torch.Tensor
    answer: torch.Tensor
    up: torch.Tensor


def world(seed: int, swapped: float = 0.0, *, prompts: int = 40, answers: int = 6, pairs: int = 4000) -> World:
    """A world; `swapped` is the share of pairs whose label is turned round."""
    g = torch.Generator().manual_seed(seed)
    reference, quality = (scale * torch.randn(prompts, answers, generator=g, dtype=torch.float64) for scale in (0.5, 1))
    prompt = torch.randint(0, prompts, (pairs,), generator=g)
    return World(reference, quality, _labelled(reference, quality, prompt, g, swapped))


def _labelled(
    reference: torch.Tensor, quality: torch.Tensor, prompt: torch.Tensor, generator: torch.Generator, swapped: float = 0.0
) -> torch.Tensor:
    """Pairs (prompt, winner, loser) [N, 3] of two answers of the reference to each prompt [N]."""
    drawn = torch.multinomial(reference.softmax(-1)[prompt], 2, replacement=True, generator=generator)
    values = quality[prompt[:, None], drawn]
    first = torch.rand(len(prompt), generator=generator, dtype=torch.float64) < torch.sigmoid(2 * (values[:, 0] - values[:, 1]))
    first = first ^ (torch.rand(len(prompt), generator=generator) < swapped)
    winner, loser = torch.where(first, drawn[:, 0], drawn[:, 1]), torch.where(first, drawn[:, 1], drawn[:, 0])
    return torch.stack([prompt, winner, loser], 1)


def unpaired(world: World, ups: int, downs: int) -> Rows:
    """The winners of the first `ups` pairs and the losers of the last `downs`."""
    won, lost = world.pairs[:ups], world.pairs[len(world.pairs) - downs :]
    return _rows(won, lost)


def drawn_rows(world: World, law_up: torch.Tensor, law_down: torch.Tensor, rows: int, seed: int) -> Rows:
    """`rows` winners and `rows` losers of fresh pairs, whose prompts follow the laws [P], not normalised."""
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.multinomial(law, rows, replacement=True, generator=g) for law in (law_up, law_down)]
    won, lost = (_labelled(world.reference, world.quality, prompt, g) for prompt in prompts)
    return _rows(won, lost)


def _rows(won: torch.Tensor, lost: torch.Tensor) -> Rows:
    up = torch.arange(len(won) + len(lost)) < len(won)
    return Rows(torch.cat([won[:, 0], lost[:, 0]]), torch.cat([won[:, 1], lost[:, 2]]), up)


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


def train_rows(
    world: World, rows: Rows, objective: str, *, weight: torch.Tensor | None = None, steps: int = 400, learning_rate: float = 0.05,
    **settings: Any,
) -> torch.Tensor:  # fmt: skip
    """Logits [P, A] after full-batch Adam steps of an objective of unpaired rows from the reference.

    weight: of each row, [N]. The mismatched completion that KTO asks for is the answer of the row before.
    """
    table_PA = world.reference.log_softmax(-1)
    cell, mismatched = ((rows.prompt * table_PA.shape[1] + answer) for answer in (rows.answer, rows.answer.roll(1)))
    ref_logp, length = table_PA.flatten()[cell], torch.ones_like(cell)
    role = torch.where(rows.up, 1, -1)
    loss = registry.create("objective", objective, **settings)
    policy = world.reference.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([policy], lr=learning_rate)
    for _ in range(steps):
        logp_C = policy.log_softmax(-1).flatten()  # C cells of a prompt and an answer
        extra = {}
        if "mismatched_ratio" in loss.needs:
            extra["mismatched_ratio"] = (logp_C.detach() - table_PA.flatten())[mismatched]
        out = loss(SequenceStats(logp_C.detach()[cell], length, ref_logp, role=role, weight=weight, extra=extra))
        optimizer.zero_grad()
        logp_C.backward(torch.zeros_like(logp_C).index_add(0, cell, out.dlogp))  # many rows share a cell
        optimizer.step()
    return policy.detach()


def win_rates(world: World, policy: torch.Tensor) -> torch.Tensor:
    """Of each prompt [P]: P(an answer of the policy, logits [P, A], is better than one of the reference), ties half."""
    trained, base, q = policy.softmax(-1), world.reference.softmax(-1), world.quality
    better = (q[:, :, None] > q[:, None, :]) + 0.5 * (q[:, :, None] == q[:, None, :])
    return (trained[:, :, None] * base[:, None, :] * better).sum((1, 2))


def win_rate(world: World, policy: torch.Tensor) -> float:
    """The mean of `win_rates` over the prompts."""
    return float(win_rates(world, policy).mean())


def divergence(world: World, policy: torch.Tensor) -> float:
    """KL(policy || reference) in nats, mean over the prompts."""
    log_p = policy.log_softmax(-1)
    return float((log_p.exp() * (log_p - world.reference.log_softmax(-1))).sum(-1).mean())
