"""Capture files: records of topics with everything that Kafka knows of them, in one file, in their common order.

    *.jsonl        JSON lines as ``record_lines.write_exact`` writes them; any name without a meaning of its own is one
    *.jsonl.gz     the same, compressed, in gzip members of their own every ``MEMBER_BYTES``
    *.parquet      columns of the same names; needs pyarrow (extra: parquet)

Invariants:

- Reading a file gives the records that were written, byte for byte, in the same order.
- Reading and writing hold no more than a chunk of the file, whatever its size.
- The bytes of a file of lines follow from its records alone, not from how they were handed over: a capture that was
  interrupted and went on ends in the same file as one that was not.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol, Self, cast

from streamproc.errors import StreamprocError
from streamproc.record_lines import LineError, PlacedRecord, read_exact, write_exact
from streamproc.records import TopicRecord

if TYPE_CHECKING:
    import pyarrow

MEMBER_BYTES = 1 << 20
"""The bytes of lines in one gzip member, or a line more: what a capture that is interrupted loses at most."""
_GZIP_LEVEL = 6
_ROWS_IN_BATCH = 4_096
_ROW_GROUP_BYTES = 16 << 20
_ROW_GROUP_ROWS = 65_536
_COLUMNS = ("topic", "partition", "offset", "timestamp", "key", "headers", "value")


class CaptureFileError(StreamprocError):
    """A capture file cannot be read or written, or holds something else than records."""


class Writer(Protocol):
    """Writes records to a capture file; a context manager. What was written is in the file once it is closed."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, records: Iterable[TopicRecord]) -> None:
        """Write records behind those that were written before. Raises CaptureFileError."""


def read_capture(path: Path) -> Iterator[PlacedRecord]:
    """The records of a capture file, one at a time, in the file's order.

    Raises:
        CaptureFileError: the file cannot be read, or a line of it is no record; the message has its number.
    """
    yield from _read_parquet(path) if is_parquet(path) else _read_lines(path)


def write_capture(path: Path) -> Writer:
    """A writer of a new capture file, in the format that its name says.

    Raises:
        CaptureFileError: there is a file of this name, it cannot be written, or pyarrow is not installed.
    """
    if is_parquet(path):
        return _ParquetWriter(path)
    return LineWriter(path)


def is_parquet(path: Path) -> bool:
    """Whether a file's name says that it is Parquet."""
    return path.suffix == ".parquet"


def is_gzip(path: Path) -> bool:
    """Whether a file's name says that it is compressed."""
    return path.suffix == ".gz"


def part_of(path: Path) -> Path:
    """Where a file of the same format can be written before it takes this name."""
    return path.with_name(f"{path.name}.new{path.suffix}")


class LineWriter:
    """Writes JSON lines, compressed where ``compressed`` or, without it, the file's name says so.

    Args:
        path: The file.
        compressed: Whether in gzip members.
        append: Whether to go on at the end of a file that is there, which must be that of a line (and of a member).
    """

    def __init__(self, path: Path, *, compressed: bool | None = None, append: bool = False) -> None:
        self._path = path
        self._compressed = is_gzip(path) if compressed is None else compressed
        self._lines: list[bytes] = []
        self._size = 0
        try:
            self._file = path.open("ab" if append else "xb", buffering=MEMBER_BYTES)
        except OSError as error:
            raise _cannot(path, "written", error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._end_member()
            self._file.close()
        except OSError as failure:
            raise _cannot(self._path, "written", failure) from failure

    def write(self, records: Iterable[TopicRecord]) -> None:
        """Write records behind those that were written before. Raises CaptureFileError."""
        lines = [write_exact(record) + b"\n" for record in records]
        try:
            if self._compressed:
                self._gather(lines)
            else:
                self._file.writelines(lines)
        except OSError as error:
            raise _cannot(self._path, "written", error) from error

    def _gather(self, lines: Sequence[bytes]) -> None:
        for line in lines:
            self._lines.append(line)
            self._size += len(line)
            if self._size >= MEMBER_BYTES:
                self._end_member()

    def _end_member(self) -> None:
        if self._lines:
            self._file.write(gzip.compress(b"".join(self._lines), _GZIP_LEVEL, mtime=0))
            self._file.flush()  # they may be small, and what is in the file is not lost
            self._lines.clear()
            self._size = 0


class _ParquetWriter:
    """Writes row groups of at most ``_ROW_GROUP_ROWS`` rows, and about ``_ROW_GROUP_BYTES``."""

    def __init__(self, path: Path) -> None:
        self._arrow, parquet = _pyarrow(path)
        self._path = path
        self._schema = _schema(self._arrow)
        self._rows: list[TopicRecord] = []
        self._size = 0
        try:
            self._file = path.open("xb")
        except OSError as error:
            raise _cannot(path, "written", error) from error
        self._parquet = parquet.ParquetWriter(self._file, self._schema, compression="zstd")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._end_row_group()
            self._parquet.close()
            self._file.close()
        except OSError as failure:
            raise _cannot(self._path, "written", failure) from failure

    def write(self, records: Iterable[TopicRecord]) -> None:
        """Write records behind those that were written before. Raises CaptureFileError."""
        for record in records:
            self._rows.append(record)
            self._size += len(record.value or b"") + len(record.key or b"")
            if self._size >= _ROW_GROUP_BYTES or len(self._rows) >= _ROW_GROUP_ROWS:
                self._end_row_group()

    def _end_row_group(self) -> None:
        rows = self._rows
        if not rows:
            return
        columns = [
            [row.topic for row in rows],
            [row.partition for row in rows],
            [row.offset for row in rows],
            [row.timestamp for row in rows],
            [row.key for row in rows],
            [[{"name": name, "value": value} for name, value in row.headers] for row in rows],
            [row.value for row in rows],
        ]
        table = self._arrow.table(
            [self._arrow.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)],
            schema=self._schema,
        )
        try:
            self._parquet.write_table(table, row_group_size=len(rows))
        except OSError as error:
            raise _cannot(self._path, "written", error) from error
        self._rows = []
        self._size = 0


def _read_lines(path: Path) -> Iterator[PlacedRecord]:
    line = b""
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):  # noqa: B007 - the error below has it
                if line != b"\n":
                    yield read_exact(line)
    except LineError as error:
        if not line.endswith(b"\n"):
            raise CaptureFileError(
                f"{path}:{number}: the line ends in the middle of a record; the file was not written to its end, make "
                f"it anew"
            ) from error
        raise CaptureFileError(f"{path}:{number}: the line {error}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CaptureFileError(
            f"{path}: no gzip, or not to its end, after line {number} ({error}); make it anew, or name it without .gz "
            f"if it is not compressed"
        ) from error
    except OSError as error:
        raise _cannot(path, "read", error) from error


def _opened(path: Path) -> IO[bytes]:
    if is_gzip(path):
        return cast("IO[bytes]", gzip.open(path, "rb"))
    return path.open("rb", buffering=MEMBER_BYTES)


def _read_parquet(path: Path) -> Iterator[PlacedRecord]:
    arrow, parquet = _pyarrow(path)
    try:
        with path.open("rb") as opened, parquet.ParquetFile(opened) as file:
            absent = [name for name in _COLUMNS if name not in file.schema_arrow.names]
            if absent:
                raise CaptureFileError(f"{path}: no capture file, the column {absent[0]!r} is missing")
            wanted = _schema(arrow)
            for batch in file.iter_batches(_ROWS_IN_BATCH, columns=list(_COLUMNS)):
                columns = [_column(arrow, batch.column(field.name), field, f"{path}: {field.name}") for field in wanted]
                for topic, partition, offset, timestamp, key, headers, value in zip(*columns, strict=True):
                    yield PlacedRecord(
                        topic,
                        partition,
                        offset,
                        timestamp,
                        key,
                        value,
                        [(header["name"], header["value"]) for header in headers or ()],
                    )
    except arrow.ArrowException as error:
        first = str(error).partition("\n")[0]
        raise CaptureFileError(f"{path}: no capture file as Parquet ({first})") from error
    except OSError as error:
        raise _cannot(path, "read", error) from error


def _column(arrow: Any, column: Any, field: Any, what: str) -> list[Any]:
    """A column's values, also where another program has written it with a type of its own."""
    if column.null_count and not field.nullable:
        raise CaptureFileError(f"{what} is null in some rows; every record needs one")
    typed = column.cast(field.type)
    if arrow.types.is_timestamp(field.type):
        typed = typed.cast(arrow.int64())
    return list(typed.to_pylist())


def _schema(arrow: Any) -> pyarrow.Schema:
    """The columns; the timestamp in milliseconds, as Kafka has it."""
    header = arrow.struct([("name", arrow.string()), ("value", arrow.binary())])
    return arrow.schema(
        [
            arrow.field("topic", arrow.string(), nullable=False),
            arrow.field("partition", arrow.int32(), nullable=False),
            arrow.field("offset", arrow.int64(), nullable=False),
            arrow.field("timestamp", arrow.timestamp("ms", "UTC"), nullable=False),
            arrow.field("key", arrow.binary()),
            arrow.field("headers", arrow.list_(header)),
            arrow.field("value", arrow.binary()),
        ]
    )


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow  # noqa: PLC0415 - an extra, and slow to import
        from pyarrow import parquet  # noqa: PLC0415 - as above
    except ImportError as error:
        raise CaptureFileError(
            f"{path}: Parquet needs pyarrow, which is not installed: pip install 'streamproc[parquet]', or name the "
            f"file .jsonl.gz"
        ) from error
    return pyarrow, parquet


def _cannot(path: Path, what: str, error: OSError) -> CaptureFileError:
    if isinstance(error, FileExistsError):
        return CaptureFileError(f"{path}: is there already; name another file, or remove it")
    return CaptureFileError(f"{path}: cannot be {what} ({error.strerror or error})")
