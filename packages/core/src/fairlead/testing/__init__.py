"""Contract tests that a method author runs against her own method with one line, as we run them against ours.

    from fairlead.testing import watermark_contract
    TestMine = watermark_contract(lambda vocab_size, key: Mine(vocab_size=vocab_size, key=key))

Each function returns a class of tests for pytest to collect; `registered_contract(kind, name)` checks the registration.
What is registered can be checked without a test file: `pytest --fairlead-contracts NAME`.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import MissingDependencyError

_CONTRACTS = ("watermark_contract", "reward_contract", "guard_contract", "decoder_contract", "rewriter_contract", "objective_contract", "recipe_contract", "registered_contract")
_TINY = ("tiny_model", "save_tiny_model")
__all__ = [*_CONTRACTS, *_TINY]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _TINY:
        return getattr(importlib.import_module("fairlead.testing.tiny"), name)
    try:
        return getattr(importlib.import_module("fairlead.testing.contracts"), name)
    except ModuleNotFoundError as error:
        if error.name != "pytest":
            raise
        raise MissingDependencyError(f"fairlead.testing.{name} needs pytest: pip install pytest") from None
