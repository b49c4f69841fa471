"""One request under way: its answers line by line, whom to tell, and how it ended, which is settled once.

Knows nothing of HTTP, of asyncio or of the model: the worker's thread writes, whoever asked is told through `tell`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .text import TextStream

if TYPE_CHECKING:
    import torch

Outcome = Literal["done", "cancelled", "timeout", "failed"]


@dataclass(frozen=True)
class Limits:
    """What the server takes on. Bodies in bytes, times in seconds.

    queue: requests that may wait; more are refused. rows: answers that the model writes at a time. cells: rows times
    columns of a batch at most (its memory), where it holds more than one request. tokens: longest answer.
    choices: prompts times n of one request. timeout: for a whole request, from its arrival. body_seconds: for a body
    to arrive; header_seconds: for the lines before it; write_seconds: for a client that does not read. requests: at a time,
    those included that are still arriving. gather: how long the first request of a batch waits for others.
    """

    queue: int = 64
    rows: int = 32
    cells: int = 65_536
    tokens: int = 1024
    choices: int = 32
    body: int = 1 << 20
    timeout: float = 300.0
    body_seconds: float = 30.0
    header_seconds: float = 30.0
    write_seconds: float = 30.0
    requests: int = 256
    gather: float = 0.003


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; requests that agree here share a batch."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


@dataclass(frozen=True)
class Pieces:
    """Text that has come: (number of the answer, text)."""

    pieces: list[tuple[int, str]]


@dataclass(frozen=True)
class Finished:
    """All answers are there."""


@dataclass(frozen=True)
class Failed:
    """No answer: an HTTP status and one line."""

    status: int
    message: str


Event = Pieces | Finished | Failed


class Line:
    """One answer: the prompt it belongs to, the tokens so far as text, and why it ended ("" while it has not).

    number: of the answer within its request. prompt_number, candidate: which prompt's, and which answer to it.
    """

    def __init__(
        self, job: Job, number: int, prompt: Any, ids: torch.Tensor, prompt_number: int, candidate: int, room: int, text: TextStream,
        ends: frozenset[int],
    ) -> None:  # fmt: skip
        self.job, self.number, self.prompt, self.ids = job, number, prompt, ids
        self.prompt_number, self.candidate, self.room = prompt_number, candidate, room
        self._stream, self._ends = text, ends
        self.tokens = 0
        self.text = ""
        self.fresh = ""
        self.reason: Literal["", "stop", "length"] = ""
        self.reward: float | None = None

    @property
    def over(self) -> bool:
        """Whether no token is wanted any more."""
        return bool(self.reason) or self.job.settled

    @property
    def cut(self) -> bool:
        """Whether it ended, or may end, before the decoder is done with it: by a stop string, or because nobody waits."""
        return self._stream.stopped or self.job.settled

    def push(self, token: int) -> bool:
        """Take the next token; whether the answer is over."""
        if self.over:
            return True
        self.tokens += 1
        if token in self._ends:
            self.close("stop")
            return True
        self._add(self._stream.push(token))
        if self._stream.stopped:
            self.close("stop")
        elif self.tokens >= self.room:
            self.close("length")
        return bool(self.reason)

    def close(self, reason: Literal["stop", "length"]) -> None:
        """Give out what was held back; a stop string in it counts."""
        if not self.reason:
            self._add(self._stream.close())
            self.reason = "stop" if self._stream.stopped else reason

    def _add(self, text: str) -> None:
        self.text += text
        self.fresh += text


class Job:
    """A request: its lines, its settings, and how it ends.

    seed, first_index: the noise of prompt i is that of (seed, first_index + i), as in `generate`. stream: pieces are told
    as they come. tell: called from the worker's thread with each event. on_settled: called once, with the outcome.
    """

    def __init__(
        self, sampling: Sampling, seed: int, first_index: int, n: int, stream: bool, tell: Callable[[Event], None]
    ) -> None:
        self.sampling, self.seed, self.first_index, self.n, self.stream = sampling, seed, first_index, n, stream
        self.lines: list[Line] = []
        self.arrived = time.monotonic()
        self._tell = tell
        self.on_settled: Callable[[Outcome], None] = lambda outcome: None
        self._lock = threading.Lock()
        self.outcome: Outcome | None = None

    @property
    def settled(self) -> bool:
        return self.outcome is not None

    @property
    def width(self) -> int:
        """Columns that its longest line may need."""
        return max(len(line.ids) + line.room for line in self.lines)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompts, each counted once."""
        return sum(len(line.ids) for line in self.lines if line.candidate == 0)

    @property
    def completion_tokens(self) -> int:
        return sum(line.tokens for line in self.lines)

    def settle(self, outcome: Outcome) -> bool:
        """End it; False where it has ended already."""
        with self._lock:
            if self.outcome is not None:
                return False
            self.outcome = outcome
        self.on_settled(outcome)
        return True

    def progress(self) -> None:
        """Tell what is new, and the end where all lines have theirs."""
        if self.settled:
            return
        if self.stream:
            pieces = [(line.number, line.fresh) for line in self.lines if line.fresh]
            if pieces:
                self._tell(Pieces(pieces))
        for line in self.lines:
            line.fresh = ""
        if all(line.reason for line in self.lines) and self.settle("done"):
            self._tell(Finished())

    def fail(self, status: int, message: str) -> None:
        """Tell that there is no answer."""
        if self.settle("failed"):
            self._tell(Failed(status, message))


def touched(lines: Sequence[Line]) -> list[Job]:
    """The requests of these lines, each once."""
    return list(dict.fromkeys(line.job for line in lines))
