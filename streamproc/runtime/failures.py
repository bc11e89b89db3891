"""A record's failure as bytes: how a worker tells the parent of it, whose process has no use for the worker's codec.

Invariant: nothing is imported here that the parent would import for it alone; numpy alone took a tenth of its start.
"""

from __future__ import annotations

from typing import Any

import orjson

from streamproc.records import Cause, Failure


def encode_failure(failure: Failure) -> bytes:
    """One record's failure as JSON, to cross the wire; only that of a batch has a traceback."""
    return orjson.dumps(
        {"cause": failure.cause, "stage": failure.stage, "kind": failure.kind, "message": failure.message}
    )


def decode_failure(value: bytes | memoryview) -> Failure:
    """The failure that ``encode_failure`` wrote. Raises ValueError, KeyError or TypeError where it did not."""
    return failure_of(orjson.loads(value))


def failure_of(fields: Any) -> Failure:
    """The failure that these fields, as JSON has them, tell of. Raises ValueError, KeyError or TypeError."""
    cause, traceback = Cause(fields["cause"]), str(fields.get("traceback", ""))
    return Failure(cause, str(fields["stage"]), str(fields["kind"]), str(fields["message"]), traceback)
