"""C++ sources that are compiled for the machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cllm.core.machine import cache_dir
from cllm.lattice import native
from cllm.lattice.native import CannotCompileError, Library

HERE = shutil.which(native._compiler())
needs_compiler = pytest.mark.skipif(HERE is None, reason="there is no C++ compiler")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setenv("CLLM_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "seven.cpp"
    source.write_text('extern "C" int number() { return NUMBER; }')
    return Library(source=source, options=("-DNUMBER=7",))


@needs_compiler
def test_it_is_compiled_once_for_a_source_its_options_and_a_compiler(library, monkeypatch):
    import ctypes

    made = library.compile()
    assert ctypes.CDLL(str(made)).number() == 7
    stamp = made.stat().st_mtime_ns
    assert library.compile() == made
    assert made.stat().st_mtime_ns == stamp
    other = Library(source=library.source, options=("-DNUMBER=8",))
    assert ctypes.CDLL(str(other.compile())).number() == 8
    library.source.write_text('extern "C" int number() { return 2 * NUMBER; }')
    assert ctypes.CDLL(str(library.compile())).number() == 14
    # Nothing is left beside the libraries.
    assert {path.suffix for path in made.parent.iterdir()} == {".so"}


@needs_compiler
def test_what_the_compiler_says_is_told_in_one_line(library):
    library.source.write_text("this is no program")
    with pytest.raises(CannotCompileError, match=r"failed: .*seven\.cpp:1") as caught:
        library.compile()
    assert "\n" not in str(caught.value)


def test_a_compiler_that_fails_and_one_that_is_not_there(library, tmp_path, monkeypatch):
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho this is no compiler >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(CannotCompileError, match=r"failing failed: this is no compiler$"):
        library.compile()
    failing.write_text(
        "#!/bin/sh\necho a warning >&2\necho line 3: error: that is none >&2\nexit 1\n"
    )
    with pytest.raises(CannotCompileError, match=r"failing failed: line 3: error: that is none$"):
        library.compile()
    monkeypatch.setenv("CXX", "nowhere")
    with pytest.raises(
        CannotCompileError, match=r"no C\+\+ compiler nowhere \(install one, or set"
    ):
        library.compile()


@pytest.mark.parametrize("variable", ["CLLM_CACHE", "XDG_CACHE_HOME", None])
def test_the_cache_is_the_houses(variable, tmp_path, monkeypatch):
    for name in ("CLLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path))
    assert native._cache() == cache_dir() / "kernels"
