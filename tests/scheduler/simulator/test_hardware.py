import json
from dataclasses import replace

import pytest

from treadle.scheduler.simulator import hardware
from treadle.scheduler.simulator.hardware import CopyCost, StepCost, digest, load, names, pairs, parse


def text_of(**changes):
    data = {
        "name": "toy",
        "kv_bytes_per_token": 1024,
        "step_tokens": 256,
        "rows": 8,
        "step": {"fixed_s": 1e-3, "per_token_s": 1e-6, "per_pair_s": 1e-9, "per_context_token_s": 1e-8},
        "copy": {"bytes_per_s_to_host": 1e9, "bytes_per_s_to_device": 2e9, "fixed_s": 0},
        "source": "made up",
        "validated": False,
    }
    return json.dumps(data | changes)


def test_a_step_costs_the_sum_of_its_four_terms():
    step = StepCost(fixed_s=1.0, per_token_s=0.1, per_pair_s=0.01, per_context_token_s=0.001)
    assert step.seconds(new_tokens=5, pairs=7, decode_context=11) == pytest.approx(1 + 0.5 + 0.07 + 0.011)


@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 5), (7, 1), (7, 4)])
def test_pairs_counts_the_tokens_before_each_new_one(start, count):
    assert pairs(start, count) == sum(range(start, start + count))


@pytest.mark.parametrize("name", names())
def test_every_engine_loads_under_its_own_name_and_says_where_it_comes_from(name):
    assert load(name).name == name
    assert len(load(name).source) > 100


def test_the_reference_engine_is_what_figures_are_stated_for():
    h100 = load("h100-8b")
    assert h100.step == StepCost(6e-3, 27e-6, 1.17e-9, 43.7e-9)
    assert (h100.step_tokens, h100.rows, h100.kv_bytes_per_token) == (2048, 64, 128 * 1024)
    assert (h100.copy.bytes_per_s_to_host, h100.copy.bytes_per_s_to_device) == (50e9, 50e9)
    assert not h100.validated


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="h100-8b"):
        load("h100-8B")


def test_a_name_is_not_a_path():
    with pytest.raises(ValueError, match="no engine"):
        load("../engines/h100-8b")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rows": 0}, "rows"),
        ({"step_tokens": 2.5}, "step_tokens"),
        ({"validated": 1}, "validated"),
        ({"source": ""}, "source"),
        ({"speed": 3}, "speed"),
        ({"step": 6}, "StepCost"),
        ({"step": {"fixed_s": 1.0}}, "per_token_s"),
        ({"copy": {"bytes_per_s_to_host": 0, "bytes_per_s_to_device": 1, "fixed_s": 0}}, "bytes_per_s_to_host"),
    ],
)
def test_bad_values_are_refused_by_name(changes, complaint):
    with pytest.raises(ValueError, match=rf"^toy\.json: .*{complaint}"):
        parse(text_of(**changes), "toy.json")


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), "1", True])
def test_a_cost_is_a_finite_number(value):
    with pytest.raises(ValueError, match="per_pair_s"):
        StepCost(1.0, 0.0, value, 0.0)


def test_the_digest_follows_the_numbers(monkeypatch, tmp_path):
    toy = parse(text_of(), "toy.json")
    changed = replace(toy, copy=CopyCost(1e9, 3e9, 0))
    assert len(digest(toy)) == 12
    assert digest(toy) == digest(parse(text_of(), "elsewhere.json"))
    assert digest(toy) != digest(changed)


def test_the_digest_follows_the_code(monkeypatch, tmp_path):
    toy = parse(text_of(), "toy.json")
    before = digest(toy)
    (tmp_path / "hardware.py").write_text("another model of a step")
    monkeypatch.setattr(hardware, "__file__", str(tmp_path / "hardware.py"))
    assert digest(toy) != before
