"""The plugin of fairlead-watermark: what it registers and the commands it adds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fairlead.hookspecs import Register, hookimpl

if TYPE_CHECKING:
    import click

_MARK = ("stage.decoding", "access.logprobs", "modality.text", "paradigm.governance")
_PAPER = "2506.04462"


@hookimpl
def fairlead_watermarks(register: Register) -> None:
    register(
        "kgw", "fairlead_watermark.kgw:KGW", paper="2301.10226", tags=_MARK,
        summary="green lists: a logit bonus for a keyed share of the vocabulary, exact binomial test",
    )  # fmt: skip
    register(
        "gumbel", "fairlead_watermark.gumbel:Gumbel", paper="2307.15593", tags=_MARK,
        summary="keyed Gumbel-max sampling, distortion-free per token, exact gamma test",
    )  # fmt: skip
    register(
        "modified-gumbel", "fairlead_watermark.modified_gumbel:ModifiedGumbel", paper=_PAPER, tags=_MARK,
        summary="samples from the keyed Gumbel scores, so that candidates differ",
    )  # fmt: skip


@hookimpl
def fairlead_decoders(register: Register) -> None:
    register(
        "alignment-resampling", "fairlead_watermark.alignment_resampling:AlignmentResampling", paper=_PAPER,
        summary="best of n marked answers under a reward: repairs what the mark costs, keeps the mark",
        tags=("stage.decoding", "access.logprobs", "modality.text", "goal.preferences", "paradigm.sft_rlhf_bridge"),
    )  # fmt: skip


@hookimpl
def fairlead_recipes(register: Register) -> None:
    register(
        "watermark-alignment-resampling",
        "fairlead_watermark.recipes.watermark_alignment_resampling:WatermarkAlignmentResampling", paper=_PAPER,
        summary="what a watermark does to a model's alignment, and how resampling repairs it",
        tags=("stage.evaluation", "stage.decoding", "access.logprobs", "modality.text", "goal.values.principles.hhh"),
    )  # fmt: skip


@hookimpl
def fairlead_commands(cli: click.Group) -> None:
    import click

    @cli.group()
    def watermark() -> None:
        """Keys of watermarks."""

    @watermark.command("new-key")
    @click.argument("path", type=click.Path(path_type=Path))
    def new_key(path: Path) -> None:
        """Write a fresh random key to PATH, readable by its owner only; an existing file is never overwritten."""
        from fairlead.keys import new_key_file

        made = new_key_file(path)
        click.echo(f"{path}: new key {made.fingerprint}")
