"""Tokens to text as they come: whole characters, whole words, and never a part of a stop string.

Text of a token is decoded together with the tokens that were shown last, because tokenizers write a space before a word only
where something precedes it; it is held back while it ends in U+FFFD, which is how the bytes of half a character are
decoded, and while it may be the beginning of a stop string. What is shown in pieces is what would be shown at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HALF = "\ufffd"


class TextStream:
    """The text of one answer. `push` gives what a token adds, `close` what was held back; `stopped`: a stop string came."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._context: list[int] = []
        self._shown = ""  # the text of `_context`
        self._fresh: list[int] = []
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is sure after this token."""
        if self.stopped:
            return ""
        self._fresh.append(token)
        text = self._text()
        if not text or text.endswith(HALF):
            return ""
        self._context, self._fresh = self._fresh, []
        self._shown = self._decode(self._context)
        return self._pass(text)

    def close(self) -> str:
        """The rest of the text; half a character at its end is left out."""
        if self.stopped:
            return ""
        sure = self._pass(self._text().rstrip(HALF))
        rest, self._held, self._fresh = self._held, "", []
        return sure + rest

    def _text(self) -> str:
        return self._decode(self._context + self._fresh)[len(self._shown) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _pass(self, text: str) -> str:
        """Text before a stop string, or before what may become one."""
        self._held += text
        found = [at for at in (self._held.find(word) for word in self._stop) if at >= 0]
        if found:
            sure, self._held, self.stopped = self._held[: min(found)], "", True
            return sure
        kept = max((_overlap(self._held, word) for word in self._stop), default=0)
        sure, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return sure


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of the text with which the word begins."""
    return next((k for k in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:k])), 0)
