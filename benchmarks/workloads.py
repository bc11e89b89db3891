"""The workloads of `benchmarks.throughput`: which records there are, what is done to them, and what must come out.

A workload makes every record from its number alone, so that whoever reads a result back can tell from the number in it
what it has to be. Nothing here does I/O.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

SMALL_BYTES, LARGE_BYTES, IMAGE_BYTES = 223, 10_000, 150_000
ARRAY_LENGTH = 64
NUMBER_BYTES = 8
"""An image begins with its number."""
_NOISE = random.Random(1).randbytes(IMAGE_BYTES)


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of record, and one thing to do with it."""

    name: str
    title: str
    work: str
    """What the contestants do, by its name in ``benchmarks.peers.work``."""
    value: Callable[[int], bytes]
    """The value of the record with this number."""
    number: Callable[[Any], int]
    """A result's number; ``Any`` is decoded JSON, or bytes where the workload has none."""
    result: Callable[[int], Any]
    """What the result of this number has to be."""
    is_json: bool
    sizes: Sequence[int]
    """Records in the topics that there may be, ascending: a slow contestant reads a smaller one."""

    def check(self, value: bytes, *, is_wrapped: bool) -> int:
        """The number of a result that is what it has to be.

        Raises:
            AssertionError: it is something else.
        """
        content: Any = orjson.loads(value) if self.is_json else value
        if is_wrapped:
            content = content["result"]
        number = self.number(content)
        assert content == self.result(number), f"the result of record {number} is not what it has to be"
        return number


def small(number: int) -> dict[str, Any]:
    """An object whose JSON has 223 bytes."""
    return _filled({"id": number, "name": "record", "score": number % 1000 / 8, "pad": ""}, SMALL_BYTES)


def large(number: int) -> dict[str, Any]:
    """An object whose JSON has 10,000 bytes: numbers, texts, nested objects."""
    numbers = [(number + index) % 997 / 8 for index in range(400)]
    items = [{"key": f"item-{index}", "seen": number + index, "tags": ["a", "bc", "def"]} for index in range(80)]
    return _filled({"id": number, "numbers": numbers, "items": items, "pad": ""}, LARGE_BYTES)


def array(number: int) -> dict[str, Any]:
    """An object with an array of numbers."""
    return {"id": number, "values": [(number + index) % 1000 / 8 for index in range(ARRAY_LENGTH)]}


def doubled(number: int) -> dict[str, Any]:
    """The object with twice these numbers."""
    return {"id": number, "values": [value * 2 for value in array(number)["values"]]}


def image(number: int) -> bytes:
    """150,000 bytes that no compression shrinks, another for every number."""
    start = number % (IMAGE_BYTES - NUMBER_BYTES)
    body = _NOISE[start : IMAGE_BYTES - NUMBER_BYTES] + _NOISE[:start]
    return number.to_bytes(NUMBER_BYTES, "big") + body


def _filled(record: dict[str, Any], size: int) -> dict[str, Any]:
    record["pad"] = "x" * (size - len(orjson.dumps(record)))
    return record


def _id(content: Any) -> int:
    return int(content["id"])


def _image_number(content: bytes) -> int:
    return int.from_bytes(content[:NUMBER_BYTES], "big")


def _json(record: Callable[[int], dict[str, Any]]) -> Callable[[int], bytes]:
    return lambda number: orjson.dumps(record(number))


small_value = _json(small)
"""The value of 223 bytes, by its number."""

_IMAGES = (100, 500, 2_000, 4_000)

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="json-223",
            title="223 B JSON, identity",
            work="json",
            value=small_value,
            number=_id,
            result=small,
            is_json=True,
            sizes=(20_000, 60_000, 200_000, 600_000),
        ),
        Workload(
            name="json-10k",
            title="10 KB JSON, identity",
            work="json",
            value=_json(large),
            number=_id,
            result=large,
            is_json=True,
            sizes=(2_000, 8_000, 30_000, 60_000),
        ),
        Workload(
            name="image-150k",
            title="150 KB image, identity",
            work="bytes",
            value=image,
            number=_image_number,
            result=image,
            is_json=False,
            sizes=_IMAGES,
        ),
        Workload(
            name="numpy",
            title="64 floats doubled with numpy",
            work="numpy",
            value=_json(array),
            number=_id,
            result=doubled,
            is_json=True,
            sizes=(5_000, 20_000, 80_000, 250_000),
        ),
        Workload(
            name="model",
            title="223 B JSON, a model that takes 5 ms a call",
            work="model",
            value=small_value,
            number=_id,
            result=small,
            is_json=True,
            sizes=(1_000, 5_000, 40_000, 200_000),
        ),
    )
}
