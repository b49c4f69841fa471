"""Real English under each mark: answers of a chat model, their tokens' scores and detection power.

The model has next to no alignment to lose; this part shows that the marks work on text that nobody here made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fairlead.generation import generate

from ..gumbel import Gumbel
from ..kgw import KGW
from ..modified_gumbel import ModifiedGumbel
from .closed_form import keys
from .organism import UNMARKED

MARKS = (UNMARKED, "kgw", "gumbel", "modified-gumbel")
FALSE_POSITIVE_RATE = 1e-3
QUESTIONS = (
    "Why is the sky blue?",
    "How do I make a good cup of tea?",
    "What should I pack for a week in the mountains?",
    "Explain photosynthesis to a ten-year-old.",
    "Write a short letter to a friend who has moved away.",
    "What makes a bridge stay up?",
    "How does a bicycle keep its balance?",
    "Give me three tips for learning a new language.",
    "Describe a busy market in the morning.",
    "What is the difference between weather and climate?",
    "How can I terminate a program that does not respond?",
    "Tell me about the history of paper.",
    "How do bees find their way home?",
    "What would you cook with potatoes, eggs and spinach?",
    "Why do we dream?",
    "How should I prepare for a job interview?",
    "What is a good way to start running?",
    "Explain how vaccines work.",
    "Write a short story about a lighthouse keeper.",
    "What are the advantages of public libraries?",
    "How do I repair a flat bicycle tyre?",
    "Why is the sea salty?",
    "Plan a day trip for a family with two children.",
    "What is the difference between a violin and a viola?",
    "How do I keep a houseplant alive?",
    "Explain how a fridge works.",
    "Write a toast for a friend's wedding.",
    "How are mountains formed?",
    "What should I think about before adopting a dog?",
    "How does the post find its way to my door?",
    "Describe the sound of rain to somebody who cannot hear.",
    "What are good habits for saving money?",
    "Why do leaves change colour in autumn?",
    "How can I sleep better?",
)


def make_mark(name: str, key: int, vocab_size: int) -> Any:
    """The marks at the defaults a user would choose; the Gumbel pair looks back four tokens."""
    if name == "kgw":
        return KGW(vocab_size=vocab_size, key=key, gamma=0.25, delta=2.0)
    if name == "gumbel":
        return Gumbel(vocab_size=vocab_size, key=key, context_width=4, dedup_contexts="single_turn")
    return ModifiedGumbel(vocab_size=vocab_size, key=key, context_width=4, dedup_contexts="single_turn")


def speak(
    name: str, model: Any, tokenizer: Any, answers: int, max_new_tokens: int, seed: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:  # fmt: skip
    """`answers` answers spread over the questions, plain or marked, as plain JSON.

    Plain answers are tested too, under the KGW key: their p-values show the false positives. Each round over the
    questions has a key of its own; plain Gumbel would give every round the same words.
    """
    width = model.get_output_embeddings().weight.shape[0]
    chats = [[{"role": "user", "content": q}] for q in QUESTIONS]
    rounds = -(-answers // len(QUESTIONS))
    p_values: list[float] = []
    surprise: list[float] = []
    lengths: list[int] = []
    examples: list[dict[str, Any]] = []
    for index, key in enumerate(keys(seed, rounds, "real text")):
        mark = make_mark("kgw" if name == UNMARKED else name, key, width)
        made = generate(
            model, tokenizer, chats, watermark=None if name == UNMARKED else mark, max_new_tokens=max_new_tokens,
            seed=seed + index, return_logprobs=True,
        )  # fmt: skip
        for question, (answer,) in zip(QUESTIONS, made, strict=True):
            found = mark.detect(answer.ids[None])
            p_values.append(float(found.p_value))
            surprise.append(-float(answer.logprobs.double().mean()))  # type: ignore[union-attr]
            lengths.append(len(answer.ids))
            if index == 0 and len(examples) < 4:
                examples.append(
                    {
                        "question": question,
                        "tokens": [tokenizer.decode([t]) for t in answer.ids.tolist()],
                        "scores": [None if np.isnan(s) else s for s in found.extra["token_scores"][0].tolist()],
                        "p_value": p_values[-1],
                    }
                )
        progress(min((index + 1) * len(QUESTIONS), answers), answers)
    kept = slice(0, answers)
    return {
        "mark": name,
        "p_values": p_values[kept],
        "power": float(np.mean(np.asarray(p_values[kept]) < FALSE_POSITIVE_RATE)),
        "perplexity": float(np.exp(np.mean(surprise[kept]))),
        "mean_length": float(np.mean(lengths[kept])),
        "examples": examples,
    }
