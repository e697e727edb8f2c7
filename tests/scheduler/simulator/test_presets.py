import pytest

from treadle.scheduler.simulator.presets import PRESETS, policy


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_made_of_known_parts(name):
    assert policy(name).rule == PRESETS[name] == policy(PRESETS[name]).rule


def test_admission_is_greedy_unless_it_is_said():
    assert policy("plas+lru").rule == "plas+lru+greedy"
    assert policy("program-fcfs+fixed:30+aimd").retention == "fixed:30"


def test_only_the_clairvoyant_one_is_told_the_future():
    assert [name for name in PRESETS if policy(name).clairvoyant] == ["clairvoyant"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tredle", "nearest: treadle"),
        ("fcfs+lur", "no retention is called 'lur'; nearest: lru"),
        ("fifo+lru", "no order is called 'fifo'"),
        ("fcfs+lru+greedi", "nearest: greedy"),
        ("fcfs+fixed:soon", "not a number"),
        ("fcfs+lru+greedy+more", "4 parts"),
    ],
)
def test_a_wrong_name_is_told_with_the_nearest_ones(name, told):
    with pytest.raises(ValueError, match=told):
        policy(name)
