"""Predictions over HTTP while Kafka streams: what a request takes, in batches apart from Kafka's records or with them.

    python -m benchmarks.predict [--clients N] [--seconds S] [--records N] [--bootstrap HOST:PORT] [--json FILE]

One ``streamproc run`` of the digits demo (one worker, batches of up to 64, a wait of up to 20 ms) for each setting of
``http.predict.batch_with``, asked by ``--clients`` clients at once. Each has a connection of its own, sends one image,
waits for its answer, and sends the next: a closed loop. So it goes for ``--seconds``, twice:

1. *idle*: there is nothing in Kafka.
2. *streaming*: there is a backlog in Kafka, so that the worker has something to do at any time. Where it does not last
   until the end, the figure would be another, and the run fails.

A request takes from its first byte to the last of its answer. Every answer is compared with that of the model in this
process, and Kafka's records are counted before and after. All share the machine.

The table in docs/http.md is that of ``--json docs/predict-benchmark.json``; a test holds it to that.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import platform
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quantiles import summary_ms
from benchmarks.replica import Replica, settings_of
from deploy.kafka.kafka import HOST, KafkaCluster
from streamproc.broker.admin import KafkaAdmin
from streamproc.broker.interface import NewTopic
from streamproc.demo.inference import Backend, sample_records
from streamproc.demo.session import PARTITIONS, TASK, send
from streamproc.settings import Settings

PATH = f"/tasks/{TASK}/predict"
HEADERS = {"Content-Type": "application/json"}


class Client(threading.Thread):
    """One who asks without a pause until the time is over. ``found_ms`` are the times of its requests."""

    def __init__(self, port: int, images: Sequence[Mapping[str, Any]], digits: Sequence[int], until: float) -> None:
        super().__init__()
        self._port = port
        self._asked = [(json.dumps(image), digit) for image, digit in zip(images, digits, strict=True)]
        self._until = until
        self.found_ms: list[float] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        """Ask; what goes wrong is for ``measure`` to raise."""
        connection = http.client.HTTPConnection(HOST, self._port, timeout=30.0)
        try:
            while time.monotonic() < self._until:
                for body, digit in self._asked:
                    begun = time.perf_counter()
                    connection.request("POST", PATH, body, HEADERS)
                    answer = connection.getresponse()
                    content = json.loads(answer.read())
                    self.found_ms.append((time.perf_counter() - begun) * 1_000)
                    assert answer.status == 200, content
                    assert content["result"]["digit"] == digit, content
                    if time.monotonic() >= self._until:
                        break
        except BaseException as error:  # noqa: BLE001 - of a thread nobody would see it
            self.error = error
        finally:
            connection.close()


def ask(port: int, clients: int, seconds: float, images: list[dict[str, Any]], digits: list[int]) -> dict[str, float]:
    """What the requests of so many clients took."""
    until = time.monotonic() + seconds
    asking = [Client(port, images[n::clients], digits[n::clients], until) for n in range(clients)]
    for client in asking:
        client.start()
    for client in asking:
        client.join()
        if client.error is not None:
            raise client.error
    found = [it for client in asking for it in client.found_ms]
    return {**summary_ms(found), "per_s": round(len(found) / seconds, 1)}


def status(replica: Replica) -> dict[str, Any]:
    """What ``/status`` says of the task."""
    task: dict[str, Any] = json.loads(replica.get("/status")[1])["tasks"][TASK]
    return task


async def make_topics(settings: Settings) -> None:
    """The topics of one run."""
    topics = settings.topics_of(TASK)
    async with KafkaAdmin(settings.kafka) as admin:
        names = (topics.inputs[0], topics.results, topics.dead)
        await admin.create_topics([NewTopic(it, PARTITIONS, 1) for it in names] + [NewTopic(topics.metrics, 1, 1)])


def measure(bootstrap: str, batch_with: str, directory: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One setting: idle, then streaming."""
    name = f"predict-{uuid.uuid4().hex[:8]}"
    task = {"input": {"topics": [name]}, "batch": {"max_size": 64, "max_wait_ms": 20}}
    raw = settings_of(name, bootstrap, {TASK: task}, backend="streamproc.demo.inference:Backend")
    raw["backend"]["loader"] = "module"
    raw["pool"]["threads_per_worker"] = 1
    raw["http"] = {"predict": {"batch_with": batch_with}}
    settings = Settings.model_validate(raw)
    images = sample_records()
    digits = [it["digit"] for it in Backend()(images)]
    asyncio.run(make_topics(settings))
    with Replica(raw, directory, name) as replica:
        replica.until_ready()
        ask(replica.port, given.clients, 1.0, images, digits)  # a warm-up
        idle = ask(replica.port, given.clients, given.seconds, images, digits)
        sending = threading.Thread(target=lambda: asyncio.run(send(settings, images, given.records)))
        sending.start()
        while status(replica)["counts"]["out"] < given.records / 20:
            replica.check()
            time.sleep(0.02)
        sending.join()
        before = status(replica)["counts"]["out"]
        begun = time.monotonic()
        streaming = ask(replica.port, given.clients, given.seconds, images, digits)
        after = status(replica)
        records_per_s = (after["counts"]["out"] - before) / (time.monotonic() - begun)
        lag = sum(it["lag_records"] or 0 for it in after["partitions"])
        if not lag:
            raise SystemExit(f"the backlog did not last: raise --records above {given.records}")
        assert after["counts"]["dead"] == 0
        assert set(after["requests"]["counts"]) == {"ok"}
    return {
        "batch_with": batch_with,
        "idle": idle,
        "streaming": {**streaming, "kafka_records_per_s": round(records_per_s)},
    }


def table(figures: Mapping[str, Any]) -> list[str]:
    """The figures as a table of Markdown, times in milliseconds."""
    lines = [
        "| requests batch | Kafka | requests/s | p50, ms | p99, ms | longest, ms | Kafka's records/s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for it in figures["found"]:
        for state in ("idle", "streaming"):
            at = it[state]
            records = f"{at['kafka_records_per_s']:,}" if state == "streaming" else ""
            lines.append(
                f"| `{it['batch_with']}` | {state} | {at['per_s']:,.0f} | {at['p50_ms']:.1f} | {at['p99_ms']:.1f} "
                f"| {at['max_ms']:.1f} | {records} |"
            )
    return lines


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--records", type=int, default=400_000, help="the backlog in Kafka")
    parser.add_argument("--bootstrap", help="a running Kafka; one is started from its jars without this")
    parser.add_argument("--json", type=Path, help="where the figures go")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if given.bootstrap:
            found = [measure(given.bootstrap, it, directory, given) for it in ("apart", "kafka")]
        else:
            with KafkaCluster(directory / "kafka") as cluster:
                found = [measure(cluster.bootstrap_servers, it, directory, given) for it in ("apart", "kafka")]
    figures = {
        "clients": given.clients,
        "seconds": given.seconds,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "found": found,
    }
    print("\n".join(table(figures)))
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
