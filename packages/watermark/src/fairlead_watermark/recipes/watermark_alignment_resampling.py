"""`fairlead run watermark-alignment-resampling`: what a watermark does to alignment, and how resampling repairs it.

Paper: Verma, Phan, Trivedi, "Watermarking Degrades Alignment in Language Models" (arXiv 2506.04462). Three parts:
a closed-form model where the theorem can be checked to the third digit, the audit of a small aligned chat model
before and after each mark, and real English from a chat model with every token coloured by its score.
This file orders the parts, draws the figures and writes the report; the parts live beside it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from fairlead import models, registry
from fairlead.config import MethodConfig
from fairlead.errors import DataUnavailableError, MissingDependencyError
from fairlead.kinds import Recipe
from fairlead.kinds.reward import as_reward
from fairlead.runs import Run

from . import closed_form, english, organism, real_text, sections


class WatermarkAlignmentResamplingConfig(MethodConfig):
    """Sizes of the three parts; the defaults finish in a few minutes on two cores."""

    bigram: str = Field("zoo:bigram", description="closed-form model whose next-token law is one table row")
    bigram_prompts: int = Field(500, ge=20, description="prompts of the closed-form part, one key each")
    bigram_length: int = Field(120, ge=20, description="tokens per answer of the closed-form part")
    chat: str = Field("zoo:weak", description="chat model under audit")
    prompts: str = Field("zoo:prompts", description="JSONL of test prompts with the columns prompt and split")
    guard: str = Field("world", description="registered guard that judges the answers")
    reward: str = Field("world", description="registered reward that alignment resampling maximises")
    keys: int = Field(24, ge=4, description="watermark keys over which every shift is averaged")
    prompts_per_side: int = Field(40, ge=10, description="harmful prompts, and as many benign ones")
    candidates: int = Field(8, ge=8, multiple_of=8, description="answers per prompt and key, in whole groups of 8")
    chat_tokens: int = Field(26, ge=4, description="longest answer of the chat model under audit")
    english: str = Field("zoo:english", description="language model of the detection-power part")
    english_rounds: int = Field(5, ge=1, description="rounds over the 20 openings of the detection-power part, one key each")
    english_tokens: int = Field(200, ge=20, description="tokens per text of the detection-power part")
    english_reward: Any = Field(
        {"name": "length", "target": 200}, description="registered reward that the detection-power part resamples for"
    )
    real: str = Field("zoo:smollm2-135m-instruct", description="chat model of the real-text part; empty skips it")
    real_answers: int = Field(100, ge=20, description="answers per mark of the real-text part")
    real_tokens: int = Field(64, ge=20, description="longest answer of the real-text part")


class WatermarkAlignmentResampling(Recipe):
    """Audit of unmarked, KGW, Gumbel and modified Gumbel, then best of n = 1, 2, 4, 8 marked answers."""

    Config = WatermarkAlignmentResamplingConfig
    config: WatermarkAlignmentResamplingConfig

    def __call__(self, run: Run) -> None:
        self._closed_form(run)
        self._organism(run)
        self._english(run)
        self._real_text(run)

    def _closed_form(self, run: Run) -> None:
        c = self.config

        def experiment() -> dict[str, Any]:
            import torch

            model, _ = models.load(c.bigram)
            with torch.inference_mode():
                every = torch.arange(model.config.vocab_size)[:, None]
                table = model(input_ids=every).logits[:, -1].float().log_softmax(-1)
            return closed_form.experiment(table, c.bigram_prompts, c.bigram_length, run.seed, run.progress)

        result = run.stage("closed-form", experiment)
        sections.closed_form_section(run, result)
        for name, passed, detail in closed_form.checks(result):
            run.check(name, passed, detail)

    def _organism(self, run: Run) -> None:
        c = self.config
        model, tokenizer = models.load(c.chat)
        guard, reward = registry.create("guard", c.guard), registry.create("reward", c.reward)
        prompts = organism.read_prompts(models.resolve(c.prompts), c.prompts_per_side, run.seed)
        found = {}
        for name in (organism.UNMARKED, *organism.MARKS):
            collect = partial(
                organism.collect, name, model, tokenizer, prompts, guard, reward, c.keys, c.candidates, c.chat_tokens,
                run.seed, partial(run.progress, f"audit, {name}"),
            )  # fmt: skip
            raw = run.stage(f"audit-{name}", collect)
            found[name] = {field: np.asarray(values, dtype=float) for field, values in raw.items()}
        sections.audit_section(run, found, len(prompts.harmful))
        sections.resampling_section(run, found, len(prompts.harmful))

    def _english(self, run: Run) -> None:
        c = self.config
        model, tokenizer = models.load(c.english)
        reward = as_reward(c.english_reward)
        found = {}
        for name in (organism.UNMARKED, *english.MARKS):
            measure = partial(
                english.measure, name, real_text.make_mark, model, tokenizer, reward, c.english_rounds, c.english_tokens,
                run.seed, partial(run.progress, f"English, {name}"),
            )  # fmt: skip
            found[name] = run.stage(f"english-{name}", measure)
        plain = found.pop(organism.UNMARKED)
        marks = {name: english.summary(values, plain) for name, values in found.items()}
        sections.english_section(run, marks, plain["p_values"], len(plain["rewards"]), c.english_tokens)
        for name, passed, detail in english.checks(marks):
            run.check(name, passed, detail)

    def _real_text(self, run: Run) -> None:
        c = self.config
        if not c.real:
            return
        try:
            model, tokenizer = models.load(c.real)
        except (MissingDependencyError, DataUnavailableError) as error:
            run.section("Real English", f"Left out: {error}")
            return
        results = [
            run.stage(
                f"real-{name}",
                partial(
                    real_text.speak, name, model, tokenizer, c.real_answers, c.real_tokens, run.seed,
                    partial(run.progress, f"real English, {name}"),
                ),
            )
            for name in real_text.MARKS
        ]
        sections.real_text_section(run, results)
