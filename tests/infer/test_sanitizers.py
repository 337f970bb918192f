"""The compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer: their tests find nothing.

Python itself is not built with them: the runtime is preloaded, and memory comes from ``malloc``, so that
what NumPy, torch and ctypes hand over has guarded ends, too.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
UNDEFINED = "-fsanitize=undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
FLAGS = f"{UNDEFINED} -fsanitize=address"
KERNELS = [
    ("decode", "infer/test_native.py", "not compiler and not refused", FLAGS),
    # Where memory is refused AddressSanitizer ends the process, and this test wants it to be survived.
    ("decode", "infer/test_native.py", "refused", UNDEFINED),
    ("skim", "infer/test_lookup.py", "kernel", FLAGS),
    ("beam", "lattice/test_beam.py", "kernel or chunks or overflow or plain_search", FLAGS),
]
"""Sources, the tests that call them, and the sanitizers that they are compiled with."""
BROKEN = """
extern "C" float beyond(const float *from, long at) { return from[at]; }
extern "C" int overflow(int one, int other) { return one + other; }
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def sanitized(tmp_path: Path) -> dict[str, str]:
    """The environment in which kernels are compiled with the sanitizers and find their runtime; skipped
    where there is none."""
    compiler = os.environ.get("CXX") or "g++"
    if not sys.platform.startswith("linux") or shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} with sanitizers here")
    runtime = []
    for name in ("libasan.so", "libstdc++.so"):  # the latter has exceptions, which the former wraps
        asked = [compiler, f"-print-file-name={name}"]
        found = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"{compiler} has no {name}")
        runtime.append(found)
    wrapper, calls = tmp_path / "sanitized", tmp_path / "calls"
    wrapper.write_text(
        f'#!/bin/sh\necho "$@" >> {shlex.quote(str(calls))}\n'
        f'exec {shlex.quote(compiler)} "$@" $SANITIZERS\n'
    )
    wrapper.chmod(0o755)
    return os.environ | {
        "CXX": str(wrapper),
        "CLLM_CACHE": str(tmp_path / "cache"),
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has until its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
        "SANITIZERS": FLAGS,
    }


@pytest.mark.parametrize(("kernel", "file", "chosen", "flags"), KERNELS)
def test_its_tests_find_nothing(
    kernel: str, file: str, chosen: str, flags: str, sanitized: dict[str, str], tmp_path: Path
) -> None:
    environment = sanitized | {"SANITIZERS": flags}
    if flags != FLAGS:
        del environment["LD_PRELOAD"]  # AddressSanitizer's
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-x", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(TESTS / file), "-k", chosen, "--basetemp", str(tmp_path / "inner")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[:8000]}"
    assert "runtime error" not in done.stderr
    assert "SKIPPED" not in done.stdout
    assert f"{kernel}.cpp" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("call", "finding"),
    [
        ("library.beyond(array.ctypes.data_as(c_void_p), c_long(8))", "heap-buffer-overflow"),
        ("library.overflow(2**31 - 1, 1)", "signed integer overflow"),
    ],
)
def test_what_is_wrong_would_be_found(
    call: str, finding: str, sanitized: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "broken.cpp").write_text(BROKEN)
    code = (
        "from ctypes import CDLL, c_long, c_void_p; from pathlib import Path; import numpy as np; "
        "from cllm.lattice.native import Library; "
        f"library = CDLL(str(Library(source=Path({str(tmp_path / 'broken.cpp')!r})).compile())); "
        f"array = np.zeros(8, np.float32); {call}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=sanitized, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert finding in done.stderr
