"""The plugin of fairlead-decoding: what it registers and the commands it adds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fairlead.hookspecs import Register, hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def fairlead_decoders(register: Register) -> None:
    """Decoders."""


@hookimpl
def fairlead_rewriters(register: Register) -> None:
    """Rewriters."""
    register(
        "p-aligner", "fairlead_decoding.p_aligner:PAligner", paper="2508.04626",
        summary="a small model rewrites the instruction before a frozen one answers it; learnt from a search over principles",
        tags=("stage.inference_filter", "access.blackbox", "modality.text", "goal.instructions", "goal.values.principles.hhh"),
    )  # fmt: skip


@hookimpl
def fairlead_recipes(register: Register) -> None:
    """Recipes."""
    register(
        "p-aligner", "fairlead_decoding.recipes.p_aligner:PAlignerRecipe", paper="2508.04626",
        summary="does a search over principles find better instructions, and does a small rewriter learn what it finds?",
        tags=("stage.evaluation", "stage.inference_filter", "access.blackbox", "modality.text", "goal.instructions"),
    )  # fmt: skip


@hookimpl
def fairlead_commands(cli: click.Group) -> None:
    """Commands."""
