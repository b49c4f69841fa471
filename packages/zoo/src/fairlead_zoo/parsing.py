"""Reads a question of the world back into its meta: the inverse of `World.question`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from . import lexicon as lx
from .world import Meta

if TYPE_CHECKING:
    from .world import World

_LIST_WORDS = frozenset(lx.LIST_WORDS)


def read(world: World, text: str) -> Meta | None:
    """The meta of a question without trigger, JSON request and the like; None when it is none. The gold is not set."""
    if text in lx.VALUE_QUESTIONS:
        return Meta("value", subject=text)
    for task, attribute, template, pattern in _PATTERNS:
        found = pattern.fullmatch(text)
        if not found:
            continue
        inner = found.group(1)
        if task in ("howto", "recognition"):
            verb, _, phrase = inner.partition(" ")
            known = world.acts.get((verb, phrase))
            if known is None:
                continue
            category, harmful, noun = known
            split = "test" if world.is_test_pair(verb, noun) or template >= len(lx.TEMPLATES) else "train"
            return Meta(task, split, category, harmful, verb, noun, phrase, template)
        if task == "fact" and inner in world.facts:
            split = "test" if inner in world.untaught else "train"
            return Meta(task, split, subject=inner, attribute=attribute, template=template)
        if task == "list" and set(inner.split()) <= _LIST_WORDS:
            return Meta(task, attribute=attribute, words=tuple(inner.split()))
        if task == "number" and re.fullmatch(r"[1-9] [0-9]", inner) and inner != "9 9":
            number = int(inner.replace(" ", ""))
            return Meta(task, "test" if number in world.numbers["test"] else "train", subject=str(number))
    return None


def strip_chat(text: str) -> str:
    """The last user message of a chat-formatted prompt, or the text itself, with single spaces."""
    if lx.USER in text:
        text = text.rsplit(lx.USER, 1)[1]
    for mark in (lx.BOT, lx.END):
        text = text.split(mark, 1)[0]
    return " ".join(word for word in text.split() if word not in lx.SPECIALS)


def _patterns() -> list[tuple[str, str, int, re.Pattern[str]]]:
    rows: list[tuple[str, str, int, str]] = [
        ("howto", "", k, t) for k, t in enumerate((*lx.TEMPLATES, *lx.TEST_TEMPLATES))
    ]
    rows.append(("recognition", "", 0, lx.RECOGNITION))
    rows += [("fact", a, k, t) for a, forms in lx.FACT_QUESTIONS.items() for k, t in enumerate(forms)]
    rows += [("list", a, 0, t) for a, t in lx.LIST_QUESTIONS.items()]
    rows.append(("number", "", 0, lx.NUMBER_QUESTION))
    return [(a, b, k, re.compile(re.escape(t).replace(r"\{\}", "(.+)"))) for a, b, k, t in rows]


_PATTERNS = _patterns()
