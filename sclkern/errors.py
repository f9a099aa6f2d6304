"""The one exception type the command line turns into a single line and exit status 2."""


class UserError(ValueError):
    """A mistake its message lets the user mend: it names the thing, what came, what was expected and the remedy.

    The message is one line. ``sclkern`` on the command line prints it without a traceback and exits with 2.
    """
