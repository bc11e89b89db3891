"""The contestants of ``benchmarks.encoder``, each run in a process of its own.

    python -m benchmarks.encoder_contestants FOLDER TASK

TASK is a ``benchmarks.peers.work.Task`` as JSON, whose ``variant`` is a name of ``VARIANTS`` and whose ``batch`` is the
most records in a batch. FOLDER is where the run's files are: ``reference.json``, written by ``reference``, and the
diary of the backend (``watched_encoder``), which all of them use.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import orjson
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from benchmarks.contestants import COMMIT_INTERVAL_MS, TASK, until_committed
from benchmarks.peers.work import Meter, Task
from benchmarks.sentences import texts
from streamproc.estimate.fit import Seen, fit
from streamproc.runtime.cost import CostModel
from streamproc.runtime.grouping import cheapest_division, reach
from streamproc.runtime.limits import Limits
from streamproc.settings import Settings

SEED = 1
MAX_PADDED_TOKENS = 2_048
SORTED_BATCHES = 8
QUEUED = 2
"""Batches that the process with the model has been given: one runs, and one is there when it is done."""
SIZES, LENGTHS, TURNS = (1, 2, 4, 8, 16), 6, 2
"""What the reference measures to know what a batch costs."""
T = TypeVar("T")
Message = Any
"""aiokafka's ``ConsumerRecord``."""
DIARY, REFERENCE = "diary.jsonl", "reference.json"


@dataclass(frozen=True, slots=True)
class Reference:
    """What is known of the texts beforehand, by the encoder alone."""

    tokens: list[int]
    vectors: list[list[float]]
    """Of each text alone, so that nothing was padded."""
    max_padded_bytes: int
    """As much room as ``MAX_PADDED_TOKENS``, by the bytes that a token of these texts has on average."""
    cost: dict[str, float]
    """Of a batch, by tokens."""

    @classmethod
    def read(cls, folder: Path) -> Reference:
        """What ``reference`` wrote."""
        return cls(**orjson.loads((folder / REFERENCE).read_bytes()))


def values(count: int) -> list[bytes]:
    """The values of the topic."""
    return [orjson.dumps(it) for it in texts(count, SEED)]


def backend_in(folder: Path) -> Any:
    """The backend, loaded here."""
    from benchmarks.watched_encoder import Backend  # noqa: PLC0415 - only processes with the encoder's packages have it

    return Backend(diary=str(folder / DIARY))


# -- streamproc


def processor(strategy: str, length: str) -> Callable[[Path, Task], Coroutine[Any, Any, None]]:
    """The processor, everything on, with these settings."""

    async def run(folder: Path, task: Task) -> None:
        max_padded = MAX_PADDED_TOKENS if length == "backend" else Reference.read(folder).max_padded_bytes
        settings = Settings.model_validate(
            {
                "name": task.group,
                "kafka": {"bootstrap_servers": task.bootstrap},
                "backend": {
                    "path": "benchmarks.watched_encoder:Backend",
                    "loader": "module",
                    "config": {"diary": str(folder / DIARY)},
                },
                "pool": {"workers": 1, "threads_per_worker": 1},
                "tasks": {
                    TASK: {
                        "input": {"topics": [task.source]},
                        "output": {"topic": task.output},
                        "metrics": {"topic": f"{task.output}.metrics"},
                        "dead_letters": {"topic": f"{task.output}.dead"},
                        "batch": {
                            "strategy": strategy,
                            "length": length,
                            "max_size": task.batch,
                            "max_padded": max_padded,
                        },
                        "commit_interval_ms": COMMIT_INTERVAL_MS,
                    }
                },
                "http": {"port": 0},
            }
        )
        await until_committed(settings, task.records)

    return run


# -- Infinity's rule


async def sort_8n(folder: Path, task: Task) -> None:
    """A loop over aiokafka's clients with the batches of Infinity, see ``batching_peers.Infinity``.

    The model has a process of its own here too, which always has a batch to go on with. Lengths are looked up, so that
    they cost nothing.
    """
    tokens, meter, loop = Reference.read(folder).tokens, Meter(), asyncio.get_running_loop()
    consumer = AIOKafkaConsumer(
        task.source,
        bootstrap_servers=task.bootstrap,
        group_id=task.group,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )
    producer = AIOKafkaProducer(bootstrap_servers=task.bootstrap, acks="all", enable_idempotence=True)
    waiting: deque[tuple[int, Message]] = deque()
    ready: deque[list[Message]] = deque()
    running: deque[tuple[list[Message], asyncio.Future[list[bytes]]]] = deque()
    sent: list[asyncio.Future[Any]] = []
    with ProcessPoolExecutor(1, get_context("spawn"), _load, (str(folder),)) as model:
        await loop.run_in_executor(model, _encoded, [])
        await producer.start()
        await consumer.start()
        while len(sent) < task.records:
            is_idle = not (waiting or ready or running)
            for some in (await consumer.getmany(timeout_ms=200 if is_idle else 0)).values():
                meter.begin()
                waiting.extend((tokens[int(orjson.loads(it.value)["id"])], it) for it in some)
            while len(running) < QUEUED and (ready or waiting):
                if not ready:
                    ready.extend(sorted_batches(waiting, task.batch))
                batch = ready.popleft()
                running.append((batch, loop.run_in_executor(model, _encoded, [it.value for it in batch])))
            if running:
                batch, encoded = running.popleft()
                for record, result in zip(batch, await encoded, strict=True):
                    sent.append(await producer.send(task.output, result, record.key, record.partition))
        await asyncio.gather(*sent)
        await consumer.commit()
        meter.end()
    await consumer.stop()
    await producer.stop()


def sorted_batches(waiting: deque[tuple[int, T]], size: int) -> list[list[T]]:
    """Up to eight batches' worth of the records that wait longest, sorted, in runs of ``size`` that fit."""
    count = min(SORTED_BATCHES, max(1, len(waiting) // size))
    popped = [waiting.popleft() for _ in range(min(len(waiting), count * size))]
    popped.sort(key=lambda it: it[0])
    batches: list[list[T]] = []
    for start in range(0, len(popped), size):
        batches.append([])
        for length, it in popped[start : start + size]:
            if batches[-1] and (len(batches[-1]) + 1) * length > MAX_PADDED_TOKENS:
                batches.append([])
            batches[-1].append(it)
    return batches


_backend: Any = None
"""The model of a process that ``_load`` has begun."""


def _load(folder: str) -> None:
    global _backend  # noqa: PLW0603 - a process of an executor keeps its things in its module
    _backend = backend_in(Path(folder))


def _encoded(batch: Sequence[bytes]) -> list[bytes]:
    return [orjson.dumps(it) for it in _backend([orjson.loads(it) for it in batch])] if batch else []


# -- without Kafka


async def offline(folder: Path, task: Task) -> None:
    """The bound: all texts at once, sorted by tokens, in the cheapest batches that the limits allow."""
    known, records, meter = Reference.read(folder), list(texts(task.records, SEED)), Meter()
    batches = cheapest(known.tokens, CostModel(**known.cost), task.batch)
    backend = backend_in(folder)
    meter.begin()
    outputs = [backend([records[it] for it in batch]) for batch in batches]
    meter.end()
    (folder / "offline.json").write_bytes(orjson.dumps([it for some in outputs for it in some]))


def cheapest(lengths: Sequence[int], cost: CostModel, size: int) -> list[list[int]]:
    """The cheapest division into batches, by the processor's exact planner; as indices."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ordered = [lengths[it] for it in order]
    totals = list(accumulate([1] * len(order), initial=0))
    limits = Limits(size, 1 << 40, max_padded=MAX_PADDED_TOKENS)
    costs = [cost.record_ms(it) for it in ordered]
    ends, _ = cheapest_division(costs, totals, cost.alpha_ms, reach(ordered, totals, limits))
    return [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]


async def reference(folder: Path, task: Task) -> None:
    """Each text alone, and what batches cost: see ``Reference``."""
    meter = Meter()
    records, backend = list(texts(task.records, SEED)), backend_in(folder)
    meter.begin()
    tokens = [backend.length(it) for it in records]
    vectors = [backend([it])[0]["vector"] for it in records]
    taken = fit(list(_costs(backend, records, tokens, task.batch)), lambda it: it.time_ms).coefficients
    cost = CostModel(*taken)
    size_bytes = sum(map(len, values(task.records)))
    known = Reference(tokens, vectors, round(MAX_PADDED_TOKENS * size_bytes / sum(tokens)), _as_dict(cost))
    (folder / REFERENCE).write_bytes(orjson.dumps(asdict(known)))
    meter.end()


def _as_dict(cost: CostModel) -> dict[str, float]:
    return {name: value for name, value in asdict(cost).items() if name.endswith("_ms")}


def _costs(backend: Any, records: list[Any], tokens: list[int], most: int) -> list[Seen]:
    """Shapes at lengths that are spread over those of the records, in turns; the least time of each."""
    order = sorted(range(len(records)), key=tokens.__getitem__)
    shapes = []
    for part in range(1, LENGTHS + 1):
        at = max(len(order) * part // LENGTHS, most) - 1
        length = tokens[order[at]]
        sizes = [it for it in SIZES if it <= most and it * length <= MAX_PADDED_TOKENS]
        shapes += [(it, length, [records[one] for one in order[at + 1 - it : at + 1]]) for it in sizes]
    taken: list[list[float]] = [[] for _ in shapes]
    for _ in range(TURNS):
        for (_, _, batch), times in zip(shapes, taken, strict=True):
            times.append(_time_ms(backend, batch))
    return [Seen(size, length, min(times), 1.0) for (size, length, _), times in zip(shapes, taken, strict=True)]


def _time_ms(backend: Any, batch: list[Any]) -> float:
    begun = time.perf_counter()
    backend(batch)
    return (time.perf_counter() - begun) * 1_000


VARIANTS: dict[str, Callable[[Path, Task], Coroutine[Any, Any, None]]] = {
    "reference": reference,
    "fifo": processor("fifo", "bytes"),
    "sort 8N": sort_8n,
    "bucketed, bytes": processor("bucketed", "bytes"),
    "bucketed, tokens": processor("bucketed", "backend"),
    "offline optimum": offline,
}


def main() -> None:
    """Run one contestant."""
    task = Task(**json.loads(sys.argv[2]))
    uvloop.run(VARIANTS[task.variant](Path(sys.argv[1]), task))


if __name__ == "__main__":
    main()
