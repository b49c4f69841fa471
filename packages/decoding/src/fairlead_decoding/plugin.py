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


@hookimpl
def fairlead_recipes(register: Register) -> None:
    """Recipes."""


@hookimpl
def fairlead_commands(cli: click.Group) -> None:
    """Commands."""
