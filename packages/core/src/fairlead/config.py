"""Settings of methods: one frozen pydantic model feeds Python, YAML and the command line.

Knows how a bad value becomes one clear line, and how a class gets its constructor from its `Config`.
Leaves to others: where the values come from (cli, recipes) and what they mean (the methods).
"""

from __future__ import annotations

import difflib
import inspect
import typing
from abc import ABC
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ConfigError, InputError


class MethodConfig(BaseModel):
    """Base of every method's settings: frozen, no unknown fields, errors of one line.

    Raises
    ------
    ConfigError
        for every field at once: its name, the value it got, what is allowed.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        arbitrary_types_allowed=True,
        ser_json_inf_nan="strings",
    )

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(describe(error, type(self))) from None

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [(name, _without_keys(value)) for name, value in super().__repr_args__()]

    def public_dict(self) -> dict[str, Any]:
        """JSON-ready settings for logs, profiles and reports; secrets appear as fingerprints, methods with their names
        and settings, functions and other objects by name."""
        return {name: _public(value) for name, value in self.model_dump(mode="python").items()}


def _public(value: Any) -> Any:
    """A setting as JSON values."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Mapping):
        return {str(k): _fingerprint(v) if str(k) == "key" else _public(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_public(v) for v in value]
    if isinstance(value, Configurable):
        return {"name": getattr(value, "name", type(value).__name__), **value.config.public_dict()}
    if isinstance(value, (Path, Enum)):
        return str(value) if isinstance(value, Path) else value.value
    return getattr(value, "__qualname__", type(value).__name__)


def _fingerprint(value: Any) -> str:
    """What a nested setting called key is shown as; two keys stay two."""
    from .keys import FINGERPRINT, SecretKey

    if isinstance(value, str) and FINGERPRINT.fullmatch(value):
        return value
    try:
        return SecretKey(value).fingerprint if isinstance(value, (int, bytes, SecretKey)) else "<not shown>"
    except InputError:
        return "<not shown>"


def _without_keys(value: Any) -> Any:
    """An input to be shown in an error: nested settings without their keys."""
    if isinstance(value, Mapping):
        return {k: "<not shown>" if str(k) == "key" else _without_keys(v) for k, v in value.items()}
    return [_without_keys(v) for v in value] if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    """An input on one short line, whatever it is (a tensor, a page of text)."""
    text = " ".join(repr(_without_keys(value)).split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


_SHOWN = 120


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes within a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _holds_key(annotation: Any, seen: frozenset[type] = frozenset()) -> bool:
    """Whether a field's type has a key anywhere in it: SecretKey, tuple[SecretKey, ...] | None, a model with one."""
    from .keys import SecretKey

    if annotation is SecretKey:
        return True
    if any(_holds_key(part, seen) for part in typing.get_args(annotation)):
        return True
    if not isinstance(annotation, type) or not issubclass(annotation, BaseModel) or annotation in seen:
        return False
    return any(_holds_key(f.annotation, seen | {annotation}) for f in annotation.model_fields.values())


def _is_secret(location: tuple[Any, ...], config: type[BaseModel]) -> bool:
    """Whether the value at a fault's location is a key or holds one."""
    models: list[type[BaseModel]] = [config]
    annotation: Any = None
    for part in location:
        field = next((m.model_fields[part] for m in models if part in m.model_fields), None)
        if field is not None:
            annotation = field.annotation
            models = _models(annotation)
    return "key" in location or (annotation is not None and _holds_key(annotation))


def describe(error: ValidationError, config: type[BaseModel]) -> str:
    """One line for all faults of a pydantic error; never shows the value of a secret field."""
    lines = []
    for fault in error.errors():
        field = ".".join(_printable(part) for part in fault["loc"]) or config.__name__
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, config.model_fields, n=1)
            lines.append(f"unknown setting {field!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            continue
        if fault["type"] == "missing":
            lines.append(f"{field}: is required")
            continue
        hidden = not fault["loc"] or _is_secret(fault["loc"], config)
        shown = "" if hidden else f", got {_shown(fault['input'])}"
        message = " ".join(fault["msg"].removeprefix("Value error, ").removeprefix("Input ").split())
        lines.append(f"{field}: {message}{shown}")
    return f"{config.__name__.removesuffix('Config')}: " + "; ".join(lines)


def _printable(part: Any) -> str:
    """A field's name, or a key of a dictionary, which may be any text, on one line."""
    text = str(part)
    return text if text.isprintable() else repr(text)


class Configurable(ABC):  # noqa: B024 - the kinds add the abstract methods
    """A class whose constructor takes the fields of its `Config` by keyword.

    `KGW(vocab_size=32_000, key=1)` and `KGW(KGWConfig(vocab_size=32_000, key=1))` are the same object.
    After construction `self.config` holds the frozen settings; a subclass sets up derived state in `setup`.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" in cls.__dict__:
            cls.__signature__ = inspect.signature(cls.Config)  # type: ignore[attr-defined]

    def __init__(self, config: MethodConfig | Mapping[str, Any] | None = None, /, **settings: Any) -> None:
        if isinstance(config, MethodConfig):
            if settings:
                raise ConfigError(f"{type(self).__name__}: pass a config or settings, not both")
            if not isinstance(config, self.Config):
                raise ConfigError(
                    f"{type(self).__name__}: config must be a {self.Config.__name__}, got {type(config).__name__}"
                )
            self.config = config
        elif config is None or isinstance(config, Mapping):
            self.config = self.Config(**{**(config or {}), **settings})
        else:
            fields = ", ".join(self.Config.model_fields)
            raise ConfigError(f"{type(self).__name__}: takes its settings by name ({fields}), got a {type(config).__name__}")
        self.setup()

    def setup(self) -> None:  # noqa: B027 - most methods derive nothing
        """Derive state from `self.config`; called once at the end of construction."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r})"
