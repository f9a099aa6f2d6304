"""The command line. ``parser`` states every command and option; ``sclkern.cli.<command>`` runs one.

Nothing heavier than argparse is imported before a command is chosen, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from sclkern.cli.parser import build_parser
from sclkern.errors import Interrupted, RankError, UserError, WorkerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command and its options; None = those of the process.

    Returns:
        The exit status: 0 on success, also of a run that a signal stopped and that is saved; 1 when a check failed; 2
        for a mistake of the user, 3 for a data worker that died and 4 for a process that hung (each explained in one
        line on stderr); 128 + its number when a signal stopped the command with nothing to save; 141 when the reader of
        stdout closed the pipe.
    """
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    before: dict[signal.Signals, Any] = {}
    try:
        if options.trains:
            if threading.current_thread() is threading.main_thread():
                # Loading takes seconds, in which SIGTERM would end the process without a word.
                before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
            # Must be set before torch is loaded. By default, OpenMP threads that wait for each other spin for so long
            # that a step takes ten times as long once another process, such as a data worker, needs a core.
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        status: int = _load(options.module).run(options)
        sys.stdout.flush()
        return status
    except UserError as error:
        return _fail(options.name, str(error))
    except WorkerError as error:
        return _fail(options.name, str(error), status=3)
    except RankError as error:
        # Without a message where another process prints it.
        return _fail(options.name, str(error), status=error.status) if str(error) else error.status
    except BrokenPipeError:
        # The reader, such as head, has read enough. Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk or a lost file system can show at any write
        place = f"{error.filename}: " if error.filename else ""
        return _fail(options.name, f"{place}{error.strerror or error}")
    except KeyboardInterrupt as error:
        number = getattr(error, "number", None)
        print(f"sclkern {options.name}: interrupted{f' by {number.name}' if number else ''}", file=sys.stderr)
        return 128 + int(number or signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line. Overrides (``section.key=value``) may stand before, between and after options.

    Args:
        arguments: the command and its options; None = those of the process.

    Returns:
        The options, with ``module`` (the module to run), ``name`` (of the command) and ``trains``.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse accepts positional arguments in one place only: overrides that follow an option are in ``rest``.
    if rest and (not hasattr(options, "overrides") or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _interrupt(number: int, _frame: object) -> None:
    raise Interrupted(signal.Signals(number))


def _load(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("sclkern"):
            raise
        raise UserError(f"needs the package {error.name!r}, which is not installed; install it") from error


def _fail(command: str, message: str, *, status: int = 2) -> int:
    print(f"sclkern {command}: error: {message}", file=sys.stderr)
    return status
