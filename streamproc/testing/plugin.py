"""The pytest plugin: fixtures for a project with a ``streamproc.yaml``, and the rewriting of golden files.

pytest loads it in every project of an environment where streamproc is installed, so nothing of streamproc's is imported
before a fixture is used.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from streamproc.settings import Settings
    from streamproc.testing.pipeline import Pipeline

_UPDATE = "--streamproc-update-golden"
_SETTINGS = "streamproc_settings"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option and the setting of this plugin."""
    group = parser.getgroup("streamproc")
    group.addoption(_UPDATE, action="store_true", help="write what came out into the golden files that differ from it")
    parser.addini(_SETTINGS, "streamproc's settings file, from the root of the project", default="streamproc.yaml")


def pytest_configure(config: pytest.Config) -> None:
    """Tell ``assert_golden`` whether to rewrite."""
    if config.getoption(_UPDATE):
        from streamproc.testing import golden  # noqa: PLC0415 - see above

        golden.update = True
        config.add_cleanup(_do_not_update)


def _do_not_update() -> None:
    from streamproc.testing import golden  # noqa: PLC0415 - see above

    golden.update = False


@pytest.fixture(scope="session")
def streamproc_settings(pytestconfig: pytest.Config) -> Settings:
    """The project's settings, of its file alone: the environment's are for what runs there."""
    from streamproc.settings_loading import load_settings  # noqa: PLC0415 - see above

    return load_settings(pytestconfig.rootpath / pytestconfig.getini(_SETTINGS), {})


@pytest.fixture
def pipeline(streamproc_settings: Settings) -> Iterator[Pipeline]:
    """The project's pipeline in memory, one for each test."""
    from streamproc.testing.pipeline import Pipeline  # noqa: PLC0415 - see above

    with Pipeline(streamproc_settings) as it:
        yield it


@pytest.fixture(scope="session")
def streamproc_broker(streamproc_settings: Settings) -> Iterator[str]:
    """The address of an embedded broker, one for all tests, with the topics of the project."""
    from streamproc.broker.admin import KafkaAdmin  # noqa: PLC0415 - see above
    from streamproc.broker.embedded import EmbeddedBroker  # noqa: PLC0415 - see above
    from streamproc.testing.topics import create_topics  # noqa: PLC0415 - see above

    with EmbeddedBroker() as broker:
        settings = streamproc_settings.kafka.model_copy(update={"bootstrap_servers": broker.bootstrap_servers})
        asyncio.run(create_topics(streamproc_settings, KafkaAdmin(settings)))
        yield broker.bootstrap_servers


@pytest.fixture(scope="session")
def streamproc_broker_settings(streamproc_settings: Settings, streamproc_broker: str) -> Settings:
    """The project's settings with the embedded broker's address, and any free port for the sidecar."""
    kafka = streamproc_settings.kafka.model_copy(update={"bootstrap_servers": streamproc_broker})
    http = streamproc_settings.http.model_copy(update={"port": 0})
    return streamproc_settings.model_copy(update={"kafka": kafka, "http": http})


@pytest.fixture(scope="session")
def streamproc_environ(streamproc_broker: str) -> dict[str, str]:
    """An environment for commands: ours, with the embedded broker's address and any free port for the sidecar."""
    return {
        **os.environ,
        "STREAMPROC_KAFKA__BOOTSTRAP_SERVERS": streamproc_broker,
        "STREAMPROC_HTTP__PORT": "0",
    }
