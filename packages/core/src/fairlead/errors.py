"""Errors that a user can act on. What they share: one line that says what was wrong and what would be right.

The command line prints the line without a traceback and leaves with `exit_code`; everything else that is
raised is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FairleadError(Exception):
    """Base of every error that is meant for the user's eyes."""

    exit_code = 2


class ConfigError(FairleadError, ValueError):
    """A setting has a value that its method does not accept; names the field, the value and what is allowed."""


class InputError(FairleadError, ValueError):
    """Data handed to a function (ids, logits, prompts, files) is not what the function works on."""


class UnknownNameError(FairleadError, KeyError):
    """A name that is not registered; carries the nearest names that are."""

    def __init__(self, what: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = sorted(known)
        self.name = name
        self.suggestions = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        if self.suggestions:
            tail = "did you mean " + " or ".join(repr(s) for s in self.suggestions) + "?"
        elif known:
            shown = known[:8]
            tail = f"known: {', '.join(shown)}" + (", ..." if len(known) > len(shown) else "")
        else:
            tail = "none is registered"
        super().__init__(f"unknown {what} {name!r}; {tail}" + (f" {hint}" if hint else ""))

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0])


class DuplicateMethodError(FairleadError):
    """Two plugins register one name of one kind; names both plugins."""


class PluginError(FairleadError):
    """A plugin cannot be imported or registers nonsense; names the plugin, its distribution and the cause."""


class MissingDependencyError(FairleadError, ImportError):
    """Something optional is not installed; says the command that installs it."""


class DataUnavailableError(FairleadError):
    """A data set or model is not to be had here; says where it is and under which licence."""


class ProfileMismatchError(FairleadError, ValueError):
    """Text is about to be checked under other settings than those it was marked with; names each difference."""


class RunExistsError(FairleadError):
    """A run directory holds a finished run (use --force) or one of another configuration."""
