"""The one engine under every decoder: rows of text that grow, with the key-value cache that belongs to them.

A prompt goes through the model once; its rows are then expanded, forked, reordered, cropped and extended, and rows that
have ended are dropped. Which token is chosen is a `TokenSampler`'s business, what a text is worth a reward's.

Shape suffixes: B rows, T tokens, K tokens at a time, V vocabulary, P prompts.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .errors import InputError
from .logprobs import unwrapped

if TYPE_CHECKING:
    from .kinds.watermark import TokenSampler

log = logging.getLogger("fairlead")
PADDING = -1
_without_cache: set[type] = set()
_without_crop: set[type] = set()


class RolloutEngine:
    """Rows of text that grow, with their cache.

    `prefill` sets the rows; `expand`, `select` change which rows there are; `advance` appends one token to each row and
    `extend` several; `crop` takes columns back and `drop` takes another number of tokens from each row; `fork` makes a
    second engine of n copies of each row and leaves this one as it is. After `prefill`, `advance` and `extend`,
    `logits_BV` holds the next-token logits (and `logits_BKV` those after each of the last K tokens).
    `tokens_P` counts the tokens that went through the model for each prompt, padding and ended rows not counted, forks
    included; `model_tokens` counts ended rows as well.
    A model without a cache that can be expanded runs its whole text at every step, and a log line says so; where a cache
    cannot be cropped the text is run again, and a log line says that.
    """

    def __init__(self, model: Any, *, rollback: bool = False) -> None:
        """rollback: `crop` or `drop` will be called (caches with a sliding window must be told beforehand)."""
        self.model = model
        self.rollback = rollback
        self._slides = slides(model)
        # transformers 5.24 calls the argument `cache`, earlier versions `past_key_values`.
        parameters = inspect.signature(unwrapped(model).forward).parameters  # wrappers hide them
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._takes_cache = self._cache_name in parameters
        self._takes_positions = "position_ids" in parameters
        self._keeps = "logits_to_keep" in parameters
        self._options: dict[str, Any] = {"use_cache": True} if "use_cache" in parameters else {}
        self.logits_BV: torch.Tensor
        self.logits_BKV: torch.Tensor
        self.owner_B: torch.Tensor
        self._counts: torch.Tensor  # one per prompt, and one for rows that have ended but still run
        self._cache: Any = None
        self._mask: torch.Tensor
        self._ids: torch.Tensor
        self._columns = 0
        self._holes = False

    @property
    def model_tokens(self) -> int:
        """Tokens that went through the model, all prompts together."""
        return int(self._counts.sum())

    @property
    def tokens_P(self) -> torch.Tensor:
        """Tokens int64 [P] that went through the model for each prompt, as if ended rows had been dropped at once: it
        does not depend on the batch."""
        return self._counts[:-1]

    @property
    def columns(self) -> int:
        """Columns in use, padding and dropped tokens included."""
        return self._columns

    @property
    def rows(self) -> int:
        return len(self._ids)

    @property
    def ids_BT(self) -> torch.Tensor:
        """All ids so far, prompt included, right-aligned, -1 for what is left of them: int64 [B, T]."""
        ids = self._ids[:, : self._columns]
        if not self._holes:
            return ids
        mask = self._mask[:, : self._columns]
        ids = ids.gather(1, mask.argsort(dim=1, stable=True))
        return ids[:, self._columns - int(mask.sum(1).max()) :]

    def prefill(self, prompts: Sequence[torch.Tensor], room: int = 0, keep: int = 1) -> None:
        """Run the prompts (1-D id tensors) through the model once; `room` tokens are expected to follow. `logits_BKV` is kept
        after the last `keep` tokens."""
        width = max(len(p) for p in prompts)
        ids = torch.full((len(prompts), width + room), PADDING, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) : width] = prompt
        device = self.model.device
        self._ids, self._columns, self._holes = ids.to(device), width, False
        self._mask = torch.ones_like(self._ids)
        self._mask[:, :width] = self._ids[:, :width] != PADDING
        self.owner_B = torch.arange(len(prompts))
        self._counts = torch.zeros(len(prompts) + 1, dtype=torch.int64)
        self._cache = None
        self._run(keep, every=True)

    def expand(self, n: int) -> None:
        """Turn every row into n equal rows, side by side."""
        if n == 1:
            return
        self._rows(torch.arange(len(self._ids), device=self._ids.device).repeat_interleave(n))
        if self._cache is not None:
            self._cache.batch_repeat_interleave(n)

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be kept more than once."""
        self._rows(rows)
        if self._cache is not None:
            self._cache.batch_select_indices(rows)

    def fork(self, n: int, rows: torch.Tensor | None = None) -> RolloutEngine:
        """An engine of n copies of each row (of `rows` only), side by side; this one stays as it is, its cache too."""
        twin = copy.copy(self)  # shares the counts, so that what a fork costs is counted here as well
        twin._cache = _copied(self._cache)
        if rows is not None:
            twin.select(rows)
        if n > 1:
            twin.expand(n)
        elif rows is None:
            twin._ids, twin._mask, twin.owner_B = self._ids.clone(), self._mask.clone(), self.owner_B.clone()
        return twin

    def retire(self, rows: torch.Tensor) -> None:
        """These rows (indices or bool [B]) have ended; until they are dropped they run without being counted to a prompt."""
        self.owner_B[rows.cpu()] = len(self._counts) - 1

    def crop(self, columns: int) -> None:
        """Forget all but the first `columns` columns; `logits_BV` is good again after the next `advance`."""
        if not 0 < columns <= self._columns:
            raise InputError(f"crop: must keep 1 to {self._columns} columns, got {columns}")
        removed, self._columns = self._columns - columns, columns
        self._ids[:, columns:] = PADDING
        self._mask[:, columns:] = 1
        if self._cache is None or not (removed or self.rollback):
            return
        if getattr(self._cache, "is_croppable", True):
            self._cache.crop(-removed)
        elif removed:
            self._forget("cannot be cropped")

    @property
    def takes_holes(self) -> bool:
        """Whether tokens can be hidden between others by the attention mask: not where a layer sees a window of columns
        or carries a state. There the text is run again without them."""
        return not self._slides and self._cache is not None and getattr(self._cache, "is_croppable", True)

    def drop(self, count_B: torch.Tensor) -> None:
        """Forget the last count_B tokens of each row, int64 [B]. Columns that no row needs leave the cache; in the others
        the forgotten tokens are hidden by the attention mask, and positions are counted without them.
        InputError for counts below 0 or a row that would be left without a token."""
        count_B = count_B.to(self._ids.device)
        least, most = (int(v) for v in count_B.aminmax()) if len(count_B) else (0, 0)
        if least < 0:
            raise InputError(f"drop: counts of at least 0 are needed, got {least}")
        mask = self._mask[:, : self._columns]
        if least == most < self._columns and not self._holes and bool(mask[:, self._columns - most - 1].all()):
            self.crop(self._columns - most)
            return
        rank = mask.flip(1).cumsum(1).flip(1)  # the last token of a row has rank 1
        kept = mask.bool() & (rank > count_B[:, None])
        if not bool(kept.any(1).all()):
            row = int((~kept.any(1)).nonzero()[0])
            raise InputError(f"drop: row {row} has {int(mask[row].sum())} tokens, {int(count_B[row])} cannot go")
        width = int(kept.any(0).nonzero()[-1]) + 1
        self.crop(width)
        kept = kept[:, :width]
        self._mask[:, :width] = kept
        self._ids[:, :width].masked_fill_(~kept, PADDING)
        self._holes = True
        self._close_holes()
        self._compact()

    def advance(self, tokens_B: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Append one token to every row, drop the rows that are not in `keep` (indices), run the model on the rest."""
        self._room(1)
        self._ids[:, self._columns] = tokens_B
        if keep is not None:
            self.select(keep)
        self._columns += 1
        self._run(1)

    def extend(self, tokens_BK: torch.Tensor) -> None:
        """Append K tokens to every row and run the model once; -1 marks tokens that a row does not get. At a row's front
        they leave `logits_BV` as it should be, elsewhere `logits_BKV` has what follows each token. Models that do not
        take holes (`takes_holes`) run the whole text again, and `logits_BKV` is right-aligned."""
        width = tokens_BK.shape[1]
        self._room(width)
        self._ids[:, self._columns : self._columns + width] = tokens_BK
        self._mask[:, self._columns : self._columns + width] = tokens_BK != PADDING
        self._holes = self._holes or bool((tokens_BK == PADDING).any())
        self._columns += width
        self._close_holes()
        self._run(width, every=True)

    def _close_holes(self) -> None:
        """Move the tokens of each row together where the model would stumble over the holes between them."""
        if not self._holes or self.takes_holes:
            return
        if self._cache is not None:
            self._forget("takes no holes")
        self._pack()

    def _compact(self) -> None:
        """Move tokens and their keys together once the holes are more than half of the columns."""
        if not self._holes or self._columns < 32 or self._columns <= 2 * int(self._mask[:, : self._columns].sum(1).max()):
            return
        from transformers.cache_utils import DynamicLayer

        if not all(type(layer) is DynamicLayer for layer in getattr(self._cache, "layers", [None])):
            return
        order, width = self._pack()
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                held = getattr(layer, name)
                setattr(layer, name, held.gather(2, order[:, None, -width:, None].expand(-1, held.shape[1], -1, held.shape[3])))

    def _pack(self) -> tuple[torch.Tensor, int]:
        """Right-align the ids; (the columns' new order [B, T], the columns that are left)."""
        mask = self._mask[:, : self._columns]
        order = mask.argsort(dim=1, stable=True)
        width = int(mask.sum(1).max())
        ids, mask = self._ids[:, : self._columns].gather(1, order)[:, -width:], mask.gather(1, order)[:, -width:]
        self._ids[:, :width], self._mask[:, :width] = ids, mask
        self._ids[:, width:], self._mask[:, width:] = PADDING, 1
        self._columns, self._holes = width, False
        return order, width

    def _forget(self, why: str) -> None:
        if type(self.model) not in _without_crop:
            _without_crop.add(type(self.model))
            log.warning("%s: its cache %s; the text is run again instead", type(self.model).__name__, why)
        self._cache = None

    def _room(self, more: int) -> None:
        missing = self._columns + more - self._ids.shape[1]
        if missing > 0:
            size = (len(self._ids), max(missing, self._ids.shape[1] // 2))
            self._ids = torch.cat([self._ids, self._ids.new_full(size, PADDING)], 1)
            self._mask = torch.cat([self._mask, self._mask.new_ones(size)], 1)

    def _rows(self, rows: torch.Tensor) -> None:
        self._ids, self._mask, self.logits_BV = self._ids[rows], self._mask[rows], self.logits_BV[rows]
        self.owner_B = self.owner_B[rows.cpu()]

    @torch.inference_mode()
    def _run(self, new: int, every: bool = False) -> None:
        """Run the last `new` columns, or all of them where there is no cache."""
        mask = self._mask[:, : self._columns]
        fresh = self._cache is None
        fed = self._columns if fresh else new
        inputs: dict[str, Any] = {"input_ids": self._ids[:, self._columns - fed : self._columns].clamp(min=0), "attention_mask": mask}
        if self._takes_positions:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -fed:]
        if self._takes_cache:
            # A window that is to be taken back must remember from the start what it no longer sees.
            inputs[self._cache_name] = _recording(self.model) if fresh and self.rollback and self._slides else self._cache
        kept = {"logits_to_keep": new if every else 1} if self._keeps else {}
        out = self.model(**inputs, **self._options, **kept)
        self._cache = self._usable(getattr(out, self._cache_name, None))
        self.logits_BV = out.logits[:, -1]
        if every:
            self.logits_BKV = out.logits[:, -new:]
        self._counts += torch.bincount(self.owner_B, mask[:, -fed:].sum(1).cpu(), minlength=len(self._counts)).long()

    def _usable(self, cache: Any) -> Any:
        layers = getattr(cache, "layers", None) or [cache]
        # A layer with attention and a recurrent state would expand the former alone.
        if all(hasattr(layer, "batch_repeat_interleave") and not hasattr(layer, "recurrent_states") for layer in layers):
            return cache
        if type(self.model) not in _without_cache:
            _without_cache.add(type(self.model))
            log.warning("%s: has no cache that can be expanded; every step runs the whole text", type(self.model).__name__)
        if "use_cache" in self._options:
            self._options["use_cache"] = False
        self._takes_cache = False
        return None


def slides(model: Any) -> bool:
    """Whether some layer attends to a window of columns, where dropped tokens would take the place of real ones."""
    config = getattr(model, "config", None)
    kinds = getattr(config, "layer_types", None) or []
    return any("sliding" in str(kind) or "chunked" in str(kind) for kind in kinds) or (
        not kinds and getattr(config, "sliding_window", None) is not None
    )


def _recording(model: Any) -> Any:
    """An empty cache whose windows keep what they no longer see until the next crop."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    return cache


def _copied(cache: Any) -> Any:
    """A cache that can grow without the other's knowledge. Growing layers make new tensors at each step, so these share
    what they hold now; any other layer is copied."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if cache is None:
        return None
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in getattr(cache, "layers", [None])):
        twin = copy.copy(cache)
        twin.layers = [copy.copy(layer) for layer in cache.layers]
        return twin
    return copy.deepcopy(cache)


@dataclass(frozen=True)
class Rolled:
    """What `roll` wrote, row by row: ids int64 [T] with the end token, log-probs float32 [T] (empty unless asked for),
    and whether a row ended by itself."""

    ids: list[torch.Tensor]
    logprobs: list[torch.Tensor]
    ended: list[bool]


@dataclass(frozen=True)
class Rules:
    """What every step of a generation obeys.

    processor: HF logits processors, or None. ends: end-of-text ids. pad_token: stands for padding where a processor
    sees the ids. least: no end token before an answer has this many tokens.
    """

    processor: Any = None
    ends: frozenset[int] = frozenset()
    pad_token: int = 0
    least: int = 0

    def logits(self, engine: RolloutEngine, positions_B: torch.Tensor) -> torch.Tensor:
        """Next-token logits after the rules, [B, V]; positions_B: index of the token about to be chosen."""
        return self.apply(engine.logits_BV, lambda: engine.ids_BT, positions_B)

    def apply(self, logits_BV: torch.Tensor, ids_BT: Callable[[], torch.Tensor], positions_B: torch.Tensor) -> torch.Tensor:
        """The same for any logits; ids_BT gives all ids before the tokens about to be chosen, and is asked if need be."""
        if self.least and self.ends:
            early = (positions_B < self.least).nonzero()[:, 0]
            if len(early):
                stop = torch.tensor(sorted(self.ends), device=logits_BV.device)
                logits_BV = logits_BV.clone()
                logits_BV[early[:, None], stop] = -torch.inf
        if self.processor is not None:
            seen = ids_BT()
            seen = seen.masked_fill(seen == PADDING, self.pad_token)
            logits_BV = self.processor(seen, logits_BV.float().clone())
        return logits_BV

    def ended(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """bool [B]: which of these tokens end a text."""
        return torch.isin(tokens_B, torch.tensor(sorted(self.ends), dtype=torch.int64, device=tokens_B.device))


def roll(
    engine: RolloutEngine, room: int, sampler: TokenSampler, rules: Rules, *, seeds_B: torch.Tensor, first: int = 0,
    temperature: float | None = None, noise_from: int | None = None, stop: Callable[[], bool] | None = None,
    listen: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None] | None = None,
) -> Rolled:  # fmt: skip
    """Let every row of the engine grow until it ends or has `room` more tokens.

    seeds_B: int64 [B], sampling noise of the rows. first: tokens that the answers already have. temperature: also give
    the log-probs of the chosen tokens under the model at this temperature. noise_from: where the noise's positions start;
    default `first`. stop: asked before each token but the first; True cuts all answers there. listen: told at each step which answers got a token,
    int64 [A], and the tokens int64 [A], both on the CPU; it may give back bool [A]: those to be cut after this token.
    Rows that end are dropped from the engine, and the last token is not run: a caller that goes on forks.
    InputError where the model's logits cannot be sampled.
    """
    total = engine.rows
    device = seeds_B.device
    answers = torch.full((total, room), PADDING, dtype=torch.int64, device=device)
    logprobs = torch.zeros(total, room, device=device)
    lengths = torch.full((total,), room, dtype=torch.int64)
    here = torch.arange(total, device=device)  # which answer each row of the engine writes
    alive = torch.ones(total, dtype=torch.bool, device=device)
    finished = torch.zeros(total, dtype=torch.bool)
    noise = first if noise_from is None else noise_from
    for step in range(room):
        if step and stop is not None and stop():
            lengths[here[alive].cpu()] = step
            break
        logits = rules.logits(engine, torch.full_like(here, first + step))
        tokens = choose(sampler, logits, engine.ids_BT, seeds_B[here], torch.full_like(here, noise + step))
        answers[here, step] = torch.where(alive, tokens, PADDING)
        if temperature is not None:
            logprobs[here, step] = chosen_logprob(engine.logits_BV, tokens, temperature)
        ended = over = alive & rules.ended(tokens)
        if listen is not None:
            cut = listen(here[alive].cpu(), tokens[alive].cpu())
            if cut is not None:
                over = ended.masked_scatter(alive, cut.to(device)) | ended
        if bool(over.any()):
            lengths[here[over].cpu()] = step + 1
            finished[here[ended].cpu()] = True
            alive = alive & ~over
            engine.retire(over)
        count = int(alive.sum())
        if count == 0 or step == room - 1:
            break
        # Dropping ended rows copies the cache, so it is done when at least a quarter of the rows is idle.
        if count <= 0.75 * len(here):
            kept = alive.nonzero()[:, 0]
            engine.advance(tokens, keep=kept)
            here, alive = here[kept], alive[kept]
        else:
            engine.advance(tokens)
    answers, logprobs = answers.cpu(), logprobs.cpu()
    return Rolled(
        ids=[answers[i, : int(lengths[i])] for i in range(total)],
        logprobs=[logprobs[i, : int(lengths[i])] for i in range(total)] if temperature is not None else [],
        ended=finished.tolist(),
    )


def choose(
    sampler: TokenSampler, logits_BV: torch.Tensor, ids_BT: torch.Tensor, seeds_B: torch.Tensor, positions_B: torch.Tensor
) -> torch.Tensor:
    """Next tokens int64 [B]; a kernel's word about the model's logits (NaN, say) becomes an InputError with the step."""
    try:
        return sampler(logits_BV, ids_BT, seeds_B=seeds_B, positions_B=positions_B)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"token {int(positions_B.min())}: {error}") from error


def chosen_logprob(logits_BV: torch.Tensor, tokens_B: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probability float32 [B] of one token a row under softmax(logits / temperature)."""
    from fairlead_kernels import selective_logprob

    return selective_logprob(logits_BV, tokens_B, temperature=temperature)
