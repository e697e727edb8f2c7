"""`treadle serve`: a model over HTTP, for every client that speaks OpenAI's API."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import signal
from importlib.metadata import version
from typing import TYPE_CHECKING

from treadle.runtime.cli.console import note, pull_progress, status
from treadle.runtime.cli.options import Commands
from treadle.runtime.config import cache_dir
from treadle.runtime.models.registry import installed, pull
from treadle.runtime.server.config import ServerConfig
from treadle.runtime.server.heap import keep_large_blocks_apart
from treadle.runtime.server.logs import configure_logs
from treadle.runtime.server.settings import add_settings, print_settings, read_settings

if TYPE_CHECKING:
    from treadle.runtime.server.context import Server


def add_command(commands: Commands) -> None:
    """Adds `serve` to the command line."""
    parser = commands.add_parser(
        "serve", help="serve a model over HTTP", description="Serves a model to every client that speaks OpenAI's API."
    )
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until SIGTERM or Ctrl-C. Then requests that run may finish, for a while, and it ends with 0."""
    found = read_settings(vars(args), os.environ)
    if args.print_config:
        print(print_settings(found), end="")
        return 0
    config = found.config
    configure_logs(config.log_format, config.log_level)
    if any(listed.name == config.model and not listed.cached for listed in installed(cache_dir())):
        with pull_progress(config.model) as progress:
            pull(config.model, cache_dir(), progress)
    if config.engine == "process":
        keep_large_blocks_apart()
    try:
        asyncio.run(_serve(config))
    except asyncio.CancelledError:
        note("ended before the model was there")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what ends already need not be told again
    return 0


class _Signals:
    """Requests to end: the first asks for it, the second hurries. While the model loads, one is enough."""

    def __init__(self) -> None:
        self.serving = False
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()
        self._task = asyncio.current_task()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._came)

    def _came(self) -> None:
        if not self.serving and self._task is not None:
            self._task.cancel()
        (self.hurried if self.asked.is_set() else self.asked).set()


async def _serve(config: ServerConfig) -> None:
    from treadle.runtime.server.app import drain, listening
    from treadle.runtime.server.start import open_engine, serving, tokenizer_of

    signals = _Signals()
    async with contextlib.AsyncExitStack() as stack:
        with status(f"loading {config.model}"):
            tokenizer = await asyncio.to_thread(tokenizer_of, config.model)
            engine = await stack.enter_async_context(open_engine(config))
        server = await stack.enter_async_context(serving(config, engine, tokenizer))
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, server.tenants.reload)
        url = await stack.enter_async_context(listening(server))
        signals.serving = True
        print(_block(server, url), flush=True)
        await _until_asked(signals, server)
        note(f"ending: {server.admission.num_requests} requests may finish")
        draining, hurrying = asyncio.create_task(drain(server)), asyncio.create_task(signals.hurried.wait())
        await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        if server.admission.num_requests:
            note(f"{server.admission.num_requests} requests were cut off")


async def _until_asked(signals: _Signals, server: Server) -> None:
    """Raises what is wrong with the engine if that is gone for good before."""
    asked, ended = asyncio.create_task(signals.asked.wait()), asyncio.create_task(server.session.ended())
    await asyncio.wait({asked, ended}, return_when=asyncio.FIRST_COMPLETED)
    if not asked.done():
        raise ended.result()
    ended.cancel()


def _block(server: Server, url: str) -> str:
    """What whoever started the server needs to use it."""
    config, engine = server.config, server.engine
    names = f" (also {', '.join(config.aliases)})" if config.aliases else ""
    tokens = engine.num_pages * engine.page_size
    pages = f"{engine.num_pages} of {engine.page_size} tokens: {tokens} in all, {engine.max_context} in a call"
    needs_key = server.tenants.has_keys
    key = "$TREADLE_KEY" if needs_key else "none"
    hint = f"one of those in {config.keys}; put yours into TREADLE_KEY" if needs_key else "none needed"
    rows = {
        "url": f"{url}/v1",
        "key": hint,
        "model": f"{server.model}{names}",
        "device": f"{engine.device}, {engine.dtype}, engine {_place(config)}",
        "pages": pages,
    }
    lines = [f"treadle {version('treadle')} serves {server.model}", ""]
    lines += [f"  {name:7} {text}" for name, text in rows.items()]
    lines += ["", f"  export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key}", "", f"  {_curl(server, url)}", ""]
    return "\n".join(lines)


def _place(config: ServerConfig) -> str:
    return "in a process of its own" if config.engine == "process" else "in this process"


def _curl(server: Server, url: str) -> str:
    """A request to try the server with, for a shell."""
    if server.tokenizer is None:
        path, body = "completions", {"model": server.model, "prompt": [1, 2, 3], "max_tokens": 8}
    else:
        hello = {"role": "user", "content": "What is the capital of France?"}
        path, body = (
            "chat/completions",
            {"model": server.model, "messages": [hello], "max_tokens": 32, "temperature": 0},
        )
    key = ' -H "Authorization: Bearer $TREADLE_KEY"' if server.tenants.has_keys else ""
    content = shlex.quote(json.dumps(body))
    return f"curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d {content}"
