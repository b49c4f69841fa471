"""The one plugin manager: finds plugins by the entry-point group `fairlead`, loads them lazily, reports broken ones.

A plugin that fails to import or registers nonsense is named with its distribution and the cause; the rest goes on.
FAIRLEAD_PLUGINS=a,b loads only these; FAIRLEAD_DISABLE=c,d leaves these out. What is registered lives in `registry`.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pluggy

from . import hookspecs
from .errors import DuplicateMethodError, FairleadError, PluginError
from .registry import KINDS, Method, Registry

if TYPE_CHECKING:
    import click

GROUP = "fairlead"
log = logging.getLogger("fairlead")
_HOOK_OF_KIND = {kind: f"fairlead_{kind}s" for kind in KINDS}


@dataclass
class PluginStatus:
    """What became of one plugin: `error` is empty when it loaded, `methods` counts what it registered."""

    name: str
    distribution: str
    version: str
    module: str
    error: str = ""
    methods: int = 0
    disabled: bool = False


_statuses: dict[str, PluginStatus] = {}


def _names(variable: str) -> set[str]:
    return {part.strip() for part in os.environ.get(variable, "").split(",") if part.strip()}


@functools.cache
def manager() -> pluggy.PluginManager:
    """The process's plugin manager with every plugin that loads; broken ones are in `status()`."""
    pm = pluggy.PluginManager(GROUP)
    pm.add_hookspecs(hookspecs)
    only, without = _names("FAIRLEAD_PLUGINS"), _names("FAIRLEAD_DISABLE")
    found = sorted(metadata.entry_points(group=GROUP), key=lambda e: (e.name != "core", e.name))
    for entry in found:
        distribution = entry.dist.name if entry.dist is not None else "unknown"
        version = entry.dist.version if entry.dist is not None else ""
        status = PluginStatus(entry.name, distribution, version, entry.value)
        if entry.name in _statuses:
            status.error = f"another plugin named {entry.name!r} comes from {_statuses[entry.name].distribution}"
            _statuses[f"{entry.name} ({distribution})"] = status
            _report(status)
            continue
        _statuses[entry.name] = status
        if entry.name != "core" and (entry.name in without or (only and entry.name not in only)):
            status.disabled = True
            continue
        try:
            pm.register(entry.load(), name=entry.name)
            pm.check_pending()
        except (Exception, SystemExit) as error:  # a stranger's module may raise anything; it is reported, never hidden
            if pm.has_plugin(entry.name):
                pm.unregister(name=entry.name)
            _blame(status, "", error)
    for name in (only | without) - set(_statuses):
        log.warning("no plugin is named %r; installed: %s", name, ", ".join(sorted(_statuses)))
    return pm


def _report(status: PluginStatus) -> None:
    log.warning("plugin %s of %s is left out: %s", status.name, status.distribution, status.error)


def _blame(status: PluginStatus, hook: str, error: BaseException) -> None:
    """Note what a plugin raised, on one line, and where: at import (no hook) or in a hook; then say so."""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    status.error = f"{hook}: {what}" if hook else what
    if not hook:
        _report(status)
    else:
        log.warning("plugin %s of %s: %s", status.name, status.distribution, status.error)


def implementations(hook: str) -> Iterator[tuple[PluginStatus, Callable[..., Any]]]:
    """Each plugin's implementation of a hook, in plugin order, so that one that raises can be told from the rest.
    It is called with the hook's arguments by name and, as pluggy has it, takes those it names."""
    pm = manager()
    found = {impl.plugin_name: impl for impl in getattr(pm.hook, hook).get_hookimpls()}
    for name, status in list(_statuses.items()):
        if name in found and not status.disabled:
            yield status, functools.partial(_call, found[name])


def _call(implementation: pluggy.HookImpl, **arguments: Any) -> Any:
    return implementation.function(**{name: arguments[name] for name in implementation.argnames})


def load_into(registry: Registry) -> None:
    """Let every plugin register its methods. DuplicateMethodError when two claim one name; other faults of a plugin
    are reported and cost only that plugin the method at fault and those after it in the same hook."""
    manager()
    for status in _statuses.values():
        status.methods = 0
    for kind, hook in _HOOK_OF_KIND.items():
        for status, implementation in implementations(hook):

            def register(
                name: str, factory: Any, *, paper: str = "", summary: str = "", tags: tuple[str, ...] = (),
                kind: str = kind, status: PluginStatus = status,
            ) -> None:  # fmt: skip
                known = tuple(tags) if isinstance(tags, (list, set, frozenset)) else tags
                registry.add(Method(name, kind, factory, paper, summary, known, status.distribution))
                status.methods += 1

            try:
                implementation(register=register)
            except DuplicateMethodError as error:
                status.error = str(error)
                raise
            except (Exception, SystemExit) as error:  # see above
                _blame(status, hook, error)
    _register_kernel_backends()


def _register_kernel_backends() -> None:
    found = list(implementations("fairlead_kernel_backends"))
    if not found:
        return
    from fairlead_kernels import register_implementation

    for status, implementation in found:
        try:
            implementation(register=register_implementation)
        except (Exception, SystemExit) as error:  # see above
            _blame(status, "fairlead_kernel_backends", error)


def add_commands(cli: click.Group) -> None:
    """Let every plugin add its commands to the command line. None may take the place of a command that is there: the
    first keeps the name, and the plugin that came second is reported."""
    for status, implementation in implementations("fairlead_commands"):
        before = dict(cli.commands)
        try:
            implementation(cli=cli)
        except (Exception, SystemExit) as error:  # see above
            _blame(status, "fairlead_commands", error)
        taken = sorted(name for name, command in before.items() if cli.commands.get(name) is not command)
        cli.commands.update(before)
        if taken:
            _blame(status, "fairlead_commands", PluginError(f"the command {taken[0]!r} exists already"))


def resolve(name: str) -> str | None:
    """The local path that some plugin gives for a name such as "zoo:aligned", or None. FairleadErrors pass through."""
    for status, implementation in implementations("fairlead_resolve"):
        try:
            found = implementation(name=name)
        except FairleadError:
            raise
        except Exception as error:  # see above
            _blame(status, "fairlead_resolve", error)
            continue
        if found is not None:
            return str(found)
    return None


def notify(hook: str, **arguments: Any) -> None:
    """Call an observation hook of every plugin; an observer that raises is reported and never stops the run."""
    for status, implementation in implementations(hook):
        try:
            implementation(**arguments)
        except Exception as error:  # see above
            log.warning("plugin %s: %s raised %s: %s", status.name, hook, type(error).__name__, error)


def status() -> list[PluginStatus]:
    """All plugins: loaded, disabled, broken, and the one that claims another's name."""
    from . import registry

    manager()
    try:
        registry.methods()
    except DuplicateMethodError as error:
        log.warning("%s", error)  # whoever asks for the state of the plugins is looking for this
    return list(_statuses.values())
