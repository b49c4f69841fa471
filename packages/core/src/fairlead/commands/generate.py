"""`fairlead generate`: answers to a file of prompts, plain or marked; batched, streaming, resumable."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from .marks import build, profile_path, save_profile, watermark_options


@click.command()
@click.argument("prompts")
@click.option("--model", required=True, help="Folder, hub id or zoo:NAME of a causal language model.")
@click.option("--out", default="-", show_default=True, help="Output .jsonl or .parquet file; - is stdout.")
@watermark_options
@click.option("--field", default=None, help="Column of the prompts (default: prompt, then messages, then text).")
@click.option("--chat/--no-chat", default=None, help="Wrap string prompts as a user's turn (default: where the model has a chat template).")
@click.option("-n", "n", default=1, show_default=True, help="Answers per prompt.")
@click.option("--max-new-tokens", default=128, show_default=True)
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--top-k", type=int, default=None)
@click.option("--top-p", type=float, default=None)
@click.option("--min-p", type=float, default=None)
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-size", default=16, show_default=True, help="Prompts read and generated at a time.")
@click.option("--bad-lines", type=click.Choice(["raise", "skip"]), default="raise", show_default=True, help="What a broken input line does.")
@click.option("--resume", is_flag=True, help="Go on with an output file that was stopped.")
@click.option("--force", is_flag=True, help="Replace an existing output file.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON summary.")
def generate(
    prompts: str, model: str, out: str, name: str | None, settings: tuple[str, ...], key_file: Path | None, field: str | None,
    chat: bool | None, n: int, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None,
    min_p: float | None, seed: int, batch_size: int, bad_lines: Any, resume: bool, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Generate answers to PROMPTS, a JSONL, Parquet or text file (- is stdin).

    Each output row has prompt, text, ids, finished, seed and index. Answer i depends on the seed and on i alone, so a
    resumed run gives the rows that an undisturbed one would have. With --watermark the settings that detection needs
    are saved beside the output as FILE.profile.json; the key is not.
    """
    from .. import records
    from ..generation import generate as run
    from ..models import load
    from ..progress import bar

    if n < 1 or batch_size < 1 or max_new_tokens < 1:
        raise InputError("-n, --batch-size and --max-new-tokens must be at least 1")
    if name is None and (settings or key_file is not None):
        raise InputError("--set and --key-file belong to a watermark; name it with --watermark")
    skipped = records.Skipped()
    rows = records.read(prompts, bad_lines, skipped)
    first = next(rows, None)  # a wrong path should be said before a model is loaded
    loaded, tokenizer = load(model)
    mark = None
    if name is not None:
        mark = build(name, settings, key_file, loaded.get_output_embeddings().weight.shape[0])
        if out != "-":
            _keep_profile(Path(out), mark.profile(tokenizer), resume)
    wraps = bool(tokenizer.chat_template) if chat is None else chat
    with records.Writer(out, resume=resume, force=force) as writer, bar() as shown:
        start = writer.done // n
        if writer.done % n:
            raise InputError(f"{out}: holds {writer.done} rows, no multiple of -n {n}; resume with the -n it was made with")
        index = 0
        for batch in records.batches(chain([] if first is None else [first], rows), batch_size):
            here, index = index, index + len(batch)
            if index <= start:
                continue
            offset = max(0, start - here)
            asked = [_prompt(row, field, wraps, here + offset + i) for i, row in enumerate(batch[offset:])]
            made = run(
                loaded, tokenizer, asked, watermark=mark, n=n, max_new_tokens=max_new_tokens, temperature=temperature,
                top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, first_index=here + offset, batch_size=batch_size * n,
            )  # fmt: skip
            for row, group in zip(batch[offset:], made, strict=True):
                for answer in group:
                    writer.write(_row(row, answer))
            shown("generate", index)
        done = writer.done
    for line in skipped:
        click.echo(f"skipped: {line}", err=True)
    if as_json:
        click.echo(json.dumps({"rows": done, "out": out, "skipped": len(skipped), "watermark": name}), err=out == "-")
    elif out != "-":
        click.echo(f"{out}: {done} answers" + (f", marked with {name}" if name else "") + (f", {len(skipped)} lines skipped" if skipped else ""))


def _keep_profile(out: Path, profile: Any, resume: bool) -> None:
    """Save the profile; a resumed file must have been marked alike."""
    from .marks import load_profile

    path = profile_path(out)
    if resume and out.exists() and path.exists():
        load_profile(path).check(profile)
    else:
        save_profile(path, profile)


def _prompt(row: dict[str, Any], field: str | None, wraps: bool, index: int) -> Any:
    names = [field] if field else ["prompt", "messages", "text"]
    value = next((row[name] for name in names if row.get(name)), None)
    if value is None:
        raise InputError(f"row {index}: has no {' or '.join(names)}; its columns are {', '.join(row) or 'none'}")
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if wraps else value
    if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m and "content" in m for m in value):
        return value
    raise InputError(f"row {index}: a prompt is a string or a list of {{role, content}} messages, got {type(value).__name__}")


def _row(row: dict[str, Any], answer: Any) -> dict[str, Any]:
    kept = {k: v for k, v in row.items() if k not in ("text", "ids", "finished")} if "prompt" in row else {}
    prompt = row.get("prompt", row.get("messages", row.get("text")))
    return {
        **kept, "prompt": prompt, "text": answer.text, "ids": answer.ids.tolist(), "finished": answer.finished,
        "seed": answer.provenance["seed"], "index": answer.provenance["index"], "candidate": answer.provenance["candidate"],
    }  # fmt: skip
