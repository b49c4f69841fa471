"""Serving: a model, with a decoder and a watermark where they are wanted, behind OpenAI's HTTP interface.

`schema` what is asked and answered, `text` tokens to text as they come, `jobs` one request under way, `answering` the model's
part, `worker` the queue, `service` all of it without HTTP; `metrics`, `limits` (bodies, keys), `app` (routes), `server`
(slow peers, shutdown), `command` (`fairlead serve`). Nothing here is imported before it is needed; FastAPI, uvicorn and
prometheus-client come with `pip install "fairlead-decoding[serve]"`.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {"Limits": "jobs", "Service": "service", "ApiKeys": "limits", "build_app": "app", "GracefulServer": "server", "configure": "server"}
__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
