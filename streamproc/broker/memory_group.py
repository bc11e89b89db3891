"""Consumer groups of the in-memory broker.

Rebalances are eager, as aiokafka's: every member is told of its loss and awaited, then all partitions are handed out
anew, round robin, and a new generation begins. Changes that come during a rebalance make one more.

Invariant: at every moment a partition belongs to at most one member of the current generation, and only the current
generation commits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from streamproc.errors import CommitRejectedError
from streamproc.records import TopicPartition


class Member(Protocol):
    """What a group needs of a consumer."""

    topics: frozenset[str]

    async def revoke(self) -> None:
        """Give up everything; returns when the application let go."""

    async def assign(self, partitions: set[TopicPartition], generation: int) -> None:
        """Take these from now on."""


class MemoryGroup:
    """One consumer group: members, generation and committed offsets."""

    def __init__(self, partitions_of: Callable[[str], int]) -> None:
        self.generation = 0
        self.offsets: dict[TopicPartition, int] = {}
        self.members: list[Member] = []
        self._partitions_of = partitions_of
        self._changed = False
        self._turn = asyncio.Lock()
        self._running: set[asyncio.Task[None]] = set()

    async def join(self, member: Member) -> None:
        """Become a member; returns with the first assignment."""
        self.members.append(member)
        self._changed = True
        await self._rebalance()

    def leave(self, member: Member) -> None:
        """Not be a member any more. The others are told in the background, as by their next heartbeat."""
        if member in self.members:
            self.members.remove(member)
            self.rebalance_soon()

    def rebalance_soon(self) -> None:
        """Hand the partitions out anew, in the background."""
        self._changed = True
        if self.members:
            running = asyncio.get_running_loop().create_task(self._rebalance())
            self._running.add(running)
            running.add_done_callback(self._running.discard)

    def commit_from_outside(self, group_id: str, offsets: Mapping[TopicPartition, int]) -> None:
        """Take offsets from who is no member. Raises CommitRejectedError where there are members."""
        if self.members:
            raise moved_on(group_id)
        self.offsets.update({TopicPartition(*partition): offset for partition, offset in offsets.items()})

    async def settled(self) -> None:
        """Returns once no rebalance is going on or due."""
        while self._running:
            await asyncio.wait(self._running)
        async with self._turn:
            pass

    def _assignment(self) -> list[set[TopicPartition]]:
        shares: list[set[TopicPartition]] = [set() for _ in self.members]
        for turn, partition in enumerate(self._all_partitions()):
            readers = [i for i, member in enumerate(self.members) if partition.topic in member.topics]
            shares[readers[turn % len(readers)]].add(partition)
        return shares

    def _all_partitions(self) -> Iterable[TopicPartition]:
        for topic in sorted(frozenset().union(*[member.topics for member in self.members])):
            for number in range(self._partitions_of(topic)):
                yield TopicPartition(topic, number)

    async def _rebalance(self) -> None:
        async with self._turn:
            if not self._changed:
                return
            await asyncio.gather(*[member.revoke() for member in self.members])
            # Members that came while the others let go take part at once; they have nothing to let go.
            self._changed = False
            self.generation += 1
            shares = self._assignment()
            pairs = list(zip(self.members, shares, strict=True))
            await asyncio.gather(*[member.assign(share, self.generation) for member, share in pairs])


def moved_on(group_id: str) -> CommitRejectedError:
    """The error of a commit by one who has no say over the group's offsets."""
    return CommitRejectedError(
        f"could not commit offsets of group {group_id}: the consumer group has rebalanced since, and another member "
        f"may own the partitions; nothing is lost, the new owner reads these records again"
    )
