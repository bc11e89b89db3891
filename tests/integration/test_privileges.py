"""A Kafka with SASL_SSL and ACLs: each command works with the privileges that its table names, and says what it lacks.

Each command runs as a user of its own who has exactly what ``broker.privileges`` lists; and once more for every single
one of them as a user who has all but that. All are granted before the first command runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.admin import CreateAclsRequest, DescribeAclsRequest

from deploy.kafka.kafka import KafkaCluster, Tls
from streamproc.broker.admin import KafkaAdmin
from streamproc.broker.client import probe
from streamproc.broker.privileges import NEEDS, AclOperation, Need, Privilege
from streamproc.cli import root
from streamproc.errors import BrokerAuthenticationError, BrokerAuthorizationError
from streamproc.records import TopicPartition
from streamproc.runtime.app import Application
from streamproc.settings import KafkaSettings
from streamproc.settings_loading import load_settings
from streamproc.stats import app as stats_app
from streamproc.stats.app import StatsApp
from streamproc.stats.run import prepare
from tests.conftest import Run
from tests.support.app import ROOT, App, create, kafka_settings, produce, read_to_end
from tests.support.certificates import Authority, Signed

PASSWORD = "of-a-broker-on-loopback"  # noqa: S105 - no secret
WRONG_PASSWORD = "not-that-of-anybody"  # noqa: S105 - as above
RESOURCES = {"Topic": 2, "Group": 3, "Cluster": 4, "TransactionalId": 5}
OPERATIONS = {
    "Read": 3,
    "Write": 4,
    "Create": 5,
    "Delete": 6,
    "Alter": 7,
    "Describe": 8,
    "DescribeConfigs": 10,
    "AlterConfigs": 11,
}
"""As Kafka numbers them."""
INCLUDED: Mapping[tuple[str, str], AclOperation] = {
    ("topics apply", "Alter"): "Describe",
    ("topics apply", "AlterConfigs"): "DescribeConfigs",
    ("dlq redrive", "Read"): "Describe",
}
"""What stays where the first is taken away that includes it: the command would not come to need that otherwise."""
STOP_S = 10.0
ANY, LITERAL, PREFIXED, ALLOW = 1, 3, 4, 3
TOPICS = {"in": 1, "in.results": 1, "metrics": 1, "copy": 1}


@dataclass(frozen=True)
class Case:
    """A command, run by a user who has everything that it needs but, where ``lacks`` says one, a single privilege."""

    command: str
    lacks: Need | None
    user: str

    def __str__(self) -> str:
        return f"{self.command} without {self.lacks.operation} of {self.lacks.of}" if self.lacks else self.command

    @property
    def runs(self) -> bool:
        return self.command.startswith("run")

    @property
    def goes_on(self) -> bool:
        return self.runs or self.command == "stats"


CASES = [
    Case(command, lacks, f"user-{number}-{index}")
    for number, (command, needs) in enumerate(NEEDS.items())
    for index, lacks in enumerate([None, *needs])
]


def names(case: Case) -> dict[str, list[str]]:
    """What the words of the table mean here."""
    group = f"{case.user}.main"
    return {
        "input": ["in"],
        "results": ["in.results"],
        "dead letters": ["in.dead"],
        "metrics": ["metrics"],
        "group": [group],
        "group of the statistics": [f"{case.user}-stats"],
        "changelog": [f"{case.user}-stats-metrics-changelog"],
        "closed windows": [f"{case.user}.stats"],
        "waited for": [group],
        "progress": [f"{case.user}.in.dead.redrive"],
        # A settings file declares those of its tasks.
        "declared": [f"{case.user}.grows", f"{case.user}.new", *TOPICS, "in.dead"],
        "deleted": [f"{case.user}.goes"],
        "written": ["copy"],
        "read": ["in"],
        "captured": ["in"],
        "compared": ["in.results"],
    }


def privileges(case: Case) -> Iterator[tuple[Privilege, bool]]:
    for need in NEEDS[case.command]:
        if need is not case.lacks:
            for name in names(case)[need.of]:
                yield Privilege(need.operation, need.resource, name), need.prefixed
        elif (case.command, need.operation) in INCLUDED:
            for name in names(case)[need.of]:
                yield Privilege(INCLUDED[case.command, need.operation], need.resource, name), False


@dataclass(frozen=True)
class Secured:
    """The cluster, and how to reach it."""

    cluster: KafkaCluster
    authority: Authority
    client: Signed

    def kafka(self, user: str, **more: Any) -> dict[str, Any]:
        return {
            "bootstrap_servers": self.cluster.tls_bootstrap_servers("SASL_SSL"),
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_username": user,
            "sasl_password": PASSWORD,
            "ssl_ca_file": str(self.authority.certificate),
            "connect_timeout_s": 10,
            "request_timeout_ms": 8_000,
            **more,
        }

    def settings(self, case: Case) -> dict[str, Any]:
        return {
            "name": case.user,
            "kafka": self.kafka(case.user),
            "backend": {"path": "tests.support.backends:Identity", "base_dir": str(ROOT)},
            "pool": {"workers": 1},
            "tasks": {
                "main": {
                    "input": {"topics": ["in"]},
                    "metrics": {"topic": "metrics"},
                    "batch": {"max_wait_ms": 5},
                    "delivery": "exactly_once" if "exactly_once" in case.command else "at_least_once",
                }
            },
            "http": {"port": 0},
        }


@pytest.fixture(scope="module")
def secured(kafka_available: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:  # noqa: ARG001
    folder = tmp_path_factory.mktemp("certificates")
    authority = Authority(folder)
    cluster = KafkaCluster(
        tmp_path_factory.mktemp("kafka"),
        sasl=True,
        tls=Tls(authority.sign("node").both, authority.certificate),
        users={case.user: PASSWORD for case in CASES},
        properties={
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "allow.everyone.if.no.acl.found": "false",
            # The broker itself, and what these tests set up, by the plain-text listener on loopback.
            "super.users": "User:ANONYMOUS",
        },
    )
    with cluster:
        grown = {
            f"{case.user}.{name}": 1
            for case in CASES
            if case.command.startswith("topics")
            for name in ("grows", "goes")
        }
        create(cluster.bootstrap_servers, TOPICS | grown)
        create(cluster.bootstrap_servers, {"in.dead": 1}, **{"max.message.bytes": "2000000"})
        asyncio.run(grant(cluster.bootstrap_servers))
        yield Secured(cluster, authority, authority.sign("client"))


class ManyAcls(CreateAclsRequest):  # type: ignore[misc] # aiokafka ships no types
    """aiokafka's request is for one; one after the other they take 12 s."""

    def __init__(self, wanted: set[tuple[str, int, str, int, int]]) -> None:
        self._wanted = wanted

    def build(self, request_struct_class: Any) -> Any:
        return request_struct_class(
            [
                (resource, name, pattern, f"User:{user}", "*", operation, ALLOW)
                for user, resource, name, operation, pattern in self._wanted
            ]
        )


async def grant(kafka: str) -> None:
    """Grant all of it, and wait until the broker knows."""
    client = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await client.start()
    wanted = {
        (case.user, RESOURCES[it.resource], it.name, OPERATIONS[it.operation], PREFIXED if prefixed else LITERAL)
        for case in CASES
        for it, prefixed in privileges(case)
    }
    # By certificates one is somebody else.
    wanted.add(("CN=client", RESOURCES["Topic"], "in", OPERATIONS["Read"], LITERAL))
    try:
        answer = await client._send_request(ManyAcls(wanted))
        assert not any(code for code, _ in answer.creation_responses), answer
        deadline = time.monotonic() + 20
        known = 0
        while known < len(wanted):
            assert time.monotonic() < deadline, f"{known} of {len(wanted)} privileges are known"
            answer = await client._send_request(DescribeAclsRequest(ANY, None, ANY, None, None, ANY, ANY))
            known = sum(len(acls) for *_, acls in answer.resources)
    finally:
        await client.close()


@dataclass(frozen=True)
class Said:
    """What a command ended with."""

    code: int
    out: str
    err: str


class Commands:
    """Runs commands as the user of a case, in this process."""

    def __init__(self, secured: Secured, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self._secured = secured
        self._folder = folder
        self._capture = capture

    def __call__(self, case: Case, *arguments: str) -> Said:
        file = self._folder / f"{case.user}.yaml"
        file.write_text(yaml.safe_dump(self._secured.settings(case)))
        self._capture.readouterr()
        with pytest.raises(SystemExit) as caught:
            root.command()(args=[*arguments, "-c", str(file)], prog_name="streamproc")
        assert isinstance(caught.value.code, int)
        return Said(caught.value.code, *self._capture.readouterr())


@pytest.fixture
def run_as(
    secured: Secured, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Commands:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "10000")
    return Commands(secured, tmp_path, capfd)


@pytest.fixture(scope="module")
def processed(secured: Secured, tmp_path_factory: pytest.TempPathFactory) -> Secured:
    """Both kinds of processor ran on the stream, with their privileges and no others: there are results, a dead letter
    that one of the two has sent, and committed offsets."""
    kafka = secured.cluster.bootstrap_servers
    produce(kafka, "in", {0: [(b"k", b'{"id": %d}' % number) for number in range(5)] + [(b"k", b"no JSON")]})
    with ExitStack() as stack:
        apps = [
            stack.enter_context(App(tmp_path_factory.mktemp("app"), secured.settings(case)))
            for case in CASES
            if case.runs and case.lacks is None
        ]
        for app in apps:
            app.until(lambda status: status["tasks"]["main"]["counts"]["out"] == 5, "everything is processed")
        for app in apps:
            assert app.terminate() == 0, app.log()
            assert "does not allow" not in app.log()
    assert len(read_to_end(kafka, "in.results", 1)) == 2 * 5
    assert len(read_to_end(kafka, "in.dead", 1)) == 2
    for case in CASES:
        if "--wait-for" in case.command:
            asyncio.run(commit(kafka, f"{case.user}.main", TopicPartition("copy", 0), 1_000))
    return secured


async def commit(kafka: str, group: str, partition: TopicPartition, offset: int) -> None:
    async with KafkaAdmin(kafka_settings(kafka)) as admin:
        await admin.commit(group, {partition: offset})


def arguments(case: Case, folder: Path) -> list[str]:
    """The command line of a case, without its settings."""
    topics, records, captured = folder / "topics", folder / "records.jsonl", folder / "captured.jsonl"
    topics.mkdir()
    declared = (
        {"grows": {"partitions": 2, "retention": "9d"}, "new": {}} if case.command == "topics apply" else {"grows": {}}
    )
    for name, more in declared.items():
        (topics / f"{name}.yaml").write_text(yaml.safe_dump({"topic": f"{case.user}.{name}", **more}))
    records.write_text('{"id": 1}\n')
    captured.write_text(CAPTURED)
    replay = ["replay", "run", str(captured), "--to", "copy", "--as-fast-as-possible"]
    group = f"{case.user}.main"
    return {
        "topics plan": ["topics", "plan", "--dir", str(topics)],
        "topics apply": ["topics", "apply", "--yes", "--dir", str(topics)],
        "topics apply --delete": [
            *("topics", "apply", "--yes", "--dir", str(topics)),
            *("--delete", f"{case.user}.goes", "--allow-destructive"),
        ],
        "produce": ["produce", "copy", str(records)],
        "consume": ["consume", "in", "-n", "3"],
        "lag": ["lag"],
        "dlq list": ["dlq", "list"],
        "dlq show": ["dlq", "show", "in.dead:0:0"],
        "dlq redrive": ["dlq", "redrive", "--yes", "--limit", "1"],
        "replay capture": ["replay", "capture", "in", "-o", str(folder / "in.jsonl")],
        "replay run": replay,
        "replay run --wait-for": [*replay, "--wait-for", group, "--wait-timeout", "5"],
        "replay diff": ["replay", "diff", "in.results", "in.results"],
        "replay shadow": [
            *("replay", "shadow", "--backend", "tests.support.backends:Identity"),
            *("--from", "beginning", "-n", "3"),
        ],
    }[case.command]


CAPTURED = (
    '{"topic":"elsewhere","partition":0,"offset":0,"timestamp":1000,"timestamp_type":"create","key":null,"headers":[],'
    '"value":{"id":1}}\n'
)
"""Of a time before everything that a topic keeps."""


@pytest.mark.parametrize("case", [case for case in CASES if not case.goes_on], ids=str)
def test_a_command_works_with_its_privileges_and_says_which_one_it_lacks(
    processed: Secured,  # noqa: ARG001
    run_as: Commands,
    tmp_path: Path,
    case: Case,
) -> None:
    began = time.monotonic()
    said = run_as(case, *arguments(case, tmp_path))
    took_s = time.monotonic() - began
    if case.lacks is None:
        assert said.code == 0, said
        assert "does not allow" not in said.err
        return
    refusals = [line for line in said.err.splitlines() if "does not allow" in line]
    assert len(refusals) == 1, said
    check_sentence(refusals[0], case)
    if case.lacks.without:
        assert said.code == 0
    else:
        assert said.code == 1
        assert refusals == [said.err.splitlines()[-1]]
        assert took_s < 5


def check_sentence(told: str, case: Case) -> None:
    """It names the user, the operation and the resource, and says what to do."""
    assert case.lacks is not None
    assert f"grant {case.user} " in told
    resources = names(case)[case.lacks.of]
    assert any(f"{case.lacks.operation} on {case.lacks.resource} {it}" in told for it in resources), told
    assert "with an ACL (docs/security.md" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("case", [case for case in CASES if case.runs and case.lacks], ids=str)
def test_a_processor_says_which_privilege_it_lacks(
    processed: Secured, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: Case
) -> None:
    file = tmp_path / "streamproc.yaml"
    file.write_text(yaml.safe_dump(processed.settings(case)))
    assert case.lacks is not None
    caplog.set_level("WARNING", "streamproc.broker.producer")  # commands that ran before in this process say less

    async def main() -> None:
        application = Application(load_settings(file, {}))
        try:
            await application.start()
            await application.processor.until_ready()
        finally:
            await application.stop()

    if case.lacks.without:
        run(main())
        (told,) = [
            it.getMessage()
            for it in caplog.records
            if it.levelname == "WARNING" and "does not allow" in it.getMessage()
        ]
    else:
        with pytest.raises(BrokerAuthorizationError) as caught:
            run(main())
        assert caught.value.exit_code == 1
        told = str(caught.value)
    check_sentence(told, case)


@pytest.mark.parametrize("case", [it for it in CASES if it.command == "stats"], ids=str)
def test_the_statistics_work_with_their_privileges_and_say_which_one_they_lack(
    processed: Secured, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    monkeypatch.setattr(stats_app, "QUIET_S", 1.0)
    file = tmp_path / "streamproc.yaml"
    file.write_text(yaml.safe_dump({**processed.settings(case), "stats": {"port": 0, "grace_s": 1}}))
    settings = load_settings(file, {})

    async def main() -> None:
        partitions = await prepare(settings)
        app = StatsApp(settings, partitions, embedded=False, wall_clock=lambda: time.time() + 4_000)
        running = asyncio.ensure_future(app.run())
        closed = TopicPartition(settings.stats_topic, 0)
        try:
            async with KafkaAdmin(kafka_settings(processed.cluster.bootstrap_servers)) as admin:
                # Closed, since the clock is an hour ahead: one window of each width at least.
                await until_async(running, admin, closed)
        finally:
            async with asyncio.timeout(STOP_S):
                await app.stop()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    if case.lacks is None:
        run(main())
        return
    with pytest.raises(BrokerAuthorizationError) as caught:
        run(main())
    check_sentence(str(caught.value), case)


async def until_async(running: asyncio.Future[None], admin: KafkaAdmin, closed: TopicPartition) -> None:
    """Until something is in the topic of closed windows, or the statistics have ended."""
    deadline = time.monotonic() + 25
    while not running.done() and not (await admin.end_offsets([closed]))[closed]:
        assert time.monotonic() < deadline, "no window is closed, and nothing is said"
        await asyncio.wait({running}, timeout=0.1)
    if running.done():
        running.result()


# -- who one is


def test_a_user_logs_in_over_tls_by_each_mechanism(secured: Secured, run: Run) -> None:
    for mechanism in ("SCRAM-SHA-512", "PLAIN"):
        settings = KafkaSettings(**secured.kafka(CASES[0].user, sasl_mechanism=mechanism))
        assert run(probe(settings)).brokers == 1


def test_a_client_certificate_is_a_user_with_privileges_of_its_own(secured: Secured, run: Run) -> None:
    async def ends(topic: str) -> Mapping[TopicPartition, int]:
        async with KafkaAdmin(KafkaSettings(**by_certificate(secured))) as admin:
            return await admin.end_offsets([TopicPartition(topic, 0)])

    assert list(run(ends("in"))) == [TopicPartition("in", 0)]
    with pytest.raises(
        BrokerAuthorizationError, match=r"grant the user of kafka\.ssl_cert_file Read on Topic in\.dead "
    ):
        run(ends("in.dead"))


def by_certificate(secured: Secured, **more: Any) -> dict[str, Any]:
    return {
        "bootstrap_servers": secured.cluster.tls_bootstrap_servers("SSL"),
        "security_protocol": "SSL",
        "ssl_ca_file": str(secured.authority.certificate),
        "ssl_cert_file": str(secured.client.certificate),
        "ssl_key_file": str(secured.client.key),
        **more,
    }


WRONG: Mapping[str, tuple[Callable[[Secured, Authority], dict[str, Any]], str]] = {
    "a wrong password": (
        lambda it, _: it.kafka(CASES[0].user, sasl_password=WRONG_PASSWORD),
        r"refuses the connection: .*kafka\.sasl_username \(user-0-0\), kafka\.sasl_password",
    ),
    "a wrong password, by PLAIN": (
        lambda it, _: it.kafka(CASES[0].user, sasl_password=WRONG_PASSWORD, sasl_mechanism="PLAIN"),
        r"refuses the connection: .*kafka\.sasl_username \(user-0-0\), kafka\.sasl_password",
    ),
    "an authority that did not sign": (
        lambda it, other: it.kafka(CASES[0].user, ssl_ca_file=str(other.certificate)),
        r"127\.0\.0\.1:\d+ has a certificate that is not trusted .*set kafka\.ssl_ca_file to the authority",
    ),
    "another name than the certificate's": (
        lambda it, _: it.kafka(CASES[0].user, bootstrap_servers=elsewhere(it)),
        r"localhost:\d+ has a certificate that is not for that name .*kafka\.bootstrap_servers",
    ),
    "no TLS": (
        lambda it, _: it.kafka(CASES[0].user, security_protocol="SASL_PLAINTEXT"),
        r"speaks TLS and kafka\.security_protocol is SASL_PLAINTEXT; set it to SASL_SSL",
    ),
    "neither TLS nor a login": (
        lambda it, _: {"bootstrap_servers": it.cluster.tls_bootstrap_servers("SASL_SSL")},
        r"speaks TLS and kafka\.security_protocol is PLAINTEXT; set it to SSL or SASL_SSL",
    ),
    "no login": (
        lambda it, _: by_certificate(it, bootstrap_servers=it.cluster.tls_bootstrap_servers("SASL_SSL")),
        r"hangs up on clients that do not log in; it may want SASL_SSL",
    ),
    "no client certificate": (
        lambda it, _: by_certificate(it, ssl_cert_file=None, ssl_key_file=None),
        r"wants a client certificate .*; set kafka\.ssl_cert_file and kafka\.ssl_key_file",
    ),
    "a client certificate of another authority": (
        lambda it, other: by_certificate(it, **certified(other.sign("stranger"))),
        r"does not take our certificate .*kafka\.ssl_cert_file",
    ),
}


def elsewhere(secured: Secured) -> str:
    return secured.cluster.tls_bootstrap_servers("SASL_SSL").replace("127.0.0.1", "localhost")


def certified(signed: Signed) -> dict[str, str]:
    return {"ssl_cert_file": str(signed.certificate), "ssl_key_file": str(signed.key)}


@pytest.mark.parametrize("what", WRONG)
def test_a_way_in_that_is_wrong_is_told_at_once_in_one_sentence(
    secured: Secured, run: Run, tmp_path: Path, what: str
) -> None:
    make, told = WRONG[what]
    settings = KafkaSettings(**make(secured, Authority(tmp_path, "another")))
    began = time.monotonic()
    with pytest.raises(BrokerAuthenticationError, match=told) as caught:
        run(probe(settings))
    assert time.monotonic() - began < 5
    assert WRONG_PASSWORD not in str(caught.value)
    assert "\n" not in str(caught.value)
