"""What is said to the coordinators of a transaction, and what each of their answers leads to.

The cluster is a script: which node answers what. The bytes of the two requests that are our own are laid out by hand,
after Kafka's protocol guide.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import errors as kafka
from aiokafka.client import CoordinationType
from aiokafka.protocol.transaction import (
    AddOffsetsToTxnRequest,
    AddPartitionsToTxnRequest,
    EndTxnRequest,
    InitProducerIdRequest,
)

from streamproc.broker.interface import Membership
from streamproc.broker.transaction_requests import (
    StableOffsetFetchRequest,
    StableOffsetFetchRequestV7,
    StableOffsetFetchResponse,
    TxnOffsetCommitRequest,
    TxnOffsetCommitRequestV3,
    TxnOffsetCommitResponse,
    are_known,
)
from streamproc.broker.transactions import TransactionProtocol
from streamproc.errors import (
    BrokerAuthorizationError,
    BrokerError,
    BrokerUnreachableError,
    CommitRejectedError,
    SettingsError,
    TransactionAbortedError,
)
from streamproc.records import TopicPartition
from streamproc.settings import KafkaSettings

OK = 0
LIMIT_S = 0.05
"""How long may be tried, where the time is to run out."""
MEMBER = Membership("group", 5, "member", None)
OFFSETS = {TopicPartition("in", 0): 10, TopicPartition("in", 1): 20}
RETRIABLE = (3, 7, 14, 15, 16, 51)
MOVED = (7, 15, 16)
"""After these the coordinator is asked for again."""

Test = Callable[[], Coroutine[Any, Any, None]]


class Cluster:
    """aiokafka's client, as far as the protocol uses it."""

    def __init__(self, **script: list[Any]) -> None:
        """``script`` has the answers to each kind of request in turn, a code or an exception; 0 after the last."""
        self._script = script
        self.asked: list[tuple[int, str, Any]] = []
        self.lookups: list[tuple[int, str]] = []
        self.answer: Callable[[], Coroutine[Any, Any, None]] | None = None

    async def coordinator_lookup(self, kind: int, key: str) -> int:
        self.lookups.append((kind, key))
        self._take("lookup")
        return len(self.lookups)

    async def send(self, node: int, request: Any, *, group: int) -> Any:  # noqa: ARG002 - as aiokafka has it
        kind = type(request).__name__.removesuffix("Request")
        self.asked.append((node, kind, request))
        if self.answer is not None:
            await self.answer()
        await asyncio.sleep(0)
        code = self._take(kind)
        if isinstance(request, InitProducerIdRequest):
            return SimpleNamespace(error_code=code, producer_id=7, producer_epoch=3)
        if isinstance(request, AddPartitionsToTxnRequest):
            codes = code if isinstance(code, list) else [code] * len(request._topics)
            return SimpleNamespace(
                errors=[
                    (topic, [(p, it) for p in parts]) for (topic, parts), it in zip(request._topics, codes, strict=True)
                ]
            )
        if isinstance(request, TxnOffsetCommitRequest):
            return SimpleNamespace(topics=[("in", [(0, OK, {}), (1, code, {})], {})])
        assert isinstance(request, AddOffsetsToTxnRequest | EndTxnRequest)
        return SimpleNamespace(error_code=code)

    def _take(self, kind: str) -> Any:
        answers = self._script.get(kind)
        answer = answers.pop(0) if answers else OK
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def kinds(self) -> list[str]:
        return [kind for _, kind, _ in self.asked]


def protocol_of(cluster: Cluster, **settings: Any) -> TransactionProtocol:
    return TransactionProtocol(cluster, KafkaSettings().model_copy(update=settings), "id")


def short(cluster: Cluster) -> TransactionProtocol:
    return protocol_of(cluster, transaction_timeout_ms=LIMIT_S * 1_000, request_timeout_ms=LIMIT_S * 1_000)


def commit(cluster: Cluster) -> None:
    asyncio.run(protocol_of(cluster).commit(OFFSETS, MEMBER))


def test_an_epoch_is_begun_with_the_coordinator_and_part_of_every_request_after() -> None:
    cluster = Cluster()

    async def test() -> None:
        protocol = protocol_of(cluster, transaction_timeout_ms=1_234)
        assert await protocol.begin_epoch() == (7, 3)
        await protocol.add_partitions([TopicPartition("a", 0), TopicPartition("b", 1), TopicPartition("a", 2)])
        await protocol.commit(OFFSETS, MEMBER)

    asyncio.run(test())
    assert cluster.kinds() == ["InitProducerId", "AddPartitionsToTxn", "AddOffsetsToTxn", "TxnOffsetCommit", "EndTxn"]
    begin, announce, group, offsets, end = [request for _, _, request in cluster.asked]
    assert (begin._transactional_id, begin._transaction_timeout_ms) == ("id", 1_234)
    assert announce._topics == [("a", [0, 2]), ("b", [1])]
    assert group._group_id == "group"
    assert offsets._offsets == OFFSETS
    assert end._transaction_result == 1
    assert {(it._producer_id, it._producer_epoch) for it in (announce, group, end)} == {(7, 3)}
    assert offsets._producer == (7, 3)
    assert cluster.lookups == [(CoordinationType.TRANSACTION, "id"), (CoordinationType.GROUP, "group")]
    assert [node for node, _, _ in cluster.asked] == [1, 1, 1, 2, 1]


def test_a_transaction_without_offsets_is_only_ended() -> None:
    cluster = Cluster()
    asyncio.run(protocol_of(cluster).commit({}, MEMBER))
    assert cluster.kinds() == ["EndTxn"]


@pytest.mark.parametrize("kind", ["AddOffsetsToTxn", "TxnOffsetCommit", "EndTxn"])
@pytest.mark.parametrize("code", RETRIABLE)
def test_what_may_mend_itself_is_asked_again_of_the_coordinator_there_is_then(kind: str, code: int) -> None:
    cluster = Cluster(**{kind: [code]})
    commit(cluster)
    nodes = [node for node, it, _ in cluster.asked if it == kind]
    assert len(nodes) == 2
    assert (nodes[0] != nodes[1]) == (code in MOVED)
    assert cluster.kinds()[-1] == "EndTxn"


@pytest.mark.parametrize("kind", ["lookup", "AddOffsetsToTxn", "TxnOffsetCommit", "EndTxn"])
@pytest.mark.parametrize(
    "error",
    [kafka.KafkaConnectionError("gone"), kafka.NodeNotReadyError("no"), kafka.RequestTimedOutError(), OSError()],
)
def test_a_connection_that_breaks_is_no_answer(kind: str, error: Exception) -> None:
    cluster = Cluster(**{kind: [error]})
    commit(cluster)
    assert len(cluster.lookups) == 3
    assert cluster.kinds()[-1] == "EndTxn"


def test_a_coordinator_that_moves_between_two_requests_is_found_again() -> None:
    cluster = Cluster(TxnOffsetCommit=[16, 14, 15], EndTxn=[16])
    commit(cluster)
    kinds = [kind for kind, _ in cluster.lookups]
    assert kinds == [
        *(CoordinationType.TRANSACTION, CoordinationType.GROUP, CoordinationType.GROUP, CoordinationType.GROUP),
        CoordinationType.TRANSACTION,
    ]


@pytest.mark.parametrize("code", [22, 25, 27, 82])
def test_offsets_of_a_member_whose_group_has_moved_on_are_rejected_and_nothing_is_ended(code: int) -> None:
    cluster = Cluster(TxnOffsetCommit=[code])
    with pytest.raises(CommitRejectedError, match="rebalanced"):
        commit(cluster)
    assert "EndTxn" not in cluster.kinds()


@pytest.mark.parametrize("kind", ["AddOffsetsToTxn", "TxnOffsetCommit", "EndTxn"])
@pytest.mark.parametrize("code", [47, 48, 49, 59, 90, 120, -1, 9_999])
def test_whatever_else_a_coordinator_says_ends_the_transaction_at_once(kind: str, code: int) -> None:
    cluster = Cluster(**{kind: [code]})
    with pytest.raises(TransactionAbortedError, match=r"localhost:9092"):
        commit(cluster)
    assert cluster.kinds()[-1] == kind
    assert cluster.kinds().count(kind) == 1


@pytest.mark.parametrize(("kind", "code"), [("AddOffsetsToTxn", 53), ("TxnOffsetCommit", 30), ("EndTxn", 53)])
def test_what_is_not_allowed_is_said_at_once_with_the_transactional_id(kind: str, code: int) -> None:
    cluster = Cluster(**{kind: [code]})
    with pytest.raises(BrokerAuthorizationError, match="transactional id id"):
        commit(cluster)
    assert cluster.kinds().count(kind) == 1


@pytest.mark.parametrize("error", [kafka.TransactionalIdAuthorizationFailed(), kafka.GroupAuthorizationFailedError()])
def test_a_coordinator_that_may_not_be_asked_for_is_no_matter_of_time(error: Exception) -> None:
    cluster = Cluster(lookup=[error])
    began = time.monotonic()
    with pytest.raises(BrokerAuthorizationError, match="transactional id id"):
        commit(cluster)
    assert time.monotonic() - began < KafkaSettings().transaction_timeout_ms / 1_000 / 2
    assert len(cluster.lookups) == 1


def test_of_several_partitions_the_one_that_was_the_reason_is_told() -> None:
    async def add(codes: list[int]) -> None:
        protocol = short(Cluster(AddPartitionsToTxn=[codes]))
        await protocol.add_partitions([TopicPartition("a", 0), TopicPartition("b", 0)])

    with pytest.raises(BrokerAuthorizationError):
        asyncio.run(add([55, 29]))
    with pytest.raises(TransactionAbortedError):
        asyncio.run(add([3, 47]))
    asyncio.run(add([55, 3]))


def test_a_coordinator_that_never_gets_ready_ends_the_transaction_when_its_time_is_over() -> None:
    cluster = Cluster(AddOffsetsToTxn=[51] * 100)
    with pytest.raises(TransactionAbortedError):
        asyncio.run(short(cluster).commit(OFFSETS, MEMBER))
    assert cluster.kinds() == ["AddOffsetsToTxn"] * len(cluster.asked)


def test_a_transaction_that_waits_for_the_end_of_the_last_one_says_what_that_one_waits_for() -> None:
    cluster = Cluster(InitProducerId=[51] * 100, AddOffsetsToTxn=[51] * 100)
    with pytest.raises(BrokerError, match=r"earlier transaction .* min\.insync\.replicas"):
        asyncio.run(short(cluster).begin_epoch())
    with pytest.raises(TransactionAbortedError, match=r"earlier transaction .* min\.insync\.replicas"):
        asyncio.run(short(cluster).commit(OFFSETS, MEMBER))


def test_an_answer_that_does_not_come_ends_the_transaction_when_its_time_is_over() -> None:
    cluster = Cluster()
    cluster.answer = asyncio.Event().wait  # type: ignore[assignment] # which nobody sets
    with pytest.raises(TransactionAbortedError):
        asyncio.run(short(cluster).commit(OFFSETS, MEMBER))
    assert len(cluster.asked) == 1


def test_an_epoch_that_cannot_be_begun_in_time_is_a_broker_that_does_not_answer() -> None:
    cluster = Cluster(InitProducerId=[kafka.KafkaConnectionError("gone")] * 100)
    with pytest.raises(BrokerUnreachableError, match="begin transactions"):
        asyncio.run(short(cluster).begin_epoch())
    assert cluster.asked


def test_a_time_out_that_the_broker_does_not_allow_is_a_setting_to_mend() -> None:
    with pytest.raises(SettingsError, match=r"transaction\.max\.timeout\.ms") as caught:
        asyncio.run(protocol_of(Cluster(InitProducerId=[50])).begin_epoch())
    assert caught.value.setting == "kafka.transaction_timeout_ms"


def test_a_broker_that_does_not_know_a_request_is_told_of_at_once() -> None:
    cluster = Cluster(TxnOffsetCommit=[kafka.IncompatibleBrokerVersion("too old")])
    with pytest.raises(BrokerError, match="too old"):
        commit(cluster)


def test_whoever_cancels_a_commit_is_obeyed_at_once() -> None:
    async def test() -> None:
        cluster, asked = Cluster(), asyncio.Event()

        async def never() -> None:
            asked.set()
            await asyncio.Event().wait()

        cluster.answer = never
        committing = asyncio.create_task(protocol_of(cluster).commit(OFFSETS, MEMBER))
        await asked.wait()
        committing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await committing
        assert len(cluster.asked) == 1

    asyncio.run(test())


def text(value: str) -> bytes:
    """A compact string: its length and one, then its bytes."""
    return bytes([len(value) + 1]) + value.encode()


NO_TAGS = b"\x00"


@pytest.mark.parametrize(("instance", "told"), [(None, b"\x00"), ("pod-0", text("pod-0"))])
def test_offsets_are_committed_in_the_bytes_of_version_3(instance: str | None, told: bytes) -> None:
    member = Membership("group", 5, "member", instance)
    offsets = {TopicPartition("in", 1): 258}
    request = TxnOffsetCommitRequest("id", (7, 3), member, offsets).build(TxnOffsetCommitRequestV3)
    assert request.encode() == b"".join(
        [
            *(text("id"), text("group"), (7).to_bytes(8), (3).to_bytes(2), (5).to_bytes(4), text("member"), told),
            *(b"\x02", text("in")),
            *(b"\x02", (1).to_bytes(4), (258).to_bytes(8), b"\xff" * 4, b"\x01", NO_TAGS),
            *(NO_TAGS, NO_TAGS),
        ]
    )
    answer = b"".join(
        [(0).to_bytes(4), b"\x02", text("in"), b"\x02", (1).to_bytes(4), (22).to_bytes(2), *[NO_TAGS] * 3]
    )
    assert TxnOffsetCommitResponse.decode(io.BytesIO(answer)).topics == [("in", [(1, 22, {})], {})]


def test_stable_offsets_are_asked_for_in_the_bytes_of_version_7() -> None:
    request = StableOffsetFetchRequest("group", [("in", 1)]).build(StableOffsetFetchRequestV7)
    assert request.encode() == b"".join(
        [text("group"), b"\x02", text("in"), b"\x02", (1).to_bytes(4), NO_TAGS, b"\x01", NO_TAGS]
    )
    answer = b"".join(
        [
            *((0).to_bytes(4), b"\x02", text("in")),
            *(b"\x02", (1).to_bytes(4), (258).to_bytes(8), b"\xff" * 4, b"\x00", (88).to_bytes(2), NO_TAGS),
            *(NO_TAGS, (14).to_bytes(2), NO_TAGS),
        ]
    )
    found = StableOffsetFetchResponse.decode(io.BytesIO(answer))
    assert found.topics == [("in", [(1, 258, -1, None, 88, {})], {})]
    assert found.error_code == 14


@pytest.mark.parametrize(
    ("versions", "known"),
    [
        ({28: (0, 3), 9: (1, 7)}, True),
        ({28: (0, 2), 9: (0, 6)}, False),
        ({9: (0, 8)}, False),
        ({28: (4, 5), 9: (1, 9)}, False),
    ],
)
def test_a_broker_says_whether_it_knows_these_versions(versions: dict[int, tuple[int, int]], known: bool) -> None:
    assert are_known(SimpleNamespace(_versions=versions)) == known
