"""Build the C library in place, for development: `python kernels/build_native.py`.

Each kernel.c becomes an object of its own (kept by the hash of what went in), so one that does not compile is reported
and the others are linked without it. The library appears by one rename: safe while others build or run.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE / "src" / "fairlead_kernels"
LIBRARY = PACKAGE / ("libfairlead_kernels.dylib" if sys.platform == "darwin" else "libfairlead_kernels.so")


def main() -> int:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    flags = [*(HERE / "cflags.txt").read_text().split(), "-I", str(PACKAGE / "native_src")]
    objects = HERE / "build" / "native"
    objects.mkdir(parents=True, exist_ok=True)
    headers = b"".join(path.read_bytes() for path in sorted((PACKAGE / "native_src").glob("*.h")))
    good, bad = [], []
    for source in sorted(PACKAGE.glob("ops/*/kernel.c")):
        text = source.read_bytes()
        recipe = b"\0".join([text, headers, *(part.encode() for part in compiler + flags)])
        target = objects / f"{source.parent.name}-{hashlib.sha256(recipe).hexdigest()[:16]}.o"
        if not target.exists():
            scratch = target.with_suffix(f".{os.getpid()}.tmp")
            done = subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(scratch)])
            if done.returncode != 0:
                bad.append(source.parent.name)
                continue
            os.replace(scratch, target)
        good.append(target)
    with tempfile.TemporaryDirectory(dir=objects) as folder:
        linked = Path(folder) / LIBRARY.name
        subprocess.run([*compiler, "-shared", "-o", str(linked), *map(str, good), "-lm"], check=True)
        os.replace(linked, LIBRARY)
    sys.stdout.write(f"{LIBRARY} with {len(good)} kernels" + (f", without {', '.join(bad)}" if bad else "") + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
