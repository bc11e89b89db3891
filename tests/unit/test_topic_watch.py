"""What a client makes of its topics' coming and going; and that it asks for metadata at a sane rate."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.broker.connection import pace_metadata
from streamproc.broker.topic_watch import LOOKS, Found, InputTopics, OutputTopics, TopicState
from streamproc.errors import TopicMissingError
from streamproc.settings import KafkaSettings

SETTINGS = KafkaSettings(request_timeout_ms=8_000)
OLD, NEW = TopicState(b"old", 6), TopicState(b"new", 6)
LARGER, SMALLER = TopicState(b"old", 9), TopicState(b"new", 2)
looks = st.lists(st.sampled_from([None, OLD, NEW, LARGER, SMALLER]), max_size=12)


def test_an_input_topic_that_one_broker_has_not_heard_of_is_looked_for_again() -> None:
    topics = InputTopics(SETTINGS)
    for state in (OLD, None, OLD, None, OLD):
        assert topics.seen({"in": state}) == set()


def test_an_input_topic_that_stays_away_ends_the_reading() -> None:
    topics = InputTopics(SETTINGS)
    topics.seen({"in": OLD, "other": OLD})
    topics.seen({"in": None, "other": OLD})
    with pytest.raises(TopicMissingError, match="topic in does not exist any more") as caught:
        topics.seen({"in": None, "other": OLD})
    assert caught.value.topics == ("in",)


def test_an_input_topic_that_is_another_one_by_the_same_name_ends_the_reading() -> None:
    topics = InputTopics(SETTINGS)
    topics.seen({"in": OLD})
    with pytest.raises(TopicMissingError, match="deleted and created anew"):
        topics.seen({"in": NEW})


def test_an_input_topic_that_has_grown_is_told_once() -> None:
    topics = InputTopics(SETTINGS)
    assert [topics.seen({"in": state}) for state in (OLD, LARGER, LARGER)] == [set(), {"in"}, set()]


@given(looks)
def test_reading_goes_on_exactly_while_the_topic_is_the_first_one_that_was_seen(
    states: list[TopicState | None],
) -> None:
    topics, first, missed, ended = InputTopics(SETTINGS), None, 0, False
    for state in states:
        missed = missed + 1 if state is None else 0
        first = first or state
        expected = missed >= LOOKS or (state is not None and first is not None and state.topic_id != first.topic_id)
        try:
            topics.seen({"in": state})
        except TopicMissingError:
            ended = True
        assert ended == expected
        if ended:
            break


class Outputs:
    def __init__(self) -> None:
        self.now = 0.0
        self.topics = OutputTopics(SETTINGS, lambda: self.now)

    def see(self, state: TopicState | None) -> None:
        found: Found = {"out": state}
        self.topics.seen(found)

    def hopeless(self, *, patient: bool = True) -> bool:
        return self.topics.is_hopeless("out", patient=patient)


def test_an_output_topic_is_waited_for_as_long_as_a_request_may_take() -> None:
    outputs = Outputs()
    outputs.see(OLD)
    assert not outputs.hopeless(patient=False)
    outputs.see(None)
    assert not outputs.hopeless()
    assert outputs.hopeless(patient=False), "what can be lost does not wait"
    outputs.now = 7.9
    assert not outputs.hopeless()
    outputs.see(NEW)
    outputs.now = 100.0
    assert not outputs.hopeless()
    outputs.see(None)
    outputs.now = 108.0
    assert outputs.hopeless()
    assert "topic out does not exist" in str(outputs.topics.error("out"))


def test_an_output_topic_that_lost_partitions_is_as_good_as_missing() -> None:
    outputs = Outputs()
    outputs.see(OLD)
    outputs.see(SMALLER)
    outputs.now = 8.0
    assert outputs.hopeless()
    assert "topic out has 2 partitions and had 6" in str(outputs.topics.error("out"))
    outputs.see(NEW)
    assert not outputs.hopeless()


@given(looks)
def test_an_output_topic_is_missing_exactly_while_it_is_not_what_it_was(states: list[TopicState | None]) -> None:
    outputs, most = Outputs(), 0
    for state in states:
        outputs.see(state)
        missing = state is None or state.partitions < most
        assert outputs.topics.is_missing("out") == missing
        if not missing and state is not None:
            most = state.partitions


def test_metadata_is_asked_for_ten_times_a_second_at_most_whatever_asks_for_it() -> None:
    asked: list[float] = []

    async def test() -> None:
        loop = asyncio.get_running_loop()

        async def update(*_: Any) -> bool:
            asked.append(loop.time())
            return False

        client = SimpleNamespace(_metadata_update=update)
        pace_metadata(client)
        for _ in range(4):
            assert await client._metadata_update(None, None) is False

    asyncio.run(test())
    assert all(later - earlier >= 0.099 for earlier, later in itertools.pairwise(asked))
