"""The model's part: a batch of lines answered by plain sampling or by a decoder.

What a line says depends on (seed, prompt) as in `generate` and `Decoder.generate`, not on the lines beside it. Plain sampling
and token search with one beam choose tokens for good, one at a time, so these are told as they come; other decoders are
told when they are done. Lines that are over leave the batch; where all are cut, a decoder is told that its time is up.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from fairlead.decoding import Budget, Meter, Request
from fairlead.engine import RolloutEngine, Rules, roll
from fairlead.generation import PlainSampler, end_tokens, pad_token, seeds

from .jobs import Job, Line, Sampling, touched


class Answerer:
    """Answers batches of lines with one model. decoder None: plain sampling."""

    def __init__(self, model: Any, tokenizer: Any, decoder: Any = None, reward: Any = None, watermark: Any = None) -> None:
        self.model, self.tokenizer, self.decoder, self.reward, self.watermark = model, tokenizer, decoder, reward, watermark
        self.rules = Rules(None, end_tokens(model, tokenizer), pad_token(model, tokenizer))
        if decoder is not None:
            decoder.prepare(model, tokenizer, reward)  # what is missing should be said before the first request

    @property
    def streams(self) -> bool:
        """Whether tokens are told as they come."""
        from ..token_search import TokenSearch

        return self.decoder is None or (isinstance(self.decoder, TokenSearch) and self.decoder.beam == 1)

    @property
    def rows_per_line(self) -> int:
        """Rows of the model that a line takes."""
        return 1 if self.decoder is None else max(1, int(self.decoder.rows_per_prompt))

    def key(self, job: Job) -> Any:
        """Requests with one key may share a batch."""
        return job.sampling if self.decoder is None else (job.sampling, job.seed, job.lines[0].room)

    def sampler(self, sampling: Sampling) -> Any:
        """What draws a token; InputError where the watermark does not take these settings."""
        options = vars(sampling)
        return PlainSampler(**options) if self.watermark is None else self.watermark.sampler(**options)

    def __call__(self, lines: Sequence[Line]) -> None:
        """Answer these lines (of requests with one key), telling as they come."""
        if self.decoder is None:
            self._sample(lines)
        else:
            self._decode(lines)
        for job in touched(lines):
            job.progress()

    def _sample(self, lines: Sequence[Line]) -> None:
        prompts = list(dict.fromkeys((id(line.job), line.prompt_number) for line in lines))
        first = {place: next(line for line in lines if (id(line.job), line.prompt_number) == place) for place in prompts}
        owner = [prompts.index((id(line.job), line.prompt_number)) for line in lines]
        room = max(line.room for line in lines)
        engine = RolloutEngine(self.model)
        engine.prefill([first[place].ids for place in prompts], room)
        if owner != list(range(len(prompts))):
            engine.select(torch.tensor(owner, device=self.model.device))
        seeds_B = torch.cat([
            seeds(line.job.seed, [line.job.first_index + line.prompt_number], line.candidate + 1)[-1:] for line in lines
        ])  # fmt: skip

        def listen(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            heard = [lines[row] for row in rows.tolist()]
            cut = [line.push(token) for line, token in zip(heard, tokens.tolist(), strict=True)]
            for job in touched(heard):
                job.progress()
            return torch.tensor(cut)

        sampler = self.sampler(lines[0].job.sampling)
        roll(engine, room, sampler, self.rules, seeds_B=seeds_B.to(self.model.device), listen=listen)

    def _decode(self, lines: Sequence[Line]) -> None:
        job = lines[0].job
        decoder = self._told(lines) if self.streams else self.decoder
        request = Request(
            model=self.model, tokenizer=self.tokenizer, prompts=[line.prompt for line in lines], encoded=[line.ids for line in lines],
            indices=[line.job.first_index + line.prompt_number * line.job.n + line.candidate for line in lines], rules=self.rules,
            meter=_Wanted(lines), seed=job.seed, max_new_tokens=lines[0].room, **vars(job.sampling), watermark=self.watermark,
            given_reward=decoder.prepare(self.model, self.tokenizer, self.reward),
        )  # fmt: skip
        for line, answer in zip(lines, decoder.decode(request), strict=True):
            chosen = answer.candidates[answer.chosen]
            line.reward = None if chosen.reward is None else float(chosen.reward)
            for token in chosen.ids.tolist()[line.tokens :]:
                line.push(token)
            line.close("stop" if chosen.finished else "length")

    def _told(self, lines: Sequence[Line]) -> Any:
        """The token search with every choice told to its line."""
        twin = copy.copy(self.decoder)
        step = self.decoder._step.__func__

        def told(state: Any, *rest: Any) -> Any:
            picked = step(twin, state, *rest)
            heard = [lines[state.places[row]] for row, _ in picked]
            for line, (_, written) in zip(heard, picked, strict=True):
                line.push(written.tokens[-1])
            for job in touched(heard):
                if not all(line.reason for line in job.lines):  # the end is told with the reward
                    job.progress()
            return picked

        twin._step = told
        return twin


class _Wanted(Meter):
    """A meter without a budget, whose time is up when all lines are cut."""

    def __init__(self, lines: Sequence[Line]) -> None:
        super().__init__(Budget(), len(lines))
        self._lines = lines

    @property
    def late(self) -> bool:
        return all(line.cut for line in self._lines)
