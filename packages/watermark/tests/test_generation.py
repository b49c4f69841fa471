"""Marks at generation: contexts of the answer alone, beams, padding, the order of processors, bad logits and options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fairlead.errors import ConfigError, InputError
from fairlead.generation import generate
from fairlead.testing import tiny_model
from fairlead_kernels import gumbel_uniform, prf
from fairlead_watermark import KGW, Gumbel, Mark, ModifiedGumbel, bounds

MARKS: dict[str, Any] = {
    "lefthash": lambda **s: KGW(**s),
    "minhash": lambda **s: KGW(scheme="minhash", **s),
    "selfhash": lambda **s: KGW(scheme="selfhash", **s),
    "gumbel": lambda **s: Gumbel(**s),
    "modified-gumbel": lambda **s: ModifiedGumbel(**s),
}
every_mark = pytest.mark.parametrize("make", MARKS.values(), ids=MARKS.keys())


def random_ids(rows: int, tokens: int, vocab_size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def draw(mark: Mark, logits: torch.Tensor, ids: torch.Tensor, answer: int, **options: Any) -> torch.Tensor:
    rows = len(ids)
    return mark.sampler(**options)(
        logits, ids, seeds_B=torch.arange(rows), positions_B=torch.full((rows,), answer, dtype=torch.int64)
    )


def test_the_first_token_of_an_answer_follows_the_words_of_vllm() -> None:
    """Contexts of the answer alone, padded with -1: the words that vLLM's specification gives for key 42."""
    words = {0: 0xFA2F6B05, 1: 0x01B2A14F, 2: 0xE1C0616E, 3: 0x7FE6AD3F, 7: 0xBBE97CAB}
    mark = Gumbel(vocab_size=8, key=42, context_from="answer")
    logits = torch.full((1, 8), -torch.inf)
    logits[0, list(words)] = 0.0
    best = max(words, key=lambda token: words[token])
    for prompt in ([[5]], [[1, 2, 3, 4, 5, 6]]):
        assert int(draw(mark, logits, torch.tensor(prompt), answer=0)) == best
    found = mark.detect(torch.tensor([[7]]))
    u = ((words[7] >> 8) + 1) / (2**24 + 1)
    assert found.tokens_scored.tolist() == [1]
    assert float(found.statistic) == pytest.approx(-math.log1p(-u), rel=1e-5)


def test_scores_are_those_of_the_published_words() -> None:
    """Key 42, context 1 2 3 4: tokens 7 and 8 have the words 195b8912 and a14d9f35."""
    for token, word in ((7, 0x195B8912), (8, 0xA14D9F35)):
        found = Gumbel(vocab_size=100, key=42).detect(torch.tensor([[1, 2, 3, 4, token]]))
        u = ((word >> 8) + 1) / (2**24 + 1)
        assert found.extra["token_scores"][0, :4].isnan().all()
        assert float(found.statistic) == pytest.approx(-math.log1p(-u), rel=1e-5)
        assert int(prf(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[token]]), key=42, function="philox")) == word


@every_mark
def test_an_answer_is_detected_without_its_prompt_from_the_first_token_on(make: Any) -> None:
    mark = make(vocab_size=64, key=7, context_from="answer")
    ids = random_ids(4, 40)
    assert mark.detect(ids, dedup="none").tokens_scored.tolist() == [40] * 4
    assert bool((make(vocab_size=64, key=7).detect(ids, dedup="none").tokens_scored < 40).all())
    told = mark.detect(ids, dedup="none", prompt_ids=random_ids(4, 6, seed=1))
    assert torch.equal(told.statistic, mark.detect(ids, dedup="none").statistic)


@pytest.mark.parametrize("make", [MARKS["lefthash"], MARKS["minhash"], MARKS["selfhash"]])
def test_a_hard_list_in_the_answer_is_green_from_the_first_token_on(make: Any) -> None:
    mark = make(vocab_size=64, key=7, context_from="answer", delta=math.inf)
    made = generate(tiny_model(), None, list(random_ids(4, 6)), watermark=mark, max_new_tokens=30)
    found = mark.detect(torch.stack([group[0].ids for group in made]), dedup="none")
    assert found.statistic.tolist() == [30.0] * 4


@every_mark
def test_the_processor_sees_the_answer_as_the_sampler_does(make: Any) -> None:
    mark = make(vocab_size=64, key=7, context_from="answer")
    ids, logits = random_ids(3, 9), torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    short = mark.processor(prompt_length=0)(ids[:, 6:], logits)
    assert torch.equal(mark.processor(prompt_length=6)(ids, logits), short)
    assert torch.equal(mark.processor(prompt_length=6)(torch.cat([ids[:, :3] * 0, ids[:, 3:]], 1), logits), short)
    assert torch.equal(draw(mark, logits, ids, answer=3), draw(mark, logits, ids[:, 6:], answer=3))
    with pytest.raises(ConfigError, match="prompt_length"):
        mark.processor()


@every_mark
def test_left_padded_rows_are_marked_as_they_would_be_alone(make: Any) -> None:
    mark = make(vocab_size=64, key=9)
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(2))
    alone = mark.processor(pad_token_id=0)(torch.tensor([[5, 6]]), logits)
    padded = mark.processor(pad_token_id=0)(torch.tensor([[0, 0, 0, 5, 6]]), logits)
    assert torch.equal(alone, padded)
    hidden = torch.tensor([[-1, -1, -1, 5, 6]])
    assert torch.equal(draw(mark, logits, hidden, 1), draw(mark, logits, torch.tensor([[5, 6]]), 1))


@every_mark
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_stay_in_their_type_and_keep_a_choice(make: Any, dtype: torch.dtype) -> None:
    mark = make(vocab_size=5000, key=9)
    ids, logits = random_ids(4, 8, 5000), torch.randn(4, 5000, generator=torch.Generator().manual_seed(2)).to(dtype)
    out = mark.processor()(ids, logits)
    assert out.dtype == dtype
    assert bool(out.float().softmax(-1).isfinite().all())
    assert bool(((draw(mark, logits, ids, 2) >= 0) & (draw(mark, logits, ids, 2) < 5000)).all())


@every_mark
@pytest.mark.parametrize("way", [{"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 3}])
def test_generate_with_beams_and_several_sequences_in_a_padded_batch(make: Any, way: dict[str, int]) -> None:
    mark = make(vocab_size=64, key=3)
    ids, attention = torch.tensor([[0, 0, 5, 9], [3, 8, 2, 60]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    torch.manual_seed(0)
    # Plain Gumbel leaves one token a step, so there are no two beams to sample: it is searched.
    sampled = "num_beams" not in way or mark.name != "gumbel"
    out = tiny_model().generate(
        ids, attention_mask=attention, do_sample=sampled, top_k=0 if sampled else None, max_new_tokens=100,
        logits_processor=[mark.processor(pad_token_id=0)], **way,
    )  # fmt: skip
    assert out.shape == (2 * way["num_return_sequences"], 104)
    assert float(mark.detect(out[:, 4:]).p_value.median()) < 0.01
    assert float(make(vocab_size=64, key=4).detect(out[:, 4:]).p_value.median()) > 0.01


def test_generate_calls_custom_processors_before_temperature() -> None:
    """What the documentation says of the order: a bonus of delta weighs delta / T, and Gumbel's choice stays."""
    seen: list[torch.Tensor] = []

    class Spy:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            seen.append(logits.clone())
            return self.inner(ids, logits)

    model, prompt = tiny_model(), random_ids(1, 5)
    mark = Gumbel(vocab_size=64, key=3)
    outs = []
    for temperature in (1.0, 0.3):
        torch.manual_seed(0)
        outs.append(
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=temperature, top_k=5,
                max_new_tokens=10, logits_processor=[Spy(mark.processor())],
            )
        )
    assert torch.equal(outs[0], outs[1])
    with torch.inference_mode():
        raw = model(prompt).logits[:, -1]
    torch.testing.assert_close(seen[10], raw)


def test_the_bonus_is_delta_over_temperature() -> None:
    mark = KGW(vocab_size=64, key=3, delta=2.0)
    ids, logits = random_ids(2000, 3), torch.zeros(2000, 64)
    hits = {}
    for temperature in (0.5, 1.0, 2.0):
        tokens = draw(mark, logits, ids, 1, temperature=temperature)
        green = mark.processor()(ids, logits).gather(1, tokens[:, None])[:, 0] > 0
        shares = (mark.processor()(ids, logits) > 0).double().mean(1)
        a = math.exp(2.0 / temperature)
        expected = float((shares * a / (1 + (a - 1) * shares)).mean())
        hits[temperature] = (float(green.double().mean()), expected)
    for found, expected in hits.values():
        assert found == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 2000))


def test_greedy_text_carries_kgw() -> None:
    mark, logits, ids = KGW(vocab_size=64, key=3), torch.randn(3, 64), random_ids(3, 4)
    assert torch.equal(draw(mark, logits, ids, 0, temperature=0.0), mark.processor()(ids, logits).argmax(-1))


@pytest.mark.parametrize(("vocab_size", "marked", "plain"), [(64, 4.289, 4.744), (1000, 7.018, 7.4855)])
def test_flat_logits_cost_modified_gumbel_half_a_nat_of_signal(vocab_size: int, marked: float, plain: float) -> None:
    count = 4000
    contexts = torch.arange(count)[:, None]
    law = ModifiedGumbel(vocab_size=vocab_size, key=5, context_width=1)
    weights = law._process(contexts, torch.zeros(count, vocab_size)).softmax(-1).double()
    score = -torch.log1p(-gumbel_uniform(contexts, vocab_size, key=5).double())
    per_context = (weights * score).sum(-1)
    assert float(per_context.mean()) == pytest.approx(marked, abs=4 * float(per_context.std()) / math.sqrt(count))
    assert bounds.gumbel_score_mean([1 / vocab_size] * vocab_size) == pytest.approx(plain, abs=1e-3)


@every_mark
def test_logits_of_a_broken_model_are_refused_in_one_line(make: Any) -> None:
    mark, ids = make(vocab_size=64, key=3), random_ids(2, 6)
    broken = torch.zeros(2, 64)
    broken[1] = torch.nan
    single = torch.zeros(2, 64)
    single[1, 13] = torch.nan
    with pytest.raises(InputError, match="row 1"):
        mark.processor()(ids, broken)
    for logits in (broken, single, torch.full((2, 64), -torch.inf)):
        with pytest.raises(InputError) as error:
            draw(mark, logits, ids, 0)
        assert "\n" not in str(error.value)


@every_mark
@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}])
def test_bad_sampling_options_are_refused_when_the_sampler_is_made(make: Any, options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        make(vocab_size=64, key=3).sampler(**options)


def test_a_hard_list_without_an_open_green_token_leaves_the_row_alone() -> None:
    mark, ids = KGW(vocab_size=64, key=3, delta=math.inf), random_ids(2, 4)
    green = mark.processor()(ids, torch.zeros(2, 64)) == 0
    logits = torch.zeros(2, 64)
    logits[0] = logits[0].masked_fill(green[0], -math.inf)
    out = mark.processor()(ids, logits)
    assert torch.equal(out[0], logits[0])
    assert bool((out[1][~green[1]] == -math.inf).all())


@every_mark
def test_dedup_draws_a_repeated_context_from_the_model(make: Any) -> None:
    mark = make(vocab_size=64, key=3, dedup_contexts="all", context_width=2)
    ids, logits = torch.tensor([[4, 9, 1, 4, 9], [4, 9, 1, 4, 8]]), torch.randn(2, 64)
    out = mark.processor()(ids, logits)
    assert torch.equal(out[0], logits[0])
    assert not torch.equal(out[1], logits[1])
