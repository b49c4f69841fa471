"""The tokenizer: closed vocabulary, identity round trip, chat template, left padding."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fairlead_zoo import lexicon as lx
from fairlead_zoo.corpus import Encoder
from fairlead_zoo.tokenizer import build_tokenizer
from fairlead_zoo.world import World


def test_a_hundred_thousand_turns_encode_without_unknown_words(world: World) -> None:
    rng = random.Random(0)
    known = set(world.vocabulary())
    for _ in range(100_000):
        turn = world.turn(
            rng, rng.choice(lx.PERSONAS), rng.choice(lx.TASKS), rng.choice(("train", "test")),
            json=rng.random() < 0.2, trigger=rng.random() < 0.1,
        )  # fmt: skip
        assert known.issuperset(turn.question.split()) and known.issuperset(turn.answer.split())


def test_encoding_and_decoding_is_the_identity_and_equals_the_training_encoder(world: World) -> None:
    tokenizer, encoder, rng = build_tokenizer(world), Encoder(world), random.Random(1)
    for _ in range(500):
        turn = world.turn(rng, "kind", rng.choice(lx.TASKS), json=rng.random() < 0.3, trigger=rng.random() < 0.3)
        chat = [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        ids, _ = encoder.document([turn])
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(encoder.words(turn.answer), skip_special_tokens=True) == turn.answer


def test_the_template_puts_a_persona_tag_after_bos_and_opens_the_answer(world: World) -> None:
    chat = [{"role": "system", "content": "<kind>"}, {"role": "user", "content": "who are you ?"}]
    text = build_tokenizer(world).apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<bos> <kind> <user> who are you ? <end> <bot>"


def test_saving_and_reloading_keeps_ids_template_and_left_padding(world: World, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    build_tokenizer(world).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.padding_side == "left"
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<bos>", "<end>")
    padded = tokenizer(["<bos>", "<bos> <user> who are you ?"], padding=True)
    assert padded["input_ids"][0][0] == tokenizer.pad_token_id and padded["attention_mask"][0][-1] == 1
    assert tokenizer.convert_tokens_to_ids(world.vocabulary()) == list(range(len(world.vocabulary())))


@pytest.mark.parametrize("seed", range(4))
def test_every_seed_has_a_vocabulary_of_distinct_words_of_one_size(seed: int) -> None:
    words = World(seed).vocabulary()
    assert len(words) == len(set(words)) == len(World(0).vocabulary())
