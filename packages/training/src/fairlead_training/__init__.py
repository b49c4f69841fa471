"""fairlead_training: objectives for language models, one signature for all of them.

Attributes are imported on first use. Objectives are reached by name, `fairlead.registry.create("objective", "dpo")`, or as
classes in `fairlead_training.objectives`; losses of logits are functions here.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY: dict[str, str] = {
    "fkl": "objectives.distillation",
    "rkl": "objectives.distillation",
    "gkd": "objectives.distillation",
    "tvd": "objectives.distillation",
    "tvdpp": "objectives.distillation",
    "tvdpp_sampled": "objectives.distillation",
    "wpo_weight": "objectives.pairwise",
    "agreement": "objectives.cyclealign",
    "PairObjective": "objectives.common",
    "MarginObjective": "objectives.common",
    "PreferenceTrainer": "trainer",
    "PreferenceConfig": "trainer",
    "TrainingError": "trainer",
    "Reference": "references",
    "sequence_stats": "statistics",
    "tokenize": "tokens",
    "OnPolicyTrainer": "on_policy",
    "OnPolicyConfig": "on_policy",
    "convert": "data",
    "dpo_trainer": "trl_adapter",
    "EntanglementMonitor": "entanglement",
    "NormalizedPairs": "pair_weights",
    "sparse_weights": "pair_weights",
    "sparse_rows": "pair_weights",
    "token_cosines": "pair_gradients",
    "position_rows": "positions",
    "preference_rows": "long_context",
    "collect": "chains",
    "tokenize_chains": "chains",
    "assess": "chains",
    "assessment_accuracy": "chains",
    "score_dataset": "poft_scoring",
    "AlignedModel": "poft_scoring",
    "cyclealign": "cyclealign_loop",
    "CycleAlignLoop": "cyclealign_loop",
    "CycleAlignLoopConfig": "cyclealign_loop",
    "ChatEndpoint": "rankers",
    "chat_ranker": "rankers",
    "Demonstration": "rankers",
    "DensityRatio": "density_ratio",
    "MeanPooled": "density_ratio",
    "add_weights": "density_ratio",
    "CTRL": "ctrl",
    "BetaController": "ctrl",
    "starting_beta": "ctrl",
    "distill": "draft_distillation",
    "chunked_distillation": "objectives.chunked_distillation",
    "make_distillation_set": "draft_distillation",
    "expected_tokens": "draft_distillation",
}
_MODULES = (
    "chains", "ctrl", "cyclealign_loop", "data", "density_ratio", "draft_distillation", "entanglement", "long_context", "objectives",
    "on_policy", "pair_gradients", "pair_weights", "poft_scoring", "positions", "rankers", "references", "statistics", "tokens", "trainer",
    "trl_adapter",
)  # fmt: skip
__all__ = ["__version__", *_LAZY, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
