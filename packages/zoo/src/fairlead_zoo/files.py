"""Where the zoo keeps what it makes, and how a finished folder or file appears: in one rename, never by halves."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fairlead import files
from fairlead.errors import InputError
from fairlead.files import CACHE_VARIABLE, atomic_write


def cache_dir() -> Path:
    """Where zoo models are kept; not created here."""
    return files.cache_dir("zoo")


@contextlib.contextmanager
def published(target: Path, replace: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside `target`; when the block ends well it becomes `target`, else it vanishes.

    replace: an older `target` makes way; otherwise it stays and the new folder is dropped (two builders of one recipe
    make the same bytes, so the first one wins). InputError when the place cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InputError(
            f"{target.parent}: cannot be written ({error.strerror}); set {CACHE_VARIABLE} to a folder that can"
        ) from None
    old = aside.with_name(aside.name + ".old")
    try:
        yield aside
        aside.chmod(0o755)
        for file in aside.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
        if target.exists() and replace:
            os.replace(target, old)
        try:
            os.replace(aside, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Write a text file (UTF-8, line ends as given) in one rename."""
    with atomic_write(target, "wb") as stream:
        stream.write(text.encode())
