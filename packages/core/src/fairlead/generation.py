"""Text generation with any Hugging Face causal LM: the data that flows and the one engine that makes it.

The engine owns the key-value cache: every prompt goes through the model once, its cache is expanded to n candidates,
rows that have ended are dropped. Sampling noise is counter-based, so what a candidate says depends on (seed, prompt
index, candidate index) alone and not on its batch. Which token is chosen is a `TokenSampler`'s business.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .errors import InputError

if TYPE_CHECKING:
    from .kinds.watermark import TokenSampler, Watermark

log = logging.getLogger("fairlead")
PADDING = -1
DEFAULT_ROWS = 64
_without_cache: set[type] = set()


@dataclass(frozen=True)
class Cost:
    """What a generation cost: tokens through the model, reward calls, seconds of wall clock."""

    model_tokens: int = 0
    reward_calls: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Generation:
    """One answer.

    prompt: as given (a string or a list of messages; None when ids were given). text: decoded answer without special
    tokens. ids: int64 [T], the answer's tokens, end token included. logprobs: float32 [T] under the model at the
    sampling temperature, before truncation and any watermark, or None. finished: ended by itself rather than by the
    length limit. reward: the reward that chose it, or None. provenance: plain JSON values (seed, index, watermark, ...).
    """

    prompt: Any
    text: str
    ids: torch.Tensor
    logprobs: torch.Tensor | None = None
    finished: bool = True
    reward: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DecodeResult:
    """What a decoder returns: one chosen generation per prompt, all candidates, KL to the model and its kind, cost."""

    generations: list[Generation]
    candidates: list[list[Generation]] = field(default_factory=list)
    kl: float | None = None
    kl_kind: str = ""
    cost: Cost = field(default_factory=Cost)


class RolloutEngine:
    """Rows of text that grow one token a step, with their cache.

    `prefill` sets the rows; `expand`, `select` change which rows there are; `advance` appends a token to each and
    runs the model. After each of these `logits_BV` holds the next-token logits; `crop` takes tokens back. Counts
    `model_tokens`. A model without a cache that can be expanded runs its whole text at every step, and a log line says so.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.model_tokens = 0
        # transformers 5.24 calls the argument `cache`, earlier versions `past_key_values`.
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._takes_cache = self._cache_name in parameters
        self._takes_positions = "position_ids" in parameters
        self._options: dict[str, Any] = {"use_cache": True} if "use_cache" in parameters else {}
        if "logits_to_keep" in parameters:
            self._options["logits_to_keep"] = 1
        self.logits_BV: torch.Tensor
        self._cache: Any = None
        self._mask: torch.Tensor
        self._ids: torch.Tensor
        self._columns = 0

    @property
    def ids_BT(self) -> torch.Tensor:
        """All ids so far, prompt included, -1 for left padding: int64 [B, T]."""
        return self._ids[:, : self._columns]

    def prefill(self, prompts: Sequence[torch.Tensor], room: int) -> None:
        """Run the prompts (1-D id tensors) through the model once; `room` tokens may follow."""
        width = max(len(p) for p in prompts)
        device = self.model.device
        ids = torch.full((len(prompts), width + room), PADDING, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) : width] = prompt
        self._ids, self._columns = ids.to(device), width
        self._mask = torch.ones_like(self._ids)
        self._mask[:, :width] = self._ids[:, :width] != PADDING
        self._cache = None
        self._run(self._ids[:, :width].clamp(min=0))

    def expand(self, n: int) -> None:
        """Turn every row into n equal rows, side by side."""
        if n == 1:
            return
        self._rows(torch.arange(len(self._ids), device=self._ids.device).repeat_interleave(n))
        if self._cache is not None:
            self._cache.batch_repeat_interleave(n)

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        self._rows(rows)
        if self._cache is not None:
            self._cache.batch_select_indices(rows)

    def crop(self, columns: int) -> None:
        """Forget all but the first `columns` columns; `logits_BV` is good again after the next `advance`."""
        if not 0 < columns <= self._columns:
            raise InputError(f"crop: must keep 1 to {self._columns} columns, got {columns}")
        removed, self._columns = self._columns - columns, columns
        self._ids[:, columns:] = PADDING
        if self._cache is not None and removed:
            self._cache.crop(-removed)

    def advance(self, tokens_B: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Append one token to every row, drop the rows that are not in `keep` (indices), run the model on the rest."""
        self._ids[:, self._columns] = tokens_B
        if keep is not None:
            self.select(keep)
            tokens_B = tokens_B[keep]
        self._columns += 1
        self._run(tokens_B[:, None] if self._cache is not None else self.ids_BT.clamp(min=0))

    def _rows(self, rows: torch.Tensor) -> None:
        self._ids, self._mask, self.logits_BV = self._ids[rows], self._mask[rows], self.logits_BV[rows]

    @torch.inference_mode()
    def _run(self, fed_BT: torch.Tensor) -> None:
        mask = self._mask[:, : self._columns]
        inputs: dict[str, Any] = {"input_ids": fed_BT, "attention_mask": mask}
        if self._takes_positions:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -fed_BT.shape[1] :]
        if self._takes_cache:
            inputs[self._cache_name] = self._cache
        out = self.model(**inputs, **self._options)
        self._cache = self._usable(getattr(out, self._cache_name, None))
        self.logits_BV = out.logits[:, -1]
        self.model_tokens += fed_BT.numel()

    def _usable(self, cache: Any) -> Any:
        layers = getattr(cache, "layers", None) or [cache]
        if all(hasattr(layer, "batch_repeat_interleave") for layer in layers):
            return cache
        if type(self.model) not in _without_cache:
            _without_cache.add(type(self.model))
            log.warning("%s: has no cache that can be expanded; every step runs the whole text", type(self.model).__name__)
        if "use_cache" in self._options:
            self._options["use_cache"] = False
        self._takes_cache = False
        return None


class PlainSampler:
    """Temperature, top-k, top-p, min-p and a draw with counter-based noise; temperature 0 takes the best token."""

    def __init__(
        self, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
    ) -> None:
        check_sampling(temperature, top_k, top_p, min_p)
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p

    def __call__(
        self, logits_BV: torch.Tensor, ids_BT: torch.Tensor, *, seeds_B: torch.Tensor, positions_B: torch.Tensor
    ) -> torch.Tensor:
        if self.temperature == 0:
            best_B, ids_B = logits_BV.max(-1)
            if bool(best_B.isnan().any()):
                raise InputError(f"logits_BV: row {int(best_B.isnan().nonzero()[0])} has NaN, so no token can be chosen")
            return ids_B
        from fairlead_kernels import gumbel_sample

        return gumbel_sample(
            logits_BV, seeds=seeds_B, positions=positions_B, temperature=self.temperature, top_k=self.top_k,
            top_p=self.top_p, min_p=self.min_p,
        )  # fmt: skip


def check_sampling(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    """InputError for a value outside its range."""
    for name, value, low, high in (
        ("temperature", temperature, 0.0, float("inf")), ("top_k", top_k, 1, float("inf")), ("min_p", min_p, 0.0, 1.0),
        ("top_p", top_p, 0.0, 1.0),
    ):  # fmt: skip
        if value is None:
            continue
        if not low <= value <= high or value == float("inf") or (name == "top_p" and value == 0):
            allowed = "above 0 and at most 1" if name == "top_p" else f"at least {low:g}" + ("" if high > 1 else " and at most 1")
            raise InputError(f"{name}: must be {allowed}, got {value}")


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Any], *, watermark: Watermark | None = None,
    sampler: TokenSampler | None = None, logits_processor: Any = None, n: int = 1, max_new_tokens: int = 64,
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
    seed: int = 0, first_index: int = 0, batch_size: int | None = None, return_logprobs: bool = False,
    min_new_tokens: int = 0, progress: Callable[[int, int], None] | None = None,
) -> list[list[Generation]]:  # fmt: skip
    """n candidates for every prompt.

    model: any HF causal LM. tokenizer: its tokenizer; None is allowed when every prompt is an id tensor.
    prompts: strings, lists of chat messages ({"role", "content"}; the chat template is applied) or 1-D id tensors.
    watermark: marks the text through its fused `.sampler()`; `sampler` gives any other TokenSampler instead.
    logits_processor: HF processors, applied to float32 logits before sampling, as `model.generate` does.
    n: candidates per prompt; the prompt is run once. temperature (0 = greedy), top_k, top_p, min_p: in HF's order.
    seed, first_index: prompt i, candidate j draws its noise from (seed, first_index + i, j) alone.
    batch_size: rows (prompts x n) at a time, 64 by default. min_new_tokens: no end token before that many. progress: called with (prompts done, prompts).

    Returns one list of n Generations per prompt, in order. Raises InputError for empty prompts, prompts too long
    for the model's positions, n or max_new_tokens below 1, and a watermark of another vocabulary than the model's logits.
    """
    if n < 1 or max_new_tokens < 1:
        raise InputError(f"n and max_new_tokens must be at least 1, got n={n}, max_new_tokens={max_new_tokens}")
    check_sampling(temperature, top_k, top_p, min_p)
    encoded = [encode(tokenizer, prompt, first_index + i) for i, prompt in enumerate(prompts)]
    check_lengths(model, encoded, max_new_tokens, first_index)
    if sampler is None:
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        sampler = PlainSampler(**options) if watermark is None else watermark.sampler(**options)  # type: ignore[arg-type]
    ends = _end_tokens(model, tokenizer)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # equal lengths together: little padding
    per_batch = max(1, (batch_size or DEFAULT_ROWS) // n)
    results: list[list[Generation]] = [[] for _ in encoded]
    for start in range(0, len(order), per_batch):
        members = order[start : start + per_batch]
        began = time.monotonic()
        rows, logprobs, tokens = _roll(
            model, [encoded[i] for i in members], n, max_new_tokens, sampler, logits_processor, ends,
            _seeds(seed, [first_index + i for i in members], n).to(model.device),
            (temperature or 1.0) if return_logprobs else None, _pad_token(model, tokenizer), min_new_tokens,
        )  # fmt: skip
        cost = {"model_tokens": tokens // (n * len(members)), "seconds": round((time.monotonic() - began) / (n * len(members)), 6)}
        for place, i in enumerate(members):
            for j in range(n):
                ids = rows[place * n + j]
                results[i].append(
                    Generation(
                        prompt=None if isinstance(prompts[i], torch.Tensor) else prompts[i],
                        text="" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True),
                        ids=ids,
                        logprobs=logprobs[place * n + j] if return_logprobs else None,
                        finished=int(ids[-1]) in ends,
                        provenance={"seed": seed, "index": first_index + i, "candidate": j, **cost}
                        | ({"watermark": watermark.name} if watermark is not None else {}),
                    )
                )
        if progress is not None:
            progress(min(start + per_batch, len(order)), len(order))
    return results


def _roll(
    model: Any, prompts: list[torch.Tensor], n: int, room: int, sampler: TokenSampler, processor: Any, ends: set[int],
    seeds_B: torch.Tensor, temperature: float | None, pad_token: int, least: int,
) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:  # fmt: skip
    """Answers of one batch: ids and (with a temperature) log-probs per row, and the tokens run through the model."""
    engine = RolloutEngine(model)
    engine.prefill(prompts, room)
    engine.expand(n)
    total = len(prompts) * n
    device = seeds_B.device
    answers = torch.full((total, room), PADDING, dtype=torch.int64, device=device)
    logprobs = torch.zeros(total, room, device=device)
    lengths = torch.full((total,), room, dtype=torch.int64)
    here = torch.arange(total, device=device)  # which answer each row of the engine writes
    alive = torch.ones(total, dtype=torch.bool, device=device)
    stop = torch.tensor(sorted(ends), dtype=torch.int64, device=device)
    for step in range(room):
        logits, positions = engine.logits_BV, torch.full_like(here, step)
        if step < least and len(stop):
            logits = logits.index_fill(1, stop, -torch.inf)
        if processor is not None:
            seen = engine.ids_BT.masked_fill(engine.ids_BT == PADDING, pad_token)
            logits = processor(seen, logits.float().clone())
        try:
            tokens = sampler(logits, engine.ids_BT, seeds_B=seeds_B[here], positions_B=positions)
        except InputError:
            raise
        except ValueError as error:  # a kernel's word about the model's logits: NaN, say
            raise InputError(f"token {step}: {error}") from error
        answers[here, step] = torch.where(alive, tokens, PADDING)
        if temperature is not None:
            logprobs[here, step] = _chosen_logprob(engine.logits_BV, tokens, temperature)
        ended = alive & torch.isin(tokens, stop)
        if bool(ended.any()):
            lengths[here[ended].cpu()] = step + 1
            alive = alive & ~ended
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
    rows = [answers[i, : int(lengths[i])].cpu() for i in range(total)]
    return rows, [logprobs[i, : int(lengths[i])].cpu() for i in range(total)], engine.model_tokens


def _chosen_logprob(logits_BV: torch.Tensor, tokens_B: torch.Tensor, temperature: float) -> torch.Tensor:
    from fairlead_kernels import selective_logprob

    return selective_logprob(logits_BV, tokens_B, temperature=temperature)


def encode(tokenizer: Any, prompt: Any, index: int = 0) -> torch.Tensor:
    """Token ids int64 [T] of a string, a list of chat messages or an id tensor; InputError names prompt `index`."""
    if isinstance(prompt, torch.Tensor):
        ids = prompt.reshape(-1).to(torch.int64).cpu()
    elif tokenizer is None:
        raise InputError(f"prompt {index}: is text, but there is no tokenizer; give id tensors or a tokenizer")
    elif isinstance(prompt, str):
        ids = torch.tensor(tokenizer(prompt)["input_ids"], dtype=torch.int64)
    elif isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], dict):
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(f"prompt {index}: is a chat, but the tokenizer has no chat template; give plain text")
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    else:
        raise InputError(
            f"prompt {index}: must be a string, a list of chat messages or a 1-D id tensor, got {type(prompt).__name__}"
        )
    if ids.numel() == 0:
        raise InputError(f"prompt {index}: is empty; give at least one token")
    return ids


def _seeds(seed: int, prompts: Sequence[int], n: int) -> torch.Tensor:
    """One 63-bit seed per (seed, prompt index, candidate index): splitmix64, so that neighbours share nothing."""
    mask = (1 << 64) - 1

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    found = [mix(mix(mix(seed & mask) ^ (p & mask)) ^ j) >> 1 for p in prompts for j in range(n)]
    return torch.tensor(found, dtype=torch.int64)


def check_lengths(model: Any, encoded: Sequence[torch.Tensor], room: int, first_index: int) -> None:
    """InputError for a prompt that leaves no place for `room` tokens among the model's positions."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for i, ids in enumerate(encoded):
        if isinstance(limit, int) and len(ids) + room > limit:
            raise InputError(
                f"prompt {first_index + i}: its {len(ids)} tokens and {room} new ones exceed the model's {limit} positions; "
                "shorten it or lower max_new_tokens"
            )


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """End-of-text ids of the generation config, and the tokenizer's."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), tokenizer):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            found.update(value if isinstance(value, (list, tuple)) else [value])
    return {int(v) for v in found}


def _pad_token(model: Any, tokenizer: Any) -> int:
    for source in (tokenizer, getattr(model, "generation_config", None), model.config):
        value = getattr(source, "pad_token_id", None)
        if value is not None:
            return int(value)
    return 0
