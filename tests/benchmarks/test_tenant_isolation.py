"""The test that compares two samples finds a difference that is there, and none that is not."""

import random

import pytest
from tenant_isolation import mann_whitney


def test_samples_of_one_distribution_differ_as_often_as_the_p_value_says():
    noise = random.Random(0)
    found = [mann_whitney(*([noise.random() for _ in range(30)] for _ in range(2))) for _ in range(2000)]
    for level in (0.05, 0.2, 0.5):
        assert sum(p < level for p in found) / len(found) == pytest.approx(level, abs=0.03)


def test_a_shift_is_found():
    noise = random.Random(0)
    one, other = [noise.gauss(0, 1) for _ in range(200)], [noise.gauss(0.5, 1) for _ in range(200)]
    assert mann_whitney(one, other) < 1e-4 and mann_whitney(one, other) == mann_whitney(other, one)


def test_a_known_example_with_ties():
    one, other = [1.0, 2.0, 2.0, 3.0] * 5, [2.0, 3.0, 3.0, 4.0] * 5
    assert mann_whitney(one, other) == pytest.approx(0.000361, rel=0.01)  # U = 75, z = 3.567
    assert mann_whitney([1.0] * 20, [1.0] * 20) == 1.0
