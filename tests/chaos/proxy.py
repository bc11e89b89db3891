"""The network between the replicas and the nodes, so that it can be cut without being root.

Each replica has its own way to each node: a port that forwards to a listener of the node whose advertised address is
that port. A way is cut in one of two manners: ``refuse`` drops its connections and takes no new ones; ``black_hole``
keeps them, takes new ones too, and forwards nothing. What was in a black hole when it ends arrives late, as it does
with TCP.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Literal

HOST = "127.0.0.1"
CHUNK_BYTES = 1 << 16
Cut = Literal["refuse", "black_hole"]


class Way:
    """One replica's way to one node."""

    def __init__(self, port: int, target_port: int) -> None:
        self.port = port
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._passable = asyncio.Event()
        self._passable.set()
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Take connections."""
        self._server = await asyncio.start_server(self._connected, HOST, self.port, limit=CHUNK_BYTES)

    async def cut(self, how: Cut) -> None:
        """Let nothing pass until ``heal``."""
        if how == "black_hole":
            self._passable.clear()
        else:
            await self._shut()

    async def heal(self) -> None:
        """Let everything pass again."""
        self._passable.set()
        if self._server is None:
            await self.open()

    async def close(self) -> None:
        """Take no more connections and end those that are there."""
        await self._shut()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._writers:
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        self._writers.add(writer)
        try:
            await self._passable.wait()
            with contextlib.suppress(OSError):
                far_reader, far_writer = await asyncio.open_connection(HOST, self._target_port, limit=CHUNK_BYTES)
                self._writers.add(far_writer)
                try:
                    await self._carry_both(reader, writer, far_reader, far_writer)
                finally:
                    self._writers.discard(far_writer)
                    far_writer.close()
        finally:
            self._writers.discard(writer)
            writer.close()
            self._connections.discard(connection)

    async def _carry_both(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> None:
        """Until either side ends; what that side said last has arrived by then."""
        loop = asyncio.get_running_loop()
        ways = {
            loop.create_task(self._carry(reader, far_writer)),
            loop.create_task(self._carry(far_reader, writer)),
        }
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                await self._passable.wait()
                writer.write(data)
                await writer.drain()
            await self._passable.wait()
            if writer.can_write_eof():
                writer.write_eof()


class Network:
    """The ways of all replicas to all nodes."""

    def __init__(self, ways: dict[tuple[int, int], Way]) -> None:
        """``ways`` by replica and node."""
        self._ways = ways

    async def open(self) -> None:
        """Take connections."""
        for way in self._ways.values():
            await way.open()

    async def close(self) -> None:
        """End everything."""
        await asyncio.gather(*(way.close() for way in self._ways.values()))

    def bootstrap_servers(self, replica: int) -> str:
        """Where a replica finds the nodes."""
        return ",".join(f"{HOST}:{way.port}" for (it, _), way in self._ways.items() if it == replica)

    async def cut(self, replica: int, node: int | None, how: Cut) -> None:
        """Cut a replica off from a node, or from all of them."""
        for way in self._between(replica, node):
            await way.cut(how)

    async def heal(self, replica: int, node: int | None) -> None:
        """End a cut."""
        for way in self._between(replica, node):
            await way.heal()

    def _between(self, replica: int, node: int | None) -> list[Way]:
        return [way for (it, to), way in self._ways.items() if it == replica and node in (None, to)]
