"""Blockwise best-of-n: sample n continuations of b tokens, keep the one of the highest value, go on from there.

Mudgal et al. (arXiv 2310.17022), the blockwise form of controlled decoding: between best-of-n (one block as long as the answer)
and token search (blocks of one token). A block is worth the reward of the answer so far. J blocks diverge from the model by
at most J (ln n - (n - 1) / n) nats.
"""

from __future__ import annotations

import torch
from pydantic import Field

from fairlead.config import MethodConfig
from fairlead.decoding import Answer, Request
from fairlead.engine import roll
from fairlead.kinds import Decoder

from . import theory


class BlockwiseConfig(MethodConfig):
    """Settings of blockwise best-of-n."""

    n: int = Field(4, ge=1, description="blocks sampled at each turn")
    block: int = Field(16, ge=1, description="tokens in a block")


class Blockwise(Decoder):
    """Sample blocks, keep by value."""

    Config = BlockwiseConfig
    config: BlockwiseConfig
    needs_reward = True

    @property
    def rows_per_prompt(self) -> int:
        return self.config.n

    def decode(self, request: Request) -> list[Answer]:
        engine, sampler, n = request.engine(), request.sampler(), self.config.n
        live = list(range(len(request.encoded)))
        tokens = [torch.zeros(0, dtype=torch.int64) for _ in live]
        logprobs = [torch.zeros(0) for _ in live]
        ended = [False] * len(live)
        blocks = [0] * len(live)
        seeds_B = request.seeds(n)
        length = 0
        assert request.reward is not None
        while live:
            room = min(self.config.block, request.max_new_tokens - length)
            counts, room = self._affordable(request, live, room)
            if room < 1:
                break
            owner = [place for place, count in zip(live, counts, strict=True) for _ in range(count)]
            rows = [live.index(place) for place in owner]
            number = [j for count in counts for j in range(count)]
            twin = engine.fork(1, torch.tensor(rows, device=request.device))
            made = roll(
                twin, room, sampler, request.rules, seeds_B=seeds_B[[p * n + j for p, j in zip(owner, number, strict=True)]],
                first=length, temperature=request.temperature or 1.0, stop=lambda: request.meter.late,
            )  # fmt: skip
            texts = [torch.cat([tokens[place], ids]) for place, ids in zip(owner, made.ids, strict=True)]
            contested = [i for i, place in enumerate(owner) if counts[live.index(place)] > 1]
            scores = [0.0] * len(owner)
            if contested:
                found = request.reward([owner[i] for i in contested], [texts[i] for i in contested], [made.ended[i] for i in contested])
                for i, score in zip(contested, found.tolist(), strict=True):
                    scores[i] = score
            kept: list[tuple[int, int, torch.Tensor]] = []  # row, prompt, block of those that go on
            for row, place in enumerate(live):
                mine = [i for i, p in enumerate(owner) if p == place]
                chosen = max(mine, key=lambda i: (scores[i], -i))
                tokens[place], ended[place] = texts[chosen], made.ended[chosen]
                logprobs[place] = torch.cat([logprobs[place], made.logprobs[chosen]])
                blocks[place] += len(mine) > 1
                if not ended[place] and len(made.ids[chosen]) == room:
                    kept.append((row, place, made.ids[chosen]))
            length += room
            pays_P = request.meter.affords(room + 1)
            kept = [] if length >= request.max_new_tokens else [k for k in kept if bool(pays_P[k[1]])]
            live = [place for _, place, _ in kept]
            if live:
                engine.select(torch.tensor([row for row, _, _ in kept], device=request.device))
                engine.extend(torch.stack([block for _, _, block in kept]).to(request.device))
        return [self._answer(request, p, tokens[p], logprobs[p], ended[p], blocks[p]) for p in range(len(tokens))]

    def _affordable(self, request: Request, live: list[int], room: int) -> tuple[list[int], int]:
        """Blocks that each prompt can pay for, at least one, and their length. One reward call is kept for the answer."""
        budget, meter, n = request.meter.budget, request.meter, self.config.n
        counts = [n] * len(live)
        if budget.reward_calls is not None:
            counts = [n if budget.reward_calls - int(meter.calls_P[p]) - 1 >= n else 1 for p in live]
        if budget.model_tokens is None:
            return counts, room
        spent_P = meter.tokens_P
        left = [budget.model_tokens - int(spent_P[p]) for p in live]
        room = min(room, min(left) + 1)
        return [max(1, min(c, rest // max(1, room))) for c, rest in zip(counts, left, strict=True)], room

    def _answer(self, request: Request, place: int, ids: torch.Tensor, logprobs: torch.Tensor, ended: bool, blocks: int) -> Answer:
        reward = None
        if bool(request.meter.affords(0, 1)[place]):
            assert request.reward is not None
            reward = float(request.reward([place], [ids], [ended])[0])
        answer = request.generation(place, ids, finished=ended, logprobs=logprobs, reward=reward)
        return Answer([answer], kl=blocks * float(theory.bon_kl_bound(self.config.n)), kl_kind="bound", extra={"blocks": blocks})
