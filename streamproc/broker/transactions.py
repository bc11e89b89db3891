"""The transaction protocol: what a transactional producer and the coordinators of its transactions and group say.

aiokafka's own transactions commit offsets without the generation of the group, so that a member that has lost its
partitions could still commit them; and any answer that it does not know ends its producer for good. So the requests are
made here, one after the other, each tried again while that may help:

    InitProducerId       ends whatever transaction this id has open, and fences every other process that uses the id
    AddPartitionsToTxn   before the first batch for a partition
    AddOffsetsToTxn, TxnOffsetCommit, EndTxn    the commit

Invariant: what is fenced stays fenced. The epoch that InitProducerId brought is part of every request, and so is the
group's generation of every request that commits offsets.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aiokafka import errors as kafka
from aiokafka.client import ConnectionGroup, CoordinationType
from aiokafka.protocol.transaction import (
    AddOffsetsToTxnRequest,
    AddPartitionsToTxnRequest,
    EndTxnRequest,
    InitProducerIdRequest,
)

from streamproc.broker.interface import Membership
from streamproc.broker.privileges import Privilege
from streamproc.broker.transaction_requests import TxnOffsetCommitRequest
from streamproc.broker.translation import brief, rejected, translate
from streamproc.errors import BrokerError, SettingsError, TransactionAbortedError
from streamproc.records import TopicPartition
from streamproc.settings import KafkaSettings

FIRST_PAUSE_S = 0.005
"""The markers of the last transaction are written in about this time; until then the next one may not begin."""
MAX_PAUSE_S = 0.5
_COMMIT = 1

_NO_ERROR = 0
_UNKNOWN_TOPIC_OR_PARTITION = 3
_REQUEST_TIMED_OUT = 7
_COORDINATOR_LOADING = 14
_COORDINATOR_NOT_AVAILABLE = 15
_NOT_COORDINATOR = 16
_ILLEGAL_GENERATION = 22
_UNKNOWN_MEMBER = 25
_REBALANCE_IN_PROGRESS = 27
_TOPIC_NOT_AUTHORIZED = 29
_GROUP_NOT_AUTHORIZED = 30
_INVALID_TRANSACTION_TIMEOUT = 50
_CONCURRENT_TRANSACTIONS = 51
_TRANSACTIONAL_ID_NOT_AUTHORIZED = 53
_OPERATION_NOT_ATTEMPTED = 55
_FENCED_INSTANCE = 82

_AGAIN = frozenset(
    {
        _UNKNOWN_TOPIC_OR_PARTITION,
        _REQUEST_TIMED_OUT,
        _COORDINATOR_LOADING,
        _COORDINATOR_NOT_AVAILABLE,
        _NOT_COORDINATOR,
        _CONCURRENT_TRANSACTIONS,
    }
)
_ELSEWHERE = frozenset({_REQUEST_TIMED_OUT, _COORDINATOR_NOT_AVAILABLE, _NOT_COORDINATOR})
_MOVED_ON = frozenset({_ILLEGAL_GENERATION, _UNKNOWN_MEMBER, _REBALANCE_IN_PROGRESS, _FENCED_INSTANCE})
_NOT_ALLOWED = frozenset({_TOPIC_NOT_AUTHORIZED, _GROUP_NOT_AUTHORIZED, _TRANSACTIONAL_ID_NOT_AUTHORIZED})
_MAY_NOT_LOOK = (kafka.GroupAuthorizationFailedError, kafka.TransactionalIdAuthorizationFailed)
"""What comes of asking for a coordinator."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Question:
    """A request, whom to ask, what for, and where the error codes of the answer are."""

    kind: int
    key: str
    request: Any
    doing: str
    codes: Callable[[Any], Iterable[int]]
    needs: Iterable[Privilege] = ()
    """Privileges, beside that to write as the transactional id."""


class TransactionProtocol:
    """The requests of one transactional id, over one aiokafka client.

    Args:
        client: An aiokafka client that is connected; it stays its owner's.
        settings: How the broker was to be reached, for messages and time-outs.
        transactional_id: Whose transactions.
    """

    def __init__(self, client: Any, settings: KafkaSettings, transactional_id: str) -> None:
        self._client = client
        self._settings = settings
        self._id = transactional_id
        self._coordinators: dict[tuple[int, str], int] = {}
        self._producer = (-1, -1)

    async def begin_epoch(self) -> tuple[int, int]:
        """End what this id has open, fence others that use it, and return the producer's id and epoch.

        Raises:
            SettingsError: the broker allows no transactions as long as ``kafka.transaction_timeout_ms``.
            BrokerError: the broker refuses, or did not answer within ``kafka.request_timeout_ms``.
        """
        doing = "begin transactions"
        request = InitProducerIdRequest(self._id, self._settings.transaction_timeout_ms)
        response = await self._ask(
            _Question(CoordinationType.TRANSACTION, self._id, request, doing, _single_code),
            self._settings.request_timeout_ms / 1_000,
            lambda error: translate(error, self._settings, doing=doing),
        )
        self._producer = (response.producer_id, response.producer_epoch)
        return self._producer

    async def add_partitions(self, partitions: Iterable[TopicPartition]) -> None:
        """Announce partitions that the transaction will write to. Raises BrokerError, TransactionAbortedError."""
        topics: defaultdict[str, list[int]] = defaultdict(list)
        for topic, partition in partitions:
            topics[topic].append(partition)
        request = AddPartitionsToTxnRequest(self._id, *self._producer, list(topics.items()))
        doing = f"write to topic {', '.join(topics)} in a transaction"
        needs = [Privilege("Write", "Topic", topic) for topic in topics]
        await self._transact(_Question(CoordinationType.TRANSACTION, self._id, request, doing, _added_codes, needs))

    async def commit(self, offsets: Mapping[TopicPartition, int], member: Membership) -> None:
        """Commit offsets for a member of a group, and the transaction.

        Raises CommitRejectedError, TransactionAbortedError, BrokerAuthorizationError.
        """
        if offsets:
            group = member.group_id
            doing = f"commit offsets of group {group} in a transaction"
            needs = [Privilege("Read", "Group", group), *(Privilege("Read", "Topic", topic) for topic, _ in offsets)]
            add = AddOffsetsToTxnRequest(self._id, *self._producer, group)
            await self._transact(_Question(CoordinationType.TRANSACTION, self._id, add, doing, _single_code, needs))
            commit = TxnOffsetCommitRequest(self._id, self._producer, member, offsets)
            await self._transact(_Question(CoordinationType.GROUP, group, commit, doing, _offset_codes, needs))
        end = EndTxnRequest(self._id, *self._producer, _COMMIT)
        doing = "commit a transaction"
        await self._transact(_Question(CoordinationType.TRANSACTION, self._id, end, doing, _single_code))

    async def _transact(self, question: _Question) -> None:
        """Ask within the open transaction; after its time-out the coordinator has given the transaction up."""
        limit_s = self._settings.transaction_timeout_ms / 1_000
        await self._ask(question, limit_s, lambda error: aborted(question.doing, self._settings, error))

    async def _ask(self, question: _Question, limit_s: float, late: Callable[[BaseException], BrokerError]) -> Any:
        """An answer without errors, after as many attempts as the time allows; then the error that ``late`` makes."""
        kind, key, doing = question.kind, question.key, question.doing
        loop = asyncio.get_running_loop()
        deadline, pause_s = loop.time() + limit_s, FIRST_PAUSE_S
        while True:
            problem: BaseException
            try:
                async with asyncio.timeout_at(deadline):
                    node = await self._coordinator(kind, key)
                    response = await self._client.send(node, question.request, group=ConnectionGroup.COORDINATION)
            except kafka.IncompatibleBrokerVersion as error:
                raise translate(error, self._settings, doing=doing) from error
            except _MAY_NOT_LOOK as error:
                raise self._final(error.errno, error, question) from error
            except (OSError, kafka.KafkaError) as error:
                self._coordinators.pop((kind, key), None)
                problem = error
            else:
                found = [code for code in question.codes(response) if code != _NO_ERROR]
                if not found:
                    return response
                if any(code in _ELSEWHERE for code in found):
                    self._coordinators.pop((kind, key), None)
                # Of several, the one that says most: what was not attempted failed because of another.
                reasons = [code for code in found if code != _OPERATION_NOT_ATTEMPTED] or found
                code = next((it for it in reasons if it not in _AGAIN), reasons[0])
                problem = kafka.for_code(code)(f"error code {code}")
                if code not in _AGAIN:
                    raise self._final(code, problem, question)
            if loop.time() + pause_s > deadline:
                raise late(problem) from problem
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, MAX_PAUSE_S)

    async def _coordinator(self, kind: int, key: str) -> int:
        node = self._coordinators.get((kind, key))
        if node is None:
            node = await self._client.coordinator_lookup(kind, key)
            self._coordinators[kind, key] = node
        return node

    def _final(self, code: int, error: BaseException, question: _Question) -> BrokerError | SettingsError:
        doing = question.doing
        if code in _MOVED_ON:
            return rejected(doing, self._settings)
        if code in _NOT_ALLOWED:
            needs = [Privilege("Write", "TransactionalId", self._id), *question.needs]
            return translate(error, self._settings, doing=f"{doing} (transactional id {self._id})", needs=needs)
        if code == _INVALID_TRANSACTION_TIMEOUT:
            where = self._settings.bootstrap_servers
            return SettingsError(
                f"{self._settings.transaction_timeout_ms} is more than Kafka at {where} allows",
                setting="kafka.transaction_timeout_ms",
                hint="lower it, or raise the brokers' transaction.max.timeout.ms",
            )
        return aborted(doing, self._settings, error)


def aborted(doing: str, settings: KafkaSettings, error: BaseException) -> TransactionAbortedError:
    """The error for a transaction that cannot go on."""
    return TransactionAbortedError(
        f"could not {doing}: Kafka at {settings.bootstrap_servers} has ended the transaction, or did not answer in "
        f"time ({brief(error)}); nothing of it is visible, and its records are processed again",
        bootstrap_servers=settings.bootstrap_servers,
    )


def _single_code(response: Any) -> Iterable[int]:
    return (response.error_code,)


def _added_codes(response: Any) -> Iterable[int]:
    return [code for _, partitions in response.errors for _, code in partitions]


def _offset_codes(response: Any) -> Iterable[int]:
    return [code for _, partitions, _ in response.topics for _, code, _ in partitions]
