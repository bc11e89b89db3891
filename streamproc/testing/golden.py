"""Golden files: results that were looked at once and found right, against those of now.

A golden file is a capture file of results (JSON lines), so that whatever reads captures reads it. ``assert_golden``
writes it in one form whatever the envelope, with nothing in it that changes from run to run: the value is the output
alone, the source is the number of the record among those that were sent, times are 0, and there are no metrics.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from streamproc.broker.memory_log import MemoryRecord
from streamproc.records import TopicRecord
from streamproc.replay.capture_file import read_capture, write_capture
from streamproc.replay.diff import BASELINE, CANDIDATE, Comparison, Example, Held
from streamproc.replay.marks import Source
from streamproc.replay.values import BATCHING, Pattern, Rules, Tolerance
from streamproc.testing.pipeline import Outputs

MAX_EXAMPLES = 10
MAX_CHANGES = 8
MAX_VALUE_CHARACTERS = 200

update = False
"""Whether files are written anew where results differ: set by pytest's option ``--streamproc-update-golden``."""


class GoldenError(AssertionError):
    """Results are not those of the golden file, or there is none."""


def assert_golden(
    outputs: Outputs | Iterable[TopicRecord],
    path: str | os.PathLike[str],
    *,
    tolerance: float | str | None = None,
    fields: Mapping[str, float | str] | None = None,
    ignore: Sequence[str] = (),
) -> None:
    """Compare results and dead letters with those of a golden file, record by record.

    Args:
        outputs: What a pipeline made of some records; or records of result and dead-letter topics.
        path: The golden file, ``*.jsonl`` (or ``.gz``, ``.parquet``).
        tolerance: How far floating-point numbers may be apart: a number (``0.01``), or a share (``"1%"``).
        fields: Tolerances of fields, ``{"scores[*].value": 0.1}``; below a field they count too.
        ignore: Fields that are not compared.

    Raises:
        GoldenError: they differ; the message says where. Or there is no such file.
        CaptureFileError: the file cannot be read.
    """
    __tracebackhide__ = True  # a failure is that of the test's line
    file = Path(path)
    rules = Rules(
        BATCHING if tolerance is None else Tolerance.parse(str(tolerance)),
        {Pattern.parse(name): Tolerance.parse(str(it)) for name, it in (fields or {}).items()},
        [Pattern.parse(name) for name in ignore],
    )
    records = list(_canonical(outputs) if isinstance(outputs, Outputs) else outputs)
    if not file.exists():
        if not update:
            raise GoldenError(
                f"there is no golden file {file}; `pytest --streamproc-update-golden` writes one, to be looked at"
            )
        _write(file, records)
        return
    with Comparison(rules, names=("golden", "now"), examples=MAX_EXAMPLES) as comparison:
        comparison.add_all(BASELINE, read_capture(file))
        comparison.add_all(CANDIDATE, records)
        comparison.finish()
        if not comparison.differing:
            return
        if update:
            _write(file, records)
            return
        raise GoldenError("\n".join(_told(comparison, file)))


def _write(file: Path, records: Sequence[TopicRecord]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"new-{file.name}")
    new.unlink(missing_ok=True)
    with write_capture(new) as writer:
        writer.write(records)
    new.replace(file)


def _canonical(outputs: Outputs) -> Iterator[MemoryRecord]:
    """The results, and then the dead letters, with nothing in them that changes from run to run."""
    order = {Source(it.topic, it.partition, it.offset): number for number, it in enumerate(outputs.sent)}
    for offset, result in enumerate(outputs.results):
        headers = _source(result.source, order, result.task)
        yield MemoryRecord("results", 0, offset, 0, result.key, orjson.dumps(result.value), headers)
    for offset, letter in enumerate(outputs.dead_letters):
        headers = (
            *_source(letter.source, order, letter.task),
            ("streamproc-cause", letter.cause.encode()),
            ("streamproc-stage", letter.stage.encode()),
            ("streamproc-error-type", letter.error_type.encode()),
            ("streamproc-error-message", letter.message.encode()),
        )
        yield MemoryRecord("dead", 0, offset, 0, letter.record.key, letter.record.value, headers)


def _source(source: Source, order: Mapping[Source, int], task: str) -> tuple[tuple[str, bytes | None], ...]:
    return (
        ("streamproc-source-topic", source.topic.encode()),
        ("streamproc-source-partition", b"0"),
        ("streamproc-source-offset", b"%d" % order[source]),
        ("streamproc-task", task.encode()),
    )


def _told(comparison: Comparison, file: Path) -> Iterator[str]:
    """What differs, for people."""
    yield f"{comparison.differing} of {comparison.records} results are not those of {file}:"
    examples = [it for it in comparison.examples if it.verdict not in ("equal", "close")][:MAX_EXAMPLES]
    for example in examples:
        yield from _told_of(example)
    if comparison.differing > len(examples):
        yield f"  … and {comparison.differing - len(examples)} more"
    yield "look at them; where they are right, `pytest --streamproc-update-golden` writes them into the file"


def _told_of(example: Example) -> Iterator[str]:
    key = "" if example.key is None else f", key {example.key.decode(errors='replace')}"
    yield f"  record {example.source.offset} of {example.source.topic}, task {example.task}{key}: {example.verdict}"
    shown = [it for it in example.changes if not it.is_close]
    for change in shown[:MAX_CHANGES]:
        yield f"    {change.worst}: {_short(change.baseline)} → {_short(change.candidate)}"
    if len(shown) > MAX_CHANGES:
        yield f"    … and {len(shown) - MAX_CHANGES} more fields"
    if not shown:
        yield f"    golden: {_held(example.baseline)}"
        yield f"    now:    {_held(example.candidate)}"


def _held(held: Held | None) -> str:
    if held is None:
        return "nothing"
    return f"{'dead letter ' if held.is_dead else ''}{_short(held.value)}"


def _short(value: Any) -> str:
    text = orjson.dumps(value, default=repr).decode()
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[: MAX_VALUE_CHARACTERS - 1]}…"
