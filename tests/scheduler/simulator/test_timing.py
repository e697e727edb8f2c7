import json
import random
from itertools import pairwise
from statistics import mean

import pytest

from treadle.scheduler.simulator.arrivals import at_rate, poisson, recorded
from treadle.scheduler.simulator.traces import ArrivalRate, PauseTable, TraceError, read_rates
from treadle.scheduler.simulator.workload import Blocks, CallSpec, ProgramSpec

QUANTILES = {"count": 30, "p5": 0.01, "p50": 1.0, "p90": 10.0, "p99": 40.0}


def programs(n, start_s=0.0):
    call = CallSpec("main", Blocks(((0, 1),)), 1, 1)
    return [ProgramSpec(str(number), "kind", start_s, (call,), "salt") for number in range(n)]


def table(tmp_path, tools, unit="seconds"):
    path = tmp_path / "quantiles.json"
    path.write_text(json.dumps({"unit": unit, "tools": tools}, indent=1))
    return PauseTable.read(path)


class TestPauseTable:
    def test_gives_back_the_quantiles(self, tmp_path):
        quantiles = table(tmp_path, {"Bash": QUANTILES}).tools["Bash"]
        assert [quantiles.at(share) for share in (0.05, 0.5, 0.9, 0.99)] == pytest.approx([0.01, 1.0, 10.0, 40.0])

    def test_rises_between_them_and_stays_within_them(self, tmp_path):
        quantiles = table(tmp_path, {"Bash": QUANTILES}).tools["Bash"]
        seconds = [quantiles.at(number / 1000) for number in range(1001)]
        assert seconds == sorted(seconds)
        assert (seconds[0], seconds[-1]) == (0.01, 40.0)
        assert quantiles.at(0.7) == pytest.approx(10**0.5)

    def test_draws_with_the_seed(self, tmp_path):
        pauses = table(tmp_path, {"Bash": QUANTILES})
        first = [pauses.sample(random.Random(1), "Bash") for _ in range(3)]
        assert len(set(first)) == 1
        drawn = random.Random(2)
        assert sum(pauses.sample(drawn, "Bash") <= 1.0 for _ in range(4000)) / 4000 == pytest.approx(0.5, abs=0.03)

    def test_draws_any_tool_as_often_as_it_was_measured(self, tmp_path):
        slow = {"count": 10, "p5": 100.0, "p95": 200.0}
        pauses, drawn = table(tmp_path, {"Bash": QUANTILES, "Slow": slow}), random.Random(3)
        assert sum(pauses.sample(drawn, "") >= 100 for _ in range(4000)) / 4000 == pytest.approx(0.25, abs=0.03)

    def test_names_the_nearest_of_a_tool_that_it_does_not_have(self, tmp_path):
        with pytest.raises(ValueError, match="nearest: Bash"):
            table(tmp_path, {"Bash": QUANTILES}).sample(random.Random(1), "bash")

    @pytest.mark.parametrize("tool", [{"count": 1, "p5": 1.0}, {"count": 1, "p5": 2.0, "p50": 1.0}, {"count": 1}, 3])
    def test_refuses_what_are_no_quantiles(self, tmp_path, tool):
        with pytest.raises(TraceError, match="Bash"):
            table(tmp_path, {"Bash": tool})

    def test_refuses_other_units(self, tmp_path):
        with pytest.raises(TraceError, match="unit"):
            table(tmp_path, {"Bash": QUANTILES}, unit="ms")


class TestRates:
    def test_of_all_clients_are_added(self, tmp_path):
        path = tmp_path / "rates.csv"
        path.write_text("client,window_start_s,rate_rps,iat_cv\n0,0,0.5,1\n0,600,0,0\n1,0,0.25,1\n1,1200,2,1\n")
        rate = read_rates(path)
        assert rate == ArrivalRate(600.0, (0.75, 0.0, 2.0))
        assert [rate.at(seconds) for seconds in (-1, 0, 599, 600, 1200, 1800)] == [0, 0.75, 0.75, 0, 2.0, 0]
        assert rate.expected == 600 * 2.75

    @pytest.mark.parametrize(
        "rows", ["client,rate\n", "window_start_s,rate_rps\nx,1\n", "window_start_s,rate_rps\n0,1\n"]
    )
    def test_that_are_no_rates_are_refused(self, tmp_path, rows):
        path = tmp_path / "rates.csv"
        path.write_text(rows)
        with pytest.raises(TraceError, match=r"rates\.csv"):
            read_rates(path)

    def test_turn_expected_requests_into_times(self):
        rate = ArrivalRate(10.0, (1.0, 0.0, 2.0))
        assert [rate.time_of(expected) for expected in (0, 5, 10, 12, 30)] == [0, 5, 10, 21, 30]
        with pytest.raises(ValueError, match="30 requests"):
            rate.time_of(31)


class TestArrivals:
    def test_at_random_have_the_rate_and_follow_the_seed(self):
        started = poisson(programs(4000), 360, random.Random(5))
        assert started == poisson(programs(4000), 360, random.Random(5))
        assert started != poisson(programs(4000), 360, random.Random(6))
        gaps = [after.start_s - before.start_s for before, after in pairwise(started)]
        assert min(gaps) > 0 and mean(gaps) == pytest.approx(10, rel=0.05)

    @pytest.mark.parametrize("per_hour", [0, -1, float("inf"), float("nan")])
    def test_need_a_rate(self, per_hour):
        with pytest.raises(ValueError, match="rate above 0"):
            poisson(programs(1), per_hour, random.Random(1))

    def test_as_recorded_begin_at_0_in_order(self):
        late, early = programs(1, 50.0)[0], programs(1, 20.0)[0]
        assert [program.start_s for program in recorded([late, early])] == [0.0, 30.0]

    def test_at_a_rate_come_when_the_rate_is_high(self):
        rate = ArrivalRate(100.0, (1.0, 0.0, 9.0, 0.5))
        started = at_rate(programs(1000), rate, random.Random(7))
        windows = [sum(100 * index <= one.start_s < 100 * (index + 1) for one in started) for index in range(4)]
        assert windows[1] == 0
        assert windows[0] == pytest.approx(100, abs=30) and windows[2] == pytest.approx(900, abs=40)

    def test_at_a_rate_that_ends_are_refused(self):
        with pytest.raises(ValueError, match="to be expected in all"):
            at_rate(programs(100), ArrivalRate(10.0, (1.0,)), random.Random(1))
