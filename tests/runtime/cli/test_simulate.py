"""`treadle simulate`: lines for scripts, tables for people, and errors that say what to do."""

import json

import pytest

from treadle.scheduler.simulator.report import WALL_FIELDS


@pytest.fixture
def trace(tmp_path):
    """Six coding agents of five calls each, which keep their prompts and add to them."""
    path = tmp_path / "agents.jsonl"
    with path.open("w") as file:
        for number in range(6):
            requests = [
                {
                    "t": 20.0 * turn,
                    "type": "n",
                    "in": 64 * (20 + 5 * turn) + 9,
                    "out": 30,
                    "keep": 0 if turn == 0 else 20 + 5 * (turn - 1),
                    "new": [[0, 20]] if turn == 0 else [[15 + 5 * turn, 5]],
                    "input_types": ["tool_result"],
                    "stop": "tool_use",
                    "api_time": 1.0,
                    "think_time": 4.0,
                }
                for turn in range(5)
            ]
            file.write(
                json.dumps({"id": f"agent-{number}", "block_size": 64, "hash_id_scope": "local", "requests": requests})
            )
            file.write("\n")
    return str(path)


@pytest.fixture
def simulate(treadle, trace):
    return lambda *args: treadle("simulate", "--trace", trace, *args)


def lines(done):
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_json_is_a_line_for_each_point_seed_and_policy(simulate):
    asked = ("--programs", "3", "--sweep", "pool=6K,0.1M", "--policy", "fcfs+lru", "--policy", "treadle")
    found = lines(simulate("--engine", "h100-8b", *asked, "--seeds", "2", "--json"))
    assert [(line["pool"], line["seed"], line["policy"]) for line in found] == [
        (pool, seed, name) for pool in (6000, 100_000) for seed in (0, 1) for name in ("fcfs+lru", "treadle")
    ]
    assert {"completion_p99_s", "excess_mean_s", "hit_rate", "engine_digest", "left_out"} <= found[0].keys()
    assert all(line["trace"] == "agents" and line["total"] == 6 and line["programs"] == 3 for line in found)
    assert all(line["slowdown_max"] >= line["slowdown_mean"] >= 1 for line in found)
    assert found[0]["re_prefilled_tokens"] > found[4]["re_prefilled_tokens"]


def test_the_same_command_prints_the_same_but_for_the_wall_clock(simulate):
    def printed():
        asked = ("--pool", "6K", "--per-hour", "2000", "--pauses", "lognormal:1", "--seeds", "2", "--json")
        return [{k: v for k, v in line.items() if k not in WALL_FIELDS} for line in lines(simulate(*asked))]

    assert printed() == printed()


def test_bytes_become_tokens_by_the_engine(simulate):
    (line,) = lines(simulate("--pool", "1GB", "--host", "1GiB", "--policy", "vllm", "--json"))
    assert (line["pool"], line["host"]) == (10**9 // 131072, 8192)


def test_a_table_compares_with_the_first_policy(simulate):
    done = simulate("--pool", "6000", "--programs", "3", "--policy", "vllm", "--policy", "treadle", "--seeds", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "pool 6,000, 3 programs at once: 6 programs, 2 times; 0 are too large for the pool" in done.stdout
    assert "times less: than with vllm, geometric mean and 95 % interval" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if line[:4] in ("vllm", "trea", "flui")] == [
        *("vllm", "treadle", "fluid", "vllm", "treadle"),
        "fluid:",
    ]


def test_charts_are_drawn(simulate, tmp_path):
    path = tmp_path / "band.png"
    done = simulate("--sweep", "pool=6K,20K", "--policy", "vllm", "--plot", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_charts_without_their_package_say_what_to_install(simulate, tmp_path, treadle, trace):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    asked = ("simulate", "--trace", trace, "--pool", "6K", "--plot", str(tmp_path / "band.png"))
    done = treadle(*asked, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "pip install 'treadle[plot]'" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (("--pool", "6K", "--policy", "tredle"), 1, "nearest: treadle"),
        (("--pool", "6K", "--engine", "h100"), 1, "nearest: h100-8b"),
        (("--pool", "6K", "--pauses", "never"), 1, "no such file"),
        (("--pool", "1K"), 1, "none of 6 programs has all its calls within half of a pool of 1000"),
        (("--pool", "6K", "--plot", "chart.gif"), 1, "end its name in .png"),
        ((), 2, "give --pool SIZE"),
        (("--pool", "lots"), 2, "give tokens, as in 500000"),
        (("--sweep", "luck=1,2"), 2, "give one of pool, host, programs, per-hour"),
        (("--pool", "6K", "--programs", "2", "--recorded"), 2, "not allowed with"),
        (("--pool", "6K", "--recorded", "--sweep", "programs=1,2"), 2, "exclude each other"),
    ],
)
def test_a_wrong_request_is_told(simulate, args, code, told):
    done = simulate(*args)
    assert done.returncode == code and told in done.stderr and "Traceback" not in done.stderr


def test_a_file_that_is_no_trace_is_told(treadle, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("nothing\n")
    done = treadle("simulate", "--trace", str(path), "--pool", "6K")
    assert done.returncode == 1 and "no known trace" in done.stderr
