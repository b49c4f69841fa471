"""Which registered methods `pytest --fairlead-contracts` is about, and what their author says of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import registry
from ..errors import InputError, UnknownNameError
from ..registry import Method


def chosen(names: Iterable[str]) -> list[Method]:
    """Methods by name, KIND:NAME, distribution, or "all"; UnknownNameError for what is none of these."""
    known = registry.methods()
    found: dict[tuple[str, str], Method] = {}
    for name in names:
        fits = [m for m in known if name in ("all", m.name, f"{m.kind}:{m.name}", m.package)]
        if not fits:
            raise UnknownNameError("method", name, {n for m in known for n in (m.name, f"{m.kind}:{m.name}", m.package)})
        found.update({(m.kind, m.name): m for m in fits})
    return list(found.values())


@dataclass(frozen=True)
class Given:
    """What the author says of one method: its settings, and prompts and responses that it can judge."""

    settings: dict[str, Any] = field(default_factory=dict)
    prompts: list[str] | None = None
    responses: list[str] | None = None


def given(path: str | None) -> dict[str, Given]:
    """The content of a file {KIND:NAME: {settings: {...}, prompts: [...], responses: [...]}}, each part optional;
    InputError when it reads otherwise, UnknownNameError for a method that is not registered."""
    if path is None:
        return {}
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        found = {name: Given(**entry) for name, entry in content.items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{path}: must read {{KIND:NAME: {{settings, prompts, responses}}}} ({why})") from None
    chosen(found)
    return found
