"""`treadle chat`: a conversation on a terminal, or a turn for each line of a pipe."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Iterator

from treadle.runtime.cli.console import is_interactive, note, stream_text
from treadle.runtime.cli.conversation import Conversation
from treadle.runtime.cli.options import (
    DEFAULT_MODEL,
    MODEL_HELP,
    Commands,
    add_engine_options,
    add_sampling_options,
)
from treadle.runtime.cli.session import running
from treadle.runtime.errors import EngineClosedError, TreadleError

PROMPT = "> "
HELP = """/reset  forget the conversation
/quit   leave (or Ctrl-D)
/help   this list
Ctrl-C  stops an answer; at the prompt, leaves"""


def add_command(commands: Commands) -> None:
    """Adds `chat` to the command line."""
    parser = commands.add_parser(
        "chat", help="talk to a model", description="Talks to a model; each line of standard input is a turn."
    )
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help=f"{MODEL_HELP} (default: {DEFAULT_MODEL})"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    add_sampling_options(parser, max_tokens=1024)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answers line after line until there are no more."""
    interactive = is_interactive()
    with running(args) as (runner, runtime):
        conversation = Conversation(runtime, args)
        if not interactive:
            for line in filter(None, map(str.strip, sys.stdin)):
                runner.run(_answer(conversation, line))
            return 0
        print(f"{args.model}, {runtime.max_context} tokens of context. /help for help.")
        with contextlib.suppress(KeyboardInterrupt, EOFError):
            for line in _typed_lines(conversation):
                _answer_typed(runner, conversation, line)
        print()
    return 0


def _typed_lines(conversation: Conversation) -> Iterator[str]:
    """What the user says, until /quit; commands are carried out here."""
    import readline  # noqa: F401  (gives `input` line editing and history)

    while True:
        line = input(PROMPT).strip()
        if line == "/quit":
            return
        if line == "/help":
            print(HELP)
        elif line == "/reset":
            conversation.reset()
            print("The conversation is forgotten.")
        elif line.startswith("/") and line[1:].isalpha():
            print(f"There is no {line}; /help lists what there is.")
        elif line:
            yield line


def _answer_typed(runner: asyncio.Runner, conversation: Conversation, line: str) -> None:
    """One turn on a terminal: Ctrl-C ends the answer, an error ends the turn, and the conversation goes on."""
    try:
        runner.run(_answer(conversation, line))
    except KeyboardInterrupt:
        print(" [stopped]")
    except EngineClosedError:
        raise
    except TreadleError as error:
        note(f"error: {error}")


async def _answer(conversation: Conversation, line: str) -> None:
    announced = False
    async with contextlib.aclosing(conversation.answer(line)) as pieces:
        async for piece in pieces:
            if conversation.num_dropped and not announced:
                note(f"the context is full: the oldest {_turns(conversation.num_dropped)} dropped")
                announced = True
            stream_text(piece)
    stream_text("\n")


def _turns(count: int) -> str:
    return "turn is" if count == 1 else f"{count} turns are"
