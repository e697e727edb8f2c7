"""Opening a model, whatever its format."""

from __future__ import annotations

from pathlib import Path

from treadle.runtime.errors import ModelNotFoundError, UnsupportedModelError
from treadle.runtime.models.checkpoint import Checkpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a `.gguf` file, a folder in Hugging Face format, or a folder with exactly one `.gguf` file.

    Raises `ModelNotFoundError` where there is no model, `UnsupportedModelError` where there is one that Treadle cannot
    run, and `CorruptModelError` where one is damaged.
    """
    if not path.exists():
        raise ModelNotFoundError(f"{path}: there is no such file or folder. Check the path.")
    if path.is_dir():
        if (path / "config.json").exists():
            from treadle.runtime.models.huggingface import HuggingFaceCheckpoint

            return HuggingFaceCheckpoint(path)
        path = only_gguf_file(path)
    elif path.suffix.lower() != ".gguf":
        raise UnsupportedModelError(
            f"{path}: neither a .gguf file nor a folder. For safetensors give the folder that holds config.json."
        )
    from treadle.runtime.models.gguf import GGUFCheckpoint

    return GGUFCheckpoint(path)


def only_gguf_file(folder: Path) -> Path:
    """The one `.gguf` file in a folder. Raises `ModelNotFoundError` if there is none, or a choice."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".gguf")
    if len(files) == 1:
        return files[0]
    if not files:
        raise ModelNotFoundError(
            f"{folder}: holds no model. Give a .gguf file, or a folder with config.json and model.safetensors."
        )
    listed = ", ".join(file.name for file in files[:5]) + (", ..." if len(files) > 5 else "")
    raise ModelNotFoundError(f"{folder}: holds {len(files)} .gguf files ({listed}). Give the path of one of them.")
