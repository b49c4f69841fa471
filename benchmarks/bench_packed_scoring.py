"""Rewards of sequences of very different lengths: packed rows against length-sorted and plain padded batches. 48 and 256
sequences by themselves (sorted, 256 leave little padding to save), and 256 answers to 16 prompts of 64 tokens, which packed
rows hold once for their answers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Any

import torch
from harness import Row

from fairlead.scoring import classifier_scores

VOCABULARY, WIDTH, ANSWERS = 1000, 128, 16


@functools.lru_cache(maxsize=1)
def inputs(count: int, prompt: int) -> tuple[Any, list[list[int]], list[int] | None]:
    """A reward model of two layers and sequences of log-normal lengths, shuffled: median 27; of 48 the longest has 266."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        model.score.weight.normal_(0, WIDTH**-0.5)
    generator = torch.Generator().manual_seed(0)
    quantile = NormalDist().inv_cdf
    lengths = [max(1, round(27 * math.exp(0.99 * quantile((i + 0.5) / count)))) for i in range(count)]
    order = torch.randperm(count, generator=generator).tolist()
    made = [torch.randint(1, VOCABULARY, (lengths[i],), generator=generator).tolist() for i in order]
    if not prompt:
        return model, made, None
    prompts = [torch.randint(1, VOCABULARY, (prompt,), generator=generator).tolist() for _ in range(count // ANSWERS)]
    groups = [i // ANSWERS for i in range(count)]
    return model, [prompts[g] + answer for g, answer in zip(groups, made, strict=True)], groups


def packed(count: int, prompt: int, token_budget: int) -> Callable[[], Any]:
    model, sequences, groups = inputs(count, prompt)
    return lambda: classifier_scores(model, sequences, token_budget, groups)[:, 0]


def padded(count: int, prompt: int, size: int, by_length: bool) -> Callable[[], Any]:
    model, sequences, _ = inputs(count, prompt)
    order = sorted(range(count), key=lambda i: -len(sequences[i])) if by_length else list(range(count))

    @torch.inference_mode()
    def call() -> torch.Tensor:
        scores = torch.zeros(count)
        for start in range(0, count, size):
            members = order[start : start + size]
            width = max(len(sequences[i]) for i in members)
            ids, mask = torch.zeros(len(members), width, dtype=torch.int64), torch.zeros(len(members), width, dtype=torch.int64)
            for row, i in enumerate(members):
                ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
                mask[row, : len(sequences[i])] = 1
            scores[members] = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0]
        return scores

    return call


def check(count: int, prompt: int, token_budget: int) -> None:
    difference = float((packed(count, prompt, token_budget)() - padded(count, prompt, 16, True)()).abs().max())
    if not difference < 1e-5:
        raise AssertionError(f"packed and padded rewards differ by {difference:.1e}")


def rows() -> Iterator[Row]:
    for count, prompt, token_budget, least in ((48, 0, 1024, 2.3), (48, 0, 4096, 2.3), (256, 0, 1024, 0.0), (256, 64, 1024, 2.3)):
        tokens = sum(map(len, inputs(count, prompt)[1]))
        yield Row(
            operation=f"packed scoring, {token_budget} tokens a row",
            shape=f"{count} {f'answers to {count // ANSWERS} prompts' if prompt else 'sequences'}, {tokens} tokens",
            dtype="float32",
            ours=functools.partial(packed, count, prompt, token_budget),
            peers={
                "length-sorted batches of 16": functools.partial(padded, count, prompt, 16, True),
                "one padded batch": functools.partial(padded, count, prompt, count, False),
            },
            baseline="length-sorted batches of 16",
            at_least=least,
            check=functools.partial(check, count, prompt, token_budget),
        )
