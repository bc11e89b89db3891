"""The services of docker-compose.yml, as processes: so that the file cannot rot where there is no Docker engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from streamproc.records import TopicRecord
from tests.support.app import ROOT, headers, produce, read_to_end
from tests.support.asyncs import wait_until
from tests.support.compose import Compose

PARTITIONS = 4
pytestmark = pytest.mark.usefixtures("kafka_available")


def test_the_services_start_as_the_file_says_and_answer(tmp_path: Path) -> None:
    samples = (ROOT / "topics" / "samples" / "digits.jsonl").read_bytes().splitlines()
    with Compose(tmp_path) as compose:
        assert set(compose.selected()) == {"kafka", "topics", "processor", "prometheus"}
        compose.up("processor")
        compose.until("processor", "service_healthy")
        assert compose.up("topics").poll() is None, "where it ended, --exit-code-from would end everything"
        produce(compose.bootstrap_servers, "digits", {0: [(None, it) for it in samples]})
        wait_until(lambda: len(results(compose)) == len(samples), "everything is answered", deadline_s=60)


def test_the_monitoring_profile_has_the_statistics_of_all_replicas(tmp_path: Path) -> None:
    samples = (ROOT / "topics" / "samples" / "digits.jsonl").read_bytes().splitlines()
    with Compose(tmp_path) as compose:
        assert {"stats", "grafana"} <= set(compose.selected("monitoring"))
        compose.up("processor")
        compose.up("stats")
        compose.until("processor", "service_healthy")
        compose.until("stats", "service_healthy")
        produce(compose.bootstrap_servers, "digits", {0: [(None, it) for it in samples]})

        def counted() -> int:
            asked = httpx.get(f"http://127.0.0.1:{compose.ports['STATS']}/stats", params={"window": "1h", "last": 5})
            return sum(window["fleet"]["records"] for window in asked.json()["windows"])

        wait_until(lambda: counted() == len(samples), "all are in the windows", deadline_s=60)


def test_the_replay_profile_ends_well_with_its_golden_file(tmp_path: Path) -> None:
    assert replayed(tmp_path, {}) == 0


def test_the_replay_profile_fails_with_a_wrong_golden_file(tmp_path: Path) -> None:
    right = (ROOT / "topics" / "samples" / "digits.golden.jsonl").read_text().splitlines()
    wrong = tmp_path / "wrong.jsonl"

    def spoiled(line: str) -> str:
        record = json.loads(line)
        record["value"]["result"]["digit"] = (record["value"]["result"]["digit"] + 1) % 10
        return json.dumps(record)

    wrong.write_text("\n".join([spoiled(right[0]), *right[1:]]) + "\n")
    said: list[str] = []
    assert replayed(tmp_path, {"STREAMPROC_REPLAY_GOLDEN": str(wrong)}, said.append) == 1
    assert "1 of 50 records differ" in said[0]
    assert "digit: " in said[0]


def replayed(directory: Path, environ: dict[str, str], on_log: Callable[[str], None] = lambda _: None) -> int:
    """The exit code of `docker compose --profile replay up --exit-code-from replay`."""
    with Compose(directory, environ=environ) as compose:
        assert "replay" in compose.selected("replay")
        replay = compose.up("replay")
        code = replay.wait(120)
        on_log(compose.log("replay"))
        ended = [name for name in compose.selected("replay") if compose.has_ended(name) and name != "replay"]
        assert not ended, "the first one that ends ends all"
        runs = {headers(it)["streamproc-replay-run"] for it in results(compose)}
        assert len(runs) == 1
    return code


def results(compose: Compose) -> list[TopicRecord]:
    return read_to_end(compose.bootstrap_servers, "digits.results", PARTITIONS)
