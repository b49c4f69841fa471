"""Settings of methods: one frozen pydantic model feeds Python, YAML and the command line.

Knows how a bad value becomes one clear line, and how a class gets its constructor from its `Config`.
Leaves to others: where the values come from (cli, recipes) and what they mean (the methods).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ConfigError


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

    def public_dict(self) -> dict[str, Any]:
        """JSON-ready settings for logs, profiles and reports; secrets appear as fingerprints, methods with their names
        and settings, functions and other objects by name."""
        return {name: _public(value) for name, value in self.model_dump(mode="python").items()}


def _public(value: Any) -> Any:
    """A setting as JSON values."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Mapping):
        return {str(k): "<not shown>" if str(k) == "key" else _public(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_public(v) for v in value]
    if isinstance(value, Configurable):
        return {"name": getattr(value, "name", type(value).__name__), **value.config.public_dict()}
    if isinstance(value, (Path, Enum)):
        return str(value) if isinstance(value, Path) else value.value
    return getattr(value, "__qualname__", type(value).__name__)


def _without_keys(value: Any) -> Any:
    """An input to be shown in an error: nested settings without their keys."""
    if isinstance(value, Mapping):
        return {k: "<not shown>" if str(k) == "key" else _without_keys(v) for k, v in value.items()}
    return [_without_keys(v) for v in value] if isinstance(value, (list, tuple)) else value


def describe(error: ValidationError, config: type[BaseModel]) -> str:
    """One line for all faults of a pydantic error; never shows the value of a secret field."""
    from .keys import SecretKey

    lines = []
    for fault in error.errors():
        field = ".".join(str(part) for part in fault["loc"]) or config.__name__
        head = str(fault["loc"][0]) if fault["loc"] else ""
        known = config.model_fields.get(head)
        if fault["type"] == "extra_forbidden":
            import difflib

            near = difflib.get_close_matches(field, config.model_fields, n=1)
            lines.append(f"unknown setting {field!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            continue
        if fault["type"] == "missing":
            lines.append(f"{field}: is required")
            continue
        secret = known is not None and SecretKey in getattr(known.annotation, "__args__", (known.annotation,))
        shown = "" if secret or not head else f", got {_without_keys(fault['input'])!r}"
        message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
        lines.append(f"{field}: {message}{shown}")
    return f"{config.__name__.removesuffix('Config')}: " + "; ".join(lines)


class Configurable:
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
        else:
            self.config = self.Config(**{**(config or {}), **settings})
        self.setup()

    def setup(self) -> None:
        """Derive state from `self.config`; called once at the end of construction."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r})"
