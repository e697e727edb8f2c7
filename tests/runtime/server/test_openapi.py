"""The OpenAPI document, and whether the server keeps to it whatever is sent."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ST = str(Path(sys.executable).parent / "st")
TIME_S = 40
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "allow_header_conformance,use_after_free"
)


@pytest.fixture
def document(http):
    return http.get("/openapi.json").json()


def test_every_endpoint_is_documented_with_its_errors(document):
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) >= {"200", "400", "401", "403", "404", "413", "429", "503"}
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(ids) == len(set(ids)) and all(operation["summary"] for operation in operations)


def test_every_reference_leads_somewhere(document):
    schemas = document["components"]["schemas"]
    named = re.findall(r'"#/components/schemas/([^"]+)"', str(document).replace("'", '"'))
    assert named and set(named) <= set(schemas)


def test_nothing_that_is_sent_makes_the_server_fail_or_answer_what_is_not_documented(serve, tmp_path):
    """Given a context of few tokens, so that each answer is short; the feed is left out, for it never ends."""
    with serve(engine={"max_context": 64, "num_pages": 1024}) as server:
        arguments = ["--checks", CHECKS, "--max-time", str(TIME_S), "--exclude-path", "/v1/events", "--workers", "2"]
        done = subprocess.run(
            [
                ST,
                "run",
                f"{server.url}/openapi.json",
                *arguments,
                "--request-timeout",
                "120",
                "--no-color",
                "--no-shrink",
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=10 * TIME_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:]
