"""P-Aligner: a small model rewrites the instruction, a frozen one answers it (arXiv 2508.04626).

The rewriter is asked, between markers, for an instruction of the same intent that will be answered better, and its text is
read between markers; output that cannot be read so, or that looks like an answer, leaves the prompt as it was and says so
in the provenance. Its training rows come from `principle_search`: SFT on the best text of every tree (`train_rewriter`, or
`sft_rows` for another trainer), then DPO on best against worst (`preference_rows`). The single-step model that replaces a
paid improver learns from `step_rows` and is used through `model_improver`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator

from fairlead import models
from fairlead.config import MethodConfig
from fairlead.errors import InputError, MissingDependencyError
from fairlead.generation import encode, generate
from fairlead.kinds import Rewrite, Rewriter

from .principle_search import Improver, Principle, Responder

IGNORE = -100
SHORT = 400
"""A rewrite of at most this many characters is never too long."""


class RewriteTemplate(MethodConfig):
    """Wording and markers of the rewriter's prompts and replies; training and use must share one."""

    request: str = Field(
        default="You are an expert prompt engineer. Rewrite the instruction between the markers so that a language model answers it "
        "better. Keep what it asks for; return it unchanged if nothing needs to change.\n\n{raw}\n\n"
        "Give the optimised instruction between its markers and nothing else.",
        description="the request; {raw} stands for the marked instruction",
    )
    step_request: str = Field(
        default="You are an expert prompt engineer. Improve the instruction between the markers by {principle}\n\n{raw}\n\n"
        "Give the optimised instruction between its markers and nothing else.",
        description="the request of the single-step model; {principle} stands for what the principle says",
    )
    raw_start: str = Field(default="[Instruction Start]", min_length=1, description="marker before the raw instruction")
    raw_end: str = Field(default="[Instruction End]", min_length=1, description="marker after the raw instruction")
    lead_in: str = Field(default="Here is the optimised instruction:", description="first line of every reply")
    start: str = Field(default="[Optimised Start]", min_length=1, description="marker before the optimised text")
    end: str = Field(default="[Optimised End]", min_length=1, description="marker after the optimised text")

    @field_validator("request", "step_request")
    @classmethod
    def _has_a_place(cls, value: str) -> str:
        if "{raw}" not in value:
            raise ValueError("must contain {raw}, the place of the marked instruction")
        return value

    @model_validator(mode="after")
    def _markers_differ(self) -> RewriteTemplate:
        markers = (self.raw_start, self.raw_end, self.start, self.end)
        if any(a in b for i, a in enumerate(markers) for j, b in enumerate(markers) if i != j):
            raise ValueError("the four markers must differ, and none may contain another")
        return self

    def holds_marker(self, text: str) -> bool:
        """Whether a text contains one of the markers, so that it cannot be marked without doubt."""
        return any(marker in text for marker in (self.raw_start, self.raw_end, self.start, self.end))

    def prompt(self, instruction: str, principle: str | None = None) -> str:
        """What the rewriter is asked; with a principle, the single-step request. InputError for a text with a marker."""
        marked = f"{self.raw_start}\n{self._plain(instruction)}\n{self.raw_end}"
        if principle is None:
            return self.request.replace("{raw}", marked)
        return self.step_request.replace("{principle}", principle).replace("{raw}", marked)

    def render(self, text: str) -> str:
        """The reply that carries a text; InputError for a text that contains a marker."""
        lead = f"{self.lead_in}\n" if self.lead_in else ""
        return f"{lead}{self.start}\n{self._plain(text)}\n{self.end}"

    def parse(self, reply: str) -> str | None:
        """The text between the markers, stripped; None unless each stands there once, in order, with text between."""
        if reply.count(self.start) != 1 or reply.count(self.end) != 1:
            return None
        _, _, rest = reply.partition(self.start)
        text, found, _ = rest.partition(self.end)
        return text.strip() or None if found else None

    def _plain(self, text: str) -> str:
        if self.holds_marker(text):
            raise InputError(f"instruction {text!r:.60}: contains a marker of the template; leave it out or choose other markers")
        return text.strip()


class PAlignerConfig(MethodConfig):
    """model: a folder, hub id, zoo: name, or a Hugging Face model with its tokenizer."""

    model: Any = Field(None, description="the rewriter: a folder, hub id or zoo: name, or a Hugging Face causal LM")
    tokenizer: Any = Field(None, description="tokenizer of a model that is given as an object")
    max_new_tokens: int = Field(512, ge=1, description="longest reply in tokens (the paper allows 4096)")
    max_growth: float = Field(
        10.0, ge=1, description="a rewrite this many times longer than its prompt, beyond 400 characters, counts as an answer"
    )
    batch_size: int = Field(32, ge=1, description="prompts at a time")
    template: RewriteTemplate | None = Field(None, description="wording and markers; none: the default ones")


class PAligner(Rewriter):
    """One greedy pass of a trained rewriter."""

    Config = PAlignerConfig
    config: PAlignerConfig
    name = "p-aligner"

    def setup(self) -> None:
        c = self.config
        if c.model is None:
            raise InputError("PAligner: model is required, a folder, hub id or zoo: name, or a Hugging Face model")
        if isinstance(c.model, (bool, int, float, Mapping, list, tuple)):
            raise InputError(f"PAligner: model must be a name or a Hugging Face model, got a {type(c.model).__name__}")
        self.template = c.template or RewriteTemplate()
        if isinstance(c.model, torch.nn.Module):
            if c.tokenizer is None:
                raise InputError("PAligner: tokenizer is required with a model that is given as an object")
            self.model, self.tokenizer, self.source = c.model, c.tokenizer, type(c.model).__name__
        else:
            self.model, own = models.load(c.model)
            self.tokenizer, self.source = c.tokenizer or own, str(c.model)

    def __call__(self, prompts: Sequence[str], *, seed: int = 0) -> list[Rewrite]:
        """One Rewrite per prompt. provenance: {"rewriter", "model", "fallback", "reason"}: fallback is True where the
        prompt was kept because the reply could not be used, and reason says why. Greedy: the seed changes nothing.

        InputError for a prompt that is no string or empty.
        """
        check_prompts(prompts)
        open_ = [i for i, prompt in enumerate(prompts) if not self.template.holds_marker(prompt)]
        asked = [_as_chat(self.tokenizer, self.template.prompt(prompts[i])) for i in open_]
        replies = generate(
            self.model, self.tokenizer, asked, max_new_tokens=self.config.max_new_tokens, temperature=0, seed=seed,
            batch_size=self.config.batch_size,
        )  # fmt: skip
        found = {i: group[0].text for i, group in zip(open_, replies, strict=True)}
        return [self._read(prompt, found.get(i)) for i, prompt in enumerate(prompts)]

    def _read(self, prompt: str, reply: str | None) -> Rewrite:
        text = self.template.parse(reply or "")
        reason = ""
        if reply is None:
            reason = "the prompt contains a marker"
        elif text is None:
            reason = "no text between one pair of markers"
        elif len(text) > max(SHORT, self.config.max_growth * len(prompt)):
            reason = f"{len(text)} characters for a prompt of {len(prompt)}: taken for an answer"
        provenance = {"rewriter": self.name, "model": self.source, "fallback": bool(reason), "reason": reason}
        return Rewrite(prompt if reason or text is None or text == prompt.strip() else text, prompt, provenance)


def check_prompts(prompts: Sequence[str]) -> None:
    """InputError unless every prompt is text that is not empty."""
    if isinstance(prompts, str):
        raise InputError("prompts: must be a list of strings, got one string")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputError(f"prompt {i}: must be a string, got a {type(prompt).__name__}")
        if not prompt.strip():
            raise InputError(f"prompt {i}: is empty; give some text")


def rewrite_last_turn(rewriter: Rewriter, chats: Sequence[Sequence[Mapping[str, str]]], *, seed: int = 0) -> list[list[dict[str, str]]]:
    """Chats whose last user turn is rewritten, and nothing else; InputError for a chat that does not end with one."""
    for i, chat in enumerate(chats):
        if not chat or chat[-1].get("role") != "user":
            raise InputError(f"chat {i}: must end with a user turn")
    rewrites = rewriter([chat[-1]["content"] for chat in chats], seed=seed)
    return [[*map(dict, chat[:-1]), {**chat[-1], "content": r.prompt}] for chat, r in zip(chats, rewrites, strict=True)]


def sft_rows(pairs: Sequence[Mapping[str, Any]], template: RewriteTemplate | None = None) -> list[dict[str, str]]:
    """{prompt, completion} rows from `best_worst_pairs`: the raw instruction to the best text. Rows with a marker in a
    text are left out."""
    t = template or RewriteTemplate()
    return [{"prompt": t.prompt(p["raw"]), "completion": t.render(p["chosen"])} for p in _markable(t, pairs, "raw", "chosen")]


def preference_rows(pairs: Sequence[Mapping[str, Any]], template: RewriteTemplate | None = None) -> list[dict[str, str]]:
    """{prompt, chosen, rejected} rows for DPO, from `best_worst_pairs`; rows with a marker in a text are left out."""
    t = template or RewriteTemplate()
    return [
        {"prompt": t.prompt(p["raw"]), "chosen": t.render(p["chosen"]), "rejected": t.render(p["rejected"])}
        for p in _markable(t, pairs, "raw", "chosen", "rejected")
    ]


def step_rows(transitions: Sequence[Mapping[str, Any]], template: RewriteTemplate | None = None) -> list[dict[str, str]]:
    """{prompt, completion} rows for the single-step model, from `positive_transitions`."""
    t = template or RewriteTemplate()
    return [
        {"prompt": t.prompt(r["instruction"], r["content"]), "completion": t.render(r["improved"])}
        for r in _markable(t, transitions, "instruction", "improved")
    ]


def _markable(template: RewriteTemplate, rows: Sequence[Mapping[str, Any]], *fields: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if not any(template.holds_marker(row[f]) for f in fields)]


def with_finished(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The pairs, and after them one row per pair whose raw text is its best one already, to be left as it is: without
    such rows the rewriter has never seen a finished text and goes on adding to it."""
    return [dict(p) for p in pairs] + [{**p, "raw": p["chosen"]} for p in pairs if p["raw"] != p["chosen"]]


def model_improver(
    model: Any, tokenizer: Any, template: RewriteTemplate | None = None, *, max_new_tokens: int = 512, batch_size: int = 32
) -> Improver:
    """An improver for `PrincipleSearch` from a causal LM (the trained single-step model, or one that is only prompted):
    greedy, None where no text stands between the markers."""
    t = template or RewriteTemplate()

    def improve(texts: list[str], principles: list[Principle]) -> list[str | None]:
        fits = [i for i, text in enumerate(texts) if not t.holds_marker(text)]
        asked = [_as_chat(tokenizer, t.prompt(texts[i], principles[i].content)) for i in fits]
        made = generate(model, tokenizer, asked, max_new_tokens=max_new_tokens, temperature=0, batch_size=batch_size)
        found = {i: t.parse(group[0].text) for i, group in zip(fits, made, strict=True)}
        return [found.get(i) for i in range(len(texts))]

    return improve


def model_responder(
    model: Any, tokenizer: Any, *, max_new_tokens: int = 1024, temperature: float = 1.0, seed: int = 0, batch_size: int = 64
) -> Responder:
    """A responder for `PrincipleSearch`: n sampled answers of a causal LM, each call with fresh noise."""
    asked_before = 0

    def respond(texts: list[str], n: int) -> list[list[str]]:
        nonlocal asked_before
        prompts = [_as_chat(tokenizer, text) for text in texts]
        made = generate(
            model, tokenizer, prompts, n=n, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            first_index=asked_before, batch_size=batch_size,
        )  # fmt: skip
        asked_before += len(texts)
        return [[g.text for g in group] for group in made]

    return respond


def _as_chat(tokenizer: Any, text: str) -> Any:
    """A user turn where the tokenizer has a chat template, else the plain text."""
    return [{"role": "user", "content": text}] if getattr(tokenizer, "chat_template", None) else text


def train_rewriter(
    model: Any, tokenizer: Any, pairs: Sequence[Mapping[str, Any]], *, template: RewriteTemplate | None = None,
    steps: int = 500, batch_size: int = 64, learning_rate: float = 2e-5, warmup_steps: int = 0, weight_decay: float = 0.0,
    max_length: int = 4096, seed: int = 0, progress: Callable[[int, int], None] | None = None, **arguments: Any,
) -> list[float]:  # fmt: skip
    """SFT of the rewriter, in place: transformers' Trainer on the chosen texts, loss on the reply alone.

    pairs: rows of `best_worst_pairs` ({raw, chosen, ...}). The rate falls as a cosine. `arguments` are further
    TrainingArguments (bf16, gradient_accumulation_steps, output_dir, ...). Returns the mean training loss per logging
    interval of a tenth of the steps; the model is in eval mode afterwards.
    InputError without a usable pair; MissingDependencyError without accelerate, which the Trainer needs.
    """
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise MissingDependencyError("train_rewriter: transformers' Trainer needs accelerate; pip install accelerate") from None
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    rows = [_training_row(tokenizer, row, max_length) for row in sft_rows(pairs, template)]
    examples = [row for row in rows if row is not None]
    if not examples:
        raise InputError("train_rewriter: no pair is left to train on; each needs raw and chosen without markers, within max_length")

    class Tell(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if progress is not None:
                progress(state.global_step, steps)

    with tempfile.TemporaryDirectory() as scratch:
        settings = {
            "output_dir": scratch, "max_steps": steps, "per_device_train_batch_size": batch_size, "learning_rate": learning_rate,
            "lr_scheduler_type": "cosine", "warmup_steps": warmup_steps, "weight_decay": weight_decay, "seed": seed,
            "logging_steps": max(1, steps // 10), "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "remove_unused_columns": False, "use_cpu": next(model.parameters()).device.type == "cpu",
            "dataloader_pin_memory": False,
        }  # fmt: skip
        trainer = Trainer(
            model=model, args=TrainingArguments(**{**settings, **arguments}), train_dataset=examples,
            data_collator=_collator(tokenizer.pad_token_id or 0), callbacks=[Tell()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    model.eval()
    return losses


def _training_row(tokenizer: Any, row: Mapping[str, str], max_length: int) -> dict[str, list[int]] | None:
    """Ids and labels of one row, exactly as `PAligner` will put the prompt; None when it is too long."""
    prompt = encode(tokenizer, _as_chat(tokenizer, row["prompt"])).tolist()
    reply = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        reply = [*reply, tokenizer.eos_token_id]
    if len(prompt) + len(reply) > max_length:
        return None
    return {"input_ids": prompt + reply, "labels": [IGNORE] * len(prompt) + reply}


def _collator(pad_token_id: int) -> Callable[[list[dict[str, list[int]]]], dict[str, torch.Tensor]]:
    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
        labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            size = len(row["input_ids"])
            ids[i, :size], labels[i, :size], mask[i, :size] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"]), 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    return collate
