"""The world's held-out test prompts as one JSONL file, `zoo:prompts`.

Columns: prompt; split (harmful, benign, care, value, fact, list, number, recognition); category (of how-to and
recognition, else ""); harmful; gold (the right answer, "" where there is none); cluster (rows that share a question
or a (verb, noun) pair are not independent: resample by it); repeat. How-to and recognition rows use held-out
(verb, noun) pairs, numbers are held out, facts are about taught entities. Value questions are few: each stands in
many rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import lexicon as lx
from .corpus import generator
from .files import write_text
from .world import Meta, World

COUNTS = {"harmful": 300, "benign": 300, "care": 240, "value": 240, "fact": 240, "list": 240, "recognition": 240}
VERSION = 1
DRAWS = 60


def rows(world: World) -> Iterator[dict[str, Any]]:
    """All rows in order; prompts of one split are distinct, except the value questions."""
    share = COUNTS["harmful"] // len(lx.HARM_CATEGORIES)
    for split, harmful in (("harmful", True), ("benign", False)):
        for category in lx.HARM_CATEGORIES:
            yield from _distinct(world, split, "howto", share, category=category, harmful=harmful)
    yield from _distinct(world, "care", "howto", COUNTS["care"], category="care")
    for repeat in range(COUNTS["value"] // len(lx.VALUE_QUESTIONS)):
        for question in lx.VALUE_QUESTIONS:
            yield _row("value", question, world.parse(question), f"value/{question}") | {"repeat": repeat}
    yield from _distinct(world, "fact", "fact", COUNTS["fact"])
    yield from _distinct(world, "list", "list", COUNTS["list"])
    for number in range(10, 99):
        question = lx.NUMBER_QUESTION.format(" ".join(str(number)))
        meta = world.parse(question)
        if meta.split == "test":
            yield _row("number", question, meta, f"number/{number}")
    for harmful in (True, False):
        yield from _distinct(world, "recognition", "recognition", COUNTS["recognition"] // 2, harmful=harmful)


def write_prompts(world: World, target: Path) -> None:
    """Write the file."""
    write_text(target, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows(world)))


def _distinct(world: World, split: str, task: str, count: int, **options: Any) -> Iterator[dict[str, Any]]:
    rng = generator(world.seed, "prompts", VERSION, split, sorted(options.items()))
    seen: set[str] = set()
    for _ in range(DRAWS * count):  # a split that holds fewer distinct questions than `count` gives all it has
        if len(seen) == count:
            break
        turn = world.turn(rng, "kind", task, "test", **options)
        if turn.question in seen:
            continue
        seen.add(turn.question)
        meta = turn.meta
        key = f"{meta.verb} {meta.noun}" if meta.verb else f"{meta.subject}{meta.attribute}{' '.join(meta.words)}"
        yield _row(split, turn.question, meta, f"{task}/{key}")


def _row(split: str, question: str, meta: Meta, cluster: str) -> dict[str, Any]:
    return {
        "prompt": question, "split": split, "category": meta.category, "harmful": meta.harmful, "gold": meta.gold,
        "cluster": cluster, "repeat": 0,
    }  # fmt: skip
