"""What can be set about a server. `settings.py` reads it from flags, the environment and a file, all by these names."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

from treadle.runtime.engine.config import DeviceName, DType, EngineConfig
from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.models.config import Weights
from treadle.scheduler import SchedulerConfig

MAX_PROGRAMS = next(cast(int, known.default) for known in fields(SchedulerConfig) if known.name == "max_programs")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _setting(group: str, default: object, help: str, *, least: float | None = None, engine: str | None = None) -> Any:
    """A field that can be set from outside. `least` is the smallest value, `engine` the field of `EngineConfig`."""
    return field(default=default, metadata={"group": group, "help": help, "least": least, "engine": engine})


def _listen(default: object, help: str, *, least: float | None = None) -> Any:
    return _setting("listening", default, help, least=least)


def _limit(default: object, help: str, *, least: float = 1) -> Any:
    return _setting("limits", default, help, least=least)


def _observe(default: object, help: str) -> Any:
    return _setting("observing", default, help)


def _engine(name: str, help: str, *, least: float | None = None) -> Any:
    default = next(known.default for known in fields(EngineConfig) if known.name == name)
    return _setting("engine", default, help, least=least, engine=name)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of a server and of its engine. Each is a flag, a variable TREADLE_*, a key of a TOML file: one name.

    Raises `InvalidRequestError` for a value that cannot be.
    """

    model: str = _listen("smollm2", "a known name (see `treadle models`), a .gguf file, a model folder, random:SHAPE")
    aliases: tuple[str, ...] = _listen((), "further names by which requests may call the model")
    host: str = _listen("127.0.0.1", "address to listen on; any but a loopback address needs --keys")
    port: int = _listen(8000, "port to listen on; 0 takes a free one", least=0)
    keys: str | None = _listen(None, "file of API keys and tenants (see `treadle key`); read again on SIGHUP")
    open_access: bool = _listen(False, "serve whoever can reach the address, without keys")
    allowed_hosts: tuple[str, ...] = _listen((), "names by which clients may reach the server, beside its address")
    allowed_origins: tuple[str, ...] = _listen((), "web pages that may use the server, as https://example.org")

    max_body_bytes: int = _limit(8 << 20, "most bytes of a request's body")
    max_header_bytes: int = _limit(16 << 10, "most bytes of a request's first line, and of each header")
    max_json_depth: int = _limit(64, "most levels of a request's JSON")
    max_messages: int = _limit(4096, "most messages of a conversation")
    max_prompt_characters: int = _limit(2_000_000, "most characters of a prompt, counted before they become tokens")
    max_choices: int = _limit(16, "most answers to one request (n)")
    max_requests: int = _limit(1024, "most generating requests at once; more are told to come back")
    max_programs: int = _limit(4096, "most live programs of all tenants")
    program_idle_s: float = _limit(600.0, "seconds after which a program ends of which nothing is heard", least=0.001)
    idle_timeout_s: float = _limit(60.0, "seconds a connection may take until a request's headers are there", least=0.1)
    body_timeout_s: float = _limit(30.0, "seconds until a request's body is there", least=0.001)
    stall_timeout_s: float = _limit(30.0, "seconds that a client may read nothing of an answer", least=0.001)
    ping_interval_s: float = _limit(10.0, "seconds of silence after which a stream says that it is alive", least=0.001)
    drain_timeout_s: float = _limit(30.0, "seconds for running requests to end after SIGTERM", least=0)

    engine: Literal["process", "in-process"] = _setting("engine", "process", "where the engine runs")
    engine_restarts: int = _setting(
        "engine", 5, "most deaths of the engine in ten minutes; one more ends the server", least=0
    )
    device: DeviceName = _engine("device", "where the model runs")  # noqa: RUF009 (this is a field)
    dtype: DType = _engine("dtype", "element type of weights and KV")  # noqa: RUF009 (this is a field)
    weights: Weights = _engine("weights", "which matrices are kept in codes of 4 or 8 bits")  # noqa: RUF009 (this is a field)
    threads: int | None = _engine("num_threads", "threads for tensor operations", least=1)
    kv_pages: int | None = _engine("num_pages", "pages of KV; unset, as many as memory allows", least=1)
    host_pages: int = _engine("host_pages", "pages of KV in a second tier of memory", least=0)
    page_size: int = _engine("page_size", "tokens in a page", least=1)
    max_context: int | None = _engine("max_context", "most tokens of a call; unset, the model's", least=1)
    max_running: int = _engine("num_slots", "most calls that the engine runs at once", least=1)
    max_step_tokens: int = _engine("max_step_tokens", "most tokens computed in one step", least=1)
    order: str = _engine("order", "policy: who goes first")
    retention: str = _engine("retention", "policy: which pages are kept")
    admission: str = _engine("admission", "policy: who may start")
    prefix_cache: bool = _engine("prefix_cache", "share the pages of common prefixes within a tenant")
    learned: str | None = _engine("learned", "file that keeps how long tools take and outputs are")

    log_format: Literal["text", "json"] = _observe("text", "how log lines are written")
    log_level: Literal["debug", "info", "warning", "error"] = _observe("info", "the least that is logged")
    otlp_endpoint: str | None = _observe(None, "where OpenTelemetry spans go, as http://localhost:4318; unset: nowhere")

    def __post_init__(self) -> None:
        for known in fields(self):
            value, least = getattr(self, known.name), known.metadata["least"]
            if value is not None and least is not None and not value >= least:
                raise InvalidRequestError(f"{known.name} is {value}; it must be at least {least}")
        if self.port > 65535:
            raise InvalidRequestError(f"port is {self.port}; it must be at most 65535")
        if self.max_programs > MAX_PROGRAMS:
            raise InvalidRequestError(
                f"max_programs is {self.max_programs}; the scheduler takes at most {MAX_PROGRAMS}"
            )
        if self.host not in LOOPBACK and self.keys is None and not self.open_access:
            raise InvalidRequestError(
                f"host is {self.host}: whoever reaches that address could use the server; set keys to a file of API"
                " keys (see `treadle key`), or open_access if that is what you want"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK

    def engine_config(self) -> EngineConfig:
        """The engine's part. Raises `InvalidRequestError` for one that cannot be."""
        ours = [known for known in fields(self) if known.metadata["engine"] is not None]
        return EngineConfig(**cast(Any, {known.metadata["engine"]: getattr(self, known.name) for known in ours}))
