from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.scheduler.simulator import hardware
from treadle.scheduler.simulator.band import Band, Sample, Study
from treadle.scheduler.simulator.bound import fluid_mean_s
from treadle.scheduler.simulator.clock import Setup, Simulation
from treadle.scheduler.simulator.presets import PRESETS, policy
from treadle.scheduler.simulator.report import WALL_FIELDS, Point
from treadle.scheduler.simulator.workload import Blocks, CallSpec, ProgramSpec, Workload

SIZE = 64
H100 = hardware.load("h100-8b")


def program(number, num_calls=4, pause_s=3.0, salt=None, first_blocks=20):
    """A conversation that grows by four blocks a turn."""
    calls = [
        CallSpec("main", Blocks(((0, first_blocks + 4 * turn),)), (first_blocks + 4 * turn) * SIZE, 40, pause_s, "tool")
        for turn in range(num_calls)
    ]
    calls[0] = replace(calls[0], pause_s=0.0, pause_kind="none")
    name = f"program-{number}"
    return ProgramSpec(name, "agent", 0.5 * number, tuple(calls), salt or name)


def workload(n=6, **kind):
    return Workload("tiny", SIZE, tuple(program(number, **kind) for number in range(n)))


TIGHT = Point(6000, programs=3)


def study(*names, points=(TIGHT,), load=None, seeds=1, recorded=False, **sample):
    policies = tuple(policy(name) for name in names or ("vllm", "treadle"))
    return Study(load or workload(), H100, policies, tuple(points), seeds, Sample(**sample), recorded)


def lines(study):
    """Results without what depends on the machine."""
    results = [asdict(result) for result in Band(study).results()]
    return [{name: value for name, value in result.items() if name not in WALL_FIELDS} for result in results]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("host", [0, 4000])
def test_every_preset_ends_every_program(name, host):
    (result,) = Band(study(name, points=[Point(6000, host, programs=3)])).results()
    assert (result.total, result.decoded, result.host) == (6, 6 * 4 * 40, host)
    assert result.slowdown_max >= 1 and result.fluid_mean_s <= result.completion_mean_s
    assert (result.policy, result.programs) == (name, 3)


def test_the_same_study_gives_the_same_results():
    asked = study(seeds=2, total=4, pauses="lognormal:1")
    assert lines(asked) == lines(asked)


def test_a_seed_draws_the_same_programs_times_and_pauses_whatever_the_point():
    asked = study(points=[Point(6000, per_hour=900), Point(60000, per_hour=900)], total=4, pauses="lognormal:1")
    small, large = (Band(asked).draw(point, 7) for point in asked.points)
    assert small == large
    other = Band(asked).draw(asked.points[0], 8)
    assert [program.start_s for program in other.programs] != [program.start_s for program in small.programs]


def test_there_is_a_result_for_each_point_seed_and_policy():
    band = Band(study(points=[Point(6000, programs=2), Point(9000, programs=2)], seeds=2))
    told = []
    results = [(result.pool, result.seed, result.policy) for result in band.results(told.append)]
    assert results == [(p, s, n) for p in (6000, 9000) for s in (0, 1) for n in ("vllm", "treadle")]
    assert len(told) == len(band) == 8 and told[0] == "vllm, seed 1 of 2, pool 6,000, 2 programs at once"


def test_programs_too_large_for_a_pool_are_left_out_and_counted():
    programs = (*workload(4).programs, program(99, first_blocks=60))
    small, large = Band(study("vllm", points=[Point(6000), Point(60000)], load=Workload("w", SIZE, programs))).results()
    assert [(r.left_out, r.total) for r in (small, large)] == [(1, 4), (0, 5)]


def test_no_program_left_is_an_error_that_says_why():
    with pytest.raises(ValueError, match="none of 6 programs has all its calls within half of a pool of 100 tokens"):
        Band(study(points=[Point(100)]))


def test_halves_have_no_program_in_common():
    half = {
        name: {p.id for p in Band(study(load=workload(20), half=name)).draw(TIGHT, 0).programs}
        for name in ("tune", "report", "all")
    }
    assert not half["tune"] & half["report"] and half["tune"] | half["report"] == half["all"]


def test_programs_are_clipped_and_recorded_pauses_are_cut():
    drawn = Band(study(max_calls=2, max_tokens=1000, max_pause_s=1.0)).draw(TIGHT, 0)
    assert all(len(program.calls) == 2 and program.calls[1].pause_s == 1.0 for program in drawn.programs)
    assert max(call.prompt_tokens + call.output_tokens for p in drawn.programs for call in p.calls) == 1000


def test_recorded_arrivals_are_those_of_the_trace():
    drawn = Band(study(points=[Point(6000)], recorded=True)).draw(Point(6000), 0)
    assert [program.start_s for program in drawn.programs] == [0.5 * number for number in range(6)]


def test_without_pressure_no_policy_matters():
    results = list(Band(study(*PRESETS, points=[Point(100_000, programs=3)])).results())
    assert len({round(result.completion_mean_s, 3) for result in results}) <= 2
    assert all(result.re_prefilled_tokens <= SIZE * 24 for result in results)


class TestFluidBound:
    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(1, 5), st.sampled_from([0.0, 0.2, 9.0]), st.booleans()), min_size=1, max_size=6),
        st.sampled_from([None, 1, 2, 8]),
        st.sampled_from(["vllm", "treadle"]),
    )
    def test_is_below_every_simulation(self, kinds, concurrency, name):
        programs = [
            program(number, num_calls=calls, pause_s=pause_s, salt="shared" if shared else None)
            for number, (calls, pause_s, shared) in enumerate(kinds)
        ]
        load, rule = Workload("any", SIZE, tuple(programs)), policy(name)
        setup = Setup(H100, 6000, 0, rule.order, rule.retention, rule.admission, concurrency)
        ended = Simulation(load, setup).run().programs
        mean = sum(record.ended - record.began for record in ended) / len(ended)
        assert 0 < fluid_mean_s(load, H100, concurrency) <= mean

    def test_of_a_program_alone_is_nearly_what_it_takes(self):
        load = workload(1, num_calls=8)
        (record,) = Simulation(load, Setup(H100, 100_000, concurrency=1)).run().programs
        assert fluid_mean_s(load, H100, 1) == pytest.approx(record.ended, rel=0.02)

    def test_of_long_prompts_at_once_is_that_of_one_server(self):
        load = workload(12, num_calls=1, first_blocks=2000)
        alone = fluid_mean_s(load, H100, 1)
        assert fluid_mean_s(load, H100, 12) == pytest.approx(alone * 13 / 2, rel=0.05)
