"""fairlead: align language and vision models with published methods, five lines each.

This module is light: attributes are imported on first use, so `import fairlead` costs milliseconds.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "Method": "fairlead.registry",
    "hookimpl": "fairlead.hookspecs",
    "FairleadError": "fairlead.errors",
    "SecretKey": "fairlead.keys",
    "Generation": "fairlead.generation",
    "SequenceStats": "fairlead.kinds.objective",
    "Budget": "fairlead.decoding",
    "fisher": "fairlead.curvature",
    "Run": "fairlead.runs",
}
_MODULES = ("registry", "rewards", "stats", "taxonomy")
__all__ = ["__version__", *_LAZY, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fairlead.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'fairlead' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
