"""A watermark from the command line: its name, settings and key, and its profile beside the text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .. import registry
from ..cli import parse_settings
from ..errors import InputError
from ..files import atomic_write
from ..keys import ENVIRONMENT_VARIABLE, SecretKey
from ..kinds import Watermark, WatermarkProfile


def watermark_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--watermark, --set and --key-file."""
    for option in (
        click.option("--key-file", type=click.Path(path_type=Path), help=f"Key file; default: {ENVIRONMENT_VARIABLE}."),
        click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of the watermark; may be repeated."),
        click.option("--watermark", "name", help="Registered watermark, such as kgw ('fairlead methods --kind watermark')."),
    ):
        function = option(function)
    return function


def build(name: str, settings: tuple[str, ...], key_file: Path | None, vocab_size: int | None, known: dict[str, Any] | None = None) -> Watermark:
    """The watermark; `known` are settings from a profile, which --set overrides."""
    chosen = {k: v for k, v in (known or {}).items() if k != "key"} | parse_settings(settings)
    if "key" in chosen:
        raise InputError(f"--set key: a key on the command line can be read by others; use --key-file or {ENVIRONMENT_VARIABLE}")
    key = SecretKey(key_file) if key_file is not None else SecretKey.from_environment()
    if key is None:
        raise InputError(f"no key: give --key-file or set {ENVIRONMENT_VARIABLE}; 'fairlead watermark new-key PATH' makes one")
    if vocab_size is not None:
        chosen.setdefault("vocab_size", vocab_size)
    mark: Watermark = registry.create("watermark", name, key=key, **chosen)
    return mark


def profile_path(text: Path) -> Path:
    """Where the profile of a file of generations lies."""
    return text.with_name(text.name + ".profile.json")


def save_profile(path: Path, profile: WatermarkProfile) -> None:
    with atomic_write(path) as stream:
        json.dump(vars(profile), stream, indent=1)


def load_profile(path: Path) -> WatermarkProfile:
    """The profile in a file; InputError when it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return WatermarkProfile(**content)
    except FileNotFoundError:
        raise InputError(f"{path}: no such profile") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: is no watermark profile ({str(error).splitlines()[0]})") from None
