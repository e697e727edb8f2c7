"""What a client is told when something is wrong: the error object of the OpenAI API, with the right status."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import TypedDict

from treadle.runtime.errors import EngineClosedError, InvalidRequestError, OverloadedError, TreadleError

ErrorType: TypeAlias = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "rate_limit_error",
    "server_error",
]
RETRY_AFTER_S = 1.0
MAX_MESSAGE = 1000
MAX_PARAM = 200


class ErrorObject(TypedDict):
    """Why a request failed. `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of every answer whose status is 400 or more."""

    error: ErrorObject


class ApiError(Exception):
    """A request that is answered with an error. What is long is cut: it may be what the client sent.

    Attributes:
        param: The field at fault, as `messages[0].content`.
        code: A word for programs, as `model_not_found`.
        retry_after: Seconds after which trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: ErrorType = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message[:MAX_MESSAGE]
        self.type = type
        self.param = param[:MAX_PARAM] if param is not None else None
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> ErrorBody:
        """What is sent."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None, code: str | None = None) -> ApiError:
    """A request that can never succeed, because of one field."""
    return ApiError(400, message, param=param, code=code)


def not_found(what: str, param: str | None = None, code: str | None = "not_found") -> ApiError:
    """Something that is named and not there, or not this tenant's."""
    return ApiError(404, what, type="not_found_error", param=param, code=code)


def api_error_of(error: BaseException) -> ApiError:
    """What a failure below the server means to a client. What nobody foresaw tells nothing of the inside."""
    match error:
        case ApiError():
            return error
        case InvalidRequestError():
            return ApiError(400, str(error))
        case OverloadedError():
            return ApiError(429, str(error), type="rate_limit_error", code="overloaded", retry_after=RETRY_AFTER_S)
        case EngineClosedError():
            return ApiError(503, str(error), type="server_error", code="engine_unavailable", retry_after=RETRY_AFTER_S)
        case TreadleError():
            return ApiError(500, str(error), type="server_error")
    return ApiError(500, "the server failed at this request; its log says why", type="server_error")


def api_error_of_body(error: ValidationError, body: Any) -> ApiError:
    """A body that does not fit its model: the first thing that is wrong, by the name that the client knows it by.

    Where a field may be of several types, each adds its own complaint. The deepest says most.
    """
    found = error.errors(include_url=False, include_context=False, include_input=False)
    named = [(_path(item["loc"], body, is_missing=item["type"] == "missing"), item) for item in found]
    path, item = max(named, key=lambda entry: len(entry[0]))
    param = _written(path)
    code = "missing_required_parameter" if item["type"] == "missing" else None
    return invalid(f"{param}: {_sentence(item)}" if param else _sentence(item), param or None, code)


def _sentence(item: ErrorDetails) -> str:
    text = re.sub(r"^Value error, ", "", item["msg"])
    return text[:1].lower() + text[1:]


def _path(location: tuple[int | str, ...], body: Any, *, is_missing: bool) -> tuple[int | str, ...]:
    """The steps of a location that lead through the body, and what is missing at its end, without pydantic's own names
    for the types it tried."""
    path: list[int | str] = []
    place = body
    for step in location:
        if (isinstance(place, Mapping) and step in place) or (
            isinstance(place, list) and isinstance(step, int) and step < len(place)
        ):
            path.append(step)
            place = place[step]  # type: ignore[index]
    if is_missing:
        path.append(location[-1])
    return tuple(path)


def _written(path: tuple[int | str, ...]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
