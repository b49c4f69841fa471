"""How easily a response is read, by the two formulas in wide use.

Flesch reading ease = 206.835 - 1.015 w/s - 84.6 y/w; Flesch-Kincaid grade = 0.39 w/s + 11.8 y/w - 15.59, with w words,
s sentences and y syllables (Kincaid et al. 1975). Made for English; syllables come from the spelling (`syllables`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from pydantic import Field

from ..config import MethodConfig
from ..kinds.reward import Reward, check_pairs

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]]*(?=\s|$)|\n\s*\n")
_VOWELS = "aeiouáàâäãåéèêëíìîïóòôöõúùûü"
# y is a consonant at the start of a word and between vowels ("yes", "playing"), a vowel elsewhere ("style", "dying").
_NUCLEUS = re.compile(rf"(?:[{_VOWELS}]|(?<=[^\W{_VOWELS}])y|y(?![{_VOWELS}]))+")
_SILENT = re.compile(
    rf"(?<=[^{_VOWELS}l])e$|(?<=[{_VOWELS}y]l)e$"  # make, whole; not table
    rf"|(?<=[^{_VOWELS}tdl])ed$|(?<=[{_VOWELS}y]l)ed$"  # jumped, failed; not wanted, titled
    rf"|(?<=[^{_VOWELS}lsxzcgh])es$|(?<=[{_VOWELS}y]l)es$|(?<=[pt]h)es$"  # makes, rules, clothes; not boxes, tables
    rf"|(?<=[^{_VOWELS}l])e(?=(?:ly|ful|less|ness|ment)s?$)"  # lately, careful
)
_APART = re.compile(
    r"(?<![tscgx])i(?=[aou])|i(?=et)|(?<=sc)i(?=en)|(?<=cl)i(?=en)"  # radio, quiet, science; not nation
    r"|(?<![qg])u(?=a(?!d)|ous)|(?<=cr)e(?=at(?!u))"  # usual, continuous, create; not guard, creature
    r"|(?<=[eou])(?=ing$)|(?<=[^\Waeiou]y)(?=ing$)|(?<=[aeiou][^\Waeiou]e)(?=as?$)"  # being, dying, idea
)
_NOT = re.compile(r"[^\Waeiouy]n't$")  # didn't; not don't


class ReadabilityConfig(MethodConfig):
    """Settings of the readability reward."""

    measure: Literal["reading-ease", "grade"] = Field(
        "reading-ease", description="Flesch reading ease (larger is easier) or Flesch-Kincaid grade (larger is harder)"
    )
    target: float | None = Field(None, allow_inf_nan=False, description="reward -|measure - target|; without it the measure itself")
    empty: float = Field(
        -100.0, allow_inf_nan=False, description="reward of a text without a word, low lest saying nothing reads best"
    )


class ReadabilityReward(Reward):
    """Reading ease or grade of the response, or how close it comes to a target. An unfinished sentence counts as one."""

    Config = ReadabilityConfig
    config: ReadabilityConfig
    granularity = "prefix"

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        return torch.tensor([self._score(str(r)) for r in responses], dtype=torch.float32)

    def _score(self, text: str) -> float:
        words, sentences, syllable_count = counts(text)
        if not words:
            return self.config.empty
        if self.config.measure == "grade":
            value = 0.39 * words / sentences + 11.8 * syllable_count / words - 15.59
        else:
            value = 206.835 - 1.015 * words / sentences - 84.6 * syllable_count / words
        return value if self.config.target is None else -abs(value - self.config.target)


def counts(text: str) -> tuple[int, int, int]:
    """(words, sentences, syllables) of a text. Sentences end at . ! ? or an empty line, whatever the abbreviation."""
    sentences = [found for part in _SENTENCE_END.split(text) if (found := _WORD.findall(part))]
    words = [word for sentence in sentences for word in sentence]
    return len(words), len(sentences), sum(map(syllables, words))


@lru_cache(maxsize=65536)
def syllables(word: str) -> int:
    """Syllables of an English word, at least one, from its spelling: groups of vowels, less silent endings (make, jumped),
    more where neighbours are spoken apart (radio, being). A digit counts as one."""
    whole = word.lower().replace("\u2019", "'")
    text = whole.partition("'")[0]
    count = len(_NUCLEUS.findall(text)) + len(_APART.findall(text)) + bool(_NOT.search(whole))
    if count > 1:
        count -= len(_SILENT.findall(text))
    return max(1, count + sum(c.isdigit() for c in text))
