"""What generate and detect share: a watermark from the command line, and the profile beside the text."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import registry
from ..cli import parse_settings
from ..errors import ConfigError, InputError
from ..files import atomic_write
from ..keys import ENVIRONMENT_VARIABLE, SecretKey
from ..kinds import Watermark, WatermarkProfile

if TYPE_CHECKING:
    from ..records import Skipped


def watermark_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--watermark, --set and --key-file."""
    for option in (
        click.option("--key-file", type=click.Path(path_type=Path), help=f"Key file; default: {ENVIRONMENT_VARIABLE}."),
        click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of the watermark; may be repeated."),
        click.option("--watermark", "name", help="Registered watermark, such as kgw ('fairlead methods --kind watermark')."),
    ):
        function = option(function)
    return function


def bad_lines_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """--bad-lines: what a broken input line does."""
    return click.option(
        "--bad-lines", type=click.Choice(["report", "skip", "stop"]), default="report", show_default=True,
        help="A broken input line: report it and leave with 2 after the good ones, skip it, or stop there.",
    )(function)  # fmt: skip


def build(
    name: str, settings: tuple[str, ...], key_file: Path | None, vocab_size: int | None, known: dict[str, Any] | None = None
) -> Watermark:
    """The watermark; `known` are settings from a profile, which --set overrides."""
    method = registry.get("watermark", name)
    chosen = {k: v for k, v in (known or {}).items() if k != "key"} | parse_settings(settings)
    if "key" in chosen:
        raise InputError(f"--set key: a key on the command line can be read by others; use --key-file or {ENVIRONMENT_VARIABLE}")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        key = SecretKey(key_file) if key_file is not None else SecretKey.from_environment()
    for warning in told:
        click.echo(f"warning: {warning.message}", err=True)
    if key is None:
        raise InputError(f"no key: give --key-file or set {ENVIRONMENT_VARIABLE}; 'fairlead watermark new-key PATH' makes one")
    if vocab_size is not None:
        chosen.setdefault("vocab_size", vocab_size)
    if "vocab_size" not in chosen:
        raise ConfigError("vocab_size: is unknown; give --model, --profile or --set vocab_size=N")
    mark: Watermark = method.load()(key=key, **chosen)
    return mark


def profile_path(text: Path) -> Path:
    """Where the profile of a file of generations lies."""
    return text.with_name(text.name + ".profile.json")


def save_profile(path: Path, profile: WatermarkProfile | None, generation: dict[str, Any]) -> None:
    """Save what detection and resuming need; the key is there as a fingerprint only."""
    content = {"scheme": None} if profile is None else vars(profile)
    with atomic_write(path) as stream:
        json.dump({**content, "generation": generation}, stream, indent=1, ensure_ascii=False)


def load_profile(path: Path) -> tuple[WatermarkProfile | None, dict[str, Any]]:
    """(the profile, None for unmarked text; how the text was generated); InputError when the file is no profile."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        generation = content.pop("generation", {})
        return (None if content.get("scheme") is None else WatermarkProfile(**content)), dict(generation)
    except FileNotFoundError:
        raise InputError(f"{path}: no such profile") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: is no watermark profile ({str(error).splitlines()[0]})") from None


def report_skipped(skipped: Skipped, source: str, bad_lines: str) -> None:
    """Name broken lines on stderr; under "report" they make the command fail at its end."""
    for line in skipped.lines:
        click.echo(f"skipped: {line}", err=True)
    if skipped.count and bad_lines == "report":
        lines = "line was" if skipped.count == 1 else "lines were"
        raise InputError(f"{source}: {skipped.count} broken {lines} left out, the good ones are done; first: {skipped.lines[0]}")
