"""How alike two texts are, by their longest common subsequence: the indel ratio, ROUGE-L, and a filter for diverse lists.

ratio(a, b) = 2 LCS(a, b) / (|a| + |b|) over code points, 1 for two empty texts; ROUGE-L F1 is the same over lower-cased
words. The LCS is bit-parallel (Hyyrö 2004): one pass over b with whole rows of the table in one Python integer.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

_WORD = re.compile(r"\w+")


def lcs_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence of two strings or sequences."""
    if len(a) > len(b):
        a, b = b, a
    places: dict[Hashable, int] = {}
    for i, symbol in enumerate(a):
        places[symbol] = places.get(symbol, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for symbol in b:
        hit = row & places.get(symbol, 0)
        row = (row + hit | row - hit) & full
    return len(a) - row.bit_count()


def ratio(a: str, b: str) -> float:
    """Similarity in [0, 1]: 1 iff the texts are equal, 0 without a common character; symmetric, case counts."""
    total = len(a) + len(b)
    return 2 * lcs_length(a, b) / total if total else 1.0


def rouge_l_f1(a: str, b: str) -> float:
    """F1 of ROUGE-L over lower-cased words; 0 when a side has no word."""
    first, second = _WORD.findall(a.lower()), _WORD.findall(b.lower())
    return 2 * lcs_length(first, second) / (len(first) + len(second)) if first and second else 0.0


def diverse(texts: Sequence[str], threshold: float = 0.5, limit: int | None = None) -> list[int]:
    """Indices of the texts to keep, first come first kept: each is less alike than `threshold` to every kept one.

    limit: stop at that many; the filter comes first, so fewer are returned only when fewer differ enough.
    """
    kept: list[int] = []
    for i, text in enumerate(texts):
        if limit is not None and len(kept) >= limit:
            break
        if all(ratio(text, texts[j]) < threshold for j in kept):
            kept.append(i)
    return kept
