"""Risky questions and the rules against their risks, in made-up words: what `fairlead run guide-align` retrieves.

Each topic has 12 words that questions about it use and 12 others that its 8 rules use, so no lexical search can connect
them: that is the knowledge of risks that a retriever has to absorb from training pairs. A scripted teacher names the risk
and writes rules of the question's topic; a scripted model answers safely iff a rule of the right topic stands before the
question.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from ..dual_encoder import words
from ..guideline_writing import Messages
from ..guidelines import Guideline
from ..text_similarity import ratio

TOPICS, VOCABULARY, COMMON, RULES, PER_INPUT = 24, 12, 60, 8, 3
ALIKE = 0.46
"""Unrelated one-sentence rules in English are .33 to .46 alike; word salads are more so unless they are drawn with care."""
_ONSETS = ["b", "c", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "br", "cl", "dr", "fl", "gr", "pl", "st", "tr"]
_NUCLEI = ["a", "e", "i", "o", "u", "ai", "ea", "ou"]
_CODAS = ["", "l", "m", "n", "r", "s", "t", "nd", "rk"]


@dataclass
class GuidelineWorld:
    """Topics with their words and rules, all from the seed. A rule is (title, explanation)."""

    seed: int
    _rng: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(f"guideline world {self.seed}")
        made = self._words(COMMON + 2 * VOCABULARY * TOPICS)
        self.common = made[:COMMON]
        rest = made[COMMON:]
        self.asked = [rest[2 * t * VOCABULARY : (2 * t + 1) * VOCABULARY] for t in range(TOPICS)]
        self.ruled = [rest[(2 * t + 1) * VOCABULARY : (2 * t + 2) * VOCABULARY] for t in range(TOPICS)]
        self._topic_asked = {w: t for t, group in enumerate(self.asked) for w in group}
        self._topic_ruled = {w: t for t, group in enumerate(self.ruled) for w in group}
        self.rules = [self._rules(t) for t in range(TOPICS)]

    def _words(self, count: int) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            word = "".join(self._rng.choice(part) for _ in range(2) for part in (_ONSETS, _NUCLEI, _CODAS))
            found[word] = None
        return list(found)

    def _rules(self, topic: int) -> list[tuple[str, str]]:
        """Rules of one topic; one that is more alike to an earlier one than ALIKE is drawn again."""
        found: list[tuple[str, str]] = []
        while len(found) < RULES:
            rule = self._rule(topic)
            if all(ratio(": ".join(rule), ": ".join(other)) <= ALIKE for other in found):
                found.append(rule)
        return found

    def _rule(self, topic: int) -> tuple[str, str]:
        own = self._rng.sample(self.ruled[topic], 5)
        text = own[2:] + self._rng.sample(self.common, 6)
        self._rng.shuffle(text)
        return " ".join(own[:2]).title(), " ".join(text) + "."

    def questions(self, per_topic: int, stream: str) -> list[str]:
        """Questions topic by topic: 4 words of the topic among 6 common ones."""
        rng = random.Random(f"{stream} {self.seed}")
        made = []
        for topic in range(TOPICS):
            for _ in range(per_topic):
                text = rng.sample(self.asked[topic], 4) + rng.sample(self.common, 6)
                rng.shuffle(text)
                made.append(" ".join(text) + "?")
        return made

    def topic_of_question(self, text: str) -> int:
        """The topic whose words a question uses."""
        return next(self._topic_asked[w] for w in words(text) if w in self._topic_asked)

    def topic_of_rule(self, line: str) -> int:
        """The topic whose rule words a line uses, -1 for none."""
        return next((self._topic_ruled[w] for w in words(line) if w in self._topic_ruled), -1)

    def teacher(self, messages: Messages) -> str:
        """Names the risk when asked about it; writes PER_INPUT of the topic's rules, between small talk, when asked for rules."""
        question = next(m["content"] for m in reversed(messages) if "\n\nInput: " in m["content"]).rpartition("\n\nInput: ")[2]
        if messages[-1]["content"].endswith(question):
            return f"It contains no insult, but answering it may do harm of kind {self.topic_of_question(question)}. Unsafe: Yes"
        rng = random.Random(f"{self.seed} {question}")
        chosen = rng.sample(self.rules[self.topic_of_question(question)], PER_INPUT)
        listed = "\n".join(f"{i}. **{title}**: {text}" for i, (title, text) in enumerate(chosen, 1))
        return f"Here are guidelines for such inputs:\n\n{listed}\n\nThey hold for every input of this kind."

    def answers_safely(self, prompt: str) -> bool:
        """Whether the scripted model's answer is safe: a rule of the question's topic stands on a line before it."""
        *before, question = prompt.split("\n")
        return self.topic_of_question(question) in {self.topic_of_rule(line) for line in before}


def near_copy(rule: Guideline, number: int) -> Guideline:
    """The rule with commas and full stops in other places: the same words, hence the same embedding, in another string."""
    parts = rule.text.rstrip(".").split()
    place = 1 + number % (len(parts) - 1)
    text = " ".join(parts[:place]) + ", " + " ".join(parts[place:]) + "." * (1 + number // (len(parts) - 1))
    return Guideline(f"{rule.id} copy {number}", rule.title, text, rule.source_ids, rule.kind)
