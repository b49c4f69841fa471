"""Guide-Align: the guidelines that fit an input are put before it (arXiv 2403.11838).

Of the n_docs best guidelines by E_q(x) . E_g(g) those are kept, best first, that are less alike than a threshold to every
kept one (ratio 2 LCS / (|a| + |b|)), and of these the first k: filter first, then cut. The model's weights stay as they
are. As a Rewriter it returns the rules block and the prompt as one text; for chat models `messages` gives the block as
system turn, and `guided_generate` answers with them. Who writes the library and trains the encoder: guidelines,
guideline_writing, dual_encoder.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from fairlead.config import MethodConfig
from fairlead.errors import InputError
from fairlead.generation import Generation, generate
from fairlead.kinds import Rewrite, Rewriter

from .dual_encoder import DualEncoder, EmbeddingBagEncoder, HFEncoder, Index
from .guidelines import Guideline, GuidelineLibrary, clean
from .p_aligner import check_prompts
from .text_similarity import diverse

log = logging.getLogger("fairlead")
HEADING = "Follow these guidelines when you answer:"


class GuideAlignConfig(MethodConfig):
    """library: a GuidelineLibrary or the folder of one. encoder: a DualEncoder, a file of EmbeddingBagEncoder, or a model's name."""

    library: Any = Field(None, description="a GuidelineLibrary, or the folder that holds one")
    encoder: Any = Field(None, description="a DualEncoder, a saved EmbeddingBagEncoder, or a Hugging Face encoder's name")
    k: int = Field(6, ge=1, description="guidelines before each prompt")
    n_docs: int = Field(20, ge=1, description="guidelines retrieved before the filter")
    threshold: float = Field(0.5, ge=0, allow_inf_nan=False, description="a guideline at least this alike to a better one is left out; above 1 keeps all")
    heading: str = Field(HEADING, min_length=1, description="first line of the block of guidelines")


class GuideAlign(Rewriter):
    """Retrieval of guidelines in front of any model."""

    Config = GuideAlignConfig
    config: GuideAlignConfig
    name = "guide-align"

    def setup(self) -> None:
        c = self.config
        if c.library is None or c.encoder is None:
            raise InputError("GuideAlign: library and encoder are required, the guidelines and what finds them")
        self.encoder = _as_encoder(c.encoder)
        self._encoder_name = self.encoder.name
        self.library = c.library if isinstance(c.library, GuidelineLibrary) else _load(c.library, self._encoder_name)
        self._index = Index(self.library.embed(self.encoder))
        for what, number in (("k", c.k), ("n_docs", c.n_docs)):
            if number > len(self.library):
                log.warning("GuideAlign: %s = %d, but the library has %d guidelines; at most these are shown", what, number, len(self.library))

    def retrieve(self, prompts: Sequence[str]) -> list[list[tuple[Guideline, float]]]:
        """(guideline, score) of the rules for each prompt, best first: at most k, diverse.

        InputError for a prompt that is no string or empty.
        """
        check_prompts(prompts)
        if not prompts:
            return []
        c = self.config
        ids_BK, scores_BK = self._index.search(self.encoder.encode_questions(prompts), max(c.n_docs, c.k))
        found = []
        for ids, scores in zip(ids_BK.tolist(), scores_BK.tolist(), strict=True):
            kept = diverse([self.library[i].line for i in ids], c.threshold, c.k)
            found.append([(self.library[ids[j]], scores[j]) for j in kept])
        return found

    def __call__(self, prompts: Sequence[str], *, seed: int = 0) -> list[Rewrite]:
        """The block of guidelines, an empty line, the prompt. provenance: {"rewriter", "encoder", "guidelines": ids}.
        Deterministic: the seed changes nothing."""
        return [
            Rewrite(guided_prompt(prompt, [g for g, _ in rules], self.config.heading), prompt, self._provenance(rules))
            for prompt, rules in zip(prompts, self.retrieve(prompts), strict=True)
        ]

    def messages(self, prompts: Sequence[str], system: str = "") -> list[list[dict[str, str]]]:
        """Chats with the guidelines in the system turn, after `system`, and the raw prompt as user turn."""
        rules = self.retrieve(prompts)
        return [guided_messages(p, [g for g, _ in r], system, self.config.heading) for p, r in zip(prompts, rules, strict=True)]

    def guided_generate(
        self, model: Any, tokenizer: Any, prompts: Sequence[str], *, system: str = "", max_new_tokens: int = 512,
        temperature: float = 0.0, seed: int = 0, **options: Any,
    ) -> list[Generation]:  # fmt: skip
        """One answer per prompt (greedy by default) with the guidelines used in its provenance and the raw prompt as prompt.

        A tokenizer with a chat template gets chats, another one the block and the prompt as text. options: further ones of
        `fairlead.generation.generate`.
        """
        rules = self.retrieve(prompts)
        chosen = [[g for g, _ in found] for found in rules]
        chat = bool(getattr(tokenizer, "chat_template", None))
        asked: list[Any] = [
            guided_messages(p, r, system, self.config.heading) if chat
            else "\n\n".join(filter(None, (system, guided_prompt(p, r, self.config.heading))))
            for p, r in zip(prompts, chosen, strict=True)
        ]  # fmt: skip
        made = generate(
            model, tokenizer, asked, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, **options
        )
        return [
            replace(group[0], prompt=prompt, provenance={**group[0].provenance, **self._provenance(found)})
            for group, prompt, found in zip(made, prompts, rules, strict=True)
        ]

    def _provenance(self, rules: Sequence[tuple[Guideline, float]]) -> dict[str, Any]:
        # No scores: their last digits depend on what else an encoder had in its batch. `retrieve` gives them.
        return {"rewriter": self.name, "encoder": self._encoder_name, "guidelines": [g.id for g, _ in rules]}


def _as_encoder(value: Any) -> DualEncoder:
    if isinstance(value, DualEncoder):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"GuideAlign: encoder must be a DualEncoder, a file or a model's name, got a {type(value).__name__}")
    return EmbeddingBagEncoder.load(value) if Path(value).is_file() else HFEncoder(os.fspath(value))


def _load(value: Any, embedding_model: str) -> GuidelineLibrary:
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"GuideAlign: library must be a GuidelineLibrary or a folder, got a {type(value).__name__}")
    return GuidelineLibrary.load(value, embedding_model=embedding_model)


def rules_block(rules: Sequence[Guideline], heading: str = HEADING) -> str:
    """The heading and one rule per line, role markers stripped; empty for no rules."""
    return "\n".join([heading, *(f"- {clean(rule.line)}" for rule in rules)]) if rules else ""


def guided_prompt(prompt: str, rules: Sequence[Guideline], heading: str = HEADING) -> str:
    """The block before the prompt; the prompt itself without rules."""
    return f"{rules_block(rules, heading)}\n\n{prompt}" if rules else prompt


def guided_messages(prompt: str, rules: Sequence[Guideline], system: str = "", heading: str = HEADING) -> list[dict[str, str]]:
    """A chat: system text and rules in one system turn (none when both are empty), the raw prompt as user turn."""
    top = "\n\n".join(filter(None, (system, rules_block(rules, heading))))
    return [*([{"role": "system", "content": top}] if top else []), {"role": "user", "content": prompt}]


def distillation_rows(prompts: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    """{prompt: raw input, completion: guided answer} for ordinary SFT, after which no rules are needed at inference."""
    if len(prompts) != len(answers):
        raise InputError(f"distillation: needs one answer per prompt, got {len(answers)} for {len(prompts)}")
    return [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)]


@dataclass(frozen=True)
class Verdicts:
    """Judgements of first against second answers, both orders summed."""

    wins: int
    losses: int
    ties: int

    @property
    def win_rate(self) -> float:
        """Share of wins, ties counted half."""
        return (self.wins + self.ties / 2) / (self.wins + self.losses + self.ties)


def judge_both_orders(
    judge: Callable[[str, str, str], str], prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> Verdicts:
    """Compare two sets of answers with every pair shown in both orders, so that a preference for a place cancels.

    judge(prompt, answer A, answer B) -> "A", "B" or "tie". InputError for another verdict or lists that do not match.
    """
    if not len(prompts) == len(first) == len(second) or not len(prompts):
        raise InputError(f"judge: needs two answers per prompt, got {len(prompts)} prompts, {len(first)} and {len(second)} answers")
    counts = {"wins": 0, "losses": 0, "ties": 0}
    sides: tuple[Mapping[str, str], ...] = ({"A": "wins", "B": "losses", "tie": "ties"}, {"A": "losses", "B": "wins", "tie": "ties"})
    for prompt, a, b in zip(prompts, first, second, strict=True):
        for (one, two), names in zip(((a, b), (b, a)), sides, strict=True):
            verdict = judge(prompt, one, two)
            if verdict not in names:
                raise InputError(f"judge: must answer 'A', 'B' or 'tie', got {verdict!r:.40}")
            counts[names[verdict]] += 1
    return Verdicts(**counts)
