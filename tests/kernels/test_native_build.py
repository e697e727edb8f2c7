"""How `native.c` is built, and what is said where it cannot be."""

import concurrent.futures

import pytest

from treadle.kernels import native
from treadle.kernels.native import NativeUnavailable, load_native
from treadle.runtime.config import c_compiler

CC = c_compiler() or "cc"
needs_processor = pytest.mark.skipif(bool(native.missing_features()), reason="this processor is not what it is for")


@pytest.fixture(autouse=True)
def anew():
    load_native.cache_clear()
    yield
    load_native.cache_clear()


@needs_processor
def test_it_is_built_once(tmp_path, monkeypatch):
    load_native(tmp_path, CC)
    (library,) = tmp_path.iterdir()
    load_native.cache_clear()
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("built again"))
    load_native(tmp_path, CC)
    assert list(tmp_path.iterdir()) == [library]


@needs_processor
def test_several_may_build_it_at_once(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: native._built(tmp_path, CC), range(3)))
    (library,) = tmp_path.iterdir()
    assert library.suffix == ".so"


@needs_processor
def test_warnings_are_errors_to_its_authors(tmp_path):
    load_native(tmp_path, f"{CC} -Wall -Wextra -Werror")


@needs_processor
@pytest.mark.parametrize(
    ("compiler", "said"),
    [("false", "false cannot build native.c"), ("no-such-compiler", "no-such-compiler cannot build native.c")],
)
def test_a_compiler_that_fails_is_named(compiler, said, tmp_path):
    with pytest.raises(NativeUnavailable, match=said):
        load_native(tmp_path, compiler)
    assert list(tmp_path.iterdir()) == []


@needs_processor
def test_without_a_compiler_it_is_said_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert c_compiler() is None
    with pytest.raises(NativeUnavailable, match="no C compiler: install one, or name it in CC"):
        load_native(tmp_path, None)


def test_another_processor_is_told_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(NativeUnavailable, match=r"this processor has no avx512f, .*amx_bf16"):
        load_native(tmp_path, CC)
