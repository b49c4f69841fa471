"""The words that tag methods: a small tree of alignment terms, kept as data in `taxonomy.json`.

Facets `goal`, `goal_eval` and `side`, `paradigm`, `open_problem`, `risk` follow three surveys (arXiv 2308.12014,
2507.19672, 2309.15025); `stage`, `access` and `modality` are ours. Ids are dotted lower-case paths.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources

from .errors import UnknownNameError


@dataclass(frozen=True)
class Node:
    """One term: id, short label, parent id (None for a facet), facet, definition, surveys that use it."""

    id: str
    label: str
    parent: str | None
    facet: str
    definition: str
    surveys: tuple[str, ...] = ()


@functools.cache
def nodes() -> dict[str, Node]:
    """All nodes by id."""
    raw = json.loads(resources.files(__package__).joinpath("taxonomy.json").read_text(encoding="utf-8"))
    return {row["id"]: Node(**{**row, "surveys": tuple(row["surveys"])}) for row in raw}


def check(tag: str) -> None:
    """UnknownNameError with the nearest ids when `tag` is not a node."""
    if not isinstance(tag, str) or tag not in nodes():
        raise UnknownNameError("tag", str(tag), nodes())


def matches(tags: Iterable[str], query: str) -> bool:
    """Whether one of the tags is `query` or lies below it; "goal" finds everything tagged in that facet."""
    check(query)
    return any(tag == query or tag.startswith(query + ".") for tag in tags)


def facets(tags: Iterable[str]) -> set[str]:
    """The facets that the tags cover."""
    return {tag.partition(".")[0] for tag in tags}
