"""Kernels for aligning language models: `from fairlead_kernels import watermark_bias, gumbel_sample, ...`.

The public functions live in `fairlead_kernels.ops.<operation>` and are found on first use, so importing this package
imports neither triton nor any operation.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = ("checks", "dispatch", "library", "native", "ops", "opspec")
_ELSEWHERE = {
    "register_implementation": "dispatch",
    "explain": "dispatch",
    "use_backend": "dispatch",
    "KernelUnavailable": "dispatch",
}


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _ELSEWHERE:
        value = getattr(import_module(f"{__name__}.{_ELSEWHERE[name]}"), name)
    else:
        from .library import public

        value = public(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from .library import public_names

    return sorted({*globals(), *_ELSEWHERE, *public_names()})
