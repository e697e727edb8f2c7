"""The header reader: it reads what the `gguf` package writes, and believes nothing that the file cannot back."""

import itertools
import struct
import time
import tracemalloc

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from treadle.runtime.errors import CorruptModelError, ModelError, ModelNotFoundError, UnsupportedModelError
from treadle.runtime.models.gguf_file import SUPPORTED_QUANTIZATIONS, GGUFFile

HUGE = 2**60


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def header(num_tensors=0, num_metadata=0, version=3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_metadata)


def tensor_info(name="t", dimensions=(32,), kind=0, offset=0) -> bytes:
    packed = struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)
    return string(name) + packed


@pytest.fixture
def open_bytes(tmp_path):
    counter = itertools.count()

    def open_(data: bytes) -> GGUFFile:
        path = tmp_path / f"{next(counter)}.gguf"
        path.write_bytes(data)
        return GGUFFile(path)

    return open_


def test_metadata_of_every_type_is_read(tmp_path):
    values = {
        "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 0.1, "bool": True, "string": "grüß dich",
    }  # fmt: skip
    arrays = {"ints": [1, 2, 3], "floats": [0.5, 1.5], "strings": ["", "a", "ü"], "bools": [True, False]}
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, value in values.items():
        getattr(writer, f"add_{name}")(f"x.{name}", value)
    for name, value in arrays.items():
        writer.add_array(f"x.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    assert metadata.pop("general.architecture") == "llama"
    assert metadata == {f"x.{name}": value for name, value in (values | arrays).items()}
    assert metadata["x.bool"] is True


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_tensors_lie_where_the_writer_put_them(tmp_path, alignment):
    first, second = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(5, dtype=np.float16)
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(alignment)
    writer.add_tensor("first", first)
    writer.add_tensor("second", second)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GGUFFile(tmp_path / "m.gguf")
    assert {name: (t.shape, t.quantization) for name, t in file.tensors.items()} == {
        "first": ((2, 3), "F32"),
        "second": ((5,), "F16"),
    }
    assert file.raw("first").tobytes() == first.tobytes()
    assert file.raw("second").tobytes() == second.tobytes()


def test_the_real_model_reads_as_the_gguf_package_reads_it(smollm2_path):
    file, reference = GGUFFile(smollm2_path), GGUFReader(smollm2_path)
    for key, field in reference.fields.items():
        if not key.startswith("GGUF."):
            assert file.metadata[key] == field.contents(), key
    for tensor in reference.tensors:
        info = file.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.quantization, info.offset, info.num_bytes) == (
            tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes,
        )  # fmt: skip
    assert len(file.tensors) == len(reference.tensors) == 272


def test_a_vocabulary_of_49_thousand_is_read_in_a_moment(smollm2_path):
    start = time.perf_counter()
    GGUFFile(smollm2_path)
    assert time.perf_counter() - start < 0.5


def test_a_string_that_the_size_is_exact_for_is_read(open_bytes):
    assert open_bytes(header(0, 1) + string("k") + struct.pack("<I", 8) + string("v")).metadata == {"k": "v"}


HOSTILE = {
    "tensor count": header(HUGE, 0),
    "metadata count": header(0, HUGE),
    "key length": header(0, 1) + struct.pack("<Q", HUGE) + b"x" * 32,
    "string length": header(0, 1) + string("k") + struct.pack("<IQ", 8, HUGE) + b"x" * 32,
    "array of numbers": header(0, 1) + string("k") + struct.pack("<IIQ", 9, 4, HUGE) + b"x" * 32,
    "array of strings": header(0, 1) + string("k") + struct.pack("<IIQ", 9, 8, HUGE) + b"x" * 32,
    "string in array": header(0, 1) + string("k") + struct.pack("<IIQQ", 9, 8, 1, HUGE) + b"x" * 32,
    "wrapping count": header(0, 1) + string("k") + struct.pack("<IIQ", 9, 10, 2**61) + b"x" * 32,
    "number of dimensions": header(1) + string("t") + struct.pack("<I", 2**31) + b"x" * 64,
    "dimensions": header(1) + tensor_info(dimensions=(2**62, 2**62, 2**62, 2**62)) + bytes(64),
    "offset": header(1) + tensor_info(offset=HUGE) + bytes(64),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_count_that_the_file_cannot_hold_is_refused_before_it_is_allocated(open_bytes, what):
    tracemalloc.start()
    try:
        with pytest.raises(CorruptModelError):
            open_bytes(HOSTILE[what])
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


METADATA_K = string("k") + struct.pack("<IB", 0, 1)
CORRUPT = {
    "empty": (b"", "the file is empty"),
    "another format": (b"PK\3\4" + bytes(64), "not a GGUF file"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
    "only the magic": (b"GGUF", "the file ends"),
    "an unknown type": (header(0, 1) + string("k") + struct.pack("<I", 77), "unknown type 77"),
    "a nested array": (header(0, 1) + string("k") + struct.pack("<IIQ", 9, 9, 0), "array of unknown type 9"),
    "a key twice": (header(0, 2) + METADATA_K * 2, "'k' appears twice"),
    "a key not UTF-8": (header(0, 1) + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(32), "not UTF-8"),
    "a token not UTF-8": (
        header(0, 1) + string("k") + struct.pack("<IIQQ", 9, 8, 1, 1) + b"\xff" + bytes(8),
        "not UTF-8",
    ),
    "strings that end early": (
        header(0, 1) + string("k") + struct.pack("<IIQ", 9, 8, 2) + string("x" * 10)[:14] + b"x" * 4,
        "ends inside|runs past",
    ),
    "no dimensions": (header(1) + tensor_info(dimensions=()) + bytes(64), "has 0 dimensions"),
    "an empty dimension": (header(1) + tensor_info(dimensions=(32, 0)) + bytes(64), "empty dimension"),
    "a row of half a block": (header(1) + tensor_info(dimensions=(16,), kind=3) + bytes(64), "not a multiple of 32"),
    "a tensor twice": (header(2) + tensor_info() * 2 + bytes(256), "'t' appears twice"),
    "an odd offset": (header(1) + tensor_info(offset=4) + bytes(256), "not aligned to 32"),
    "no alignment": (
        header(0, 1) + string("general.alignment") + struct.pack("<II", 4, 0),
        "general.alignment is 0",
    ),
}


@pytest.mark.parametrize("what", CORRUPT)
def test_a_corrupt_file_is_refused_with_what_is_wrong_and_what_to_do(open_bytes, what):
    data, reason = CORRUPT[what]
    with pytest.raises(CorruptModelError, match=reason) as error:
        open_bytes(data)
    assert ".gguf: " in str(error.value)
    assert "treadle models pull" in str(error.value)


def test_a_download_that_stopped_says_how_much_is_missing(smollm2_path, tmp_path):
    data = smollm2_path.read_bytes()
    (tmp_path / "half.gguf").write_bytes(data[:-12_000_000])
    with pytest.raises(CorruptModelError, match=r"half\.gguf: the file is 12\.0 MB shorter than its header says"):
        GGUFFile(tmp_path / "half.gguf")


@pytest.mark.parametrize("version", [1, 4])
def test_another_version_is_unsupported(open_bytes, version):
    with pytest.raises(UnsupportedModelError, match=f"GGUF version {version}"):
        open_bytes(header(version=version))


def test_version_2_is_read(open_bytes):
    assert open_bytes(header(0, 1, version=2) + METADATA_K).metadata == {"k": 1}


def test_a_big_endian_file_is_unsupported(open_bytes):
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        open_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))


@pytest.mark.parametrize("kind", [GGMLQuantizationType.IQ2_XS.value, 9999])
def test_another_element_type_is_unsupported(open_bytes, kind):
    with pytest.raises(UnsupportedModelError, match=r"IQ2_XS|9999") as error:
        open_bytes(header(1) + tensor_info(dimensions=(256,), kind=kind) + bytes(256))
    assert all(name in str(error.value) for name in SUPPORTED_QUANTIZATIONS)


def test_a_path_that_is_no_file_is_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"absent\.gguf: there is no such file"):
        GGUFFile(tmp_path / "absent.gguf")
    with pytest.raises(ModelError, match="Is a directory"):
        GGUFFile(tmp_path)
