"""Rewards of 48 sequences of very different lengths: packed rows against length-sorted and plain padded batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Any

import torch
from harness import Row

from fairlead.scoring import classifier_scores

COUNT, VOCABULARY, WIDTH = 48, 1000, 128


@functools.lru_cache(maxsize=1)
def inputs() -> tuple[Any, list[list[int]]]:
    """A reward model of two layers and 2065 tokens of log-normal lengths: median 27, longest 266, shuffled."""
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
    lengths = [max(1, round(27 * math.exp(0.99 * quantile((i + 0.5) / COUNT)))) for i in range(COUNT)]
    order = torch.randperm(COUNT, generator=generator).tolist()
    return model, [torch.randint(1, VOCABULARY, (lengths[i],), generator=generator).tolist() for i in order]


def packed(token_budget: int) -> Callable[[], Any]:
    model, sequences = inputs()
    return lambda: classifier_scores(model, sequences, token_budget)[:, 0]


def padded(size: int, by_length: bool) -> Callable[[], Any]:
    model, sequences = inputs()
    order = sorted(range(COUNT), key=lambda i: -len(sequences[i])) if by_length else list(range(COUNT))

    @torch.inference_mode()
    def call() -> torch.Tensor:
        scores = torch.zeros(COUNT)
        for start in range(0, COUNT, size):
            members = order[start : start + size]
            width = max(len(sequences[i]) for i in members)
            ids, mask = torch.zeros(len(members), width, dtype=torch.int64), torch.zeros(len(members), width, dtype=torch.int64)
            for row, i in enumerate(members):
                ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
                mask[row, : len(sequences[i])] = 1
            scores[members] = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0]
        return scores

    return call


def check(token_budget: int) -> None:
    difference = float((packed(token_budget)() - padded(16, True)()).abs().max())
    if not difference < 1e-5:
        raise AssertionError(f"packed and padded rewards differ by {difference:.1e}")


def rows() -> Iterator[Row]:
    for token_budget in (1024, 4096):
        yield Row(
            operation=f"packed scoring, {token_budget} tokens a row",
            shape=f"{COUNT} sequences, 2065 tokens",
            dtype="float32",
            ours=functools.partial(packed, token_budget),
            peers={
                "length-sorted batches of 16": functools.partial(padded, 16, True),
                "one padded batch": functools.partial(padded, COUNT, False),
            },
            baseline="length-sorted batches of 16",
            at_least=2.3,
            check=functools.partial(check, token_budget),
        )
