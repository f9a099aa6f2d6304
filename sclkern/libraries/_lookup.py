"""Functions and classes of libraries that may be missing, too old, or others of the same name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

_Question = TypeVar("_Question", bound=Callable[..., Any])


def constant(question: _Question) -> _Question:
    """Decorate a function that torch.compile is to call once and to take as a constant, as
    ``torch.compiler.assume_constant_result`` does, without what that imports: a second, and Triton."""
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question


class Found:
    """What a library offers, or why it cannot be used; looked for at the first use, once.

    Args:
        library: its name in messages.
        module: the module that holds it.
        name: of the function or class.
        arguments: that it must take by keyword.
        remedy: what the user can do.
        extension: the compiled module that it calls.
    """

    def __init__(
        self, library: str, module: str, name: str, arguments: tuple[str, ...], remedy: str, extension: str = ""
    ) -> None:
        self.library, self.module, self.name = library, module, name
        self.arguments, self.remedy, self.extension = arguments, remedy, extension
        self.forget()

    def forget(self) -> None:
        """Look again at the next use."""
        self.call: Any = None
        self._problem: str | None = None

    def problem(self) -> str | None:
        """Why it cannot be used, with the remedy; None if it can."""
        if self.call is None and self._problem is None:
            try:
                self._problem = self._load()
            except Exception as error:  # an extension that was built for another torch raises what it likes
                self._problem = self._described(error)
        return self._problem

    def _load(self) -> str | None:
        found = getattr(importlib.import_module(self.module), self.name)
        if self.extension:
            importlib.import_module(self.extension)
        taken = inspect.signature(found).parameters
        if missing := [argument for argument in self.arguments if argument not in taken]:
            return f"{self.library} is too old, its {self.name} has no argument {', '.join(missing)}: {self.remedy}"
        self.call = found
        return None

    def _described(self, error: Exception) -> str:
        if isinstance(error, ModuleNotFoundError) and error.name == self.module.partition(".")[0]:
            return f"{self.library} is not installed: {self.remedy}"
        reason = " ".join(str(error).split())
        return (
            f"{self.library} is installed, but {self.module}.{self.name} does not load ({type(error).__name__}: "
            f"{reason:.200}): {self.remedy}"
        )
