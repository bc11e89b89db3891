"""A backend as an agent of somebody's Faust application, in a process of its own, with Kafka."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import orjson

from streamproc.broker.interface import Headers
from tests.support import app as kafka_tools
from tests.support.asyncs import wait_until

ROOT = Path(__file__).parents[2]
PARTITIONS = 3
RECORDS = 600
APPLICATION = """
import os, sys
import faust
from streamproc.integrations.faust import inference_agent

name, broker, folder = os.environ["NAME"], os.environ["BROKER"], os.environ["BASE_DIR"]
app = faust.App(name, broker=f"kafka://{broker}", datadir=os.environ["DATA"])


def raw(topic):
    return app.topic(topic, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")


inference_agent(
    app,
    "tests.support.backends:Scripted",
    raw(f"{name}.in"),
    raw(f"{name}.out"),
    dead_letters=raw(f"{name}.dead"),
    base_dir=folder,
    max_size=16,
    max_wait_ms=5,
    workers=2,
    task={"on_error": {"retries": 0, "backoff_ms": 1, "causes": {"crash": {"retries": 2}}}},
)
app.main()
"""


def test_every_record_has_its_result_or_its_letter_and_is_committed_though_a_worker_is_killed(
    kafka: str, topic_name: Callable[..., str], tmp_path: Path
) -> None:
    name = topic_name("faust")
    kafka_tools.create(kafka, {f"{name}.in": PARTITIONS, f"{name}.out": PARTITIONS, f"{name}.dead": 1})
    (tmp_path / "application.py").write_text(APPLICATION)
    killed = tmp_path / "killed"
    asked = {200: {"do": "die", "once": str(killed)}, 300: {"do": "raise"}, 400: {"do": "refuse", "why": "so"}}
    rows: dict[int, list[kafka_tools.Row]] = {it: [] for it in range(PARTITIONS)}
    for number in range(RECORDS):
        value = orjson.dumps({"id": number, **asked.get(number, {})}) if number != 500 else b"{no record"
        rows[number % PARTITIONS].append((b"%d" % number, value))
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "application.py", "worker", "--without-web"],
            cwd=tmp_path,
            env={
                **os.environ,
                "NAME": name,
                "BROKER": kafka,
                "BASE_DIR": str(ROOT),
                "DATA": str(tmp_path / "data"),
                "PYTHONPATH": str(ROOT),
            },
            stdout=file,
            stderr=file,
        )
    try:
        kafka_tools.produce(kafka, f"{name}.in", rows)

        def written() -> int:
            assert process.poll() is None, log.read_text()
            return sum(
                sum(kafka_tools.ends(kafka, topic, count).values())
                for topic, count in ((f"{name}.out", PARTITIONS), (f"{name}.dead", 1))
            )

        wait_until(lambda: written() >= RECORDS, "all records are answered", deadline_s=60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert killed.exists()
    results = kafka_tools.read_to_end(kafka, f"{name}.out", PARTITIONS)
    letters = kafka_tools.read_to_end(kafka, f"{name}.dead", 1)
    assert Counter(it.key for it in (*results, *letters)) == {b"%d" % it: 1 for it in range(RECORDS)}
    assert {it.key: causes(it.headers) for it in letters} == {
        b"300": b"exception",
        b"400": b"rejected",
        b"500": b"invalid",
    }
    for partition in range(PARTITIONS):
        here = [int(it.key or b"") for it in results if it.partition == partition]
        assert here == [it for it in range(RECORDS) if it % PARTITIONS == partition and it not in (300, 400, 500)]
    assert {orjson.loads(it.value or b"")["result"]["id"] for it in results} == {int(it.key or b"") for it in results}
    assert kafka_tools.committed(kafka, name, f"{name}.in", PARTITIONS) == dict.fromkeys(
        range(PARTITIONS), RECORDS // PARTITIONS
    )


def causes(headers: Headers) -> bytes | None:
    return next((value for name, value in headers if name.endswith("cause")), None)
