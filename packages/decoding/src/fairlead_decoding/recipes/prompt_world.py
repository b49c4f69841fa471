"""Instructions whose best rewrite is known: what `fairlead run p-aligner` searches and learns.

An instruction is an intent, filler words and flags; applying principle a appends the flag "+a". The true value of its
flags, in order, under the hidden law of the intent's class (gains g, interactions J of ordered pairs):
sum_{a} g_a + .5 sum_{a before b} J_ab over distinct flags (first use counts) - .3 per repeat - .25 per flag beyond three.
Evaluations add noise of deviation .3. An answer repeats the instruction that it answers, so a text that lost its intent
is found out: it is worth LOST.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..principle_search import Principle

FLAGS = "abcde"
PRINCIPLES = [Principle(flag, f"appending the flag +{flag}.") for flag in FLAGS]
NOISE = 0.3
LOST = -1.0


@dataclass
class PromptWorld:
    """Hidden laws of `classes` classes of intents: gains_CA ~ N(.2, .6), interactions_CAA ~ N(0, .5)."""

    classes: int
    seed: int
    _values: dict[tuple[int, tuple[str, ...]], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, 1])
        self.gains_CA = rng.normal(0.2, 0.6, (self.classes, len(FLAGS))).tolist()
        self.interactions_CAA = rng.normal(0.0, 0.5, (self.classes, len(FLAGS), len(FLAGS))).tolist()
        self.noise = np.random.default_rng([self.seed, 2])

    def value(self, raw: str, text: str) -> float:
        """True value of a text as a rewrite of `raw`."""
        intent, *words = text.split() or [""]
        if intent != raw.split()[0]:
            return LOST
        kind = int(intent.removeprefix("intent")) % self.classes
        return self.of_flags(kind, tuple(w[1:] for w in words if w.startswith("+")))

    def of_flags(self, kind: int, flags: tuple[str, ...]) -> float:
        """True value of flags, in order, for a class."""
        found = self._values.get((kind, flags))
        if found is None:
            used = [FLAGS.index(f) for f in dict.fromkeys(flags) if f in FLAGS]
            found = sum(self.gains_CA[kind][a] for a in used)
            found += 0.5 * sum(self.interactions_CAA[kind][a][b] for i, a in enumerate(used) for b in used[i + 1 :])
            found -= 0.3 * (len(flags) - len(used)) + 0.25 * max(0, len(flags) - 3)
            self._values[kind, flags] = found
        return found

    def improver(self, texts: list[str], principles: list[Principle]) -> list[str | None]:
        return [f"{text} +{p.name}" for text, p in zip(texts, principles, strict=True)]

    def responder(self, texts: list[str], n: int) -> list[list[str]]:
        return [[text] * n for text in texts]

    def reward(self, raws: list[str], answers: list[str]) -> list[float]:
        """True value plus noise, fresh at each call."""
        true = [self.value(raw, answer) for raw, answer in zip(raws, answers, strict=True)]
        return (np.asarray(true) + self.noise.normal(0, NOISE, len(true))).tolist()
