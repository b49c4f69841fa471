"""What is registered, under which name: the table behind `fairlead methods`.

A `Method` holds import strings, so listing methods imports none of them (and not torch). Looking one up by a
wrong name says what was meant; two plugins with one name is an error that names both.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from . import taxonomy
from .errors import DuplicateMethodError, PluginError, UnknownNameError

KINDS = (
    "watermark", "decoder", "reward", "guard", "rewriter", "objective",
    "protector", "selector", "evaluation", "probe", "recipe",
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One registered method.

    name: lower-case words joined by hyphens, unique within its kind.
    kind: one of `KINDS`.
    factory: "module:attribute" (or the callable itself) that builds the object from keyword settings.
    paper: arXiv id, DOI or short citation; empty for a method without a paper.
    summary: one line.
    tags: node ids of the taxonomy (`fairlead.taxonomy`), checked at registration.
    package: the distribution that registered it (filled in by the plugin manager).
    """

    name: str
    kind: str
    factory: str | Callable[..., Any] = field(repr=False)
    paper: str = ""
    summary: str = ""
    tags: tuple[str, ...] = ()
    package: str = ""

    def load(self) -> Callable[..., Any]:
        """Import and return the factory."""
        if not isinstance(self.factory, str):
            return self.factory
        module, _, attribute = self.factory.partition(":")
        try:
            found: Any = importlib.import_module(module)
            return functools.reduce(getattr, attribute.split("."), found)  # type: ignore[no-any-return]
        except (ImportError, AttributeError) as error:
            raise PluginError(f"{self.kind} {self.name!r} of {self.package or 'unknown'}: cannot load: {error}") from error

    @property
    def config(self) -> Any:
        """The pydantic model of the method's settings (imports the method)."""
        return getattr(self.load(), "Config", None)


class Registry:
    """Methods by kind and name; fills itself from the plugins on first use."""

    def __init__(self, load_plugins: Callable[[Registry], None] | None = None) -> None:
        self._methods: dict[tuple[str, str], Method] = {}
        self._load_plugins = load_plugins

    def add(self, method: Method) -> None:
        """Register a method; PluginError for nonsense, UnknownNameError for an unknown kind or tag."""
        if method.kind not in KINDS:
            raise UnknownNameError("kind", str(method.kind), KINDS)
        if not isinstance(method.name, str) or not _NAME.fullmatch(method.name):
            raise PluginError(f"method name {method.name!r}: must be lower-case words joined by hyphens")
        if isinstance(method.factory, str):
            if not _IMPORT_STRING.fullmatch(method.factory):
                raise PluginError(f"{method.name}: factory must read 'module:attribute', got {method.factory!r}")
        elif not callable(method.factory):
            raise PluginError(
                f"{method.name}: factory must be 'module:attribute' or a callable, got a {type(method.factory).__name__}"
            )
        for field_name in ("paper", "summary"):
            if not isinstance(getattr(method, field_name), str):
                raise PluginError(f"{method.name}: {field_name} must be text, got {getattr(method, field_name)!r}")
        if not isinstance(method.tags, tuple):
            raise PluginError(f"{method.name}: tags must be a tuple of taxonomy ids, got {method.tags!r}")
        for tag in method.tags:
            taxonomy.check(tag)
        key = (method.kind, method.name)
        other = self._methods.get(key)
        if other is not None:
            raise DuplicateMethodError(
                f"{method.kind} {method.name!r} is registered by {other.package or 'unknown'} and by "
                f"{method.package or 'unknown'}; disable one with FAIRLEAD_DISABLE"
            )
        self._methods[key] = method

    def methods(self, kind: str | None = None) -> list[Method]:
        """All methods, or those of one kind, sorted by kind and name."""
        self._fill()
        if kind is not None and kind not in KINDS:
            raise UnknownNameError("kind", kind, KINDS)
        return [m for key, m in sorted(self._methods.items()) if kind in (None, key[0])]

    def get(self, kind: str, name: str) -> Method:
        """The method of that kind and name; UnknownNameError (did you mean) otherwise."""
        known: Iterable[str] = [m.name for m in self.methods(kind)]
        try:
            return self._methods[kind, name]
        except KeyError:
            raise UnknownNameError(kind, name, known) from None

    def create(self, kind: str, name: str, /, **settings: Any) -> Any:
        """Build a method from its settings; ConfigError names a bad one."""
        return self.get(kind, name).load()(**settings)

    def _fill(self) -> None:
        """Let the plugins register, once; where two claim one name, every later look says so again."""
        load, self._load_plugins = self._load_plugins, None
        if load is None:
            return
        before = dict(self._methods)
        try:
            load(self)
        except BaseException:
            self._methods, self._load_plugins = before, load
            raise


_NAME = re.compile(r"[a-z0-9]+([-.+][a-z0-9]+)*")
_IMPORT_STRING = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")


def _from_entry_points(target: Registry) -> None:
    from .plugins import load_into

    load_into(target)


default = Registry(load_plugins=_from_entry_points)
"""The registry of this process; the functions below are its methods, so `from fairlead import registry` suffices."""

add = default.add
methods = default.methods
get = default.get
create = default.create
