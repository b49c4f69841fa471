"""Scores of aligned models for PoFT: the mean log-probability of a response's token, computed once and kept in the rows.

PoFT (Preference-Oriented Supervised Fine-Tuning, arXiv 2412.12865) asks the target to beat

    r_bar = (1/M) sum_j (1/T_j) log p_j(y | x)

over M aligned models, each with its own tokenizer and chat template; T_j counts the response's tokens and its end, as
training does (`tokens.encode`). The loss is the objective `poft`; training is left to PreferenceTrainer. A conversation
becomes one row per assistant turn, since a row of training has one completion.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fairlead.errors import InputError
from fairlead.logprobs import unwrapped

from .statistics import attention_of, lay_out, packs, token_stats
from .tokens import Report, tokenize

Row = Mapping[str, Any]
Progress = Callable[[str, int, int], None]
RULE = "completion and its end"
ROUNDING = 1e-5


@dataclass(frozen=True)
class AlignedModel:
    """A model that scores. name: of its columns. model: a causal LM. tokenizer: its own. template: a chat template in place
    of the tokenizer's; "" scores plain text. With a template, a plain prompt and completion become a user's and an
    assistant's message."""

    name: str
    model: Any
    tokenizer: Any
    template: str | None = None


def score_dataset(
    rows: Iterable[Row], models: Sequence[AlignedModel], *, max_length: int = 4096, batch_size: int = 8, progress: Progress | None = None
) -> tuple[list[dict[str, Any]], Report]:
    """Rows with the scores of all models, and what became of the others.

    rows: dicts with prompt and completion, or messages, and an `id` (default: the place). Each row comes back with prompt, completion,
    its id, "<name>.logp", "<name>.tokens", `ref_logp_mean` and `score_rule`. max_length: longer rows are dropped, never cut: train with
    the same. progress: called with (name, rows done, rows). To hold one model at a time in memory, call `score` for each, then `merge`.
    InputError as in `score` and `merge`.
    """
    names = [m.name for m in models]
    if len(set(names)) < len(names):
        raise InputError(f"models: each needs a name of its own, got {', '.join(names)}")
    told = demonstrations(rows)
    return merge(told, {m.name: score(told, m, max_length=max_length, batch_size=batch_size, progress=progress) for m in models})


def demonstrations(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows with prompt, completion and id; a conversation gives one for each assistant turn, its id "<id>:<turn>".

    InputError: neither messages nor prompt and completion, no assistant turn, an id on some rows only, ids that repeat.
    """
    found: list[dict[str, Any]] = []
    given = list(rows)
    unnamed = next((i for i, row in enumerate(given) if row.get("id") is None), None)
    if unnamed is not None and any(row.get("id") is not None for row in given):
        raise InputError(f"row {unnamed}: id: is missing; give every row one, or none")
    for index, row in enumerate(given):
        known = {"id": index, **{k: v for k, v in row.items() if k != "messages" and v is not None}}
        messages = row.get("messages")
        if messages is None:
            if row.get("prompt") is None or row.get("completion") is None:
                raise InputError(f"row {index}: columns {', '.join(known)}; needed are prompt and completion, or messages")
            found.append(known)
            continue
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not turns:
            raise InputError(f"row {index}: messages: no turn of the assistant")
        for number, turn in enumerate(turns):
            own = known["id"] if len(turns) == 1 else f"{known['id']}:{number}"
            found.append({**known, "id": own, "prompt": list(messages[:turn]), "completion": [messages[turn]]})
    _by_id(found, "rows")
    return found


@torch.no_grad()
def score(
    rows: Iterable[Row], aligned: AlignedModel, *, max_length: int = 4096, batch_size: int = 8, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """One model's scores, {id, logp, tokens, rule} for each row; logp is None for a row of more than `max_length` tokens.

    logp: mean over the `tokens` scored tokens, at most 0. batch_size: rows of one forward pass; it does not change the scores.
    InputError: rows as in `demonstrations` and `tokens.tokenize`, chat messages without a template, batch_size below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size: must be at least 1, got {batch_size}")
    told = demonstrations(rows)
    made, _ = tokenize(_in_its_format(told, aligned), tokenizer=_tokenizer(aligned), max_length=None)
    sizes = [len(row["prompt_ids"]) + len(row["completion_ids"][0]) for row in made]
    found: list[dict[str, Any]] = [
        {"id": row["id"], "logp": None, "tokens": len(ids["completion_ids"][0]), "rule": RULE} for row, ids in zip(told, made, strict=True)
    ]
    todo = sorted((i for i, size in enumerate(sizes) if size <= max_length), key=sizes.__getitem__)
    model, packed = aligned.model, packs(aligned.model)
    training = model.training
    model.eval()
    try:
        with attention_of(model, packed):
            for start in range(0, len(todo), batch_size):
                part = todo[start : start + batch_size]
                stats = token_stats(model, lay_out([made[i] for i in part], packed, unwrapped(model).device))
                for i, total, count in zip(part, stats.sum_S().tolist(), stats.length_S().tolist(), strict=True):
                    mean = total / count
                    found[i].update(logp=min(mean, 0.0) if mean < ROUNDING else mean, tokens=count)
                if progress is not None:
                    progress(aligned.name, start + len(part), len(todo))
    finally:
        model.train(training)
    return found


def merge(rows: Iterable[Row], scores: Mapping[str, Sequence[Row]]) -> tuple[list[dict[str, Any]], Report]:
    """Rows joined with the scores of each model by id, and how many were left out, by cause.

    A row that any model did not score (None, NaN, -inf) is left out. InputError: no model, ids that repeat, a model with other rows,
    scores made by another rule, a mean log-probability above 0.
    """
    if not scores:
        raise InputError("models: at least one is needed")
    told = demonstrations(rows)
    wanted = _by_id(told, "rows")
    tables = {name: _by_id(table, f"scores of {name}") for name, table in scores.items()}
    for name, table in tables.items():
        other = next((key for key in (*wanted, *table) if (key in wanted) != (key in table)), None)
        if other is not None:
            lacking = f"scores of {name}" if other in wanted else "rows"
            raise InputError(f"{lacking}: id {other!r} is missing; scores are joined by id and every model scores the same rows")
        foreign = next((entry for entry in table.values() if entry.get("rule") != RULE), None)
        if foreign is not None:
            raise InputError(f"scores of {name}: id {foreign['id']!r} was scored by rule {foreign.get('rule')!r}, training needs {RULE!r}")
    report = Report()
    made: list[dict[str, Any]] = []
    for key, row in wanted.items():
        means = {name: table[key]["logp"] for name, table in tables.items()}
        above = next((name for name, mean in means.items() if mean is not None and mean > 0), None)
        if above is not None:
            raise InputError(f"scores of {above}: id {key!r}: a mean log-probability is at most 0, got {means[above]:g}")
        absent = next((name for name, mean in means.items() if mean is None or not math.isfinite(mean)), None)
        if absent is not None:
            cause = f"without a finite score of {absent}" if means[absent] is not None else f"too long for {absent}"
            report.dropped[cause] = report.dropped.get(cause, 0) + 1
            continue
        columns = {f"{name}.logp": mean for name, mean in means.items()} | {f"{name}.tokens": tables[name][key]["tokens"] for name in tables}
        made.append({**row, **columns, "ref_logp_mean": sum(means.values()) / len(means), "score_rule": RULE})
    report.rows = len(made)
    return made, report


def _by_id(rows: Sequence[Row], what: str) -> dict[Any, Row]:
    """Rows by id; InputError names an id that repeats."""
    found: dict[Any, Row] = {}
    for row in rows:
        if row["id"] in found:
            raise InputError(f"{what}: id {row['id']!r} repeats; ids must be unique")
        found[row["id"]] = row
    return found


def _tokenizer(aligned: AlignedModel) -> Any:
    """The tokenizer with the template asked for."""
    if aligned.template is None:
        return aligned.tokenizer
    own = copy.deepcopy(aligned.tokenizer)
    own.chat_template = aligned.template or None
    return own


def _in_its_format(rows: Sequence[Row], aligned: AlignedModel) -> list[dict[str, Any]]:
    """Prompt and completion of each row, plain text as messages where the model has a chat template."""
    template = aligned.tokenizer.chat_template if aligned.template is None else aligned.template
    found = []
    for row in rows:
        prompt, completion = row["prompt"], row["completion"]
        if not template and not (isinstance(prompt, str) and isinstance(completion, str)):
            raise InputError(f"{aligned.name}: id {row['id']!r} holds chat messages, and the tokenizer has no chat template; give one")
        if template and isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        found.append({"prompt": prompt, "completion": completion})
    return found
