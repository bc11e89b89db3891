"""What is said when a cluster cannot be used: one sentence, the right error, the setting to look at."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from deploy.kafka.kafka import SASL_MECHANISMS, SASL_PASSWORD, SASL_USER, free_ports
from streamproc.broker.client import KafkaAdmin, KafkaConsumer, KafkaProducer, probe
from streamproc.broker.interface import NewTopic
from streamproc.broker.translation import missing
from streamproc.errors import BrokerAuthenticationError, BrokerUnreachableError, SettingsError
from streamproc.records import TopicPartition
from streamproc.settings import KafkaSettings
from tests.conftest import Run, TopicName

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def settings(address: str, **more: Any) -> KafkaSettings:
    return KafkaSettings(bootstrap_servers=address, **{"connect_timeout_s": 1.0, **more})


@contextlib.asynccontextmanager
async def server(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await handler(reader, writer)
        finally:
            writer.close()  # also where the test is over before it has seen that the client has gone
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    it = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    async with it:
        yield f"127.0.0.1:{it.sockets[0].getsockname()[1]}"


async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(100)
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await writer.drain()


async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


def test_an_address_where_nobody_answers_is_given_up_in_time(run: Run) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    began = time.monotonic()
    with pytest.raises(BrokerUnreachableError) as caught:
        run(probe(settings(address)))
    assert time.monotonic() - began < 5
    told = str(caught.value)
    assert f"no Kafka broker answers at {address} within 1 s" in told
    assert "kafka.bootstrap_servers" in told
    assert "`streamproc broker`" in told
    assert caught.value.bootstrap_servers == address


def test_a_name_that_leads_nowhere_is_named(run: Run) -> None:
    with pytest.raises(BrokerUnreachableError, match=r"no-such-host\.invalid:9092") as caught:
        run(probe(settings("no-such-host.invalid:9092")))
    assert "streamproc broker" not in str(caught.value)


@pytest.mark.parametrize("handler", [http, silent])
def test_a_port_that_is_not_kafka_is_told_from_one_where_nobody_answers(run: Run, handler: Handler) -> None:
    async def main() -> None:
        async with server(handler) as address:
            for start in (
                probe(settings(address)),
                KafkaProducer(settings(address), client_id="a").start(),
                KafkaConsumer(settings(address), group_id="g", client_id="a").start(["t"], ignore, ignore),
                KafkaAdmin(settings(address)).__aenter__(),
            ):
                with pytest.raises(BrokerUnreachableError, match=rf"something answers at {address}, but not as Kafka"):
                    await start

    run(main())


async def ignore(_: set[TopicPartition]) -> None: ...


@pytest.mark.parametrize("address", ["localhost:kafka", "localhost:99999999", ":9092", "", "a:1,,b:2"])
def test_an_address_that_is_none_is_a_wrong_setting(run: Run, address: str) -> None:
    with pytest.raises(SettingsError, match=r"kafka\.bootstrap_servers"):
        run(probe(settings(address)))


def test_topics_that_may_have_been_meant_are_named() -> None:
    it = settings("here:1")
    assert "did you mean texts? Otherwise create it" in str(missing(["text"], it, ["texts", "images"]))
    told = str(missing(["digits.dead", "digits.metrics"], it, ["digits"]))
    assert "did you mean" not in told
    assert "create them with `streamproc topics apply`" in told


def test_one_server_of_several_is_enough(kafka: str, run: Run) -> None:
    assert run(probe(settings(f"127.0.0.1:{free_ports(1)[0]},{kafka}", connect_timeout_s=10))).brokers == 1


def certificate(directory: Path) -> ssl.SSLContext:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed, which makes the certificate")
    key, file = directory / "key.pem", directory / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(file)]
    command += ["-days", "1", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    return context


def test_a_tls_port_asked_without_tls_says_so(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with server(silent, certificate(tmp_path)) as address:
            with pytest.raises(BrokerAuthenticationError, match=r"speaks TLS .* is PLAINTEXT; set it to SSL"):
                await probe(settings(address))

    run(main())


def test_a_certificate_that_is_not_trusted_leads_to_the_authority(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with server(silent, certificate(tmp_path)) as address:
            with pytest.raises(BrokerAuthenticationError, match=r"not trusted .*kafka\.ssl_ca_file"):
                await probe(settings(address, security_protocol="SSL"))
            # With its authority the handshake succeeds, and what is behind it is still no Kafka.
            with pytest.raises(BrokerUnreachableError, match="not as Kafka"):
                await probe(settings(address, security_protocol="SSL", ssl_ca_file=tmp_path / "cert.pem"))

    run(main())


def test_files_of_the_settings_that_are_wrong_are_named(run: Run, tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    for more, told in (
        ({"ssl_ca_file": tmp_path / "none.pem"}, r"kafka\.ssl_ca_file: cannot read .*none\.pem: No such file"),
        ({"ssl_ca_file": nonsense}, r"kafka\.ssl_ca_file: .*holds no certificate"),
        ({"ssl_cert_file": nonsense, "ssl_key_file": nonsense}, r"kafka\.ssl_cert_file: .*no certificate and its key"),
    ):
        with pytest.raises(SettingsError, match=told):
            run(probe(settings("127.0.0.1:1", security_protocol="SSL", **more)))
    login = {"security_protocol": "SASL_PLAINTEXT", "sasl_username": "u", "sasl_password_file": tmp_path / "none"}
    with pytest.raises(SettingsError, match=r"kafka\.sasl_password_file: cannot read"):
        run(probe(settings("127.0.0.1:1", **login)))


def login(mechanism: str, password: str = SASL_PASSWORD) -> dict[str, Any]:
    return {
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": mechanism,
        "sasl_username": SASL_USER,
        "sasl_password": SecretStr(password),
        "connect_timeout_s": 10.0,
    }


@pytest.mark.parametrize("mechanism", SASL_MECHANISMS)
def test_the_right_password_lets_in_and_a_wrong_one_is_told_at_once(kafka_sasl: str, run: Run, mechanism: str) -> None:
    assert run(probe(settings(kafka_sasl, **login(mechanism)))).brokers == 1
    began = time.monotonic()
    with pytest.raises(BrokerAuthenticationError) as caught:
        run(probe(settings(kafka_sasl, **login(mechanism, "wrong"))))
    assert time.monotonic() - began < 5
    told = str(caught.value)
    assert f"kafka.sasl_username ({SASL_USER})" in told
    assert f"kafka.sasl_mechanism ({mechanism})" in told
    assert "wrong" not in told


def test_a_password_can_stand_in_a_file(kafka_sasl: str, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(f"{SASL_PASSWORD}\n")
    more = {**login("SCRAM-SHA-512"), "sasl_password": None, "sasl_password_file": file}
    assert run(probe(settings(kafka_sasl, **more))).brokers == 1


def test_a_listener_that_wants_a_login_says_so(kafka_sasl: str, run: Run) -> None:
    with pytest.raises(BrokerAuthenticationError, match="may want SASL_PLAINTEXT"):
        run(probe(settings(kafka_sasl, connect_timeout_s=10)))


def test_a_listener_that_knows_no_login_says_so(kafka: str, run: Run) -> None:
    with pytest.raises(BrokerAuthenticationError, match=r"kafka\.security_protocol \(SASL_PLAINTEXT\)"):
        run(probe(settings(kafka, **login("PLAIN"))))


def test_tls_asked_of_a_plain_listener_says_so(kafka: str, run: Run) -> None:
    with pytest.raises((BrokerAuthenticationError, BrokerUnreachableError), match=r"kafka\.security_protocol \(SSL\)"):
        run(probe(settings(kafka, security_protocol="SSL", connect_timeout_s=3)))


def test_logged_in_clients_read_and_write(kafka_sasl: str, run: Run, topic_name: TopicName) -> None:
    async def main() -> None:
        it = settings(kafka_sasl, **login("SCRAM-SHA-256"))
        topic = topic_name()
        async with KafkaAdmin(it) as admin:
            await admin.create_topics([NewTopic(topic, 1)])
        producer = KafkaProducer(it, client_id="p")
        consumer = KafkaConsumer(it, group_id=topic, client_id="c")
        try:
            await producer.start()
            batch = producer.create_batch()
            batch.append(timestamp=None, key=None, value=b"x", headers=())
            await (await producer.send_batch(batch, topic, 0))
            await consumer.start([topic], ignore, ignore)
            found: Mapping[TopicPartition, object] = {}
            deadline = time.monotonic() + 20
            while not found and time.monotonic() < deadline:
                found = await consumer.getmany(timeout_ms=200, max_records=1)
            assert list(found) == [TopicPartition(topic, 0)]
        finally:
            await consumer.stop()
            await producer.stop()

    run(main())


def test_an_advertised_address_where_nobody_answers_is_named(run: Run) -> None:
    """A container often advertises a name that leads nowhere from outside; answered here by a minimal Kafka."""

    def frame(correlation: bytes, body: bytes) -> bytes:
        return (len(correlation) + len(body)).to_bytes(4, "big") + correlation + body

    versions = b"\0\0" + (2).to_bytes(4, "big") + b"\0\x12\0\0\0\0" + b"\0\x03\0\0\0\x01"
    port = free_ports(1)[0]
    broker = (1).to_bytes(4, "big") + b"\0\x09127.0.0.1" + port.to_bytes(4, "big") + b"\xff\xff"
    metadata = (1).to_bytes(4, "big") + broker + (1).to_bytes(4, "big") + (0).to_bytes(4, "big")

    async def kafka_like(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            size = int.from_bytes(await reader.readexactly(4), "big")
            request = await reader.readexactly(size)
            body = versions if request[:2] == b"\0\x12" else metadata
            writer.write(frame(request[4:8], body))
            await writer.drain()

    async def main() -> None:
        async with server(kafka_like) as address:
            with pytest.raises(BrokerUnreachableError, match=rf"127\.0\.0\.1:{port}, where nobody answers.*advertised"):
                await probe(settings(address, connect_timeout_s=3))

    run(main())
