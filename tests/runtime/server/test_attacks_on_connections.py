"""What an attacker may do with a connection: send slowly, not read, leave at any moment, open many, confuse the parser.

Whatever becomes of the connection, its calls end, and their slots and pages come back.
"""

import json
import re
import select
import socket
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import httpx
import pytest
from support.serving import served, tiny_engine

IDLE_S, BODY_S, STALL_S = 1.0, 0.5, 1.0


@pytest.fixture(scope="module")
def attacked(tokenizer):
    limits = {"idle_timeout_s": IDLE_S, "body_timeout_s": BODY_S, "stall_timeout_s": STALL_S, "max_requests": 64}
    with served(partial(tiny_engine, tokenizer), **limits) as server:
        yield server


@pytest.fixture(autouse=True)
def _nothing_is_left(attacked):
    yield
    until(attacked.is_idle)
    assert httpx.get(f"{attacked.url}/health").status_code == 200
    memory = attacked.engine.scheduler.memory
    assert memory.num_available == memory.pool.num_pages


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.02)


def connect(server, receive_bytes=None):
    address = httpx.URL(server.url)
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(30)
    connection.connect((address.host, address.port))
    return closing(connection)


def request(path="/v1/completions", headers="", **body):
    content = json.dumps({"model": "treadle", "prompt": [1, 2, 3], **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n{headers}\r\n"
    return head.encode() + content


def read_all(connection):
    """Everything until the server closes the connection."""
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


def calls(server):
    scheduler = server.engine.scheduler
    return scheduler.num_running + scheduler.num_waiting


def test_a_connection_that_says_nothing_is_closed(attacked):
    with connect(attacked) as connection:
        assert read_all(connection) == b""


def test_headers_that_trickle_are_cut_off(attacked):
    def trickle(connection):
        for _ in range(1000):
            connection.sendall(b"X-A: b\r\n")
            time.sleep(0.02)

    with connect(attacked) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        with pytest.raises(ConnectionError):
            trickle(connection)


def test_a_body_that_trickles_is_cut_off(attacked):
    with connect(attacked) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\nConnection: close\r\n\r\n"
        connection.sendall(head + b"{")
        assert read_all(connection).startswith(b"HTTP/1.1 408")


def test_many_silent_connections_keep_nobody_out(attacked):
    silent = [connect(attacked) for _ in range(200)]
    for each in silent:
        each.thing.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert httpx.get(f"{attacked.url}/health").status_code == 200
    for each in silent:
        assert read_all(each.thing) == b""
        each.thing.close()


def test_a_client_that_does_not_read_is_cut_off_and_its_calls_end(attacked):
    with connect(attacked, receive_bytes=4096) as connection:
        connection.sendall(request(stream=True, n=16, max_tokens=1500, logprobs=20))
        until(lambda: calls(attacked) > 0)
        until(attacked.is_idle, 60)
        received = read_all(connection)
    assert b"[DONE]" not in received


def test_a_client_that_does_not_read_an_answer_that_is_no_stream_is_cut_off(attacked):
    with connect(attacked, receive_bytes=4096) as connection:
        connection.sendall(request("/tokenize", prompt="1" * 1_900_000))  # an answer that no buffer of the system holds
        select.select([connection], [], [], 30)
        time.sleep(3 * STALL_S)
        received = read_all(connection)
    head, body = received.split(b"\r\n\r\n", 1)
    assert int(re.search(rb"Content-Length: (\d+)", head)[1]) > len(body)


def test_a_client_that_reads_an_answer_slowly_gets_all(attacked):
    with connect(attacked, receive_bytes=4096) as connection:
        connection.sendall(request("/tokenize", headers="Connection: close\r\n", prompt="1" * 1_900_000))
        received = b""
        while piece := connection.recv(1 << 20):
            received += piece
            time.sleep(0.001)
    head, body = received.split(b"\r\n\r\n", 1)
    assert int(re.search(rb"Content-Length: (\d+)", head)[1]) == len(body) > 5 << 20


def test_a_client_that_reads_slowly_but_reads_gets_all(attacked):
    with connect(attacked) as connection:
        connection.sendall(request(headers="Connection: close\r\n", stream=True, max_tokens=40))
        received = b""
        while piece := connection.recv(256):
            received += piece
            time.sleep(0.01)
    assert b"[DONE]" in received


PHASES = {
    "in the first line": lambda whole: whole[:7],
    "in the headers": lambda whole: whole[:40],
    "before the body": lambda whole: whole[: whole.index(b"\r\n\r\n") + 4],
    "in the body": lambda whole: whole[:-5],
    "after the request": lambda whole: whole,
}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_client_may_leave_in_every_phase(phase, streamed, how, attacked):
    for delay in (0.0, 0.02, 0.1):
        with connect(attacked) as connection:
            if how == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(PHASES[phase](request(stream=streamed, max_tokens=1900, n=2)))
            time.sleep(delay)
    until(attacked.is_idle)


def test_a_client_may_leave_while_its_stream_runs(attacked):
    for received in (1, 3, 10):
        with connect(attacked) as connection:
            connection.sendall(request(stream=True, max_tokens=1900))
            found = b""
            while found.count(b"data:") < received:
                found += connection.recv(4096)
        until(attacked.is_idle)


def test_clients_that_leave_while_they_wait_take_no_slot(attacked):
    crowd = [connect(attacked) for _ in range(40)]
    for each in crowd:
        each.thing.sendall(request(stream=True, max_tokens=1000, n=4))
    until(lambda: calls(attacked) > 0)
    for each in crowd:
        each.thing.close()
    until(attacked.is_idle)


def test_more_requests_than_may_wait_are_told_to_come_back(attacked):
    crowd = [connect(attacked) for _ in range(80)]
    for each in crowd:
        each.thing.sendall(request(headers="Connection: close\r\n", stream=True, max_tokens=200))
    answers = [read_all(each.thing) for each in crowd]
    refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 429")]
    complete = [answer for answer in answers if answer.startswith(b"HTTP/1.1 200") and b"[DONE]" in answer]
    assert len(complete) + len(refused) == 80 and len(complete) >= 64
    assert all(re.search(rb"Retry-After: \d+\r\n", answer) for answer in refused)


@pytest.mark.parametrize(
    "text",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nXYZ\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1_0\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 10_000 + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\0" * 1000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=lambda text: repr(text[:60]),
)
def test_what_is_no_sound_request_is_refused(text, attacked):
    with connect(attacked) as connection:
        connection.sendall(text)
        answer = read_all(connection)
    assert answer == b"" or re.match(rb"HTTP/1.[01] 40[0-9] ", answer)
    assert b"Traceback" not in answer


@pytest.mark.parametrize(
    "text",
    [
        b"GET /nothing\xff HTTP/1.1\r\nHost: localhost\r\n",
        b"PUT /health?\xff HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /v1/models/\xff HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /v1/programs/%ff%fe HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /health HTTP/1.1\r\nHost: local\xffhost\r\n",
        b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nOrigin: http://\xff\r\n",
        b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nx-request-id: \xff\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: \xff\r\nContent-Length: 0\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nx-treadle-program-id: \xff\r\nContent-Length: 0\r\n",
    ],
    ids=lambda text: repr(text[:60]),
)
def test_bytes_that_are_no_text_are_refused(text, attacked):
    with connect(attacked) as connection:
        connection.sendall(text + b"Connection: close\r\n\r\n")
        answer = read_all(connection)
    assert re.match(rb"HTTP/1.[01] 40[0-9] ", answer)
    assert answer.startswith(b"HTTP/1.0") or json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["message"]


def test_a_target_with_another_host_does_not_lead_past_the_check(attacked):
    with connect(attacked) as connection:
        connection.sendall(b"GET http://localhost/health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 403")


def test_storms_of_disconnects_leave_no_memory_behind(attacked):
    def storm(times):
        for _ in range(times):
            with connect(attacked) as connection:
                connection.sendall(request(stream=True, max_tokens=1900, stop=["x" * 200]))
                connection.recv(100)
        until(attacked.is_idle)
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    storm(50)
    before = storm(50)
    assert storm(150) - before < 10 << 20
