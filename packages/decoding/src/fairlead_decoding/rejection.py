"""Rejection sampling: draw answers one after the other until one has a reward of at least the threshold.

What is returned has the model's distribution given r >= threshold, whose KL to the model is -ln P(r >= threshold); after N
draws the harmonic number H_(N-1) estimates it without bias. Draws come in rounds of 1, 1, 2, 4, ... answers, for the
prompts that still wait. Where none of `n` answers passes, the best one is returned and says `accepted: False`.
"""

from __future__ import annotations

from pydantic import Field

from fairlead.config import MethodConfig
from fairlead.decoding import Answer, Request, best, draw
from fairlead.generation import Generation
from fairlead.kinds import Decoder


class RejectionConfig(MethodConfig):
    """Settings of rejection sampling."""

    threshold: float = Field(0.0, allow_inf_nan=False, description="least reward of an answer that is accepted")
    n: int = Field(64, ge=1, description="answers drawn at most for each prompt")


class Rejection(Decoder):
    """The first answer whose reward reaches the threshold."""

    Config = RejectionConfig
    config: RejectionConfig
    needs_reward = True

    def decode(self, request: Request) -> list[Answer]:
        engine = request.engine()
        waiting = list(range(len(request.encoded)))
        groups: list[list[Generation]] = [[] for _ in waiting]
        drawn = 0
        while waiting and drawn < self.config.n:
            count = min(max(1, drawn), self.config.n - drawn)
            for place, more in zip(waiting, draw(request, count, engine=engine, places=waiting, first=drawn), strict=True):
                groups[place] += more
            drawn += count
            waiting = [p for p in waiting if self._accepted(groups[p]) is None]
            pays = request.meter.affords(request.max_new_tokens, 1)
            waiting = [p for p in waiting if bool(pays[p])]
        return [self._answer(group) for group in groups]

    def _accepted(self, group: list[Generation]) -> int | None:
        return next((j for j, g in enumerate(group) if g.reward is not None and g.reward >= self.config.threshold), None)

    def _answer(self, group: list[Generation]) -> Answer:
        accepted = self._accepted(group)
        tries = len(group) if accepted is None else accepted + 1
        kl = sum(1 / k for k in range(1, tries))
        chosen = best(group) if accepted is None else accepted
        return Answer(group, chosen, kl, "estimate", extra={"accepted": accepted is not None, "tries": tries})
