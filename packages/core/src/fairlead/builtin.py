"""The core's own plugin: it registers through the same hooks as a stranger's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .hookspecs import Register, hookimpl

if TYPE_CHECKING:
    import click

_SCORES_TEXT = ("stage.decoding", "stage.evaluation", "access.blackbox", "modality.text")
_VALUE = "goal.preferences"


@hookimpl
def fairlead_rewards(register: Register) -> None:
    programmed = (*_SCORES_TEXT, _VALUE)
    learned = ("stage.decoding", "stage.evaluation", "access.blackbox", "modality.reward", "goal.preferences.human_feedback")
    register("callable", "fairlead.rewards.function:CallableReward", summary="any Python function of prompts and responses", tags=programmed)
    register("keyword", "fairlead.rewards.keyword:KeywordReward", summary="weighted counts of words in the response", tags=programmed)
    register("regex", "fairlead.rewards.regex:RegexReward", summary="one where a pattern is found in the response, else zero", tags=programmed)
    register("length", "fairlead.rewards.length:LengthReward", summary="closeness of the response's length to a target", tags=programmed)
    register(
        "readability", "fairlead.rewards.readability:ReadabilityReward",
        summary="Flesch reading ease or Flesch-Kincaid grade of the response, or its distance to a target", tags=programmed,
    )  # fmt: skip
    register(
        "sequence-classifier", "fairlead.rewards.sequence_classifier:SequenceClassifierReward",
        summary="a Hugging Face sequence classifier, scored in packed batches", tags=learned,
    )  # fmt: skip
    register(
        "judge", "fairlead.rewards.judge:JudgeReward", paper="2303.16634",
        summary="a causal language model's odds of yes against no, or its expected score, about the response",
        tags=(
            "stage.decoding", "stage.evaluation", "access.blackbox", "modality.text", "goal.preferences.model_synthetic_feedback",
            "goal_eval.preferences.reward_model",
        ),
    )  # fmt: skip
    register(
        "embedding-similarity", "fairlead.rewards.embedding:EmbeddingReward", paper="1908.10084",
        summary="cosine of the response's sentence embedding with that of the prompt or of reference texts",
        tags=(*_SCORES_TEXT, "goal.preferences.model_synthetic_feedback"),
    )  # fmt: skip
    register(
        "value-head", "fairlead.rewards.value_head:ValueHeadReward", paper="2310.17022",
        summary="a linear head on a causal language model's last hidden state, fitted by ridge regression",
        tags=("stage.decoding", "stage.evaluation", "access.weights", "modality.text", "goal.preferences.human_feedback"),
    )  # fmt: skip
    register("weighted", "fairlead.rewards.weighted:WeightedReward", summary="weighted sum of rewards", tags=programmed)
    register("min", "fairlead.rewards.minimum:MinReward", summary="the smallest of several rewards", tags=programmed)
    register("cached", "fairlead.rewards.cached:CachedReward", summary="remembers the rewards of pairs it has seen", tags=programmed)
    register(
        "calibrated", "fairlead.rewards.calibrated:CalibratedReward", paper="2412.19792",
        summary="quantile of a reward among reference responses to the same prompt, under a transform", tags=programmed,
    )  # fmt: skip


@hookimpl
def fairlead_guards(register: Register) -> None:
    register(
        "refusal-phrases", "fairlead.guards.refusal:RefusalPhrases", paper="2506.04462",
        summary="finds refusals by their phrases, apostrophes normalised",
        tags=("stage.evaluation", "access.blackbox", "modality.text", "goal.values.principles.hhh"),
    )  # fmt: skip


@hookimpl
def fairlead_commands(cli: click.Group) -> None:
    from .commands.detect import detect
    from .commands.generate import generate

    cli.add_command(generate)
    cli.add_command(detect)
