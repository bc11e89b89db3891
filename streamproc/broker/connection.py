"""Reaching a cluster: the clients' options, and a first connection that finds out why it cannot be reached.

aiokafka's own bootstrap logs the reason of a failure and raises a general error, and a client that does not get through
may try for ever. So every client of this package connects here first, once and bounded by ``kafka.connect_timeout_s``:
by the time that aiokafka starts, the address, TLS, the credentials and the topics are known to be right.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiokafka import errors as kafka
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.protocol.coordination import FindCoordinatorRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.transaction import InitProducerIdRequest

from streamproc.broker.interface import TopicInfo
from streamproc.broker.privileges import AclOperation, Privilege
from streamproc.broker.translation import brief, chain, missing, not_allowed, refused, translate
from streamproc.certificates import load_certificate
from streamproc.errors import BrokerAuthenticationError, BrokerError, BrokerUnreachableError, SettingsError
from streamproc.settings import KafkaSettings

_CREATE_PARTITIONS = 37
_RETRY_PAUSE_S = 0.2
_ADVERTISED_TIMEOUT_S = 3.0
_METADATA_MAX_AGE_MS = 30_000
_METADATA_PAUSE_S = 0.1
_CLOSING_PAUSE_S = 0.5
_OTHER_NAME = (62, 64)
"""OpenSSL's: the certificate is for another name, or another address."""
_OF_OURS = ("ALERT_BAD_CERTIFICATE", "ALERT_CERTIFICATE_UNKNOWN", "ALERT_UNKNOWN_CA", "ALERT_CERTIFICATE_REQUIRED")
"""What the other side complains of our certificate with, OpenSSL and Java."""
_NO_TRANSACTION_TIMEOUT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Cluster:
    """What ``probe`` found: how many brokers there are, and whether it is the embedded one."""

    brokers: int
    embedded: bool


def client_options(settings: KafkaSettings, client_id: str) -> dict[str, Any]:
    """The arguments that every aiokafka client takes. Raises SettingsError for files that cannot be read."""
    return {
        "bootstrap_servers": settings.bootstrap_servers,
        "client_id": client_id,
        "request_timeout_ms": settings.request_timeout_ms,
        # A leader that has moved without a word is noticed at the latest after this long, not after 5 minutes.
        "metadata_max_age_ms": _METADATA_MAX_AGE_MS,
        **_security_options(settings),
    }


def pace_metadata(client: Any) -> None:
    """Let an aiokafka client ask for metadata ten times a second at most, as Kafka's own does.

    By itself it asks without a pause while a partition has no leader, or no broker answers.
    """
    update, answered_at = client._metadata_update, -math.inf  # noqa: SLF001 - it has no setting for it

    async def paced(cluster: Any, topics: Any) -> Any:
        nonlocal answered_at
        loop = asyncio.get_running_loop()
        await asyncio.sleep(answered_at + _METADATA_PAUSE_S - loop.time())
        try:
            return await update(cluster, topics)
        finally:
            answered_at = loop.time()

    client._metadata_update = paced  # noqa: SLF001


async def ended(stopping: Awaitable[Any], client: Any) -> asyncio.Future[Any]:
    """The end of an aiokafka client, waited for; its outcome is left to the caller.

    Over TLS a connection is closed once the other side has agreed, and Kafka does not while it holds back an answer:
    the event loop would wait for half a minute. What is said is said by then, so such a connection is cut.
    """
    transports = [it._writer.transport for it in client._conns.values() if it._writer is not None]  # noqa: SLF001
    task = asyncio.ensure_future(stopping)
    try:
        while not (await asyncio.wait({task}, timeout=_CLOSING_PAUSE_S))[0]:
            for transport in transports:
                if transport.is_closing():
                    transport.abort()
    finally:
        task.cancel()  # where we were told to stop waiting
    return task


def _security_options(settings: KafkaSettings) -> dict[str, Any]:
    options: dict[str, Any] = {"security_protocol": settings.security_protocol}
    if settings.security_protocol.endswith("SSL"):
        options["ssl_context"] = _ssl_context(settings)
    if settings.security_protocol.startswith("SASL"):
        options["sasl_mechanism"] = settings.sasl_mechanism
        options["sasl_plain_username"] = settings.sasl_username
        options["sasl_plain_password"] = _password(settings)
    return options


def _password(settings: KafkaSettings) -> str:
    if settings.sasl_password_file is not None:
        return _read(settings.sasl_password_file, "kafka.sasl_password_file").rstrip("\r\n")
    return settings.sasl_password.get_secret_value() if settings.sasl_password is not None else ""


def _read(path: Path, setting: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"cannot read {path}: {error.strerror}", setting=setting, hint="correct the path or its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not a text file", setting=setting, hint="it must be UTF-8") from error


def _ssl_context(settings: KafkaSettings) -> ssl.SSLContext:
    for path, setting in (
        (settings.ssl_ca_file, "kafka.ssl_ca_file"),
        (settings.ssl_cert_file, "kafka.ssl_cert_file"),
        (settings.ssl_key_file, "kafka.ssl_key_file"),
    ):
        if path is not None:
            _read(path, setting)
    try:
        context = ssl.create_default_context(cafile=settings.ssl_ca_file)
    except ssl.SSLError as error:
        raise SettingsError(
            f"{settings.ssl_ca_file} holds no certificate",
            setting="kafka.ssl_ca_file",
            hint="it must be PEM, with a line BEGIN CERTIFICATE",
        ) from error
    context.check_hostname = settings.ssl_check_hostname
    if settings.ssl_cert_file is not None:
        load_certificate(context, settings.ssl_cert_file, settings.ssl_key_file, setting="kafka.ssl_cert_file")
    return context


@contextlib.asynccontextmanager
async def first_connection(settings: KafkaSettings, client_id: str) -> AsyncIterator[Any]:
    """A connection to one bootstrap server, logged in and tried out.

    Raises:
        SettingsError: an address or a file of the settings is wrong.
        BrokerUnreachableError: nobody answers within ``kafka.connect_timeout_s``, or something that is not Kafka.
        BrokerAuthenticationError: the credentials or the TLS settings are refused; known at once, so not tried again.
    """
    connection = await _connect(settings, client_id)
    try:
        yield connection
    except kafka.KafkaError as error:
        raise translate(error, settings, doing="look at the cluster") from error
    finally:
        await _close(connection)


async def probe(settings: KafkaSettings, client_id: str = "streamproc") -> Cluster:
    """Connect once, so that a wrong address or password is known before anything is started.

    Raises:
        SettingsError: an address or a file of the settings is wrong.
        BrokerError: the error of the tree that says why the cluster cannot be used.
    """
    async with first_connection(settings, client_id) as connection:
        response = await connection.send(MetadataRequest([]))
        return Cluster(brokers=len(response.brokers), embedded=is_embedded(connection))


def is_embedded(connection: Any) -> bool:
    """Whether this is the embedded broker, which says nothing of itself: every Kafka since 1.0 has CreatePartitions."""
    return _CREATE_PARTITIONS not in connection._versions  # noqa: SLF001 - aiokafka keeps what it was told there


def isolation_level(uncommitted: bool) -> str:
    """How aiokafka is told whether to read what transactions have not committed."""
    return "read_uncommitted" if uncommitted else "read_committed"


async def ask_any_broker(client: Any, request: Any) -> Any:
    """The answer of one of the brokers that aiokafka's client knows: where one is down, that of another.

    Raises what the last of them raised, or a retriable error of aiokafka's where none is known.
    """
    first = client.get_random_node()
    others = [broker.nodeId for broker in client.cluster.brokers() if broker.nodeId != first]
    last: BaseException = kafka.NodeNotReadyError("no broker is known")
    for node in (first, *others):
        try:
            return await client.send(node, request)
        except (kafka.KafkaConnectionError, kafka.NodeNotReadyError, kafka.RequestTimedOutError, OSError) as error:
            last = error
    raise last


async def check_topics(
    connection: Any, topics: Iterable[str], settings: KafkaSettings, operation: AclOperation = "Read"
) -> None:
    """Raise what ``why_absent`` says of the topics that are not seen; asking does not create them."""
    wanted = list(topics)
    found = await read_topics(connection.send(all_topics()), settings)
    absent = [topic for topic in wanted if topic not in found]
    if absent:
        embedded = is_embedded(connection)
        raise await why_absent(connection.send, absent, found, settings, operation=operation, embedded=embedded)


async def why_absent(
    ask: Callable[[Any], Awaitable[Any]],
    absent: list[str],
    found: Iterable[str],
    settings: KafkaSettings,
    *,
    operation: AclOperation,
    embedded: bool,
) -> BrokerError:
    """Why topics are not among those that Kafka shows us: they do not exist, or we may not see them.

    It leaves out of the list of all topics those that we may not describe. Asked for one by name it says so; the
    embedded broker, which has no ACLs, would create it. ``operation`` is what is to be done with them.
    """
    if not embedded:
        response = await ask(MetadataRequest(absent, allow_auto_topic_creation=False))
        refused_to = [
            topic for code, topic, *_ in response.topics if kafka.for_code(code) is kafka.TopicAuthorizationFailedError
        ]
        if refused_to:
            doing = f"look at topic{'s' if len(refused_to) > 1 else ''} {', '.join(refused_to)}"
            needs = [Privilege(operation, "Topic", topic) for topic in refused_to]
            return not_allowed(settings, doing, needs, kafka.TopicAuthorizationFailedError.__name__)
    return missing(absent, settings, found)


async def check_group(connection: Any, group_id: str, settings: KafkaSettings) -> None:
    """Raise BrokerAuthorizationError when we may not join the group; aiokafka finds the coordinator itself later."""
    response = await connection.send(FindCoordinatorRequest(group_id, 0))
    error = kafka.for_code(response.error_code)
    if error is kafka.GroupAuthorizationFailedError:
        needs = [Privilege("Read", "Group", group_id)]
        raise translate(error(group_id), settings, doing=f"join consumer group {group_id}", needs=needs)


async def can_be_idempotent(connection: Any, settings: KafkaSettings) -> bool:
    """Whether the broker hands out producer ids, which idempotent producers need."""
    try:
        response = await connection.send(InitProducerIdRequest(None, _NO_TRANSACTION_TIMEOUT))
    except (kafka.IncompatibleBrokerVersion, NotImplementedError):
        return False
    error = kafka.for_code(response.error_code)
    if error is kafka.ClusterAuthorizationFailedError:
        # Kafka 3.0 and newer give one to whoever may write to any topic.
        needs = [Privilege("Write", "Topic", "(those to be written to)")]
        reason = f"{error.__name__}; before Kafka 3.0, IdempotentWrite on Cluster"
        raise not_allowed(settings, "get a producer id", needs, reason)
    # The embedded broker lists the request and answers "unknown error"; a cluster that is just starting is retriable.
    return not (error is kafka.UnknownError or error is kafka.UnsupportedVersionError)


def all_topics() -> Any:
    """A request for the metadata of every topic: the embedded broker creates whatever it is asked for by name."""
    return MetadataRequest(None, allow_auto_topic_creation=False)


async def read_topics(answer: Any, settings: KafkaSettings) -> dict[str, TopicInfo]:
    """The topics in the answer to a metadata request, awaited here; those that do not exist are left out.

    Raises:
        BrokerAuthorizationError: a topic may not be looked at.
    """
    response = await answer
    found: dict[str, TopicInfo] = {}
    for code, topic, internal, partitions in response.topics:
        error = kafka.for_code(code)
        if error is kafka.TopicAuthorizationFailedError:
            needs = [Privilege("Describe", "Topic", topic)]
            raise translate(error(topic), settings, doing=f"look at topic {topic}", topic=topic, needs=needs)
        if error is kafka.NoError or (error is kafka.LeaderNotAvailableError and partitions):
            replicas = min((len(partition[3]) for partition in partitions), default=0)
            found[topic] = TopicInfo(len(partitions), replicas, bool(internal))
    return found


async def _connect(settings: KafkaSettings, client_id: str) -> Any:
    options = {
        "client_id": client_id,
        "request_timeout_ms": settings.request_timeout_ms,
        **_security_options(settings),
    }
    hosts = bootstrap_hosts(settings)
    last: BaseException | None = None
    loop = asyncio.get_running_loop()
    deadline = loop.time() + settings.connect_timeout_s
    while True:
        for host, port in hosts:
            # Each server gets a share of the time, or one that is silent would use up that of the others.
            share = max((deadline - loop.time()) / len(hosts), 0.05)
            try:
                return await _try_once(host, port, options, share, settings)
            except (OSError, kafka.KafkaError) as error:
                last = error
        if loop.time() + _RETRY_PAUSE_S >= deadline:
            raise await _diagnosis(hosts, last, settings) from last
        await asyncio.sleep(_RETRY_PAUSE_S)


def bootstrap_hosts(settings: KafkaSettings) -> list[tuple[str, int]]:
    """The addresses in ``kafka.bootstrap_servers``. Raises SettingsError where they are none."""
    try:
        hosts = [(host, port) for host, port, _ in collect_hosts(settings.bootstrap_servers)]
    except ValueError as error:
        raise _bad_address(settings) from error
    if not all(host and 0 < port < 65_536 for host, port in hosts):
        raise _bad_address(settings)
    return hosts


def _bad_address(settings: KafkaSettings) -> SettingsError:
    return SettingsError(
        f"{settings.bootstrap_servers!r} is no list of addresses",
        setting="kafka.bootstrap_servers",
        hint="write host:port, several separated by commas",
    )


async def _try_once(host: str, port: int, options: dict[str, Any], limit_s: float, settings: KafkaSettings) -> Any:
    connection: Any = None
    try:
        async with asyncio.timeout(limit_s):
            connection = await create_conn(host, port, **options)
            # A listener that wants a login answers ApiVersions to everybody; this it does not.
            response = await connection.send(MetadataRequest([]))
    except (TimeoutError, OSError, kafka.KafkaError) as error:
        if connection is not None:
            await _close(connection)
            if not isinstance(error, TimeoutError):
                raise await _closed_after_hello(host, port, error, settings) from error
        raise await _told_apart(host, port, error, settings) from error
    except BaseException:
        if connection is not None:
            await _close(connection)
        raise
    try:
        await _check_advertised(response.brokers, host, port, settings)
    except BaseException:
        await _close(connection)
        raise
    return connection


async def _close(connection: Any) -> None:
    closed = connection.close()
    if closed is not None:
        await asyncio.wait([closed], timeout=1.0)


async def _closed_after_hello(host: str, port: int, error: BaseException, settings: KafkaSettings) -> BaseException:
    """The listener spoke Kafka, then hung up on the first real request: without a login, that is what it wants."""
    if settings.security_protocol in ("PLAINTEXT", "SSL"):
        wanted = "SASL_SSL" if settings.security_protocol == "SSL" else "SASL_PLAINTEXT"
        return refused(f"{host}:{port} hangs up on clients that do not log in; it may want {wanted}", settings)
    return error


async def _told_apart(host: str, port: int, error: BaseException, settings: KafkaSettings) -> BaseException:
    """The error itself when trying again may help, or the final error of our tree."""
    tls_wanted = settings.security_protocol.endswith("SSL")
    for it in chain(error):
        if isinstance(it, ssl.SSLError) and (wrong := _wrong_certificate(it, settings)):
            return BrokerAuthenticationError(f"{host}:{port} {wrong}", bootstrap_servers=settings.bootstrap_servers)
        if isinstance(it, ssl.SSLError):
            return refused(f"the TLS handshake with {host}:{port} fails ({it.reason or it})", settings)
        if isinstance(
            it, kafka.SaslAuthenticationFailed | kafka.UnsupportedSaslMechanismError | kafka.IllegalSaslStateError
        ):
            return refused(brief(it), settings)
    if not tls_wanted and await _speaks_tls(host, port):
        return BrokerAuthenticationError(
            f"{host}:{port} speaks TLS and kafka.security_protocol is {settings.security_protocol}; set it to "
            f"{'SASL_SSL' if settings.security_protocol.startswith('SASL') else 'SSL or SASL_SSL'}",
            bootstrap_servers=settings.bootstrap_servers,
        )
    return error


def _wrong_certificate(error: ssl.SSLError, settings: KafkaSettings) -> str:
    """What is wrong with a certificate, theirs or ours; empty where it is something else."""
    if isinstance(error, ssl.SSLCertVerificationError):
        told = error.verify_message.rstrip(".")
        if error.verify_code in _OTHER_NAME:
            return (
                f"has a certificate that is not for that name ({told}); write in kafka.bootstrap_servers, and as the "
                f"brokers' advertised.listeners, what it is for, or see kafka.ssl_check_hostname"
            )
        return f"has a certificate that is not trusted ({told}); set kafka.ssl_ca_file to the authority that signed it"
    if not (error.reason or "").endswith(_OF_OURS):
        return ""
    if settings.ssl_cert_file is None:
        return f"wants a client certificate ({error.reason}); set kafka.ssl_cert_file and kafka.ssl_key_file"
    return (
        f"does not take our certificate ({error.reason}); see that kafka.ssl_cert_file ({settings.ssl_cert_file}) is "
        f"signed by an authority that the brokers trust"
    )


async def _speaks_tls(host: str, port: int) -> bool:
    """Whether a TLS handshake gets anywhere; whom the certificate is for does not matter here."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(1.0):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


async def _answers(host: str, port: int, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


async def _check_advertised(brokers: Any, host: str, port: int, settings: KafkaSettings) -> None:
    """Clients leave the bootstrap address for the advertised ones; a container often advertises the wrong ones."""
    addresses = [(broker[1], broker[2]) for broker in brokers]
    if not addresses or (host, port) in addresses:
        return
    found = await asyncio.gather(*[_answers(*address, _ADVERTISED_TIMEOUT_S) for address in addresses])
    if not any(found):
        named = ", ".join(f"{name}:{number}" for name, number in addresses)
        raise BrokerUnreachableError(
            f"Kafka at {host}:{port} (kafka.bootstrap_servers) refers its clients to {named}, where nobody answers; "
            f"correct the brokers' advertised.listeners, or connect from where these names lead to them",
            bootstrap_servers=settings.bootstrap_servers,
        )


async def _diagnosis(hosts: list[tuple[str, int]], last: BaseException | None, settings: KafkaSettings) -> BrokerError:
    where = settings.bootstrap_servers
    for host, port in hosts:
        if await _answers(host, port, 1.0):
            return BrokerUnreachableError(
                f"something answers at {host}:{port}, but not as Kafka does"
                f"{f' ({brief(last)})' if last is not None else ''}; correct kafka.bootstrap_servers ({where}) or "
                f"kafka.security_protocol ({settings.security_protocol})",
                bootstrap_servers=where,
            )
    reason = brief(last) if last is not None and str(last) else "no answer"
    here = all(host in ("localhost", "127.0.0.1", "::1") for host, _ in hosts)
    embedded = " (`streamproc broker` starts an embedded one)" if here else ""
    return BrokerUnreachableError(
        f"no Kafka broker answers at {where} within {settings.connect_timeout_s:g} s ({reason}); start it{embedded}, "
        f"correct kafka.bootstrap_servers, or allow more time with kafka.connect_timeout_s",
        bootstrap_servers=where,
    )
