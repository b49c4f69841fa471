"""Rows of text -> tokenised rows: the ids of a prompt and of its completions, with what is known of each completion.

A tokenised row is one group: {"prompt_ids": [...], "completion_ids": [[...], ...]} and lists with one number per completion:
role (1 wanted, -1 unwanted), rank (0 the best), reward, weight. A pair has two completions, unpaired data one.
Columns are TRL's: prompt/chosen/rejected, prompt/completion/label, prompt/completion, messages, and two of ours, `rejected`
as a list and prompt/completions/ranks or rewards. Text may be plain or a list of chat messages.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fairlead.errors import InputError

Row = Mapping[str, Any]
Overlong = Literal["drop", "truncate", "truncate_prompt", "raise"]
SHOWN = 5


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
        joined = f"; completions joined with their prompt's end: {self.merged}" if self.merged else ""
        return f"{self.rows} rows; dropped: {causes or 'none'}; truncated: {self.truncated}{joined}"


def tokenize(
    rows: Iterable[Row], tokenizer: Any, *, max_length: int | None = 1024, overlong: Overlong = "drop",
    identical: Literal["drop", "raise"] = "drop",
) -> tuple[list[dict[str, Any]], Report]:  # fmt: skip
    """Tokenised rows, and what became of the others.

    rows: dicts with the columns above; rows that hold `completion_ids` are taken as tokenised. tokenizer: with an end token; chat
    messages need its chat template. max_length: most tokens of a prompt with one completion; longer rows are dropped, lose the end of
    their completions ("truncate") or the beginning of their prompt ("truncate_prompt"), or are an error ("raise"). identical: what to do
    with chosen == rejected.
    InputError names the first wrong row and its column, and says how many more there are: missing columns, empty completions, labels
    that are none, ranks or rewards of another length, NaN.
    """
    for name, value, allowed in (("overlong", overlong, get_args(Overlong)), ("identical", identical, ("drop", "raise"))):
        if value not in allowed:
            raise InputError(f"{name}: must be one of {', '.join(allowed)}, got {value!r}")
    made: list[dict[str, Any]] = []
    wrong: list[tuple[str, InputError]] = []
    report = Report()
    for index, row in enumerate(rows):
        where = getattr(row, "where", "") or f"row {index}"
        try:
            found = _given(row, where) if "completion_ids" in row else _encoded(row, tokenizer, identical, report, where)
            found = found and _fitted(found, max_length, overlong, report, where)
        except InputError as error:
            wrong.append((where, error))
            continue
        if found:
            made.append(found)
    if wrong:
        others = [where for where, _ in wrong[1:]]
        listed = ", ".join(others[:SHOWN]) + (", ..." if len(others) > SHOWN else "")
        more = f"; {len(others)} more {'row is' if len(others) == 1 else 'rows are'} wrong ({listed})" if others else ""
        raise InputError(f"{wrong[0][1]}{more}")
    report.rows = len(made)
    return made, report


def _given(row: Row, where: str) -> dict[str, Any]:
    """A row that is tokenised already."""
    answers = row["completion_ids"]
    if not answers or not all(isinstance(a, (list, tuple)) and a for a in answers):
        raise InputError(f"{where}: completion_ids: must be lists of one id or more, got {answers!r:.60}")
    if row.get("prompt_ids") is None:
        raise InputError(f"{where}: column prompt_ids is missing beside completion_ids")
    for column in ("role", "rank", "reward", "weight", "ref_logp", "token_weights"):
        if row.get(column) is not None and len(row[column]) != len(answers):
            raise InputError(f"{where}: {column}: one value per completion is needed ({len(answers)}), got {len(row[column])}")
    return dict(row)


def _encoded(row: Row, tokenizer: Any, identical: str, report: Report, where: str) -> dict[str, Any] | None:
    """A row of text as ids; None when it is left out."""
    prompt, completions, numbers = group(row, where)
    folded = [_plain(c).strip() for c in completions]
    if any(not text for text in folded):
        raise InputError(f"{where}: completion {folded.index('')} is empty; give at least one word")
    if "role" in numbers and folded[0] in folded[1:]:
        if identical == "raise":
            raise InputError(f"{where}: chosen and rejected are the same text; identical='drop' leaves such rows out")
        _count(report, "with chosen = rejected")
        return None
    ids = [encode(tokenizer, prompt, c, where) for c in completions]
    report.merged += sum(joined for _, _, joined in ids)
    start = min((p for p, _, _ in ids), key=len)
    if any(p[: len(start)] != start for p, _, _ in ids):
        raise InputError(f"{where}: the prompt has other tokens with each completion; this tokenizer cannot be used for groups")
    return {"prompt_ids": start, "completion_ids": [p[len(start) :] + c for p, c, _ in ids], **numbers}


def _fitted(row: dict[str, Any], max_length: int | None, overlong: Overlong, report: Report, where: str) -> dict[str, Any] | None:
    """The row within max_length; None when it is left out."""
    prompt, answers = row["prompt_ids"], row["completion_ids"]
    answer = max(map(len, answers))
    if max_length is None or len(prompt) + answer <= max_length:
        return row
    if overlong == "drop":
        _count(report, f"longer than {max_length} tokens")
        return None
    room = max_length - (len(prompt) if overlong == "truncate" else answer)
    if overlong == "raise" or room < 1:
        part = f"; its {'prompt' if overlong == 'truncate' else 'completion'} alone leaves no room" if overlong != "raise" else ""
        raise InputError(f"{where}: {len(prompt) + answer} tokens, max_length is {max_length}{part}; overlong='drop' leaves such rows out")
    if overlong == "truncate" and row.get("ref_logp_mean") is not None:
        raise InputError(f"{where}: ref_logp_mean is the score of the whole completion, which would be cut; use overlong='drop'")
    if row.get("prompt_position_ids") is not None:
        raise InputError(f"{where}: {len(prompt) + answer} tokens, max_length is {max_length}; rows with positions of their own are not cut")
    report.truncated += 1
    if overlong == "truncate":
        cut = {"token_weights": [w[:room] for w in row["token_weights"]]} if row.get("token_weights") is not None else {}
        return {**row, "completion_ids": [a[:room] for a in answers], **cut}
    return {**row, "prompt_ids": prompt[-room:]}


def group(row: Row, where: str) -> tuple[Any, list[Any], dict[str, list[Any]]]:
    """Prompt, completions and numbers per completion of a row of any of the shapes; InputError names what is wrong."""
    numbers: dict[str, list[Any]] = {}
    if "messages" in row and "completion" not in row and "chosen" not in row:
        row = {**row, **_demonstration(row["messages"], where)}
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
                if name == "rank" and any(v != int(v) or v < 0 for v in values):
                    raise InputError(f"{where}: ranks: must be whole numbers from 0, the best, got {values}; scores go into rewards")
                numbers[name] = [int(v) for v in values] if name == "rank" else values
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
        shapes = "prompt/chosen/rejected, prompt/completion/label, prompt/completion, messages or prompt/completions/ranks"
        raise InputError(f"{where}: columns {', '.join(row) or 'none'}; needed are {shapes}")
    for column in ("weight", "ref_logp_mean", "reference"):
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


def _demonstration(messages: Any, where: str) -> dict[str, Any]:
    """A conversation as the prompt of its last answer."""
    if not _is_messages(messages) or messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise InputError(f"{where}: messages: must be a conversation that ends with an answer of the role assistant")
    return {"prompt": list(messages[:-1]), "completion": [messages[-1]]}


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
        first = list(tokenizer(prompt)["input_ids"])  # of "", the tokens that begin every text
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
        digest.update(repr((row.get("prompt_position_ids"), row.get("completion_position"), row.get("token_weights"))).encode())
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
