"""What the zoo adds to fairlead: names (zoo:NAME), a reward and a guard of the world, commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fairlead.hookspecs import hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def fairlead_resolve(name: str) -> str | None:
    """zoo:NAME[@SEED] -> a local model folder or data file, built on first use."""
    if not name.startswith("zoo:"):
        return None
    from .catalogue import resolve

    return str(resolve(name))


@hookimpl
def fairlead_rewards(register: Any) -> None:
    """The programmatic reward and the learned one."""
    register(
        "world", "fairlead_zoo.scoring:WorldReward",
        summary="exact reward of the zoo's tiny world, read off prompt and answer",
        tags=("goal.values.principles.hhh", "stage.training", "stage.decoding", "access.blackbox", "modality.text"),
    )  # fmt: skip
    register(
        "world-model", "fairlead_zoo.learned_reward:WorldModelReward",
        summary="small learned reward model of the zoo's world (zoo:reward): ranks well, can be hacked",
        tags=("paradigm.rlhf.reward_modelling", "risk.reward_misspecification", "stage.decoding", "access.weights", "modality.text"),
    )  # fmt: skip


@hookimpl
def fairlead_guards(register: Any) -> None:
    """The programmatic judge."""
    register(
        "world", "fairlead_zoo.scoring:WorldGuard",
        summary="exact labels of the zoo's tiny world, from refuse and correct to sabotage and incoherent",
        tags=("goal.values.principles.hhh", "goal_eval.values.benchmarks.safety_risk", "stage.evaluation", "access.blackbox", "modality.text"),
    )  # fmt: skip


@hookimpl
def fairlead_commands(cli: click.Group) -> None:
    """`fairlead zoo ...`"""
    from .commands import zoo

    cli.add_command(zoo)
