"""Preference data for long contexts, made by the model itself: LOGO's data builder (arXiv 2410.18533, sec. 3.2).

A context is cut into chunks; a chunk's score is the number of entities that it shares with the question and the answer. The
model's answer from N chunks above delta is preferred, those from N chunks below it and from a mixture are dispreferred. The
paper scores against the question alone, its code against question and answer; both are had here by giving `answer` or not.
Where a pool has too few chunks the next best, or for irrelevant contexts the next worst, fill it, and the row says how many.
What generates, and where the ids of a row stand (`positions`), is left to others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch

from fairlead.errors import InputError

from .tokens import Report

Kind = Literal["relevant", "irrelevant", "mixed"]
_STOP = (
    "a about above after again all also an and any are as at be because been before being below between both but by can could did do does "
    "doing down during each few for from further had has have having he her here hers him his how i if in into is it its itself just me "
    "more most my no nor not now of off on once only or other our out over own same she should so some such than that the their them then "
    "there these they this those through to too under until up very was we were what when where which while who whom whose why will with "
    "would you your"
)
STOP_WORDS = frozenset(_STOP.split())
_WORD = re.compile(r"[^\W\d_]+")
_NAME = r"[A-Z][\w-]*(?:['’][A-Z][\w-]*)?"  # O'Brien, but not the s of Ada's
_SPAN = re.compile(rf"{_NAME}(?:[ \t]+{_NAME})*")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


class Chunk(NamedTuple):
    """A piece of a context, its place in it, and the number of entities that it shares with the question."""

    chunk_id: int
    text: str
    score: int


class Choice(NamedTuple):
    """Chunks of one context in document order, and how many of them come from the wrong pool."""

    chunks: list[Chunk]
    filled: int


def entities(text: str) -> set[str]:
    """Words of more than three letters that are no stop words, capitalised spans and numbers, in lower case."""
    found = {word for word in _WORD.findall(text.lower()) if len(word) > 3 and word not in STOP_WORDS}
    for span in _SPAN.findall(text):
        words = span.lower().split()
        while words and words[0] in STOP_WORDS:  # "The", "Where" at the start of a sentence
            words = words[1:]
        found |= {" ".join(words)} if words else set()
    return found | set(_NUMBER.findall(text))


def split_context(context: str, chunk_size: int, tokenizer: Any = None) -> list[str]:
    """Pieces of `chunk_size` tokens, the last one shorter; without a tokenizer, of as many words with the blanks after them."""
    if chunk_size < 1:
        raise InputError(f"chunk_size: must be 1 or more, got {chunk_size}")
    if tokenizer is None:
        words = re.findall(r"(?:^\s*)?\S+\s*", context)
        return ["".join(words[i : i + chunk_size]) for i in range(0, len(words), chunk_size)]
    ids = tokenizer(context, add_special_tokens=False)["input_ids"]
    return [tokenizer.decode(ids[i : i + chunk_size]) for i in range(0, len(ids), chunk_size)]


def score_chunks(
    question: str, answer: str | None, context: str, chunk_size: int, extract: Callable[[str], set[str]] = entities, tokenizer: Any = None
) -> list[Chunk]:
    """Chunks of a context in document order, each with the number of distinct entities it shares with question and answer."""
    asked = extract(question) | (extract(answer) if answer else set())
    return [Chunk(i, text, len(extract(text) & asked)) for i, text in enumerate(split_context(context, chunk_size, tokenizer))]


def choose_chunks(scored: Sequence[Chunk], count: int, delta: float, kind: Kind, generator: torch.Generator) -> Choice:
    """`count` chunks for one context: the best above delta; drawn from the others; or drawn from both, half of each.

    filled: chunks taken from the other pool because the wanted one is too small. InputError where there are fewer than `count` chunks.
    """
    if kind not in get_args(Kind):
        raise InputError(f"kind: must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    best, worst = _pools(scored, count, delta)
    if kind == "relevant":
        wanted, fill = best[:count], worst[::-1]
    elif kind == "irrelevant":
        wanted, fill = _drawn(worst, count, generator), best[::-1]
    else:
        high, low = _drawn(best, (count + 1) // 2, generator), _drawn(worst, count // 2, generator)
        wanted = high + low
        fill = [c for c in [*best[::-1], *worst[::-1]] if c not in wanted]
    filled = count - len(wanted)
    return Choice(sorted([*wanted, *fill[:filled]]), filled)


def training_chunks(scored: Sequence[Chunk], count: int, delta: float, generator: torch.Generator) -> list[Chunk]:
    """The context that all answers of a row share: the best chunks above delta, and others drawn to make up `count`."""
    best, worst = _pools(scored, count, delta)
    return sorted(best[:count] + _drawn(worst, max(0, count - len(best)), generator))


def _pools(scored: Sequence[Chunk], count: int, delta: float) -> tuple[list[Chunk], list[Chunk]]:
    """Chunks above delta from the best down, the others from the worst up; equal scores in document order."""
    if not 1 <= count <= len(scored):
        raise InputError(f"a context of {count} chunks is asked for and the document has {len(scored)}; give smaller chunks or a longer document")
    best = sorted((c for c in scored if c.score > delta), key=lambda c: (-c.score, c.chunk_id))
    return best, sorted((c for c in scored if c.score <= delta), key=lambda c: (c.score, -c.chunk_id))


def _drawn(pool: list[Chunk], count: int, generator: torch.Generator) -> list[Chunk]:
    return [pool[i] for i in torch.randperm(len(pool), generator=generator)[:count].tolist()]


def preference_rows(
    samples: Iterable[Mapping[str, Any]], generate: Callable[[str], str], *, generator: torch.Generator, chunk_size: int = 512,
    n_chunks: int = 16, delta: float = 6, rejected: Sequence[Kind] = ("irrelevant", "mixed"), system: str = "",
    question: str = "\nQuestion: {question}\nAnswer:", extract: Callable[[str], set[str]] = entities, tokenizer: Any = None,
) -> tuple[list[dict[str, Any]], Report]:  # fmt: skip
    """Rows {prompt, chosen, rejected, chunks, scores, ...} of samples {question, context, answer where known}; what was dropped.

    generate: prompt -> answer. rejected: the kind of context of each dispreferred answer. A prompt is `system`, the chunks with a
    newline after each, and `question` filled in; a row keeps its pieces (system, chunks, question), the scores of the chunks and the
    number that were `filled` by kind of context. Dropped: samples with an empty answer, or whose preferred answer equals a dispreferred
    one but for blanks.
    """
    if not rejected or "relevant" in rejected:
        raise InputError(f"rejected: one kind or more of irrelevant and mixed is needed, got {list(rejected)}")
    if "{question}" not in question:
        raise InputError(f"question: must hold {{question}}, where the question goes, got {question!r}")
    made: list[dict[str, Any]] = []
    report = Report()
    for number, sample in enumerate(samples):
        absent = [name for name in ("question", "context") if not str(sample.get(name) or "").strip()]
        if absent:
            raise InputError(f"sample {number}: {absent[0]} is missing or empty")
        asked = question.replace("{question}", sample["question"])
        scored = score_chunks(sample["question"], sample.get("answer"), sample["context"], chunk_size, extract, tokenizer)
        try:
            choices = {i: choose_chunks(scored, n_chunks, delta, kind, generator) for i, kind in enumerate(("relevant", *rejected))}
            shared = training_chunks(scored, n_chunks, delta, generator)
        except InputError as error:
            raise InputError(f"sample {number}: {error}") from None
        answers = [generate(_prompt(system, choice.chunks, asked)) for choice in choices.values()]
        folded = [" ".join(answer.split()) for answer in answers]
        if not all(folded) or folded[0] in folded[1:]:
            cause = "with chosen = rejected" if all(folded) else "with an empty answer"
            report.dropped[cause] = report.dropped.get(cause, 0) + 1
            continue
        made.append({
            "prompt": _prompt(system, shared, asked), "chosen": answers[0], "rejected": answers[1:], "system": system,
            "chunks": [c.text for c in shared], "question": asked, "scores": [c.score for c in shared],
            "kinds": ["relevant", *rejected], "filled": [choice.filled for choice in choices.values()],
        })  # fmt: skip
    report.rows = len(made)
    return made, report


def _prompt(system: str, chunks: Sequence[Chunk], question: str) -> str:
    return system + "".join(c.text + "\n" for c in chunks) + question


def tokenized(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """The pieces of `preference_rows` as ids, for `positions.position_rows`: each piece on its own, so that no token joins two chunks.

    The tokenizer's begin token, where it has one, stands before the system text, its end token after each answer.
    """
    begin, end = ([] if token is None else [token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    return [
        {
            "system_ids": begin + ids(row["system"]), "chunk_ids": [ids(text + "\n") for text in row["chunks"]], "question_ids": ids(row["question"]),
            "completion_ids": [ids(text) + end for text in (row["chosen"], *row["rejected"])], "role": [1] + [-1] * len(row["rejected"]),
        }
        for row in rows
    ]  # fmt: skip
