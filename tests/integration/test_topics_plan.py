"""Plans against real brokers: what is applied is what was planned, and nothing is left to plan."""

from __future__ import annotations

import pytest

from streamproc.broker.client import KafkaAdmin
from streamproc.broker.topics import DeclaredTopic, Plan, apply, implied_topics, plan
from streamproc.errors import BrokerError
from streamproc.settings import KafkaSettings, Settings
from tests.conftest import Run, TopicName


async def planned(admin: KafkaAdmin, *declared: DeclaredTopic) -> Plan:
    return await plan({topic.name: topic for topic in declared}, admin)


def test_a_topic_is_created_grown_and_configured_and_each_time_nothing_is_left(
    kafka: str, topic_name: TopicName, run: Run
) -> None:
    async def main() -> None:
        name = topic_name()
        first = DeclaredTopic(name, 2, configs={"retention.ms": "86400000", "cleanup.policy": "delete"})
        grown = DeclaredTopic(name, 4, configs={"retention.ms": "-1", "max.message.bytes": "2000000"})
        async with KafkaAdmin(KafkaSettings(bootstrap_servers=kafka)) as admin:
            for declared, actions in (
                (first, ["create"]),
                (grown, ["add partitions", "configure", "configure"]),
            ):
                it = await planned(admin, declared)
                assert [change.action for change in it.changes] == actions
                assert not it.destructive
                applied = await apply(it, admin)
                assert len(applied.done) == len(actions)
                assert (await planned(admin, declared)).changes == ()
            assert (await admin.topics())[name].partitions == 4
            configs = await admin.describe_configs(name)
            assert configs["retention.ms"].value == "-1"
            assert configs["max.message.bytes"].value == "2000000"
            assert configs["cleanup.policy"].value == "delete"
            await admin.delete_topics([name])

    run(main())


def test_what_could_lose_records_is_refused_until_allowed(kafka: str, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        name = topic_name()
        kept = DeclaredTopic(name, 1, configs={"retention.ms": "86400000", "cleanup.policy": "delete"})
        risky = DeclaredTopic(name, 2, configs={"retention.ms": "3600000", "cleanup.policy": "compact"})
        async with KafkaAdmin(KafkaSettings(bootstrap_servers=kafka)) as admin:
            await apply(await planned(admin, kept), admin)
            applied = await apply(await planned(admin, risky), admin)
            assert [change.setting for change in applied.done] == ["partitions"]
            assert [change.setting for change in applied.refused] == ["cleanup.policy", "retention.ms"]
            configs = await admin.describe_configs(name)
            assert (configs["retention.ms"].value, configs["cleanup.policy"].value) == ("86400000", "delete")
            applied = await apply(await planned(admin, risky), admin, allow_destructive=True)
            assert applied.refused == ()
            assert (await planned(admin, risky)).changes == ()
            await admin.delete_topics([name])

    run(main())


def test_fewer_partitions_and_other_replication_are_shown_and_never_applied(
    kafka: str, topic_name: TopicName, run: Run
) -> None:
    async def main() -> None:
        name = topic_name()
        async with KafkaAdmin(KafkaSettings(bootstrap_servers=kafka)) as admin:
            await apply(await planned(admin, DeclaredTopic(name, 3)), admin)
            it = await planned(admin, DeclaredTopic(name, 1, replication=3))
            assert it.empty
            assert [change.setting for change in it.drift] == ["partitions", "replication"]
            applied = await apply(it, admin, allow_destructive=True)
            assert (applied.done, applied.refused) == ((), ())
            await admin.delete_topics([name])

    run(main())


def test_a_setting_that_kafka_does_not_know_is_refused_in_one_sentence(
    kafka: str, topic_name: TopicName, run: Run
) -> None:
    async def main() -> None:
        name = topic_name()
        async with KafkaAdmin(KafkaSettings(bootstrap_servers=kafka)) as admin:
            it = await planned(admin, DeclaredTopic(name, configs={"retention.parsecs": "12"}))
            with pytest.raises(BrokerError, match=rf"could not create topic {name}: .*retention\.parsecs"):
                await apply(it, admin)

    run(main())


def test_the_topics_of_a_task_are_made_to_fit_its_input(kafka: str, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        name = topic_name()
        settings = Settings.model_validate(
            {"name": name, "backend": {"path": "m:B"}, "tasks": {"text": {"input": {"topics": [name]}}}}
        )
        async with KafkaAdmin(KafkaSettings(bootstrap_servers=kafka)) as admin:
            await apply(await planned(admin, DeclaredTopic(name, 3)), admin)
            implied = implied_topics(settings, {}, await admin.topics())
            assert len((await apply(await plan(implied, admin), admin)).done) == 3
            there = await admin.topics()
            assert {topic: there[topic].partitions for topic in implied if topic != name} == {
                f"{name}.results": 3,
                f"{name}.dead": 3,
                f"{name}.metrics": 1,
            }
            largest = await admin.max_message_bytes(name)
            room = await admin.max_message_bytes(f"{name}.dead")
            assert largest is not None
            assert room is not None
            assert room > largest
            assert (await plan(implied_topics(settings, {}, there), admin)).changes == ()
            await admin.delete_topics([name, *[topic for topic in implied if topic != name]])

    run(main())


def test_the_embedded_broker_takes_what_it_can(embedded_broker: str, topic_name: TopicName, run: Run) -> None:
    async def main() -> None:
        name = topic_name()
        async with KafkaAdmin(KafkaSettings(bootstrap_servers=embedded_broker)) as admin:
            declared = DeclaredTopic(name, 2, configs={"retention.ms": "86400000"})
            await apply(await planned(admin, declared), admin)
            assert (await planned(admin, declared)).changes == ()
            changed = DeclaredTopic(name, 2, configs={"retention.ms": "-1", "max.message.bytes": "5000"})
            await apply(await planned(admin, changed), admin)
            assert (await planned(admin, changed)).changes == ()
            with pytest.raises(BrokerError, match="the embedded broker cannot; restart it"):
                await apply(await planned(admin, DeclaredTopic(name, 4)), admin)

    run(main())
