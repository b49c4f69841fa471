"""`fairlead compare-decoders`: the recipe of that name with its settings as options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("compare-decoders")
@click.option("--model", default="enumerable", show_default=True, help="Folder, hub id or zoo:NAME; enumerable: a tiny model with the exact ceiling.")
@click.option("--prompts", default="", help="JSONL, Parquet or text file of prompts, for a model of your own.")
@click.option("--reward", default=None, help="Registered reward that guides, for a model of your own.")
@click.option("--held-out", default=None, help="Registered reward that only judges.")
@click.option("--decoder", "decoders", multiple=True, metavar="NAME[:SETTING=VALUE,...]", help="A decoder and its settings; may be repeated. Default: a sweep over all families.")
@click.option("--samples", type=int, default=None, help="Answers of each decoder (enumerable), or prompts taken from the file.")
@click.option("--max-new-tokens", type=int, default=None)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Run directory (default: runs/compare-decoders-seedN).")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
@click.option("--force", is_flag=True, help="Replace a finished run.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare_decoders(
    model: str, prompts: str, reward: str | None, held_out: str | None, decoders: tuple[str, ...], samples: int | None,
    max_new_tokens: int | None, seed: int, out: Path | None, resume: bool, force: bool, as_json: bool,
) -> int:  # fmt: skip
    """Draw the frontier of a set of decoders: reward, divergence, diversity, held-out reward, tokens, calls, seconds.

    Example: fairlead compare-decoders --decoder best-of-n:n=4 --decoder transfer-q-star:alpha=0.2,mode=sample,top_k=5
    """
    from fairlead import registry
    from fairlead.cli import run_recipe

    given: dict[str, Any] = {"model": model, "prompts": prompts, "reward": reward, "held_out": held_out, "samples": samples, "max_new_tokens": max_new_tokens}
    settings = {name: value for name, value in given.items() if value is not None}
    if decoders:
        settings["decoders"] = [_decoder(text) for text in decoders]
    method = registry.get("recipe", "compare-decoders")
    return run_recipe(method.load()(**settings), method, out or Path("runs") / f"compare-decoders-seed{seed}", seed, resume, force, as_json)


def _decoder(text: str) -> dict[str, Any]:
    """{"name": ..., settings} of NAME[:SETTING=VALUE,...]; an unknown name is said here."""
    from fairlead import registry
    from fairlead.cli import parse_settings

    name, _, rest = text.partition(":")
    registry.get("decoder", name)
    return {"name": name, **parse_settings(tuple(part for part in rest.split(",") if part))}
