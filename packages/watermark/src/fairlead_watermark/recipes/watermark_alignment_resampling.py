"""`fairlead run watermark-alignment-resampling`: what a watermark does to alignment, and how resampling repairs it.

Paper: Verma, Phan, Trivedi, "Watermarking Degrades Alignment in Language Models" (arXiv 2506.04462). Three parts:
a closed-form model where the theorem can be checked to the third digit, the audit of a small aligned chat model
before and after each mark, and real English from a chat model with every token coloured by its score.
This file orders the parts, draws the figures and writes the report; the parts live beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from fairlead import models, registry
from fairlead.config import MethodConfig
from fairlead.errors import DataUnavailableError, MissingDependencyError
from fairlead.kinds import Recipe
from fairlead.runs import Run

from . import closed_form, organism, organism_report, real_text


class WatermarkAlignmentResamplingConfig(MethodConfig):
    """Sizes of the three parts; the defaults finish in a few minutes on two cores."""

    bigram: str = Field("zoo:bigram", description="closed-form model whose next-token law is one table row")
    bigram_prompts: int = Field(500, ge=20, description="prompts of the closed-form part, one key each")
    bigram_length: int = Field(120, ge=20, description="tokens per answer of the closed-form part")
    chat: str = Field("zoo:weak", description="chat model under audit")
    prompts: str = Field("zoo:prompts", description="JSONL of test prompts with the columns prompt and split")
    guard: str = Field("world", description="registered guard that judges the answers")
    reward: str = Field("world", description="registered reward that alignment resampling maximises")
    keys: int = Field(16, ge=4, description="watermark keys over which every shift is averaged")
    prompts_per_side: int = Field(40, ge=10, description="harmful prompts, and as many benign ones")
    candidates: int = Field(8, ge=4, multiple_of=4, description="answers per prompt and key")
    chat_tokens: int = Field(26, ge=4, description="longest answer of the chat model under audit")
    english: str = Field("zoo:smollm2-135m-instruct", description="chat model of the real-text part; empty skips it")
    english_answers: int = Field(100, ge=20, description="answers per mark of the real-text part")
    english_tokens: int = Field(80, ge=20, description="longest answer of the real-text part")


class WatermarkAlignmentResampling(Recipe):
    """Audit of unmarked, KGW, Gumbel and modified Gumbel, then best of n = 1, 2, 4, 8 marked answers."""

    Config = WatermarkAlignmentResamplingConfig
    config: WatermarkAlignmentResamplingConfig

    def __call__(self, run: Run) -> None:
        self._closed_form(run)
        self._organism(run)
        self._real_text(run)

    def _closed_form(self, run: Run) -> None:
        c = self.config

        def experiment() -> dict[str, Any]:
            import torch

            model, _ = models.load(c.bigram)
            with torch.inference_mode():
                every = torch.arange(model.config.vocab_size)[:, None]
                table = model(input_ids=every).logits[:, -1].float().log_softmax(-1)
            return closed_form.experiment(
                table, c.bigram_prompts, c.bigram_length, run.seed,
                lambda name, done, total: run.progress(f"closed form, {name}", done, total),
            )  # fmt: skip

        result = run.stage("closed-form", experiment)
        organism_report.closed_form_section(run, result)
        for name, passed, detail in closed_form.checks(result):
            run.check(name, passed, detail)

    def _organism(self, run: Run) -> None:
        c = self.config
        model, tokenizer = models.load(c.chat)
        guard, reward = registry.create("guard", c.guard), registry.create("reward", c.reward)
        prompts = organism.read_prompts(models.resolve(c.prompts), c.prompts_per_side, run.seed)
        found = {}
        for name in (organism.UNMARKED, *organism.MARKS):
            raw = run.stage(
                f"audit-{name}",
                lambda name=name: organism.collect(
                    name, model, tokenizer, prompts, guard, reward, c.keys, c.candidates, c.chat_tokens, run.seed,
                    lambda done, total: run.progress(f"audit, {name}", done, total),
                ),
            )  # fmt: skip
            found[name] = {k: np.asarray(v, dtype=float) for k, v in raw.items() if k != "p_document"}
            found[name]["p_document"] = raw["p_document"]
        organism_report.audit_section(run, found, len(prompts.harmful))
        organism_report.resampling_section(run, found, len(prompts.harmful))

    def _real_text(self, run: Run) -> None:
        c = self.config
        if not c.english:
            return
        try:
            model, tokenizer = models.load(c.english)
        except (MissingDependencyError, DataUnavailableError) as error:
            run.section("Real English", f"Left out: {error}")
            return
        results = [
            run.stage(
                f"english-{name}",
                lambda name=name: real_text.speak(
                    name, model, tokenizer, c.english_answers, c.english_tokens, run.seed,
                    lambda done, total: run.progress(f"real English, {name}", done, total),
                ),
            )  # fmt: skip
            for name in real_text.MARKS
        ]
        organism_report.real_text_section(run, results)
