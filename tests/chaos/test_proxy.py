"""The network of the chaos suite: what passes, what does not, and what arrives late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from deploy.kafka.kafka import free_ports
from tests.chaos.proxy import HOST, Network, Way

Run = Callable[..., Any]


class Echo:
    """A server that says back what it is told, and remembers it."""

    def __init__(self) -> None:
        self.heard = b""
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while data := await reader.read(1_000):
            self.heard += data
            writer.write(data)
        writer.close()


@asynccontextmanager
async def echo_behind_a_way() -> AsyncIterator[tuple[Echo, Way]]:
    echo = Echo()
    port, target = free_ports(2)
    server = await asyncio.start_server(echo.serve, HOST, target)
    way = Way(port, target)
    await way.open()
    try:
        yield echo, way
    finally:
        await way.close()
        server.close()


async def said_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, what: bytes) -> bytes:
    writer.write(what)
    return await reader.readexactly(len(what))


def test_what_is_said_arrives_and_so_does_the_answer(run: Run) -> None:
    async def story() -> None:
        async with echo_behind_a_way() as (_, way):
            reader, writer = await asyncio.open_connection(HOST, way.port)
            assert await said_back(reader, writer, b"x" * 500_000) == b"x" * 500_000
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()

    run(story())


def test_a_refusing_cut_drops_connections_and_takes_none_until_it_heals(run: Run) -> None:
    async def story() -> None:
        async with echo_behind_a_way() as (_, way):
            reader, writer = await asyncio.open_connection(HOST, way.port)
            await said_back(reader, writer, b"before")
            await way.cut("refuse")
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await said_back(reader, writer, b"during")
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(HOST, way.port)
            await way.heal()
            reader, writer = await asyncio.open_connection(HOST, way.port)
            assert await said_back(reader, writer, b"after") == b"after"
            writer.close()

    run(story())


def test_a_black_hole_keeps_connections_takes_new_ones_and_delivers_late(run: Run) -> None:
    async def story() -> None:
        async with echo_behind_a_way() as (echo, way):
            reader, writer = await asyncio.open_connection(HOST, way.port)
            await said_back(reader, writer, b"before")
            await way.cut("black_hole")
            writer.write(b"late")
            new_reader, new_writer = await asyncio.open_connection(HOST, way.port)
            new_writer.write(b"new")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(reader.readexactly(1)), 0.1)
            assert (echo.heard, echo.connections) == (b"before", 1)
            await way.heal()
            assert await new_reader.readexactly(3) == b"new"
            assert sorted(echo.heard) == sorted(b"beforelatenew")
            writer.close()
            new_writer.close()

    run(story())


def test_a_replica_is_cut_off_from_one_node_or_from_all_and_nobody_else_is(run: Run) -> None:
    async def story() -> None:
        ports = iter(free_ports(5))
        target = next(ports)
        server = await asyncio.start_server(Echo().serve, HOST, target)
        ways = {(replica, node): Way(next(ports), target) for replica in (1, 2) for node in (1, 2)}
        network = Network(ways)
        await network.open()

        async def reachable() -> set[tuple[int, int]]:
            found = set()
            for name, way in ways.items():
                try:
                    _, writer = await asyncio.open_connection(HOST, way.port)
                except ConnectionRefusedError:
                    continue
                writer.close()
                found.add(name)
            return found

        assert network.bootstrap_servers(2) == f"{HOST}:{ways[2, 1].port},{HOST}:{ways[2, 2].port}"
        await network.cut(1, 2, "refuse")
        assert await reachable() == {(1, 1), (2, 1), (2, 2)}
        await network.cut(1, None, "refuse")
        assert await reachable() == {(2, 1), (2, 2)}
        await network.heal(1, None)
        assert await reachable() == set(ways)
        await network.close()
        server.close()

    run(story())
