"""`treadle generate`: text, numbers, JSON, pipes and signals."""

import json
import os
import signal
import subprocess

import pytest

from .conftest import PATIENCE, POLITE, TREADLE

TINY = ("generate", "--model", "random:tiny-llama", "--ids")


def test_a_prompt_is_completed(treadle):
    done = treadle("generate", "The capital of France is", "--max-tokens", "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(" Paris")


def test_the_prompt_may_come_from_standard_input(treadle):
    done = treadle("generate", "--chat", "--max-tokens", "12", stdin="What is the capital of France?\n")
    assert done.returncode == 0 and "Paris" in done.stdout


def test_json_is_one_object_with_the_account(treadle):
    done = treadle(*TINY, "--json", "--max-tokens", "5", "--seed", "7", "1 2 3")
    report = json.loads(done.stdout)
    assert (report["model"], report["prompt_tokens"], report["seed"]) == ("random:tiny-llama", 3, 7)
    assert (report["finish_reason"], len(report["token_ids"]), report["text"]) == ("length", 5, "")
    assert (report["usage"]["prefilled"], report["usage"]["decoded"]) == (3, 5)


def test_several_completions_are_a_list_with_consecutive_seeds(treadle):
    done = treadle(*TINY, "--json", "--n", "3", "--temperature", "1", "--seed", "7", "--max-tokens", "8", "1 2 3")
    completions = json.loads(done.stdout)["completions"]
    assert [completion["seed"] for completion in completions] == [7, 8, 9]
    alone = json.loads(
        treadle(*TINY, "--json", "--temperature", "1", "--seed", "8", "--max-tokens", "8", "1 2 3").stdout
    )
    assert completions[1]["token_ids"] == alone["token_ids"]


def test_what_is_learned_is_kept_in_a_file_on_request(treadle, tmp_path):
    kept = tmp_path / "learned.json"
    for _ in range(2):
        assert treadle(*TINY, "--learned", str(kept), "--max-tokens", "5", "1 2 3").returncode == 0
    ((_, count, total),) = json.loads(kept.read_text())["outputs"]["all"]
    assert (count, total) == (2, 10)
    kept.write_text("{")
    done = treadle(*TINY, "--learned", str(kept), "1 2 3")
    assert (done.returncode, done.stdout, kept.read_text()) == (1, "", "{")
    assert done.stderr.startswith(f"treadle: error: {kept}: ") and "delete the file to begin anew" in done.stderr


@pytest.mark.parametrize("weights", ["auto", "full"])
def test_weights_are_kept_as_asked_for(treadle, weights):
    done = treadle("generate", "The capital of France is", "--weights", weights, "--max-tokens", "3")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(" Paris")


def test_weights_that_cannot_be_are_an_error_with_the_fix(treadle):
    done = treadle(*TINY, "--weights", "int4", "--dtype", "float32", "1 2 3")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("treadle: error: weights is 'int4'") and "use weights='auto'" in done.stderr


def test_logprobs_are_reported(treadle):
    report = json.loads(treadle(*TINY, "--json", "--logprobs", "2", "--max-tokens", "2", "1 2 3").stdout)
    assert [len(entry["top"]) for entry in report["logprobs"]] == [2, 2]


@pytest.mark.parametrize(
    ("option", "values"),
    [("--schema", {'"red"', '"blue"'}), ("--regex", {"red", "blue"}), ("--choice", {"red", "blue"})],
)
def test_a_constraint_is_kept(treadle, tmp_path, option, values):
    schema = tmp_path / "colour.json"
    schema.write_text('{"enum": ["red", "blue"]}')
    given = {"--schema": [str(schema)], "--regex": ["red|blue"], "--choice": ["red", "--choice", "blue"]}[option]
    done = treadle("generate", "--chat", "What colour is the sky?", option, *given)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip() in values


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--schema", "/no/such.json"), "No such file"),
        (("--schema", "/etc/hostname"), "it is no JSON text"),
        (("--regex", "("), "the pattern '('"),
    ],
)
def test_what_cannot_be_a_constraint_is_one_line(treadle, args, message):
    done = treadle("generate", *args, "hello")
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--max-tokens", "0", "1 2"), "max_tokens is 0; ask for at least 1"),
        (("--max-tokens", "100000", "1 2"), "ask for at most 2046"),
        (("--temperature", "nan", "1 2"), "temperature is nan; it must be a finite number"),
        (("--max-context", "8", "1 2 3 4 5 6 7 8 9"), "the prompt has 9 tokens"),
        (("",), "the prompt has no tokens; give at least one"),
        (("1 999999",), "token ids must lie in 0 .. 511"),
        (("one",), "--ids wants numbers separated by spaces"),
        (("--threads", "0", "1 2"), "num_threads is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_1(treadle, args, message):
    done = treadle(*TINY, *args)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("treadle: error: ") and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./no/such.gguf", "no file or folder is there"),
        ("smolm2", "Did you mean 'smollm2'?"),
        ("random:nothing", "no shape is called 'nothing'"),
        ("/etc/hostname", "neither a .gguf file nor a folder"),
    ],
)
def test_a_model_that_is_not_there(treadle, model, message):
    done = treadle("generate", "--model", model, "hello")
    assert done.returncode == 1
    assert done.stderr.startswith("treadle: error: ") and message in done.stderr


@pytest.mark.parametrize("args", [("--n", "0"), ("--n", "99999"), ("--dtype", "int3"), ("--ids", "--chat")])
def test_a_wrong_command_line_is_exit_code_2(treadle, args):
    assert treadle("generate", *args, "hello").returncode == 2


def test_a_reader_that_leaves_is_no_error():
    command = f"{TREADLE} generate --max-tokens 200 'Count: 1\n2\n3\n' | head -c 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, env={**os.environ, **POLITE}, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stderr, len(done.stdout)) == (0, b"", 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_cleanly(number, code):
    command = [TREADLE, "generate", "--max-tokens", "4000", "Once upon a time"]
    environment = {**os.environ, **POLITE}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.read(1)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=PATIENCE)
    assert (process.returncode, stderr) == (code, b"")
