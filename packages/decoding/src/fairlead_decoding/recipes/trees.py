"""Complete trees of answers: V tokens, T steps, every law and value exact. The ground on which decoders are compared.

A policy is a list of next-token laws, one [V^t, V] table for each step t; a reward is one number per leaf, float64 [V^T].

Shape suffixes: S states at one depth (V^t), V tokens, M leaves (V^T).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Policy = list[np.ndarray]


@dataclass(frozen=True)
class Tree:
    """A reference policy and two rewards of every leaf: the target's and the baseline's."""

    sft: Policy
    reward: np.ndarray
    baseline: np.ndarray


def random_tree(rng: np.random.Generator, vocab: int = 4, depth: int = 4) -> Tree:
    """Dirichlet(1) conditionals, rewards uniform on [0, 1], baseline reward r / 2 + noise / 2."""
    sft = [rng.dirichlet(np.ones(vocab), vocab**t) for t in range(depth)]
    reward = rng.uniform(size=vocab**depth)
    return Tree(sft, reward, reward / 2 + rng.uniform(size=vocab**depth) / 2)


def joint(policy: Policy) -> np.ndarray:
    """Probability of every leaf, [M]."""
    law = np.ones(1)
    for table_SV in policy:
        law = (law[:, None] * table_SV).reshape(-1)
    return law


def conditionals(law: np.ndarray, vocab: int) -> Policy:
    """The next-token laws of a law over leaves; uniform where a state is never reached."""
    tables = []
    while law.size > 1:
        by_parent = law.reshape(-1, vocab)
        total = by_parent.sum(1, keepdims=True)
        tables.append(np.where(total > 0, by_parent / np.where(total > 0, total, 1.0), 1.0 / vocab))
        law = total[:, 0]
    return tables[::-1]


def action_values(policy: Policy, reward: np.ndarray) -> list[np.ndarray]:
    """Q(s, z): expected reward of taking z and then following the policy, a [V^t, V] table for each step."""
    value, tables = reward, []
    for table_SV in reversed(policy):
        q_SV = value.reshape(table_SV.shape)
        tables.append(q_SV)
        value = (table_SV * q_SV).sum(1)
    return tables[::-1]


def guided(proposal: Policy, values: list[np.ndarray], alpha: float) -> Policy:
    """pi(z | s) prop. to proposal(z | s) exp(Q(s, z) / alpha)."""
    found = []
    for table_SV, q_SV in zip(proposal, values, strict=True):
        score = np.log(np.maximum(table_SV, 1e-300)) + q_SV / alpha
        weight = np.exp(score - score.max(1, keepdims=True))
        found.append(weight / weight.sum(1, keepdims=True))
    return found


def tilted(policy: Policy, reward: np.ndarray, beta: float) -> Policy:
    """The optimum of E r - beta KL to the policy: leaves weighted by exp(r / beta)."""
    weight = joint(policy) * np.exp((reward - reward.max()) / beta)
    return conditionals(weight / weight.sum(), policy[0].shape[1])


def weighted_values(policy: Policy, reward: np.ndarray, baseline: np.ndarray, beta: float) -> list[np.ndarray]:
    """Q of indirect transfer: rewards of the policy's continuations under weights exp((r - b) / beta), normalised at (s, z)."""
    ratio = np.exp((reward - baseline) / beta)
    top, bottom = action_values(policy, ratio * reward), action_values(policy, ratio)
    return [a / b for a, b in zip(top, bottom, strict=True)]


def expected(policy: Policy, reward: np.ndarray) -> float:
    return float(joint(policy) @ reward)


def divergence(policy: Policy, other: Policy) -> float:
    """KL(policy || other) of the leaves, nats."""
    p, q = joint(policy), joint(other)
    mine = p > 0
    return float((p[mine] * np.log(p[mine] / q[mine])).sum())


def stepwise_divergence(policy: Policy, other: Policy) -> float:
    """sum_t E_{s ~ policy} KL(policy(. | s) || other(. | s)), nats; equal to `divergence` by the chain rule."""
    total, reach = 0.0, np.ones(1)
    for mine_SV, theirs_SV in zip(policy, other, strict=True):
        ratio = np.where(mine_SV > 0, mine_SV * np.log(np.maximum(mine_SV, 1e-300) / theirs_SV), 0.0)
        total += float(reach @ ratio.sum(1))
        reach = (reach[:, None] * mine_SV).reshape(-1)
    return total


def at_divergence(proposal: Policy, values: list[np.ndarray], reference: Policy, kl: float) -> Policy:
    """`guided` with the alpha whose KL to the reference is `kl`, by bisection on log alpha."""
    low, high = np.log(1e-3), np.log(1e3)
    for _ in range(60):
        middle = (low + high) / 2
        if divergence(guided(proposal, values, float(np.exp(middle))), reference) > kl:
            low = middle
        else:
            high = middle
    return guided(proposal, values, float(np.exp(high)))
