"""A question that every broker can answer is answered while one of them is up."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import errors as kafka

from streamproc.broker.connection import ask_any_broker


@dataclass(frozen=True)
class Broker:
    nodeId: int  # noqa: N815 - aiokafka's name


class Client:
    """aiokafka's client, as far as it is asked here, with some brokers that are down."""

    def __init__(self, nodes: set[int], down: dict[int, BaseException]) -> None:
        self.cluster = SimpleNamespace(brokers=lambda: {Broker(node) for node in nodes})
        self._nodes, self._down = nodes, down
        self.asked: list[int | None] = []

    def get_random_node(self) -> int | None:
        return max(self._nodes, default=None)

    async def send(self, node: int | None, request: Any) -> Any:
        self.asked.append(node)
        if node is None or node in self._down:
            raise self._down.get(node or 0, kafka.NodeNotReadyError())
        return node, request


def test_a_broker_that_is_down_is_passed_over() -> None:
    down: dict[int, BaseException] = {3: kafka.NodeNotReadyError(), 2: kafka.RequestTimedOutError()}
    client = Client({1, 2, 3}, down)
    assert asyncio.run(ask_any_broker(client, "question")) == (1, "question")
    assert client.asked[0] == 3


def test_each_is_asked_once_and_the_last_ones_error_told() -> None:
    client = Client({1, 2, 3}, dict.fromkeys((1, 2, 3), kafka.KafkaConnectionError("down")))
    with pytest.raises(kafka.KafkaConnectionError, match="down"):
        asyncio.run(ask_any_broker(client, "question"))
    assert sorted(client.asked, key=lambda it: it or 0) == [1, 2, 3]


def test_an_answer_that_is_no_is_not_asked_for_again() -> None:
    client = Client({1, 2, 3}, {3: kafka.TopicAuthorizationFailedError()})
    with pytest.raises(kafka.TopicAuthorizationFailedError):
        asyncio.run(ask_any_broker(client, "question"))
    assert client.asked == [3]


def test_without_any_broker_it_is_an_error_that_may_pass() -> None:
    with pytest.raises(kafka.NodeNotReadyError):
        asyncio.run(ask_any_broker(Client(set(), {}), "question"))
