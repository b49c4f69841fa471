"""Watermark keys: where they come from and how they stay out of sight.

A key is a 64-bit secret. It comes as an int, as bytes, as a key file or from FAIRLEAD_WATERMARK_KEY, and is
shown to nobody: repr, vars, saved configs and reports carry `fingerprint`, a salted hash.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import InputError

ENVIRONMENT_VARIABLE = "FAIRLEAD_WATERMARK_KEY"
_SALT = b"fairlead key fingerprint v1\0"
_MASK = (1 << 64) - 1
FINGERPRINT = re.compile(r"key-[0-9a-f]{12}")


class SecretKey:
    """A 64-bit watermark key that never prints itself.

    Build one from an int in [0, 2^64), from bytes (8 big-endian bytes are the integer itself; any other length is
    hashed with SHA-256 and its first 8 bytes are taken) or from the path of a key file. `reveal()` gives the
    integer to the code that computes with it.
    """

    __slots__ = ("_reveal", "fingerprint")

    def __init__(self, value: int | bytes | str | os.PathLike[str] | SecretKey) -> None:
        if isinstance(value, SecretKey):
            number = value.reveal()
        elif isinstance(value, bool):
            raise InputError("key: must be an int, bytes or the path of a key file, got a bool")
        elif isinstance(value, int):
            if not 0 <= value <= _MASK:
                raise InputError("key: an integer key must lie in [0, 2^64)")
            number = value
        elif isinstance(value, bytes):
            number = _from_bytes(value)
        elif isinstance(value, (str, os.PathLike)):
            number = _from_file(Path(value))
        else:
            raise InputError(f"key: must be an int, bytes or the path of a key file, got {type(value).__name__}")
        # A closure keeps the number out of vars(), __dict__, pickles and debuggers' summaries.
        self._reveal: Callable[[], int] = lambda: number
        digest = hashlib.sha256(_SALT + number.to_bytes(8, "big")).hexdigest()
        self.fingerprint = f"key-{digest[:12]}"

    def reveal(self) -> int:
        """The key as an integer in [0, 2^64)."""
        return self._reveal()

    def __repr__(self) -> str:
        return f"<{self.fingerprint}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SecretKey) and self.reveal() == other.reveal()

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self) -> Any:
        raise TypeError("a SecretKey is not pickled; hand over the key file instead")

    def __copy__(self) -> SecretKey:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SecretKey:
        return self

    @classmethod
    def from_environment(cls) -> SecretKey | None:
        """The key in FAIRLEAD_WATERMARK_KEY (decimal, 0x-hex or a path), or None where it is not set."""
        text = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
        if not text:
            return None
        return cls(_from_text(text, where=ENVIRONMENT_VARIABLE) if _is_number(text) else text)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        def parse(value: Any) -> SecretKey:
            try:
                return cls(value)
            except InputError as error:
                raise ValueError(str(error).removeprefix("key: ")) from None

        return core_schema.no_info_plain_validator_function(
            parse, serialization=core_schema.plain_serializer_function_ser_schema(lambda key: key.fingerprint)
        )


def new_key_file(path: str | os.PathLike[str]) -> SecretKey:
    """Write a fresh random key that only its owner can read; an existing file is never overwritten."""
    target = Path(path)
    number = secrets.randbits(63)  # transformers' lists take keys below 2^63; a key should serve every scheme
    try:
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InputError(f"{target}: exists already; a key is never overwritten, choose another name") from None
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}); choose another place") from None
    with os.fdopen(handle, "w", encoding="ascii") as stream:
        stream.write(f"0x{number:016x}\n")
    return SecretKey(number)


def _is_number(text: str) -> bool:
    return text.isdigit() or text.lower().startswith("0x")


def _from_text(text: str, where: str) -> int:
    try:
        number = int(text, 0)
    except ValueError:
        raise InputError(f"key: {where} holds no decimal or 0x-hexadecimal number") from None
    if not 0 <= number <= _MASK:
        raise InputError(f"key: the number in {where} must lie in [0, 2^64)")
    return number


def _from_bytes(data: bytes) -> int:
    if not data:
        raise InputError("key: empty bytes are no key; give at least one byte, 8 or more for strength")
    return int.from_bytes(data if len(data) == 8 else hashlib.sha256(data).digest()[:8], "big")


def _from_file(path: Path) -> int:
    shown = str(path) if str(path).isprintable() else repr(str(path))
    try:
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        if re.fullmatch(r"(0[xX])?[0-9a-fA-F_]+", str(path)):  # a key in quotes: not to be shown
            raise InputError(
                "key: a text is taken as the path of a key file, and there is none of this name; give a number as int"
            ) from None
        raise InputError(f"key: no key file at {shown}; 'fairlead watermark new-key {shown}' makes one") from None
    except (OSError, ValueError):  # ValueError: not ASCII, or no possible path
        raise InputError(f"key: {shown} cannot be read as a key file (one decimal or 0x-hexadecimal number)") from None
    if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        warnings.warn(f"key file {path} can be read by others; run: chmod 600 {path}", stacklevel=3)
    return _from_text(text, where=str(path))
