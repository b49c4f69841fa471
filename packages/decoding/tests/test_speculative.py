"""Speculative sampling: the target's law to the last digit, its greedy tokens, counts as by hand, whatever the batch."""

from __future__ import annotations

import copy
import itertools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from fairlead import registry
from fairlead.errors import FairleadError, InputError
from fairlead.generation import generate
from fairlead.testing.contracts import decoder_contract, registered_contract
from fairlead.testing.tiny import tiny_model
from fairlead_decoding import speculative
from fairlead_decoding.speculation import verdict
from fairlead_decoding.speculative import Speculative, block_efficiency, memory_bound_speedup

TARGET = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]], dtype=torch.float64)
DRAFT = torch.tensor([[0.4, 0.4, 0.2], [0.3, 0.4, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64)
SHARED = torch.minimum(TARGET, DRAFT)
LETTERS = 50


class Layer:
    """The cache of a chain: nothing is to be remembered but how many tokens there were."""

    is_croppable = True

    def __init__(self) -> None:
        self.length = 0

    def batch_repeat_interleave(self, n: int) -> None: ...

    def batch_select_indices(self, rows: torch.Tensor) -> None: ...


class Cache(Layer):
    @property
    def layers(self) -> list[Any]:
        return [self]

    def crop(self, tokens: int) -> None:
        self.length += tokens


class Chain(nn.Module):
    """A language model whose next-token law is the row of a table that belongs to the last token."""

    def __init__(self, table_VV: torch.Tensor, padding: int = 0) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.nn.functional.pad(table_VV.log().float(), (0, padding), value=-3.0))
        self.config = SimpleNamespace(vocab_size=len(table_VV) + padding, pad_token_id=0)
        self.config.get_text_config = lambda: self.config
        self.device, self.dtype = torch.device("cpu"), self.table.dtype
        self.eval()

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None) -> Any:
        cache = past_key_values or Cache()
        cache.length += input_ids.shape[1]
        return SimpleNamespace(logits=self.table[input_ids.clamp(max=len(self.table) - 1)], past_key_values=cache)


def llama_chain(table_VV: torch.Tensor) -> Any:
    """The same as a Llama with a cache of its own: token i is a multiple of the i-th unit vector, the layer adds nothing."""
    size = len(table_VV)
    config = LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=2, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(size) * 1024)
        model.lm_head.weight.copy_(table_VV.log().T / size**0.5)
    return model


def letters(seed: int, spread: float) -> torch.Tensor:
    """A table of 50 letters with two kinds of rows, for even and for odd letters."""
    logits = torch.randn(2, LETTERS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    return logits.softmax(-1)[torch.arange(LETTERS) % 2]


def prompts(*lengths: int, below: int = 64) -> list[torch.Tensor]:
    return [torch.randint(0, below, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


def ids(result: Any) -> list[list[int]]:
    return [g.ids.tolist() for g in result.generations]


def plain_ids(*args: Any, **options: Any) -> list[list[int]]:
    return [group[0].ids.tolist() for group in generate(*args, **options)]


def chi_square(counts: torch.Tensor, law: torch.Tensor) -> float:
    """p-value of "the counts [..., V] are drawn from the law [..., V]", one multinomial per row."""
    from scipy.stats import chi2

    expected = counts.sum(-1, keepdim=True) * law
    statistic = float(((counts - expected) ** 2 / expected.clamp(min=1e-300)).sum())
    return float(chi2.sf(statistic, counts.numel() - counts[..., 0].numel()))


# --- the rule


def test_the_published_example_of_one_step() -> None:
    q, p = torch.tensor([0.2, 0.25, 0.55], dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    accepted = 0.0
    for token in range(3):
        ratio, kept, weights = verdict(
            q.expand(1, 2, 3), p.expand(1, 1, 3), torch.tensor([[token]]), torch.tensor([[0.9999999]]), torch.tensor([[True]])
        )
        accepted += float(p[token] * ratio.clamp(max=1))
        if int(kept) == 0:
            torch.testing.assert_close(weights[0] / weights.sum(), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    assert accepted == pytest.approx(0.65, abs=1e-15)


def next_tokens(state: int, gamma: int) -> dict[tuple[int, ...], float]:
    """Exact law of what one call writes from a state of the chains, all draft paths and verdicts listed."""
    found: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(3), repeat=gamma):
        before = (state, *path)
        q, p = TARGET[list(before)][None], DRAFT[list(before[:-1])][None]
        drawn = float(torch.stack([p[0, i, x] for i, x in enumerate(path)]).prod())
        survive = 1.0
        for kept in range(gamma + 1):
            chance = torch.tensor([[0.0] * kept + [1 - 1e-16] * (gamma - kept)], dtype=torch.float64)
            ratio, said, weights = verdict(q, p, torch.tensor([path]), chance, torch.ones(1, gamma, dtype=torch.bool))
            accept = float(ratio[0, kept].clamp(max=1)) if kept < gamma else 0.0
            if accept < 1:
                assert int(said) == kept
                for token, weight in enumerate((weights[0] / weights.sum()).tolist()):
                    key = (*path[:kept], token)
                    found[key] = found.get(key, 0.0) + drawn * survive * (1 - accept) * weight
            survive *= accept
    return found


def law_of(state: int, length: int, gamma: int) -> dict[tuple[int, ...], float]:
    """Exact law of the first `length` tokens, over as many calls as that takes."""
    found: dict[tuple[int, ...], float] = {}
    for written, mass in next_tokens(state, gamma).items():
        rest = length - len(written)
        more = law_of(written[-1], rest, gamma) if rest > 0 else {(): 1.0}
        for tail, chance in more.items():
            key = (*written, *tail)[:length]
            found[key] = found.get(key, 0.0) + mass * chance
    return found


@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_the_law_of_three_tokens_is_the_targets_by_enumeration(gamma: int) -> None:
    for path, chance in law_of(0, 3, gamma).items():
        assert chance == pytest.approx(float(TARGET[[0, *path[:-1]], list(path)].prod()), abs=1e-12)


def test_the_length_of_a_block_by_enumeration() -> None:
    mean = sum(len(k) * v for k, v in next_tokens(0, 2).items())
    assert mean == pytest.approx(2.46, abs=1e-12)
    assert SHARED.sum(1).tolist() == pytest.approx([0.8, 0.9, 0.7])
    written = next_tokens(2, 4)
    first = [sum(v for k, v in written.items() if len(k) > i) for i in (1, 2, 3, 4)]
    assert first == pytest.approx([0.7, 0.54, 0.428, 0.3421], abs=5e-5)
    assert sum(len(k) * v for k, v in written.items()) == pytest.approx(3.0101, abs=5e-5)
    assert block_efficiency(0.7, 4) == pytest.approx(2.7731, abs=5e-5), "what independence would give"


def test_the_formula_of_independent_acceptance_and_the_memory_bound_speedup() -> None:
    known = {0.7: (2.533, 2.941, 2.414, 2.718), 0.9: (3.439, 4.686, 3.278, 4.331), 0.5: (1.875, 1.969, 1.787, 1.820)}
    for acceptance, values in known.items():
        taus = [block_efficiency(acceptance, gamma) for gamma in (3, 5)]
        fast = [memory_bound_speedup(tau, 0.0164, gamma) for tau, gamma in zip(taus, (3, 5), strict=True)]
        assert [*taus, *fast] == pytest.approx(values, abs=6e-4)
        grown = [block_efficiency(acceptance, gamma) for gamma in range(1, 9)]
        assert grown == sorted(grown)
    assert block_efficiency(1.0, 4) == 5


def test_transformers_rule_accepts_as_often_and_draws_the_same_law() -> None:
    from transformers.generation.utils import _speculative_sampling

    q, p = torch.tensor([0.2, 0.25, 0.55]), torch.tensor([0.5, 0.3, 0.2])
    torch.manual_seed(0)
    runs, theirs, matched = 3000, torch.zeros(3), 0
    for token in torch.multinomial(p, runs, replacement=True):
        valid, matches = _speculative_sampling(token.view(1, 1), p.log().view(1, 1, 3), 1, q.log().expand(1, 2, 3))
        theirs[valid[0, 0]] += 1
        matched += int(matches)
    target, draft = q.double().expand(3, 3), p.double().expand(3, 3)
    made = Speculative(draft=Chain(draft), gamma=1).generate(
        Chain(target), None, [torch.tensor([0])] * 6000, max_new_tokens=2, batch_size=6000
    )  # fmt: skip
    ours = torch.bincount(torch.stack([g.ids[0] for g in made.generations]), minlength=3)
    assert chi_square(theirs.double(), q.double()) > 1e-3
    assert chi_square(ours.double(), q.double()) > 1e-3
    assert matched / runs == pytest.approx(0.65, abs=4 * (0.65 * 0.35 / runs) ** 0.5)
    assert made.figures["mean_acceptance"] == pytest.approx(0.65, abs=4 * (0.65 * 0.35 / 6000) ** 0.5)


# --- the law of what is written


def test_chains_are_followed_exactly_token_by_token() -> None:
    runs = 20_000
    made = Speculative(draft=Chain(DRAFT), gamma=2).generate(
        Chain(TARGET), None, [torch.tensor([0])] * runs, max_new_tokens=3, batch_size=runs, seed=4
    )  # fmt: skip
    written = torch.stack([g.ids for g in made.generations])
    here = torch.zeros(runs, dtype=torch.int64)
    for t in range(3):
        counts = torch.bincount(here * 3 + written[:, t], minlength=9).view(3, 3).double()
        seen = counts.sum(1) > 0
        assert chi_square(counts[seen], TARGET[seen]) > 1e-3
        here = written[:, t]


def test_the_counted_tokens_a_call_are_those_of_the_theory() -> None:
    runs = 4000
    made = Speculative(draft=Chain(DRAFT), gamma=4).generate(
        Chain(TARGET), None, [torch.tensor([2])] * runs, max_new_tokens=5, batch_size=runs, seed=1
    )  # fmt: skip
    first = [g.provenance["accepted_by_position"] for g in made.generations]
    # The first call of each row drafts four tokens, later ones fewer: only a row's first call can accept a fourth.
    fourth = sum(row[3] for row in first) / runs
    assert fourth == pytest.approx(0.3421, abs=4 * (0.3421 * 0.6579 / runs) ** 0.5)
    counted, smooth = made.figures["block_efficiency"], made.figures["block_efficiency_low_variance"]
    assert smooth == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("batch", [1, 4])
def test_fifty_letters_have_the_frequencies_of_direct_sampling(batch: int) -> None:
    for seed in range(5):
        target, draft = letters(seed, 0.8), letters(seed + 100, 0.6)
        made = Speculative(draft=Chain(draft), gamma=3).generate(
            Chain(target[:1].expand(LETTERS, LETTERS)), None, [torch.tensor([i]) for i in range(4)], max_new_tokens=150,
            batch_size=batch, seed=seed,
        )  # fmt: skip
        counts = torch.bincount(torch.cat([g.ids for g in made.generations]), minlength=LETTERS).double()
        assert chi_square(counts, target[0]) > 0.01
        assert 0.3 < made.figures["mean_acceptance"] < 0.9, "both outcomes of the test are seen"


def test_a_transformer_with_a_cache_of_its_own_follows_its_table() -> None:
    target, draft = letters(7, 0.8), letters(8, 0.6)
    asked = [torch.arange(i + 1) for i in range(6)]
    options: dict[str, Any] = {"max_new_tokens": 120, "seed": 3, "batch_size": 6}
    real = Speculative(draft=llama_chain(draft), gamma=3).generate(llama_chain(target), None, asked, **options)
    counts = torch.zeros(2, LETTERS, dtype=torch.float64)
    for prompt, generation in zip(asked, real.generations, strict=True):
        before = torch.cat([prompt[-1:], generation.ids[:-1]])
        counts.index_put_((before % 2, generation.ids), torch.ones(120, dtype=torch.float64), accumulate=True)
    assert chi_square(counts, target[:2]) > 0.01
    assert ids(real) == ids(Speculative(draft=Chain(draft), gamma=3).generate(Chain(target), None, asked, **options))


def test_temperature_and_truncation_change_both_laws_before_the_test() -> None:
    target, draft = letters(1, 1.0), letters(2, 0.8)
    made = Speculative(draft=Chain(draft), gamma=3).generate(
        Chain(target), None, [torch.tensor([0])] * 8, max_new_tokens=200, temperature=0.7, top_k=12, top_p=0.9, min_p=0.05
    )  # fmt: skip
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = target[:2].log()
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)):
        scores = warper(None, scores)
    law = scores.softmax(-1)
    counts = torch.zeros(2, LETTERS, dtype=torch.float64)
    for generation in made.generations:
        before = torch.cat([torch.tensor([0]), generation.ids[:-1]])
        counts.index_put_((before % 2, generation.ids), torch.ones(200, dtype=torch.float64), accumulate=True)
    assert float(counts[law == 0].sum()) == 0
    for row in range(2):
        kept = law[row] > 0
        assert chi_square(counts[row, kept], law[row, kept]) > 0.01


# --- greedy


def tiny_pairs() -> list[tuple[Any, Any]]:
    return [(tiny_model(seed=s), tiny_model(seed=s + 10)) for s in range(3)]


def perturbed(model: Any, size: float) -> Any:
    """A draft that often agrees with its target."""
    twin = LlamaForCausalLM(model.config).eval()
    twin.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in twin.parameters():
            value += size * value.std().nan_to_num() * torch.randn(value.shape, generator=generator)
    return twin


@pytest.mark.parametrize("gamma", [1, 2, 4])
def test_greedy_answers_are_the_targets_token_for_token(gamma: int) -> None:
    for target, stranger in tiny_pairs():
        for draft in (stranger, perturbed(target, 0.05)):
            made = Speculative(draft=draft, gamma=gamma).generate(target, None, prompts(5, 9, 3), temperature=0.0, max_new_tokens=17)
            assert ids(made) == plain_ids(target, None, prompts(5, 9, 3), temperature=0.0, max_new_tokens=17)


def test_greedy_answers_are_those_of_transformers_greedy_search() -> None:
    for target, draft in tiny_pairs():
        made = Speculative(draft=draft, gamma=3).generate(target, None, prompts(5, 9), temperature=0.0, max_new_tokens=15)
        for prompt, answer in zip(prompts(5, 9), ids(made), strict=True):
            theirs = target.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=15)
            assert answer == theirs[0, len(prompt) :].tolist()


def test_greedy_answers_are_those_of_transformers_assisted_generation() -> None:
    target = tiny_model()
    draft = perturbed(target, 0.05)
    made = Speculative(draft=draft, gamma=3).generate(target, None, prompts(6, 4), temperature=0.0, max_new_tokens=20)
    for prompt, answer in zip(prompts(6, 4), ids(made), strict=True):
        theirs = target.generate(
            prompt[None], attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=20, assistant_model=draft
        )
        assert answer == theirs[0, len(prompt) :].tolist()
    assert 1.5 < made.figures["block_efficiency"] < 4, "the draft agrees now and then"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_is_the_target_writes_gamma_plus_one_tokens_a_call(temperature: float) -> None:
    model = copy.deepcopy(tiny_model()).double()
    try:
        made = Speculative(draft=model, gamma=4).generate(model, None, prompts(5, 8), temperature=temperature, max_new_tokens=20)
    finally:
        model.float()
    assert made.figures["block_efficiency"] == 5
    assert made.figures["block_efficiency_low_variance"] == pytest.approx(5)
    assert made.figures["acceptance_by_position"] == [1.0] * 4
    assert made.figures["target_calls"] == 8


# --- what an answer depends on


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.9}, {"min_new_tokens": 6, "ends": [1, 2, 3, 4]}, {"temperature": 0.0}])
def test_a_ragged_batch_is_its_prompts_one_by_one(options: dict[str, Any]) -> None:
    target = copy.deepcopy(tiny_model()).double()
    try:
        decoder, asked = Speculative(draft=perturbed(target, 0.1), gamma=3), prompts(5, 9, 3, 12, 7)
        decoder.config.draft.double()
        whole = decoder.generate(target, None, asked, max_new_tokens=25, seed=2, **options)
        alone = [decoder.generate(target, None, [p], max_new_tokens=25, seed=2, first_index=i, **options) for i, p in enumerate(asked)]
    finally:
        target.float()
    assert ids(whole) == [ids(one)[0] for one in alone]
    counts = ("target_calls", "accepted_by_position", "tested")
    for mine, other in zip(whole.generations, alone, strict=True):
        assert [mine.provenance[c] for c in counts] == [other.generations[0].provenance[c] for c in counts]
    assert whole.cost.model_tokens >= sum(one.cost.model_tokens for one in alone)


def test_another_seed_gives_other_answers_and_the_same_seed_the_same() -> None:
    decoder = Speculative(draft=tiny_model(seed=1))
    runs = [ids(decoder.generate(tiny_model(), None, prompts(5, 6), seed=s)) for s in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


# --- ends, limits, rules


def test_an_end_token_in_the_middle_of_a_block_ends_the_answer_there() -> None:
    table = torch.full((6, 6), 1e-12, dtype=torch.float64)
    table[range(6), [1, 2, 3, 4, 5, 0]] = 1.0
    made = Speculative(draft=Chain(table), gamma=4).generate(
        Chain(table), None, [torch.tensor([0]), torch.tensor([3])], max_new_tokens=12, ends=[2]
    )  # fmt: skip
    assert ids(made) == [[1, 2], [4, 5, 0, 1, 2]]
    assert all(g.finished for g in made.generations)
    unfinished = Speculative(draft=Chain(table), gamma=4).generate(Chain(table), None, [torch.tensor([0])], max_new_tokens=3, ends=[5])
    assert ids(unfinished) == [[1, 2, 3]]
    assert not unfinished.generations[0].finished


@pytest.mark.parametrize("room", [1, 2, 5, 6, 7])
def test_answers_are_as_long_as_allowed(room: int) -> None:
    made = Speculative(draft=Chain(DRAFT), gamma=4).generate(Chain(TARGET), None, [torch.tensor([0])] * 20, max_new_tokens=room)
    assert {len(g.ids) for g in made.generations} == {room}


def test_no_end_token_before_the_least_length_and_the_law_without_it() -> None:
    target, draft = letters(1, 0.8), letters(2, 0.6)
    made = Speculative(draft=Chain(draft), gamma=3).generate(
        Chain(target), None, [torch.tensor([0])] * 3000, max_new_tokens=2, min_new_tokens=1, ends=list(range(10)), batch_size=3000
    )
    first = torch.stack([g.ids[0] for g in made.generations])
    assert int(first.min()) >= 10
    law = target[0, 10:] / target[0, 10:].sum()
    assert chi_square(torch.bincount(first - 10, minlength=LETTERS - 10).double(), law) > 0.01
    assert {len(g.ids) for g in made.generations} == {2}


class NoRepeat:
    """A processor that looks at all ids: what stood before is half as likely."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen = torch.zeros_like(scores).scatter(1, input_ids, 1.0)
        return scores - 0.7 * seen


@pytest.mark.parametrize("gamma", [1, 3])
def test_a_processor_sees_the_ids_of_each_place_of_a_block(gamma: int) -> None:
    target = tiny_model()
    decoder = Speculative(draft=perturbed(target, 0.05), gamma=gamma)
    for asked in (prompts(6), prompts(6, 6, 6)):  # of one length: padding would be seen as a token
        options: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 20, "logits_processor": NoRepeat()}
        made = decoder.generate(target, None, asked, **options)
        alone = [plain_ids(target, None, [p], **options)[0] for p in asked]
        assert ids(made) == alone


def test_a_budget_ends_answers_early_and_is_kept_for_each_prompt() -> None:
    decoder, target = Speculative(draft=tiny_model(seed=1), gamma=4), tiny_model()
    lengths = []
    for budget in (12, 13, 20, 60, 400):
        made = decoder.generate(target, None, prompts(6, 5), max_new_tokens=20, budget=budget)
        for place in range(2):
            alone = decoder.generate(target, None, prompts(6, 5)[place : place + 1], max_new_tokens=20, budget=budget, first_index=place)
            assert alone.cost.model_tokens <= budget
            assert ids(alone)[0] == ids(made)[place]
        lengths.append(len(made.generations[0].ids))
    assert lengths[0] == 1, "the prompt's logits are paid for, and give a token"
    assert lengths == sorted(lengths)
    assert lengths[-1] == 20
    with pytest.raises(FairleadError, match="prompt 0: its 6 tokens, through target and draft, exceed the budget of 11"):
        decoder.generate(target, None, prompts(6), budget=11)


def test_time_that_is_up_gives_the_answer_so_far() -> None:
    made = Speculative(draft=tiny_model(seed=1)).generate(tiny_model(), None, prompts(6), max_new_tokens=200, budget={"seconds": 1e-6})
    assert 1 <= len(made.generations[0].ids) <= 5


# --- models that take no holes


def sliding(seed: int) -> Any:
    torch.manual_seed(seed)
    return MistralForCausalLM(
        MistralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=1, initializer_range=0.3, pad_token_id=0, bos_token_id=None, eos_token_id=None, sliding_window=6)
    ).double().eval()  # fmt: skip


def test_models_with_windows_are_answered_one_prompt_at_a_time_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    speculative._alone.clear()
    target, asked = sliding(0), prompts(5, 12, 3)
    with caplog.at_level(logging.WARNING, "fairlead"):
        for draft in (sliding(0), sliding(1)):
            made = Speculative(draft=draft, gamma=3).generate(target, None, asked, temperature=0.0, max_new_tokens=20)
            assert ids(made) == plain_ids(target, None, asked, temperature=0.0, max_new_tokens=20)
    assert sum("one prompt at a time" in r.message for r in caplog.records) == 1
    sampled = Speculative(draft=sliding(1), gamma=3).generate(target, None, asked, max_new_tokens=20, seed=1)
    alone = [Speculative(draft=sliding(1), gamma=3).generate(target, None, [p], max_new_tokens=20, seed=1, first_index=i) for i, p in enumerate(asked)]
    assert ids(sampled) == [ids(one)[0] for one in alone]


def test_a_target_with_a_recurrent_state_runs_its_text_again_and_says_the_same() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4, expand=1, bos_token_id=None, eos_token_id=None)
    target = MambaForCausalLM(config).double().eval()
    made = Speculative(draft=tiny_model(), gamma=2).generate(target, None, prompts(5, 3), temperature=0.0, max_new_tokens=8)
    assert ids(made) == plain_ids(target, None, prompts(5, 3), temperature=0.0, max_new_tokens=8)


# --- watermarks


def mark(name: str, **settings: Any) -> Any:
    if name not in {m.name for m in registry.methods(kind="watermark")}:
        pytest.skip("needs a registered watermark (fairlead-watermark)")
    return registry.create("watermark", name, key=7, **settings)


def test_with_a_green_list_the_law_is_that_of_the_marked_target() -> None:
    target, draft = letters(1, 0.8), letters(2, 0.6)
    green = mark("kgw", vocab_size=LETTERS, delta=3.0, context_width=1)
    made = Speculative(draft=Chain(draft), gamma=3).generate(
        Chain(target), None, [torch.tensor([0])] * 2000, max_new_tokens=3, watermark=green, batch_size=2000
    )  # fmt: skip
    written = torch.stack([g.ids for g in made.generations])
    for t in (0, 1, 2):
        before = torch.zeros(2000, dtype=torch.int64) if t == 0 else written[:, t - 1]
        counts = torch.zeros(LETTERS, LETTERS, dtype=torch.float64)
        counts.index_put_((before, written[:, t]), torch.ones(2000, dtype=torch.float64), accumulate=True)
        usual = int(counts.sum(1).argmax())
        law = green.processor()(torch.tensor([[usual]]), target[usual].log()[None].float()).double().softmax(-1)[0]
        assert chi_square(counts[usual], law) > 0.01
    assert made.kl is None


@pytest.mark.parametrize("settings", [{}, {"context_from": "answer", "context_width": 2}, {"dedup_contexts": "single_turn", "context_width": 1}])
def test_with_green_lists_greedy_answers_are_those_of_the_marked_target(settings: dict[str, Any]) -> None:
    target = tiny_model()
    green = mark("kgw", vocab_size=64, delta=2.0, **settings)
    options: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 18, "watermark": green}
    made = Speculative(draft=perturbed(target, 0.05), gamma=3).generate(target, None, prompts(5, 9, 3), **options)
    assert ids(made) == plain_ids(target, None, prompts(5, 9, 3), **options)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.6, "top_k": 20}])
def test_with_keyed_gumbel_noise_the_tokens_are_those_of_the_marked_target(sampling: dict[str, Any]) -> None:
    target = tiny_model()
    keyed = mark("gumbel", vocab_size=64)
    made = Speculative(draft=perturbed(target, 0.05), gamma=3).generate(target, None, prompts(5, 9, 3), max_new_tokens=18, watermark=keyed, **sampling)
    assert ids(made) == plain_ids(target, None, prompts(5, 9, 3), max_new_tokens=18, watermark=keyed, **sampling)
    assert made.figures["block_efficiency"] > 1.2, "target and draft choose with one noise"


def test_marks_that_cannot_be_followed_are_refused() -> None:
    decoder = Speculative(draft=tiny_model(seed=1))
    with pytest.raises(FairleadError, match="temperature must be above 0"):
        decoder.generate(tiny_model(), None, prompts(5), watermark=mark("gumbel", vocab_size=64), temperature=0.0)
    repeats = mark("gumbel", vocab_size=64, dedup_contexts="all")
    with pytest.raises(FairleadError, match="dedup_contexts works at temperature 1"):
        decoder.generate(tiny_model(), None, prompts(5), watermark=repeats, temperature=0.5)
    assert len(decoder.generate(tiny_model(), None, prompts(5), watermark=repeats, max_new_tokens=8).generations) == 1


# --- vocabularies and settings


class Words:
    """A tokenizer of so many words."""

    eos_token_id = None
    pad_token_id = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def decode(self, tokens: torch.Tensor, skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, tokens.tolist()))


def test_other_vocabularies_are_refused_with_both_sizes_and_both_models() -> None:
    with pytest.raises(InputError, match="Chain has a vocabulary of 3, the target Chain one of 50"):
        Speculative(draft=Chain(TARGET)).generate(Chain(letters(0, 1.0)), None, [torch.tensor([0])])
    with pytest.raises(InputError, match="vocabulary of 5"):
        Speculative(draft=Chain(TARGET, padding=2)).generate(Chain(TARGET), None, [torch.tensor([0])])


@pytest.mark.parametrize(("mine", "theirs"), [(0, 5), (5, 0), (2, 5)])
def test_heads_may_be_padded_differently_and_padding_is_never_drawn(mine: int, theirs: int) -> None:
    target, draft = letters(1, 0.8), letters(2, 0.6)
    made = Speculative(draft=Chain(draft, theirs), gamma=3).generate(
        Chain(target, mine), Words(LETTERS), [torch.tensor([0])] * 2000, max_new_tokens=2, batch_size=2000, ends=[]
    )  # fmt: skip
    first = torch.stack([g.ids[0] for g in made.generations])
    law = Chain(target, min(mine, theirs)).table[0].softmax(-1)
    counts = torch.bincount(first, minlength=len(law)).double()
    assert counts.shape == law.shape, "what only one head has is never drawn"
    assert chi_square(counts, law.detach()) > 0.01


def test_wrong_settings_are_named() -> None:
    for gamma in (0, -1):
        with pytest.raises(FairleadError, match="gamma"):
            Speculative(draft=tiny_model(), gamma=gamma)
    with pytest.raises(FairleadError, match="draft: is required"):
        Speculative()
    with pytest.raises(FairleadError, match="draft: a causal language model, or the name of one"):
        Speculative(draft=3)
    short = LlamaForCausalLM(LlamaConfig(**{**tiny_model().config.to_dict(), "max_position_embeddings": 10})).eval()
    with pytest.raises(FairleadError, match="prompt 0: its 5 tokens and 20 new ones"):
        Speculative(draft=short).generate(tiny_model(), None, prompts(5), max_new_tokens=20)
    with pytest.raises(FairleadError, match=r"call draft\.eval"):
        Speculative(draft=LlamaForCausalLM(tiny_model().config).train()).generate(tiny_model(), None, prompts(5))


def test_a_draft_can_be_named(tmp_path: Any) -> None:
    draft = perturbed(tiny_model(), 0.05)
    draft.save_pretrained(tmp_path)
    backend = Words(64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fairlead.models.load_tokenizer", lambda name: backend)
        made = Speculative(draft=str(tmp_path)).generate(tiny_model(), None, prompts(5), temperature=0.0, max_new_tokens=10)
    assert ids(made) == plain_ids(tiny_model(), None, prompts(5), temperature=0.0, max_new_tokens=10)


class Named(Words):
    """A tokenizer whose words are told."""

    def __init__(self, size: int, first: str) -> None:
        super().__init__(size)
        self.first = first

    def get_vocab(self) -> dict[str, int]:
        return {f"{self.first}{i}": i for i in range(self.size)}


def test_a_named_draft_with_other_tokens_of_the_same_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fairlead.models.load", lambda name, **options: (tiny_model(seed=1), Named(64, "a")))
    made = Speculative(draft="somewhere/draft").generate(tiny_model(), Named(64, "a"), prompts(5), max_new_tokens=4)
    assert len(made.generations[0].ids) == 4
    with pytest.raises(InputError, match="has other tokens than that of the target"):
        Speculative(draft="somewhere/draft").generate(tiny_model(), Named(64, "b"), prompts(5))


def test_a_draft_on_another_device_is_refused() -> None:
    with torch.device("meta"):
        elsewhere = LlamaForCausalLM(tiny_model().config).eval()
    with pytest.raises(InputError, match="is on meta, the target on cpu; put them on one device"):
        Speculative(draft=elsewhere).generate(tiny_model(), None, prompts(5))


def test_logits_that_are_not_numbers_are_named() -> None:
    broken = Chain(torch.full((3, 3), float("nan"), dtype=torch.float64))
    for temperature in (0.0, 1.0):
        for target, draft in ((broken, Chain(DRAFT)), (Chain(TARGET), broken)):
            with pytest.raises(FairleadError, match="NaN"):
                Speculative(draft=draft).generate(target, None, [torch.tensor([0])], temperature=temperature)


class TestSpeculativeContract(decoder_contract(lambda: Speculative(draft=tiny_model(seed=1), gamma=3))):  # type: ignore[misc]
    def test_the_same_seed_gives_the_same_answers_and_another_seed_others(self) -> None:
        """Plain generation has its tokens at temperature 0 only; at others the law is equal and the noise is not."""
        asked = prompts(6, 6, 6)
        assert self.decode(asked, seed=3) == self.decode(asked, seed=3) != self.decode(asked, seed=4)


class TestRegistered(registered_contract("decoder", "speculative")):  # type: ignore[misc]
    pass
