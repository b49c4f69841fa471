"""Keys as torch schemas can carry them: 64 bits in a signed integer. Reading keys from files is the core's."""

from __future__ import annotations

U64 = 0xFFFFFFFFFFFFFFFF


def signed_key(key: int) -> int:
    """A key in [0, 2^64) as the int64 of the same bits. The message of an error never holds the key."""
    if isinstance(key, bool) or not isinstance(key, int):
        raise TypeError(f"key: an integer in [0, 2^64) is needed, not {type(key).__name__}")
    if not 0 <= key <= U64:
        raise ValueError("key: an integer in [0, 2^64) is needed, this one lies outside")
    return key - (1 << 64) if key >> 63 else key


def unsigned_key(key: int) -> int:
    """The inverse of `signed_key`."""
    return key & U64
