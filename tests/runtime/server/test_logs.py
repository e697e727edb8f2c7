"""Log lines carry the id of their request, and nothing in them passes for another line."""

import io
import json
import logging

import pytest

from treadle.runtime.server.logs import configure_logs, log_request, new_request_id, request_id


@pytest.fixture
def lines():
    logger = logging.getLogger("treadle")
    before = logger.handlers[:], logger.level, logger.propagate
    stream = io.StringIO()

    def open_log(form, level="info"):
        configure_logs(form, level, stream)
        return lambda: stream.getvalue().splitlines()

    yield open_log
    logger.handlers[:], logger.level, logger.propagate = before


def test_a_request_is_one_json_object(lines):
    read = lines("json")
    token = request_id.set("req_1")
    log_request("POST", "/v1/completions", 200, 0.25, "alice")
    request_id.reset(token)
    (line,) = read()
    found = json.loads(line)
    assert found.pop("time") > 0
    expected = {"method": "POST", "endpoint": "/v1/completions", "status": 200, "seconds": 0.25, "tenant": "alice"}
    assert found == {
        "level": "info",
        "logger": "treadle.requests",
        "message": "answered",
        "request_id": "req_1",
        **expected,
    }


def test_a_request_is_one_line_of_text(lines):
    read = lines("text")
    log_request("GET", "/health", 503, 0.1, "")
    (line,) = read()
    assert line.endswith("warning requests: answered method=GET endpoint=/health status=503 seconds=0.1")


@pytest.mark.parametrize("form", ["text", "json"])
def test_text_from_outside_cannot_forge_a_line(form, lines):
    read = lines(form)
    logging.getLogger("treadle.some").info("model %s", "x\n12:00:00 info requests: answered\u2028\x1b[2J")
    (line,) = read()
    assert "\x1b" not in line


def test_what_is_below_the_level_is_left_out_and_a_failure_keeps_its_traceback(lines):
    read = lines("json", "warning")
    log_request("GET", "/health", 200, 0.1, "")
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        logging.getLogger("treadle.server").exception("failed")
    (line,) = read()
    assert "RuntimeError: broken" in json.loads(line)["exception"]


@pytest.mark.parametrize("proposed", ["abc", "0af7651916cd43dd8448eb211c80319c", "a" * 128, "x-1:2/3"])
def test_a_clients_id_is_echoed(proposed):
    assert new_request_id(proposed) == proposed


@pytest.mark.parametrize("proposed", [None, "", "a b", "a\r\nset-cookie: x", "a" * 129, "é", '"'])
def test_an_id_that_cannot_stand_in_a_header_is_replaced(proposed):
    first, second = new_request_id(proposed), new_request_id(proposed)
    assert first != second != proposed and first.startswith("req_")
