"""An objective on the fused log-probability kernel, chunk by chunk, gives the gradients of dense autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fairlead import registry
from fairlead.kinds import SequenceStats
from fairlead_kernels import linear_logprob

LENGTH = torch.tensor([5, 4, 8, 9, 3, 6])
FIRST = [0, *LENGTH.cumsum(0).tolist()]


def columns(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, fused: bool) -> torch.Tensor:
    """Sums of the log-probabilities of each sequence's tokens."""
    if fused:
        token = linear_logprob(hidden, weight, target)
    else:
        token = (hidden @ weight.T).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    return torch.stack([token[a:b].sum() for a, b in itertools.pairwise(FIRST)])


@pytest.mark.parametrize(
    ("name", "settings"), [("dpo", {}), ("simpo", {}), ("orpo", {}), ("aot-unpaired", {}), ("bco", {}), ("sft", {}), ("rrhf", {}), ("aft", {})]
)
def test_chunks_of_the_fused_path_give_the_dense_gradients(name: str, settings: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(0)
    tokens = int(LENGTH.sum())
    hidden, weight = torch.randn(tokens, 8, generator=g, dtype=torch.float64), torch.randn(40, 8, generator=g, dtype=torch.float64)
    target, noise = torch.randint(0, 40, (tokens,), generator=g), torch.randn(6, generator=g, dtype=torch.float64)
    hidden.requires_grad_(True)
    weight.requires_grad_(True)
    dense = columns(hidden, weight, target, fused=False)
    others: dict[str, Any] = {"ref_logp": (dense.detach() + noise), "group": [0, 0, 1, 1, 2, 2], "role": [1, -1] * 3}
    whole = registry.create("objective", name, **settings)(SequenceStats(dense, LENGTH, **others)).loss
    expected = torch.autograd.grad(whole, (hidden, weight))

    with torch.no_grad():
        logp = columns(hidden, weight, target, fused=True)
    out = registry.create("objective", name, **settings)(SequenceStats(logp, LENGTH, **others))
    torch.testing.assert_close(out.loss, whole.detach())
    for row in range(6):  # one sequence at a time: no more than its logits exist at once
        part = slice(FIRST[row], FIRST[row + 1])
        (linear_logprob(hidden[part], weight, target[part]).sum() * out.dlogp[row]).backward()
    torch.testing.assert_close(hidden.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1])
