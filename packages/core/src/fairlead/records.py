"""Rows in and out of files, streaming: JSONL, Parquet, plain text (a document per line), stdin.

A broken JSONL line is named with its number and cause; good lines are kept. Output grows line by line (JSONL) and can be
resumed: a torn last line of a killed process is cut off. Parquet is written whole at the end, by row groups.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from .errors import InputError
from .files import atomic_write

Row = dict[str, Any]
BadLines = Literal["raise", "skip"]
ROW_GROUP = 4096


class Skipped(list[str]):
    """What was left out while reading, one line of text each."""


def kind_of(path: str | Path) -> str:
    """"jsonl", "parquet" or "text", by the file's name; "-" is stdin and read by its content."""
    suffix = Path(path).suffix.lower()
    if suffix in (".jsonl", ".json", ".ndjson"):
        return "jsonl"
    return "parquet" if suffix == ".parquet" else "text"


def read(path: str | Path, bad_lines: BadLines = "raise", skipped: Skipped | None = None) -> Iterator[Row]:
    """Rows of a file one by one; memory does not grow with it. Text lines become {"text": line}.

    bad_lines: "raise" stops at the first broken JSONL line with an InputError that names it, "skip" notes it in
    `skipped` and goes on. Raises InputError for files that are missing, unreadable or of another format.
    """
    if str(path) == "-":
        yield from _stream(sys.stdin, "stdin", None, bad_lines, skipped)
        return
    target = Path(path)
    kind = kind_of(target)
    if kind == "parquet":
        yield from _parquet(target)
        return
    try:
        with open(target, encoding="utf-8", newline="\n") as stream:
            yield from _stream(stream, str(target), kind, bad_lines, skipped)
    except FileNotFoundError:
        raise InputError(f"{target}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{target}: is a directory; give a .jsonl, .parquet or text file") from None
    except PermissionError:
        raise InputError(f"{target}: cannot be read (permission denied)") from None


def _stream(
    stream: IO[str], name: str, kind: str | None, bad_lines: BadLines, skipped: Skipped | None
) -> Iterator[Row]:
    number = 0
    lines = iter(stream)
    while True:
        number += 1
        try:
            line = next(lines)
        except StopIteration:
            return
        except UnicodeDecodeError:
            raise InputError(f"{name}: line {number} or after is not UTF-8 text") from None
        line = line.rstrip("\r\n")
        if not line.strip():
            continue
        if kind is None:  # stdin shows what it is by its first line
            kind = "jsonl" if line.lstrip().startswith("{") else "text"
        if kind == "text":
            yield {"text": line}
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a JSON object is needed, this is a {type(row).__name__}")
        except (ValueError, RecursionError) as error:
            message = f"{name}: line {number} is no JSON object ({_cause(error)})"
            if bad_lines == "raise":
                raise InputError(message) from None
            if skipped is not None:
                skipped.append(message)
            continue
        yield row


def batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """Lists of `size` rows, the last one shorter."""
    while batch := list(islice(rows, size)):
        yield batch


def _cause(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROW_GROUP):
                yield from batch.to_pylist()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None


class Writer:
    """Append rows to a JSONL file (or collect them for a Parquet file, written atomically on close).

    resume=True keeps the whole lines that a stopped process left, `done` says how many, and cuts a torn last one.
    Without it, or force, an existing file is an InputError. Every row is flushed: a kill loses none that was written.
    """

    def __init__(self, path: str | Path, *, resume: bool = False, force: bool = False) -> None:
        self.path = str(path)
        self.done = 0
        self._stream: IO[str] | None = None
        self._parquet: Any = None
        self._rows: list[Row] = []
        if self.path == "-":
            self._stream = sys.stdout
            return
        target = Path(path)
        if kind_of(target) == "text":
            raise InputError(f"{target}: output must be .jsonl or .parquet")
        self._is_parquet = kind_of(target) == "parquet"
        working = target.with_name(target.name + ".part.jsonl") if self._is_parquet else target
        for there in {target, working}:
            if there.exists() and not (resume or force):
                raise InputError(f"{there}: exists; --resume goes on with it, --force replaces it")
        if self._is_parquet and resume and target.exists() and not working.exists():
            raise InputError(f"{target}: is finished; --force makes it anew")
        self._working = working
        if resume and working.exists():
            self.done = _mend(working)
        elif working.exists():
            working.unlink()
        target.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(working, "a", encoding="utf-8", newline="\n")  # noqa: SIM115 - closed by close()

    def write(self, row: Row) -> None:
        """Append one row."""
        assert self._stream is not None
        self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._stream.flush()
        self.done += 1

    def close(self, finished: bool = True) -> None:
        """Close; a Parquet file comes into being when `finished`."""
        if self._stream is None or self._stream is sys.stdout:
            return
        self._stream.close()
        self._stream = None
        if finished and self._is_parquet:
            self._convert()

    def _convert(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with atomic_write(self.path, "wb") as stream:
            writer: Any = None
            group: list[Row] = []
            for row in _chain_end(read(self._working)):
                if row is not None:
                    group.append(row)
                if group and (row is None or len(group) == ROW_GROUP):
                    table = pa.Table.from_pylist(group, schema=None if writer is None else writer.schema)
                    writer = writer or pq.ParquetWriter(stream, table.schema)
                    writer.write_table(table)
                    group = []
            if writer is None:
                pq.write_table(pa.table({}), stream)
            else:
                writer.close()
        self._working.unlink()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(finished=kind is None)


def _chain_end(rows: Iterator[Row]) -> Iterator[Row | None]:
    yield from rows
    yield None


def _mend(path: Path) -> int:
    """Cut a torn last line off a JSONL file; the number of whole lines."""
    whole, end = 0, 0
    with open(path, "rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                break
            try:
                json.loads(line)
            except ValueError:
                break
            whole, end = whole + 1, end + len(line)
    if end < path.stat().st_size:
        with open(path, "r+b") as stream:
            stream.truncate(end)
    return whole


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A stable hash of a tokenizer's vocabulary (tokens with their ids), 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
