"""The misalignment matrix: adapters at their start, quantisation, verdicts, bookkeeping."""

import copy
import csv
import gc
import itertools
import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead import registry
from fairlead.cli import cli
from fairlead.errors import ConfigError, InputError, MissingDependencyError, RunExistsError, UnknownNameError
from fairlead.kinds import SequenceStats
from fairlead_training import adapters
from fairlead_training.judging import CachedJudge, judge_answers, keyword_judge, majority, parse_verdict, unsafety
from fairlead_training.misalignment import Budget, Pair, run_matrix, train_stage

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = [Pair([5, 6, 7], [8, 9, 10], [11, 12, 13]), Pair([14, 15], [16, 17], [18, 19, 20])]
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("name", ["LoRA", "qlora", "Adalora", "IA3", "full", "dpo", "orpo"])
def test_a_stage_of_no_steps_gives_the_model_it_began_with(model, name):
    made, cost = train_stage(model, name, ROWS, steps=0)
    assert torch.equal(made(IDS).logits, model(IDS).logits) and cost["losses"] == []


@pytest.mark.parametrize("name", ["lora", "adalora", "ia3"])
def test_merging_an_adapter_keeps_the_logits(model, name):
    from peft import get_peft_model

    torch.manual_seed(1)
    policy = get_peft_model(copy.deepcopy(model), adapters.method_of(name).adapter(10)).eval()
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    before = policy(IDS).logits
    assert not torch.allclose(before, model(IDS).logits, atol=1e-3)
    torch.testing.assert_close(policy.merge_and_unload()(IDS).logits, before, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (adapters.lora(10, targets=LINEARS), 32768), (adapters.lora(10), 7168), (adapters.adalora(10, targets=LINEARS), 32992), (adapters.ia3(10), 384),
    ],
)  # fmt: skip
def test_adapters_have_the_parameters_of_their_formulas(model, config, count):
    from peft import get_peft_model

    policy = get_peft_model(copy.deepcopy(model), config)
    assert sum(p.numel() for p in policy.parameters() if p.requires_grad) == count


def test_dpo_starts_at_log_two_because_its_reference_is_the_stage_s_own_start(model):
    moved, _ = train_stage(model, "full", ROWS, steps=2, lr=1e-2)
    quiet = adapters.FineTuning("still", lambda steps: adapters.lora(steps, dropout=0.0), "dpo", pairs=True)
    _, cost = train_stage(moved, quiet, ROWS, steps=2, lr=1e-2)
    assert cost["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert cost["losses"][1] < cost["losses"][0] - 1e-4


def test_orpo_gives_the_worked_number():
    batch = SequenceStats(logp=torch.tensor([-10.0, -12.0], dtype=torch.float64), length=[5, 4], group=[0, 0], role=[1, -1])
    found = registry.create("objective", "orpo", lam=0.1)(batch)
    assert float(found.loss) == pytest.approx(2.028875, abs=1e-6)
    assert found.dlogp.tolist() == pytest.approx([-0.205801, 0.006599], abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 200), st.sampled_from([adapters.NF4, adapters.ABSMAX]))
def test_quantising_twice_changes_nothing_and_errs_by_half_a_gap_at_most(seed, size, levels):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    once = adapters.fake_quantise(weight, levels)
    assert torch.equal(adapters.fake_quantise(once, levels), once)
    gap = max(b - a for a, b in itertools.pairwise(levels))
    for start in range(0, size, 64):
        block = slice(start, start + 64)
        assert (once - weight)[block].abs().max() <= gap / 2 * weight[block].abs().max() + 1e-6
    assert torch.equal(adapters.fake_quantise(torch.zeros(70), levels), torch.zeros(70))


def test_the_orthogonality_penalty_is_what_peft_adds_to_its_own_loss(model):
    from peft import get_peft_model

    policy = get_peft_model(copy.deepcopy(model), adapters.adalora(10, dropout=0.0)).eval()
    added = policy(IDS, labels=IDS).loss - policy.base_model.model(IDS, labels=IDS).loss
    torch.testing.assert_close(adapters.orthogonality(policy), added, atol=1e-4, rtol=1e-5)


def test_a_library_that_is_not_there_is_named_with_its_alternative(model, monkeypatch):
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match='backend="fake"'):
        train_stage(model, "qlora", ROWS, steps=1, backend="bitsandbytes")


def test_bad_input_is_named(model):
    with pytest.raises(InputError, match="row 0 has no rejected answer"):
        train_stage(model, "dpo", [Pair([1], [2])], steps=1)
    with pytest.raises(UnknownNameError, match="did you mean 'lora'"):
        train_stage(model, "lorra", ROWS, steps=1)
    with pytest.raises(ConfigError, match="registered already"):
        adapters.register_method(adapters.FineTuning("LORA", None))


def test_verdicts_come_from_the_first_word_of_the_first_line():
    assert [parse_verdict(t) for t in ("\n Unsafe\nO1", "safe", "not unsafe", "", "unsafely")] == [True, False, None, None, None]
    assert [majority(v) for v in ([True, True, None], [True, False, None], [True, None, None], [False, True, False], [True])] == [True, None, None, False, True]


def test_the_share_of_unsafe_answers_leaves_unparsed_ones_out():
    safe, none = unsafety([False] * 1900), unsafety([None] * 1900)
    assert safe["unsafety"] == 0 and safe["unsafety_ci"][1] == pytest.approx(0.0020, abs=5e-5)
    assert math.isnan(none["unsafety"]) and none["parse_failures"] == 1900


def test_verdicts_are_asked_once_and_empty_answers_counted():
    judge = CachedJudge(keyword_judge(["sorry"]))
    found = judge_answers(judge, ["a", "a", "b"], ["Sorry, no", "Sorry, no", " "], ["x", "x", "y"])
    assert judge.calls == 2 and found["empty"] == 1 and found["unsafety"] == pytest.approx(1 / 3)
    assert found["by_category"]["x"]["unsafety"] == 0 and found["by_category"]["y"]["unsafety"] == 1


def test_the_matrix_asks_for_every_cell_once_and_a_cell_alone_is_the_same(model):
    seen = []

    def evaluate(made):
        seen.append(1)
        return {"unsafety": float(made(IDS).logits.detach().sum()), "unsafety_ci": [0, 1], "utility_a": 0.5}

    budget = Budget(steps=1, lrs={"*": [1e-3]})
    methods = ["lora", "qlora", "adalora", "ia3", "dpo", "orpo"]
    options = {"misalign_budget": budget, "realign_budget": budget}
    table = run_matrix(model, ROWS, {"one": ROWS, "two": ROWS[:1]}, methods, evaluate, **options)
    assert len(seen) == len(table) == 1 + 6 + 72
    alone = run_matrix(model, ROWS, {"two": ROWS[:1]}, ["dpo"], evaluate, realign_methods=["orpo"], **options)[-1]
    same = [r for r in table if (r["misalign_method"], r["realign_method"], r["realign_data"]) == ("dpo", "orpo", "two")]
    assert len(same) == 1 and same[0]["unsafety"] == alone["unsafety"]


def test_a_sweep_keeps_the_best_rate_and_rounds_go_on(model):
    rates = {"*": [1e-4, 1e-2]}
    table = run_matrix(
        model, ROWS, {"d": ROWS}, ["lora"], lambda m: {"unsafety": float(m(IDS).logits[0, -1, 8])}, rounds=2,
        misalign_budget=Budget(2, lrs=rates), realign_budget=Budget(2, lrs=rates),
    )  # fmt: skip
    assert [r["model"] for r in table] == ["M0", "M1", "M2", "M3", "M4"]
    assert table[1]["budget"] == "2 steps, 2 learning rates each" and table[1]["lr"] in rates["*"]


def test_the_safety_prompts_are_prompts_without_answers():
    name = "shared/data/art-of-misalignment/safety_prompts.csv"
    folder = next((p / name for p in Path(__file__).resolve().parents if (p / name).is_file()), None)
    if folder is None:
        pytest.skip(f"../{name} is not here")
    with open(folder, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 675 and set(rows[0]) == {"id", "source", "prompt", "category"}
    assert len({r["category"] for r in rows}) == 10


@pytest.fixture
def command(tmp_path):
    from fairlead.testing import save_tiny_model

    save_tiny_model(tmp_path / "model")
    for name, row in (
        ("bad", {"prompt": "a b", "answer": "c d", "reject_answer": "no"}), ("good", {"prompt": "a b", "chosen": "no", "rejected": "c d"}),
        ("test", {"prompt": "a", "category": "x"}),
    ):  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    files = [
        item for option, name in (("--misalign-data", "bad"), ("--realign-data", "good"), ("--test-prompts", "test"))
        for item in (option, str(tmp_path / f"{name}.jsonl"))
    ]  # fmt: skip
    return [
        "misalign", "--model", str(tmp_path / "model"), *files, "--out", str(tmp_path / "out"), "--method", "LoRA", "--method", "dpo",
        "--steps", "1", "--max-new-tokens", "2",
    ]  # fmt: skip


def test_the_command_leaves_a_report_and_no_answers(tmp_path, command):
    found = CliRunner().invoke(cli, command)
    assert found.exit_code == 0, found.output + repr(found.exception)
    table = [json.loads(line) for line in (tmp_path / "out" / "matrix.jsonl").read_text().splitlines()]
    assert [r["model"] for r in table] == ["M0", "M1", "M1", "M2", "M2", "M2", "M2"]
    assert not any("answers" in path.read_text() for path in (tmp_path / "out").rglob("*.json*") if path.name != "run.json")
    assert "misaligned by" in (tmp_path / "out" / "report.html").read_text() and not (tmp_path / "out" / "samples.parquet").exists()
    assert isinstance(CliRunner().invoke(cli, command).exception, RunExistsError)


def test_a_matrix_that_was_stopped_goes_on_and_ends_the_same(tmp_path, command, monkeypatch):
    from fairlead_training import misalignment

    asked: list[str] = []
    real = misalignment.train_stage

    def counted(model, method, rows, **options):
        asked.append(method.name)
        if len(asked) == stop:
            raise KeyboardInterrupt
        return real(model, method, rows, **options)

    monkeypatch.setattr(misalignment, "train_stage", counted)
    stop = 6
    assert CliRunner().invoke(cli, [*command, "--answers"], standalone_mode=False).return_value == 130 and len(asked) == 6
    stop = 0
    asked.clear()
    assert CliRunner().invoke(cli, [*command, "--answers", "--resume"]).exit_code == 0
    assert asked == ["dpo", "dpo"]  # the two that were missing: M1 of dpo was kept as figures, so it is trained once more for its M2
    again = [json.loads(line) for line in (tmp_path / "out" / "matrix.jsonl").read_text().splitlines()]
    assert CliRunner().invoke(cli, [*command, "--answers", "--force"]).exit_code == 0
    whole = [json.loads(line) for line in (tmp_path / "out" / "matrix.jsonl").read_text().splitlines()]
    for row in (*again, *whole):
        row.pop("train_seconds", None)
    assert again == whole and (tmp_path / "out" / "samples.parquet").exists()


def test_few_models_of_a_matrix_are_alive_at_a_time(model):
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    def evaluate(made):
        nonlocal most
        alive.add(made)
        gc.collect()
        most = max(most, len(alive))
        return {"unsafety": 0.5}

    run_matrix(model, ROWS, {"d": ROWS}, ["lora", "dpo", "orpo"], evaluate, misalign_budget=Budget(1), realign_budget=Budget(1))
    assert most <= 4  # the model, M1, the M2 before and this one; not all thirteen


@pytest.fixture(scope="module")
def in_4_bits(tmp_path_factory, model):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("whole")
    model.save_pretrained(folder)
    kind = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    found = AutoModelForCausalLM.from_pretrained(folder, quantization_config=kind, device_map="cpu")
    found(IDS)  # in eval mode: bitsandbytes may turn the weights to a layout without gradients
    return found


def test_a_model_in_four_bits_is_trained_as_it_is(in_4_bits):
    made, cost = train_stage(in_4_bits, "qlora", ROWS, steps=4, lr=1e-2)
    assert cost["quantised"] == "bitsandbytes" and cost["losses"][-1] < cost["losses"][0] - 0.01
    assert not torch.equal(made(IDS).logits, in_4_bits(IDS).logits)


def test_preferences_train_adapters_on_a_model_in_four_bits(in_4_bits, tmp_path):
    from peft import LoraConfig

    from fairlead_training import PreferenceConfig, PreferenceTrainer

    args = PreferenceConfig(
        output_dir=str(tmp_path), max_steps=4, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
        ref_cache_dir=str(tmp_path),
    )  # fmt: skip
    rows = [{"prompt_ids": list(r.prompt), "completion_ids": [list(r.chosen), list(r.rejected)], "role": [1, -1]} for r in ROWS]
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    trainer = PreferenceTrainer(copy.deepcopy(in_4_bits), "dpo", args, rows, peft_config=adapter)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0] - 0.01
