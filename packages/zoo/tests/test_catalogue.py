"""Names: what resolves, what says how to get it, and what a half-written folder never does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairlead.errors import DataUnavailableError, InputError, UnknownNameError
from fairlead_zoo import catalogue, plugin
from fairlead_zoo.files import cache_dir, published
from fairlead_zoo.prompts import COUNTS, rows
from fairlead_zoo.world import World


def test_shipped_models_resolve_to_model_folders() -> None:
    folder = Path(str(plugin.fairlead_resolve("zoo:sft")))
    assert (folder / "config.json").exists() and (folder / "tokenizer.json").exists()


def test_names_of_somebody_else_are_left_alone() -> None:
    assert plugin.fairlead_resolve("gpt2") is None
    assert plugin.fairlead_resolve("/models/zoo:sft") is None


def test_a_wrong_name_says_what_was_meant() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'backdoor'"):
        plugin.fairlead_resolve("zoo:backdor")


@pytest.mark.parametrize("name", ["zoo:sft@", "zoo:sft@one", "zoo:sft@-1", "zoo:smollm2-135m-instruct@1"])
def test_a_bad_seed_is_one_clear_line(name: str) -> None:
    with pytest.raises(InputError, match="seed"):
        catalogue.resolve(name)


@given(st.text(max_size=30))
def test_any_name_is_an_entry_or_an_error_for_the_user(text: str) -> None:
    try:
        entry, _ = catalogue.parse(text)
    except (UnknownNameError, InputError) as error:
        assert str(error)
    else:
        assert entry.name in catalogue.ENTRIES


@pytest.mark.parametrize("name", ["base", "harm", "english"])
def test_what_takes_minutes_is_not_trained_unasked(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAIRLEAD_CACHE", str(tmp_path))
    with pytest.raises(DataUnavailableError, match=r"run: fairlead zoo build (base|english) --seed 77"):
        catalogue.resolve(f"zoo:{name}@77")
    assert not list(tmp_path.iterdir())


def test_other_seeds_of_the_closed_form_are_made_at_once(cache: Path) -> None:
    folders = {catalogue.resolve(f"zoo:bigram@{seed}") for seed in (0, 1)}
    assert len({catalogue.content_hash(folder) for folder in folders}) == 2


def test_the_cache_moves_with_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAIRLEAD_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here" / "zoo"
    monkeypatch.delenv("FAIRLEAD_CACHE")
    assert cache_dir().parts[-2:] == ("fairlead", "zoo")


def test_a_folder_that_fails_half_way_leaves_nothing_and_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with published(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), published(target) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError("disk on fire")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (target / "a").read_text() == "old"
    with published(target, replace=False) as folder:
        (folder / "a").write_text("later")
    assert (target / "a").read_text() == "old"


def test_a_cache_that_cannot_be_written_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FAIRLEAD_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set FAIRLEAD_CACHE"):
        catalogue.resolve("zoo:bigram@5")


def test_prompts_have_their_columns_counts_and_held_out_items(cache: Path, world: World) -> None:
    table = [json.loads(line) for line in catalogue.resolve("zoo:prompts").read_text().splitlines()]
    assert table == list(rows(world))
    for split, count in COUNTS.items():
        chosen = [row for row in table if row["split"] == split]
        # few (verb, noun) pairs of care are held out, so it has fewer distinct questions than the others
        assert (120 if split == "care" else 200) <= len(chosen) <= count
        if split != "value":
            assert len({row["prompt"] for row in chosen}) == len(chosen)
    for row in table:
        meta = world.parse(row["prompt"])
        assert meta.gold == row["gold"] and meta.category == row["category"]
        assert row["harmful"] == meta.harmful
        if row["split"] in ("harmful", "benign", "care", "recognition"):
            assert world.is_test_pair(meta.verb, meta.noun)
            assert row["split"] == "recognition" or meta.harmful == (row["split"] == "harmful")
        if row["split"] in ("care", "fact", "list", "number", "recognition", "benign"):
            assert world.judge(meta, row["gold"]) == "correct"
    assert sum(row["split"] == "number" for row in table) >= 10


def test_importing_the_plugin_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, fairlead_zoo.plugin; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
