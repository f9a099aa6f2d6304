"""The exceptions that the command line prints as a single line before it exits with a status of their own."""

import signal


class UserError(ValueError):
    """A mistake that the user can correct: the message names the argument, what came, what was expected and the remedy.

    The message is one line. ``sclkern`` on the command line prints it without a traceback and exits with 2.
    """


class WorkerError(RuntimeError):
    """A data worker process died. The message is one line, and ``sclkern`` on the command line exits with 3."""


class RankError(RuntimeError):
    """Another process of the run failed. ``sclkern`` on the command line exits with that process's status.

    Args:
        message: what failed, in one line; empty where another process prints it.
        status: exit status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Interrupted(KeyboardInterrupt):
    """A signal stopped what was running; ``sclkern`` on the command line exits with 128 + its number.

    Args:
        number: the signal.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number
