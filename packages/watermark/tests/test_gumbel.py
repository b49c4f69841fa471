"""Gumbel and modified Gumbel: unbiasedness, expected scores, vectors, limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from fairlead.errors import ConfigError
from fairlead_kernels import gumbel_uniform
from fairlead_watermark import Gumbel, ModifiedGumbel, bounds

KEYS = torch.arange(200_000)


def chosen(p: list[float], count: int = 100_000) -> torch.Tensor:
    """Plain Gumbel's choice under `count` contexts, which stand for as many keys."""
    logits = torch.tensor(p).log().expand(count, -1).contiguous()
    mark = Gumbel(vocab_size=len(p), key=11, context_width=1)
    ids = torch.arange(count)[:, None]
    noise = {"seeds_B": torch.zeros(count, dtype=torch.int64), "positions_B": torch.zeros(count, dtype=torch.int64)}
    return mark.sampler()(logits, ids, **noise)


def test_over_keys_plain_gumbel_draws_from_the_model() -> None:
    p = [0.4, 0.3, 0.2, 0.1]
    counts = torch.bincount(chosen(p), minlength=4).numpy()
    assert chisquare(counts, np.array(p) * counts.sum()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("p", "expected"), [((0.5, 0.5), 1.5), ((0.9, 0.1), 1.255242), ((0.7, 0.2, 0.1), 1.620875), ((0.25,) * 4, 2.083333)]
)
def test_the_expected_score_is_the_harmonic_sum(p: tuple[float, ...], expected: float) -> None:
    assert bounds.gumbel_score_mean(p) == pytest.approx(expected, abs=1e-6)
    count = 100_000
    tokens = chosen(list(p), count)
    u = gumbel_uniform(torch.arange(count)[:, None], len(p), key=11).gather(1, tokens[:, None])[:, 0].double()
    scores = -torch.log1p(-u)
    assert float(scores.mean()) == pytest.approx(expected, abs=4 * float(scores.std()) / math.sqrt(count))


def test_a_token_without_rival_carries_no_signal() -> None:
    assert bounds.gumbel_score_mean([1.0]) == pytest.approx(1.0)


def test_the_winner_raised_to_its_inverse_probability_is_uniform() -> None:
    p = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    u = gumbel_uniform(torch.arange(20_000)[:, None], 4, key=3).double()
    assert kstest((u.log() / p).exp().amax(1).numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    ("p", "first"), [((0.9, 0.1), 0.873593), ((0.7, 0.3), 0.671159), ((0.95, 0.05), 0.933936), ((0.6, 0.4), 0.583780), ((0.5, 0.5), 0.5), ((0.99, 0.01), 0.986274)]
)
def test_modified_gumbel_has_the_marginals_of_the_quadrature(p: tuple[float, float], first: float) -> None:
    count = 200_000
    mark = ModifiedGumbel(vocab_size=2, key=5, context_width=1)
    logits = torch.tensor(p).log().expand(count, -1)
    weights = mark.processor()(torch.arange(count)[:, None], logits).softmax(-1)[:, 0].double()
    assert float(weights.mean()) == pytest.approx(first, abs=4 * float(weights.std()) / math.sqrt(count))


def test_modified_gumbel_over_three_tokens() -> None:
    count = 100_000
    mark = ModifiedGumbel(vocab_size=3, key=5, context_width=1)
    law = mark.processor()(torch.arange(count)[:, None], torch.tensor([0.7, 0.2, 0.1]).log().expand(count, -1)).softmax(-1)
    np.testing.assert_allclose(law.mean(0).numpy(), [0.6593, 0.2240, 0.1167], atol=0.004)
    u = gumbel_uniform(torch.arange(count)[:, None], 3, key=5).double()
    assert float((law * -torch.log1p(-u)).sum(-1).mean()) == pytest.approx(1.502, abs=0.015)


def test_the_flat_limit_picks_the_best_with_the_chance_e_to_minus_euler() -> None:
    count, vocab_size = 4000, 1000
    mark = ModifiedGumbel(vocab_size=vocab_size, key=5, context_width=1)
    law = mark.processor()(torch.arange(count)[:, None], torch.zeros(count, vocab_size)).softmax(-1)
    assert float(law.amax(-1).mean()) == pytest.approx(math.exp(-np.euler_gamma), abs=0.012)
    assert float((law**2).sum(-1).mean()) == pytest.approx(0.4385, abs=0.012)


def test_a_small_tau_is_plain_gumbel() -> None:
    logits = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(500)[:, None]
    noise = {"seeds_B": torch.arange(500), "positions_B": torch.zeros(500, dtype=torch.int64)}
    plain = Gumbel(vocab_size=500, key=5, context_width=1)
    sharp = ModifiedGumbel(vocab_size=500, key=5, context_width=1, tau=1e-4)
    wide = torch.full((500, 500), -torch.inf)
    wide[:, :40] = logits
    assert torch.equal(plain.sampler()(wide, ids, **noise), sharp.sampler()(wide, ids, **noise))


def test_the_keyed_uniforms_follow_the_published_words() -> None:
    words = {0: 0x893E53FD, 5: 0x2EB1554C, 7: 0x195B8912, 8: 0xA14D9F35}
    u = gumbel_uniform(torch.tensor([[1, 2, 3, 4]]), 9, key=42)[0]
    for token, word in words.items():
        assert float(u[token]) == np.float32(((word >> 8) + 1) / (2**24 + 1))


def test_a_repeated_context_gets_a_free_token_with_dedup() -> None:
    logits, ids = torch.zeros(1, 50), torch.tensor([[7, 8, 9, 1, 7, 8, 9]])

    def draws(dedup: str | None, answer: int) -> int:
        """Different tokens over 30 seeds when the last `answer` ids are the answer."""
        sample = Gumbel(vocab_size=50, key=1, context_width=3, dedup_contexts=dedup).sampler()
        seeds = [torch.tensor([s]) for s in range(30)]
        return len({int(sample(logits, ids, seeds_B=s, positions_B=torch.tensor([answer]))) for s in seeds})

    assert draws(None, 7) == 1
    assert draws("single_turn", 7) > 10
    assert draws("single_turn", 2) == 1  # the earlier occurrence lies in the prompt of five tokens
    assert draws("all", 2) > 10


def test_the_processor_dedups_from_the_prompt_length_on() -> None:
    logits, ids = torch.randn(1, 50), torch.tensor([[7, 8, 9, 1, 7, 8, 9]])
    mark = Gumbel(vocab_size=50, key=1, context_width=3, dedup_contexts="single_turn")
    assert torch.equal(mark.processor(prompt_length=0)(ids, logits), logits)
    assert int((mark.processor(prompt_length=5)(ids, logits) > -torch.inf).sum()) == 1


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_greedy_text_cannot_carry_the_mark(temperature: float) -> None:
    for mark in (Gumbel(vocab_size=50, key=1), ModifiedGumbel(vocab_size=50, key=1)):
        with pytest.raises(ConfigError, match="temperature"):
            mark.processor(temperature=temperature)
        with pytest.raises(ConfigError, match="temperature"):
            mark.sampler(temperature=temperature)


def test_processor_and_sampler_choose_alike() -> None:
    logits = torch.randn(6, 80, generator=torch.Generator().manual_seed(2))
    ids = torch.randint(0, 80, (6, 9), generator=torch.Generator().manual_seed(3))
    mark = Gumbel(vocab_size=80, key=4)
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}
    by_processor = mark.processor(**options)(ids, logits).argmax(-1)
    noise = {"seeds_B": torch.zeros(6, dtype=torch.int64), "positions_B": torch.zeros(6, dtype=torch.int64)}
    assert torch.equal(mark.sampler(**options)(logits, ids, **noise), by_processor)


def test_truncation_keeps_what_transformers_keeps() -> None:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from fairlead_watermark.modified_gumbel import truncated

    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(2)) * 3
    for ours, theirs in (
        ((7, None, None), TopKLogitsWarper(7)), ((None, 0.8, None), TopPLogitsWarper(0.8)), ((None, None, 0.1), MinPLogitsWarper(0.1)),
    ):  # fmt: skip
        assert torch.equal(truncated(logits, *ours).isinf(), theirs(None, logits.clone()).isinf())
