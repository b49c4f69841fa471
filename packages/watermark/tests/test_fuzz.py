"""Whatever text, mask and settings are thrown at the marks: an answer of the promised shape or one clear line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead.errors import ConfigError, InputError
from fairlead_watermark import KGW, Gumbel, Mark, ModifiedGumbel

SCHEMES = ("lefthash", "minhash", "selfhash", "hf-lefthash", "hf-selfhash", "gumbel", "modified-gumbel")


def make(scheme: str, **settings: Any) -> Mark:
    if scheme == "gumbel":
        return Gumbel(**settings)
    return ModifiedGumbel(**settings) if scheme == "modified-gumbel" else KGW(scheme=scheme, **settings)


@st.composite
def cases(draw: Any) -> tuple[Mark, torch.Tensor, torch.Tensor]:
    """A mark, texts of few different tokens (so that contexts repeat), and lengths."""
    vocab_size, rows, tokens = draw(st.integers(2, 200)), draw(st.integers(1, 4)), draw(st.integers(0, 24))
    mark = make(
        draw(st.sampled_from(SCHEMES)), vocab_size=vocab_size, key=draw(st.integers(0, 2**63 - 1)),
        context_width=draw(st.integers(1, 5)), context_from=draw(st.sampled_from(["text", "answer"])),
    )  # fmt: skip
    highest = draw(st.integers(0, vocab_size - 1))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.randint(0, highest + 1, (rows, tokens), generator=noise)
    return mark, ids, torch.randint(0, tokens + 1, (rows,), generator=noise)


@settings(max_examples=200, deadline=None)
@given(case=cases(), dedup=st.sampled_from([None, "pair", "context", "none"]), left=st.booleans())
def test_padded_batches_are_detected_as_their_rows_alone(case: Any, dedup: Any, left: bool) -> None:
    mark, ids, lengths = case
    columns = torch.arange(ids.shape[1])
    mask = columns >= ids.shape[1] - lengths[:, None] if left else columns < lengths[:, None]
    whole = mark.detect(ids, attention_mask=mask, dedup=dedup)
    assert whole.extra["token_scores"].shape == ids.shape
    assert bool(((whole.p_value > 0) & (whole.p_value <= 1)).all())
    assert torch.equal((~whole.extra["token_scores"].isnan()).sum(1), whole.tokens_scored)
    torch.testing.assert_close(whole.extra["token_scores"].nansum(1), whole.statistic)
    for row in range(len(ids)):
        alone = mark.detect(ids[row][mask[row]], dedup=dedup)
        assert alone.tokens_scored[0] == whole.tokens_scored[row]
        assert alone.statistic[0] == whole.statistic[row]
        assert alone.p_value[0] == whole.p_value[row]


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_a_repeated_text_scores_no_pair_twice(case: Any) -> None:
    mark, ids, _ = case
    pairs = [{(*row[max(0, i - 5) : i + 1],) for i in range(len(row))} for row in ids.repeat(1, 3).tolist()]
    thrice = mark.detect(ids.repeat(1, 3))
    assert bool((thrice.tokens_scored <= torch.tensor([len(p) for p in pairs])).all())


@settings(max_examples=100, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**31), cut=st.floats(0, 0.9))
def test_processors_keep_shape_type_and_what_is_forbidden(case: Any, seed: int, cut: float) -> None:
    mark, ids, _ = case
    noise = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(ids), mark.config.vocab_size, generator=noise)
    forbidden = torch.rand(logits.shape, generator=noise) < cut
    forbidden[:, 0] = False
    logits = logits.masked_fill(forbidden, -torch.inf)
    before = logits.clone()
    out = mark.processor(prompt_length=0)(ids, logits)
    assert torch.equal(logits, before)
    assert out.shape == logits.shape
    assert out.dtype == logits.dtype
    assert not bool(out.isnan().any())
    assert bool((out[forbidden] == -torch.inf).all())
    tokens = mark.sampler()(
        logits, ids, seeds_B=torch.arange(len(ids)), positions_B=torch.full((len(ids),), ids.shape[1])
    )
    assert not bool(forbidden.gather(1, tokens[:, None]).any())


@settings(max_examples=100, deadline=None)
@given(
    settings_=st.dictionaries(
        st.sampled_from(["vocab_size", "key", "gamma", "delta", "context_width", "scheme", "dedup_contexts", "tau", "context_from"]),
        st.one_of(st.none(), st.integers(-5, 100), st.floats(), st.text(max_size=3), st.booleans()),
    ),
    scheme=st.sampled_from([KGW, Gumbel, ModifiedGumbel]),
)
def test_any_settings_build_or_say_one_line(settings_: dict[str, Any], scheme: Any) -> None:
    try:
        scheme(**{"vocab_size": 50, "key": 3, **settings_})
    except ConfigError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 2000


@settings(max_examples=100, deadline=None)
@given(value=st.one_of(st.none(), st.text(max_size=4), st.floats(), st.lists(st.one_of(st.integers(-3, 70), st.floats()), max_size=4),
                       st.lists(st.lists(st.integers(-3, 70), max_size=3), max_size=3)))  # fmt: skip
def test_anything_as_ids_is_scored_or_refused(value: Any) -> None:
    try:
        found = KGW(vocab_size=64, key=1).detect(value)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert bool(((found.p_value > 0) & (found.p_value <= 1)).all())


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 4), torch.tensor([[1, 0, 1]]), "no", torch.tensor([[1, 1, 0], [1, 0, 1]])]
)
def test_masks_that_do_not_fit_or_have_gaps_are_refused(mask: Any) -> None:
    with pytest.raises(InputError, match="attention_mask"):
        KGW(vocab_size=64, key=1).detect(torch.ones(2, 3, dtype=torch.int64), attention_mask=mask)


@pytest.mark.parametrize("prompt", [torch.ones(3, 2, dtype=torch.int64), torch.tensor([[64], [1]]), torch.tensor([[0.5], [1]]), "no"])
def test_prompts_that_do_not_fit_are_refused(prompt: Any) -> None:
    with pytest.raises(InputError, match="prompt_ids"):
        KGW(vocab_size=64, key=1).detect(torch.ones(2, 3, dtype=torch.int64), prompt_ids=prompt)


def test_an_unknown_dedup_is_refused() -> None:
    with pytest.raises(InputError, match="dedup"):
        KGW(vocab_size=64, key=1).detect(torch.ones(2, 3, dtype=torch.int64), dedup="twice")  # type: ignore[arg-type]
