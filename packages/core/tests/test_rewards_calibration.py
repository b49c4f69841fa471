"""Calibration: quantiles by hand and by brute force, transforms, files, and the reward that stands on them."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead import registry
from fairlead.errors import ConfigError, FairleadError, InputError
from fairlead.rewards import CalibratedReward, CalibrationTable, Transform
from fairlead.rewards.calibration import as_transform
from fairlead.testing import reward_contract

P, R = (4, 3, 2, 1), (-3.0, 0.0, 10.0, 11.0)  # outcomes with probabilities .4 .3 .2 .1 and their rewards


def number(prompts: Any, responses: Any) -> list[float]:
    return [float(r) for r in responses]


def exact(rewards: Any) -> CalibrationTable:
    """The table whose references are the four outcomes in their proportions."""
    return CalibrationTable.fit(["q"], [[r for r, count in zip(rewards, P, strict=True) for _ in range(count)]])


TABLE = CalibrationTable.fit(["how are you", "what is this"], [[1.0, 2.0, 3.0], [0.0, 5.0]])
TestWithTable = reward_contract(lambda: CalibratedReward(reward=lambda p, r: [float(len(x.split())) for x in r], table=TABLE))
TestUnderExp = reward_contract(lambda: CalibratedReward(reward="length", references={"": ["a", "a b"]}, transform="exp:10"))
TestUnderLog = reward_contract(lambda: CalibratedReward(reward="length", references={"": ["a", "a b"]}, transform="log"))


class TestQuantiles:
    """C = share of references below, plus half of those equal."""

    def test_they_are_those_of_the_four_outcomes(self) -> None:
        c = exact(R)(["q"] * 4, R)
        assert c.dtype == torch.float64
        torch.testing.assert_close(c, torch.tensor([0.2, 0.55, 0.8, 0.95], dtype=torch.float64))
        assert float(c @ torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)) == pytest.approx(0.5, abs=1e-12)
        squashed = [math.tanh(r / 20) for r in R]
        torch.testing.assert_close(exact(squashed)(["q"] * 4, squashed), c)

    def test_ties_count_half_and_shrink_the_variance(self) -> None:
        tied = (0.0, 1.0, 1.0, 1.0)
        c, p = exact(tied)(["q"] * 4, tied), torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
        torch.testing.assert_close(c, torch.tensor([0.2, 0.7, 0.7, 0.7], dtype=torch.float64))
        assert float(p @ (c - 0.5) ** 2) == pytest.approx(0.06, abs=1e-12)

    def test_a_hundred_references_leave_the_noise_that_is_computed(self) -> None:
        draws = torch.multinomial(torch.tensor([0.4, 0.3, 0.2, 0.1]), 4000 * 100, True, generator=torch.Generator().manual_seed(0))
        references = torch.tensor(R)[draws].reshape(4000, 100)
        found = CalibrationTable.fit(range(4000), references)(range(4000), torch.full((4000,), R[3]))
        error = 0.015 / math.sqrt(2 * 4000)
        assert float(found.std()) == pytest.approx(math.sqrt(0.25 * 0.9 * 0.1 / 100), abs=4 * error)
        assert float(found.mean()) == pytest.approx(0.95, abs=4 * 0.015 / math.sqrt(4000))

    @given(
        st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=9), min_size=1, max_size=6),
        st.lists(st.tuples(st.integers(0, 5), st.integers(-4, 4)), max_size=12), st.booleans(),
    )  # fmt: skip
    def test_they_equal_counting_by_hand(self, rows: list[list[int]], asked: list[tuple[int, int]], pooled: bool) -> None:
        table = CalibrationTable.fit([f"p{i}" for i in range(len(rows))], rows, fallback="pooled")
        names = [f"p{i % len(rows)}" if not pooled else "unknown" for i, _ in asked]
        everything = [r for row in rows for r in row]
        expected, smooth = [], []
        for i, reward in asked:
            row = everything if pooled else rows[i % len(rows)]
            count = sum((r < reward) + 0.5 * (r == reward) for r in row)
            expected.append(count / len(row))
            smooth.append((count + 0.5) / (len(row) + 1))
        rewards = [r for _, r in asked]
        assert table(names, rewards).tolist() == expected
        assert table(names, rewards, smoothed=True).tolist() == pytest.approx(smooth, abs=1e-15)

    @given(st.lists(st.integers(-50, 50), min_size=2, max_size=20), st.integers(-50, 50))
    def test_no_increasing_map_changes_them_and_their_mean_is_a_half(self, references: list[int], reward: int) -> None:
        plain, bent = CalibrationTable.fit([0], [references]), CalibrationTable.fit([0], [[math.exp(r) for r in references]])
        assert float(plain([0], [reward])) == float(bent([0], [math.exp(reward)]))
        own = plain([0] * len(references), references)
        assert float(own.mean()) == pytest.approx(0.5, abs=1e-12)

    def test_a_prompt_without_references_is_a_key_error_or_pooled(self) -> None:
        for kind in (InputError, KeyError):
            with pytest.raises(kind, match="no reference rewards for the prompt 'c'"):
                CalibrationTable.fit(["a", "b"], [[1, 2], [3, 4]])(["a", "c"], [0.0, 1.0])
        pooled = CalibrationTable.fit(["a", "b"], [[1, 2], [3, 4]], fallback="pooled")
        assert pooled(["c", "a", "c"], [2.5, 2.5, 4.0]).tolist() == [0.5, 1.0, 0.875]

    def test_token_ids_and_numbers_are_prompts_as_well(self) -> None:
        table = CalibrationTable.fit([torch.tensor([5, 6]), 7, "5"], [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]])
        assert table([[5, 6], np.int64(7), "5", (5, 6)], [0.5, 0.5, 2.5, 9.0]).tolist() == [0.5, 0.0, 0.5, 1.0]
        with pytest.raises(InputError, match="dict"):
            table([{}], [0.0])

    def test_a_float32_reward_ties_with_the_reference_that_rounds_to_it(self) -> None:
        table = CalibrationTable.fit(["q"], [[0.1, 0.3]])
        assert table(["q"], torch.tensor([0.1])).tolist() == [0.25]
        assert table(["q"], [0.1]).tolist() == [0.25]
        assert table(["q"], torch.tensor([0.1]).double()).tolist() == [0.5]  # another number in float64

    def test_infinite_rewards_have_a_place(self) -> None:
        table = CalibrationTable.fit(["q"], [[-math.inf, 0.0, 1.0, 1.0]])
        assert table(["q"] * 3, [-math.inf, 0.5, math.inf]).tolist() == [0.125, 0.5, 1.0]

    def test_no_pairs_have_no_quantiles(self) -> None:
        assert exact(R)([], []).shape == (0,)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((["a"], [[1.0]]), "has 1 references; 2 or more"),
            ((["a"], [[1.0, math.nan]]), "number 1 is NaN"),
            ((["a", "a"], [[1, 2], [3, 4]]), "twice"),
            ((["a"], [[1, 2], [3, 4]]), "1 prompts need as many rows, got 2"),
            ((["a", "b"], torch.zeros(2)), r"\[P, K\]"),
            ((["a"], [["x", "y"]]), "must be numbers"),
        ],
    )
    def test_references_that_make_no_table_are_refused(self, arguments: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            CalibrationTable.fit(*arguments)

    def test_rewards_that_have_no_place_are_refused(self) -> None:
        with pytest.raises(InputError, match="number 0 is NaN"):
            exact(R)(["q"], [math.nan])
        with pytest.raises(InputError, match="2 prompts need as many, got 1"):
            exact(R)(["q", "q"], [0.0])
        with pytest.raises(InputError, match="fallback"):
            CalibrationTable.fit(["a"], [[1, 2]], fallback="mean")  # type: ignore[arg-type]


class TestFiles:
    """One file, whole or not there."""

    def test_what_is_saved_comes_back(self, tmp_path: Path) -> None:
        prompts = ["é\ud800", 3, (1, 2)]
        table = CalibrationTable.fit(prompts, [[0.1, 0.2], [1, 2, 3], [5, 5]], fallback="pooled", info={"reward": "length"})
        table.save(tmp_path / "a.safetensors")
        back = CalibrationTable.load(tmp_path / "a.safetensors")
        assert (back.prompt_ids, back.fallback, back.info) == (prompts, "pooled", {"reward": "length"})
        assert torch.equal(back.values_N, table.values_N)
        assert torch.equal(back.offsets, table.offsets)
        assert torch.equal(back([*prompts, "new"], [0.15, 2.0, 5.0, 3.0]), table([*prompts, "new"], [0.15, 2.0, 5.0, 3.0]))
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]

    def test_a_failed_save_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.safetensors"
        exact(R).save(path)
        before = path.read_bytes()

        def fail(*_: Any) -> None:
            raise OSError("disk full")

        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            CalibrationTable.fit(["b"], [[1, 2]]).save(path)
        assert path.read_bytes() == before
        assert len(list(tmp_path.iterdir())) == 1

    def test_other_files_are_refused_in_one_line(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
        (tmp_path / "text.safetensors").write_text("no tensors")
        metadata = {"format": "fairlead-calibration-1", "info": "{}"}
        parts = {"values": torch.zeros(3, dtype=torch.float64), "prompts": torch.tensor(list(b'["a"]'), dtype=torch.uint8)}
        save_file({**parts, "offsets": torch.tensor([0, 9])}, tmp_path / "broken.safetensors", metadata=metadata)
        for name in ("other", "text", "absent", "broken"):
            with pytest.raises(InputError, match="calibration table") as error:
                CalibrationTable.load(tmp_path / f"{name}.safetensors")
            assert "\n" not in str(error.value)


class TestTransforms:
    """Identity, log, exp, power."""

    grid = np.linspace(0.0, 1.0, 101)

    @pytest.mark.parametrize("name", ["identity", "exp:10", "exp:-10", "exp:0.001", "exp:5000", "exp:-5000", "power:4"])
    def test_they_rise_from_nought_to_one(self, name: str) -> None:
        transform = as_transform(name)
        values = transform(self.grid)
        assert values[0] == pytest.approx(0.0, abs=1e-12)
        assert values[-1] == pytest.approx(1.0, abs=1e-12)
        assert (np.diff(values) >= 0).all()
        assert transform.monotone
        assert transform.normalised

    @pytest.mark.parametrize("t", [10.0, -10.0, 3.0])
    def test_exp_is_its_formula(self, t: float) -> None:
        expected = (np.exp(t * self.grid) - 1) / (np.exp(t) - 1)
        np.testing.assert_allclose(Transform.exp(t)(self.grid), expected, rtol=1e-10, atol=1e-15)

    def test_exp_becomes_the_identity(self) -> None:
        for t in (0.0, 1e-9, -1e-9, 1e-7):
            np.testing.assert_allclose(Transform.exp(t)(self.grid), self.grid, atol=1e-7)

    def test_log_asks_for_quantiles_that_are_never_nought(self) -> None:
        reward = CalibratedReward(reward=number, references={"": ["1", "2", "3"]}, transform="log")
        scores = reward(["q"] * 3, ["0", "2", "9"])
        assert scores.tolist() == pytest.approx([math.log(0.5 / 4), math.log(2 / 4), math.log(3.5 / 4)], abs=1e-6)
        assert reward.bounds is None

    def test_outside_the_unit_interval_they_refuse(self) -> None:
        for wrong in ([1.5], [-0.1], [math.nan]):
            with pytest.raises(InputError, match=r"\[0, 1\]"):
                Transform.identity()(wrong)

    @pytest.mark.parametrize("wrong", ["exp", "exp:x", "exp:inf", "power:0", "power:-1", "log:2", "sqrt", "", 3, None])
    def test_nonsense_is_refused_in_one_line(self, wrong: Any) -> None:
        with pytest.raises(FairleadError) as error:
            CalibratedReward(transform=wrong)
        assert "\n" not in str(error.value)


class TestReward:
    """CalibratedReward over a table, over references, with a transform."""

    def test_a_table_and_the_references_it_was_fitted_on_agree(self, tmp_path: Path) -> None:
        references = {"a": ["1", "2", "2", "5"], "b": ["0", "10"]}
        table = CalibrationTable.fit(list(references), [[float(r) for r in row] for row in references.values()])
        table.save(tmp_path / "table.safetensors")
        prompts, responses = ["a", "b", "a", "b"], ["2", "10", "4", "3"]
        for transform in ("identity", "log", "exp:10", "power:2"):
            lazy = CalibratedReward(reward=number, references=references, transform=transform)
            found = [
                lazy(prompts, responses),
                CalibratedReward(reward=number, table=table, transform=transform)(prompts, responses),
                CalibratedReward(reward=number, table=tmp_path / "table.safetensors", transform=transform)(prompts, responses),
            ]
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])
            assert found[0].dtype == torch.float32
            assert sorted(lazy.table.prompt_ids) == ["a", "b"]

    def test_references_are_scored_once_and_together(self) -> None:
        asked: list[int] = []

        def count(prompts: list[str], responses: list[str]) -> list[float]:
            asked.append(len(responses))
            return [float(len(r)) for r in responses]

        reward = CalibratedReward(reward=count, references={"": ["a", "bb"], "long": ["a", "bb", "ccc"]})
        assert reward(["x", "long", "y"], ["a", "a", "bb"]).tolist() == pytest.approx([0.25, 1 / 6, 0.75])
        reward(["x", "long"], ["a", "a"])
        assert asked == [2 + 3 + 2, 3, 2]

    def test_it_is_called_as_the_wrapped_reward_and_in_trls_lists(self) -> None:
        table = CalibrationTable.fit(["q"], [[1.0, 2.0, 3.0, 4.0]])

        def scaled(prompts: list[str], responses: list[str], scale: list[float] = (), **_: Any) -> list[float]:  # type: ignore[assignment]
            return [float(r) * s for r, s in zip(responses, scale, strict=True)]

        reward = CalibratedReward(reward=scaled, table=table, transform="exp:5")
        expected = Transform.exp(5.0)([0.75])[0]
        assert reward(["q"], ["1.75"], None, scale=[2.0]).tolist() == pytest.approx([expected])
        function = reward.as_trl()
        chat = [[{"role": "user", "content": "q"}]]
        assert function(prompts=chat, completions=[[{"role": "assistant", "content": "1.75"}]], scale=[2.0]) == pytest.approx([expected])
        assert function.__name__ == "CalibratedReward"

    def test_any_function_is_a_transform_that_must_stay_finite(self) -> None:
        halved = CalibratedReward(reward=number, references={"": ["1", "2"]}, transform=lambda c: c / 2)
        assert halved(["q"], ["3"]).tolist() == [0.5]
        assert halved.bounds is None
        endless = CalibratedReward(reward=number, references={"": ["1", "2"]}, transform=lambda c: np.log(c * 0))
        with np.errstate(divide="ignore"), pytest.raises(InputError, match="finite number"):
            endless(["q"], ["3"])

    def test_a_nan_of_the_wrapped_reward_is_named(self) -> None:
        from fairlead.kinds import Reward

        class Broken(Reward):
            """A reward that breaks the contract."""

            def __call__(self, prompts: Any, responses: Any, finished: Any = None, **columns: Any) -> torch.Tensor:
                return torch.tensor([1.0, math.nan])

        with pytest.raises(InputError, match="number 1 is NaN"):
            CalibratedReward(reward=Broken(), table=TABLE)(["how are you"] * 2, ["a", "b"])

    def test_a_table_of_ids_serves_where_there_is_no_text(self) -> None:
        table = CalibrationTable.fit([torch.tensor([1, 2])], [[0.0, 1.0, 2.0]])
        reward = CalibratedReward(reward=lambda p, r: [float(len(x)) for x in r], table=table)
        assert reward.accepts_ids
        assert reward([torch.tensor([1, 2])] * 2, [torch.tensor([7]), torch.tensor([7, 8])]).tolist() == pytest.approx([0.5, 5 / 6])
        assert not CalibratedReward(reward=number, references={"": ["1"]}).accepts_ids  # references are texts
        assert not CalibratedReward(reward="length", table=TABLE).accepts_ids

    @pytest.mark.parametrize("transform", ["identity", "log", "exp:10", "power:2"])
    def test_it_goes_to_another_process_as_it_is(self, transform: str) -> None:
        reward = CalibratedReward(reward="length", references={"": ["a", "b c"]}, transform=as_transform(transform))
        copied = pickle.loads(pickle.dumps(reward))
        assert torch.equal(copied(["q"] * 2, ["a", "b c"]), reward(["q"] * 2, ["a", "b c"]))

    @pytest.mark.parametrize("settings_", [{"table": TABLE, "references": {"a": ["b"]}}, {"table": 3}, {"table": ""}])
    def test_bad_sources_are_one_line(self, settings_: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="table"):
            registry.create("reward", "calibrated", **settings_)

    def test_the_transform_stays_readable_in_the_settings(self) -> None:
        shown = CalibratedReward(transform="exp:-10").config.public_dict()
        assert shown["transform"] == "exp:-10"

    @given(st.lists(st.text(max_size=12), min_size=1, max_size=5))
    @settings(deadline=None)
    def test_quantiles_of_any_text_lie_in_the_bounds(self, responses: list[str]) -> None:
        reward = CalibratedReward(reward="length", references={"": ["a", "b c", "d e f"]}, transform="exp:10")
        scores = reward(["p"] * len(responses), responses)
        assert bool(((scores >= 0) & (scores <= 1)).all())
