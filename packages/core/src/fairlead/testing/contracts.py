"""The contracts of the kinds as test classes, built around a factory of the method under test."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from .. import registry, taxonomy
from ..errors import FairleadError
from ..keys import new_key_file
from ..kinds import Detection, WatermarkProfile, abstract_class
from ..kinds.decoder import DecodingError
from .objectives import objective_contract as objective_contract
from .tiny import VOCABULARY, tiny_model

SECRET = 0x5EC2E7C0FFEE1234


def _random_ids(rows: int, tokens: int, seed: int = 0, vocab_size: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(0, vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def _together(found: Detection) -> float:
    """Fisher's p-value of all rows: a mark too weak for one short row still shows over several."""
    from scipy.stats import chi2

    return float(chi2.sf(-2 * found.p_value.clamp(min=1e-300).log().sum(), 2 * len(found.p_value)))


def _detected(mark: Any, made: Any) -> Detection:
    """What a mark finds in the answers of a result, of whatever lengths."""
    answers = [g.ids for g in made.generations]
    ids = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(a) for a in answers], batch_first=True)
    found: Detection = mark.detect(ids, mask)
    return found


def watermark_contract(make: Callable[..., Any]) -> type:
    """Tests of kind Watermark around `make(vocab_size=..., key=...)`."""

    @pytest.mark.fairlead_contract
    class WatermarkContract:
        def mark(self, vocab_size: int = VOCABULARY, key: int | Path = SECRET) -> Any:
            return make(vocab_size=vocab_size, key=key)

        def test_detection_has_the_promised_shapes_and_ranges(self) -> None:
            found = self.mark().detect(_random_ids(3, 40))
            assert isinstance(found, Detection)
            for name in ("statistic", "p_value", "tokens_scored"):
                assert getattr(found, name).shape == (3,), name
            assert found.tokens_scored.dtype == torch.int64
            assert found.p_value.dtype == torch.float64
            assert bool(((found.p_value >= 0) & (found.p_value <= 1)).all())

        def test_a_batch_is_detected_as_its_rows_alone(self) -> None:
            ids = _random_ids(4, 30)
            whole = self.mark().detect(ids)
            for row in range(4):
                alone = self.mark().detect(ids[row])
                torch.testing.assert_close(alone.p_value[0], whole.p_value[row], rtol=0, atol=0)
                assert alone.tokens_scored[0] == whole.tokens_scored[row]

        def test_padding_on_either_side_changes_nothing(self) -> None:
            ids = _random_ids(2, 25)
            plain = self.mark().detect(ids)
            pad, zero = _random_ids(2, 12, seed=1), torch.zeros(2, 12, dtype=torch.int64)
            one = torch.ones(2, 25, dtype=torch.int64)
            left = self.mark().detect(torch.cat([pad, ids], 1), torch.cat([zero, one], 1))
            right = self.mark().detect(torch.cat([ids, pad], 1), torch.cat([one, zero], 1))
            for padded in (left, right):
                for name in ("statistic", "p_value", "tokens_scored"):
                    assert torch.equal(getattr(padded, name), getattr(plain, name)), name

        def test_nothing_to_score_gives_p_of_one(self) -> None:
            for ids in (torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)):
                found = self.mark().detect(ids)
                assert bool((found.p_value == 1).all())
                assert bool((found.tokens_scored == 0).all())
            masked = self.mark().detect(_random_ids(2, 9), torch.zeros(2, 9, dtype=torch.int64))
            assert masked.p_value.tolist() == [1, 1]
            assert masked.tokens_scored.tolist() == [0, 0]

        def test_each_pair_is_scored_once(self) -> None:
            ids = _random_ids(1, 20)
            once, thrice = self.mark().detect(ids), self.mark().detect(ids.repeat(1, 3))
            assert int(thrice.tokens_scored) <= int(once.tokens_scored) + 2 * 20 // 4

        def test_ids_outside_the_vocabulary_are_refused(self) -> None:
            for bad in (VOCABULARY, -1):
                with pytest.raises(FairleadError):
                    self.mark().detect(torch.tensor([[1, 2, bad, 4, 5, 6]]))

        def test_logits_of_another_width_are_refused(self) -> None:
            with pytest.raises(FairleadError):
                self.mark().processor()(_random_ids(1, 9), torch.zeros(1, VOCABULARY + 1))

        def test_the_processor_holds_no_state(self) -> None:
            processor = self.mark().processor()
            ids, logits = _random_ids(3, 12), torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1))
            first = processor(ids, logits.clone())
            processor(_random_ids(5, 30, seed=2), torch.zeros(5, VOCABULARY))
            again = processor(ids, logits.clone())
            assert torch.equal(first, again)
            order = torch.tensor([2, 0, 1])
            assert torch.equal(processor(ids[order], logits[order]), first[order])

        def test_the_sampler_does_not_depend_on_batch_mates(self) -> None:
            sampler = self.mark().sampler()
            ids, logits = _random_ids(4, 12), torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(1))
            seeds, positions = torch.arange(4), torch.full((4,), 3)
            whole = sampler(logits, ids, seeds_B=seeds, positions_B=positions)
            assert whole.shape == (4,)
            for row in range(4):
                pick = slice(row, row + 1)
                alone = sampler(logits[pick], ids[pick], seeds_B=seeds[pick], positions_B=positions[pick])
                assert int(alone) == int(whole[row])

        def test_the_key_is_nowhere_to_be_seen(self) -> None:
            mark = self.mark()
            forms = {str(SECRET), hex(SECRET)[2:], str(SECRET - (1 << 64))}
            shown = [repr(mark), str(mark), repr(vars(mark)), repr(mark.config), json.dumps(mark.profile().settings)]
            processor = mark.processor()
            shown += [repr(processor), repr(getattr(processor, "__dict__", "")), repr(mark.sampler()), repr(mark.profile())]
            try:
                dumped = pickle.dumps(mark)
            except (TypeError, AttributeError, pickle.PicklingError):
                dumped = b""
            shown.append(repr(dumped))
            for text in shown:
                assert not any(form in text for form in forms), "the key is shown"
            assert not any(SECRET.to_bytes(8, order) in dumped for order in ("little", "big")), "the key is pickled"

        def test_errors_do_not_show_the_key(self) -> None:
            for wrong in (SECRET + (1 << 64), str(SECRET), hex(SECRET), [SECRET]):
                with pytest.raises(FairleadError) as error:
                    make(vocab_size=VOCABULARY, key=wrong)
                assert not any(form in str(error.value) for form in (str(SECRET), hex(SECRET)[2:], str(SECRET + (1 << 64))))

        def test_it_is_built_from_a_key_file_as_from_its_number(self) -> None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "key"
                number = new_key_file(path).reveal()
                ids = _random_ids(2, 40)
                assert torch.equal(self.mark(key=path).detect(ids).p_value, self.mark(key=number).detect(ids).p_value)

        def test_the_profile_tells_another_setting(self) -> None:
            mine, same, other = self.mark().profile(), self.mark().profile(), self.mark(key=SECRET + 1).profile()
            assert isinstance(mine, WatermarkProfile)
            mine.check(same)
            WatermarkProfile(**json.loads(json.dumps(asdict(mine)))).check(mine)
            with pytest.raises(FairleadError):
                mine.check(other)
            with pytest.raises(FairleadError):
                mine.check(self.mark(vocab_size=VOCABULARY + 2).profile())

        def test_generated_text_carries_the_mark(self) -> None:
            model, mark = tiny_model(), self.mark()
            prompt = _random_ids(8, 6)
            torch.manual_seed(0)
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=120, do_sample=True, top_k=0,
                logits_processor=[mark.processor()],
            )  # fmt: skip
            assert _together(mark.detect(out[:, 6:])) < 1e-4
            assert float(self.mark(key=99).detect(out[:, 6:]).p_value.median()) > 1e-2

        def test_the_engine_marks_as_well(self) -> None:
            from ..generation import generate

            mark = self.mark()
            made = generate(tiny_model(), None, list(_random_ids(8, 6)), watermark=mark, max_new_tokens=120)
            ids = torch.stack([group[0].ids for group in made])
            assert _together(mark.detect(ids)) < 1e-4

    return WatermarkContract


def reward_contract(
    make: Callable[[], Any],
    prompts: Sequence[str] = ("how are you", "what is this"),
    responses: Sequence[str] = ("fine thanks", "no idea"),
) -> type:
    """Tests of kind Reward around `make()`."""

    @pytest.mark.fairlead_contract
    class RewardContract:
        def test_one_float_per_pair_in_order(self) -> None:
            reward = make()
            scores = reward(list(prompts), list(responses))
            assert scores.shape == (len(prompts),)
            assert scores.dtype == torch.float32
            assert scores.device.type == "cpu"
            assert not bool(scores.isnan().any())
            turned = reward(list(prompts)[::-1], list(responses)[::-1])
            torch.testing.assert_close(turned.flip(0), scores)

        def test_equal_pairs_get_equal_rewards(self) -> None:
            reward = make()
            scores = reward([prompts[0]] * 3, [responses[0]] * 3)
            assert scores.min() == scores.max()

        def test_no_pairs_give_no_rewards(self) -> None:
            assert make()([], []).shape == (0,)

        def test_lengths_that_differ_are_refused(self) -> None:
            with pytest.raises(FairleadError):
                make()(list(prompts), [responses[0]] * (len(prompts) + 1))

        def test_further_columns_are_ignored(self) -> None:
            scores = make()(list(prompts), list(responses), unknown_column=list(range(len(prompts))))
            assert scores.shape == (len(prompts),)

        def test_the_bounds_hold(self) -> None:
            reward = make()
            if reward.bounds is not None:
                low, high = reward.bounds
                scores = reward(list(prompts), list(responses))
                assert bool(((scores >= low - 1e-6) & (scores <= high + 1e-6)).all())

    return RewardContract


def guard_contract(
    make: Callable[[], Any], prompts: Sequence[str] = ("how are you",), responses: Sequence[str] = ("fine thanks",)
) -> type:
    """Tests of kind Guard around `make()`."""

    @pytest.mark.fairlead_contract
    class GuardContract:
        def test_one_verdict_per_pair_and_none_that_contradicts_itself(self) -> None:
            verdicts = make()(list(prompts), list(responses))
            assert len(verdicts) == len(prompts)
            for verdict in verdicts:
                assert verdict.label
                assert not (verdict.refusal and verdict.unsafe)
                assert verdict.helpful is None or 0 <= verdict.helpful <= 1

        def test_verdicts_are_deterministic(self) -> None:
            assert make()(list(prompts), list(responses)) == make()(list(prompts), list(responses))

        def test_lengths_that_differ_are_refused(self) -> None:
            with pytest.raises(FairleadError):
                make()(list(prompts), [])

    return GuardContract


def small_ids(prompts: Sequence[Any], responses: Sequence[Any]) -> list[float]:
    """A reward of ids for contract tests: the share of tokens below 16."""
    return [float((torch.as_tensor(r) < 16).float().mean()) for r in responses]


def decoder_contract(make: Callable[[], Any], *, room: int = 12) -> type:
    """Tests of kind Decoder around `make()`, on a tiny random model and prompts of ids; `room` tokens an answer."""

    @pytest.mark.fairlead_contract
    class DecoderContract:
        def run(self, prompts: Sequence[Any], **options: Any) -> Any:
            decoder = make()
            options = {"max_new_tokens": room, "reward": small_ids, **options}
            made = decoder.generate(tiny_model(), None, prompts, **options)
            assert len(made.generations) == len(prompts)
            return made

        def decode(self, prompts: Sequence[Any], **options: Any) -> list[list[int]]:
            return [g.ids.tolist() for g in self.run(prompts, **options).generations]

        def test_the_same_seed_gives_the_same_answers_and_another_seed_others(self) -> None:
            prompts = list(_random_ids(4, 6))
            assert self.decode(prompts, seed=3) == self.decode(prompts, seed=3)
            if make().plain.get("temperature") != 0:  # a greedy search may have no randomness at all
                assert self.decode(prompts, seed=3) != self.decode(prompts, seed=4)

        def test_an_answer_does_not_depend_on_the_prompts_beside_it(self) -> None:
            prompts = [_random_ids(1, n, seed=n)[0] for n in (5, 9, 7)]
            whole = self.decode(prompts)
            assert self.decode(prompts, batch_size=1) == whole
            assert [self.decode([p], first_index=i)[0] for i, p in enumerate(prompts)] == whole

        def test_the_model_is_left_as_it_was(self) -> None:
            model = tiny_model()
            before = {name: value.clone() for name, value in model.state_dict().items()}
            make().generate(model, None, list(_random_ids(2, 6)), max_new_tokens=room, reward=small_ids)
            assert not model.training
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

        def test_what_it_cost_and_how_far_it_went_are_told(self) -> None:
            made = self.run(list(_random_ids(2, 6)))
            assert made.cost.model_tokens >= sum(len(g.ids) - 1 for g in made.generations)
            assert (made.kl is None) == (made.kl_kind == "")
            assert made.kl is None or made.kl >= 0
            assert made.kl_kind in ("", "exact", "estimate", "bound")

        def test_under_a_constant_reward_it_is_plain_generation(self) -> None:
            from ..generation import generate

            prompts = [_random_ids(1, n, seed=n)[0] for n in (5, 9, 7)]
            plain = make().plain
            made = self.decode(prompts, reward=lambda prompts, responses: [0.25] * len(responses), seed=5, **plain)
            expected = generate(tiny_model(), None, prompts, max_new_tokens=room, seed=5, **plain)
            assert made == [group[0].ids.tolist() for group in expected]

        def test_the_budget_is_kept(self) -> None:
            prompts = list(_random_ids(3, 6))
            for budget in ({"model_tokens": 15}, {"model_tokens": 60}, {"reward_calls": 3}):
                try:
                    cost = self.run(prompts, budget=budget).cost
                except DecodingError as error:  # a decoder of several models may not even read the prompt for so little
                    assert "budget" in str(error)
                    assert budget == {"model_tokens": 15}
                    continue
                assert cost.model_tokens <= budget.get("model_tokens", cost.model_tokens) * 3
                assert cost.reward_calls <= budget.get("reward_calls", cost.reward_calls) * 3

        def test_a_budget_of_nothing_is_refused(self) -> None:
            with pytest.raises(FairleadError, match="budget"):
                self.run(list(_random_ids(1, 6)), budget={"model_tokens": 0})

        def test_a_watermark_composes_and_is_found(self) -> None:
            names = {m.name for m in registry.methods(kind="watermark")}
            if "kgw" not in names:
                pytest.skip("needs a registered watermark (fairlead-watermark)")
            mark = registry.create("watermark", "kgw", vocab_size=VOCABULARY, key=7, delta=6.0, context_width=1, context_from="answer")
            made = self.run(list(_random_ids(6, 6)), watermark=mark, max_new_tokens=max(room, 40))
            unmarked = self.run(list(_random_ids(6, 6)), max_new_tokens=max(room, 40))
            assert _together(_detected(mark, made)) < 1e-3
            assert _together(_detected(mark, unmarked)) > 1e-3

        def test_transformers_calls_it_with_the_same_result(self) -> None:
            model, prompts = tiny_model(), [_random_ids(1, n, seed=n)[0] for n in (5, 9)]
            width = max(map(len, prompts))
            ids = torch.stack([torch.cat([p.new_zeros(width - len(p)), p]) for p in prompts])
            mask = torch.stack([torch.cat([torch.zeros(width - len(p)), torch.ones(len(p))]) for p in prompts]).long()
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=room, do_sample=True, top_k=0,
                custom_generate=make().custom_generate(reward=small_ids, seed=2),
            )  # fmt: skip
            for row, answer in zip(out[:, width:], self.decode(prompts, seed=2), strict=True):
                assert row[: len(answer)].tolist() == answer

        def test_a_reward_that_fails_is_named_with_its_prompt_and_what_was_done_is_kept(self) -> None:
            def picky(prompts: Sequence[Any], responses: Sequence[Any]) -> list[float]:
                if any(len(p) == 9 for p in prompts):
                    raise RuntimeError("no words for this")
                return small_ids(prompts, responses)

            prompts = [_random_ids(1, n, seed=n)[0] for n in (5, 9)]
            try:
                made = self.run(prompts, reward=picky, batch_size=1, first_index=10)
            except DecodingError as error:
                assert "prompt 11" in str(error)
                assert "no words for this" in str(error)
                assert list(error.finished) == [10]
            else:
                assert made.cost.reward_calls == 0  # a decoder that asks no reward

        def test_no_prompts_give_no_answers(self) -> None:
            assert self.decode([]) == []

    return DecoderContract


def rewriter_contract(make: Callable[[], Any], prompts: Sequence[str] = ("how are you", "what is this")) -> type:
    """Tests of kind Rewriter around `make()`."""

    @pytest.mark.fairlead_contract
    class RewriterContract:
        def test_one_rewrite_per_prompt_in_order_and_none_is_empty(self) -> None:
            made = make()(list(prompts))
            assert [r.original for r in made] == list(prompts)
            for rewrite in made:
                assert rewrite.prompt.strip()
                json.dumps(rewrite.provenance)

        def test_a_rewrite_depends_on_the_prompt_and_the_seed_alone(self) -> None:
            rewriter = make()
            whole = [r.prompt for r in rewriter(list(prompts), seed=3)]
            assert [r.prompt for r in rewriter(list(prompts), seed=3)] == whole
            assert [rewriter([p], seed=3)[0].prompt for p in prompts] == whole

        def test_no_prompts_give_no_rewrites(self) -> None:
            assert make()([]) == []

        def test_a_prompt_that_is_no_text_is_refused(self) -> None:
            with pytest.raises(FairleadError):
                make()([7])

    return RewriterContract


def recipe_contract(name: str) -> type:
    """Tests of a registered recipe that run none of it: it builds from its defaults and explains its settings."""

    @pytest.mark.fairlead_contract
    class RecipeContract:
        def test_it_builds_from_its_defaults(self) -> None:
            recipe = registry.create("recipe", name)
            json.dumps(recipe.config.public_dict())

        def test_what_it_saves_builds_it_again(self) -> None:
            saved = json.loads(json.dumps(registry.create("recipe", name).config.public_dict()))
            assert registry.create("recipe", name, **saved).config.public_dict() == saved

        def test_it_names_its_paper(self) -> None:
            assert registry.get("recipe", name).paper

        def test_every_setting_is_explained(self) -> None:
            config = registry.get("recipe", name).config
            assert [n for n, field in config.model_fields.items() if not field.description] == []

    return RecipeContract


def registered_contract(kind: str, name: str) -> type:
    """Tests of a method's registration: summary, tags, a config that says what each setting is, an importable factory."""

    @pytest.mark.fairlead_contract
    class RegisteredContract:
        def test_it_says_what_it_does_in_one_line(self) -> None:
            summary = registry.get(kind, name).summary
            assert 10 <= len(summary) <= 120
            assert "\n" not in summary

        def test_its_tags_cover_the_facets(self) -> None:
            covered = taxonomy.facets(registry.get(kind, name).tags)
            assert {"stage", "access"} <= covered
            assert covered & {"goal", "side", "paradigm"}

        def test_its_factory_loads_and_is_documented(self) -> None:
            factory = registry.get(kind, name).load()
            assert (factory.__doc__ or "").strip()

        def test_its_class_is_of_its_kind(self) -> None:
            factory = registry.get(kind, name).load()
            assert not isinstance(factory, type) or issubclass(factory, abstract_class(kind))

        def test_its_settings_are_a_frozen_model(self) -> None:
            config = registry.get(kind, name).config
            assert config is not None
            assert config.model_config.get("frozen")

    return RegisteredContract
