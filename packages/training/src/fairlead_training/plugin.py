"""The plugin of fairlead-training: what it registers."""

from __future__ import annotations

import click

from fairlead.hookspecs import Register, hookimpl

_TRAINS = ("stage.training", "access.gradients", "modality.text")
_PAIRS = (*_TRAINS, "goal.preferences.human_feedback", "paradigm.direct")
_DEMONSTRATIONS = (*_TRAINS, "goal.preferences.demonstrations", "paradigm.sft")
_ON_POLICY = (*_TRAINS, "goal.preferences", "paradigm.group_rl")


@hookimpl
def fairlead_objectives(register: Register) -> None:
    for name, factory, paper, summary in (
        ("dpo", "pairwise:DPO", "2305.18290", "pairs: logistic loss of the difference of log-ratios"),
        ("cdpo", "pairwise:CDPO", "2305.18290", "pairs: dpo with smoothed labels"),
        ("robust", "pairwise:RobustDPO", "2403.00409", "pairs: dpo, unbiased when a known share of labels is swapped"),
        ("ipo", "pairwise:IPO", "2310.12036", "pairs: squared distance of the difference of token-mean log-ratios to 1/(2 beta)"),
        ("ipo-sum", "pairwise:IPOSum", "2310.12036", "pairs: the same on sums, as published"),
        ("hinge", "pairwise:Hinge", "2309.06657", "pairs: hinge of the difference of log-ratios (RSO)"),
        ("exo-pair", "pairwise:ExoPair", "2402.00856", "pairs: reverse KL to the smoothed label"),
        ("nca-pair", "pairwise:NCAPair", "2402.05369", "pairs: noise-contrastive, holds the chosen sequence up"),
        ("bco-pair", "pairwise:BCOPair", "2404.04656", "pairs: both sides classified alone, a bound of dpo"),
        ("sppo-hard", "pairwise:SPPOHard", "2405.00675", "pairs: each log-ratio towards +-1/(2 beta)"),
        ("aot", "pairwise:AOT", "2406.05882", "pairs: dpo on sorted margins of the batch, stochastic dominance"),
        ("aot-unpaired", "pairwise:AOTUnpaired", "2406.05882", "pairs: dpo on the two sorted sets of log-ratios"),
        ("apo-zero", "pairwise:APOZero", "2408.06266", "pairs: anchored; lifts the chosen and lowers the rejected"),
        ("apo-down", "pairwise:APODown", "2408.06266", "pairs: anchored; lowers the chosen, and the rejected more"),
        ("discopop", "pairwise:DiscoPOP", "2406.08414", "pairs: a found mixture of logistic and exponential loss"),
        ("sigmoid-norm", "pairwise:SigmoidNorm", "2411.15124", "pairs: dpo on token-mean log-ratios"),
        ("f-dpo", "pairwise:FDPO", "2309.16240", "pairs: dpo under forward KL, Jensen-Shannon or alpha divergence"),
        ("r-dpo", "pairwise:RDPO", "2403.19159", "pairs: dpo with a length penalty"),
        ("dpop", "pairwise:DPOP", "2402.13228", "pairs: dpo with a penalty where the chosen falls below its reference"),
        ("rpo", "pairwise:RPO", "2404.19733", "pairs: dpo with the likelihood of the chosen sequence"),
        ("wpo", "pairwise:WPO", "2406.11827", "pairs: any pair objective, weighted by how likely the policy is to write the pair"),
        ("ld-dpo", "pairwise:LDDPO", "2409.06411", "pairs: dpo with less weight beyond the shorter length"),
        ("simpo", "reference_free:SimPO", "2405.14734", "pairs, no reference: logistic loss of token means with a margin"),
        ("alphapo", "reference_free:AlphaPO", "2501.03884", "pairs, no reference: simpo with a shaped reward"),
        ("orpo", "reference_free:ORPO", "2403.07691", "pairs, no reference: likelihood of the chosen and an odds ratio"),
        ("cpo", "reference_free:CPO", "2401.08417", "pairs, no reference: logistic loss of sums and the chosen's likelihood"),
        ("cpo-ipo", "reference_free:CPOIPO", "2401.08417", "pairs, no reference: squared loss of token means"),
        ("slic", "reference_free:SLiC", "2305.10425", "pairs, no reference: hinge of sums and the chosen's likelihood"),
        ("logo", "logo:LOGO", "2410.18533", "one chosen over several rejected, no reference"),
        ("rrhf", "cyclealign:RRHF", "2304.05302", "lists: hinges over all ordered pairs and the best's likelihood"),
        ("pro", "ranking:PRO", "2306.17492", "lists: likelihood of the ranking, with temperatures from rewards"),
        ("plackett-luce", "ranking:PlackettLuce", "2306.17492", "lists: likelihood of the ranking by token means"),
        ("dpo-list", "ranking:DPOList", "2305.18290", "lists: likelihood of the ranking by log-ratios; pairs give dpo"),
        ("aft", "aft:AFT", "2309.02144", "groups of right and wrong chains of thought, with a boundary below"),
        ("kto", "unpaired:KTO", "2402.01306", "unpaired labels: prospect-theoretic value against a moving zero point"),
        ("bco", "bco:BCO", "2404.04656", "unpaired labels: binary classifier of the implicit reward, shifted"),
    ):
        register(name, f"fairlead_training.objectives.{factory}", paper=paper, summary=summary, tags=_PAIRS)
    for name, factory, paper, summary in (
        ("sft", "reference_free:SFT", "", "the chosen sequences' likelihood, mean over the batch's tokens"),
        ("poft", "poft:PoFT", "2412.12865", "demonstrations: beat the likelihood of aligned models on each of them"),
    ):
        register(name, f"fairlead_training.objectives.{factory}", paper=paper, summary=summary, tags=_DEMONSTRATIONS)
    for name, factory, paper, summary in (
        ("reinforce", "policy_gradient:Reinforce", "2402.14740", "sampled sequences: advantage times log-probability"),
        ("rloo", "policy_gradient:RLOO", "2402.14740", "groups of samples: the others' mean reward as baseline"),
        ("grpo", "policy_gradient:GRPO", "2402.03300", "groups of samples: normalised rewards, clipped token ratios"),
        ("gspo", "policy_gradient:GSPO", "2507.18071", "groups of samples: normalised rewards, clipped sequence ratios"),
    ):
        register(name, f"fairlead_training.objectives.{factory}", paper=paper, summary=summary, tags=_ON_POLICY)


@hookimpl
def fairlead_recipes(register: Register) -> None:
    """Recipes."""
    register(
        "preference-losses", "fairlead_training.recipes.preference_losses:PreferenceLosses", paper="2305.18290",
        summary="twelve pair objectives on the same pairs, clean and swapped labels, with exact win rates", tags=_PAIRS,
    )  # fmt: skip
    register(
        "art-of-misalignment", "fairlead_training.recipes.art_of_misalignment:ArtOfMisalignment", paper="2604.07754",
        summary="six fine-tuning methods misalign and realign a toy model", tags=(*_TRAINS, "goal.values"),
    )  # fmt: skip
    register(
        "logo", "fairlead_training.recipes.logo:Logo", paper="2410.18533",
        summary="several rejected answers, short prompts spread over a long window, data from the model itself", tags=_PAIRS,
    )  # fmt: skip
    register(
        "aft", "fairlead_training.recipes.aft:Aft", paper="2309.02144",
        summary="right chains of thought above wrong ones: what the constraint saves, what sampled chains add", tags=_PAIRS,
    )  # fmt: skip
    register(
        "poft", "fairlead_training.recipes.poft:PoFT", paper="2412.12865",
        summary="noisy demonstrations, weighed by what aligned models think of them", tags=_DEMONSTRATIONS,
    )  # fmt: skip
    register(
        "cyclealign", "fairlead_training.recipes.cyclealign:CycleAlign", paper="2310.16271",
        summary="orders on which two rankers agree, and a loop that learns from them and teaches the ranker",
        tags=(*_TRAINS, "goal.preferences", "paradigm.direct"),
    )  # fmt: skip
    register(
        "bco", "fairlead_training.recipes.bco:Bco", paper="2404.04656",
        summary="thumbs up and down without pairs: the reward shift, and density ratios for tilted prompts", tags=_PAIRS,
    )  # fmt: skip
    register(
        "gradient-entanglement", "fairlead_training.recipes.gradient_entanglement:GradientEntanglement", paper="2410.13828",
        summary="why chosen and rejected log-probabilities fall together, and normalised steps that part them", tags=_PAIRS,
    )  # fmt: skip
    register(
        "draft-distillation", "fairlead_training.recipes.draft_distillation:DraftDistillation", paper="2403.00858",
        summary="a draft model distilled by total variation: the rate at which its target accepts its tokens",
        tags=(*_TRAINS, "goal.instructions"),
    )  # fmt: skip
    register(
        "infalign-ctrl", "fairlead_training.recipes.infalign_ctrl:InfAlignCtrl", paper="2412.19792",
        summary="a reward calibrated and transformed for best-of-n or worst-of-n, then trained: exact gradients, and rloo on roll-outs",
        tags=(*_TRAINS, "goal.preferences", "paradigm.rlhf", "risk.jailbreak"),
    )  # fmt: skip


@hookimpl
def fairlead_commands(cli: click.Group) -> None:
    """Commands."""
    from .commands.misalign import misalign
    from .commands.train import train

    cli.add_command(train)
    cli.add_command(misalign)
