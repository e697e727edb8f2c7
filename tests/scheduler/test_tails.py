"""What a program left on an unfinished page is remembered for its last calls, however long it lives."""

from __future__ import annotations

from support.fake_engine import FakeEngine

from treadle.scheduler import EndProgram, OpenProgram, SchedulerConfig, SubmitCall, core


def test_a_program_remembers_its_last_calls_only(monkeypatch):
    monkeypatch.setattr(core, "MAX_TAILS", 4)
    driver = FakeEngine(SchedulerConfig(num_pages=256, vocab_size=97, max_context=120, page_size=4))
    driver.send(OpenProgram("p"))
    for index in range(20):
        driver.send(SubmitCall(f"c{index}", "p", (index, 1, 2, 3, 4, 5), max_tokens=1))
        driver.run()
    assert list(driver.scheduler._programs["p"].tails) == ["c16", "c17", "c18", "c19"]
    driver.scheduler.check_integrity()
    for index, cached in ((16, 6), (0, 4)):
        prompt = (index, 1, 2, 3, 4, 5, *driver.tokens[f"c{index}"])
        driver.send(SubmitCall(f"after {index}", "p", prompt, max_tokens=1, extends=f"c{index}"))
        driver.run()
        assert driver.finished[f"after {index}"].usage.cached == cached
    driver.send(EndProgram("p"))
    driver.scheduler.check_integrity()
