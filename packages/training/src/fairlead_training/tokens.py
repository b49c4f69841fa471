"""Rows of text -> tokenised rows: the ids of a prompt and of its completions, with what is known of each completion.

A tokenised row is one group: {"prompt_ids": [...], "completion_ids": [[...], ...]} and lists with one number per completion:
role (1 wanted, -1 unwanted), rank (0 the best), reward, weight. A pair has two completions, unpaired data one.
Columns are TRL's: prompt/chosen/rejected, prompt/completion/label, and two of ours, `rejected` as a list and
prompt/completions/ranks or rewards. Text may be plain or a list of chat messages.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fairlead.errors import InputError

Row = Mapping[str, Any]
Overlong = Literal["drop", "truncate", "raise"]


@dataclass
class Report:
    """What became of the rows. dropped: number of rows by cause. merged: completions whose first letters the tokenizer joined
    with the prompt's end, which begin where the ids part."""

    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    merged: int = 0

    def line(self) -> str:
        """One line for a log."""
        causes = ", ".join(f"{count} {cause}" for cause, count in self.dropped.items())
        return f"{self.rows} rows; dropped: {causes or 'none'}; truncated: {self.truncated}"


def tokenize(
    rows: Iterable[Row], tokenizer: Any, *, max_length: int | None = 1024, overlong: Overlong = "drop",
    identical: Literal["drop", "raise"] = "drop",
) -> tuple[list[dict[str, Any]], Report]:  # fmt: skip
    """Tokenised rows, and what became of the others.

    rows: dicts with the columns above; rows that hold `completion_ids` pass as they are. tokenizer: with an end token; chat messages
    need its chat template. max_length: most tokens of a prompt with one completion; longer rows are dropped, have their completions
    cut ("truncate") or are an error ("raise"). identical: what to do with chosen == rejected.
    InputError names row and column: missing columns, empty completions, labels that are none, ranks or rewards of another length, NaN.
    """
    made: list[dict[str, Any]] = []
    report = Report()
    for index, row in enumerate(rows):
        where = getattr(row, "where", "") or f"row {index}"
        if "completion_ids" in row:
            made.append(dict(row))
            continue
        prompt, completions, numbers = group(row, where)
        folded = [" ".join(_plain(c).split()) for c in completions]
        if any(not text for text in folded):
            raise InputError(f"{where}: completion {folded.index('')} is empty; give at least one word")
        if "role" in numbers and folded[0] in folded[1:]:
            if identical == "raise":
                raise InputError(f"{where}: chosen and rejected are the same text; identical='drop' leaves such rows out")
            _count(report, "with chosen = rejected")
            continue
        ids = [encode(tokenizer, prompt, c, where) for c in completions]
        report.merged += sum(joined for _, _, joined in ids)
        start = min((p for p, _, _ in ids), key=len)
        answers = [p[len(start) :] + c for p, c, _ in ids]
        if any(p[: len(start)] != start for p, _, _ in ids):
            raise InputError(f"{where}: the prompt has other tokens with each completion; this tokenizer cannot be used for groups")
        longest = len(start) + max(map(len, answers))
        if max_length is not None and longest > max_length:
            if overlong == "raise" or (overlong == "truncate" and len(start) >= max_length):
                raise InputError(f"{where}: {longest} tokens, max_length is {max_length}; overlong='drop' leaves such rows out")
            if overlong == "drop":
                _count(report, f"longer than {max_length} tokens")
                continue
            answers = [a[: max_length - len(start)] for a in answers]
            report.truncated += 1
        made.append({"prompt_ids": start, "completion_ids": answers, **numbers})
    report.rows = len(made)
    return made, report


def group(row: Row, where: str) -> tuple[Any, list[Any], dict[str, list[Any]]]:
    """Prompt, completions and numbers per completion of a row of any of the shapes; InputError names what is wrong."""
    numbers: dict[str, list[Any]] = {}
    if "chosen" in row or "rejected" in row:
        _need(row, ("chosen", "rejected"), where)
        rejected = row["rejected"]
        several = isinstance(rejected, (list, tuple)) and not _is_messages(rejected)
        completions = [row["chosen"], *(rejected if several else [rejected])]
        if len(completions) < 2:
            raise InputError(f"{where}: rejected: is an empty list; give one completion or more")
        numbers["role"] = [1] + [-1] * (len(completions) - 1)
    elif "completions" in row:
        if not isinstance(row["completions"], (list, tuple)) or not row["completions"]:
            raise InputError(f"{where}: completions: must be a list of texts, got {type(row['completions']).__name__}")
        completions = list(row["completions"])
        for column, name in (("ranks", "rank"), ("rewards", "reward")):
            if row.get(column) is not None:
                values = list(row[column])
                if len(values) != len(completions) or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
                    raise InputError(f"{where}: {column}: one finite number per completion is needed ({len(completions)}), got {values}")
                numbers[name] = values
        if not numbers:
            raise InputError(f"{where}: column ranks or rewards is missing beside completions")
    elif "completion" in row:
        completions = [row["completion"]]
        if "label" in row:
            if not isinstance(row["label"], (bool, int)) or row["label"] not in (0, 1):
                raise InputError(f"{where}: label: must be true or false, got {row['label']!r}")
            numbers["role"] = [1 if row["label"] else -1]
        else:
            numbers["role"] = [1]
    else:
        shapes = "prompt/chosen/rejected, prompt/completion/label, prompt/completion or prompt/completions/ranks"
        raise InputError(f"{where}: columns {', '.join(row) or 'none'}; needed are {shapes}")
    for column in ("weight", "ref_logp_mean"):
        if row.get(column) is not None:
            value = row[column]
            values = list(value) if isinstance(value, (list, tuple)) else [value] * len(completions)
            if len(values) != len(completions) or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
                raise InputError(f"{where}: {column}: one finite number per completion is needed ({len(completions)}), got {values}")
            numbers[column] = values
    prompt = row.get("prompt")
    if prompt is None:
        if not all(_is_messages(c) for c in completions):
            raise InputError(f"{where}: column prompt is missing")
        shared = 0
        while all(len(c) > shared + 1 for c in completions) and all(c[shared] == completions[0][shared] for c in completions):
            shared += 1
        prompt, completions = list(completions[0][:shared]), [list(c[shared:]) for c in completions]
    for c in completions:
        if not isinstance(c, str) and not _is_messages(c):
            raise InputError(f"{where}: a completion must be text or a list of messages, got {type(c).__name__}")
    return prompt, completions, numbers


def encode(tokenizer: Any, prompt: Any, completion: Any, where: str = "a row") -> tuple[list[int], list[int], bool]:
    """Ids of the prompt, ids of the completion with its end, and whether the tokenizer joined the two at the border."""
    if _is_messages(prompt) or _is_messages(completion):
        messages = [*(prompt if _is_messages(prompt) else [{"role": "user", "content": prompt}])]
        answer = completion if _is_messages(completion) else [{"role": "assistant", "content": completion}]
        before = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*messages, *answer], tokenize=False)
        first, both = (list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (before, whole))
    else:
        if not isinstance(prompt, str):
            raise InputError(f"{where}: prompt: must be text or a list of messages, got {type(prompt).__name__}")
        first = list(tokenizer(prompt)["input_ids"]) if prompt else []
        end = tokenizer.eos_token_id
        if first and end is not None and first[-1] == end:  # some tokenizers end every text
            first = first[:-1]
        both = list(tokenizer(prompt + completion)["input_ids"])
        if end is not None and (not both or both[-1] != end):
            both.append(end)
    same = next((k for k, (a, b) in enumerate(zip(first, both, strict=False)) if a != b), min(len(first), len(both)))
    if len(both) <= same:
        raise InputError(f"{where}: a completion has no token of its own")
    return both[:same], both[same:], same < len(first)


def fingerprint(rows: Sequence[Row]) -> str:
    """A hash of the ids of tokenised rows, stable over processes: 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((list(row["prompt_ids"]), [list(c) for c in row["completion_ids"]], row.get("mismatched_ids"))).encode())
        digest.update(repr((row.get("prompt_position_ids"), row.get("completion_position"))).encode())
    return digest.hexdigest()[:32]


def _plain(text: Any) -> str:
    return text if isinstance(text, str) else " ".join(str(m.get("content", "")) for m in text)


def _is_messages(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def _need(row: Row, columns: tuple[str, ...], where: str) -> None:
    absent = [c for c in columns if row.get(c) is None]
    if absent:
        raise InputError(f"{where}: column {absent[0]} is missing")


def _count(report: Report, cause: str) -> None:
    report.dropped[cause] = report.dropped.get(cause, 0) + 1
