"""torch.library definitions, fakes and autograd, made from the OpSpecs of `ops/*/spec.py`.

An operation's own `__init__.py` calls `define(SPECS)`; nothing else lists operations. Choosing a backend is dispatch's.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch

from . import dispatch, ops
from .opspec import OpSpec

_library: Any = torch.library.Library("fairlead", "FRAGMENT")  # type: ignore[no-untyped-call]
_specs: dict[str, OpSpec] = {}


def define(specs: Iterable[OpSpec]) -> None:
    """Register operations as torch.ops.fairlead.<name>. Definitions are global to the process: a second call for the
    same name (a re-import) keeps the first definition."""
    for spec in specs:
        if spec.name in _specs or _exists(spec.name):
            _specs.setdefault(spec.name, spec)
            continue
        _specs[spec.name] = spec
        _library.define(spec.name + spec.schema)
        _library.impl(spec.name, dispatch.caller(spec), "CompositeExplicitAutograd")
        name = f"fairlead::{spec.name}"
        torch.library.register_fake(name, spec.fake, lib=_library)
        if spec.backward is not None:
            torch.library.register_autograd(name, spec.backward, setup_context=spec.setup_context, lib=_library)


def _exists(name: str) -> bool:
    try:
        torch._C._dispatch_find_schema_or_throw(f"fairlead::{name}", "")
    except RuntimeError:
        return False
    return True


def specs() -> dict[str, OpSpec]:
    """The operations defined so far, by name."""
    return _specs


@functools.cache
def operation_folders() -> tuple[str, ...]:
    return tuple(sorted(info.name for info in pkgutil.iter_modules(ops.__path__) if info.ispkg))


def load_all() -> dict[str, OpSpec]:
    """Import every operation; all OpSpecs by name."""
    for folder in operation_folders():
        import_module(f"{ops.__name__}.{folder}")
    return _specs


def public_names() -> list[str]:
    """The public functions of every operation."""
    return [name for folder in operation_folders() for name in import_module(f"{ops.__name__}.{folder}").__all__]


def public(name: str) -> Any:
    """A public function by its name: first the folder of that name, then whichever folder lists it in `__all__`."""
    folders = operation_folders()
    for folder in sorted(folders, key=lambda folder: folder != name):
        module = import_module(f"{ops.__name__}.{folder}")
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module 'fairlead_kernels' has no attribute {name!r}; operations: {', '.join(folders)}")
