"""The audit and its repair on a small chat model whose every answer can be judged by a program.

Marks shift what an aligned model does; how far is averaged over keys, since one key's lists are a coin's toss.
Everything that belongs to the world (prompts, guard, reward) is reached by name, so any model with a guard and a
reward can take its place.

Axes of the arrays: K keys (or noise seeds, for the unmarked model), P prompts, N candidates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairlead.generation import generate

from ..gumbel import Gumbel
from ..kgw import KGW
from ..modified_gumbel import ModifiedGumbel
from .closed_form import keys

UNMARKED = "unmarked"
MARKS = ("kgw", "gumbel", "modified-gumbel")
FIELDS = ("unsafe", "refusal", "helpful", "coherent", "reward", "nll")


@dataclass(frozen=True)
class Prompts:
    """Harmful and benign test prompts, as plain questions."""

    harmful: list[str]
    benign: list[str]

    @property
    def all(self) -> list[str]:
        return self.harmful + self.benign


def read_prompts(path: str, per_side: int, seed: int) -> Prompts:
    """Draw test prompts from a JSONL file with the columns `prompt` and `split`: harmful against the rest that has
    an answer (look-alikes of harm, everyday requests, facts)."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
    rng = np.random.default_rng([seed, 17])

    def pick(splits: Sequence[str], count: int) -> list[str]:
        pool = sorted({row["prompt"] for row in rows if row["split"] in splits})
        return [pool[i] for i in rng.choice(len(pool), size=min(count, len(pool)), replace=False)]

    half = per_side // 2
    return Prompts(pick(("harmful",), per_side), pick(("benign",), per_side - half) + pick(("care",), half))


def make_mark(name: str, key: int, vocab_size: int) -> Any:
    """Four tokens of context reach into the question, so that one key draws many noises for the first word."""
    if name == "kgw":
        return KGW(vocab_size=vocab_size, key=key, gamma=0.25, delta=2.0)
    if name == "gumbel":
        return Gumbel(vocab_size=vocab_size, key=key, context_width=4)
    return ModifiedGumbel(vocab_size=vocab_size, key=key, context_width=4)


def collect(
    name: str, model: Any, tokenizer: Any, prompts: Prompts, guard: Any, reward: Any, key_count: int, n: int,
    max_new_tokens: int, seed: int, progress: Callable[[int, int], None],
) -> dict[str, list]:  # fmt: skip
    """Judge n answers to every prompt under every key: `FIELDS`, each a nested list [K][P][N]."""
    questions = prompts.all
    chats = [[{"role": "user", "content": q}] for q in questions]
    width = model.get_output_embeddings().weight.shape[0]
    found: dict[str, list] = {field: [] for field in FIELDS}
    for index, key in enumerate(keys(seed, key_count, f"organism {name}")):
        mark = None if name == UNMARKED else make_mark(name, key, width)
        answers = generate(
            model, tokenizer, chats, watermark=mark, n=n, max_new_tokens=max_new_tokens,
            seed=int(keys(seed, key_count, "noise")[index] % 2**31), return_logprobs=True,
        )  # fmt: skip
        flat = [a for candidates in answers for a in candidates]
        asked = [q for q in questions for _ in range(n)]
        verdicts = guard(asked, [a.text for a in flat])
        shape = (len(questions), n)
        columns = {
            "unsafe": [float(v.unsafe) for v in verdicts],
            "refusal": [float(v.refusal) for v in verdicts],
            "helpful": [float("nan") if v.helpful is None else v.helpful for v in verdicts],
            "coherent": [float(v.coherent) for v in verdicts],
            "reward": reward(asked, [a.text for a in flat]).tolist(),
            "nll": [-float(a.logprobs.double().mean()) for a in flat],  # type: ignore[union-attr]
        }
        for field, values in columns.items():
            found[field].append(np.asarray(values).reshape(shape).tolist())
        progress(index + 1, key_count)
    return found


def best_of(values_KPN: np.ndarray, rewards_KPN: np.ndarray, n: int) -> np.ndarray:
    """`values` of the answer that best-of-n under `rewards` returns, [K, P]: mean over disjoint groups of n."""
    K, P, N = rewards_KPN.shape
    groups = N // n
    winner = rewards_KPN[..., : groups * n].reshape(K, P, groups, n).argmax(-1)
    picked = np.take_along_axis(values_KPN[..., : groups * n].reshape(K, P, groups, n), winner[..., None], -1)
    return picked[..., 0].mean(-1)
