"""Models in the Hugging Face format: a folder with `config.json` and safetensors."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.runtime.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from treadle.runtime.models.config import ModelConfig
from treadle.runtime.models.huggingface_config import read_config
from treadle.runtime.models.layout import Shape, check_tensors

if TYPE_CHECKING:
    import torch

    from treadle.kernels.codes import Int4Matrix, Int8Matrix

SUPPORTED_TYPES = ("F32", "F16", "BF16")
"""Element types that Treadle takes from safetensors, by their safetensors names."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class HuggingFaceCheckpoint:
    """A model folder in the Hugging Face format, as a `Checkpoint`: tensors keep the element type they are stored in.

    Raises `ModelNotFoundError` if the folder holds no model, `CorruptModelError` if a file is absent or damaged or the
    weights contradict `config.json`, and `UnsupportedModelError` for an architecture that Treadle cannot run.
    """

    path: Path | None
    config: ModelConfig

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.path = self.folder
        self.config = read_config(self.folder)
        self._shards = _Shards(self.folder)
        shapes = self._shards.shapes()
        self._shapes = check_tensors(self.config, shapes, str(self.folder))
        self._refuse_unknown_tensors(shapes.keys())

    def names(self) -> Collection[str]:
        """Every tensor that `tensor` can give."""
        return self._shapes.keys()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as it is stored. Raises `CorruptModelError` if the model has none of this name."""
        if name not in self._shapes:
            raise CorruptModelError(f"{self.folder}: the model has no tensor {name!r}.")
        return self._shards.read(name)

    def codes(self, name: str) -> Int4Matrix | Int8Matrix | None:
        """None: no matrix is stored in codes."""
        return None

    def _refuse_unknown_tensors(self, stored: Collection[str]) -> None:
        """A tensor left unread would be a part of the model left out, and wrong answers without a word."""
        unused = {"lm_head.weight"} if self.config.tied_embeddings else set()
        unknown = sorted(
            name
            for name in stored
            if name not in self._shapes and name not in unused and not name.endswith("rotary_emb.inv_freq")
        )
        if unknown:
            raise UnsupportedModelError(
                f"{self.folder}: Treadle does not know what to do with tensor {unknown[0]!r}"
                f"{f' and {len(unknown) - 1} others' if len(unknown) > 1 else ''}. Use the original, unquantised model."
            )


class _Shards:
    """The safetensors files of a folder, and which of them holds which tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Any] = {}
        self.shard_of: dict[str, str] = {}
        if (folder / _INDEX).exists():
            self.shard_of = self._read_index()
            self._check_index()
        elif (folder / _SINGLE).exists():
            self.shard_of = dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)
        elif list(folder.glob("pytorch_model*.bin")):
            raise UnsupportedModelError(
                f"{folder}: the weights are pickled (pytorch_model.bin), which Treadle does not load because a "
                "pickle can run any code. Get the safetensors version."
            )
        else:
            raise ModelNotFoundError(f"{folder}: has config.json but no {_SINGLE}. Download the weights too.")

    def shapes(self) -> dict[str, Shape]:
        """The shape of every tensor, once its element type is known to be supported."""
        shapes: dict[str, Shape] = {}
        for name, shard in self.shard_of.items():
            view = self._open(shard).get_slice(name)
            if view.get_dtype() not in SUPPORTED_TYPES:
                raise UnsupportedModelError(
                    f"{self.folder / shard}: tensor {name!r} is of type {view.get_dtype()}, which Treadle cannot run. "
                    f"Use a model in {', '.join(SUPPORTED_TYPES)}."
                )
            shapes[name] = tuple(view.get_shape())
        return shapes

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._open(self.shard_of[name]).get_tensor(name)
        return tensor

    def _open(self, shard: str) -> Any:
        """The opened shard. The library checks that its header describes exactly the bytes that are there."""
        from safetensors import SafetensorError, safe_open

        if shard not in self.files:
            path = self.folder / shard
            if not path.is_file():
                raise CorruptModelError(f"{path}: this part of the model is missing. Download it.")
            try:
                self.files[shard] = safe_open(path, framework="pt")
            except (SafetensorError, OSError, ValueError) as error:
                raise CorruptModelError(f"{path}: truncated or damaged ({error}). Download this file again.") from error
        return self.files[shard]

    def _read_index(self) -> dict[str, str]:
        path = self.folder / _INDEX
        try:
            weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
            shard_of = {str(name): str(shard) for name, shard in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptModelError(f"{path}: not a safetensors index ({error!r}). Download it again.") from error
        for shard in shard_of.values():
            if not shard or Path(shard).name != shard:
                raise CorruptModelError(
                    f"{path}: names {shard!r}, which is not a file of this folder. Do not trust it."
                )
        return shard_of

    def _check_index(self) -> None:
        held = {shard: set(self._open(shard).keys()) for shard in dict.fromkeys(self.shard_of.values())}
        for name, shard in self.shard_of.items():
            if name not in held[shard]:
                raise CorruptModelError(
                    f"{self.folder / shard}: tensor {name!r} should be in this file but is not. Download it again."
                )
