"""Preference data: where rows come from, and one shape turned into another.

`read` takes a file, a hub id or rows in memory; `convert` makes pairs, labels or ranked lists of whatever the rows are.
What a row may look like, and what is wrong with one, is `tokens`' business.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from fairlead import records
from fairlead.errors import DataUnavailableError, InputError

from .tokens import Report, group

Row = Mapping[str, Any]
Shape = Literal["pairs", "unpaired", "ranked"]
FILES = (".jsonl", ".json", ".ndjson", ".parquet")
_SHAPED = {"prompt", "chosen", "rejected", "completion", "completions", "label", "ranks", "rewards", "messages", "weight", "ref_logp_mean"}


def read(source: Any, split: str = "train") -> list[Any]:
    """Rows of a JSONL or Parquet file (they know their line), of a data set of the hub, or of anything that yields rows.

    split: of a hub data set. InputError for a source without rows; DataUnavailableError where the hub has no such data set.
    """
    if not isinstance(source, (str, Path)):
        rows = list(source)
    elif Path(source).suffix.lower() in FILES:
        rows = list(records.read(source))
    else:
        rows = _from_hub(str(source), split)
    if not rows:
        raise InputError(f"{source if isinstance(source, (str, Path)) else 'the data set'}: holds no rows")
    return rows


def _from_hub(name: str, split: str) -> list[Any]:
    import datasets

    try:
        return list(datasets.load_dataset(name, split=split))
    except Exception as error:  # datasets raises many kinds; none of them is ours
        raise DataUnavailableError(f"{name}: no data set to be had: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


def convert(
    rows: Iterable[Row], shape: Shape, *, pairs: Literal["all", "extremes"] = "all", threshold: float | None = None
) -> tuple[list[dict[str, Any]], Report]:
    """Rows of one shape from rows of any, and how many say nothing in it.

    shape: "pairs" {prompt, chosen, rejected}, "unpaired" {prompt, completion, label}, "ranked" {prompt, completions, ranks} (rewards
    where the rows have them). Unpaired rows with the same prompt are one group. pairs: every two completions of which one is
    better, or the best and the worst of each group. threshold: the least reward of a wanted completion, for unpaired rows from
    rewards; from ranks, the best are wanted. Other columns are kept, those of the group's first row.
    InputError as `tokenize`; rewards to labels without a threshold; demonstrations, which are compared with nothing.
    """
    made: list[dict[str, Any]] = []
    report = Report()
    for prompt, completions, column, values, others in _groups(rows, shape):
        start = others if prompt is None else {"prompt": prompt, **others}
        if shape == "unpaired":
            wanted = _wanted(column, values, threshold)
            made += [{**start, "completion": c, "label": w} for c, w in zip(completions, wanted, strict=True)]
            continue
        worth = [-v for v in values] if column == "ranks" else values
        order = sorted(range(len(worth)), key=lambda i: -worth[i])
        if worth[order[0]] == worth[order[-1]]:
            report.dropped["without a better and a worse completion"] = report.dropped.get("without a better and a worse completion", 0) + 1
        elif shape == "ranked":
            ranks = [sorted(set(worth), reverse=True).index(w) for w in worth]
            made.append({**start, "completions": completions, **({"rewards": values} if column == "rewards" else {"ranks": ranks})})
        else:
            chosen = combinations(order, 2) if pairs == "all" else [(order[0], order[-1])]
            made += [{**start, "chosen": completions[i], "rejected": completions[j]} for i, j in chosen if worth[i] > worth[j]]
    report.rows = len(made)
    return made, report


_Group = tuple[Any, list[Any], str, list[Any], dict[str, Any]]


def _groups(rows: Iterable[Row], shape: Shape) -> list[_Group]:
    """(prompt, completions, what their numbers are, the numbers, other columns); labels with one prompt are one group."""
    found: list[_Group] = []
    by_prompt: dict[str, _Group] = {}
    for index, row in enumerate(rows):
        where = getattr(row, "where", "") or f"row {index}"
        prompt, completions, numbers = group(row, where)
        others = {name: value for name, value in row.items() if name not in _SHAPED}
        if not {"rank", "reward"} & set(numbers) and "label" not in row and "chosen" not in row:
            raise InputError(f"{where}: is a demonstration; it has no label, rank or rejected completion to convert")
        column = "rewards" if "reward" in numbers else "ranks" if "rank" in numbers else "labels"
        made = (prompt, completions, column, numbers[{"rewards": "reward", "ranks": "rank", "labels": "role"}[column]], others)
        if "label" not in row or shape == "unpaired":
            found.append(made)
            continue
        known = by_prompt.setdefault(json.dumps(prompt, sort_keys=True, default=str), made)
        if known is made:
            found.append(made)
        else:
            known[1].extend(completions)
            known[3].extend(made[3])
    return found


def _wanted(column: str, values: list[Any], threshold: float | None) -> list[bool]:
    if column == "rewards" and threshold is None:
        raise InputError("threshold: labels from rewards need the least reward of a wanted completion, as in threshold=0.5")
    if column == "rewards":
        return [v >= threshold for v in values]
    return [v == min(values) for v in values] if column == "ranks" else [v == 1 for v in values]
