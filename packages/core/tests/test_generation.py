"""The engine: equal to Hugging Face's own greedy search, independent of batches, honest about ends, limits and padding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.generation.logits_process import SuppressTokensLogitsProcessor

from fairlead.engine import Rules, roll
from fairlead.errors import InputError
from fairlead.generation import PADDING, PlainSampler, RolloutEngine, generate, seeds

VOCABULARY = 50
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": None}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, eos_token_id=[7, 8])).eval()


def prompts(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(9, VOCABULARY, (n,), generator=generator) for n in lengths]


def ids(made: list[list[Any]]) -> list[list[list[int]]]:
    return [[g.ids.tolist() for g in group] for group in made]


def models() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**SMALL, eos_token_id=7)).eval(),
        "mistral, sliding window": MistralForCausalLM(MistralConfig(**SMALL, eos_token_id=7, sliding_window=5)).eval(),
        "gpt2": GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=7, bos_token_id=1,
                       pad_token_id=0, initializer_range=0.3)
        ).eval(),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "mistral, sliding window", "gpt2"])
def test_greedy_equals_hugging_faces_greedy_search_under_left_padding(name: str) -> None:
    model = models()[name]
    asked = prompts(3, 9, 5)
    made = generate(model, None, asked, temperature=0, max_new_tokens=12)
    for prompt, (mine,) in zip(asked, made, strict=True):
        theirs = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=12)
        assert mine.ids.tolist() == theirs[0, len(prompt) :].tolist()


def test_a_candidate_is_the_same_alone_in_a_batch_and_among_more(model: Any) -> None:
    asked = prompts(4, 11, 6, 2, 8)
    whole = ids(generate(model, None, asked, n=4, max_new_tokens=14, seed=3))
    assert ids(generate(model, None, asked, n=4, max_new_tokens=14, seed=3, batch_size=4)) == whole
    assert [g[:1] for g in whole] == ids(generate(model, None, asked, n=1, max_new_tokens=14, seed=3))
    for i in (0, 2, 4):
        assert ids(generate(model, None, asked[i : i + 1], n=4, max_new_tokens=14, seed=3, first_index=i)) == whole[i : i + 1]
    assert len({tuple(c) for c in whole[0]}) > 1, "candidates of one prompt differ"


def test_a_model_with_adapters_writes_what_the_model_beneath_writes(model: Any) -> None:
    import copy

    peft = pytest.importorskip("peft")
    prompts = [torch.tensor([3, 4, 5]), torch.tensor([6])]
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    found, beneath = (generate(m, None, prompts, max_new_tokens=8) for m in (adapted, adapted.get_base_model()))
    plain = generate(model, None, prompts, max_new_tokens=8)
    assert all(torch.equal(a[0].ids, b[0].ids) for a, b in zip(found, beneath, strict=True))
    assert any(not torch.equal(a[0].ids, b[0].ids) for a, b in zip(found, plain, strict=True))


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt() -> None:
    from fairlead.generation import encode

    class Ending:
        eos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = [1 if word == "</s>" else len(word) + 1 for word in text.split()]
            return {"input_ids": ids + [1] * add_special_tokens}

    assert encode(Ending(), "aa bbb").tolist() == [3, 4]
    assert encode(Ending(), "aa </s>").tolist() == [3, 1, 1]  # an end that the text itself holds stays as it is


def test_another_seed_gives_other_answers(model: Any) -> None:
    asked = prompts(4, 4)
    assert ids(generate(model, None, asked, seed=0)) == ids(generate(model, None, asked, seed=0))
    assert ids(generate(model, None, asked, seed=0)) != ids(generate(model, None, asked, seed=1))


def test_equal_prompts_at_two_places_draw_their_own_noise(model: Any) -> None:
    prompt = prompts(5)[0]
    made = ids(generate(model, None, [prompt, prompt], max_new_tokens=20))
    assert made[0] != made[1]


def test_every_end_token_of_the_generation_config_ends_and_is_kept(model: Any) -> None:
    made = [g for group in generate(model, None, prompts(*[4] * 24), n=4, max_new_tokens=60) for g in group]
    finished = [g for g in made if g.finished]
    assert {int(g.ids[-1]) for g in finished} == {7, 8}
    assert all(not set(g.ids[:-1].tolist()) & {7, 8} for g in made)
    assert all(len(g.ids) == 60 for g in made if not g.finished)


def test_an_end_token_at_the_length_limit_counts_as_finished(model: Any) -> None:
    sampler = _always([9, 9, 7])
    (made,) = generate(model, None, prompts(3), sampler=sampler, max_new_tokens=3)[0]
    assert made.finished
    assert made.ids.tolist() == [9, 9, 7]


def _always(tokens: list[int]) -> Any:
    return lambda logits_BV, ids_BT, *, seeds_B, positions_B: torch.tensor(tokens)[positions_B]


def test_rows_that_have_ended_cost_nothing_more(model: Any) -> None:
    calls = []

    def sampler(logits_BV: torch.Tensor, ids_BT: torch.Tensor, *, seeds_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
        calls.append(len(logits_BV))
        # The candidate's parity tells when it ends: half the rows after one token, the others after four.
        ends = (seeds_B % 2 == 0) | (positions_B == 3)
        return torch.where(ends, 7, 9)

    made = generate(model, None, prompts(3, 3, 3, 3), n=8, sampler=sampler, max_new_tokens=50)
    lengths = {len(g.ids) for group in made for g in group}
    assert lengths == {1, 4}
    assert len(calls) == 4, "early exit when all rows have ended"
    assert calls[1] < calls[0], "ended rows are dropped"


def rolled(model: Any, asked: list[torch.Tensor], room: int, **options: Any) -> Any:
    engine = RolloutEngine(model)
    engine.prefill(asked, room)
    rules = Rules(ends=frozenset({7, 8}))
    return roll(engine, room, PlainSampler(), rules, seeds_B=seeds(3, range(len(asked)), 1), **options)


def test_a_listener_is_told_every_token_of_every_answer_as_it_comes(model: Any) -> None:
    asked = prompts(*[4] * 12)
    heard: list[list[int]] = [[] for _ in asked]
    steps: list[int] = []

    def listen(answers: torch.Tensor, tokens: torch.Tensor) -> None:
        steps.append(len(answers))
        for answer, token in zip(answers.tolist(), tokens.tolist(), strict=True):
            heard[answer].append(token)

    made = rolled(model, asked, 40, listen=listen)
    assert heard == [answer.tolist() for answer in made.ids]
    assert steps[0] == 12
    assert steps[-1] < 12, "answers that have ended are not told again"
    assert [a.tolist() for a in rolled(model, asked, 40).ids] == heard, "listening changes nothing"


def test_a_listener_cuts_single_answers_and_leaves_the_others_as_they_are(model: Any) -> None:
    asked = prompts(*[4] * 8)
    whole = rolled(model, asked, 12)
    limit = [1, 20, 3, 20, 5, 20, 2, 20]
    count = [0] * 8

    def listen(answers: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        for answer in answers.tolist():
            count[answer] += 1
        return torch.tensor([count[answer] >= limit[answer] for answer in answers.tolist()])

    made = rolled(model, asked, 12, listen=listen)
    for i in range(8):
        assert made.ids[i].tolist() == whole.ids[i].tolist()[: limit[i]]
        assert made.ended[i] == (whole.ended[i] and len(whole.ids[i]) <= limit[i]), "a cut answer has not ended by itself"


def test_each_prompt_is_run_once_for_all_its_candidates(model: Any) -> None:
    fed = []
    hook = model.model.embed_tokens.register_forward_hook(lambda m, i, o: fed.append(i[0].numel()))
    generate(model, None, prompts(10), n=6, max_new_tokens=2, sampler=_always([9, 9]))
    hook.remove()
    assert fed == [10, 6]


def test_samplers_see_minus_one_where_the_padding_is(model: Any) -> None:
    seen = []

    def sampler(logits_BV: torch.Tensor, ids_BT: torch.Tensor, *, seeds_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
        seen.append(ids_BT.clone())
        return torch.full((len(ids_BT),), 9)

    asked = prompts(2, 5)
    generate(model, None, asked, sampler=sampler, max_new_tokens=2)
    assert seen[0].tolist() == [[PADDING] * 3 + asked[0].tolist(), asked[1].tolist()]
    assert seen[1].tolist() == [[PADDING] * 3 + asked[0].tolist() + [9], asked[1].tolist() + [9]]


def test_processors_work_as_in_hugging_faces_generate(model: Any) -> None:
    banned = list(range(9, 40))
    processors = LogitsProcessorList([SuppressTokensLogitsProcessor(banned)])
    made = generate(model, None, prompts(4, 6), n=3, logits_processor=processors, max_new_tokens=20)
    assert not {t for group in made for g in group for t in g.ids.tolist()} & set(banned)


def test_logprobs_are_those_of_the_unmarked_model(model: Any) -> None:
    (prompt,) = prompts(5)
    (made,) = generate(model, None, [prompt], temperature=0.7, max_new_tokens=10, return_logprobs=True)[0]
    with torch.no_grad():
        logits = model(torch.cat([prompt, made.ids])[None]).logits[0, len(prompt) - 1 : -1]
    expected = (logits / 0.7).log_softmax(-1).gather(-1, made.ids[:, None])[:, 0]
    torch.testing.assert_close(made.logprobs, expected, rtol=1e-4, atol=1e-4)


def test_sampled_tokens_follow_the_models_distribution(model: Any) -> None:
    (prompt,) = prompts(6)
    made = generate(model, None, [prompt], n=6000, batch_size=6000, max_new_tokens=1, seed=5)[0]
    counts = torch.bincount(torch.tensor([int(g.ids[0]) for g in made]), minlength=VOCABULARY).double()
    with torch.no_grad():
        expected = model(prompt[None]).logits[0, -1].double().softmax(-1) * 6000
    kept = expected >= 5
    chi = float(((counts - expected).square() / expected)[kept].sum() + (counts[~kept].sum() - expected[~kept].sum()).square() / expected[~kept].sum())
    degrees = int(kept.sum())
    assert chi < degrees + 5 * (2 * degrees) ** 0.5


@given(seed=st.integers(0, 2**63), index=st.integers(0, 2**40), n=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_any_seed_and_index_is_accepted(seed: int, index: int, n: int) -> None:
    made = generate(_Bigram(), None, prompts(2), seed=seed, first_index=index, n=n, max_new_tokens=2)
    assert len(made[0]) == n


class _Bigram(nn.Module):
    """A causal LM without any cache: the next token's logits are a row of a table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)
        self.config = SimpleNamespace(pad_token_id=0)
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.table(input_ids) * 2)


def test_a_model_without_a_cache_runs_its_whole_text_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    bigram = _Bigram()
    made = generate(bigram, None, prompts(3, 5), n=2, temperature=0, max_new_tokens=6)
    token = int(prompts(3)[0][-1])
    for step in made[0][0].ids.tolist():
        token = int(bigram.table(torch.tensor(token)).argmax())
        assert step == token
    generate(bigram, None, prompts(3), max_new_tokens=6)
    assert sum("whole text" in r.message for r in caplog.records) <= 1


def test_cropping_takes_tokens_back(model: Any) -> None:
    engine = RolloutEngine(model)
    engine.prefill(prompts(4, 6), room=5)
    engine.advance(torch.tensor([9, 10]))
    expected = engine.logits_BV.clone()
    engine.advance(torch.tensor([11, 12]))
    engine.crop(6)
    engine.advance(torch.tensor([9, 10]))
    torch.testing.assert_close(engine.logits_BV, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="crop"):
        engine.crop(99)


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        (prompts(3), {"n": 0}, "at least 1"),
        (prompts(3), {"max_new_tokens": 0}, "at least 1"),
        ([torch.tensor([], dtype=torch.int64)], {}, "prompt 0: is empty"),
        (["text"], {}, "no tokenizer"),
        ([3.5], {"tokenizer": object()}, "must be a string"),
        (prompts(3), {"max_new_tokens": 10**6}, "positions"),
        (prompts(3), {"temperature": -1.0}, "temperature"),
        (prompts(3), {"temperature": 2e-236}, "temperature: must be 0 .the best token. or at least 1e-30, got 2.*e-236"),
    ],
)
def test_bad_requests_are_one_clear_line(model: Any, asked: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        generate(model, options.pop("tokenizer", None), asked, **options)
    assert "\n" not in str(caught.value)


def test_no_prompts_give_no_answers(model: Any) -> None:
    assert generate(model, None, []) == []


def test_greedy_is_the_temperature_zero_sampler() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 2.0, 1.0]])
    zeros = torch.zeros(2, dtype=torch.int64)
    assert PlainSampler(0)(logits, zeros[:, None], seeds_B=zeros, positions_B=zeros).tolist() == [1, 0]
