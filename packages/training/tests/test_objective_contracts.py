"""Every registered objective keeps the contract of its kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fairlead import registry
from fairlead.kinds import SequenceStats
from fairlead.testing import objective_contract
from fairlead.testing.objectives import example_batch

SETTINGS: dict[str, dict[str, Any]] = {"kto": {"z0": 0.3}, "bco": {"delta": 0.1}, "aft": {"variant": "plain"}}
SURROGATES = ("grpo", "gspo")  # their ratio is 1 whatever logp is, until an older policy's is given
OURS = [m.name for m in registry.methods("objective") if m.package == "fairlead-training"]


def weighted_batch() -> SequenceStats:
    """For ld-dpo: the sums of the weights of the tokens come with it."""
    batch = example_batch(())
    assert batch.group is not None
    own = registry.create("objective", "ld-dpo").token_weights(batch.length, batch.group).sum(1)
    return replace(batch, extra={"weighted_length": own})


def group_batch() -> SequenceStats:
    """Groups of four with rewards, for objectives that compare samples."""
    batch = example_batch((), groups=4)
    return replace(batch, group=torch.arange(8) // 4, reward=torch.linspace(-1, 1, 8, dtype=torch.float64))


BATCHES = {"ld-dpo": weighted_batch, "rloo": group_batch, "grpo": group_batch, "gspo": group_batch}
for _name in OURS:
    _class = objective_contract(
        lambda name=_name: registry.create("objective", name, **SETTINGS.get(name, {})), BATCHES.get(_name), surrogate=_name in SURROGATES
    )
    globals()["Test_" + _name.replace("-", "_")] = _class


class TestRunningShift(objective_contract(lambda: registry.create("objective", "bco"), surrogate=True)):  # type: ignore[misc]
    """BCO with its running shift."""


class TestMovingZeroPoint(objective_contract(lambda: registry.create("objective", "kto"))):  # type: ignore[misc]
    """KTO whose zero point comes from mismatched pairs."""


class TestBoundary(objective_contract(lambda: registry.create("objective", "aft"), surrogate=True)):  # type: ignore[misc]
    """AFT with its boundary."""


def test_the_whole_table_is_registered() -> None:
    table = (
        "dpo cdpo robust ipo ipo-sum hinge exo-pair nca-pair bco-pair sppo-hard aot aot-unpaired apo-zero apo-down discopop "
        "sigmoid-norm f-dpo r-dpo dpop sft rpo simpo alphapo orpo cpo cpo-ipo slic logo rrhf pro plackett-luce dpo-list aft poft "
        "kto bco wpo ld-dpo reinforce rloo grpo gspo"
    )
    assert sorted(OURS) == sorted(table.split())


@pytest.mark.parametrize("name", OURS)
def test_every_setting_says_what_it_is(name: str) -> None:
    config = registry.get("objective", name).config
    assert config is not None
    assert all(field.description for field in config.model_fields.values())
