"""Position ids that spread a short prompt of chunks over a long window: LOGO's position synthesis (arXiv 2410.18533, sec. 3.3).

A prompt is system tokens, N chunks and a question; its real length k is small, its ids lie in [0, K). Ids strictly increase,
the system starts at 0, the question and every answer end the window: all answers of a row start at the same id.

    grid        chunk j owns F = floor((K - s - q) / N) ids and stands at one of the starts that cover them; q = question + longest answer
    cumulative  the gap before each chunk is uniform on 0..floor((K - k) / N); coverage is poor, see the page
    sparse      a chunk takes sorted distinct ids of its F; breaks contiguity on purpose

Deviations: the paper's eq. (4) repeats ids, so `cumulative` sums its gaps; the released code ends one id past the window, and
crosses all starts of all chunks, where `position_rows` draws them jointly. A model must be given such ids with an explicit 2-D
attention mask (`statistics` and PreferenceTrainer do): without one, transformers reads each gap as the start of a packed sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from fairlead.errors import InputError

Mode = Literal["grid", "cumulative", "sparse"]
_PIECES = ("system_ids", "chunk_ids", "question_ids")


def covering_starts(width: int, length: int) -> list[int]:
    """The least number of starts at which a chunk of `length` ids covers an interval of `width` ids, evenly spread."""
    if not 1 <= length <= width:
        raise InputError(f"a chunk of {length} tokens does not fit into an interval of {width} ids; give 1 <= length <= width")
    count = -(-width // length)
    return [0] if count == 1 else [i * (width - length) // (count - 1) for i in range(count)]


def prompt_positions(
    chunk_lens: Sequence[int], *, target_len: int, generator: torch.Generator, mode: Mode = "grid", system_len: int = 0,
    question_len: int = 0, answer_lens: Sequence[int] = (0,), separator: bool = False,
) -> torch.Tensor:  # fmt: skip
    """One draw of the ids of a prompt, int64 [L], in the order system, chunks (each with its separator), question.

    Answers start at `target_len` - max(answer_lens). chunk_lens: real tokens of each chunk. separator: one token follows each
    chunk, in grid and sparse on the last id of the chunk's interval, in cumulative on the next id. InputError: no chunk or an
    empty one, more tokens than ids, a chunk longer than its interval.
    """
    lens, extra = list(chunk_lens), int(separator)
    if mode not in get_args(Mode):
        raise InputError(f"mode: must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if not lens or min(lens) < 1:
        raise InputError(f"chunk_lens: one chunk or more is needed, each of a token or more, got {lens}")
    if not answer_lens or min(system_len, question_len, *answer_lens) < 0:
        raise InputError("system_len, question_len and answer_lens: 0 or more each, and one answer or more")
    tail = question_len + max(answer_lens)
    real = system_len + sum(lens) + extra * len(lens) + tail
    if real > target_len:
        raise InputError(f"target_len: {real} tokens do not fit into {target_len} ids; take a longer window or fewer chunks")
    ids = [torch.arange(system_len)]
    if mode == "cumulative":
        gaps = torch.randint(0, (target_len - real) // len(lens) + 1, (len(lens),), generator=generator)
        start = system_len
        for length, gap in zip(lens, gaps.tolist(), strict=True):
            start += gap
            ids.append(torch.arange(start, start + length + extra))
            start += length + extra
    else:
        interval = (target_len - system_len - tail) // len(lens)
        if max(lens) + extra > interval:
            raise InputError(
                f"target_len: a chunk of {max(lens) + extra} tokens is longer than its interval of {interval} ids; "
                "take a longer window, shorter or more equal chunks"
            )
        for index, length in enumerate(lens):
            first, width = system_len + index * interval, interval - extra
            ids.append(first + _within(width, length, mode, generator))
            if separator:
                ids.append(torch.tensor([first + width]))
    question = target_len - tail
    return torch.cat([*ids, torch.arange(question, question + question_len)])


def _within(width: int, length: int, mode: Mode, generator: torch.Generator) -> torch.Tensor:
    """Ids of one chunk in its own interval, counted from the interval's first."""
    if mode == "sparse":
        return torch.randperm(width, generator=generator)[:length].sort().values
    starts = covering_starts(width, length)
    start = starts[int(torch.randint(len(starts), (), generator=generator))]
    return torch.arange(start, start + length)


def position_rows(
    rows: Iterable[Mapping[str, Any]], *, target_len: int, generator: torch.Generator, mode: Mode = "grid",
    samples_per_row: int = 1, sparse_share: float = 0.1, separator_id: int | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Tokenised rows for PreferenceTrainer(objective="logo"), `samples_per_row` of each row, with ids drawn for each anew.

    rows: {"system_ids": [...], "chunk_ids": [[...], ...], "question_ids": [...], "completion_ids": [[...], ...], "role": [1, -1, -1]},
    see `long_context.tokenized`; other columns pass as they are. sparse_share: the part of the draws that is sparse whatever the mode is
    (paper: one in ten; 0 for none). separator_id: a token that follows each chunk. InputError names the row.
    """
    if samples_per_row < 1:
        raise InputError(f"samples_per_row: must be 1 or more, got {samples_per_row}")
    if not 0 <= sparse_share <= 1:
        raise InputError(f"sparse_share: must lie in [0, 1], got {sparse_share}")
    made = []
    for number, row in enumerate(rows):
        absent = [name for name in ("chunk_ids", "completion_ids") if not row.get(name)]
        if absent:
            raise InputError(f"row {number}: {absent[0]} is missing or empty")
        system, chunks, question = (list(row.get(name) or []) for name in _PIECES)
        answer_lens = [len(answer) for answer in row["completion_ids"]]
        after = [] if separator_id is None else [separator_id]
        prompt = [*system, *(token for chunk in chunks for token in [*chunk, *after]), *question]
        rest = {name: value for name, value in row.items() if name not in _PIECES}
        for _ in range(samples_per_row):
            sparse = bool(torch.rand((), generator=generator) < sparse_share)
            try:
                ids = prompt_positions(
                    [len(chunk) for chunk in chunks], target_len=target_len, generator=generator, mode="sparse" if sparse else mode,
                    system_len=len(system), question_len=len(question), answer_lens=answer_lens, separator=separator_id is not None,
                )  # fmt: skip
            except InputError as error:
                raise InputError(f"row {number}: {error}") from None
            made.append({"prompt_ids": prompt, **rest, "prompt_position_ids": ids.tolist(), "completion_position": target_len - max(answer_lens)})
    return made
