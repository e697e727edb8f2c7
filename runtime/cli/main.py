"""The `treadle` command: one subcommand a file, and one place where errors and signals become exit codes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from importlib.metadata import version
from types import FrameType
from typing import NoReturn

from treadle.runtime.cli import chat, demo, doctor, explain, generate, key, models, ps, run, serve, simulate, top
from treadle.runtime.cli.console import accept_any_text
from treadle.runtime.errors import TreadleError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE
EXIT_TERMINATED = 128 + signal.SIGTERM


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. Never shows a traceback for what a user can cause."""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    accept_any_text()
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The interpreter flushes standard output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (TreadleError, OSError) as error:
        print(f"treadle: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would only break the interpreter's own end
        return EXIT_INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The command line as a whole."""
    parser = argparse.ArgumentParser(prog="treadle", description="Runs language models on this machine.")
    parser.add_argument("--version", action="version", version=f"treadle {version('treadle')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (serve, ps, top, explain, chat, generate, run, demo, simulate, models, key, doctor):
        command.add_command(commands)
    return parser


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(EXIT_TERMINATED)


if __name__ == "__main__":
    sys.exit(main())
