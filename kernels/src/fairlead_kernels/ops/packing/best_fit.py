"""Which sequences share a packed row: best-fit decreasing under a token budget. Integers only; tensors are pack's."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable

import torch

from ... import checks


def best_fit(lengths: Iterable[int] | torch.Tensor, token_budget: int, allow_oversize: bool = False) -> list[list[int]]:
    """Bins of sequence indices with at most `token_budget` tokens each.

    By falling length (ties: input order) each sequence goes to the bin that it leaves the least room in (ties: the
    oldest), or opens one. lengths: integers of at least 1. allow_oversize: a sequence above the budget gets a bin of its
    own instead of a ValueError. O(S log S) for S sequences.
    """
    if isinstance(token_budget, bool) or not isinstance(token_budget, int) or token_budget < 1:
        raise ValueError(f"token_budget: an integer of at least 1 is needed, not {checks.describe(token_budget)}")
    try:
        sizes = list(lengths.tolist() if isinstance(lengths, torch.Tensor) else lengths)
    except TypeError as error:
        raise TypeError(f"lengths: integers are needed, not {checks.describe(lengths)}") from error
    for i, size in enumerate(sizes):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"lengths: integers of at least 1 are needed, number {i} is {checks.describe(size)}")
    if sizes and max(sizes) > token_budget and not allow_oversize:
        text = f"a sequence of {max(sizes)} tokens is above the token_budget of {token_budget}"
        raise ValueError(f"lengths: {text}; raise it or allow_oversize=True")
    bins: list[list[int]] = []
    rooms: list[int] = []  # the different rooms left, rising
    by_room: dict[int, list[int]] = {}  # bins with that room, oldest first (a heap)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect_left(rooms, sizes[i])
        if at < len(rooms):
            room = rooms[at]
            chosen = heapq.heappop(by_room[room])
            if not by_room[room]:
                del by_room[room]
                rooms.pop(at)
            room -= sizes[i]
        else:
            chosen, room = len(bins), token_budget - sizes[i]
            bins.append([])
        bins[chosen].append(i)
        if room > 0:
            if room not in by_room:
                by_room[room] = []
                insort(rooms, room)
            heapq.heappush(by_room[room], chosen)
    return bins
