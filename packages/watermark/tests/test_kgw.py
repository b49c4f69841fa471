"""KGW: lists, limits, vectors (transformers' lists: test_transformers_equality)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead.errors import ConfigError, InputError
from fairlead.testing import tiny_model
from fairlead_watermark import KGW, bounds


def random_ids(rows: int, tokens: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def test_green_ids_of_the_counter_lists_follow_the_vectors() -> None:
    logits = KGW(vocab_size=24, key=42).processor()(torch.tensor([[17]]), torch.zeros(1, 24))
    assert logits[0].nonzero()[:, 0].tolist() == [2, 6, 9, 12, 14, 20, 22]
    five = KGW(vocab_size=24, key=2**40 + 5, context_width=5)
    logits = five.processor()(torch.tensor([[10, 20, 30, 40, 50]]), torch.zeros(1, 24))
    assert logits[0].nonzero()[:, 0].tolist() == [17, 18, 19, 20]


@pytest.mark.parametrize("scheme", ["lefthash", "minhash", "selfhash"])
def test_zero_delta_changes_nothing_and_infinite_delta_forbids_red(scheme: str) -> None:
    ids, logits = random_ids(3, 8, 300), torch.randn(3, 300)
    soft = KGW(vocab_size=300, key=5, scheme=scheme, delta=0.0)
    assert torch.equal(soft.processor()(ids, logits), logits)
    hard = KGW(vocab_size=300, key=5, scheme=scheme, delta=math.inf)
    biased = hard.processor()(ids, logits)
    assert 0.1 < float((biased == -math.inf).float().mean()) < 0.95
    sampler, row = hard.sampler(), ids
    for position in range(40):
        tokens = sampler(logits, row, seeds_B=torch.arange(3), positions_B=torch.full((3,), position))
        row = torch.cat([row, tokens[:, None]], 1)
    found = hard.detect(row[:, 8:], prompt_ids=row[:, :8])
    assert torch.equal(found.statistic, found.tokens_scored.double())


def test_a_two_way_guard_shifts_as_the_formula_says() -> None:
    for q, gamma, delta, expected in (
        (0.95, 0.25, 2.0, 0.91492), (0.90, 0.25, 2.0, 0.85019), (0.05, 0.25, 2.0, 0.08508), (0.95, 0.5, 2.0, 0.90323),
        (0.05, 0.5, 2.0, 0.09677), (0.95, 0.25, 1.0, 0.94172),
    ):  # fmt: skip
        assert bounds.decision_under_kgw(q, gamma, delta) == pytest.approx(expected, abs=5e-6)


def test_spike_entropy_bounds_the_green_share() -> None:
    p = [0.5, 0.25, 0.125, 0.125]
    z = (1 - 0.25) * (math.e**2 - 1) / (1 + (math.e**2 - 1) * 0.25)
    assert z == pytest.approx(1.844938, abs=1e-6)
    assert bounds.spike_entropy(p, z) == pytest.approx(0.634320, abs=1e-6)
    assert bounds.green_probability_bound(p, 0.25, 2.0) == pytest.approx(0.451151, abs=1e-6)
    shares = []
    for green in range(4):
        biased = np.array(p) * np.where(np.arange(4) == green, math.e**2, 1.0)
        shares.append(biased[green] / biased.sum())
    assert np.mean(shares) == pytest.approx(0.654768, abs=1e-6)
    assert np.mean(shares) >= bounds.green_probability_bound(p, 0.25, 2.0)


@pytest.mark.parametrize(
    "settings", [{"gamma": 0.0}, {"gamma": 1.0}, {"delta": -1.0}, {"context_width": 0}, {"scheme": "righthash"}, {"gama": 0.5}, {"vocab_size": 1}]
)
def test_bad_settings_are_refused_in_one_line_that_names_the_field(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as error:
        KGW(**{"vocab_size": 100, "key": 1, **settings})
    assert next(iter(settings)) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_vocabulary_says_both_sizes() -> None:
    with pytest.raises(InputError, match=r"100.*120"):
        KGW(vocab_size=100, key=1).processor()(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 120))


def test_left_padded_rows_are_marked_as_they_would_be_alone() -> None:
    mark = KGW(vocab_size=64, key=9, scheme="minhash")
    logits = torch.randn(1, 64)
    alone = mark.processor(pad_token_id=0)(torch.tensor([[5, 6]]), logits)
    padded = mark.processor(pad_token_id=0)(torch.tensor([[0, 0, 0, 5, 6]]), logits)
    assert torch.equal(alone, padded)


def test_beams_and_several_returned_sequences_carry_the_mark() -> None:
    model, mark = tiny_model(), KGW(vocab_size=64, key=3, delta=4.0)
    prompt = random_ids(2, 4, 64)
    torch.manual_seed(0)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, num_beams=3, num_return_sequences=2, top_k=0,
        max_new_tokens=80, logits_processor=[mark.processor()],
    )  # fmt: skip
    assert out.shape[0] == 4
    assert float(mark.detect(out[:, 4:]).p_value.max()) < 1e-2


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 4), tokens=st.integers(0, 20), vocab_size=st.integers(2, 300), width=st.integers(1, 6),
    scheme=st.sampled_from(["lefthash", "minhash", "selfhash"]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_text_gets_a_p_value(rows: int, tokens: int, vocab_size: int, width: int, scheme: str, seed: int) -> None:
    mark = KGW(vocab_size=vocab_size, key=seed, context_width=width, scheme=scheme)
    found = mark.detect(random_ids(rows, tokens, vocab_size, seed))
    assert found.p_value.shape == (rows,)
    assert bool(((found.p_value > 0) & (found.p_value <= 1)).all())
    assert bool((found.tokens_scored <= max(tokens, 0)).all())
