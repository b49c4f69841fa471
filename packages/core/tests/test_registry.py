"""Registration: names, tags, duplicates, broken plugins, keys and settings."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from fairlead import registry, taxonomy
from fairlead.config import Configurable, MethodConfig
from fairlead.errors import ConfigError, DuplicateMethodError, InputError, PluginError, UnknownNameError
from fairlead.keys import SecretKey, new_key_file
from fairlead.registry import Method, Registry

TAGS = ("stage.decoding", "access.blackbox", "goal.preferences")


def test_a_wrong_name_says_what_was_meant() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'keyword'"):
        registry.create("reward", "keywrd")
    with pytest.raises(UnknownNameError, match="kind"):
        registry.methods("rewards")


def test_two_methods_of_one_name_name_both_packages() -> None:
    own = Registry()
    own.add(Method("twin", "reward", "a:b", package="first-package"))
    with pytest.raises(DuplicateMethodError, match=r"first-package.*second-package"):
        own.add(Method("twin", "reward", "c:d", package="second-package"))
    own.add(Method("twin", "guard", "c:d", package="second-package"))  # another kind is another name


@pytest.mark.parametrize("name", ["", "Upper", "with space", "tab\t"])
def test_nonsense_names_are_refused(name: str) -> None:
    with pytest.raises(PluginError):
        Registry().add(Method(name, "reward", "a:b"))


def test_an_unknown_tag_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match=r"stage\.decoding"):
        Registry().add(Method("x", "reward", "a:b", tags=("stage.decodin",)))


def test_a_factory_that_cannot_be_imported_is_named() -> None:
    own = Registry()
    own.add(Method("ghost", "reward", "no_such_module:Thing", package="some-package"))
    with pytest.raises(PluginError, match=r"ghost.*some-package"):
        own.create("reward", "ghost")


def test_every_registered_method_is_tagged_in_the_three_facets() -> None:
    for method in registry.methods():
        covered = taxonomy.facets(method.tags)
        assert {"stage", "access"} <= covered, method.name
        assert covered & {"goal", "side", "paradigm"}, method.name


def test_the_taxonomy_is_a_tree_of_unique_ids() -> None:
    nodes = taxonomy.nodes()
    for node in nodes.values():
        assert node.parent is None or node.parent in nodes
        assert node.facet == node.id.split(".")[0]
        assert 0 < len(node.definition) <= 200


@given(st.sampled_from(sorted(taxonomy.nodes())))
def test_a_tag_is_found_under_each_of_its_ancestors(tag: str) -> None:
    parts = tag.split(".")
    for depth in range(1, len(parts) + 1):
        assert taxonomy.matches([tag], ".".join(parts[:depth]))


def run(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code with `tmp_path` on the path, where plugins of the test lie."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]), **environment}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=variables)


def plugin(tmp_path: Path, name: str, code: str) -> None:
    """A distribution with one plugin, as an installer would have left it."""
    (tmp_path / f"{name.replace('-', '_')}.py").write_text(textwrap.dedent(code), encoding="utf-8")
    info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[fairlead]\n{name} = {name.replace('-', '_')}\n", encoding="utf-8")


GOOD = """
    from fairlead import hookimpl

    @hookimpl
    def fairlead_rewards(register):
        register("from-{name}", "{module}:Reward", summary="a reward", tags=("stage.decoding", "access.blackbox", "goal.preferences"))
"""


def test_a_plugin_that_fails_is_named_and_the_rest_works(tmp_path: Path) -> None:
    plugin(tmp_path, "good-one", GOOD.format(name="good", module="good_one"))
    plugin(tmp_path, "broken-one", "raise RuntimeError('no luck')")
    plugin(tmp_path, "nonsense-one", "from fairlead import hookimpl\n@hookimpl\ndef fairlead_rewards(register):\n    register('Bad Name', 'x:y')\n")
    done = run("from fairlead import registry; print([m.name for m in registry.methods('reward')])", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "from-good" in done.stdout
    assert "keyword" in done.stdout
    assert "broken-one" in done.stderr
    assert "no luck" in done.stderr
    assert "nonsense-one" in done.stderr


def test_plugins_can_be_left_out(tmp_path: Path) -> None:
    plugin(tmp_path, "good-one", GOOD.format(name="good", module="good_one"))
    code = "from fairlead import registry; print([m.name for m in registry.methods('reward')])"
    assert "from-good" not in run(code, tmp_path, FAIRLEAD_DISABLE="good-one").stdout
    assert "from-good" in run(code, tmp_path, FAIRLEAD_PLUGINS="good-one").stdout


def test_two_plugins_with_one_method_name_are_an_error_that_names_both(tmp_path: Path) -> None:
    plugin(tmp_path, "first-one", GOOD.format(name="same", module="first_one"))
    plugin(tmp_path, "second-one", GOOD.format(name="same", module="second_one"))
    done = run("from fairlead.cli import main; main(['methods'])", tmp_path)
    assert done.returncode == 2
    assert "first-one" in done.stderr
    assert "second-one" in done.stderr
    assert "Traceback" not in done.stderr


def test_listing_methods_imports_no_torch(tmp_path: Path) -> None:
    done = run("import sys; from fairlead import registry; registry.methods(); print('torch' in sys.modules)", tmp_path, FAIRLEAD_PLUGINS="watermark,zoo")
    assert done.stdout.strip() == "False"


class SampleConfig(MethodConfig):
    gamma: float = Field(0.5, gt=0, lt=1)
    key: SecretKey | None = Field(None, repr=False)


class Sample(Configurable):
    Config = SampleConfig


def test_a_bad_setting_says_field_value_and_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"gamma.*less than 1.*1\.5"):
        Sample(gamma=1.5)
    with pytest.raises(ConfigError, match=r"gama.*did you mean 'gamma'"):
        Sample(gama=0.5)


def test_settings_are_frozen_and_a_config_or_keywords_build_the_same() -> None:
    built = Sample(gamma=0.25)
    assert built.config == Sample(SampleConfig(gamma=0.25)).config
    with pytest.raises(Exception, match="frozen"):
        built.config.gamma = 0.3  # type: ignore[attr-defined]


SECRET = 0xDEADBEEFCAFED00D


@pytest.mark.parametrize("wrong", [-1, 1 << 64, True, 1.5, b"", None])
def test_bad_keys_are_refused_without_showing_them(wrong: object) -> None:
    with pytest.raises(InputError) as error:
        SecretKey(wrong)  # type: ignore[arg-type]
    assert str(1 << 64) not in str(error.value)


def test_a_key_is_never_shown(tmp_path: Path) -> None:
    built = Sample(key=SECRET)
    forms = (str(SECRET), f"{SECRET:x}", f"{SECRET:X}", str(SECRET - (1 << 64)))
    shown = [repr(built), str(vars(built)), json.dumps(built.config.public_dict()), repr(built.config.key), str(built.config.key)]
    with pytest.raises(TypeError):
        pickle.dumps(built.config.key)
    with pytest.raises(ConfigError) as error:
        Sample(key=SECRET, gamma=2)
    shown.append(str(error.value))
    for text in shown:
        assert not any(form in text for form in forms)
    assert copy.deepcopy(built.config.key) == built.config.key


@given(st.integers(0, (1 << 64) - 1))
def test_a_number_and_its_eight_bytes_are_one_key(number: int) -> None:
    assert SecretKey(number) == SecretKey(number.to_bytes(8, "big"))
    assert SecretKey(number).reveal() == number


def test_a_key_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    made = new_key_file(path)
    assert SecretKey(path) == made
    assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(InputError, match="never overwritten"):
        new_key_file(path)
    path.chmod(0o644)
    with pytest.warns(UserWarning, match="read by others"):
        SecretKey(path)


@pytest.mark.parametrize("content", ["", "abc", "0x1ffffffffffffffff", "12 13"])
def test_a_broken_key_file_is_one_clear_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_text(content, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(InputError) as error:
        SecretKey(path)
    assert "\n" not in str(error.value)
