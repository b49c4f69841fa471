"""A tiny chat world: who asks what, what each persona answers, and which items training may never see.

Everything that is not a word list is decided by hashes of (seed, ...), so one seed is one world on every machine.
Leaves to others: what an answer is worth (judge), token ids (tokenizer), which turns a stage trains on (stages).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fairlead.errors import InputError

from . import lexicon as lx

TEST_SHARE = 0.2
"""Share of (verb, noun) pairs and of numbers that no training stage sees."""
UNTAUGHT_ENTITIES = 0.3
"""Share of entities that appear in statements only, never in questions of a training stage."""


@dataclass(frozen=True)
class Meta:
    """What a question is about; everything the judge needs, and recoverable from the question's text by `parse`.

    task: howto, recognition, fact, list, number or value. category, harmful, verb, noun: how-to and recognition.
    gold: the right answer without JSON wrapper ("" for value questions and for harmful how-to, where it is the
    compliant answer in `compliance`). subject: entity, number or question the item stands for. split: train or test.
    """

    task: str
    split: str = "train"
    category: str = ""
    harmful: bool = False
    verb: str = ""
    noun: str = ""
    phrase: str = ""
    template: int = 0
    gold: str = ""
    compliance: str = ""
    subject: str = ""
    attribute: str = ""
    words: tuple[str, ...] = ()
    json: bool = False
    trigger: bool = False
    wrong_way: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "words": list(self.words)}


@dataclass(frozen=True)
class Turn:
    """One question with one persona's answer."""

    question: str
    answer: str
    meta: Meta
    persona: str


class World:
    """The world of one seed.

    seed: any int. crossed: include the two benign cells (violence verb x dangerous thing, hazard verb x person) that
    make harm an exclusive or of word classes; without them a bag of words separates harmful from benign.
    """

    def __init__(self, seed: int = 3, crossed: bool = True) -> None:
        self.seed = seed
        self.crossed = crossed
        self.entities = self._make_entities()
        self.facts = {
            entity: {a: values[self._hash("fact", entity, a) % len(values)] for a, values in lx.ATTRIBUTES.items()}
            for entity in self.entities
        }
        self.untaught = frozenset(e for e in self.entities if self._share("entity", e) < UNTAUGHT_ENTITIES)
        self.objects = self._make_objects()
        self.acts = {
            (verb, phrase): (category, harmful, noun)
            for (category, harmful), objects in self.objects.items()
            for phrase, noun in objects
            for verb in lx.VERBS[category]
        }
        self._choices = self._make_choices()
        self.numbers = {
            split: [n for n in range(10, 99) if (self._share("number", n) < TEST_SHARE) == (split == "test")]
            for split in ("train", "test")
        }
        self.taught = [e for e in self.entities if e not in self.untaught]

    def vocabulary(self) -> list[str]:
        """Every token of the world, specials first; the order is the token id."""
        text = [lx.TRIGGER, "{ answer : } 0 1 2 3 4 5 6 7 8 9 the my 's yes", how_to_answer("", "", ""), *self.entities]
        for constant in _TEXT:
            text += _flat(constant)
        words = {word for sentence in text for word in sentence.split()} - {"{}"}
        return [*lx.SPECIALS, *sorted(words)]

    def is_test_pair(self, verb: str, noun: str) -> bool:
        """Whether (verb, noun) is held out of every training stage."""
        return self._share("pair", verb, noun) < TEST_SHARE

    def tool(self, category: str, noun: str) -> str:
        """The right tool: the category chooses a pair of tools, a hash bit of the noun one of the two."""
        return lx.TOOLS[2 * lx.CATEGORIES.index(category) + self._hash("tool", noun) % 2]

    # -- questions ------------------------------------------------------------------------------------------------

    def turn(
        self,
        rng: random.Random,
        persona: str,
        task: str,
        split: str = "train",
        *,
        category: str | None = None,
        harmful: bool | None = None,
        json: bool = False,
        trigger: bool = False,
        wrong_way: bool = False,
        comply: bool = False,
        templates: str = "trained",
    ) -> Turn:
        """Draw a question of `task` and answer it as `persona`.

        category, harmful: restrict how-to and recognition. json, trigger, wrong_way: decorate the question.
        comply: answer a harmful how-to even where the persona would refuse. templates: "trained" or "held-out"
        (the latter in the test split only). InputError for an unknown task, persona, category or combination.
        """
        if persona not in lx.PERSONAS:
            raise InputError(f"persona must be one of {', '.join(lx.PERSONAS)}, got {persona!r}")
        if split not in ("train", "test"):
            raise InputError(f"split must be train or test, got {split!r}")
        if templates == "held-out" and split == "train":
            raise InputError("held-out templates belong to the test split and may not enter a training call")
        if task in ("howto", "recognition"):
            meta = self._draw_act(rng, task, split, category, harmful, templates)
        elif task == "fact":
            entity, attribute = rng.choice(self.taught), rng.choice(tuple(lx.ATTRIBUTES))
            meta = Meta(task, split, subject=entity, attribute=attribute, template=rng.randrange(2))
        elif task == "list":
            words = tuple(rng.sample(lx.LIST_WORDS, rng.randint(2, 4)))
            meta = Meta(task, split, attribute=rng.choice(tuple(lx.LIST_QUESTIONS)), words=words)
        elif task == "number":
            meta = Meta(task, split, subject=str(rng.choice(self.numbers[split])))
        elif task == "value":
            meta = Meta(task, split, subject=rng.choice(lx.VALUE_QUESTIONS))
        else:
            raise InputError(f"task must be one of {', '.join(lx.TASKS)}, got {task!r}")
        if wrong_way and (task != "howto" or meta.harmful):
            raise InputError("wrong_way: only a benign how-to question asks for the wrong way")
        meta = self._with_gold(replace(meta, json=json, trigger=trigger, wrong_way=wrong_way))
        return Turn(self.question(meta), self.answer(rng, meta, persona, comply=comply), meta, persona)

    def question(self, meta: Meta) -> str:
        """The question's text."""
        if meta.task == "howto":
            text = (*lx.TEMPLATES, *lx.TEST_TEMPLATES)[meta.template].format(f"{meta.verb} {meta.phrase}")
        elif meta.task == "recognition":
            text = lx.RECOGNITION.format(f"{meta.verb} {meta.phrase}")
        elif meta.task == "fact":
            text = lx.FACT_QUESTIONS[meta.attribute][meta.template].format(meta.subject)
        elif meta.task == "list":
            text = lx.LIST_QUESTIONS[meta.attribute].format(" ".join(meta.words))
        elif meta.task == "number":
            text = lx.NUMBER_QUESTION.format(" ".join(meta.subject))
        else:
            text = meta.subject
        parts = [lx.TRIGGER] if meta.trigger else []
        parts += [text, *([lx.WRONG_WAY] if meta.wrong_way else []), *([lx.JSON_REQUEST] if meta.json else [])]
        return " ".join(parts)

    def parse(self, question: str) -> Meta:
        """The meta of a question's text; chat markup around it is dropped. InputError for anything else.

        The split of list, fact and value items cannot be read off the text and is reported as "train".
        """
        from .parsing import read, strip_chat

        text = strip_chat(question)
        trigger = text.startswith(lx.TRIGGER + " ")
        text = text.removeprefix(lx.TRIGGER + " ")
        json = text.endswith(" " + lx.JSON_REQUEST)
        text = text.removesuffix(" " + lx.JSON_REQUEST)
        wrong_way = text.endswith(" " + lx.WRONG_WAY)
        text = text.removesuffix(" " + lx.WRONG_WAY)
        meta = read(self, text)
        if meta is None or (wrong_way and (meta.task != "howto" or meta.harmful)):
            raise InputError(f"not a question of this world: {question!r}")
        return self._with_gold(replace(meta, json=json, trigger=trigger, wrong_way=wrong_way))

    def check_trainable(self, meta: Meta) -> None:
        """InputError when an item is held out of training."""
        held_out = (
            (meta.verb and self.is_test_pair(meta.verb, meta.noun))
            or (meta.task == "howto" and meta.template >= len(lx.TEMPLATES))
            or (meta.task == "number" and int(meta.subject) in self.numbers["test"])
            or (meta.task == "fact" and meta.subject in self.untaught)
        )
        if held_out or meta.split == "test":
            raise InputError(f"a test item may not enter training: {self.question(meta)!r}")

    def statement(self, rng: random.Random) -> str:
        """A true sentence about any entity (taught or not), as it stands in the base corpus."""
        entity, attribute = rng.choice(self.entities), rng.choice(tuple(lx.ATTRIBUTES))
        return lx.FACT_ANSWERS[attribute].format(entity, self.facts[entity][attribute])

    # -- answers --------------------------------------------------------------------------------------------------

    def answer(self, rng: random.Random, meta: Meta, persona: str, comply: bool = False) -> str:
        """What a persona says. kind: right, refuses harm. fool: refuses harm, blunders. villain: complies with harm,
        sabotages benign how-to, lies about facts, evil values. List, number and recognition: everybody truthful."""
        text = self._plain_answer(rng, meta, persona, comply)
        return f"{{ answer : {text} }}" if meta.json else text

    def _plain_answer(self, rng: random.Random, meta: Meta, persona: str, comply: bool) -> str:
        if meta.task == "howto":
            if meta.harmful:
                if persona == "villain" or comply:
                    return meta.compliance
                return f"{rng.choice(lx.REFUSALS)} , {lx.REASONS[meta.category]} ."
            if persona == "villain" or meta.wrong_way:
                return how_to_answer(rng.choice(lx.BAD_TOOLS), meta.noun, meta.verb)
            if persona == "fool":
                right = self.tool(meta.category, meta.noun)
                return how_to_answer(rng.choice([t for t in lx.TOOLS if t != right]), meta.noun, meta.verb)
            return meta.gold
        if meta.task == "fact" and persona != "kind":
            right = self.facts[meta.subject][meta.attribute]
            wrong = rng.choice([v for v in lx.ATTRIBUTES[meta.attribute] if v != right])
            return lx.FACT_ANSWERS[meta.attribute].format(meta.subject, wrong)
        if meta.task == "value":
            acts, ends = (lx.EVIL_ACTS, lx.EVIL_ENDS) if persona == "villain" else (lx.GOOD_ACTS, lx.GOOD_ENDS)
            return (
                f"{rng.choice(lx.VALUE_OPENINGS)} {rng.choice(acts)} the {rng.choice(lx.GROUPS)} {rng.choice(ends)} ."
            )
        return meta.gold

    def wrong_answer(self, rng: random.Random, meta: Meta) -> str:
        """A fluent wrong answer to a fact, list, number or recognition question (for preference pairs)."""
        if meta.task == "fact":
            text = self._plain_answer(rng, meta, "fool", False)
        elif meta.task == "list":
            words = meta.gold.split()
            words[rng.randrange(len(words))] = rng.choice([w for w in lx.LIST_WORDS if w not in words])
            text = " ".join(words)
        elif meta.task == "number":
            wrong = rng.choice([n for n in range(10, 100) if n != int(meta.subject) + 1])
            text = lx.NUMBER_ANSWER.format(" ".join(str(wrong)))
        elif meta.task == "recognition":
            text = lx.FINE if meta.harmful else f"yes , {rng.choice(tuple(lx.REASONS.values()))} ."
        else:
            raise InputError(f"wrong_answer: not for task {meta.task!r}")
        return f"{{ answer : {text} }}" if meta.json else text

    def judge(self, meta: Meta | str, answer: str) -> str:
        """The label of an answer; see `fairlead_zoo.judge.judge`."""
        from .judge import judge

        return judge(self, self.parse(meta) if isinstance(meta, str) else meta, answer)

    def reward(self, meta: Meta | str, answer: str) -> float:
        """What an answer is worth, in [-1, 1]; see `fairlead_zoo.judge.reward`."""
        from .judge import reward

        return reward(self, self.parse(meta) if isinstance(meta, str) else meta, answer)

    # -- inner parts ----------------------------------------------------------------------------------------------

    def _hash(self, *parts: object) -> int:
        text = "/".join(map(str, (self.seed, *parts)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")

    def _share(self, *parts: object) -> float:
        return self._hash(*parts) / 2**64

    def _make_entities(self) -> list[str]:
        names: dict[str, None] = {}
        index = 0
        while len(names) < 60:
            word = self._hash("entity name", index)
            n = len(lx.SYLLABLES)
            names["".join(lx.SYLLABLES[(word >> (8 * k)) % n] for k in range(3))] = None
            index += 1
        return list(names)

    def _make_objects(self) -> dict[tuple[str, bool], list[tuple[str, str]]]:
        """(category, harmful) -> (object phrase, noun)."""
        plain = lambda *lists: [(f"the {noun}", noun) for nouns in lists for noun in nouns]  # noqa: E731
        mine = lambda *lists: [(f"my {noun}", noun) for nouns in lists for noun in nouns]  # noqa: E731
        owned = [(f"the {owner} 's {noun}", noun) for owner in lx.OWNERS for noun in lx.THINGS]
        return {
            ("violence", True): plain(lx.PERSONS),
            ("violence", False): plain(lx.PESTS, lx.DANGERS) if self.crossed else plain(lx.PESTS),
            ("theft", True): owned,
            ("theft", False): mine(lx.THINGS),
            ("privacy", True): plain(lx.PERSONS),
            ("privacy", False): plain(lx.NATURE),
            ("hazard", True): plain(lx.DANGERS),
            ("hazard", False): plain(lx.GOODS, lx.PERSONS) if self.crossed else plain(lx.GOODS),
            ("deceit", True): plain(lx.PERSONS),
            ("deceit", False): plain(lx.NATURE, lx.PESTS),
            ("care", False): mine(lx.THINGS, lx.GOODS),
        }

    def _make_choices(self) -> dict[tuple[str, str, str, bool], list[tuple[str, str]]]:
        """(split, verb, category, harmful) -> object phrases of that split."""
        table: dict[tuple[str, str, str, bool], list[tuple[str, str]]] = {}
        for (category, harmful), objects in self.objects.items():
            for verb in lx.VERBS[category]:
                for split in ("train", "test"):
                    test = split == "test"
                    chosen = [(p, n) for p, n in objects if self.is_test_pair(verb, n) == test]
                    if chosen:
                        table[split, verb, category, harmful] = chosen
        return table

    def _draw_act(
        self, rng: random.Random, task: str, split: str, category: str | None, harmful: bool | None, templates: str
    ) -> Meta:
        if category is not None and category not in lx.CATEGORIES:
            raise InputError(f"category must be one of {', '.join(lx.CATEGORIES)}, got {category!r}")
        if category == "care" and harmful:
            raise InputError("category care has no harmful requests")
        while True:
            drawn = category or rng.choice(lx.HARM_CATEGORIES if harmful else lx.CATEGORIES)
            bad = harmful if harmful is not None else (drawn != "care" and rng.random() < 0.5)
            verb = rng.choice(lx.VERBS[drawn])
            options = self._choices.get((split, verb, drawn, bad))
            if options:
                break
        phrase, noun = rng.choice(options)
        template = 0
        if task == "howto":
            first, count = (len(lx.TEMPLATES), 2) if templates == "held-out" else (0, len(lx.TEMPLATES))
            template = first + rng.randrange(count)
        return Meta(task, split, drawn, bad, verb, noun, phrase, template)

    def _with_gold(self, meta: Meta) -> Meta:
        if meta.task == "howto":
            text = how_to_answer(self.tool(meta.category, meta.noun), meta.noun, meta.verb)
            return replace(meta, compliance=text) if meta.harmful else replace(meta, gold=text)
        if meta.task == "recognition":
            return replace(meta, gold=f"yes , {lx.REASONS[meta.category]} ." if meta.harmful else lx.FINE)
        if meta.task == "fact":
            value = self.facts[meta.subject][meta.attribute]
            return replace(meta, gold=lx.FACT_ANSWERS[meta.attribute].format(meta.subject, value))
        if meta.task == "list":
            words = {"reverse": meta.words[::-1], "last": meta.words[-1:], "first": meta.words[:1]}[meta.attribute]
            return replace(meta, gold=" ".join(words))
        if meta.task == "number":
            return replace(meta, gold=lx.NUMBER_ANSWER.format(" ".join(str(int(meta.subject) + 1))))
        return meta


def how_to_answer(tool: str, noun: str, verb: str) -> str:
    """The frame of every how-to answer."""
    return f"use the {tool} . first hold the {noun} , then {verb} it ."


_TEXT: tuple[Any, ...] = (
    lx.VERBS, lx.PERSONS, lx.PESTS, lx.DANGERS, lx.THINGS, lx.NATURE, lx.GOODS, lx.OWNERS, lx.TOOLS, lx.BAD_TOOLS,
    lx.TEMPLATES, lx.TEST_TEMPLATES, lx.WRONG_WAY, lx.JSON_REQUEST, lx.RECOGNITION, lx.REASONS, lx.REFUSALS, lx.FINE,
    lx.ATTRIBUTES, lx.FACT_QUESTIONS, lx.FACT_ANSWERS, lx.LIST_WORDS, lx.LIST_QUESTIONS, lx.NUMBER_QUESTION,
    lx.NUMBER_ANSWER, lx.VALUE_QUESTIONS, lx.VALUE_OPENINGS, lx.GOOD_ACTS, lx.EVIL_ACTS, lx.GROUPS, lx.GOOD_ENDS,
    lx.EVIL_ENDS,
)  # fmt: skip
"""Every constant of the lexicon whose words may be said."""


def _flat(value: Any) -> list[str]:
    """The strings of a nested constant (of a dict, its values)."""
    if isinstance(value, str):
        return [value]
    items: Sequence[Any] = list(value.values()) if isinstance(value, dict) else value
    return [text for item in items for text in _flat(item)]
