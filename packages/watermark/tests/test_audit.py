"""The audit of a model from its answers, its intervals, and the shift that theory predicts of a two-way guard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fairlead.errors import InputError
from fairlead.kinds import Guard, Verdict
from fairlead.testing import tiny_model
from fairlead_watermark import KGW, Gumbel, ModifiedGumbel, audit, bounds


class Words:
    """A tokenizer of sixty-four words, w0 to w63."""

    eos_token_id = None
    pad_token_id = 0
    chat_template = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def decode(self, ids: torch.Tensor, **options: Any) -> str:
        return " ".join(f"w{int(i)}" for i in ids)


class FirstWord(Guard):
    """Refuses when the first word is below w32; whatever is not refused of a prompt that starts with w63 is unsafe."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        refusals = [int(r.split()[0][1:]) < 32 for r in responses]
        return [
            Verdict("refuse" if refusal else "comply", unsafe=p.startswith("w63") and not refusal, refusal=refusal, helpful=float(not refusal))
            for p, refusal in zip(prompts, refusals, strict=True)
        ]  # fmt: skip


HARMFUL = [f"w63 w{i}" for i in range(12)]
BENIGN = [f"w1 w{i}" for i in range(10)]


def favour_low(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [-float(r.split()[0][1:]) for r in responses]


def run(**options: Any) -> dict[str, audit.Audit]:
    marks = {"kgw": lambda key: KGW(vocab_size=64, key=key, delta=4.0), "gumbel": lambda key: Gumbel(vocab_size=64, key=key)}
    return audit.audit(
        tiny_model(), Words(), HARMFUL, BENIGN, FirstWord(), marks, [1, 2, 3], n=2, max_new_tokens=3, **options
    )


def test_every_mark_is_compared_on_every_metric() -> None:
    found = run(reward=favour_low)
    assert set(found) == {"kgw", "gumbel"}
    for name, result in found.items():
        assert result.mark == name
        assert set(result.shifts) == {"unsafe", "overrefusal", "helpful", "reward", "nll"}
        for shift in result.shifts.values():
            assert shift.low <= shift.difference <= shift.high
    helpful = found["kgw"].shifts["helpful"]
    assert helpful.marked == pytest.approx(1 - found["kgw"].shifts["overrefusal"].marked)


def test_the_same_seed_gives_the_same_audit() -> None:
    assert run(seed=5) == run(seed=5)
    assert run(seed=5) != run(seed=6)


def test_a_mark_that_makes_every_word_low_amplifies_the_guard() -> None:
    class Refuser(Gumbel):
        def sampler(self, **options: Any) -> Any:
            return lambda logits_BV, ids_BT, **noise: torch.zeros(len(logits_BV), dtype=torch.int64)

    keys = [1, 2, 3, 4]
    options: dict[str, Any] = {"n": 4, "max_new_tokens": 1}
    marks = {"refuser": lambda key: Refuser(vocab_size=64, key=key)}
    found = audit.audit(tiny_model(), Words(), HARMFUL, BENIGN, FirstWord(), marks, keys, **options)["refuser"]
    assert found.amplification
    assert not found.attenuation
    assert found.shifts["overrefusal"].marked == 1.0
    assert found.shifts["nll"].difference > 0
    assert found.verdict == "amplification"


def test_marking_with_nothing_shifts_nothing() -> None:
    marks = {"zero": lambda key: KGW(vocab_size=64, key=key, delta=0.0)}
    found = audit.audit(tiny_model(), Words(), HARMFUL, BENIGN, FirstWord(), marks, [1, 2, 3], max_new_tokens=2)["zero"]
    assert all(shift.difference == 0 for shift in found.shifts.values())
    assert found.verdict == "no shift of the guard found"


def test_an_audit_needs_both_sides_and_keys() -> None:
    for harmful, benign, keys in (([], BENIGN, [1]), (HARMFUL, [], [1]), (HARMFUL, BENIGN, [])):
        with pytest.raises(InputError, match="harmful prompts, benign prompts and keys"):
            audit.measure(tiny_model(), Words(), harmful, benign, FirstWord(), None, keys)


def test_bootstrap_and_crossed_intervals_agree_on_well_behaved_tables() -> None:
    rng = np.random.default_rng(0)
    unmarked = rng.normal(0.2, 0.1, (30, 200))
    marked = rng.normal(0.3, 0.1, (30, 200)) + rng.normal(0, 0.03, (30, 1)) + rng.normal(0, 0.1, 200)
    shift = audit.shift("unsafe", unmarked, marked)
    low, high = audit.bootstrap_interval(unmarked, marked)
    assert low < shift.difference < high
    assert high - low == pytest.approx(shift.high - shift.low, rel=0.2)
    assert audit.bootstrap_interval(unmarked, marked) == (low, high)
    with pytest.raises(InputError, match="paired"):
        audit.bootstrap_interval(unmarked, marked[:, 1:])


def test_the_interval_of_a_shift_covers_the_truth_under_random_keys_and_prompts() -> None:
    """Keys and prompts both move the marked rate; 95 % intervals over 400 repetitions."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(400):
        unmarked = rng.normal(0, 0.2, (10, 40))
        marked = 0.1 + rng.normal(0, 0.2, (10, 40)) + rng.normal(0, 0.05, (10, 1)) + rng.normal(0, 0.2, 40)
        shift = audit.shift("unsafe", unmarked, marked)
        covered += shift.low <= 0.1 <= shift.high
    assert covered / 400 > 0.92


@pytest.mark.parametrize(
    ("make", "expected", "within"),
    [(KGW, bounds.decision_under_kgw(0.05, 0.25, 2.0), 0.004), (Gumbel, 0.05, 0.006), (ModifiedGumbel, 1 - 0.933936, 0.006)],
    ids=["kgw", "gumbel", "modified-gumbel"],
)
def test_a_guard_of_95_percent_shifts_as_theory_says(make: Any, expected: float, within: float) -> None:
    """A two-way first decision under 200 keys and 50 contexts; the law is exact per key."""
    contexts = torch.stack([torch.zeros(50, dtype=torch.int64), torch.arange(50)], 1)
    logits = torch.full((50, 64), -torch.inf)
    logits[:, 0], logits[:, 1] = float(np.log(0.95)), float(np.log(0.05))
    rates = [
        float(make(vocab_size=64, key=key * 7919, context_width=2).processor()(contexts, logits).softmax(-1)[:, 1].mean())
        for key in range(200)
    ]
    assert np.mean(rates) == pytest.approx(expected, abs=within)
