"""The rollout engine: forks, many tokens at once, ragged roll-back, counted tokens, whatever the cache can do."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from fairlead import engine as engine_module
from fairlead.engine import PADDING, RolloutEngine, Rules, slides
from fairlead.errors import InputError

VOCABULARY = 50
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
EXACT = {"atol": 1e-10, "rtol": 0.0}
SINGLE = {"atol": 1e-5, "rtol": 0.0}  # the scan of Falcon-H1 computes in float32 whatever the model's dtype


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).double().eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).double().eval()


def window() -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=5)).double().eval()


def mamba() -> Any:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, expand=1)
    return MambaForCausalLM(config).double().eval()


def hybrid() -> Any:
    torch.manual_seed(0)
    config = FalconH1Config(**SMALL | {"num_key_value_heads": 2}, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4)
    return FalconH1ForCausalLM(config).double().eval()


class _Uncroppable:
    """A cache that grows and cannot shrink, as that of a recurrent layer."""

    is_croppable = False

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._cache, name)

    def crop(self, tokens: int) -> None:
        raise RuntimeError("cannot be cropped")


def uncroppable() -> Any:
    """A Llama model whose cache refuses to be cropped."""
    model = llama()
    forward = model.forward

    def wrapped(input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
                use_cache: bool = True, logits_to_keep: int = 0) -> Any:  # fmt: skip
        inner = past_key_values._cache if isinstance(past_key_values, _Uncroppable) else past_key_values
        out = forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache,
                      logits_to_keep=logits_to_keep, **{_cache_name(model): inner})  # fmt: skip
        return Output(out.logits, _Uncroppable(getattr(out, _cache_name(model))))

    wrapper = copy.copy(model)
    wrapper.__dict__["forward"] = wrapped
    return wrapper


class Output:
    def __init__(self, logits: torch.Tensor, cache: Any) -> None:
        self.logits, self.past_key_values = logits, cache


def _cache_name(model: Any) -> str:
    import inspect

    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


ALL: dict[str, Callable[[], Any]] = {
    "llama": llama, "gpt2": gpt2, "sliding window": window, "mamba": mamba, "hybrid": hybrid, "no crop": uncroppable
}  # fmt: skip


def random_ids(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]


def close(name: str) -> dict[str, float]:
    return SINGLE if name == "hybrid" else EXACT


def started(model: Any, prompts: list[torch.Tensor], rollback: bool = True) -> RolloutEngine:
    engine = RolloutEngine(model, rollback=rollback)
    engine.prefill(prompts, 4)
    return engine


def fresh(model: Any, text: torch.Tensor) -> torch.Tensor:
    """Next-token logits of a text alone, without the engine."""
    with torch.inference_mode():
        logits: torch.Tensor = type(model).forward(model, input_ids=text[None], use_cache=False).logits[0, -1]
    return logits


def texts(engine: RolloutEngine) -> list[list[int]]:
    return [row[row != PADDING].tolist() for row in engine.ids_BT]


@pytest.mark.parametrize("name", list(ALL))
def test_after_a_ragged_drop_every_row_is_as_if_only_its_kept_tokens_had_been_run(name: str) -> None:
    model = ALL[name]()
    prompts = random_ids(4, 9, 6)
    more = torch.stack(random_ids(5, 5, 5, seed=1))
    engine = started(model, prompts)
    engine.extend(more)
    engine.drop(torch.tensor([1, 4, 0]))
    expected = [torch.cat([p, m[: 5 - n]]) for p, m, n in zip(prompts, more, (1, 4, 0), strict=True)]
    assert texts(engine) == [e.tolist() for e in expected]
    tokens = torch.tensor([11, 12, 13])
    engine.extend(tokens[:, None])
    for row, text in enumerate(expected):
        torch.testing.assert_close(engine.logits_BV[row], fresh(model, torch.cat([text, tokens[row : row + 1]])), **close(name))


@pytest.mark.parametrize("name", list(ALL))
def test_drops_and_extensions_in_turn_leave_what_a_fresh_run_gives(name: str) -> None:
    model = ALL[name]()
    kept = random_ids(7, 3)
    engine = started(model, kept)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        more = torch.randint(1, VOCABULARY, (2, 4), generator=generator)
        count = torch.randint(0, 4, (2,), generator=generator)
        engine.extend(more)
        engine.drop(count)
        kept = [torch.cat([k, m[: 4 - int(n)]]) for k, m, n in zip(kept, more, count, strict=True)]
        assert texts(engine) == [k.tolist() for k in kept]
    engine.advance(torch.tensor([5, 6]))
    for row, text in enumerate(kept):
        torch.testing.assert_close(engine.logits_BV[row], fresh(model, torch.cat([text, torch.tensor([5 + row])])), **close(name))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_columns_of_mostly_holes_are_closed_with_their_keys(name: str) -> None:
    model = ALL[name]()
    kept = random_ids(3, 5, 4)
    engine = started(model, kept)
    fork = engine.fork(1)
    for step in range(12):
        more = torch.stack(random_ids(4, 4, 4, seed=10 + step))
        count = torch.tensor([0, 4, 4]).roll(step)  # one row a step keeps its tokens, so the others get holes
        engine.extend(more)
        engine.drop(count)
        kept = [torch.cat([k, m[: 4 - int(n)]]) for k, m, n in zip(kept, more, count, strict=True)]
        assert texts(engine) == [k.tolist() for k in kept]
        assert engine.columns <= max(32, 2 * max(map(len, kept)))
    assert engine.columns < 5 + 12 * 4, "columns were given back"
    assert engine._cache.get_seq_length() == engine.columns
    engine.extend(torch.tensor([[5], [6], [7]]))
    for row, text in enumerate(kept):
        torch.testing.assert_close(engine.logits_BV[row], fresh(model, torch.cat([text, torch.tensor([5 + row])])), **EXACT)
    fork.extend(torch.tensor([[5], [6], [7]]))
    assert texts(fork) == [[*p.tolist(), 5 + row] for row, p in enumerate(random_ids(3, 5, 4))]


@pytest.mark.parametrize("name", list(ALL))
def test_extending_by_many_tokens_gives_the_logits_after_each_of_them(name: str) -> None:
    model = ALL[name]()
    (prompt,), (more,) = random_ids(6), random_ids(4, seed=1)
    engine = started(model, [prompt])
    engine.extend(more[None])
    for k in range(4):
        torch.testing.assert_close(engine.logits_BKV[0, k], fresh(model, torch.cat([prompt, more[: k + 1]])), **close(name))


@pytest.mark.parametrize("name", list(ALL))
def test_a_prompt_gives_the_logits_after_as_many_of_its_tokens_as_are_asked_for(name: str) -> None:
    model, prompts = ALL[name](), random_ids(4, 7)
    engine = RolloutEngine(model)
    engine.prefill(prompts, keep=3)
    for row, prompt in enumerate(prompts):
        for k in range(3):
            torch.testing.assert_close(engine.logits_BKV[row, k], fresh(model, prompt[: len(prompt) - 2 + k]), **close(name))
    assert engine.tokens_P.tolist() == [4, 7]


@pytest.mark.parametrize("name", list(ALL))
def test_tokens_that_a_row_does_not_get_change_nothing_for_it(name: str) -> None:
    model = ALL[name]()
    prompts = random_ids(4, 6)
    engine = started(model, prompts)
    engine.extend(torch.tensor([[PADDING, 3], [7, 8]]))
    assert texts(engine) == [[*prompts[0].tolist(), 3], [*prompts[1].tolist(), 7, 8]]
    engine.extend(torch.tensor([[4], [9]]))
    torch.testing.assert_close(engine.logits_BV[0], fresh(model, torch.cat([prompts[0], torch.tensor([3, 4])])), **close(name))
    torch.testing.assert_close(engine.logits_BV[1], fresh(model, torch.cat([prompts[1], torch.tensor([7, 8, 9])])), **close(name))


def test_padding_at_the_end_of_a_row_goes_with_the_tokens_before_it() -> None:
    model, prompts = llama(), random_ids(4, 6)
    engine = started(model, prompts)
    engine.extend(torch.tensor([[3, PADDING, PADDING], [7, 8, 9]]))
    torch.testing.assert_close(engine.logits_BKV[0, 0], fresh(model, torch.cat([prompts[0], torch.tensor([3])])), **EXACT)
    engine.drop(torch.tensor([0, 2]))
    assert engine.columns == 7, "columns that no row needs leave the cache"
    assert texts(engine) == [[*prompts[0].tolist(), 3], [*prompts[1].tolist(), 7]]
    engine.extend(torch.tensor([[5], [5]]))
    torch.testing.assert_close(engine.logits_BV[0], fresh(model, torch.cat([prompts[0], torch.tensor([3, 5])])), **EXACT)
    torch.testing.assert_close(engine.logits_BV[1], fresh(model, torch.cat([prompts[1], torch.tensor([7, 5])])), **EXACT)


@pytest.mark.parametrize("name", list(ALL))
def test_left_padding_changes_no_logits(name: str) -> None:
    model, prompts = ALL[name](), random_ids(3, 9, 5)
    engine = started(model, prompts)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(engine.logits_BV[row], fresh(model, prompt), **close(name))


@pytest.mark.parametrize("name", list(ALL))
def test_three_rows_together_are_three_rows_alone(name: str) -> None:
    model, prompts = ALL[name](), random_ids(3, 8, 5)
    more, count = torch.stack(random_ids(4, 4, 4, seed=3)), torch.tensor([2, 0, 3])
    together = started(model, prompts)
    together.extend(more)
    together.drop(count)
    together.extend(more[:, :2])
    for row in range(3):
        alone = started(model, prompts[row : row + 1])
        alone.extend(more[row : row + 1])
        alone.drop(count[row : row + 1])
        alone.extend(more[row : row + 1, :2])
        torch.testing.assert_close(together.logits_BKV[row], alone.logits_BKV[0], **close(name))
        assert texts(together)[row] == texts(alone)[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "sliding window"])
def test_tokens_are_counted_as_by_hand(name: str) -> None:
    engine = started(ALL[name](), random_ids(3, 7))
    assert engine.tokens_P.tolist() == [3, 7]
    engine.expand(2)
    engine.advance(torch.tensor([1, 2, 3, 4]))
    assert engine.tokens_P.tolist() == [5, 9]
    if name != "sliding window":
        engine.extend(torch.tensor([[PADDING, 1], [2, 3], [4, 5], [6, 7]]))
        engine.drop(torch.tensor([1, 0, 2, 2]))
        assert engine.tokens_P.tolist() == [8, 13], "what is dropped has been paid for"
    before = engine.tokens_P.tolist()
    fork = engine.fork(1, torch.tensor([3]))
    fork.advance(torch.tensor([9]))
    assert engine.tokens_P.tolist() == [before[0], before[1] + 1], "a fork counts for its prompt"
    engine.retire(torch.tensor([0, 1]))
    engine.advance(torch.tensor([1, 1, 1, 1]))
    assert engine.tokens_P.tolist() == [before[0], before[1] + 3]
    assert engine.model_tokens == sum(before) + 5, "ended rows run until they are dropped"


def test_a_text_that_is_run_again_is_counted_again() -> None:
    engine = started(uncroppable(), random_ids(5))
    engine.extend(torch.tensor([[1, 2, 3]]))
    engine.drop(torch.tensor([2]))
    engine.extend(torch.tensor([[4]]))
    assert engine.tokens_P.tolist() == [5 + 3 + 7]


def keys(engine: RolloutEngine) -> list[torch.Tensor]:
    return [t.clone() for layer in engine._cache.layers for t in (layer.keys, layer.values)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "sliding window"])
def test_what_a_fork_does_leaves_the_cache_of_its_base_bit_identical(name: str) -> None:
    engine = started(ALL[name](), random_ids(4, 7))
    before, ids, logits = keys(engine), engine.ids_BT.clone(), engine.logits_BV.clone()
    for fork in (engine.fork(1), engine.fork(3), engine.fork(2, torch.tensor([1, 0]))):
        fork.extend(torch.ones(fork.rows, 4, dtype=torch.int64))
        fork.drop(torch.full((fork.rows,), 3))
        fork.advance(torch.full((fork.rows,), 2))
        fork.select(torch.tensor([0]))
        fork.drop(torch.tensor([3]))
    assert all(torch.equal(a, b) for a, b in zip(before, keys(engine), strict=True))
    assert torch.equal(engine.ids_BT, ids)
    assert torch.equal(engine.logits_BV, logits)


def test_a_prompt_longer_than_the_window_can_be_cropped_at_once() -> None:
    model, (prompt,) = window(), random_ids(9)
    engine = started(model, [prompt])
    engine.crop(6)
    engine.extend(torch.tensor([[6]]))
    torch.testing.assert_close(engine.logits_BV[0], fresh(model, torch.cat([prompt[:6], torch.tensor([6])])), **EXACT)


@pytest.mark.parametrize("name", ["llama", "gpt2", "sliding window", "no crop"])
def test_after_a_crop_the_text_goes_on_as_if_it_had_never_been_longer(name: str) -> None:
    model = ALL[name]()
    (prompt,) = random_ids(8)
    engine = started(model, [prompt])
    engine.extend(torch.tensor([[1, 2, 3, 4]]))
    engine.crop(9)
    engine.extend(torch.tensor([[6]]))
    torch.testing.assert_close(engine.logits_BV[0], fresh(model, torch.cat([prompt, torch.tensor([1, 6])])), **EXACT)


def test_a_row_cannot_lose_more_than_it_has() -> None:
    engine = started(llama(), random_ids(2, 5))
    with pytest.raises(InputError, match="row 0 has 2 tokens, 2 cannot go"):
        engine.drop(torch.tensor([2, 2]))
    with pytest.raises(InputError, match="at least 0"):
        engine.drop(torch.tensor([-1, 0]))
    assert texts(engine) == [p.tolist() for p in random_ids(2, 5)], "an error changes nothing"


def test_which_models_take_holes_is_known_once_their_cache_is() -> None:
    assert slides(window())
    assert not slides(llama())
    taken = {name: started(make(), random_ids(3)).takes_holes for name, make in ALL.items()}
    assert taken == {"llama": True, "gpt2": True, "sliding window": False, "mamba": False, "hybrid": False, "no crop": False}


@pytest.mark.parametrize(("name", "word"), [("no crop", "cannot be cropped"), ("sliding window", "takes no holes")])
def test_the_log_says_once_that_a_text_is_run_again(name: str, word: str, caplog: pytest.LogCaptureFixture) -> None:
    engine_module._without_crop.clear()
    with caplog.at_level(logging.WARNING, "fairlead"):
        for _ in range(2):
            engine = started(ALL[name](), random_ids(4, 6))
            engine.extend(torch.ones(2, 3, dtype=torch.int64))
            engine.drop(torch.tensor([1, 2]))
    assert sum(word in r.message for r in caplog.records) == 1


def test_rules_hold_for_logits_from_anywhere() -> None:
    asked: list[int] = []

    def ids() -> torch.Tensor:
        asked.append(1)
        return torch.tensor([[PADDING, 4]])

    logits, here = torch.zeros(1, 6), torch.tensor([1])
    held = Rules(ends=frozenset({2}), least=2).apply(logits, ids, here)
    assert held[0].tolist() == [0, 0, -torch.inf, 0, 0, 0]
    assert not asked, "ids are gathered only for processors"
    seen: list[Any] = []
    Rules(processor=lambda i, x: seen.append(i.tolist()) or x, pad_token=5).apply(logits, ids, here)
    assert seen == [[[5, 4]]]
