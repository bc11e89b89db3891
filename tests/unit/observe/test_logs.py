"""The log: text on a terminal, JSON lines elsewhere, and what neither lets through."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from datetime import datetime

import orjson
import pytest

from streamproc.observe.logs import configure_logging, executing, frames_of

logger = logging.getLogger("streamproc.pool")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _the_loggers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("NO_COLOR", raising=False)
    watched = [logging.getLogger(name) for name in (None, "aiokafka", "uvicorn", "asyncio")]
    before = [(each, each.level, list(each.handlers)) for each in watched]
    yield
    for each, level, handlers in before:
        each.setLevel(level)
        each.handlers[:] = handlers


def a_json_log(level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    configure_logging(stream, level=level, format="auto")
    return stream


def only_entry(stream: io.StringIO) -> dict[str, object]:
    (line,) = stream.getvalue().splitlines()
    entry = orjson.loads(line)
    assert isinstance(entry, dict)
    return entry


def fail() -> None:
    raise ValueError("first line\nsecond line")


def test_elsewhere_than_on_a_terminal_the_log_is_json_lines() -> None:
    stream = a_json_log()
    logger.warning("worker %d died", 3, extra={"task": "text", "worker": 3, "batch": 9, "partition": 0})
    entry = only_entry(stream)
    ts = datetime.fromisoformat(str(entry.pop("ts")))
    assert ts.tzinfo is not None
    assert entry == {
        "level": "warning",
        "logger": "streamproc.pool",
        "message": "worker 3 died",
        "task": "text",
        "worker": 3,
        "batch": 9,
        "partition": 0,
    }


def test_only_known_fields_are_written_so_that_no_payload_is() -> None:
    stream = a_json_log()
    logger.info("a record failed", extra={"topic": "in", "offset": 41, "value": b"payload", "record": "payload"})
    assert "payload" not in stream.getvalue()
    assert only_entry(stream)["offset"] == 41


def test_an_exception_is_one_field_of_one_line() -> None:
    stream = a_json_log()
    try:
        fail()
    except ValueError:
        logger.exception("it failed")
    exception = str(only_entry(stream)["exception"])
    assert exception.startswith("Traceback")
    assert exception.endswith("ValueError: first line\nsecond line")


def test_what_the_fast_encoder_refuses_is_logged_all_the_same() -> None:
    stream = a_json_log()
    logger.info("half a pair: \ud800", extra={"offset": 2**70})
    assert '"message": "half a pair: \\ud800"' in stream.getvalue()
    assert str(2**70) in stream.getvalue()


def test_on_a_terminal_the_log_is_text_in_colours() -> None:
    stream = Terminal()
    configure_logging(stream, level="info", format="auto")
    logger.warning("worker died", extra={"worker": 3})
    assert re.fullmatch(
        r"\x1b\[2m\d\d:\d\d:\d\d\x1b\[0m \x1b\[33mwarning \x1b\[0m worker died  \x1b\[2mworker=3\x1b\[0m\n",
        stream.getvalue(),
    )


def test_colours_are_left_out_where_no_color_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    configure_logging(stream, level="info", format="auto")
    logger.error("no")
    assert re.fullmatch(r"\d\d:\d\d:\d\d error    no\n", stream.getvalue())


def test_text_in_a_file_has_the_date_and_no_colours() -> None:
    stream = io.StringIO()
    configure_logging(stream, level="info", format="text")
    logging.getLogger("other.library").error("no", extra={"task": "text"})
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d error    other\.library: no  task=text\n", stream.getvalue())


def test_json_on_a_terminal_is_json_where_the_settings_say_so() -> None:
    stream = Terminal()
    configure_logging(stream, level="info", format="json")
    logger.info("yes")
    assert only_entry(stream)["message"] == "yes"


def test_text_cannot_steer_the_terminal_nor_forge_a_line() -> None:
    stream = Terminal()
    configure_logging(stream, level="info", format="text")
    logger.info("clear \x1b[2J and\n12:00:00 error    forged", extra={"topic": "a\nb"})
    first, second, third = stream.getvalue().splitlines()
    assert first.endswith("clear \\x1b[2J and")
    assert second.startswith("    12:00:00")
    assert third.startswith("    b")


def test_a_traceback_in_text_is_indented_below_its_line() -> None:
    stream = io.StringIO()
    configure_logging(stream, level="info", format="text")
    try:
        fail()
    except ValueError:
        logger.exception("it failed", extra={"task": "text"})
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("it failed  task=text")
    assert all(line.startswith("    ") for line in rest)
    assert rest[-1] == "    second line"


def test_the_level_is_the_settings_and_other_libraries_stay_quiet() -> None:
    stream = a_json_log("debug")
    logging.getLogger("aiokafka.consumer").info("Joined group")
    logging.getLogger("uvicorn.error").info("Started server process")
    logger.debug("mine")
    assert only_entry(stream)["message"] == "mine"
    stream = a_json_log("error")
    logging.getLogger("aiokafka.consumer").warning("Heartbeat failed")
    logger.warning("mine")
    assert stream.getvalue() == ""


def test_a_second_call_replaces_the_first_and_leaves_the_handlers_of_others() -> None:
    others = list(logging.getLogger().handlers)
    first, second = a_json_log(), a_json_log()
    logger.info("once")
    assert first.getvalue() == ""
    assert only_entry(second)["message"] == "once"
    assert [handler for handler in logging.getLogger().handlers if handler in others] == others


def test_a_worker_says_which_it_is() -> None:
    stream = io.StringIO()
    configure_logging(stream, level="info", format="json", worker=3)
    logging.getLogger("streamproc.worker").info("loading the model")
    assert orjson.loads(stream.getvalue())["worker"] == 3


@pytest.mark.parametrize("jump_s", [0, -5 * 86_400, 5 * 86_400])
def test_the_kafka_clients_repetitions_are_folded_whatever_the_time_of_day_does(jump_s: int) -> None:
    stream, now = io.StringIO(), 0.0
    configure_logging(stream, level="info", format="json", clock=lambda: now)
    client = logging.getLogger("aiokafka.conn")
    for now in (100.0, 101.0, 102.0, 111.0):
        record = client.makeRecord(
            client.name, logging.ERROR, __file__, 1, "Unable to connect to %s", ("node 1",), None
        )
        record.created = 1_700_000_000.0 + now + (jump_s if now > 101 else 0)
        client.handle(record)
    client.handle(client.makeRecord(client.name, logging.WARNING, __file__, 1, "group is rebalancing", (), None))
    lines = [orjson.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["level"], line["message"]) for line in lines] == [
        ("warning", "Unable to connect to node 1"),
        ("warning", "Unable to connect to node 1 (2 more were held back)"),
    ]


def test_a_workers_lines_have_the_fields_of_its_batch_while_it_executes_one() -> None:
    stream = io.StringIO()
    configure_logging(stream, level="info", format="json", worker=3)
    executing("text", 9, None)
    logging.getLogger("a.library").info("within")
    executing()
    logging.getLogger("a.library").info("after")
    within, after = map(orjson.loads, stream.getvalue().splitlines())
    assert {name: within[name] for name in ("task", "batch", "worker")} == {"task": "text", "batch": 9, "worker": 3}
    assert "trace_id" not in within
    assert not {"task", "batch"} & set(after)


def test_details_are_for_machines_and_a_field_that_the_message_names_is_not_said_twice() -> None:
    extra = {"task": "text", "batch": 9, "offset": 4, "wall_ms": 1.5, "value": "payload"}
    stream = a_json_log()
    logger.info("task text: batch 9 ran", extra=extra)
    assert only_entry(stream)["wall_ms"] == 1.5
    stream = io.StringIO()
    configure_logging(stream, level="info", format="text")
    logger.info("task text: batch 9 ran", extra=extra)
    assert stream.getvalue().endswith("task text: batch 9 ran  offset=4\n")


def test_the_frames_of_an_exception_say_where_and_what_kind_and_nothing_that_it_quotes() -> None:
    quoted = "payload"
    try:
        int(quoted)
    except ValueError as error:
        frames = frames_of(error)
    stream = a_json_log()
    logger.warning("failed", extra={"frames": frames})
    exception = str(only_entry(stream)["exception"])
    assert "int(quoted)" in exception
    assert exception.endswith("ValueError")
    assert "'payload'" not in exception
