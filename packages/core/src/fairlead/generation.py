"""Text generation with any Hugging Face causal LM: the data that flows, and plain sampling of n answers per prompt.

The rows and their cache are the engine's (`engine.py`). Sampling noise is counter-based, so what a candidate says depends
on (seed, prompt index, candidate index) alone and not on its batch.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .engine import PADDING, RolloutEngine, Rules, roll
from .errors import InputError

if TYPE_CHECKING:
    from .kinds.watermark import TokenSampler, Watermark

DEFAULT_ROWS = 64
COLDEST = 1e-30  # the least temperature above 0 at which a token can be drawn: logits are divided by it
__all__ = ["DEFAULT_ROWS", "PADDING", "Cost", "DecodeResult", "Generation", "PlainSampler", "RolloutEngine", "generate"]


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
    """What a decoder returns: one chosen generation per prompt, all candidates, KL to the model and its kind, cost, and
    the method's own figures as plain JSON values."""

    generations: list[Generation]
    candidates: list[list[Generation]] = field(default_factory=list)
    kl: float | None = None
    kl_kind: str = ""
    cost: Cost = field(default_factory=Cost)
    figures: dict[str, Any] = field(default_factory=dict)


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
    if 0 < temperature < COLDEST:
        raise InputError(f"temperature: must be 0 (the best token) or at least {COLDEST:g}, got {temperature}")


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
    ends = end_tokens(model, tokenizer)
    rules = Rules(logits_processor, ends, pad_token(model, tokenizer), min_new_tokens)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # equal lengths together: little padding
    per_batch = max(1, (batch_size or DEFAULT_ROWS) // n)
    results: list[list[Generation]] = [[] for _ in encoded]
    for start in range(0, len(order), per_batch):
        members = order[start : start + per_batch]
        began = time.monotonic()
        engine = RolloutEngine(model)
        engine.prefill([encoded[i] for i in members], max_new_tokens)
        engine.expand(n)
        made = roll(
            engine, max_new_tokens, sampler, rules, seeds_B=seeds(seed, [first_index + i for i in members], n).to(model.device),
            temperature=(temperature or 1.0) if return_logprobs else None,
        )  # fmt: skip
        seconds = round((time.monotonic() - began) / (n * len(members)), 6)
        for place, i in enumerate(members):
            cost = {"model_tokens": int(engine.tokens_P[place]) // n, "seconds": seconds}
            for j in range(n):
                ids = made.ids[place * n + j]
                results[i].append(
                    Generation(
                        prompt=None if isinstance(prompts[i], torch.Tensor) else prompts[i],
                        text="" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True),
                        ids=ids,
                        logprobs=made.logprobs[place * n + j] if return_logprobs else None,
                        finished=made.ended[place * n + j],
                        provenance={"seed": seed, "index": first_index + i, "candidate": j, **cost}
                        | ({"watermark": watermark.name} if watermark is not None else {}),
                    )
                )
        if progress is not None:
            progress(min(start + per_batch, len(order)), len(order))
    return results


def encode(tokenizer: Any, prompt: Any, index: int = 0) -> torch.Tensor:
    """Token ids int64 [T] of a string, a list of chat messages or an id tensor; InputError names prompt `index`."""
    if isinstance(prompt, torch.Tensor):
        ids = prompt.reshape(-1).to(torch.int64).cpu()
    elif tokenizer is None:
        raise InputError(f"prompt {index}: is text, but there is no tokenizer; give id tensors or a tokenizer")
    elif isinstance(prompt, str):
        ids = torch.tensor(_without_end(tokenizer, prompt), dtype=torch.int64)
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


def _without_end(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of a text that goes on: some tokenizers end every text."""
    ids: list[int] = list(tokenizer(prompt)["input_ids"])
    end = getattr(tokenizer, "eos_token_id", None)
    if ids and ids[-1] == end and list(tokenizer(prompt, add_special_tokens=False)["input_ids"])[-1:] != ids[-1:]:
        return ids[:-1]
    return ids


def seeds(seed: int, prompts: Sequence[int], n: int) -> torch.Tensor:
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


def check_vocabulary(model: Any, tokenizer: Any, encoded: Sequence[torch.Tensor], first_index: int) -> None:
    """InputError for a tokenizer with more tokens than the model has logits, or a prompt with an id beyond them."""
    from .models import logits_width

    width = logits_width(model)
    if hasattr(tokenizer, "__len__") and len(tokenizer) > width:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens, the model's logits have {width}; use the model's own tokenizer")
    for i, ids in enumerate(encoded):
        if int(ids.max()) >= width or int(ids.min()) < 0:
            raise InputError(f"prompt {first_index + i}: has the id {int(ids.max())}, the model knows ids below {width}")


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """End-of-text ids of the generation config, and the tokenizer's."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), tokenizer):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            found.update(value if isinstance(value, (list, tuple)) else [value])
    return frozenset(int(v) for v in found)


def pad_token(model: Any, tokenizer: Any) -> int:
    """The id that stands for padding where a processor sees the ids."""
    for source in (tokenizer, getattr(model, "generation_config", None), model.config):
        value = getattr(source, "pad_token_id", None)
        if value is not None:
            return int(value)
    return 0
