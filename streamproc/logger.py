"""The logger that a backend finds in ``self.logger``.

packflow hands out loguru's logger; ours is the standard library's, under one name, so that the host process decides
about levels and handlers. Invariants: nothing is configured on import, and a call written for loguru
(``logger.info("read {} rows", n)``, ``logger.success(…)``) works as it stands, as does one written for ``logging``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

LOGGER_NAME = "streamproc.backend"
TRACE = 5
SUCCESS = 25

logging.addLevelName(TRACE, "TRACE")
logging.addLevelName(SUCCESS, "SUCCESS")

# What logging itself understands; any other keyword is, as in loguru, a value for the message.
_LOGGING_KEYWORDS = frozenset({"exc_info", "stack_info", "stacklevel", "extra"})


class _Message:
    """A message that is put together only when a handler wants its text."""

    __slots__ = ("args", "text", "values")

    def __init__(self, text: object, args: tuple[Any, ...], values: dict[str, Any]) -> None:
        self.text = text
        self.args = args
        self.values = values

    def __str__(self) -> str:
        text = str(self.text)
        if not self.args and not self.values:
            return text
        try:
            formatted = text.format(*self.args, **self.values)
            # No braces in it: then the arguments are meant for percent signs.
            if formatted == text and self.args:
                formatted = text % (self.args[0] if isinstance(self.args[0], Mapping) else self.args)
        except (IndexError, KeyError, TypeError, ValueError, AttributeError):
            # A log line is never worth a failed batch: show what was given.
            return f"{text} {self.args or self.values}"
        return formatted


class BackendLogger(logging.LoggerAdapter[logging.Logger]):
    """A standard logger that also takes loguru's way of calling it."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log ``msg``; further arguments fill its braces or its percent signs."""
        if not self.isEnabledFor(level):
            return
        options = {key: value for key, value in kwargs.items() if key in _LOGGING_KEYWORDS}
        values = {key: value for key, value in kwargs.items() if key not in _LOGGING_KEYWORDS}
        # One more frame: this method, which is not part of the logging package that findCaller() skips.
        options["stacklevel"] = options.get("stacklevel", 1) + 1
        self.logger.log(level, _Message(msg, args, values), **options)

    def trace(self, msg: object, *args: object, **kwargs: Any) -> None:
        """Log below debug, as loguru's ``trace``."""
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        self.log(TRACE, msg, *args, **kwargs)

    def success(self, msg: object, *args: object, **kwargs: Any) -> None:
        """Log between info and warning, as loguru's ``success``."""
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        self.log(SUCCESS, msg, *args, **kwargs)


_LOGGER = BackendLogger(logging.getLogger(LOGGER_NAME), {})


def get_logger() -> BackendLogger:
    """The one logger of all backends."""
    return _LOGGER
