"""The one exception that the command line turns into a single line and exit code 2."""

from __future__ import annotations


class UsageError(Exception):
    """Something the caller gave cannot be used.

    ``argument`` is the command-line option (``--data``) or file the message is about.
    """

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(f"{argument}: {message}")
        self.argument = argument
        self._message = message

    def __reduce__(self) -> tuple[type[UsageError], tuple[str, str]]:
        # An exception is rebuilt from its arguments when it comes from another process.
        return UsageError, (self.argument, self._message)
