"""Predictions over HTTP as a user asks for them: the digits demo, while Kafka streams, and clients that hang up."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from benchmarks.quantiles import summary_ms
from streamproc.demo.inference import sample_records
from tests.support.app import App, create, produce, read_to_end
from tests.support.asyncs import wait_until

TOKEN = "open sesame"  # noqa: S105 - of a test
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
CHUNK = 10_000
ASKED = 100
Ask = Callable[[str, Sequence[Mapping[str, Any]], Path], list["Answer"]]
CURL = shutil.which("curl")


class Answer(NamedTuple):
    """What a client got, and how long it took."""

    status: int
    body: dict[str, Any]
    seconds: float


@cache
def right_digits() -> list[int]:
    """What scikit-learn says to each image, asked directly: by a model that learned from the other half of them."""
    from sklearn.datasets import load_digits
    from sklearn.kernel_approximation import Nystroem
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    images, labels = load_digits(return_X_y=True)
    images, half = images / 16, len(labels) // 2
    found: list[int] = []
    for learned, asked in ((slice(half, None), slice(half)), (slice(half), slice(half, None))):
        model = make_pipeline(
            Nystroem(gamma=0.3, n_components=300, random_state=0), LogisticRegression(C=100.0, max_iter=1_000)
        )
        found += model.fit(images[learned], labels[learned]).predict(images[asked]).tolist()
    return found


def ask_by_curl(url: str, images: Sequence[Mapping[str, Any]], folder: Path) -> list[Answer]:
    """Some requests at a time, by one curl."""
    told = []
    for number, image in enumerate(images):
        (folder / f"{number}.json").write_text(json.dumps(image))
        told.append(
            f'url = "{url}"\ndata-binary = "@{folder}/{number}.json"\noutput = "{folder}/{number}.answer"\n'
            'write-out = "%{filename_effective} %{http_code} %{time_total}\\n"\n'
            + "".join(f'header = "{name}: {value}"\n' for name, value in HEADERS.items())
        )
    (folder / "curl").write_text("next\n".join(told))
    done = subprocess.run(
        [CURL or "", "--silent", "--show-error", "--parallel", "--parallel-max", "8", "--config", str(folder / "curl")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    answers: dict[int, Answer] = {}
    for line in done.stdout.splitlines():
        file, status, seconds = line.split()
        body = json.loads(Path(file).read_text())
        answers[int(Path(file).stem)] = Answer(int(status), body, float(seconds))
    return [answers[number] for number in range(len(images))]


def ask_by_httpx(url: str, images: Sequence[Mapping[str, Any]], folder: Path) -> list[Answer]:
    """The same where there is no curl."""
    del folder
    with httpx.Client(headers=HEADERS, timeout=60) as client:
        answers = [client.post(url, json=image) for image in images]
    return [Answer(it.status_code, it.json(), it.elapsed.total_seconds()) for it in answers]


BY = pytest.param(ask_by_curl, id="by-curl") if CURL else pytest.param(ask_by_httpx, id="by-httpx-for-want-of-curl")


@contextmanager
def streaming(kafka: str, topic: str, done: Callable[[], int]) -> Iterator[list[int]]:
    """Images go to Kafka all the time, always more than are done: how many so far."""
    rows = [(None, json.dumps(image).encode()) for image in sample_records()]
    chunk = [rows[number % len(rows)] for number in range(CHUNK)]
    sent, stop = [0], threading.Event()

    def send() -> None:
        while not stop.wait(0.05):
            if sent[0] - done() < 2 * CHUNK:
                produce(kafka, topic, {partition: chunk[partition::2] for partition in range(2)})
                sent[0] += CHUNK

    sending = threading.Thread(target=send)
    sending.start()
    try:
        yield sent
    finally:
        stop.set()
        sending.join()


async def hang_up(url: str, images: Sequence[Mapping[str, Any]], clients: int) -> None:
    """Clients that send a request, all of it or every fourth a part of it, and go before the answer."""
    address = httpx.URL(url)

    async def one(number: int) -> None:
        body = json.dumps(images[number % len(images)]).encode()
        head = (
            f"POST {address.path} HTTP/1.1\r\nHost: {address.host}\r\nContent-Length: {len(body)}\r\n"
            + "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
            + "\r\n"
        )
        _, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(head.encode() + (body[:-10] if number % 4 == 0 else body))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    for begin in range(0, clients, 50):
        await asyncio.gather(*map(one, range(begin, begin + 50)))


@pytest.mark.parametrize("ask", [BY])
@pytest.mark.parametrize(("batch_with", "clients"), [("apart", 1_000), ("kafka", 100)])
def test_the_digits_demo_gives_right_answers_while_kafka_streams_and_clients_that_hang_up_leak_nothing(
    kafka: str, tmp_path: Path, ask: Ask, batch_with: str, clients: int
) -> None:
    topic, images = f"predict-{uuid.uuid4().hex[:8]}", sample_records()
    create(kafka, {topic: 2, f"{topic}.results": 2, f"{topic}.dead": 2, f"{topic}.metrics": 1})
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    settings = {
        "name": topic,
        "kafka": {"bootstrap_servers": kafka},
        "backend": {"path": "streamproc.demo.inference:Backend", "loader": "module"},
        "pool": {"threads_per_worker": 1},
        "tasks": {"digits": {"input": {"topics": [topic]}, "limits": {"max_in_flight_records": 2_000}}},
        "http": {"port": 0, "token_file": str(tmp_path / "token"), "predict": {"batch_with": batch_with}},
    }
    with App(tmp_path / "app", settings) as app:
        url = f"{app.url}/tasks/digits/predict"
        app.until_ready()
        assert httpx.post(url, json=images[0]).status_code == 401
        # Nothing else waits, so it waits for its time: what wakes the processor then is a descriptor from here on.
        assert httpx.post(url, json=images[0], headers=HEADERS).status_code == 200

        def task() -> dict[str, Any]:
            found: dict[str, Any] = app.get("/status").json()["tasks"]["digits"]
            return found

        with streaming(kafka, topic, lambda: task()["counts"]["out"]) as sent:
            app.until(lambda status: status["tasks"]["digits"]["counts"]["out"] > 0, "Kafka streams")
            several = httpx.post(url, json=images[:100], headers=HEADERS)
            process = psutil.Process(app.process.pid)
            wait_until(lambda: not http_connections(process, app), "no client is left")
            before, threads, descriptors = task(), process.num_threads(), process.num_fds()
            answers = ask(url, images[-ASKED:], tmp_path)
            asyncio.run(hang_up(url, images, clients))
            wait_until(lambda: sum(task()["requests"]["counts"].values()) >= clients + ASKED + 2, "all were seen")
            after = task()
            # Both sides of the stream went on meanwhile, and there was more to do all the time.
            assert after["counts"]["out"] > before["counts"]["out"]
            assert sum(it["lag_records"] for it in after["partitions"]) > 0
            answers += ask(url, images[:ASKED], tmp_path)
        app.until(lambda status: status["tasks"]["digits"]["counts"]["out"] == sent[0], "Kafka's records are done")
        wait_until(lambda: not http_connections(process, app), "no client is left")
        idle = task()
        assert (idle["requests"]["waiting"], idle["requests"]["waiting_bytes"]) == (0, 0)
        assert (idle["in_flight_records"], idle["in_flight_bytes"], idle["window"]["size"]) == (0, 0, 0)
        # Who is fast enough got an answer, which it did not read; whose body broke off did not.
        counts = idle["requests"]["counts"]
        assert sum(counts.values()) == clients + 2 * ASKED + 2
        assert counts["left"] >= clients // 4
        assert set(counts) <= {"ok", "left"}
        wait_until(lambda: process.num_fds() <= descriptors, "no descriptor is left")
        assert process.num_threads() <= threads
        assert app.terminate() == 0
    assert {it.status for it in answers} == {200}
    digits = right_digits()
    expected = [*digits[-ASKED:], *digits[:ASKED]]
    assert [it.body["result"]["digit"] for it in answers] == expected
    assert [it["digit"] for it in several.json()["result"]] == digits[:100]
    summary = summary_ms([it.seconds * 1_000 for it in answers])
    print(f"{ask.__name__}, {batch_with}: {summary}")  # noqa: T201 - figures for whoever looks
    assert summary["p99_ms"] < 5_000
    results = [json.loads(record.value or b"")["result"] for record in read_to_end(kafka, f"{topic}.results", 2)]
    assert len(results) == sent[0]
    assert {result["digit"] == digits[result["id"]] for result in results} == {True}


def http_connections(process: psutil.Process, app: App) -> list[Any]:
    """The connections of clients to the sidecar, this test's own among them."""
    port = httpx.URL(app.url).port
    return [
        it
        for it in process.net_connections("tcp")
        if it.laddr and it.laddr[1] == port and it.status == psutil.CONN_ESTABLISHED
    ]
