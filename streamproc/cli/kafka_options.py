"""Which Kafka a command talks to: ``--bootstrap-servers``, else the settings."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from streamproc.cli.terminal import say, stderr
from streamproc.errors import SettingsError

if TYPE_CHECKING:
    from streamproc.settings import KafkaSettings, Settings

T = TypeVar("T")
C = TypeVar("C")

WAITING_AFTER_S = 1.0

_ADDRESS_VARIABLE = "STREAMPROC_KAFKA__BOOTSTRAP_SERVERS"

BootstrapOption = Annotated[
    str | None,
    typer.Option(
        "--bootstrap-servers",
        "-b",
        metavar="HOST:PORT",
        help="Kafka's address, in place of the settings'.",
    ),
]


def find_settings(config: Path | None, bootstrap_servers: str | None) -> tuple[Settings | None, KafkaSettings]:
    """The settings, and how to reach Kafka. Raises SettingsError.

    Where the option or the environment says the address and no file is named, there need be none.
    """
    from streamproc.settings_loading import DEFAULT_PATH, load_kafka_settings, load_settings  # noqa: PLC0415 - slow

    settings: Settings | None = None
    if config is not None or DEFAULT_PATH.exists():
        settings = load_settings(config, os.environ)
        kafka = settings.kafka
    elif bootstrap_servers or any(name.upper() == _ADDRESS_VARIABLE for name in os.environ):
        kafka = load_kafka_settings(os.environ)
    else:
        raise SettingsError(
            f"there is no settings file {DEFAULT_PATH}, and no address of a Kafka",
            hint="give --bootstrap-servers HOST:PORT, or name a file with --config FILE",
        )
    return settings, with_address(kafka, bootstrap_servers)


def with_address(kafka: KafkaSettings, bootstrap_servers: str | None) -> KafkaSettings:
    """The settings with the option's address, where it was given. Raises SettingsError where that is none."""
    if not bootstrap_servers:
        return kafka
    from streamproc.settings_loading import check_bootstrap_servers  # noqa: PLC0415 - slow

    check_bootstrap_servers(bootstrap_servers, "--bootstrap-servers")
    return kafka.model_copy(update={"bootstrap_servers": bootstrap_servers})


def kafka_settings(config: Path | None, bootstrap_servers: str | None) -> KafkaSettings:
    """How to reach Kafka. Raises SettingsError."""
    return find_settings(config, bootstrap_servers)[1]


@contextlib.contextmanager
def waiting_for(kafka: KafkaSettings) -> Iterator[None]:
    """Around connecting: on a terminal, says what is being waited for when that takes longer than usual."""
    notice = f"waiting for Kafka at {kafka.bootstrap_servers} …"
    timer = asyncio.get_running_loop().call_later(WAITING_AFTER_S, say, notice) if stderr.is_terminal else None
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


@contextlib.asynccontextmanager
async def connected(client: AbstractAsyncContextManager[C], kafka: KafkaSettings) -> AsyncIterator[C]:
    """A client's own context, its beginning as in ``waiting_for``."""
    async with contextlib.AsyncExitStack() as stack:
        with waiting_for(kafka):
            entered = await stack.enter_async_context(client)
        yield entered


def run_async(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a command's coroutine on the event loop that the processor uses too."""
    import uvloop  # noqa: PLC0415 - only for commands that talk to Kafka

    return uvloop.run(main())
