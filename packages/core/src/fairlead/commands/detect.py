"""`fairlead detect`: p-values for a file of texts; batched, streaming, resumable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError
from .marks import bad_lines_option, build, load_profile, profile_path, report_skipped, watermark_options

if TYPE_CHECKING:
    from ..kinds import WatermarkProfile
    from ..records import Row, Skipped

SHOWN = 20


@click.command()
@click.argument("texts")
@watermark_options
@click.option("--profile", type=click.Path(path_type=Path), help="Profile saved at generation (default: TEXTS.profile.json where it exists).")
@click.option("--model", "--tokenizer", "model", help="Model or tokenizer that turns text into ids; not needed for rows with ids.")
@click.option("--field", default=None, help="Column to test, token ids or text (default: ids, then text).")
@click.option("--alpha", default=0.01, show_default=True, help="A text counts as marked when its p-value is at most this.")
@click.option("--out", default=None, help="Write the rows with their p_value to this .jsonl or .parquet file.")
@click.option("--batch-size", default=256, show_default=True)
@bad_lines_option
@click.option("--resume", is_flag=True, help="Go on with an --out file that was stopped.")
@click.option("--force", is_flag=True, help="Replace an existing --out file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line per text.")
def detect(
    texts: str, name: str | None, settings: tuple[str, ...], key_file: Path | None, profile: Path | None, model: str | None,
    field: str | None, alpha: float, out: str | None, batch_size: int, bad_lines: str, resume: bool, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Test TEXTS, a JSONL, Parquet or text file (- is stdin), for a watermark.

    The settings come from the profile that `fairlead generate` saved, or from --watermark and --set; settings that contradict
    the profile are an error. Token ids in the rows are tested as they are; text is tokenized first, which finds a little less
    where decoding and encoding differ. A text too short to test has p = 1.
    """
    from .. import records
    from ..models import load_tokenizer

    if not 0 < alpha < 1:
        raise InputError(f"--alpha: must lie in (0, 1), got {alpha}")
    if batch_size < 1:
        raise InputError(f"--batch-size: must be at least 1, got {batch_size}")
    if out == "-":
        raise InputError("--out: must be a .jsonl or .parquet file; --json prints to stdout")
    if resume and out is None:
        raise InputError("--resume: needs --out FILE")
    saved = _saved(texts, profile)
    if name is None and saved is None:
        raise InputError("no watermark: name it with --watermark, or give the --profile saved at generation")
    skipped = records.Skipped()
    rows = records.read(texts, "raise" if bad_lines == "stop" else "skip", skipped)
    first = next(rows, None)
    tokenizer = load_tokenizer(model) if model else None
    known = dict(saved.settings) if saved is not None and name in (None, saved.scheme) else None
    size = saved.vocab_size if saved is not None else _vocab_size(model, settings)
    mark = build(name or saved.scheme, settings, key_file, size, known)  # type: ignore[union-attr]
    if saved is not None:
        saved.check(mark.profile(tokenizer))
    usable: Iterator[tuple[Row, list[int], str]] = _usable(
        chain([] if first is None else [first], rows), field, tokenizer, mark.profile().vocab_size, skipped, bad_lines
    )
    head = next(usable, None)  # wrong columns should be said before a file is made
    usable = chain([] if head is None else [head], usable)
    writer = records.Writer(out, resume=resume, force=force) if out else None
    table = _Table(alpha, as_json)
    try:
        for _ in range(writer.done if writer is not None else 0):
            next(usable, None)
        table.count = writer.done if writer is not None else 0
        for batch in records.batches(usable, batch_size):
            for (row, _, _), result in zip(batch, _test(mark, batch, alpha), strict=True):
                if writer is not None:
                    writer.write({**row, **result})
                table.add(row, result)
    except BaseException:
        if writer is not None:
            writer.close(finished=False)
        raise
    if writer is not None:
        writer.close()
    table.close()
    report_skipped(skipped, texts, bad_lines)


class _Table:
    """What is printed: JSON lines as they come, or the first rows and a summary."""

    def __init__(self, alpha: float, as_json: bool) -> None:
        self.alpha, self.as_json = alpha, as_json
        self.count = self.tested = self.marked = self.tokenized = 0
        self._shown: list[list[str]] = []

    def add(self, row: Row, result: dict[str, Any]) -> None:
        self.marked += result["detected"]
        self.tokenized += result["tested"] == "text"
        if self.as_json:
            click.echo(json.dumps({"row": self.count, **result}))
        elif len(self._shown) < SHOWN:
            text = " ".join(str(row.get("text", "")).split())[:60]
            verdict = "marked" if result["detected"] else ""
            self._shown.append([str(self.count), f"{result['p_value']:.3g}", str(result["tokens_scored"]), verdict, text])
        self.count += 1
        self.tested += 1

    def close(self) -> None:
        if self.tokenized:
            click.echo(f"{self.tokenized} rows had no token ids: their text was tokenized, which may differ from what was generated", err=True)
        if self.as_json:
            return
        from ..cli import print_table

        if self._shown:
            print_table(["row", "p-value", "tokens scored", "", "text"], self._shown)
        more = f"; the first {SHOWN} are shown" if self.tested > SHOWN else ""
        click.echo(f"{self.marked} of {self.tested} texts carry the mark at level {self.alpha:g}{more}")


def _saved(texts: str, profile: Path | None) -> WatermarkProfile | None:
    """The profile named, or the one beside the texts if they have one; that of unmarked text says nothing."""
    beside = None if texts == "-" else profile_path(Path(texts))
    found = profile or (beside if beside is not None and beside.exists() else None)
    if found is None:
        return None
    saved, _ = load_profile(found)
    if saved is None and profile is not None:
        raise InputError(f"{profile}: the text was generated without a watermark")
    return saved


def _vocab_size(model: str | None, settings: tuple[str, ...]) -> int | None:
    """Width of the model's logits, from its config alone; None when --set gives it or no model is named."""
    if model is None or any(s.startswith("vocab_size=") for s in settings):
        return None
    from transformers import AutoConfig

    from ..models import resolve

    try:
        return int(AutoConfig.from_pretrained(resolve(model)).get_text_config().vocab_size)
    except (OSError, ValueError, AttributeError):
        return None


def _usable(
    rows: Iterator[Row], field: str | None, tokenizer: Any, vocab_size: int, skipped: Skipped, bad_lines: str
) -> Iterator[tuple[Row, list[int], str]]:
    """(row, ids, "ids" or "text") of each row that can be tested; others are noted in `skipped`, or raise."""
    tested = 0
    for row in rows:
        try:
            ids, source = _ids(row, field, tokenizer)
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                raise InputError(f"{row.where}: token id {min(ids) if min(ids) < 0 else max(ids)} lies outside the vocabulary of {vocab_size}")
        except InputError as error:
            # A first row that cannot be tested tells of the wrong options rather than of a broken line.
            if bad_lines == "stop" or not tested:
                raise
            skipped.add(str(error))
            continue
        tested += 1
        yield row, ids, source


def _ids(row: Row, field: str | None, tokenizer: Any) -> tuple[list[int], str]:
    value = row.get(field) if field else next((row[k] for k in ("ids", "text") if row.get(k) is not None), None)
    if isinstance(value, list) and set(map(type, value)) <= {int}:
        return value, "ids"
    if isinstance(value, str):
        if tokenizer is None:
            raise InputError(f"{row.where}: is text; give --model to tokenize it, or rows with ids")
        try:
            ids: list[int] = tokenizer(value, add_special_tokens=False)["input_ids"]
        except (TypeError, UnicodeError):
            raise InputError(f"{row.where}: is no Unicode text") from None
        return ids, "text"
    raise InputError(f"{row.where}: has no {field or 'ids or text'} to test; its columns are {', '.join(row) or 'none'}")


def _test(mark: Any, batch: list[tuple[Row, list[int], str]], alpha: float) -> Iterator[dict[str, Any]]:
    import torch

    width = max(1, max(len(ids) for _, ids, _ in batch))
    ids_BT = torch.zeros((len(batch), width), dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for place, (_, ids, _) in enumerate(batch):
        ids_BT[place, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask_BT[place, : len(ids)] = 1
    found = mark.detect(ids_BT, attention_mask=mask_BT)
    for place, (_, _, source) in enumerate(batch):
        p_value = float(found.p_value[place])
        yield {
            "p_value": p_value, "statistic": float(found.statistic[place]), "tokens_scored": int(found.tokens_scored[place]),
            "detected": p_value <= alpha, "tested": source,
        }  # fmt: skip
