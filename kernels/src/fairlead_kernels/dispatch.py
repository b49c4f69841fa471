"""Which backend serves a call, and why another does not.

The largest priority that can serve wins. FAIRLEAD_KERNELS=reference|c|triton (or `use_backend`) forces one, and the
call fails with the reason where that one cannot serve. A slower path taken silently would be a lie: it is logged once.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from . import native
from .opspec import REFERENCE, TRITON, C, Implementation, OpSpec

log = logging.getLogger("fairlead_kernels")
_CPU = torch.device("cpu")
_registered: dict[str, dict[str, Implementation]] = {}
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("fairlead_kernels_backend", default=None)
_said: set[tuple[str, str, str]] = set()


class KernelUnavailable(RuntimeError):
    """The forced backend cannot serve this call; the message says why."""


def register_implementation(operation: str, name: str, implementation: Implementation) -> None:
    """Give `operation` a backend of a third party. ValueError: no such operation, or the name is taken."""
    from . import library

    specs = library.load_all()
    if operation not in specs:
        raise ValueError(f"no operation {operation!r}; there are {', '.join(sorted(specs))}")
    if not isinstance(implementation, Implementation):
        raise TypeError(f"backend {name!r} of {operation}: an Implementation is needed, not {implementation!r}")
    if name in implementations(specs[operation]):
        raise ValueError(f"operation {operation} already has a backend {name!r}")
    _registered.setdefault(operation, {})[name] = implementation
    _ranked.cache_clear()


def implementations(spec: OpSpec) -> dict[str, Implementation]:
    """Ours and those registered by others."""
    return {**spec.implementations, **_registered.get(spec.name, {})}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend inside the block (and this thread), as FAIRLEAD_KERNELS does for the process."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The backend that must serve, None when the best may."""
    return _forced.get() or os.environ.get("FAIRLEAD_KERNELS") or None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1), where CPU tensors are welcome."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def _triton_missing() -> str | None:
    return None if find_spec("triton") is not None else "triton is not installed"


def unavailable(name: str, implementation: Implementation, device: str) -> str | None:
    """Why a backend cannot serve tensors of a device type at all, None when it can."""
    if name == TRITON and _triton_missing():
        return _triton_missing()
    if name == TRITON and device == "cpu" and interpreting():
        return None
    if "*" not in implementation.devices and device not in implementation.devices:
        return f"it serves {' and '.join(implementation.devices)} tensors, this one is on {device}"
    if name == C:
        return native.why_absent()
    return None


@functools.cache
def _function(path: str) -> Callable[..., Any]:
    module, _, attribute = path.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), attribute)
    return found


@functools.cache
def _ranked(spec_name: str, device: str) -> tuple[tuple[str, Implementation, str | None], ...]:
    """Backends by falling priority with the reason why each cannot serve the device. Triton's interpreter is never
    chosen by rank: it is a test instrument."""
    from . import library

    spec = library.specs()[spec_name]
    rows = []
    for name, implementation in implementations(spec).items():
        reason = unavailable(name, implementation, device)
        if name == TRITON and device == "cpu" and reason is None:
            reason = "the interpreter serves only when forced"
        rows.append((name, implementation, reason))
    return tuple(sorted(rows, key=lambda row: -row[1].priority))


def choose(spec: OpSpec, device: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The function that serves this call. KernelUnavailable when a forced backend cannot."""
    name = forced()
    if name is not None:
        return _choose_forced(spec, name, device, args, kwargs)
    for name, implementation, reason in _ranked(spec.name, device):
        matches = "*" in implementation.devices or device in implementation.devices
        if reason is None and implementation.unsupported is not None:
            reason = implementation.unsupported(*args, **kwargs)
        if reason is None:
            return _function(implementation.function)
        if matches and (spec.name, name, reason) not in _said:
            _said.add((spec.name, name, reason))
            log.warning("%s: backend %s does not serve here (%s), a slower one does", spec.name, name, reason)
    raise KernelUnavailable(f"no backend serves {spec.name} on {device}")


def _choose_forced(
    spec: OpSpec, name: str, device: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Any]:
    choices = implementations(spec)
    if name not in choices:
        known = ", ".join(sorted({REFERENCE, C, TRITON, *choices}))
        if name not in (REFERENCE, C, TRITON):
            raise KernelUnavailable(f"FAIRLEAD_KERNELS={name} is not a backend; one of {known} is")
        raise KernelUnavailable(f"FAIRLEAD_KERNELS={name} cannot serve {spec.name}: it has {', '.join(choices)} only")
    implementation = choices[name]
    reason = unavailable(name, implementation, device)
    if reason is None and implementation.unsupported is not None:
        reason = implementation.unsupported(*args, **kwargs)
    if reason is not None:
        raise KernelUnavailable(f"FAIRLEAD_KERNELS={name} cannot serve {spec.name}: {reason}")
    return _function(implementation.function)


def caller(spec: OpSpec) -> Callable[..., Any]:
    """What torch.library runs for the operation: choose a backend by the first tensor's device, call it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        device = next((value.device for value in args if isinstance(value, torch.Tensor)), _CPU)
        function = choose(spec, device.type, args, kwargs)
        if device.type == "cuda":  # Triton launches on the current device, which need not be the tensor's
            with torch.cuda.device(device):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    call.__name__ = spec.name
    return call


def explain(device: str | None = None) -> list[dict[str, Any]]:
    """Per operation: the backend that serves `device` (default: cuda when there is one, else cpu) and why others do
    not. Rows of {operation, device, backend, reasons: {backend: reason}}, as `fairlead doctor` shows them."""
    from . import library

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, spec in sorted(library.load_all().items()):
        wanted, backend, reasons = forced(), None, {}
        for candidate, _, reason in _ranked(name, device):
            if reason is None and wanted not in (None, candidate):
                reason = f"FAIRLEAD_KERNELS={wanted}"
            elif reason is None and backend is not None:
                reason = f"{backend} is faster"
            if reason is None:
                backend = candidate
            else:
                reasons[candidate] = reason
        if wanted == TRITON and backend is None and TRITON in spec.implementations and interpreting():
            backend = TRITON
        rows.append({"operation": name, "device": device, "backend": backend, "reasons": reasons})
    return rows
