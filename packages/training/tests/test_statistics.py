"""The log-prob path of the trainer against one dense forward pass per sequence, on any rows, packed and padded."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead.testing import tiny_model
from fairlead_training import sequence_stats

IDS = st.integers(3, 60)
ROW = st.fixed_dictionaries(
    {
        "prompt_ids": st.lists(IDS, min_size=1, max_size=7),
        "completion_ids": st.lists(st.lists(IDS, min_size=1, max_size=6), min_size=1, max_size=3),
    }
)


@cache
def model(dtype: torch.dtype) -> Any:
    """A tiny Llama whose norms keep the dtype; transformers' own round to float32."""
    policy = copy.deepcopy(tiny_model()).to(dtype)
    for parent in list(policy.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=dtype)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return policy


def dense(policy: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Log-probability of each completion, each by its own forward pass, logits and log_softmax."""
    found = []
    for row in rows:
        for answer in row["completion_ids"]:
            ids = torch.tensor([row["prompt_ids"] + answer])
            table_TV = policy(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            places = torch.arange(len(row["prompt_ids"]) - 1, ids.shape[1] - 1)
            found.append(table_TV[places, ids[0, places + 1]].sum())
    return torch.stack(found)


def gradients(policy: Any, value: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(policy.parameters()))])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("packed", [True, False])
def test_sums_and_gradients_are_those_of_dense_passes(dtype: torch.dtype, tolerance: float, packed: bool) -> None:
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(st.lists(ROW, min_size=1, max_size=4), st.integers(0, 2**31))
    def check(rows: list[dict[str, Any]], seed: int) -> None:
        policy = model(dtype)
        stats = sequence_stats(policy, rows, packed=packed)
        expected_S = dense(policy, rows)
        torch.testing.assert_close(stats.logp.to(dtype), expected_S, rtol=tolerance, atol=tolerance)
        assert stats.length.tolist() == [len(a) for row in rows for a in row["completion_ids"]]
        weight_S = torch.randn(len(expected_S), generator=torch.Generator().manual_seed(seed), dtype=dtype)
        found, wanted = (gradients(policy, (weight_S * s).sum()) for s in (stats.logp, expected_S))
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(1.0, float(wanted.abs().max())))

    check()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(ROW, min_size=2, max_size=4), st.data())
def test_a_row_does_not_see_its_neighbours(rows: list[dict[str, Any]], data: Any) -> None:
    policy = model(torch.float64)
    own = len(rows[0]["completion_ids"])
    before = sequence_stats(policy, rows, packed=True).logp[:own]
    others = data.draw(st.lists(ROW, min_size=len(rows) - 1, max_size=len(rows) - 1))
    after = sequence_stats(policy, [rows[0], *others], packed=True).logp[:own]
    torch.testing.assert_close(before, after, rtol=0, atol=1e-12)


SHARDED = """
import copy, warnings, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from fairlead.logprobs import linear_head
from fairlead.testing import tiny_model
from fairlead_training.statistics import attention_of, lay_out, token_stats

warnings.filterwarnings("error", message=".*returned a view tensor")
dist.init_process_group("gloo")
mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
whole = copy.deepcopy(tiny_model())
sharded = copy.deepcopy(whole)
linear_head(sharded)
for part in (*sharded.model.layers, sharded.lm_head, sharded):
    fully_shard(part, mesh=mesh)
rows = [{"prompt_ids": [3 + i + 4 * rank, 5, 7], "completion_ids": [[10 + i, 11, 12], [20 + i, 21]]} for i in range(3)]
for packed in (True, False):
    sums = []
    for model in (sharded, whole):
        model.zero_grad()
        with attention_of(model, packed):
            found = token_stats(model, lay_out(rows, packed)).sum_S()
            (found * torch.linspace(-1, 1, 6)).sum().backward()
        sums.append(found.detach())
    torch.testing.assert_close(*sums, rtol=0, atol=1e-6)
    for mine, right in zip(sharded.parameters(), whole.parameters(), strict=True):
        dist.all_reduce(right.grad)
        torch.testing.assert_close(mine.grad.full_tensor(), right.grad / 2, rtol=1e-5, atol=1e-6)
"""


def test_weights_sharded_by_fsdp_give_the_same_sums_and_gradients(on_two_processes: Any) -> None:
    on_two_processes(SHARDED)
