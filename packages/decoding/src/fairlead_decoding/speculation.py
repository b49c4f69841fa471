"""Blocks of speculative sampling: propose, judge, keep a part, and take back the rest, for rows of different luck.

The rule is arXiv 2211.17192's: a proposal x of the draft's law p is kept with probability min(1, q(x) / p(x)), a refused one
is replaced by a draw from (q - p)_+. Which models, what is counted in the end and what is told is `speculative.py`'s.

Shape suffixes: B rows, K tokens of a block, G = K - 1 drafted tokens, V vocabulary of the target, N rows of the whole batch,
T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fairlead.decoding import Request
from fairlead.engine import PADDING, RolloutEngine, choose
from fairlead.errors import InputError
from fairlead.generation import PlainSampler

DRAFT, ACCEPT, RESIDUAL = 1, 2, 3
"""Streams of noise: what the draft draws, whether it is accepted, what takes its place."""
Written = tuple[torch.Tensor, bool, dict[str, Any]]
"""Ids, whether they ended by themselves, and counts."""


def verdict(
    q_BKV: torch.Tensor, p_BGV: torch.Tensor, tokens_BG: torch.Tensor, chance_BG: torch.Tensor, live_BG: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sampling rule: (q / p of each proposal float64 [B, G], how many are kept int64 [B], weights [B, V] of the token
    that follows them).

    q_BKV, p_BGV: laws of target and draft, K = G + 1. tokens_BG: proposals, -1 for none. chance_BG: uniforms in [0, 1).
    live_BG: what was proposed, a prefix of each row; a row that keeps all of it goes on with the target's law.
    """
    rows, width = torch.arange(len(q_BKV), device=q_BKV.device), tokens_BG.shape[1]
    at = tokens_BG.clamp(min=0)[..., None]
    ratio_BG = (q_BKV[:, :width].gather(2, at) / p_BGV.gather(2, at))[..., 0].double()
    kept = ((chance_BG < ratio_BG) & live_BG).cumprod(1).sum(1)
    weights_BV = q_BKV[rows, kept]
    if width:
        residual_BV = (weights_BV - p_BGV[rows, kept.clamp(max=width - 1)]).clamp(min=0)
        # Rounding may leave nothing of a residual whose true mass is tiny.
        refused = (kept < live_BG.sum(1)) & (residual_BV.sum(-1) > 0)
        weights_BV = torch.where(refused[:, None], residual_BV, weights_BV)
    return ratio_BG, kept, weights_BV


class Law:
    """Next-token laws of one request: rules, watermark, temperature and truncation, the same for target and draft."""

    def __init__(self, request: Request, width: int, draft_width: int) -> None:
        self.rules, self.width, self.shared = request.rules, width, min(width, draft_width)
        self.temperature, self.cuts = request.temperature, (request.top_k or 0, request.top_p or 1.0, request.min_p or 0.0)
        self._mark = request.watermark
        self._mark_options: dict[str, Any] = {}
        self._mark_from = False
        if self._mark is not None:
            self._read_mark(request)
        self.reads_ids = self._mark is not None or self.rules.processor is not None
        self.by_position = self.reads_ids or bool(self.rules.least and self.rules.ends)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def _read_mark(self, request: Request) -> None:
        """A processor that takes sampling settings applies them itself, and leaves none to be applied after it."""
        names = inspect.signature(self._mark.processor).parameters  # type: ignore[union-attr]
        self._mark_from = "prompt_length" in names
        own = [n for n in ("temperature", "top_k", "top_p", "min_p") if n in names]
        if not own:
            return
        self._mark_options = {n: getattr(request, n) for n in own}
        if getattr(self._mark.config, "dedup_contexts", None) and (request.truncates or request.temperature != 1):  # type: ignore[union-attr]
            raise InputError(
                f"speculative: {self._mark.name} with dedup_contexts works at temperature 1 without truncation only; "  # type: ignore[union-attr]
                "leave one of them out"
            )
        self._processor(0)  # what the mark refuses, greedy text say, it refuses here
        self.temperature, self.cuts = 1.0, (0, 1.0, 0.0)

    def fit(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of either model at the target's width, with -inf where the two have not both a token."""
        if logits.shape[-1] == self.width == self.shared:
            return logits
        return torch.nn.functional.pad(logits[..., : self.shared], (0, self.width - self.shared), value=-torch.inf)

    def processed(self, logits_BV: torch.Tensor, ids_BT: Callable[[], torch.Tensor], positions_B: torch.Tensor) -> torch.Tensor:
        """Logits after rules and watermark; positions_B: index in the answer of the token about to be chosen."""
        logits_BV = self.rules.apply(logits_BV, ids_BT, positions_B)
        return logits_BV if self._mark is None else self._marked(logits_BV, ids_BT(), positions_B)

    def _marked(self, logits_BV: torch.Tensor, ids_BT: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
        """Marked logits. Answers of one length begin in one column, so they are marked together."""
        if not self._mark_from:
            marked: torch.Tensor = self._processor(0)(ids_BT, logits_BV.float())
            return marked
        marked_BV = logits_BV.float().clone()
        for length in positions_B.unique().tolist():
            rows = (positions_B == length).nonzero()[:, 0]
            marked_BV[rows] = self._processor(max(0, ids_BT.shape[1] - length))(ids_BT[rows], marked_BV[rows])
        return marked_BV

    def _processor(self, start: int) -> Any:
        begins = {"prompt_length": start} if self._mark_from else {}
        return self._mark.processor(**begins, **self._mark_options)  # type: ignore[union-attr]

    def warped(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-weights [..., V], float32 or float64: tempered, -inf where truncation cuts."""
        scaled = logits if logits.dtype == torch.float64 else logits.float()
        if self.temperature != 1:
            scaled = scaled / self.temperature
        if self.cuts != (0, 1.0, 0.0):
            from fairlead_kernels.ops.gumbel_sample.reference import cutoff

            scaled = scaled - scaled.amax(-1, keepdim=True)
            least = cutoff(scaled.flatten(0, -2), *self.cuts).view(*scaled.shape[:-1], 1)
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        return scaled


@dataclass
class Counts:
    """What the rows of a batch did, [N] and [N, gamma]."""

    calls: torch.Tensor
    expected: torch.Tensor
    tested: torch.Tensor
    drafted: torch.Tensor
    accepted: torch.Tensor

    @classmethod
    def zeros(cls, rows: int, gamma: int, device: torch.device) -> Counts:
        def none(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        return cls(none(rows), none(rows).double(), none(rows), none(rows, gamma), none(rows, gamma))

    def row(self, i: int) -> dict[str, Any]:
        return {
            "target_calls": int(self.calls[i]), "expected_tokens": float(self.expected[i]), "tested": int(self.tested[i]),
            "drafted_by_position": self.drafted[i].tolist(), "accepted_by_position": self.accepted[i].tolist(),
        }  # fmt: skip


class Speculation:
    """Rows that grow by blocks.

    Both caches hold all but the last token of a row, the draft's also lacks the one before where all proposals were
    accepted. How many tokens a row drafts depends on what it has left to write and to spend, never on the rows beside it.
    """

    def __init__(
        self, request: Request, law: Law, target: RolloutEngine, draft: RolloutEngine, places: torch.Tensor, gamma: int,
        prompt: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """prompt: that of the only row, which the target has not seen yet."""
        rows, device, room = len(places), request.device, request.max_new_tokens
        self.law, self.target, self.draft, self.meter, self.room = law, target, draft, request.meter, room
        self.places, self.prompt = places, prompt
        self.answers = torch.full((rows, room + gamma + 1), PADDING, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.counts = Counts.zeros(rows, gamma, device)
        self.steps = torch.arange(gamma + 1, device=device)
        seeds = [request.seeds(1, stream)[places] for stream in (DRAFT, ACCEPT, RESIDUAL)]
        self.draft_seeds, self.residual_seeds = seeds[0], seeds[2]
        if not law.greedy:
            self.uniforms = _uniforms(seeds[1], room + gamma)
        self.draw = PlainSampler(0.0 if law.greedy else 1.0)
        # Of the rows in the engines: which answer each writes, whether it still does, the tokens the caches lack.
        self.here = torch.arange(rows, device=device)
        self.alive = torch.ones(rows, dtype=torch.bool, device=device)
        self.limit = torch.full_like(self.here, gamma)
        self.last = torch.full_like(self.here, PADDING)
        self.tail = torch.full_like(self.here, PADDING)

    def run(self) -> list[Written]:
        """What each row wrote."""
        first = True
        while True:
            self._limit(first)
            if not bool(self.alive.any()) or (self.meter.late and not first):
                break
            self._shrink()
            self._step(first)
            first = False
        lengths, answers = self.lengths.tolist(), self.answers.cpu()
        return [(answers[i, :n], ended, self.counts.row(i)) for i, (n, ended) in enumerate(zip(lengths, self.finished.tolist(), strict=True))]

    def _limit(self, first: bool) -> None:
        """How many tokens each row drafts now: what it may still write less the one that the target adds, and what it
        can pay for. A row that drafts none no longer does; one that cannot pay for a token ends."""
        room = self.room - self.lengths[self.here] - 1
        self.limit = torch.minimum(self.limit, room.clamp(min=0)).masked_fill(~self.alive, 0)
        if self.meter.budget.model_tokens is None:
            return
        left = self.meter.budget.model_tokens - self.meter.tokens_P.to(self.here.device)[self.places[self.here]]
        if first:  # the prompts' logits are there: g tokens of the target's and g - 1 of the draft's
            paid = (left + 1) // 2
        else:
            paid = (left - 1 - (self.tail != PADDING).long()) // 2
            self.alive = self.alive & (left >= 1)
        self.limit = torch.minimum(self.limit, paid.clamp(min=0)).masked_fill(~self.alive, 0)

    def _shrink(self) -> None:
        """Dropping ended rows copies the caches, so it is done when at least a quarter of the rows is idle."""
        if int(self.alive.sum()) > 0.75 * len(self.here):
            return
        rows = self.alive.nonzero()[:, 0]
        for engine in (self.target, self.draft):
            engine.select(rows)
        for name in ("here", "alive", "limit", "last", "tail"):
            setattr(self, name, getattr(self, name)[rows])

    def _step(self, first: bool) -> None:
        written, width = self.lengths[self.here], int(self.limit.max())
        block_BK, p_BGV = self._propose(written, width, first)
        q_BKV = self._judge(block_BK, written, first)
        live_BG = self.steps[:width] < self.limit[:, None]
        if self.law.greedy:
            pick_BK = _best(q_BKV)
            ratio_BG = (pick_BK[:, :width] == block_BK[:, 1:]).double()
            kept = ((ratio_BG > 0) & live_BG).cumprod(1).sum(1)
            token = pick_BK.gather(1, kept[:, None])[:, 0]
        else:
            ratio_BG, kept, token = self._test(block_BK, p_BGV, q_BKV, live_BG, written)
        self._count(width, live_BG, ratio_BG, kept)
        self._write(block_BK, kept, token, written)
        self.target.drop(self.limit - kept)
        self.draft.drop((self.limit - 1 - kept).clamp(min=0))
        full = (kept == self.limit) & (self.limit > 0) & self.alive
        self.tail = torch.where(full, block_BK.gather(1, self.limit[:, None])[:, 0], PADDING)
        self.last = torch.where(self.alive, token, PADDING)

    def _propose(self, written: torch.Tensor, width: int, first: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The block [B, 1 + width]: the last token, then the draft's; and the draft's log-weights [B, width, V]."""
        block_BK = torch.full((len(self.here), 1 + width), PADDING, dtype=torch.int64, device=self.here.device)
        block_BK[:, 0] = self.last
        if width and not first:
            drafts = self.limit > 0
            feed = torch.where(drafts, self.last, PADDING)[:, None]
            if bool((self.tail != PADDING).any()):
                feed = torch.cat([torch.where(drafts, self.tail, PADDING)[:, None], feed], 1)
            self.draft.extend(feed)
        laws = []
        for g in range(width):
            logits_BV = self.law.fit(self.draft.logits_BV)
            if self.law.by_position:
                logits_BV = self.law.processed(logits_BV, lambda: self.draft.ids_BT, written + g)
            if not self.law.greedy:
                logits_BV = self.law.warped(logits_BV)
                laws.append(logits_BV)
            tokens = choose(self.draw, logits_BV, block_BK, self.draft_seeds[self.here], written + g)
            block_BK[:, g + 1] = torch.where(self.limit > g, tokens, PADDING)
            if g + 1 < width:
                self.draft.extend(torch.where(self.limit > g + 1, tokens, PADDING)[:, None])
        return block_BK, torch.stack(laws, 1) if laws else None

    def _judge(self, block_BK: torch.Tensor, written: torch.Tensor, first: bool) -> torch.Tensor:
        """One call of the target: its logits after each prefix of the block, [B, 1 + width, V]."""
        if self.prompt is not None:
            self.target.prefill([torch.cat([self.prompt.to(block_BK.device), block_BK[0, 1:]])], self.room, keep=block_BK.shape[1])
            self.meter.watch(self.target)
            self.prompt = None
            q_BKV = self.target.logits_BKV
        elif first:  # the caches hold the whole prompts, and the logits after them are known
            before_BV = self.target.logits_BV
            q_BKV = before_BV[:, None]
            if block_BK.shape[1] > 1:
                self.target.extend(block_BK[:, 1:])
                q_BKV = torch.cat([q_BKV, self.target.logits_BKV], 1)
        else:
            self.target.extend(block_BK)
            q_BKV = self.target.logits_BKV
        q_BKV = self.law.fit(q_BKV)
        if not self.law.by_position:
            return q_BKV
        whole_BT = self.target.ids_BT if self.law.reads_ids else block_BK
        found = []
        for k in range(q_BKV.shape[1]):
            ids_BT = _without(whole_BT, (self.limit - k).clamp(min=0)) if self.law.reads_ids else whole_BT
            found.append(self.law.processed(q_BKV[:, k], lambda ids_BT=ids_BT: ids_BT, written + k))  # type: ignore[misc]
        return torch.stack(found, 1)

    def _test(
        self, block_BK: torch.Tensor, p_BGV: torch.Tensor | None, q_BKV: torch.Tensor, live_BG: torch.Tensor, written: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(q / p of the proposals, how many are kept, the token that follows them)."""
        q_BKV = self.law.warped(q_BKV).softmax(-1)
        width = live_BG.shape[1]
        p_BGV = q_BKV[:, :0] if p_BGV is None else p_BGV.softmax(-1)
        chance_BG = self.uniforms[self.here[:, None], written[:, None] + self.steps[:width]]
        ratio_BG, kept, weights_BV = verdict(q_BKV, p_BGV, block_BK[:, 1:], chance_BG, live_BG)
        token = choose(self.draw, weights_BV.log(), block_BK, self.residual_seeds[self.here], written + kept)
        return ratio_BG, kept, token

    def _count(self, width: int, live_BG: torch.Tensor, ratio_BG: torch.Tensor, kept: torch.Tensor) -> None:
        """A row that has ended drafts nothing and is not counted."""
        alive = self.alive.long()
        chance_BG = torch.where(live_BG, ratio_BG.clamp(max=1.0), 0.0)
        self.counts.calls[self.here] += alive
        self.counts.expected[self.here] += (1.0 + chance_BG.cumprod(1).sum(1)) * alive
        self.counts.tested[self.here] += kept + (kept < self.limit)
        self.counts.drafted[self.here, :width] += live_BG.long()
        self.counts.accepted[self.here, :width] += (self.steps[:width] < kept[:, None]).long()

    def _write(self, block_BK: torch.Tensor, kept: torch.Tensor, token: torch.Tensor, written: torch.Tensor) -> None:
        """Append what was kept and the next token, up to the first end token; note which rows are done."""
        steps = self.steps[: block_BK.shape[1]]
        new_BK = torch.cat([block_BK[:, 1:], block_BK[:, :1]], 1)  # the last column is the next token's or nobody's
        new_BK = new_BK.scatter(1, kept[:, None], token[:, None])
        real_BK = (steps <= kept[:, None]) & self.alive[:, None]
        ends_BK = self.law.rules.ended(new_BK) & real_BK
        real_BK &= ends_BK.cumsum(1) - ends_BK.long() == 0
        self.answers[self.here[:, None], written[:, None] + steps] = torch.where(real_BK, new_BK, PADDING)
        self.lengths[self.here] += real_BK.sum(1)
        ended = ends_BK.any(1)
        self.finished[self.here] |= ended
        self.alive = self.alive & ~ended & (self.lengths[self.here] < self.room)


def _best(logits_BKV: torch.Tensor) -> torch.Tensor:
    """The best token after each prefix; InputError for NaN."""
    most_BK, ids_BK = logits_BKV.max(-1)
    if bool(most_BK.isnan().any()):
        raise InputError(f"logits: row {int(most_BK.isnan().any(1).nonzero()[0])} has NaN, so no token can be chosen")
    return ids_BK


def _without(ids_BT: torch.Tensor, count_B: torch.Tensor) -> torch.Tensor:
    """Right-aligned ids without the last count_B of each row, right-aligned again."""
    from_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) - count_B[:, None]
    moved_BT = ids_BT.gather(1, from_BT.clamp(min=0)).masked_fill(from_BT < 0, PADDING)
    return moved_BT[:, int(count_B.min()) :]


def _uniforms(seeds_B: torch.Tensor, count: int) -> torch.Tensor:
    """Uniforms in [0, 1) float64 [B, count], one for each seed and position: 53 bits of Philox."""
    from fairlead_kernels.ops.gumbel_sample.stream import seed_state

    positions = torch.arange(count, device=seeds_B.device).expand(len(seeds_B), count)
    high, low, *_ = seed_state(seeds_B[:, None].expand_as(positions), positions)
    return ((high >> 5) * (1 << 26) + (low >> 6)).double() / (1 << 53)
