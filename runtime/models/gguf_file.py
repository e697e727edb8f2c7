"""The header of a GGUF file, read fast and with every number checked before it is used.

Layout, little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):

    magic | version | tensor count | metadata count | metadata ... | tensor infos ... | padding | tensor data
      4        4           8               8                                            to `general.alignment`

A header is untrusted: a count or length is compared with the bytes that are left in the file before anything is
allocated for it, so the cost of opening a hostile file is bounded by its size.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from treadle.runtime.errors import CorruptModelError, ModelError, ModelNotFoundError, UnsupportedModelError

SUPPORTED_QUANTIZATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
"""Element types that Treadle can dequantise, by their GGML names."""

MetadataValue = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]

_MAGIC = b"GGUF"
_SUPPORTED_VERSIONS = (2, 3)
_SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MIN_METADATA_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_ADVICE = "Download it again, with `treadle models pull NAME` if it is a model that Treadle knows."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `shape` is row-major (`[out_features, in_features]`), `offset` in bytes from the start of
    the file, `quantization` a GGML name such as `Q4_1`."""

    name: str
    shape: tuple[int, ...]
    quantization: str
    offset: int
    num_bytes: int


class GGUFFile:
    """An opened GGUF file: metadata, and where each tensor lies.

    Raises `ModelNotFoundError` if there is no such file, `CorruptModelError` if it is truncated or contradicts itself,
    and `UnsupportedModelError` if it is well-formed but of a version or element type that Treadle cannot read.
    """

    path: Path
    metadata: dict[str, MetadataValue]
    tensors: dict[str, TensorInfo]

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._data = _map(self.path)
        reader = _HeaderReader(self.path, self._data)
        self.metadata, self.tensors = reader.read()

    def raw(self, name: str) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """The stored bytes of a tensor: a read-only view into the file, not a copy."""
        info = self.tensors[name]
        return np.frombuffer(self._data, np.uint8, info.num_bytes, info.offset)


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                raise CorruptModelError(f"{path}: the file is empty. {_ADVICE}")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path}: there is no such file. Check the path.") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}). Check that it is a file you may read.") from error


class _HeaderReader:
    """A cursor over the header that never steps past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.position = 0

    def read(self) -> tuple[dict[str, MetadataValue], dict[str, TensorInfo]]:
        self._check_version()
        tensor_count, metadata_count = self._scalar("Q"), self._scalar("Q")
        self._need(tensor_count * _MIN_TENSOR_BYTES, f"{tensor_count} tensors")
        self._need(metadata_count * _MIN_METADATA_BYTES, f"{metadata_count} metadata entries")
        metadata: dict[str, MetadataValue] = {}
        for _ in range(metadata_count):
            key = self._string()
            if key in metadata:
                self._corrupt(f"metadata {key!r} appears twice")
            metadata[key] = self._value(key)
        infos = [self._tensor_info() for _ in range(tensor_count)]
        return metadata, self._place(infos, self._alignment(metadata))

    def _check_version(self) -> None:
        magic = self.data[:4]
        if magic != _MAGIC:
            if self.data[:20] == b"version https://git-":
                self._corrupt("this is a Git LFS pointer, not the model itself (run `git lfs pull`)")
            self._corrupt("this is not a GGUF file: it does not start with the letters GGUF")
        self.position = 4
        version = self._scalar("I")
        if version in _SUPPORTED_VERSIONS:
            return
        if version.to_bytes(4, "big") in {known.to_bytes(4, "little") for known in _SUPPORTED_VERSIONS}:
            raise UnsupportedModelError(f"{self.path}: a big-endian GGUF file. Use the little-endian one.")
        raise UnsupportedModelError(
            f"{self.path}: GGUF version {version}; Treadle reads versions 2 and 3. Convert the model again with a "
            "current llama.cpp."
        )

    def _value(self, key: str) -> MetadataValue:
        kind = self._scalar("I")
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALAR_FORMATS:
            self._corrupt(f"metadata {key!r} has unknown type {kind}")
        value: bool | int | float = self._unpack(_SCALAR_FORMATS[kind])
        return value

    def _array(self, key: str) -> MetadataValue:
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind == _STRING:
            return self._strings(key, count)
        if kind not in _SCALAR_FORMATS:
            self._corrupt(f"metadata {key!r} is an array of unknown type {kind}")
        code = _SCALAR_FORMATS[kind]
        num_bytes = count * struct.calcsize(f"<{code}")
        self._need(num_bytes, f"{count} values of metadata {key!r}")
        values: list[bool] | list[int] | list[float] = list(
            struct.unpack_from(f"<{count}{code}", self.data, self.position)
        )
        self.position += num_bytes
        return values

    def _strings(self, key: str, count: int) -> list[str]:
        """The hot loop: a vocabulary and its merges are some hundred thousand short strings."""
        self._need(count * 8, f"{count} strings of metadata {key!r}")
        data, size, position = self.data, self.size, self.position
        unpack_length = struct.Struct("<Q").unpack_from
        strings: list[str] = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack_length(data, position)[0]
                if position > size:
                    self._corrupt(f"a string of metadata {key!r} runs past the end of the file")
                strings.append(data[start:position].decode())
        except UnicodeDecodeError:
            self._corrupt(f"a string of metadata {key!r} is not UTF-8")
        except struct.error:
            self._corrupt(f"the file ends inside metadata {key!r}")
        self.position = position
        return strings

    def _tensor_info(self) -> TensorInfo:
        name = self._string()
        num_dimensions = self._scalar("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            self._corrupt(f"tensor {name!r} has {num_dimensions} dimensions")
        dimensions = [self._scalar("Q") for _ in range(num_dimensions)]
        kind, offset = self._scalar("I"), self._scalar("Q")
        quantization = self._quantization(name, kind)
        if min(dimensions) == 0:
            self._corrupt(f"tensor {name!r} has an empty dimension: {dimensions}")
        block_size, block_bytes = GGML_QUANT_SIZES[quantization]
        if dimensions[0] % block_size:
            self._corrupt(f"rows of tensor {name!r} have {dimensions[0]} elements, not a multiple of {block_size}")
        num_bytes = math.prod(dimensions) // block_size * block_bytes
        return TensorInfo(name, tuple(reversed(dimensions)), quantization.name, offset, num_bytes)

    def _quantization(self, name: str, kind: int) -> GGMLQuantizationType:
        known = {member.value: member for member in GGMLQuantizationType}.get(kind)
        if known is None or known.name not in SUPPORTED_QUANTIZATIONS:
            raise UnsupportedModelError(
                f"{self.path}: tensor {name!r} is of type {known.name if known else kind}, which Treadle cannot read. "
                f"Use a file with {', '.join(SUPPORTED_QUANTIZATIONS)} only."
            )
        return known

    def _alignment(self, metadata: dict[str, MetadataValue]) -> int:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            self._corrupt(f"general.alignment is {alignment!r}, not a multiple of 8")
        return alignment

    def _place(self, infos: list[TensorInfo], alignment: int) -> dict[str, TensorInfo]:
        """Turns offsets from the start of the data into offsets in the file, which must hold every tensor whole."""
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for info in infos:
            if info.name in tensors:
                self._corrupt(f"tensor {info.name!r} appears twice")
            if info.offset % alignment:
                self._corrupt(f"tensor {info.name!r} is not aligned to {alignment} bytes")
            placed = TensorInfo(info.name, info.shape, info.quantization, start + info.offset, info.num_bytes)
            tensors[info.name] = placed
        end = max((info.offset + info.num_bytes for info in tensors.values()), default=0)
        if end > self.size:
            self._corrupt(f"the file is {_format_bytes(end - self.size)} shorter than its header says")
        return tensors

    def _string(self) -> str:
        length = self._scalar("Q")
        self._need(length, f"a string of {length} bytes")
        start, self.position = self.position, self.position + length
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError:
            self._corrupt(f"the string at byte {start} is not UTF-8")

    def _scalar(self, code: str) -> int:
        value = self._unpack(code)
        assert isinstance(value, int)
        return value

    def _unpack(self, code: str) -> int | float | bool:
        num_bytes = struct.calcsize(f"<{code}")
        self._need(num_bytes, "the header")
        value: int | float | bool = struct.unpack_from(f"<{code}", self.data, self.position)[0]
        self.position += num_bytes
        return value

    def _need(self, num_bytes: int, what: str) -> None:
        left = self.size - self.position
        if num_bytes > left:
            self._corrupt(f"the file ends {_format_bytes(num_bytes - left)} too early for {what}")

    def _corrupt(self, what: str) -> NoReturn:
        raise CorruptModelError(f"{self.path}: {what}. {_ADVICE}")


def _format_bytes(num_bytes: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} bytes"
