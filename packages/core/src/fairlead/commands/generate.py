"""`fairlead generate`: answers to a file of prompts, plain, marked or by any decoder; batched, streaming, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError
from ..kinds.decoder import DecodingError
from .marks import bad_lines_option, build, load_profile, profile_path, report_skipped, save_profile, watermark_options

if TYPE_CHECKING:
    from ..kinds import WatermarkProfile
    from ..records import Row, Skipped


@click.command()
@click.argument("prompts")
@click.option("--model", required=True, help="Folder, hub id or zoo:NAME of a causal language model.")
@click.option("--out", default="-", show_default=True, help="Output .jsonl or .parquet file; - is stdout.")
@watermark_options
@click.option("--decoder", default=None, help="Registered decoder, such as best-of-n ('fairlead methods --kind decoder').")
@click.option("--decoder-set", "decoder_settings", multiple=True, metavar="NAME=VALUE", help="A setting of the decoder; may be repeated.")
@click.option("--reward", default=None, help="Registered reward for the decoder; without one, the best of --best-of candidates.")
@click.option("--reward-set", "reward_settings", multiple=True, metavar="NAME=VALUE", help="A setting of the reward; may be repeated.")
@click.option("--best-of", default=4, show_default=True, help="Candidates per prompt for --reward without --decoder.")
@click.option("--budget", "limits", multiple=True, metavar="NAME=VALUE", help="Limit per prompt: model_tokens, reward_calls or seconds; may be repeated.")
@click.option("--field", default=None, help="Column of the prompts (default: prompt, then messages, then text).")
@click.option("--chat/--no-chat", default=None, help="Wrap string prompts as a user's turn (default: where the model has a chat template).")
@click.option("-n", "n", default=1, show_default=True, help="Answers per prompt.")
@click.option("--max-new-tokens", default=128, show_default=True)
@click.option("--temperature", default=1.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=int, default=None)
@click.option("--top-p", type=float, default=None)
@click.option("--min-p", type=float, default=None)
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-size", default=32, show_default=True, help="Answers generated at a time.")
@bad_lines_option
@click.option("--resume", is_flag=True, help="Go on with an output file that was stopped.")
@click.option("--force", is_flag=True, help="Replace an existing output file.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON summary.")
def generate(
    prompts: str, model: str, out: str, name: str | None, settings: tuple[str, ...], key_file: Path | None, decoder: str | None,
    decoder_settings: tuple[str, ...], reward: str | None, reward_settings: tuple[str, ...], best_of: int, limits: tuple[str, ...],
    field: str | None, chat: bool | None, n: int, max_new_tokens: int, temperature: float, top_k: int | None,
    top_p: float | None, min_p: float | None, seed: int, batch_size: int, bad_lines: str, resume: bool, force: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Generate answers to PROMPTS, a JSONL, Parquet or text file (- is stdin).

    Each output row has prompt, text, ids, finished, seed, index and candidate. Answer i depends on the seed and on i alone,
    so a resumed run gives the rows that an undisturbed one would have. What detection and --resume need is saved beside the
    output as FILE.profile.json; the key is not.
    """
    from .. import records, registry
    from ..cli import parse_settings
    from ..decoding import Budget
    from ..generation import generate as run
    from ..models import load, logits_width, resolve
    from ..progress import bar

    if n < 1 or batch_size < 1 or max_new_tokens < 1 or best_of < 1:
        raise InputError("-n, --best-of, --batch-size and --max-new-tokens must be at least 1")
    if name is None and (settings or key_file is not None):
        raise InputError("--set and --key-file belong to a watermark; name it with --watermark")
    if reward is not None and n != 1:
        raise InputError(f"--reward: returns the one best answer of --best-of {best_of}; leave -n {n} out")
    if decoder is None and (decoder_settings or limits):
        raise InputError("--decoder-set and --budget belong to a decoder; name it with --decoder")
    if decoder is not None and n != 1:
        raise InputError(f"--decoder: returns one answer per prompt; leave -n {n} out")
    if reward is None and reward_settings:
        raise InputError("--reward-set belongs to a reward; name it with --reward")
    judge = None if reward is None else registry.create("reward", reward, **parse_settings(reward_settings))
    policy = None if decoder is None else registry.create("decoder", decoder, **parse_settings(decoder_settings))
    budget = Budget.of(parse_settings(limits))
    if name is not None:
        registry.get("watermark", name)
    skipped = records.Skipped()
    rows = records.read(prompts if prompts == "-" else resolve(prompts), "raise" if bad_lines == "stop" else "skip", skipped)
    first = next(rows, None)  # a wrong path should be said before a model is loaded
    if first is None and not skipped.count:
        raise InputError(f"{'standard input' if prompts == '-' else prompts}: holds no prompts; give one a line, or a JSONL or Parquet file")
    loaded, tokenizer = load(model)
    mark = None if name is None else build(name, settings, key_file, logits_width(loaded))
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    if mark is not None:
        mark.sampler(**options)  # says now what it would say at the first token
    if policy is not None:
        policy.prepare(loaded, tokenizer, judge)  # what it misses should be said before a file is made
    draws = policy.rows_per_prompt if policy is not None else n if judge is None else best_of
    told: dict[str, Any] = {"model": model, "n": n, "max_new_tokens": max_new_tokens, **options, "seed": seed, "field": field, "chat": chat}
    if policy is not None:
        told |= {"decoder": decoder, "decoder_settings": list(decoder_settings), "budget": vars(budget)}
    if judge is not None:
        told |= {"reward": reward, "reward_settings": list(reward_settings)} | ({} if policy is not None else {"best_of": best_of})
    per_batch = max(1, batch_size // draws)
    wraps = bool(tokenizer.chat_template) if chat is None else chat
    asked: Iterator[tuple[Row, Any]] = _asked(chain([] if first is None else [first], rows), field, wraps, _limit(loaded, tokenizer, max_new_tokens), skipped, bad_lines)
    head = next(asked, None)  # wrong columns should be said before a file is made
    asked = chain([] if head is None else [head], asked)
    with records.Writer(out, resume=resume, force=force, group=n) as writer, bar() as shown:
        start = writer.done // n
        if out != "-":
            _keep_profile(Path(out), None if mark is None else mark.profile(tokenizer), told, fresh=not writer.done)
        _skip_done(asked, start, writer.last, field, out)
        index = start
        for batch in records.batches(asked, per_batch):
            texts = [prompt for _, prompt in batch]
            common: dict[str, Any] = {"watermark": mark, "max_new_tokens": max_new_tokens, "seed": seed, "first_index": index, "batch_size": batch_size, **options}
            if policy is not None:
                try:
                    made = [[g] for g in policy.generate(loaded, tokenizer, texts, reward=judge, budget=budget, **common).generations]
                except DecodingError as error:
                    for number, (row, _) in enumerate(batch, start=index):  # what is done before the one that failed is kept
                        if number not in error.finished:
                            break
                        writer.write(_row(row, field, error.finished[number]))
                    raise
            else:
                made = run(loaded, tokenizer, texts, n=draws, **common)
                if judge is not None:
                    made = _best(judge, batch, made)
            for (row, _), group in zip(batch, made, strict=True):
                for answer in group:
                    writer.write(_row(row, field, answer))
            index += len(batch)
            shown("generate", index)
        done = writer.done
    summary = f"{out}: {done} answers" + (f", marked with {name}" if name else "") + (f", {skipped.count} lines left out" if skipped.count else "")
    if as_json:
        click.echo(json.dumps({"rows": done, "out": out, "skipped": skipped.count, "watermark": name}), err=out == "-")
    elif out != "-":
        click.echo(summary)
    report_skipped(skipped, prompts, bad_lines)


def _limit(model: Any, tokenizer: Any, room: int) -> Callable[[Any], str]:
    """A function that says what is wrong with a prompt, or nothing."""
    from ..generation import check_lengths, encode

    def fault(prompt: Any) -> str:
        try:
            check_lengths(model, [encode(tokenizer, prompt)], room, 0)
        except InputError as error:
            return str(error).removeprefix("prompt 0: ")
        return ""

    return fault


def _asked(
    rows: Iterator[Row], field: str | None, wraps: bool, fault: Callable[[Any], str], skipped: Skipped, bad_lines: str
) -> Iterator[tuple[Row, Any]]:
    """(row, prompt) of each row that can be asked; others are noted in `skipped`, or raise."""
    usable = 0
    for row in rows:
        try:
            prompt = _prompt(row, field, wraps)
            problem = fault(prompt)
            if problem:
                raise InputError(f"{row.where}: its prompt {problem}")
        except InputError as error:
            # A first row without a prompt tells of the wrong options rather than of a broken line.
            if bad_lines == "stop" or not usable:
                raise
            skipped.add(str(error))
            continue
        usable += 1
        yield row, prompt


def _prompt(row: Row, field: str | None, wraps: bool) -> Any:
    value = _asked_value(row, field)
    if value is None:
        names = field or "prompt, messages or text"
        raise InputError(f"{row.where}: has no {names}; its columns are {', '.join(row) or 'none'}")
    if isinstance(value, str):
        if not _is_unicode(value):
            raise InputError(f"{row.where}: its prompt is no Unicode text (half a surrogate pair)")
        return [{"role": "user", "content": value}] if wraps else value
    if isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in value):
        return value
    raise InputError(f"{row.where}: a prompt is a string or a list of {{role, content}} messages, got {type(value).__name__}")


def _asked_value(row: Row, field: str | None) -> Any:
    return next((row[name] for name in ([field] if field else ["prompt", "messages", "text"]) if row.get(name)), None)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _keep_profile(out: Path, profile: WatermarkProfile | None, told: dict[str, Any], fresh: bool) -> None:
    """Save the profile; a file that is taken up again must have been generated alike."""
    path = profile_path(out)
    if not fresh and path.exists():
        old, before = load_profile(path)
        if (old is None) != (profile is None):
            raise InputError(f"{out}: cannot resume, its text was generated {'without a' if old is None else 'with a'} watermark")
        if old is not None and profile is not None:
            old.check(profile)
        changed = [k for k in told if k in before and before[k] != told[k]]
        if changed:
            was = ", ".join(f"{k}={before[k]!r} (now {told[k]!r})" for k in changed)
            raise InputError(f"{out}: cannot resume, it was generated with {was}")
    save_profile(path, profile, told)


def _skip_done(asked: Iterator[tuple[Row, Any]], count: int, last: dict[str, Any] | None, field: str | None, out: str) -> None:
    """Pass over the prompts that have their answers; the last of them must be the one that the file ends with."""
    if not count:
        return
    passed = list(islice(asked, count - 1, count))
    if not passed:
        raise InputError(f"{out}: cannot resume, it holds answers to {count} prompts, more than there are")
    row = passed[0][0]
    if last is not None and last.get("prompt") != _asked_value(row, field):
        raise InputError(f"{out}: cannot resume, its last answer is not to the prompt at {row.where}")


def _best(judge: Any, batch: list[tuple[Row, Any]], made: list[list[Any]]) -> list[list[Any]]:
    """The candidate of each prompt with the highest reward, the first one on ties."""
    from dataclasses import replace

    asked = [prompt[-1]["content"] if isinstance(prompt, list) else prompt for _, prompt in batch]
    scores = judge([p for p, group in zip(asked, made, strict=True) for _ in group], [g.text for group in made for g in group]).tolist()
    chosen = []
    for group in made:
        mine, scores = scores[: len(group)], scores[len(group) :]
        best = max(range(len(group)), key=lambda j, mine=mine: (mine[j], -j))  # type: ignore[misc]
        chosen.append([replace(group[best], reward=mine[best])])
    return chosen


def _row(row: Row, field: str | None, answer: Any) -> dict[str, Any]:
    """The input's columns and the answer's; an input column of the name of one of the answer's gives way."""
    return {
        **row, "prompt": _asked_value(row, field), "text": answer.text, "ids": answer.ids.tolist(), "finished": answer.finished,
        "seed": answer.provenance["seed"], "index": answer.provenance["index"], "candidate": answer.provenance["candidate"],
        **({} if answer.reward is None else {"reward": answer.reward}),
    }  # fmt: skip
