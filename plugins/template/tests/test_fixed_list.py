"""The contracts of fairlead, run against this plugin as its author would, and the whole way through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from fairlead_example_fixed_list import FixedList

from fairlead.testing import registered_contract, tiny_model, watermark_contract

TestFixedList = watermark_contract(lambda vocab_size, key: FixedList(vocab_size=vocab_size, key=key, delta=4.0))
TestRegistered = registered_contract("watermark", "example-fixed-list")


def test_a_token_is_scored_once() -> None:
    found = FixedList(vocab_size=64, key=1).detect(torch.tensor([[3, 3, 5, 3, 9]]))
    assert found.tokens_scored.tolist() == [3]


def test_it_marks_and_detects_from_the_command_line(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0").save_pretrained(tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1 w2 w3"}\n{"prompt": "w4 w5"}\n', encoding="utf-8")

    def fairlead(*arguments: str) -> str:
        command = [sys.executable, "-m", "fairlead", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "example-fixed-list" in fairlead(
        "methods", "--kind", "watermark", "--package", "fairlead-example-fixed-list"
    )
    fairlead("watermark", "new-key", "key")
    options = ("--watermark", "example-fixed-list", "--key-file", "key")
    fairlead(
        "generate",
        "prompts.jsonl",
        "--model",
        "model",
        "--out",
        "out.jsonl",
        "--set",
        "delta=8",
        "--max-new-tokens",
        "150",
        *options,
    )
    rows = [json.loads(line) for line in fairlead("detect", "out.jsonl", "--json", "--key-file", "key").splitlines()]
    assert len(rows) == 2
    assert all(row["p_value"] < 0.01 for row in rows)
