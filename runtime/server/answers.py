"""Answers that are one JSON object."""

from __future__ import annotations

import msgspec
from aiohttp import web

from treadle.runtime.server.errors import ApiError

_encoder = msgspec.json.Encoder()


def json_answer(value: object, status: int = 200) -> web.Response:
    """An answer with a value that JSON knows."""
    return web.Response(body=_encoder.encode(value), status=status, content_type="application/json")


def error_answer(error: ApiError) -> web.Response:
    """An answer with OpenAI's error object."""
    answer = json_answer(error.body, error.status)
    if error.retry_after is not None:
        answer.headers["Retry-After"] = f"{max(1, round(error.retry_after))}"
    return answer
