"""Readers and writers: whole rows or none, broken lines named, files that grow and are taken up again."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairlead.errors import InputError
from fairlead.records import Row, Skipped, Writer, batches, read, tokenizer_fingerprint

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=8)
IN_TMP = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> None:
    with Writer(path, **options) as writer:
        for row in rows:
            writer.write(row)


@given(rows=ROWS)
@IN_TMP
def test_what_is_written_is_read_back(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", rows, force=True)
    assert [dict(r) for r in read(tmp_path / "a.jsonl")] == rows


@given(rows=st.lists(st.dictionaries(st.text(), JSON, max_size=3), min_size=1, max_size=6), data=st.data(), group=st.integers(1, 3))
@IN_TMP
def test_a_file_cut_anywhere_is_taken_up_without_loss(rows: list[dict[str, Any]], data: st.DataObject, group: int, tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    write(path, rows, force=True)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    kept = path.read_bytes().count(b"\n")
    with Writer(path, resume=True, group=group) as writer:
        assert writer.done == kept - kept % group
        assert writer.last == (rows[writer.done - 1] if writer.done else None)
        for row in rows[writer.done :]:
            writer.write(row)
    assert path.read_bytes() == whole


@given(junk=st.binary(max_size=200))
@IN_TMP
def test_any_bytes_are_rows_or_named_faults_and_never_a_crash(junk: bytes, tmp_path: Path) -> None:
    for name in ("c.jsonl", "c.txt", "c.parquet"):
        path = tmp_path / name
        path.write_bytes(junk)
        skipped = Skipped()
        try:
            rows = list(read(path, "skip", skipped))
        except InputError as error:
            assert name == "c.parquet"
            assert "\n" not in str(error)
            continue
        assert len(rows) + skipped.count <= junk.count(b"\n") + 1
        assert all(isinstance(row, Row) and row.where for row in rows)


def test_a_broken_line_is_named_with_its_cause(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": }\n[1]\n{"a": "\xff"}\n{"a": 2}\n' + b"[" * 100_000 + b"\n")
    skipped = Skipped()
    assert [r["a"] for r in read(path, "skip", skipped)] == [1, 2]
    assert skipped.count == 4
    assert "line 3 is broken (Expecting value, column 7)" in skipped.lines[0]
    assert "line 4" in skipped.lines[1] and "list" in skipped.lines[1]
    assert "line 5" in skipped.lines[2] and "UTF-8" in skipped.lines[2]
    assert "line 7" in skipped.lines[3]
    with pytest.raises(InputError, match="line 3"):
        list(read(path))


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert [dict(r) for r in read(tmp_path / "e.jsonl")] == [{"a": 1}]


def test_only_the_first_faults_are_kept_so_that_memory_does_not_grow(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text("x\n" * 500)
    skipped = Skipped()
    assert list(read(tmp_path / "f.jsonl", "skip", skipped)) == []
    assert (skipped.count, len(skipped.lines)) == (500, 20)


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    path.write_text('{"a": 1}\n' * 3 + "broken\n")
    rows = read(path)
    assert next(rows)["a"] == 1, "the broken line is not reached yet"


def test_a_half_surrogate_survives(tmp_path: Path) -> None:
    write(tmp_path / "h.jsonl", [{"a": "\ud800"}])
    assert [dict(r) for r in read(tmp_path / "h.jsonl")] == [{"a": "\ud800"}]


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_row_that_fails_half_way_is_taken_back(fault: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "i.jsonl"
    writer = Writer(path)
    writer.write({"a": 1})
    real = writer._stream
    assert real is not None

    class FillsUp:
        def write(self, data: memoryview) -> int:
            if len(data) > 5:
                return real.write(data[:5])
            raise fault

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    writer._stream = FillsUp()  # type: ignore[assignment]
    with pytest.raises(type(fault)):
        writer.write({"b": 22})
    writer.close(finished=False)
    assert path.read_text() == '{"a": 1}\n'


def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    for name in ("j.jsonl", "j.parquet"):
        write(tmp_path / name, [{"a": 1}])
        with pytest.raises(InputError, match="--resume"):
            Writer(tmp_path / name)
        write(tmp_path / name, [{"a": 2}], force=True)
        assert [dict(r) for r in read(tmp_path / name)] == [{"a": 2}]


def test_a_broken_line_in_the_middle_is_not_taken_for_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "k.jsonl"
    path.write_text('{"a": 1}\nbroken\n{"a": 2}\n')
    with pytest.raises(InputError, match="line 2"):
        Writer(path, resume=True)
    assert path.read_text().count("\n") == 3, "nothing is removed"


def test_parquet_unites_the_types_of_all_its_rows(tmp_path: Path) -> None:
    rows = [{"a": None, "b": 1}] * 5000 + [{"a": "late", "b": 2.5, "c": [1]}]
    write(tmp_path / "l.parquet", rows)
    found = [dict(r) for r in read(tmp_path / "l.parquet")]
    assert found[-1] == {"a": "late", "b": 2.5, "c": [1]}
    assert found[0] == {"a": None, "b": 1.0, "c": None}
    assert not (tmp_path / "l.parquet.part.jsonl").exists()


def test_columns_that_do_not_fit_parquet_lose_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not fit"):
        write(tmp_path / "m.parquet", [{"a": 1}, {"a": "one"}])
    assert len(list(read(tmp_path / "m.parquet.part.jsonl"))) == 2
    assert not (tmp_path / "m.parquet").exists()


def test_parquet_appears_only_when_all_is_done(tmp_path: Path) -> None:
    path = tmp_path / "n.parquet"
    with pytest.raises(KeyboardInterrupt), Writer(path) as writer:
        writer.write({"a": 1})
        raise KeyboardInterrupt
    assert not path.exists()
    with Writer(path, resume=True) as writer:
        assert writer.done == 1
        writer.write({"a": 2})
    assert [r["a"] for r in read(path)] == [1, 2]
    with pytest.raises(InputError, match="finished"):
        Writer(path, resume=True)


def test_an_empty_parquet_file_can_be_read(tmp_path: Path) -> None:
    write(tmp_path / "o.parquet", [])
    assert list(read(tmp_path / "o.parquet")) == []


@pytest.mark.parametrize(("name", "message"), [("none.jsonl", "no such file"), ("none.parquet", "no such file"), (".", "directory")])
def test_files_that_cannot_be_read_are_said_in_one_line(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        list(read(tmp_path / name))


def test_output_needs_a_known_format(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.jsonl or \.parquet"):
        Writer(tmp_path / "p.csv")


def test_batches_hold_every_row_once() -> None:
    assert [list(b) for b in batches(range(5), 2)] == [[0, 1], [2, 3], [4]]


class Vocabulary:
    def __init__(self, **tokens: int) -> None:
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return self.tokens


def test_the_fingerprint_knows_tokens_and_ids_and_not_their_order() -> None:
    assert tokenizer_fingerprint(Vocabulary(a=0, b=1)) == tokenizer_fingerprint(Vocabulary(b=1, a=0))
    assert tokenizer_fingerprint(Vocabulary(a=0, b=1)) != tokenizer_fingerprint(Vocabulary(a=1, b=0))
    assert tokenizer_fingerprint(Vocabulary(a=0)) != tokenizer_fingerprint(Vocabulary(a=0, b=1))
