"""`fairlead detect`: p-values for a file of texts; batched and streaming."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from .marks import build, load_profile, profile_path, watermark_options


@click.command()
@click.argument("texts")
@watermark_options
@click.option("--profile", type=click.Path(path_type=Path), help="Profile saved at generation (default: TEXTS.profile.json where it exists).")
@click.option("--model", "--tokenizer", "model", help="Model or tokenizer that turns text into ids; not needed for rows with ids.")
@click.option("--field", default=None, help="Column to test (default: ids, then text).")
@click.option("--alpha", default=0.01, show_default=True, help="Level below which a text counts as marked.")
@click.option("--out", default=None, help="Write the rows with p_value, statistic and tokens_scored to this .jsonl or .parquet file.")
@click.option("--batch-size", default=256, show_default=True)
@click.option("--bad-lines", type=click.Choice(["raise", "skip"]), default="raise", show_default=True, help="What a broken input line does.")
@click.option("--force", is_flag=True, help="Replace an existing output file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line per text.")
def detect(
    texts: str, name: str | None, settings: tuple[str, ...], key_file: Path | None, profile: Path | None, model: str | None,
    field: str | None, alpha: float, out: str | None, batch_size: int, bad_lines: Any, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Test TEXTS, a JSONL, Parquet or text file (- is stdin), for a watermark.

    The settings come from the profile that `fairlead generate` saved, or from --watermark and --set. Token ids in the
    rows are tested as they are; text is tokenized first, which finds a little less where decoding and encoding differ.
    """
    from .. import records
    from ..models import load_tokenizer

    if not 0 < alpha < 1:
        raise InputError(f"--alpha: must lie in (0, 1), got {alpha}")
    found = profile or (profile_path(Path(texts)) if texts != "-" and profile_path(Path(texts)).exists() else None)
    saved = load_profile(found) if found is not None else None
    if name is None and saved is None:
        raise InputError("no watermark: name it with --watermark, or give the --profile saved at generation")
    skipped = records.Skipped()
    rows = records.read(texts, bad_lines, skipped)
    first = next(rows, None)
    tokenizer = load_tokenizer(model) if model else None
    known = dict(saved.settings) if saved is not None and name in (None, saved.scheme) else None
    size = saved.vocab_size if saved is not None else _vocab_size(model, settings)
    mark = build(name or saved.scheme, settings, key_file, size, known)  # type: ignore[union-attr]
    if saved is not None:
        saved.check(mark.profile(tokenizer))
    writer = records.Writer(out, force=force) if out else None
    count = marked = 0
    shown: list[list[str]] = []
    for batch in records.batches(chain([] if first is None else [first], rows), batch_size):
        results = _test(mark, batch, field, tokenizer, count)
        for row, result in zip(batch, results, strict=True):
            marked += result["p_value"] < alpha
            if writer is not None:
                writer.write({**row, **result})
            if as_json:
                click.echo(json.dumps({"row": count, **result}))
            elif len(shown) < 20:
                text = str(row.get("text", ""))
                shown.append([str(count), f"{result['p_value']:.3g}", str(result["tokens_scored"]), " ".join(text.split())[:60]])
            count += 1
    if writer is not None:
        writer.close()
    for line in skipped:
        click.echo(f"skipped: {line}", err=True)
    if not as_json:
        from ..cli import print_table

        print_table(["row", "p-value", "tokens scored", "text"], shown)
        click.echo(f"{marked} of {count} texts carry the mark at level {alpha:g}" + (f"; the first {len(shown)} are shown" if count > len(shown) else ""))


def _vocab_size(model: str | None, settings: tuple[str, ...]) -> int | None:
    """Width of the model's logits, from its config alone; None when --set gives it or no model is named."""
    if model is None or any(s.startswith("vocab_size=") for s in settings):
        return None
    from transformers import AutoConfig

    from ..models import resolve

    try:
        return int(AutoConfig.from_pretrained(resolve(model)).get_text_config().vocab_size)
    except (OSError, ValueError):
        return None


def _test(mark: Any, batch: list[dict[str, Any]], field: str | None, tokenizer: Any, start: int) -> list[dict[str, Any]]:
    import torch

    lists = [_ids(row, field, tokenizer, start + i) for i, row in enumerate(batch)]
    width = max(1, max(len(ids) for ids in lists))
    ids_BT = torch.zeros((len(lists), width), dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids in enumerate(lists):
        ids_BT[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask_BT[row, : len(ids)] = 1
    found = mark.detect(ids_BT, attention_mask=mask_BT)
    return [
        {"p_value": float(found.p_value[i]), "statistic": float(found.statistic[i]), "tokens_scored": int(found.tokens_scored[i])}
        for i in range(len(lists))
    ]


def _ids(row: dict[str, Any], field: str | None, tokenizer: Any, index: int) -> list[int]:
    value = row.get(field) if field else row.get("ids", row.get("text"))
    if isinstance(value, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in value):
        return value
    if isinstance(value, str):
        if tokenizer is None:
            raise InputError(f"row {index}: is text; give --model to tokenize it, or rows with ids")
        ids: list[int] = tokenizer(value, add_special_tokens=False)["input_ids"]
        return ids
    raise InputError(f"row {index}: has no {field or 'ids or text'} to test; its columns are {', '.join(row) or 'none'}")
