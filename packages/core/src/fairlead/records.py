"""Rows in and out of files, streaming: JSONL, Parquet, plain text (a document per line), stdin.

A broken line is named with its number and cause; good lines are kept. Output grows by whole lines and can be resumed: a
torn last line of a killed process is cut off. Parquet is made from those lines at the end, by row groups.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from .errors import InputError
from .files import atomic_write

BadLines = Literal["raise", "skip"]
ROW_GROUP = 4096
SHOWN = 20


class Row(dict[str, Any]):
    """A row, which knows where it stood: `where` reads "FILE: line N"."""

    where: str = ""


class Skipped:
    """What was left out while reading: how many lines (`count`), and what was wrong with the first of them (`lines`)."""

    def __init__(self) -> None:
        self.count = 0
        self.lines: list[str] = []

    def add(self, message: str) -> None:
        """Note one line; only the first are kept, so that memory does not grow with the file."""
        self.count += 1
        if len(self.lines) < SHOWN:
            self.lines.append(message)


def kind_of(path: str | Path) -> str:
    """ "jsonl", "parquet" or "text", by the file's name."""
    suffix = Path(path).suffix.lower()
    if suffix in (".jsonl", ".json", ".ndjson"):
        return "jsonl"
    return "parquet" if suffix == ".parquet" else "text"


def read(path: str | Path, bad_lines: BadLines = "raise", skipped: Skipped | None = None) -> Iterator[Row]:
    """Rows of a file one by one; memory does not grow with it. Text lines become {"text": line}, blank ones are left out.

    path: "-" is stdin, which is JSONL when its first line begins with "{" and text otherwise.
    bad_lines: "raise" stops at the first broken line with an InputError that names it, "skip" notes it in `skipped` and
    goes on. Raises InputError for files that are missing, unreadable or of another format.
    """
    if str(path) == "-":
        yield from _lines(sys.stdin.buffer, "stdin", None, bad_lines, skipped)
        return
    target = Path(path)
    kind = kind_of(target)
    try:
        if kind == "parquet":
            yield from _parquet(target)
            return
        with open(target, "rb") as stream:
            yield from _lines(stream, str(target), kind, bad_lines, skipped)
    except FileNotFoundError:
        raise InputError(f"{target}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{target}: is a directory; give a .jsonl, .parquet or text file") from None
    except PermissionError:
        raise InputError(f"{target}: cannot be read (permission denied)") from None


def batches(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` rows, the last one shorter."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def _lines(
    stream: Iterable[bytes], name: str, kind: str | None, bad_lines: BadLines, skipped: Skipped | None
) -> Iterator[Row]:
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        if not line.strip():
            continue
        if kind is None:
            kind = "jsonl" if line.lstrip().startswith(b"{") else "text"
        try:
            row = Row(_parse(line) if kind == "jsonl" else {"text": line.decode("utf-8").rstrip("\r\n")})
        except (ValueError, RecursionError) as error:
            message = f"{name}: line {number} is broken ({_cause(error)})"
            if bad_lines == "raise":
                raise InputError(message) from None
            if skipped is not None:
                skipped.add(message)
            continue
        row.where = f"{name}: line {number}"
        yield row


def _parse(line: bytes) -> dict[str, Any]:
    row = json.loads(line.decode("utf-8"))
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, this is a {type(row).__name__}")
    return row


def _cause(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start + 1}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROW_GROUP):
                for content in batch.to_pylist():
                    number += 1
                    row = Row(content)
                    row.where = f"{path}: row {number}"
                    yield row
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None


class Writer:
    """Append rows to a JSONL file; for Parquet, to PATH.part.jsonl, from which the file is made when all is done.

    resume=True keeps the whole lines that a stopped process left (`done` says how many, `last` is the last of them), cut to
    a multiple of `group`, and removes a torn last line. Without it, or force, an existing file is an InputError.
    A row is written whole or, on any failure (a full disk, Ctrl-C), not at all; a kill loses none that was written.
    path "-" is stdout.
    """

    def __init__(self, path: str | Path, *, resume: bool = False, force: bool = False, group: int = 1) -> None:
        self.path = str(path)
        self.done = 0
        self.last: dict[str, Any] | None = None
        self._stream: IO[bytes] | None = None
        self._is_parquet = False
        if self.path == "-":
            if resume:
                raise InputError("--resume: needs an output file, stdout cannot be taken up again")
            return
        target = Path(path)
        if kind_of(target) == "text":
            raise InputError(f"{target}: output must be .jsonl or .parquet")
        self._is_parquet = kind_of(target) == "parquet"
        self._working = target.with_name(target.name + ".part.jsonl") if self._is_parquet else target
        for there in (target, self._working):
            if there.exists() and not (resume or force):
                raise InputError(f"{there}: exists; --resume goes on with it, --force replaces it")
        if self._is_parquet and resume and target.exists() and not self._working.exists():
            raise InputError(f"{target}: is finished; --force makes it anew")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if resume and self._working.exists():
                self.done, self.last = _mend(self._working, group)
            elif self._working.exists():
                self._working.unlink()
            self._stream = open(self._working, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
            raise InputError(f"{target}: cannot be written ({error.strerror})") from None

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
        try:
            data = line.encode("utf-8")
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can name and UTF-8 cannot hold
            data = (json.dumps(row, default=str) + "\n").encode("ascii")
        if self.path == "-":
            sys.stdout.write(data.decode("utf-8"))
            sys.stdout.flush()
        else:
            self._append(data)
        self.done += 1

    def _append(self, data: bytes) -> None:
        assert self._stream is not None
        start = self._stream.seek(0, 2)
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
        except BaseException:
            self._stream.truncate(start)
            raise

    def close(self, finished: bool = True) -> None:
        """Close; a Parquet file comes into being when `finished`."""
        if self._stream is None:
            return
        self._stream.close()
        self._stream = None
        if finished and self._is_parquet:
            _convert(self._working, self.path)
            self._working.unlink()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(finished=kind is None)


def _convert(lines: Path, target: str) -> None:
    """JSONL to Parquet in two passes: the first finds the types of all columns, the second writes row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pa.schema([])
        for group in batches(read(lines), ROW_GROUP):
            found = pa.Table.from_pylist([dict(row) for row in group], schema=_columns(group)).schema
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
        with atomic_write(target, "wb") as stream, pq.ParquetWriter(stream, schema) as writer:
            for group in batches(read(lines), ROW_GROUP):
                writer.write_table(pa.Table.from_pylist([dict(row) for row in group], schema=schema))
    except pa.ArrowException as error:
        cause = str(error).splitlines()[0]
        raise InputError(f"{target}: a column does not fit Parquet ({cause}); all rows are in {lines}") from None


def _columns(rows: list[Row]) -> Any:
    """Types of the columns of some rows (Arrow alone would look at the first row's columns only)."""
    import pyarrow as pa

    names = dict.fromkeys(name for row in rows for name in row)
    return pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in names])


def _mend(path: Path, group: int) -> tuple[int, dict[str, Any] | None]:
    """Cut a torn last line, and rows of an unfinished group, off a JSONL file; (whole lines, the last row)."""
    whole, end = 0, 0
    kept: tuple[int, int, dict[str, Any] | None] = (0, 0, None)
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                row = _parse(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError) as error:
                if stream.read(1):
                    raise InputError(f"{path}: line {number} is broken ({_cause(error)}); mend or remove it, then --resume") from None
                row = None
            if row is None:
                break
            whole, end = whole + 1, end + len(line)
            if whole % group == 0:
                kept = (whole, end, row)
    count, end, last = kept
    if end < path.stat().st_size:
        with open(path, "r+b") as stream:
            stream.truncate(end)
    return count, last


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A stable hash of a tokenizer's vocabulary (tokens with their ids), 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
