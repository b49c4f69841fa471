"""The plugin of fairlead-decoding: what it registers and the commands it adds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fairlead.hookspecs import Register, hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def fairlead_decoders(register: Register) -> None:
    drawn = ("stage.decoding", "access.logprobs", "modality.text", "goal.preferences")
    for name, factory, paper, summary in (
        ("best-of-n", "best_of_n:BestOfN", "2401.01879", "the answer of n that a reward likes best"),
        ("worst-of-n", "best_of_n:WorstOfN", "2412.19792", "the answer of n that a reward likes least: the adversary"),
        ("soft-best-of-n", "soft_best_of_n:SoftBestOfN", "2404.01730", "one answer of n, drawn with weights exp(reward / alpha)"),
        ("rejection", "rejection:Rejection", "2401.01879", "the first answer whose reward reaches a threshold"),
        ("transfer-q-star", "transfer_q_star:TransferQStar", "2405.20495", "tokens re-weighted by roll-outs of an aligned model"),
        ("controlled-decoding", "controlled_decoding:ControlledDecoding", "2310.17022", "tokens re-weighted by the model's own roll-outs"),
        ("args", "args_search:ARGS", "2402.01694", "tokens re-weighted by the reward of the bare prefix"),
        ("deal", "deal:DeAL", "2402.06147", "search for objectives in words, each token judged after a look-ahead"),
        ("genarm", "genarm:GenARM", "2410.08193", "tokens re-weighted by a reward model that is a language model"),
        ("blockwise", "blockwise:Blockwise", "2310.17022", "sample blocks of tokens, keep the best of n by value"),
    ):
        register(name, f"fairlead_decoding.{factory}", paper=paper, summary=summary, tags=drawn)
    register(
        "speculative", "fairlead_decoding.speculative:Speculative", paper="2403.00858",
        summary="a small draft proposes, the target accepts: the target's law in fewer calls, batches with ragged acceptance",
        tags=("stage.decoding", "access.logprobs", "modality.text", "goal.instructions"),
    )  # fmt: skip


@hookimpl
def fairlead_rewards(register: Register) -> None:
    programmed = ("stage.decoding", "stage.evaluation", "access.blackbox", "modality.text", "goal.preferences")
    register(
        "keyword-coverage", "fairlead_decoding.heuristics:KeywordCoverage", paper="2402.06147", tags=programmed,
        summary="share of the required words that the response has",
    )  # fmt: skip
    register(
        "length-limit", "fairlead_decoding.heuristics:LengthLimit", paper="2402.06147", tags=programmed,
        summary="keeps a response within a number of words",
    )  # fmt: skip


@hookimpl
def fairlead_rewriters(register: Register) -> None:
    """Rewriters."""
    register(
        "guide-align", "fairlead_decoding.guide_align:GuideAlign", paper="2403.11838",
        summary="puts the rules of a guideline library that fit an input before it, found by a small dual encoder",
        tags=("stage.inference_filter", "access.blackbox", "modality.text", "goal.values.principles"),
    )  # fmt: skip
    register(
        "p-aligner", "fairlead_decoding.p_aligner:PAligner", paper="2508.04626",
        summary="a small model rewrites the instruction before a frozen one answers it; learnt from a search over principles",
        tags=("stage.inference_filter", "access.blackbox", "modality.text", "goal.instructions", "goal.values.principles.hhh"),
    )  # fmt: skip


@hookimpl
def fairlead_recipes(register: Register) -> None:
    register(
        "guide-align", "fairlead_decoding.recipes.guide_align:GuideAlignRecipe", paper="2403.11838",
        summary="does a small retriever learn which rules an input needs, and do they reach the prompt?",
        tags=("stage.evaluation", "stage.inference_filter", "access.blackbox", "modality.text", "goal.values.principles"),
    )  # fmt: skip
    register(
        "p-aligner", "fairlead_decoding.recipes.p_aligner:PAlignerRecipe", paper="2508.04626",
        summary="does a search over principles find better instructions, and does a small rewriter learn what it finds?",
        tags=("stage.evaluation", "stage.inference_filter", "access.blackbox", "modality.text", "goal.instructions"),
    )  # fmt: skip
    register(
        "bon-asymptotics", "fairlead_decoding.recipes.bon_asymptotics:BonAsymptotics", paper="2404.01730",
        summary="best-of-n against the tilt that is optimal at its KL divergence: exact, bounded, estimated, and for long answers",
        tags=("stage.evaluation", "stage.decoding", "access.logprobs", "modality.text", "modality.reward", "paradigm.sft_rlhf_bridge"),
    )  # fmt: skip
    register(
        "deal", "fairlead_decoding.recipes.deal:DeALRecipe", paper="2402.06147",
        summary="search with a look-ahead for required words: against none, against re-ranking, and under two objectives",
        tags=("stage.evaluation", "stage.decoding", "access.logprobs", "modality.text", "goal.preferences"),
    )  # fmt: skip
    register(
        "draft-alignment", "fairlead_decoding.recipes.draft_alignment:DraftAlignment", paper="2403.00858",
        summary="a draft trained on the refusal rate itself against KL: tokens accepted, tokens a call, theory beside counts",
        tags=("stage.evaluation", "stage.training", "stage.decoding", "access.gradients", "modality.text", "goal.instructions"),
    )  # fmt: skip
    register(
        "infalign", "fairlead_decoding.recipes.infalign:InfAlign", paper="2412.19792",
        summary="train on a transformed, calibrated reward for the way the model is served: best-of-n, or an attacker's worst-of-n",
        tags=("stage.evaluation", "stage.training", "stage.decoding", "access.gradients", "modality.text", "paradigm.rlhf", "risk.jailbreak"),
    )  # fmt: skip
    register(
        "transfer-q-star", "fairlead_decoding.recipes.transfer_q_star:TransferQStarRecipe", paper="2405.20495",
        summary="values of an aligned model against values of the model itself, exact trees and small models",
        tags=("stage.evaluation", "stage.decoding", "access.logprobs", "modality.text", "goal.preferences"),
    )  # fmt: skip
    register(
        "compare-decoders", "fairlead_decoding.recipes.compare_decoders:CompareDecoders", paper="2404.01730",
        summary="the frontier of decoders: reward against divergence, and what each of them costs",
        tags=("stage.evaluation", "stage.decoding", "access.logprobs", "modality.text", "goal.preferences"),
    )  # fmt: skip


@hookimpl
def fairlead_commands(cli: click.Group) -> None:
    """Commands."""
    from .commands import compare_decoders
    from .serving.command import serve

    cli.add_command(serve)
    cli.add_command(compare_decoders)
