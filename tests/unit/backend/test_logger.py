from __future__ import annotations

import logging
from typing import Any

import pytest

from streamproc.logger import get_logger


@pytest.mark.parametrize(
    ("arguments", "values", "expected"),
    [
        (("plain",), {}, "plain"),
        (("{} of {}", 1, 2), {}, "1 of 2"),
        (("{name}",), {"name": "x"}, "x"),
        (("%s of %d", "a", 2), {}, "a of 2"),
        (("%(name)s", {"name": "x"}), {}, "x"),
        (("a brace { alone, and 100%",), {}, "a brace { alone, and 100%"),
        (('{"json": 1}',), {}, '{"json": 1}'),
        (("{} {}", 1), {}, "{} {} (1,)"),
        (("%d", "x"), {}, "%d ('x',)"),
        ((5,), {}, "5"),
    ],
)
def test_calls_written_for_loguru_and_for_logging_are_both_understood(
    caplog: pytest.LogCaptureFixture, arguments: tuple[Any, ...], values: dict[str, Any], expected: str
) -> None:
    with caplog.at_level(logging.INFO, "streamproc.backend"):
        get_logger().info(*arguments, **values)
    assert caplog.messages == [expected]


def test_loguru_levels_lie_where_loguru_puts_them(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "streamproc.backend"):
        get_logger().trace("not shown")
        get_logger().success("shown")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("SUCCESS", "shown")]


def test_a_record_says_where_the_call_was(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "streamproc.backend"):
        get_logger().warning("one")
        get_logger().success("two")
        try:
            int("three")
        except ValueError:
            get_logger().exception("failed")
    assert {(record.filename, record.funcName) for record in caplog.records} == {
        ("test_logger.py", "test_a_record_says_where_the_call_was")
    }
    assert caplog.records[-1].exc_info is not None


def test_a_message_that_nobody_wants_is_not_put_together() -> None:
    class Expensive:
        def __str__(self) -> str:
            raise AssertionError("formatted for nothing")

    logging.getLogger("streamproc.backend").setLevel(logging.WARNING)
    try:
        get_logger().info("{}", Expensive())
    finally:
        logging.getLogger("streamproc.backend").setLevel(logging.NOTSET)
