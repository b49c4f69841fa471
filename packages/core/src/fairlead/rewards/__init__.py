"""Rewards of the core, one file each; import them by name or through the registry.

Every reward also fits TRL's reward-function lists: `reward.as_trl()`.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "CallableReward": "function",
    "KeywordReward": "keyword",
    "RegexReward": "regex",
    "LengthReward": "length",
    "SequenceClassifierReward": "sequence_classifier",
    "WeightedReward": "weighted",
    "MinReward": "minimum",
    "CachedReward": "cached",
    "CalibratedReward": "calibrated",
    "CalibrationTable": "calibration",
    "Transform": "calibration",
    "ReadabilityReward": "readability",
    "JudgeReward": "judge",
    "EmbeddingReward": "embedding",
    "ValueHeadReward": "value_head",
    "ValueHead": "value_head",
    "fit_value_head": "value_head",
}
__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
