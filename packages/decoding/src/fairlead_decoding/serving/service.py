"""All of serving but HTTP: requests become jobs, faults of a request are found before it waits, the worker answers.

A seed makes an answer that of `generate(..., seed=seed)` or `Decoder.generate(..., seed=seed)` with the same prompts; without one
the noise is new for each request.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from fairlead.errors import InputError
from fairlead.generation import check_vocabulary, encode

from .answering import Answerer
from .jobs import Event, Job, Limits, Line, Outcome, Sampling
from .metrics import Metrics
from .schema import ChatRequest, CompletionRequest
from .text import TextStream
from .worker import Refused, Worker

COMPLETION_TOKENS = 16
"""Length of an answer of /v1/completions where none is given: OpenAI's default."""


class BadRequest(InputError):
    """What a client can mend: the field at fault, an HTTP status and OpenAI's code."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class Service:
    """A model that answers requests, as a context manager: the worker runs within.

    model, tokenizer: a Hugging Face causal LM in eval mode and its tokenizer. name: under which it is asked for. decoder,
    reward, watermark: as `Decoder.generate` takes them, ready made. InputError where the decoder lacks something.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, decoder: Any = None, reward: Any = None, watermark: Any = None,
        limits: Limits | None = None,
    ) -> None:  # fmt: skip
        from fairlead.kinds.reward import as_reward

        self.name, self.limits, self.created = name, limits or Limits(), int(time.time())
        self.answerer = Answerer(model, tokenizer, decoder, None if reward is None else as_reward(reward), watermark)
        self.metrics = Metrics()
        self.worker = Worker(self.answerer, self.limits, self.metrics.batch)
        self.metrics.watch(lambda: self.worker.waiting, lambda: self.worker.running)
        self.open = 0
        """HTTP requests under way, /health not counted."""
        self._seed = secrets.randbits(62)
        self._indices = itertools.count()
        self._tokenizing = threading.Lock()
        self._positions = getattr(model.config, "max_position_embeddings", None)

    def __enter__(self) -> Service:
        self.worker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.worker.stop()

    def job(self, asked: CompletionRequest | ChatRequest, tell: Callable[[Event], None]) -> Job:
        """The job of a request, not yet submitted. BadRequest says what is wrong with it."""
        if asked.model != self.name:
            raise BadRequest(f"model: there is no such model here; this server has {self.name!r}", "model", "model_not_found", 404)
        if asked.stream_options is not None and not asked.stream:
            raise BadRequest("stream_options: belongs to stream=true; leave it out", "stream_options")
        if isinstance(asked, ChatRequest) and not getattr(self.answerer.tokenizer, "chat_template", None):
            raise BadRequest("messages: the model has no chat template; use /v1/completions", "messages")
        n = asked.n or 1
        prompts = [[m.plain for m in asked.messages]] if isinstance(asked, ChatRequest) else _prompts(asked)
        if n * len(prompts) > self.limits.choices:
            param = "prompt" if n == 1 else "n"
            raise BadRequest(f"{param}: {n * len(prompts)} answers are asked for, a request may have {self.limits.choices} here", param)
        sampling = self._sampling(asked)
        param = "messages" if isinstance(asked, ChatRequest) else "prompt"
        encoded = self._encode(prompts, param)
        rooms = [self._room(asked, len(ids), param) for ids in encoded]
        seeded = asked.seed is not None
        job = Job(
            sampling, asked.seed if asked.seed is not None else self._seed, 0 if seeded else next(self._indices) << 16, n,
            bool(asked.stream), tell,
        )  # fmt: skip
        job.lines = [
            Line(job, p * n + j, prompts[p], ids, p, j, min(rooms), self._text(asked), self.answerer.rules.ends)
            for p, ids in enumerate(encoded)
            for j in range(n)
        ]
        job.on_settled = lambda outcome: self._settled(job, outcome)
        return job

    def submit(self, job: Job) -> None:
        """Let the worker have it; Refused where there is no place."""
        if not self.worker.alive and not self.worker.closed:
            raise Refused(503, "the server's worker has ended; it must be started again", 60)
        self.worker.submit(job)
        self.metrics.accepted.inc()

    def cancel(self, job: Job, outcome: Outcome = "cancelled") -> None:
        """Nobody waits for it any more."""
        if job.settle(outcome):
            self.worker.withdraw(job)

    def _settled(self, job: Job, outcome: Outcome) -> None:
        self.metrics.settled(outcome, job.prompt_tokens, job.completion_tokens)

    def _text(self, asked: CompletionRequest | ChatRequest) -> TextStream:
        return TextStream(self.answerer.tokenizer, asked.stops)

    def _sampling(self, asked: CompletionRequest | ChatRequest) -> Sampling:
        sampling = Sampling(1.0 if asked.temperature is None else float(asked.temperature), asked.top_k, asked.top_p, asked.min_p)
        try:
            self.answerer.sampler(sampling)
        except ValueError as error:
            words = str(error).splitlines()[0]
            param = words.partition(":")[0]
            raise BadRequest(words, param if param in vars(sampling) else None) from None
        return sampling

    def _encode(self, prompts: list[Any], param: str) -> list[Any]:
        tokenizer, decoder = self.answerer.tokenizer, self.answerer.decoder
        with self._tokenizing:  # fast tokenizers refuse to be set up by two threads at a time
            try:
                encoded = [encode(tokenizer, prompt if decoder is None else decoder.start(prompt), i) for i, prompt in enumerate(prompts)]
                check_vocabulary(self.answerer.model, tokenizer, encoded, 0)
            except InputError as error:
                raise BadRequest(f"{param}: {str(error).removeprefix('prompt 0: ')}", param) from None
            except Exception as error:
                if type(error).__module__.partition(".")[0] != "jinja2":
                    raise
                raise BadRequest(f"messages: the model's chat template refuses them: {_line(error)}", "messages") from None
        return encoded

    def _room(self, asked: CompletionRequest | ChatRequest, length: int, param: str) -> int:
        """Tokens that an answer may have."""
        named, wanted = "max_tokens", asked.max_tokens
        if isinstance(asked, ChatRequest) and asked.max_completion_tokens is not None:
            if wanted is not None and wanted != asked.max_completion_tokens:
                raise BadRequest("max_tokens: differs from max_completion_tokens; give one of them", "max_tokens")
            named, wanted = "max_completion_tokens", asked.max_completion_tokens
        if wanted is not None and wanted > self.limits.tokens:
            raise BadRequest(f"{named}: {wanted} tokens are more than the {self.limits.tokens} of an answer here", named)
        left = self.limits.tokens if not isinstance(self._positions, int) else self._positions - length
        if left < (wanted or 1):
            raise BadRequest(
                f"{param}: its {length} tokens and {wanted or 1} new ones exceed the model's {self._positions} positions; "
                f"shorten it or lower {named}", param, "context_length_exceeded",
            )  # fmt: skip
        default = self.limits.tokens if isinstance(asked, ChatRequest) else min(COMPLETION_TOKENS, self.limits.tokens)
        return wanted or min(left, default)


def _prompts(asked: CompletionRequest) -> list[Any]:
    import torch

    prompt = asked.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [torch.tensor(prompt, dtype=torch.int64)]
    return [p if isinstance(p, str) else torch.tensor(p, dtype=torch.int64) for p in prompt]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
