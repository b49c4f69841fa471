"""`fairlead watermark new-key` and what its file is good for."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fairlead_watermark import KGW


def new_key(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fairlead", "watermark", "new-key", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_new_key_is_its_owners_alone_shows_a_fingerprint_and_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    made = new_key(path)
    assert made.returncode == 0, made.stderr
    content = path.read_text(encoding="ascii").strip()
    mark = KGW(vocab_size=64, key=path)
    assert mark.config.key.fingerprint in made.stdout
    assert content[2:] not in made.stdout + made.stderr
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = new_key(path)
    assert again.returncode == 2
    assert "never overwritten" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1
    assert path.read_text(encoding="ascii").strip() == content


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_key_that_others_can_read_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("12345\n", encoding="ascii")
    path.chmod(0o644)
    with pytest.warns(UserWarning, match="chmod 600"):
        KGW(vocab_size=64, key=path)
