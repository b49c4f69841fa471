"""The contract tests can fail: each fault of a watermark, reward or guard is caught by the check named after it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field

from fairlead.config import MethodConfig
from fairlead.decoding import Answer, Budget, Request, draw
from fairlead.errors import InputError
from fairlead.keys import SecretKey
from fairlead.kinds import Decoder, Detection, Guard, Reward, TokenSampler, Verdict, Watermark, WatermarkProfile
from fairlead.testing import decoder_contract, guard_contract, reward_contract, watermark_contract


class SoundConfig(MethodConfig):
    """Settings of the mark under test."""

    vocab_size: int = Field(ge=2)
    key: SecretKey = Field(repr=False)


class Sound(Watermark):
    """A keyed half of the vocabulary gets a bonus of 6 at every step; distinct tokens are counted."""

    Config = SoundConfig
    config: SoundConfig
    name = "sound"

    def greens(self) -> torch.Tensor:
        from fairlead_kernels import prf

        tokens = torch.arange(self.config.vocab_size)[None]
        return prf(torch.full((1, 1), -1), tokens, key=self.config.key.reveal())[0] < 1 << 31

    def processor(self, **options: Any) -> Any:
        from transformers import LogitsProcessor

        mark = self

        class Bonus(LogitsProcessor):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                return mark.biased(scores)

        return Bonus()

    def biased(self, logits_BV: torch.Tensor) -> torch.Tensor:
        if logits_BV.shape[-1] != self.config.vocab_size:
            raise InputError("logits of another width")
        return logits_BV + 6.0 * self.greens()

    def sampler(self, **options: Any) -> TokenSampler:
        from fairlead.generation import PlainSampler

        draw = PlainSampler(**options)

        def sample(logits_BV: torch.Tensor, ids_BT: torch.Tensor, *, seeds_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
            return draw(self.biased(logits_BV), ids_BT, seeds_B=seeds_B, positions_B=positions_B)

        return sample

    def detect(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Detection:
        from scipy.stats import binom

        ids = torch.atleast_2d(ids)
        mask = torch.ones_like(ids) if attention_mask is None else torch.atleast_2d(attention_mask)
        kept = ids[mask.bool()]
        if bool(((kept < 0) | (kept >= self.config.vocab_size)).any()):
            raise InputError("ids outside the vocabulary")
        greens, counts, scored = self.greens(), [], []
        for row, real in zip(ids, mask.bool(), strict=True):
            distinct = row[real].unique()
            counts.append(int(greens[distinct].sum()))
            scored.append(len(distinct))
        share = float(greens.double().mean())
        p_value = torch.tensor([float(binom.sf(c - 1, n, share)) if n else 1.0 for c, n in zip(counts, scored, strict=True)])
        return Detection(torch.tensor(counts).double(), p_value.double(), torch.tensor(scored, dtype=torch.int64))


class Stateful(Sound):
    def setup(self) -> None:
        self.calls = 0

    def biased(self, logits_BV: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().biased(logits_BV) + self.calls * torch.arange(self.config.vocab_size)


class Noisy(Sound):
    """Draws from the batch's order instead of the row's seed."""

    def sampler(self, **options: Any) -> TokenSampler:
        def sample(logits_BV: torch.Tensor, ids_BT: torch.Tensor, *, seeds_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
            noise = torch.rand(logits_BV.shape, generator=torch.Generator().manual_seed(0))
            return (self.biased(logits_BV) - (-noise.log()).log()).argmax(-1)

        return sample


class Padded(Sound):
    def detect(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Detection:
        return super().detect(ids, None)


class Nan(Sound):
    def detect(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Detection:
        found = super().detect(ids, attention_mask)
        return replace(found, p_value=torch.where(found.tokens_scored > 0, found.p_value, float("nan")))


class Above(Sound):
    def detect(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Detection:
        found = super().detect(ids, attention_mask)
        return replace(found, p_value=found.p_value * 3)


class Pooled(Sound):
    """Lets a row's p-value depend on its batch."""

    def detect(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Detection:
        found = super().detect(ids, attention_mask)
        return replace(found, p_value=found.p_value.sort().values)


class Repeating(Sound):
    """Counts a pair as often as it is said."""

    def detect(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Detection:
        found = super().detect(ids, attention_mask)
        ids = torch.atleast_2d(ids)
        return replace(found, tokens_scored=torch.full((len(ids),), ids.shape[1]))


class Talkative(Sound):
    def __repr__(self) -> str:
        return f"Talkative(key={self.config.key.reveal()})"


class Keeper(Sound):
    def setup(self) -> None:
        self.number = self.config.key.reveal()


class Lenient(Sound):
    def biased(self, logits_BV: torch.Tensor) -> torch.Tensor:
        return logits_BV + 6.0 * self.greens()[0]

    def detect(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Detection:
        return super().detect(ids.clamp(0, self.config.vocab_size - 1), attention_mask)


class Unmarked(Sound):
    def biased(self, logits_BV: torch.Tensor) -> torch.Tensor:
        return super().biased(logits_BV) * 0 + logits_BV


class Keyless(Sound):
    """Everybody's key finds it."""

    def greens(self) -> torch.Tensor:
        return torch.arange(self.config.vocab_size) % 2 == 0

    def profile(self, tokenizer: Any = None) -> WatermarkProfile:
        found = super().profile(tokenizer)
        return replace(found, settings={})


FAULTS: list[tuple[type[Watermark], str]] = [
    (Stateful, "test_the_processor_holds_no_state"),
    (Noisy, "test_the_sampler_does_not_depend_on_batch_mates"),
    (Padded, "test_padding_on_either_side_changes_nothing"),
    (Nan, "test_nothing_to_score_gives_p_of_one"),
    (Above, "test_detection_has_the_promised_shapes_and_ranges"),
    (Pooled, "test_a_batch_is_detected_as_its_rows_alone"),
    (Repeating, "test_each_pair_is_scored_once"),
    (Talkative, "test_the_key_is_nowhere_to_be_seen"),
    (Keeper, "test_the_key_is_nowhere_to_be_seen"),
    (Lenient, "test_ids_outside_the_vocabulary_are_refused"),
    (Lenient, "test_logits_of_another_width_are_refused"),
    (Unmarked, "test_generated_text_carries_the_mark"),
    (Unmarked, "test_the_engine_marks_as_well"),
    (Keyless, "test_generated_text_carries_the_mark"),
    (Keyless, "test_the_profile_tells_another_setting"),
]


def outcome(contract: type, check: str) -> str:
    try:
        getattr(contract(), check)()
    except (AssertionError, pytest.fail.Exception, RuntimeError):
        return "failed"
    return "passed"


@pytest.mark.parametrize(("mark", "check"), FAULTS, ids=[f"{m.__name__}-{c}" for m, c in FAULTS])
def test_a_watermark_with_a_fault_fails_the_check_of_that_name(mark: type[Watermark], check: str) -> None:
    assert outcome(watermark_contract(mark), check) == "failed"


TestSound = watermark_contract(Sound)


class Lengths(Reward):
    """Words of the response."""

    def __call__(self, prompts: Any, responses: Any, finished: Any = None, **columns: Any) -> torch.Tensor:
        if len(prompts) != len(responses):
            raise InputError("lengths differ")
        return torch.tensor([float(len(r.split())) for r in responses])


TestLengths = reward_contract(Lengths)


@pytest.mark.parametrize(
    ("body", "check"),
    [
        (lambda p, r: torch.zeros(len(r), dtype=torch.float64), "test_one_float_per_pair_in_order"),
        (lambda p, r: torch.arange(float(len(r))), "test_one_float_per_pair_in_order"),
        (lambda p, r: torch.rand(len(r)), "test_equal_pairs_get_equal_rewards"),
        (lambda p, r: torch.zeros(len(r)), "test_lengths_that_differ_are_refused"),
        (lambda p, r: torch.full((len(r),), 2.0), "test_the_bounds_hold"),
    ],
)
def test_a_reward_with_a_fault_fails_the_check_of_that_name(body: Callable[..., torch.Tensor], check: str) -> None:
    class Faulty(Reward):
        bounds = (0.0, 1.0)

        def __call__(self, prompts: Any, responses: Any, finished: Any = None, **columns: Any) -> torch.Tensor:
            return body(prompts, responses)

    assert outcome(reward_contract(Faulty), check) == "failed"


def test_a_guard_that_contradicts_itself_fails() -> None:
    class Faulty(Guard):
        def __call__(self, prompts: Any, responses: Any) -> list[Verdict]:
            return [Verdict("refuse", unsafe=True, refusal=True) for _ in responses]

    assert outcome(guard_contract(Faulty), "test_one_verdict_per_pair_and_none_that_contradicts_itself") == "failed"
    assert outcome(guard_contract(Faulty), "test_lengths_that_differ_are_refused") == "failed"


def contracts(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_contracts_of_what_is_registered_run_by_name_in_any_folder(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text("def test_other(): assert False\n", encoding="utf-8")
    done = contracts(tmp_path, "--fairlead-contracts", "length", "--fairlead-contracts", "refusal-phrases")
    assert done.returncode == 0, done.stdout + done.stderr
    listed = contracts(tmp_path, "--fairlead-contracts", "reward:length", "--collect-only")
    assert "reward-length" in listed.stdout
    assert "test_other" not in listed.stdout
    wrong = contracts(tmp_path, "--fairlead-contracts", "lenght")
    assert wrong.returncode != 0
    assert "did you mean 'length'" in wrong.stdout + wrong.stderr


def test_a_method_that_needs_settings_is_skipped_with_the_reason_or_given_them(tmp_path: Path) -> None:
    done = contracts(tmp_path, "--fairlead-contracts", "reward:calibrated", "-rs")
    assert done.returncode == 0, done.stdout
    assert "give what it needs by --fairlead-given" in done.stdout
    given = """
        reward:calibrated:
          settings: {reward: length, references: {who: [well], what: [a, b c]}}
          prompts: [who, what]
          responses: [me, this one]
    """
    (tmp_path / "given.yaml").write_text(given, encoding="utf-8")
    whole = contracts(tmp_path, "--fairlead-contracts", "reward:calibrated", "--fairlead-given", "given.yaml", "-rs")
    assert whole.returncode == 0, whole.stdout
    assert "skipped" not in whole.stdout.splitlines()[-1]
    (tmp_path / "given.yaml").write_text("reward:calibrated: {colour: red}", encoding="utf-8")
    wrong = contracts(tmp_path, "--fairlead-contracts", "reward:calibrated", "--fairlead-given", "given.yaml")
    assert "must read {KIND:NAME" in wrong.stdout + wrong.stderr


class Plain(Decoder):
    """The engine, as a decoder."""

    def decode(self, request: Request) -> list[Answer]:
        return [Answer(group) for group in draw(self.changed(request), 1)]

    def changed(self, request: Request) -> Request:
        return request


TestPlain = decoder_contract(Plain)


class Deaf(Plain):
    def changed(self, request: Request) -> Request:
        request.seed = 0
        return request


class Indexless(Plain):
    def changed(self, request: Request) -> Request:
        request.indices = list(range(len(request.prompts)))
        return request


class Spendthrift(Plain):
    def changed(self, request: Request) -> Request:
        request.meter.budget = Budget()
        return request


class Unmarked(Plain):
    def changed(self, request: Request) -> Request:
        request.watermark = None
        return request


class Biased(Plain):
    def changed(self, request: Request) -> Request:
        request.temperature = 0.5
        return request


@pytest.mark.parametrize(
    ("decoder", "check"),
    [
        (Deaf, "test_the_same_seed_gives_the_same_answers_and_another_seed_others"),
        (Indexless, "test_an_answer_does_not_depend_on_the_prompts_beside_it"),
        (Spendthrift, "test_the_budget_is_kept"),
        (Unmarked, "test_a_watermark_composes_and_is_found"),
        (Biased, "test_under_a_constant_reward_it_is_plain_generation"),
    ],
)
def test_a_decoder_with_a_fault_fails_the_check_of_that_name(decoder: type[Decoder], check: str) -> None:
    assert outcome(decoder_contract(decoder), check) == "failed"
