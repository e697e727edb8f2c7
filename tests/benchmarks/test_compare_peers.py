"""Engines beside Treadle: what is measured of them, and what is said when one fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peers.export import export_model
from peers.process import PeerError, PeerProcess
from peers.serving import Settings, agents, complete

from treadle.runtime.models.huggingface import HuggingFaceCheckpoint
from treadle.runtime.models.random_weights import SHAPES, RandomCheckpoint

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare_peers.py"


def run(*options):
    command = [sys.executable, str(SCRIPT), "--quick", "--json", "--model", "random:tiny-llama", *options]
    polite = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(command, env=polite, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def program(tmp_path):
    """Makes a program that runs some shell commands, to be given as the interpreter of a peer."""

    def make(commands):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{commands}\n")
        path.chmod(0o755)
        return path

    return make


def test_treadle_beside_itself_has_a_ratio_for_every_workload():
    done = run("--peer", f"treadle={sys.executable}", "--threads", "1")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    figures = [line["figure"] for line in lines]
    assert figures == ["decode_ratio", "decode_ratio", "prefill_ratio", "agents_ratio", "start_ratio"]
    assert all(line["peer"] == "treadle" and line["treadle_precision"] == line["peer_precision"] for line in lines)
    assert all(0 < line["lowest"] <= line["value"] <= line["highest"] for line in lines)


def test_a_peer_that_dies_is_named_with_its_last_words(program):
    python = program("echo no such engine here >&2; exit 3")
    done = run("--peer", f"vllm={python}")
    assert done.returncode == 1
    assert "vllm: ended with exit code 3" in done.stderr and "no such engine here" in done.stderr
    assert not done.stdout


def test_a_peer_that_says_nothing_is_given_up_at_the_limit(program):
    began = time.monotonic()
    settings = Settings("model", 1, 128, 4, "auto", "auto")
    with (
        pytest.raises(PeerError, match=r"vllm: no answer to 'open' within 0\.2 s"),
        PeerProcess("vllm", str(program("exec sleep 60")), settings, limit_s=0.2) as process,
    ):
        process.open()
    assert time.monotonic() - began < 30, "its end was waited for"


@pytest.mark.parametrize(
    ("peer", "said"), [("gpt=python", "no peer is called 'gpt'"), ("vllm=/no/python", "'/no/python' is no program")]
)
def test_a_peer_that_cannot_be_is_refused_with_the_way_to_write_it(peer, said):
    done = run("--peer", peer)
    assert done.returncode == 2
    assert said in done.stderr


def test_llama_cpp_is_refused_for_a_model_that_is_no_file_of_its_kind():
    done = run("--peer", f"llama-cpp={sys.executable}")
    assert done.returncode == 1
    assert "llama-cpp runs .gguf files" in done.stderr


@pytest.mark.parametrize("shape", [name for name in SHAPES if name.startswith("tiny")])
def test_a_model_written_for_peers_is_the_model(shape, tmp_path):
    checkpoint = RandomCheckpoint(SHAPES[shape])
    export_model(checkpoint, tmp_path)
    written = HuggingFaceCheckpoint(tmp_path)
    assert written.config == checkpoint.config
    for name in checkpoint.names():
        assert torch.equal(written.tensor(name), checkpoint.tensor(name).to(torch.bfloat16)), name


class CountingEngine:
    """Generates 1, 2, 3, ... for each sequence, a token a step, the first of a sequence `number` steps late."""

    version = precision = "none"

    def __init__(self):
        self.prompts = {}
        self.rows = {}

    def begin(self, num_sequences, max_tokens, *, share_prefix):
        self.most_tokens = max_tokens

    def add(self, sequence, conversation, token_ids, new_tokens):
        assert len(token_ids) + new_tokens <= self.most_tokens
        self.prompts[sequence] = token_ids
        self.rows[sequence] = [-len(self.rows), new_tokens]

    def step(self):
        for sequence, (count, end) in list(self.rows.items()):
            self.rows[sequence][0] += 1
            if 0 <= count < end:
                yield sequence, [count + 1]


def test_decoding_is_counted_from_the_first_token_of_the_last_sequence():
    answer = complete(CountingEngine(), [[7] * 4] * 3, 10)
    assert answer["tokens"] == 30
    assert answer["decode_tokens"] == 30 - (3 + 2 + 1)
    assert 0 < answer["decode_seconds"] < answer["seconds"]


def test_an_agent_reads_all_that_it_read_and_wrote_before():
    engine = CountingEngine()
    answer = agents(engine, [9, 9], [[[10, 11], [12, 13]], [[20, 21], [22, 23]]], 3)
    assert answer["tokens"] == 2 * 2 * 3
    assert engine.prompts["agent-0-turn-0"] == [9, 9, 10, 11]
    assert engine.prompts["agent-1-turn-1"] == [9, 9, 20, 21, 1, 2, 3, 22, 23]
