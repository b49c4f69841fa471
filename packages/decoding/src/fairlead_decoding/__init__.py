"""fairlead_decoding: align a language model while it decodes, and know what to expect.

Attributes are imported on first use: `import fairlead_decoding` costs milliseconds beyond torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY: dict[str, str] = {
    "BestOfN": "best_of_n",
    "WorstOfN": "best_of_n",
    "SoftBestOfN": "soft_best_of_n",
    "Rejection": "rejection",
    "TransferQStar": "transfer_q_star",
    "ControlledDecoding": "controlled_decoding",
    "ARGS": "args_search",
    "DeAL": "deal",
    "GenARM": "genarm",
    "Blockwise": "blockwise",
    "KeywordCoverage": "heuristics",
    "LengthLimit": "heuristics",
    "Speculative": "speculative",
    "GuideAlign": "guide_align",
    "GuidelineLibrary": "guidelines",
    "PAligner": "p_aligner",
    "PrincipleSearch": "principle_search",
}
_MODULES = ("theory", "enumerable")
__all__ = ["__version__", *_LAZY, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
