"""Detection power on English text, and what resampling leaves of it: a small causal LM continues real openings.

Answers of the audited chat model are a dozen predictable words, too few to test; here a text has 200 tokens of natural
entropy. The reward (a registered one) is maximised over n = 1, 2, 4 candidates of one generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from fairlead.generation import generate

from .. import bounds
from .closed_form import best_of, chosen, keys
from .organism import UNMARKED

MARKS = ("kgw", "gumbel", "modified-gumbel")
SIZES = (1, 2, 4)
FALSE_POSITIVE_RATE = 1e-3
OPENINGS = (
    "The function returns", "This module provides", "If the argument is", "Return a new", "A string that", "When the file",
    "The following example", "Changed in version", "Raise an exception", "The default value", "Objects of this class",
    "In most cases", "The first argument", "An iterator over", "Create a new", "The method is called", "Note that the",
    "It is possible to", "The result of", "Each element of",
)  # fmt: skip


def measure(
    name: str, make_mark: Callable[[str, int, int], Any], model: Any, tokenizer: Any, reward: Any, rounds: int, tokens: int,
    seed: int, progress: Callable[[int, int], None],
) -> dict[str, Any]:  # fmt: skip
    """Rewards and p-values [texts][candidates] of `rounds` x openings texts, one key per round, as plain JSON.

    Unmarked texts are tested under KGW's key: their p-values are the null."""
    width = model.get_output_embeddings().weight.shape[0]
    rewards: list[list[float]] = []
    p_values: list[list[float]] = []
    surprise: list[float] = []
    for index, key in enumerate(keys(seed, rounds, f"english {name}")):
        mark = make_mark("kgw" if name == UNMARKED else name, key, width)
        made = generate(
            model, tokenizer, OPENINGS, watermark=None if name == UNMARKED else mark, n=SIZES[-1], max_new_tokens=tokens, min_new_tokens=tokens,
            seed=seed * 1000 + index, batch_size=80, return_logprobs=True,
        )  # fmt: skip
        for opening, group in zip(OPENINGS, made, strict=True):
            rewards.append(reward([opening] * len(group), [g.text for g in group]).tolist())
            surprise += [-float(g.logprobs.double().mean()) for g in group if g.logprobs is not None]
            ids = torch.nn.utils.rnn.pad_sequence([g.ids for g in group], batch_first=True)
            lengths = torch.tensor([len(g.ids) for g in group])
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            p_values.append(mark.detect(ids, attention_mask=mask).p_value.tolist())
        progress(index + 1, rounds)
    return {"mark": name, "rewards": rewards, "p_values": p_values, "perplexity": float(np.exp(np.mean(surprise)))}


def summary(found: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """Power and reward at every n, with standard errors over texts."""
    rewards, p_values = np.asarray(found["rewards"]), np.asarray(found["p_values"])
    base = np.asarray(plain["rewards"]).mean(-1)
    sigma = float(rewards.std(-1, ddof=1).mean())
    gaps = {n: best_of(rewards, n) - base for n in SIZES}
    eps = -float(gaps[1].mean())
    return {
        "mark": found["mark"],
        "perplexity": found["perplexity"],
        "sigma": sigma,
        "power": {str(n): float((chosen(p_values, rewards, n) < FALSE_POSITIVE_RATE).mean()) for n in SIZES},
        "gap": {str(n): float(g.mean()) for n, g in gaps.items()},
        "se": {str(n): float(g.std(ddof=1) / np.sqrt(len(g))) for n, g in gaps.items()},
        "bound": {str(n): bounds.resampling_bound(n, sigma, eps) for n in SIZES},
    }


def checks(marks: dict[str, dict[str, Any]]) -> Iterator[tuple[str, bool, str]]:
    """Thresholds: power of KGW and Gumbel above .9, kept within two points by resampling."""
    for name in ("kgw", "gumbel"):
        power = marks[name]["power"]["1"]
        yield f"English, {name}: detected at a false-positive rate of .001", power > 0.9, f"{power:.1%} of texts, above 90 %"
    for name in ("kgw", "modified-gumbel"):
        first, fourth = marks[name]["power"]["1"], marks[name]["power"]["4"]
        yield (
            f"English, {name}: best of 4 keeps the mark", fourth >= first - 0.02, f"power {first:.1%} at n = 1, {fourth:.1%} at n = 4",
        )  # fmt: skip
