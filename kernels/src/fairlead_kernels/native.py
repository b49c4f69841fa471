"""The C library that the wheel was built with: found, opened and called through ctypes (which releases the GIL).

It compiles nothing. Where the library is missing `why_absent()` says why, and the reference serves instead.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

FILE_NAMES = {"darwin": "libfairlead_kernels.dylib", "win32": "libfairlead_kernels.dll"}
FILE_NAME = FILE_NAMES.get(sys.platform, "libfairlead_kernels.so")
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
_TYPES = {
    "p": ctypes.c_void_p,
    "q": ctypes.c_int64,
    "Q": ctypes.c_uint64,
    "i": ctypes.c_int32,
    "I": ctypes.c_uint32,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}


@functools.cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    import fairlead_kernels

    # An editable install has two folders: the sources and the place where the built library went. The newest wins.
    found = [Path(folder) / FILE_NAME for folder in fairlead_kernels.__path__]
    found = sorted((path for path in found if path.exists()), key=lambda path: path.stat().st_mtime, reverse=True)
    if not found:
        return None, f"{FILE_NAME} was not built: no C compiler when fairlead-kernels was installed"
    try:
        return ctypes.CDLL(str(found[0])), str(found[0])
    except OSError as error:
        return None, f"{found[0]} cannot be loaded: {error}"


def path() -> str | None:
    """Where the library was loaded from, None without one."""
    library, text = _open()
    return None if library is None else text


def why_absent(symbol: str | None = None) -> str | None:
    """None when the library (and `symbol` in it) is there, else the reason in one line."""
    library, text = _open()
    if library is None:
        return text
    if symbol is not None and not hasattr(library, symbol):
        return f"{text} has no {symbol}: it is older than this source, install fairlead-kernels again"
    return None


@functools.cache
def function(name: str, signature: str) -> Callable[..., None]:
    """The C function `name` with arguments by one letter each: p pointer, q int64, Q uint64, i int32, I uint32,
    f float, d double. It returns nothing. RuntimeError with the reason where it is missing."""
    reason = why_absent(name)
    library, _ = _open()
    if reason is not None or library is None:
        raise RuntimeError(reason)
    found = getattr(library, name)
    found.argtypes = [_TYPES[letter] for letter in signature]
    found.restype = None
    return found  # type: ignore[no-any-return]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fairlead")


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def for_rows(call: Callable[..., None], rows: int, work_per_row: int, *args: Any, grain: int = 1 << 15) -> None:
    """`call(begin, end, *args)` over row ranges that cover [0, rows), on at most torch.get_num_threads() threads.

    work_per_row: elements touched per row; a thread gets at least `grain` elements, so small calls stay in this one.
    """
    if rows <= 0:
        return
    threads = min(torch.get_num_threads(), rows, max(1, rows * work_per_row // grain))
    if threads <= 1:
        call(0, rows, *args)
        return
    edges = [rows * i // threads for i in range(threads + 1)]
    waiting = [_pool(threads).submit(call, edges[i], edges[i + 1], *args) for i in range(1, threads)]
    call(edges[0], edges[1], *args)
    for future in waiting:
        future.result()
