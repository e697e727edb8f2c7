"""The errors a user of the runtime can meet. Each message says what happened and what to do about it."""

from __future__ import annotations


class TreadleError(Exception):
    """Base of every error that Treadle raises on purpose."""


class InvalidRequestError(TreadleError, ValueError):
    """A request that can never succeed as it stands: a bad parameter, a prompt that is too long."""


class ModelError(TreadleError):
    """A model that cannot be found, fetched or loaded."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """No model has this name and no file or folder has this path."""


class DownloadError(ModelError):
    """A model could not be downloaded, or what came is not what was expected."""


class CorruptModelError(ModelError):
    """A model file is truncated, or its contents contradict its header."""


class UnsupportedModelError(ModelError):
    """A well-formed model that Treadle cannot run: its architecture, element type or tokenizer is unknown."""


class OverloadedError(TreadleError):
    """The engine holds as many calls or programs as it may; try again later."""


class CallError(TreadleError):
    """A call failed while it ran; other calls are not affected."""


class EngineClosedError(TreadleError):
    """The engine was closed, or died, before the call ended."""
