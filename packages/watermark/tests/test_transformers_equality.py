"""The hf- schemes of KGW against transformers' own processor and detector, bit for bit, and the published vectors."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig, WatermarkDetector, WatermarkingConfig
from transformers.generation.logits_process import WatermarkLogitsProcessor

from fairlead.errors import ConfigError
from fairlead.testing import tiny_model
from fairlead_watermark import KGW

SCHEMES = ("lefthash", "selfhash")
DEFAULT_KEY = 15485863


def pair(
    scheme: str, vocab_size: int, key: int, width: int, gamma: float = 0.25, delta: float = 2.0
) -> tuple[KGW, WatermarkLogitsProcessor]:
    mark = KGW(vocab_size=vocab_size, key=key, gamma=gamma, delta=delta, scheme=f"hf-{scheme}", context_width=width)
    theirs = WatermarkLogitsProcessor(
        vocab_size, "cpu", greenlist_ratio=gamma, bias=delta, hashing_key=key, seeding_scheme=scheme, context_width=width
    )
    return mark, theirs


def detector(scheme: str, vocab_size: int, key: int, width: int, **options: Any) -> WatermarkDetector:
    settings = WatermarkingConfig(
        greenlist_ratio=0.25, bias=2.0, hashing_key=key, seeding_scheme=scheme, context_width=width
    )
    return WatermarkDetector(PretrainedConfig(vocab_size=vocab_size, bos_token_id=-1), "cpu", settings, **options)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_biased_logits_are_equal_bit_for_bit(scheme: str) -> None:
    rng, noise = random.Random(scheme), torch.Generator().manual_seed(1)
    for case in range(20):
        vocab_size, batch = rng.choice([41, 64, 257, 1000, 4099]), rng.randint(1, 5)
        key = rng.choice([rng.randrange(1, 2**31), rng.randrange(2**40), DEFAULT_KEY])
        width = rng.randint(1, 5)
        mark, theirs = pair(scheme, vocab_size, key, width, rng.choice([0.25, 0.5]), rng.choice([0.5, 2.0, 3.3]))
        ids = torch.randint(0, vocab_size, (batch, rng.randint(width, width + 6)), generator=noise)
        dtype = rng.choice([torch.float32, torch.bfloat16])
        logits = torch.randn(batch, vocab_size, generator=noise).to(dtype)
        ours = mark.processor()(ids, logits)
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs(ids, logits)), f"case {case}: V={vocab_size}, key={key}, width={width}"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_green_counts_and_z_equal_those_of_the_detector(scheme: str) -> None:
    rng, noise = random.Random(scheme + "counts"), torch.Generator().manual_seed(2)
    for _ in range(5):
        vocab_size, width, key = rng.choice([64, 300, 1000]), rng.randint(1, 4), rng.randrange(1, 2**40)
        ids = torch.randint(0, vocab_size, (10, rng.randint(width + 1, 60)), generator=noise)
        ids[5:] = ids[5:] % 7  # repetitive texts, where counting once or every time differs
        mark, _ = pair(scheme, vocab_size, key, width)
        theirs = detector(scheme, vocab_size, key, width)(ids, return_dict=True)
        ours = mark.detect(ids, dedup="none")
        assert ours.tokens_scored.tolist() == theirs.num_tokens_scored.tolist()
        assert ours.statistic.tolist() == theirs.num_green_tokens.tolist()
        torch.testing.assert_close(ours.extra["z"], torch.tensor(theirs.z_score), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_marked_by_transformers_in_generate_has_the_same_z(scheme: str) -> None:
    width = 1 if scheme == "lefthash" else 3
    model, prompt = tiny_model(), torch.randint(1, 64, (4, 5), generator=torch.Generator().manual_seed(3))
    settings = WatermarkingConfig(seeding_scheme=scheme, context_width=width, hashing_key=1234567)
    torch.manual_seed(0)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), watermarking_config=settings, do_sample=True, max_new_tokens=80,
        top_k=0,
    )[:, 5:]  # fmt: skip
    theirs = detector(scheme, 64, 1234567, width)(out, return_dict=True)
    mark, _ = pair(scheme, 64, 1234567, width)
    ours = mark.detect(out, dedup="none")
    torch.testing.assert_close(ours.extra["z"], torch.tensor(theirs.z_score), rtol=0, atol=1e-6)
    assert float(mark.detect(out).p_value.median()) < 1e-3


def test_the_published_vectors_hold() -> None:
    mark = KGW(vocab_size=1000, key=DEFAULT_KEY, scheme="hf-lefthash")
    biased = mark.processor()(torch.tensor([[42]]), torch.zeros(1, 1000))
    green = set(biased[0].nonzero()[:, 0].tolist())
    assert {244, 203, 72, 743, 829, 556, 762, 344} <= green
    assert len(green) == 250
    selfhash = KGW(vocab_size=1000, key=DEFAULT_KEY, scheme="hf-selfhash", context_width=4)
    lists: Any = selfhash._lists
    assert int(lists._self_seeds(torch.tensor([[7, 42, 100, 200]]))) == 4811340925358076390
    assert lists._table[:4].tolist() == [138280, 994103, 467886, 915329]
    bits = lists._list(4811340925358076390)
    assert all(bits[v >> 3] >> (v & 7) & 1 for v in (282, 621, 825, 756, 104, 542))


def test_seeds_beyond_int64_wrap_as_in_transformers() -> None:
    noise = torch.Generator().manual_seed(4)
    mark, theirs = pair("selfhash", 1000, 2**62 + 12345, 4)
    lists: Any = mark._lists
    windows = torch.randint(0, 1000, (200, 4), generator=noise)
    seeds = lists._self_seeds(windows)
    assert bool((seeds < 0).any())
    for window, seed in zip(windows[:20], seeds.tolist(), strict=False):
        expected = theirs._get_greenlist_ids(window)
        bits = lists._list(seed)
        assert sorted(expected.tolist()) == [v for v in range(1000) if bits[v >> 3] >> (v & 7) & 1]


def test_fewer_than_forty_tokens_or_no_green_one_leave_the_logits_alone() -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    small = KGW(vocab_size=30, key=5, scheme="hf-selfhash")
    logits = torch.randn(1, 30)
    assert torch.equal(small.processor()(ids, logits), logits)
    rare = KGW(vocab_size=2000, key=5, scheme="hf-selfhash", gamma=0.0005, delta=float("inf"))
    logits = torch.randn(1, 2000)
    assert torch.equal(rare.processor()(ids, logits), logits)


def test_a_context_shorter_than_the_window_is_not_marked() -> None:
    mark, theirs = pair("selfhash", 64, 9, 4)
    ids, logits = torch.tensor([[3, 4]]), torch.randn(1, 64)
    assert torch.equal(mark.processor()(ids, logits), theirs(ids, logits))


def test_the_hard_list_forbids_red_tokens() -> None:
    for scheme in ("hf-lefthash", "hf-selfhash"):
        mark = KGW(vocab_size=100, key=7, scheme=scheme, delta=float("inf"))
        ids, logits = torch.tensor([[1, 2, 3, 4, 5]]), torch.randn(1, 100)
        out = mark.processor()(ids, logits)
        kept = out[0] > -torch.inf
        assert torch.equal(out[0][kept], logits[0][kept])
        token = int(out[0].argmax())
        assert mark.detect(torch.tensor([[1, 2, 3, 4, 5, token]])).extra["token_scores"][0, -1] == 1


def test_keys_that_transformers_cannot_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match="2\\^63"):
        KGW(vocab_size=64, key=2**63, scheme="hf-lefthash")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_lists_of_a_gpu_need_one_and_say_so() -> None:
    with pytest.raises(ConfigError, match="list_device"):
        KGW(vocab_size=64, key=1, scheme="hf-lefthash", list_device="cuda")


def test_the_profile_names_the_device_class() -> None:
    assert KGW(vocab_size=64, key=1, scheme="hf-lefthash").profile().device_class == "cpu"
    assert KGW(vocab_size=64, key=1).profile().device_class == "any"


def test_both_marks_generate_the_same_text_in_generate() -> None:
    """Our processor in `logits_processor` and transformers' class in the same place: the same ids, left-padded batch."""
    model = tiny_model()
    ids = torch.tensor([[0, 0, 5, 9, 11], [3, 8, 2, 60, 7]])
    attention = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for scheme in SCHEMES:
        mark, theirs = pair(scheme, 64, 321, 2)
        outs = []
        for processor in (mark.processor(), theirs):
            torch.manual_seed(1)
            outs.append(
                model.generate(
                    ids, attention_mask=attention, logits_processor=[processor], do_sample=True, max_new_tokens=20,
                    num_return_sequences=2, temperature=0.8, top_k=20,
                )
            )
        assert torch.equal(outs[0], outs[1])
