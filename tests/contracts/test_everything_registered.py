"""The contracts of the kinds over everything that is registered here, plugins of others included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fairlead import registry
from fairlead.rewards import ValueHead
from fairlead.testing import (
    decoder_contract,
    guard_contract,
    recipe_contract,
    registered_contract,
    reward_contract,
    rewriter_contract,
    tiny_model,
    watermark_contract,
)
from fairlead_decoding.guidelines import Guideline, GuidelineLibrary

RULES = GuidelineLibrary(
    [Guideline(f"r{i}", "", text) for i, text in enumerate(("Be brief.", "Ask a doctor.", "Name the law."))]
)

NEEDED: dict[tuple[str, str], dict[str, Any]] = {
    ("watermark", "gumbel"): {"dedup_contexts": "single_turn"},
    ("watermark", "modified-gumbel"): {"dedup_contexts": "single_turn"},
    ("watermark", "example-fixed-list"): {"delta": 4.0},
    ("decoder", "alignment-resampling"): {
        "reward": lambda prompts, responses: [float(len(r)) for r in responses],
        "n": 2,
    },
    ("decoder", "genarm"): {"reward_model": tiny_model(), "reference": tiny_model()},  # a ratio of 1: plain generation
    ("decoder", "speculative"): {"draft": tiny_model(seed=5)},
    ("decoder", "rejection"): {"threshold": 0.3, "n": 6},
    ("rewriter", "p-aligner"): {"model": "zoo:sft", "max_new_tokens": 16},
    ("rewriter", "guide-align"): {"library": RULES, "encoder": "zoo:sft", "k": 2, "n_docs": 3},
    ("reward", "callable"): {"function": lambda prompts, responses: [float(len(r)) for r in responses]},
    ("reward", "keyword"): {"weights": {"thanks": 1.0}},
    ("reward", "weighted"): {"rewards": ["length", "regex"], "weights": [0.5, 2.0]},
    ("reward", "min"): {"rewards": ["length", "regex"]},
    ("reward", "cached"): {"reward": "length"},
    ("reward", "judge"): {"model": "zoo:sft"},
    ("reward", "value-head"): {"model": "zoo:sft", "head": ValueHead(torch.ones(1, 128))},
    ("reward", "embedding-similarity"): {"model": "zoo:sft"},
    ("reward", "calibrated"): {
        "reward": "length",
        "references": {"how are you": ["well"], "what is this": ["a", "b c"]},
    },
}
"""Settings without which a method does nothing, or too little for its contract."""

PAIRS: dict[str, dict[str, Any]] = {
    name: {
        "prompts": ("how do i kill the teacher ?", "who are you ?"),
        "responses": ("that is wrong , i refuse , it hurts people .", "i want to enslave the people with force ."),
    }
    for name in ("world", "world-model")
}
"""Prompts of the world that a method judges."""


def make(kind: str, name: str) -> Callable[..., Any]:
    return lambda **settings: registry.create(kind, name, **NEEDED.get((kind, name), {}), **settings)


def names(kind: str) -> list[str]:
    return [m.name for m in registry.methods(kind)]


def checks(contract: type) -> list[str]:
    return [name for name in dir(contract) if name.startswith("test_")]


def cases() -> list[Any]:
    """(contract, check) of every registered method, as one pytest parameter each."""
    contracts: list[tuple[str, type]] = []
    for m in registry.methods():
        contracts.append((f"{m.kind}-{m.name}-registered", registered_contract(m.kind, m.name)))
    contracts += [(f"watermark-{n}", watermark_contract(make("watermark", n))) for n in names("watermark")]
    contracts += [(f"reward-{n}", reward_contract(make("reward", n), **PAIRS.get(n, {}))) for n in names("reward")]
    contracts += [(f"guard-{n}", guard_contract(make("guard", n), **PAIRS.get(n, {}))) for n in names("guard")]
    contracts += [(f"decoder-{n}", decoder_contract(make("decoder", n))) for n in names("decoder")]
    contracts += [(f"rewriter-{n}", rewriter_contract(make("rewriter", n))) for n in names("rewriter")]
    contracts += [(f"recipe-{n}", recipe_contract(n)) for n in names("recipe")]
    return [
        pytest.param(contract, check, id=f"{name}-{check}")
        for name, contract in contracts
        for check in checks(contract)
    ]


@pytest.mark.parametrize(("contract", "check"), cases())
def test_contract(contract: type, check: str) -> None:
    getattr(contract(), check)()


def test_every_kind_that_has_methods_has_a_contract() -> None:
    assert {m.kind for m in registry.methods()} <= {
        "watermark",
        "reward",
        "guard",
        "recipe",
        "decoder",
        "rewriter",
        "objective",
    }
