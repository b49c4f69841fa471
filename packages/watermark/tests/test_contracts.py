"""The contracts of fairlead over every watermark, and what the package promises as a whole."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fairlead import registry
from fairlead.testing import recipe_contract, registered_contract, watermark_contract
from fairlead_watermark import KGW, Gumbel, ModifiedGumbel

TestLefthash = watermark_contract(lambda **s: KGW(**s))
TestMinhash = watermark_contract(lambda **s: KGW(scheme="minhash", **s))
TestSelfhash = watermark_contract(lambda **s: KGW(scheme="selfhash", **s))
TestPermutationLefthash = watermark_contract(lambda **s: KGW(scheme="hf-lefthash", **s))
TestPermutationSelfhash = watermark_contract(lambda **s: KGW(scheme="hf-selfhash", **s))
TestGumbel = watermark_contract(lambda **s: Gumbel(dedup_contexts="single_turn", **s))
TestModifiedGumbel = watermark_contract(lambda **s: ModifiedGumbel(dedup_contexts="all", **s))
TestKGWRegistered = registered_contract("watermark", "kgw")
TestGumbelRegistered = registered_contract("watermark", "gumbel")
TestModifiedGumbelRegistered = registered_contract("watermark", "modified-gumbel")
TestResamplingRegistered = registered_contract("decoder", "alignment-resampling")
TestRecipeRegistered = registered_contract("recipe", "watermark-alignment-resampling")
TestRecipe = recipe_contract("watermark-alignment-resampling")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, fairlead_watermark as w; w.KGW, w.Gumbel, w.ModifiedGumbel; "
        "print([m for m in ('transformers', 'scipy', 'pyarrow', 'matplotlib', 'triton') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_registry_builds_what_the_package_exports() -> None:
    mark = registry.create("watermark", "kgw", vocab_size=100, key=1)
    assert type(mark) is KGW
    assert {m.name for m in registry.methods("watermark")} >= {"kgw", "gumbel", "modified-gumbel"}


def test_the_fuller_signature_is_shown_to_editors() -> None:
    import inspect

    assert {"vocab_size", "key", "gamma", "delta", "scheme"} <= set(inspect.signature(KGW).parameters)


@pytest.mark.parametrize("key", [0x5EED, b"12345678", b"a longer passphrase"])
def test_keys_come_as_numbers_and_bytes(key: object) -> None:
    assert KGW(vocab_size=100, key=key).config.key.fingerprint.startswith("key-")
