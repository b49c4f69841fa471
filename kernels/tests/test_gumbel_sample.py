"""Oracles of gumbel_sample and gumbel_uniform: vLLM's vectors, distributions, truncation as Hugging Face does it, and what
must not change a draw."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fairlead_kernels import gumbel_sample, gumbel_uniform, native, prf, use_backend
from fairlead_kernels.ops.gumbel_sample.stream import row_words, uniforms

BACKENDS = ["reference"] + (["c"] if native.why_absent() is None else [])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NONE = torch.zeros(1, 0, dtype=torch.int64)


def contexts(count: int, width: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 1 << 31, (count, width), generator=torch.Generator().manual_seed(seed))


def only(tokens: list[int], vocabulary: int) -> torch.Tensor:
    logits = torch.full((1, vocabulary), -math.inf)
    logits[0, tokens] = 0.0
    return logits


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_marked_by_vllms_native_gumbel_is_ours(backend: str) -> None:
    start, context = torch.tensor([[-1, -1, -1, -1]]), torch.tensor([[1, 2, 3, 4]])
    cases = [
        (start, {0: 0xFA2F6B05, 1: 0x01B2A14F, 2: 0xE1C0616E, 3: 0x7FE6AD3F, 7: 0xBBE97CAB}),
        (context, {0: 0x893E53FD, 5: 0x2EB1554C, 31_999: 0x06988797}),
        (context, {7: 0x195B8912, 8: 0xA14D9F35}),
    ]
    with use_backend(backend):
        for ids, words in cases:
            u = gumbel_uniform(ids, 32_000, key=42)[0]
            for token, word in words.items():
                assert u[token] == torch.tensor(((word >> 8) + 1) / (2**24 + 1), dtype=torch.float64).float()
            left = dict(words)
            while left:  # the largest word wins, then the next when that one is masked
                drawn = int(gumbel_sample(only(list(left), 32_000), ids, key=42))
                assert left.pop(drawn) == max([words[drawn], *left.values()])


def test_uniforms_are_the_floats_just_below_their_24_bits_and_never_0_or_1() -> None:
    for start in range(0, 1 << 24, 1 << 21):
        m = torch.arange(start, start + (1 << 21))
        u = uniforms(m << 8)
        assert torch.equal(u, torch.nextafter((m + 1).float() / (1 << 24), torch.zeros(())))
        assert float(u.min()) > 0 and float(u.max()) < 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniforms_are_those_of_the_keyed_function(backend: str) -> None:
    ids = contexts(3, 5)
    with use_backend(backend):
        words = prf(ids, torch.arange(301).expand(3, -1), key=2**64 - 9, function="philox")
        assert torch.equal(gumbel_uniform(ids, 301, key=2**64 - 9), uniforms(words))


@pytest.mark.parametrize("noise", ["key", "seed"])
@pytest.mark.parametrize("options", [{}, {"top_k": 20, "top_p": 0.9, "min_p": 0.02}], ids=["plain", "truncated"])
def test_200000_draws_follow_the_softmax(noise: str, options: dict[str, Any]) -> None:
    count, temperature = 200_000, 0.7
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1)).expand(count, -1)
    if noise == "key":
        ids, logp = gumbel_sample(
            logits, contexts(count), key=3, temperature=temperature, return_logprob=True, **options
        )
    else:
        seeds, positions = torch.arange(count) % 1000, torch.arange(count) // 1000
        ids, logp = gumbel_sample(
            logits, seeds=seeds, positions=positions, temperature=temperature, return_logprob=True, **options
        )
    seen = torch.bincount(ids, minlength=300)
    expected = torch.zeros(300, dtype=torch.float64).scatter_(0, ids, logp.double().exp() * count)
    assert float(expected.sum()) == pytest.approx(
        count, rel=1e-4
    )  # every token of the support came up, with its log-prob
    if not options:
        right = (logits[0].double() / temperature).softmax(0) * count
        torch.testing.assert_close(expected, right, rtol=1e-4, atol=0)
    kept = expected > 0
    share = expected[kept] / expected.sum() * count
    assert stats.chisquare(seen[kept].numpy(), share.numpy()).pvalue > 1e-3


def test_seeds_positions_and_neighbouring_contexts_draw_independently() -> None:
    flat = torch.zeros(20_000, 16)
    n = torch.arange(20_000)
    low, far = n.clone(), n + (1 << 32)
    draws = [
        gumbel_sample(flat, seeds=s, positions=p)
        for s, p in ((low, low), (low + 1, low), (low, low + 1), (low, far), (far, low), (-1 - low, low))
    ]
    draws += [gumbel_sample(flat, n[:, None], key=5), gumbel_sample(flat, n[:, None] + 1, key=5)]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            agree = int((one == other).sum())  # binomial(20,000, 1/16): mean 1250, sd 34
            assert abs(agree - 1250) < 5 * 34


def test_the_stream_of_seeds_is_not_the_stream_of_keys() -> None:
    numbers = torch.arange(200)
    seeded = row_words(50, None, 0, torch.full((200,), 77), numbers)
    for width in (0, 1, 2, 3):
        ids = torch.stack([numbers] * width, 1) if width else torch.zeros(200, 0, dtype=torch.int64)
        assert not bool((row_words(50, ids, 77, None, None) == seeded).any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_draw_does_not_depend_on_its_batch_padding_or_memory(backend: str) -> None:
    generator = torch.Generator().manual_seed(4)
    logits, ids = torch.randn(40, 1000, generator=generator) * 2, contexts(40, 4)
    order = torch.randperm(40, generator=generator)
    with use_backend(backend):
        right = gumbel_sample(logits, ids, key=8, temperature=0.8)
        assert torch.equal(gumbel_sample(logits[order], ids[order], key=8, temperature=0.8), right[order])
        assert torch.equal(gumbel_sample(logits[7:8], ids[7:8], key=8, temperature=0.8), right[7:8])
        padded = torch.nn.functional.pad(logits, (0, 333), value=-math.inf)
        assert torch.equal(gumbel_sample(padded, ids, key=8, temperature=0.8), right)
        assert torch.equal(gumbel_sample(logits.t().contiguous().t(), ids, key=8, temperature=0.8), right)
        assert torch.equal(gumbel_sample(logits + 3.0, ids, key=8, temperature=0.8), right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_winner_of_the_vocabulary_is_the_winner_of_its_part(backend: str) -> None:
    logits, ids = torch.randn(30, 900, generator=torch.Generator().manual_seed(5)), contexts(30)
    with use_backend(backend):
        whole = gumbel_sample(logits, ids, key=1)
        for parts in (1, 3, 7):
            part_of = torch.arange(900) * parts // 900
            mine = logits.masked_fill(part_of[None, :] != part_of[whole][:, None], -math.inf)
            assert torch.equal(gumbel_sample(mine, ids, key=1), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_id(backend: str) -> None:
    ids, vocabulary, tried = torch.tensor([[9, 9]]), 30_000, 0
    u = gumbel_uniform(ids, vocabulary, key=6)[0]
    values, order = u.sort(stable=True)
    for at in (values[1:] == values[:-1]).nonzero()[:, 0][:12].tolist():
        pair = order[at : at + 2].tolist()
        with use_backend(backend):
            assert int(gumbel_sample(only(pair, vocabulary), ids, key=6)) == min(pair)
        tried += 1
    assert tried == 12


@pytest.mark.parametrize("p", [(0.5, 0.5), (0.9, 0.1), (0.7, 0.2, 0.1), (0.25,) * 4])
def test_the_best_powered_uniform_is_uniform_and_the_score_has_its_expectation(p: tuple[float, ...]) -> None:
    means = {(0.5, 0.5): 1.5, (0.9, 0.1): 1.255242, (0.7, 0.2, 0.1): 1.620875, (0.25,) * 4: 2.083333}
    count, probabilities = 100_000, torch.tensor(p, dtype=torch.float64)
    ids = contexts(count)
    u = gumbel_uniform(ids, len(p), key=12).double()
    powered, best = (u.log() / probabilities).exp().max(1)
    drawn = gumbel_sample(probabilities.log().float().expand(count, -1), ids, key=12)
    assert float((drawn == best).double().mean()) > 1 - 1e-5
    assert stats.kstest(powered.numpy(), "uniform").pvalue > 1e-3
    scores = -torch.log1p(-u.gather(1, drawn[:, None]))
    assert abs(float(scores.mean()) - means[p]) < 4 * float(scores.std()) / count**0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [40, 6000])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1}, {"top_k": 5}, {"top_k": 3000}, {"top_p": 0.01}, {"top_p": 0.5}, {"top_p": 0.97}, {"min_p": 0.3},
        {"min_p": 1.0}, {"top_k": 30, "top_p": 0.8, "min_p": 0.05}, {"top_p": 0.999, "min_p": 0.001},
    ],
    ids=str,
)  # fmt: skip
def test_truncation_keeps_what_hugging_faces_warpers_keep(
    backend: str, vocabulary: int, options: dict[str, Any]
) -> None:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    made = {"top_k": warpers.TopKLogitsWarper, "top_p": warpers.TopPLogitsWarper, "min_p": warpers.MinPLogitsWarper}
    logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(2)) * torch.tensor(
        [[0.2], [1], [2]] * 2
    )
    right = warpers.TemperatureLogitsWarper(0.8)(None, logits.double())
    for name in ("top_k", "top_p", "min_p"):
        if name in options:
            value = min(options[name], vocabulary) if name == "top_k" else options[name]
            right = made[name](value)(None, right)
    right = right.log_softmax(1).repeat_interleave(50, 0)
    with use_backend(backend):
        ids, logp = gumbel_sample(
            logits.repeat_interleave(50, 0), contexts(300), key=1, temperature=0.8, return_logprob=True, **options
        )
    torch.testing.assert_close(logp.double(), right.gather(1, ids[:, None])[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_tie_with_the_last_one_kept_stay(backend: str) -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 1.0, 0.0]]).expand(3000, -1)
    with use_backend(backend):
        for options, kept in (
            ({"top_k": 2}, {0, 2, 3, 4}),
            ({"top_k": 5}, {0, 1, 2, 3, 4, 5}),
            ({"top_p": 0.5}, {0, 2, 3, 4}),
            ({"min_p": 1.0}, {0}),
        ):
            ids = gumbel_sample(logits, contexts(3000), key=1, temperature=1.5, **options)
            assert set(ids.tolist()) == kept


@pytest.mark.skipif("c" not in BACKENDS, reason=native.why_absent() or "")
@given(data=st.data())
def test_the_c_kernel_draws_the_references_tokens(data: st.DataObject) -> None:
    batch, vocabulary = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3000))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = torch.randn(batch, vocabulary, generator=generator) * data.draw(
        st.sampled_from([0.0, 0.1, 1.0, 4.0, 50.0])
    )
    logits = logits.masked_fill(torch.rand(logits.shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.5, 0.99])), -math.inf)  # fmt: skip
    logits[torch.arange(batch), torch.randint(0, vocabulary, (batch,), generator=generator)] = 0.5
    if data.draw(st.booleans()):
        logits = logits.round() + data.draw(st.sampled_from([0.0, -60.0, 1000.0]))
    logits = logits.to(data.draw(st.sampled_from(DTYPES)))
    options: dict[str, Any] = {
        "temperature": data.draw(st.sampled_from([1e-30, 0.01, 0.3, 1.0, 2.5, 1e30])),
        "top_k": data.draw(st.one_of(st.none(), st.integers(1, 4000))),
        "top_p": data.draw(st.one_of(st.none(), st.floats(1e-6, 1.0))),
        "min_p": data.draw(st.one_of(st.none(), st.floats(1e-6, 0.99))),
        "return_logprob": True,
    }
    if data.draw(st.booleans()):
        options |= {
            "context_BH": contexts(batch, data.draw(st.integers(0, 9))),
            "key": data.draw(st.integers(0, 2**64 - 1)),
        }
    else:
        numbers = torch.randint(-(2**62), 2**62, (2, batch), generator=generator)
        options |= {"seeds": numbers[0], "positions": numbers[1]}
    ids, logp = gumbel_sample(logits, **options)
    with use_backend("reference"):
        right, right_logp = gumbel_sample(logits, **options)
    assert torch.equal(ids, right)
    torch.testing.assert_close(logp, right_logp, rtol=1e-5, atol=2e-5)
    assert bool((logits.gather(1, ids[:, None]) > -math.inf).all())


@pytest.mark.skipif("c" not in BACKENDS, reason=native.why_absent() or "")
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 8.0])
def test_the_bound_of_one_pass_loses_no_winner_of_a_large_vocabulary(scale: float) -> None:
    logits = torch.randn(8, 151_936, generator=torch.Generator().manual_seed(3)) * scale
    for options in ({}, {"top_p": 0.9}, {"top_k": 50}, {"top_k": 2000, "min_p": 0.001}):
        found = gumbel_sample(logits, contexts(8), key=4, temperature=0.9, return_logprob=True, **options)
        with use_backend("reference"):
            right = gumbel_sample(logits, contexts(8), key=4, temperature=0.9, return_logprob=True, **options)
        assert torch.equal(found[0], right[0])
        torch.testing.assert_close(found[1], right[1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_have_their_own_temperature_and_cold_ones_take_the_largest_logit(backend: str) -> None:
    logits, ids = torch.randn(4, 500, generator=torch.Generator().manual_seed(9)) * 30, contexts(4)
    heats = [1e-20, 0.3, 1.0, 40.0]
    with use_backend(backend):
        found = gumbel_sample(logits, ids, key=2, temperature=torch.tensor(heats), return_logprob=True)
        for i, heat in enumerate(heats):
            one = gumbel_sample(logits[i : i + 1], ids[i : i + 1], key=2, temperature=heat, return_logprob=True)
            assert int(one[0]) == int(found[0][i]) and float(one[1]) == pytest.approx(float(found[1][i]), abs=2e-5)
    assert int(found[0][0]) == int(logits[0].argmax()) and float(found[1][0]) == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_cannot_be_drawn_from_are_named_and_rows_left_out_are_not_looked_at(
    backend: str, dtype: torch.dtype
) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        logits = torch.zeros(3, 700, dtype=dtype)
        logits[1, 600] = bad
        if bad == -math.inf:
            logits[1] = bad
        with use_backend(backend):
            with pytest.raises(ValueError, match="row 1 has NaN, \\+inf or nothing above -inf"):
                gumbel_sample(logits, contexts(3), key=1)
            rows = torch.tensor([True, False, True])
            ids, logp = gumbel_sample(logits, contexts(3), key=1, rows=rows, return_logprob=True)
            plain = gumbel_sample(torch.zeros(3, 700, dtype=dtype), contexts(3), key=1)
        assert int(ids[1]) == -1 and float(logp[1]) == 0.0 and torch.equal(ids[rows], plain[rows])


def test_the_public_function_compiles_into_one_graph() -> None:
    def draw(logits: torch.Tensor, ids: torch.Tensor) -> Any:
        return gumbel_sample(logits * 2, ids, key=3, temperature=0.7, top_k=9, return_logprob=True)

    logits, ids = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)), contexts(3)
    found = torch.compile(draw, fullgraph=True, backend="aot_eager")(logits, ids)
    assert torch.equal(found[0], draw(logits, ids)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits_BV": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, "logits_BV: floats of shape"),
        ({"logits_BV": torch.zeros(2, 0)}, ValueError, "logits_BV: a vocabulary of at least one"),
        ({"context_BH": None}, ValueError, "noise: either context_BH with key, or seeds with positions"),
        ({"key": None}, ValueError, "key: is needed"),
        ({"key": -1}, ValueError, "key: an integer in"),
        ({"seeds": torch.arange(2)}, ValueError, "noise: either"),
        ({"positions": torch.arange(2)}, ValueError, "positions: go with seeds only"),
        ({"context_BH": None, "seeds": torch.arange(2)}, ValueError, "positions: are needed with seeds"),
        (
            {"context_BH": None, "key": None, "seeds": torch.arange(2), "positions": torch.arange(3)},
            ValueError,
            r"positions: integer \[2\]",
        ),
        ({"context_BH": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "context_BH has 3 rows, logits_BV has 2"),
        ({"context_BH": torch.zeros(2, 1)}, TypeError, "context_BH: integer ids"),
        ({"temperature": 0.0}, ValueError, "temperature: a finite number of at least 1e-30 is needed, not 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"temperature": torch.tensor([1.0, 0.0])}, ValueError, "temperature: finite numbers .* not 0.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature: a number or float \[2\]"),
        ({"top_k": 0}, ValueError, "top_k: 1 or more"),
        ({"top_k": 2.5}, TypeError, "top_k: an integer"),
        ({"top_p": 0.0}, ValueError, r"top_p: a mass in \(0, 1\]"),
        ({"top_p": 1.1}, ValueError, "top_p"),
        ({"min_p": -0.1}, ValueError, r"min_p: a share in \[0, 1\]"),
        ({"rows": torch.ones(3, dtype=torch.bool)}, ValueError, r"rows: bool \[2\]"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {"logits_BV": torch.zeros(2, 5), "context_BH": contexts(2), "key": 1, **change}
    with pytest.raises(error, match=message) as raised:
        gumbel_sample(**call)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("vocabulary", "error"), [(0, ValueError), (2.0, TypeError), (1 << 40, ValueError)])
def test_a_wrong_vocabulary_is_refused(vocabulary: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="vocab_size"):
        gumbel_uniform(NONE, vocabulary, key=1)
