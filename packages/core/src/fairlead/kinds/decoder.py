"""Kind Decoder: makes answers from a model under a policy (best-of-n, search, value-guided, speculative, resampling)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config import Configurable
from ..errors import FairleadError, InputError

if TYPE_CHECKING:
    import torch

    from ..decoding import Answer, Request
    from ..generation import DecodeResult, Generation


class DecodingError(InputError):
    """A prompt could not be answered. `finished` maps the index of each prompt that was answered before to its
    generation, so nothing is lost."""

    def __init__(self, message: str, finished: Mapping[int, Generation]) -> None:
        super().__init__(message)
        self.finished = dict(finished)


class Decoder(Configurable):
    """(model, tokenizer, prompts) -> one chosen `Generation` per prompt, with what it cost.

    A decoder implements `decode`, which answers one batch of prompts; encoding, batching, rewards, budget and errors are
    the kind's.

    Contract
    --------
    - The model is a Hugging Face causal LM in eval mode, which the decoder leaves as it found it: same weights, same
      mode, no hooks left behind.
    - `prompts` are strings, lists of chat messages, or 1-D id tensors (then tokenizer may be None, and a reward gets ids).
    - Deterministic in (seed, index of the prompt): an answer depends neither on the batch size nor on the prompts
      beside it. `first_index` is the index of the first prompt, for callers that stream a corpus in pieces.
    - Under a reward that is the same for all texts the answer is `generate`'s with the settings `plain`.
    - `kl` is the divergence to the model's own sampling in nats per answer, and `kl_kind` says what it is: "exact",
      "estimate" or "bound"; None where unknown.
    - `cost` counts every token that went through any model and every reward call, rejected candidates included.
    - A `budget` is kept for each prompt; one that is spent ends the search and the best answer so far is given.
    """

    needs_reward = False
    """Whether there is nothing to do without a reward."""

    @property
    def rows_per_prompt(self) -> int:
        """Rows of the engine that one prompt takes."""
        return 1

    @property
    def plain(self) -> dict[str, Any]:
        """Settings with which plain `generate` gives the answers that this decoder gives under a constant reward."""
        return {}

    @abstractmethod
    def decode(self, request: Request) -> list[Answer]:
        """Answers of one batch, in order."""

    def figures(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """What the method tells about the whole, as plain JSON values."""
        return {}

    def start(self, prompt: Any) -> Any:
        """The prompt as the model is to see it; rewards see the original."""
        return prompt

    def prepare(self, model: Any, tokenizer: Any, reward: Any) -> Any:
        """Check what the decoder needs beside the prompts, and give the reward to use (default: the one given)."""
        if self.needs_reward and reward is None:
            raise InputError(f"{type(self).__name__}: reward is required: a Reward, a function of (prompts, responses) or a registered name")
        return reward

    def generate(
        self, model: Any, tokenizer: Any, prompts: Sequence[Any], *, reward: Any = None, watermark: Any = None,
        logits_processor: Any = None, seed: int = 0, max_new_tokens: int = 64, min_new_tokens: int = 0,
        temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        batch_size: int | None = None, first_index: int = 0, budget: Any = None, ends: Any = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> DecodeResult:  # fmt: skip
        """Answers in the order of the prompts.

        reward: a Reward, a callable (prompts, responses[, finished]) -> one number each, or a registered name (or
        {"name": ..., settings}). watermark: marks every choice of a token. logits_processor: HF processors on float32
        logits. budget: a `Budget`, or a dictionary of its fields, for each prompt. ends: end-of-text ids, default the
        model's and the tokenizer's. The others as in `fairlead.generation.generate`; batch_size counts rows.
        DecodingError names the prompt that failed and keeps those that are done; InputError for bad arguments.
        """
        from ..decoding import Budget, Meter
        from ..generation import DEFAULT_ROWS, Cost, DecodeResult, check_sampling
        from .reward import as_reward

        if max_new_tokens < 1 or (batch_size is not None and batch_size < 1):
            raise InputError(f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}")
        check_sampling(temperature, top_k, top_p, min_p)
        allowed = Budget.of(budget)
        reward = self.prepare(model, tokenizer, None if reward is None else as_reward(reward))
        encoded = self._encode(model, tokenizer, prompts, max_new_tokens, first_index)
        rules = self._rules(model, tokenizer, logits_processor, ends, min_new_tokens)
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # equal lengths together: little padding
        step = max(1, (batch_size or DEFAULT_ROWS) // self.rows_per_prompt)
        answers: dict[int, Answer] = {}
        cost = Cost()
        for start in range(0, len(order), step):
            members = order[start : start + step]
            meter = Meter(allowed, len(members))
            try:
                request = _request(
                    model, tokenizer, [prompts[i] for i in members], [encoded[i] for i in members],
                    [first_index + i for i in members], rules, meter, seed, max_new_tokens, temperature, top_k, top_p, min_p,
                    watermark, reward,
                )  # fmt: skip
                found = self.decode(request)
            except FairleadError as error:
                done = {first_index + i: _chosen(answer) for i, answer in answers.items()}
                raise DecodingError(str(error), done) from error
            answers |= dict(zip(members, found, strict=True))
            cost = Cost(cost.model_tokens + meter.model_tokens, cost.reward_calls + int(meter.calls_P.sum()), cost.seconds + meter.seconds)
            if progress is not None:
                progress(min(start + step, len(order)), len(order))
        ordered = [answers[i] for i in range(len(encoded))]
        known = [a.kl for a in ordered if a.kl is not None]
        kl = max(0.0, sum(known) / len(known)) if known and len(known) == len(ordered) else None
        kinds = {a.kl_kind for a in ordered}
        return DecodeResult(
            generations=[_chosen(a) for a in ordered], candidates=[a.candidates for a in ordered], kl=kl,
            kl_kind="" if kl is None else kinds.pop() if len(kinds) == 1 else "estimate", cost=cost, figures=self.figures(ordered),
        )  # fmt: skip

    def custom_generate(self, tokenizer: Any = None, *, reward: Any = None, seed: int | None = None, **options: Any) -> Callable[..., Any]:
        """A function for `model.generate(..., custom_generate=...)`.

        Length, temperature, truncation, end tokens and processors are those of the `generate` call (greedy where it does
        not sample); each input row is a prompt. tokenizer: for rewards that read text. seed: default drawn from torch's
        generator, so that `torch.manual_seed` sets it. options: further ones of `Decoder.generate` (watermark, budget).
        """

        def decode(
            model: Any, input_ids: torch.Tensor, logits_processor: Any = None, stopping_criteria: Any = None,
            generation_config: Any = None, **model_kwargs: Any,
        ) -> Any:  # fmt: skip
            import torch

            drawn = int(torch.randint(1 << 62, (1,))) if seed is None else seed
            return _for_transformers(
                self, model, tokenizer, input_ids, model_kwargs.get("attention_mask"), logits_processor, stopping_criteria, generation_config,
                {"reward": reward, "seed": drawn, **options},
            )  # fmt: skip

        return decode

    def _encode(self, model: Any, tokenizer: Any, prompts: Sequence[Any], room: int, first_index: int) -> list[torch.Tensor]:
        from ..generation import check_lengths, check_vocabulary, encode

        encoded = [encode(tokenizer, self.start(prompt), first_index + i) for i, prompt in enumerate(prompts)]
        check_vocabulary(model, tokenizer, encoded, first_index)
        check_lengths(model, encoded, room, first_index)
        return encoded

    def _rules(self, model: Any, tokenizer: Any, processor: Any, ends: Any, least: int) -> Any:
        from ..engine import Rules
        from ..generation import end_tokens, pad_token

        found = end_tokens(model, tokenizer) if ends is None else frozenset(int(e) for e in ends)
        return Rules(processor, found, pad_token(model, tokenizer), least)


def _request(*parts: Any) -> Request:
    from ..decoding import Request

    return Request(*parts)


def _chosen(answer: Answer) -> Generation:
    best = answer.candidates[answer.chosen]
    return replace(best, provenance={**best.provenance, **answer.extra}) if answer.extra else best


def _for_transformers(
    decoder: Decoder, model: Any, tokenizer: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None,
    logits_processor: Any, stopping_criteria: Any, config: Any, options: dict[str, Any],
) -> Any:  # fmt: skip
    import torch
    from transformers import GenerationConfig, LogitsProcessorList
    from transformers.generation import logits_process
    from transformers.generation import stopping_criteria as criteria
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    config = config or GenerationConfig()
    others = [c for c in stopping_criteria or [] if not isinstance(c, (criteria.MaxLengthCriteria, criteria.EosTokenCriteria))]
    if others:
        raise InputError(f"{type(decoder).__name__}: stops at end tokens and at the length only, not by {type(others[0]).__name__}")
    # Temperature and truncation are this library's (seeded by row, not by batch); everything else of the caller's stays.
    warpers = tuple(
        getattr(logits_process, name)
        for name in ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper")
    )
    kept = LogitsProcessorList(p for p in logits_processor or [] if not isinstance(p, warpers))
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    prompts = [row[keep.bool()] for row, keep in zip(input_ids, mask, strict=True)]
    ends = config.eos_token_id
    sampled: dict[str, Any] = {"temperature": 0.0}
    if config.do_sample:
        sampled = {"temperature": config.temperature or 1.0, "top_k": config.top_k or None, "top_p": config.top_p, "min_p": config.min_p}
    made = decoder.generate(
        model, tokenizer, prompts, logits_processor=kept or None, max_new_tokens=config.max_length - input_ids.shape[1],
        ends=[] if ends is None else torch.as_tensor(ends).reshape(-1).tolist(), **sampled, **options,
    )  # fmt: skip
    longest = max(len(g.ids) for g in made.generations)
    fill = config.pad_token_id if config.pad_token_id is not None else 0
    answers = torch.full((len(prompts), longest), int(torch.as_tensor(fill).reshape(-1)[0]), dtype=input_ids.dtype)
    for row, generation in enumerate(made.generations):
        answers[row, : len(generation.ids)] = generation.ids
    sequences = torch.cat([input_ids, answers.to(input_ids.device)], 1)
    return GenerateDecoderOnlyOutput(sequences=sequences) if config.return_dict_in_generate else sequences
