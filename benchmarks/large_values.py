"""32 × 150 KB a batch: our wire with its shared memory against the pickled pipes of multiprocessing, in turns.

    python -m benchmarks.large_values [--rounds N] [--batches N] [--json FILE]

One worker process each, two batches under way, the same records. Against: a duplex ``multiprocessing.Pipe``, a
``multiprocessing.Pool`` and a ``ProcessPoolExecutor``, each given a list of bytes; the fastest of them is what we are
compared with, in each case by itself. Ours is the real pool and the real worker. Three cases:

    transport   the values reach the worker, which tells of each its length and its ends; nothing is decoded anywhere
    model       the values are JSON (an image as base64), decoded in the worker; the results are small
    identity    as model, and the results are as large as the values, encoded in the worker

Every result is verified; and once before, every byte that crosses, by checksum. Told beside is how much memory the
parent takes at its peak, in bodies of a batch, the shared one not counted: none on the way in, one for each batch that
is on its way out.
"""

from __future__ import annotations

import argparse
import base64
import json
import multiprocessing
import multiprocessing.pool
import platform
import random
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import orjson
import uvloop

from benchmarks.feeding import Feeder, one_worker, spans_of
from benchmarks.raw_sizes import checksum_of, ends_of
from benchmarks.turns import ratio, spread
from streamproc.runtime.pool import Reply

BATCH = 32
VALUE_BYTES = 150_000
DISTINCT_BATCHES = 4
UNDER_WAY = 2
WARMUP_BATCHES = 8
TARGET = 10
OURS = "our wire"

Work = Callable[[Sequence[bytes]], list[Any]]
Submit = Callable[[Sequence[bytes]], Callable[[], list[Any]]]


def values_of(batch: int) -> list[bytes]:
    """JSON objects of 150 KB, each with an image of its own as base64."""
    chance = random.Random(batch)
    values = []
    for index in range(BATCH):
        image = base64.b64encode(chance.randbytes(VALUE_BYTES * 3 // 4 - 24)).decode()
        values.append(orjson.dumps({"id": batch * BATCH + index, "image": image}))
    return values


def transport(values: Sequence[bytes]) -> list[Any]:
    """What the other end does in the case of that name."""
    return [ends_of(value) for value in values]


def checked(values: Sequence[bytes]) -> list[Any]:
    """As transport, every byte."""
    return [checksum_of(value) for value in values]


def model(values: Sequence[bytes]) -> list[Any]:
    """Decodes, answers little."""
    records = [orjson.loads(value) for value in values]
    return [orjson.dumps({"id": record["id"], "size": len(record["image"])}) for record in records]


def identity(values: Sequence[bytes]) -> list[Any]:
    """Decodes and encodes."""
    return [orjson.dumps(orjson.loads(value)) for value in values]


WORK: dict[str, Work] = {"transport": transport, "model": model, "identity": identity}
BACKENDS = {"transport": "raw_sizes:Backend", "model": "image_sizes:Backend", "identity": "identity:Backend"}


def _serve(connection: Connection, work: Work) -> None:
    while (values := connection.recv()) is not None:
        connection.send(work(values))


@contextmanager
def pipe(work: Work) -> Iterator[Submit]:
    """A process at the other end of a duplex pipe."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=True)
    process = context.Process(target=_serve, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()  # so that a process that ends is noticed

    def submit(values: Sequence[bytes]) -> Callable[[], list[Any]]:
        ours.send(values)
        received: Callable[[], list[Any]] = ours.recv
        return received

    try:
        yield submit
    finally:
        ours.send(None)
        process.join()


@contextmanager
def pool(work: Work) -> Iterator[Submit]:
    """A multiprocessing.Pool."""
    with multiprocessing.get_context("spawn").Pool(1) as processes:

        def submit(values: Sequence[bytes]) -> Callable[[], list[Any]]:
            answer: multiprocessing.pool.AsyncResult[list[Any]] = processes.apply_async(work, (values,))
            return answer.get

        yield submit


@contextmanager
def executor(work: Work) -> Iterator[Submit]:
    """A ProcessPoolExecutor."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:

        def submit(values: Sequence[bytes]) -> Callable[[], list[Any]]:
            answer: Future[list[Any]] = processes.submit(work, values)
            return answer.result

        yield submit


PICKLED = {"Pipe": pipe, "Pool": pool, "ProcessPoolExecutor": executor}


def feed(submit: Submit, batches: Sequence[Sequence[bytes]], expected: Sequence[list[Any]], count: int) -> float:
    """Seconds for so many batches, two under way; every result is compared.

    A pipe of which both ends write at once, more than it holds, would never move: there one batch is under way where
    the results are large.
    """
    under_way: deque[tuple[int, Callable[[], list[Any]]]] = deque()
    limit = 1 if getattr(submit, "__qualname__", "").startswith("pipe") and _is_large(expected[0]) else UNDER_WAY
    begun = time.perf_counter()
    for number in range(count):
        if len(under_way) == limit:
            _compare(under_way, expected)
        which = number % len(batches)
        under_way.append((which, submit(batches[which])))
    while under_way:
        _compare(under_way, expected)
    return time.perf_counter() - begun


def _compare(under_way: deque[tuple[int, Callable[[], list[Any]]]], expected: Sequence[list[Any]]) -> None:
    which, result = under_way.popleft()
    assert result() == expected[which], "another result"


def _is_large(result: list[Any]) -> bool:
    return isinstance(result[0], bytes) and len(result[0]) > VALUE_BYTES // 2


def verifier(expected: Sequence[list[Any]], case: str) -> Callable[[Reply], None]:
    """Compares our replies with what the others' have to be."""

    def verify(reply: Reply) -> None:
        assert not any(reply.statuses), "a record failed"
        which = (reply.batch.id - 1) % len(expected)
        seen = [orjson.loads(value)["seen"] for value in reply.values] if case == "transport" else list(reply.values)
        assert seen == expected[which], "another result"

    return verify


async def ours(case: str, batches: Sequence[Sequence[bytes]], count: int) -> float:
    """Seconds for so many batches by our pool, after it has warmed up."""
    spans = [spans_of(values) for values in batches]
    verify = verifier([WORK[case](values) for values in batches], case)
    async with one_worker(BACKENDS[case], envelope="result") as feeder:
        await feeder.feed(spans, WARMUP_BATCHES, verify)
        return (await feeder.feed(spans, count, verify)).wall_s


async def peak_bodies(case: str, batches: Sequence[Sequence[bytes]]) -> float:
    """Memory that the parent takes while batches go out and results come in, in bodies of a batch."""
    spans = [spans_of(values) for values in batches]
    body_bytes = sum(map(len, batches[0]))

    async def measure(feeder: Feeder) -> int:
        await feeder.feed(spans, WARMUP_BATCHES, lambda _: None)
        tracemalloc.start()
        try:
            await feeder.feed(spans, WARMUP_BATCHES, lambda _: None)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    async with one_worker(BACKENDS[case], envelope="result") as feeder:
        return await measure(feeder) / body_bytes


def check_every_byte(batches: Sequence[Sequence[bytes]]) -> None:
    """Checksums of what crossed, by every way."""
    expected = [checked(values) for values in batches]
    for way in PICKLED.values():
        with way(checked) as submit:
            feed(submit, batches, expected, len(batches))

    async def by_our_wire() -> None:
        async with one_worker("raw_sizes:Backend", envelope="result", config={"checksums": True}) as feeder:
            await feeder.feed([spans_of(values) for values in batches], len(batches), verifier(expected, "transport"))

    uvloop.run(by_our_wire())


def compare(case: str, rounds: int, count: int) -> dict[str, list[float]]:
    """Seconds a batch, by contestant and round; a process each, in turns."""
    batches = [values_of(number) for number in range(DISTINCT_BATCHES)]
    expected = [WORK[case](values) for values in batches]
    taken: dict[str, list[float]] = {name: [] for name in (OURS, *PICKLED)}
    for _ in range(rounds):
        taken[OURS].append(uvloop.run(ours(case, batches, count)) / count)
        for name, way in PICKLED.items():
            with way(WORK[case]) as submit:
                feed(submit, batches, expected, WARMUP_BATCHES)
                taken[name].append(feed(submit, batches, expected, count) / count)
    return taken


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    check_every_byte([values_of(number) for number in range(DISTINCT_BATCHES)])
    print(f"{BATCH} × {VALUE_BYTES // 1000} KB a batch; ms a batch, times ours; results verified")
    results: dict[str, Any] = {}
    for case in WORK:
        taken = compare(case, arguments.rounds, arguments.batches)
        fastest = min(PICKLED, key=lambda name: spread(taken[name]).median)
        against = ratio(taken[fastest], taken[OURS])
        for name, seconds in taken.items():
            print(f"{case:<10} {name:<20} {spread([second * 1e3 for second in seconds])} ms")
        target = f"  ≥ {TARGET} {'met' if against.median >= TARGET else 'BELOW'}" if case == "transport" else ""
        bodies = uvloop.run(peak_bodies(case, [values_of(number) for number in range(DISTINCT_BATCHES)]))
        print(
            f"{case:<10} {fastest} takes {against} times as long as {OURS}{target}; {bodies:.2f} bodies in the parent"
        )
        results[case] = {
            "ms_a_batch": {name: spread([second * 1e3 for second in them]).as_json() for name, them in taken.items()},
            "fastest_pickled": fastest,
            "ratio": against.as_json(),
            "peak_bodies_in_parent": round(bodies, 3),
        }
    if arguments.json:
        about = {"python": platform.python_version(), "batch": BATCH, "value_bytes": VALUE_BYTES}
        arguments.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
