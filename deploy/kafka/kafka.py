"""Apache Kafka from its jars, on this machine's loopback: a command for a terminal and a class for tests.

    python deploy/kafka/kafka.py up [--nodes 1|3] [--port 9092] [--dir build/kafka] [--sasl] [--property K=V ...]
    python deploy/kafka/kafka.py status | down [--keep] | run

The standard library alone, so that it works before anything is installed. Java 17 or newer runs it; Maven fetches the
jars once, into build/kafka/libs.

Invariants:
- Every node is broker and controller (KRaft), and listens on 127.0.0.1 alone.
- A process is signalled only after its command line proved to be this cluster's node: process ids are used again.
- What one process started with ``detached`` another can stop: all that is needed stands in the directory.
- Without ``detached`` the nodes die with the process that started them (on Linux), however that one dies.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

HERE = Path(__file__).resolve().parent
POM = HERE / "pom.xml"
BUILD = HERE.parent.parent / "build" / "kafka"
LIBS = BUILD / "libs"
HOST = "127.0.0.1"
LAST_LINES = 2_000
"""Of a log, among which the errors are looked for."""
SMALL_JVM = ("-XX:+UseSerialGC",)
"""For tests: little memory, few threads, up soon; stops for 10 to 200 ms now and then to collect garbage."""
QUIET_JVM = ("-XX:+UseSerialGC", "-XX:+AlwaysPreTouch", "-Xmn3g")
"""For measuring latencies: garbage is not collected for minutes, and no page is touched for the first time."""
MINIMUM_JAVA = 17

# Not secrets: the users of a broker that listens on loopback and lives as long as a test.
SASL_USER = "test"
SASL_PASSWORD = "test-secret"  # noqa: S105  # see above
SASL_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")

# Runs a command so that the kernel kills it when its parent dies; a parent that died before is noticed by its id.
# A program of its own, since ``preexec_fn`` may deadlock in a process with threads.
_DIE_WITH_PARENT = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"  # PR_SET_PDEATHSIG, SIGKILL
    "if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])\n"
)

_LOG4J = """\
status = error
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{ISO8601} %-5p %m (%c{1})%n
rootLogger.level = info
rootLogger.appenderRef.out.ref = out
# Its whole configuration, several times: 300 lines each.
logger.config.name = org.apache.kafka.common.config.AbstractConfig
logger.config.level = warn
logger.kafkaconfig.name = kafka.server.KafkaConfig
logger.kafkaconfig.level = warn
"""


class KafkaClusterError(RuntimeError):
    """Kafka cannot be had, or did not come up. One sentence with what to do; a log's tail may follow it."""


# --------------------------------------------------------------------------------------------------- what it needs


def kafka_version() -> str:
    """The version that the pom pins."""
    found = re.search(r"<kafka\.version>([^<]+)</kafka\.version>", POM.read_text(encoding="utf-8"))
    if found is None:
        raise KafkaClusterError(f"{POM} has no kafka.version; put the property back.")
    return found[1]


def find_java() -> str:
    """The path of a Java that is new enough."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=str(Path(home) / "bin")) if home else None
    java = java or shutil.which("java")
    if java is None:
        raise KafkaClusterError(f"Kafka needs Java, and there is none: install Java {MINIMUM_JAVA} or set JAVA_HOME.")
    asked = subprocess.run([java, "-version"], capture_output=True, text=True, check=False, timeout=60)
    found = re.search(r'version "(?:1\.)?(\d+)', asked.stderr + asked.stdout)
    if found and int(found[1]) < MINIMUM_JAVA:
        raise KafkaClusterError(
            f"Kafka {kafka_version()} needs Java {MINIMUM_JAVA} and {java} is {found[1]}: set JAVA_HOME to a newer one."
        )
    return java


def why_unavailable() -> str | None:
    """Why Kafka cannot be started here, as one sentence; None where it can."""
    try:
        find_java()
        if not _libs_complete() and shutil.which("mvn") is None:
            raise _maven_missing()
    except KafkaClusterError as error:
        return str(error)
    return None


def fetch_libs() -> Path:
    """Copy the jars to build/kafka/libs unless they are there. Safe to call from several processes at once."""
    LIBS.parent.mkdir(parents=True, exist_ok=True)
    with (LIBS.parent / "libs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _libs_complete():
            return LIBS
        maven = shutil.which("mvn")
        if maven is None:
            raise _maven_missing()
        fresh = LIBS.with_name("libs.part")
        shutil.rmtree(fresh, ignore_errors=True)
        goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={fresh}"]
        done = subprocess.run(
            [maven, "-q", "-B", "-ntp", "-f", str(POM), *goal], capture_output=True, text=True, check=False, timeout=900
        )
        if done.returncode != 0 or not any(fresh.glob(f"kafka_*-{kafka_version()}.jar")):
            tail = _last_lines(done.stdout + done.stderr, 8)
            raise KafkaClusterError(
                f"Maven could not fetch Kafka {kafka_version()}: look at what it said and try again.\n{tail}"
            )
        (fresh / "pom.sha256").write_text(_pom_digest(), encoding="utf-8")
        shutil.rmtree(LIBS, ignore_errors=True)
        fresh.rename(LIBS)
    return LIBS


def _maven_missing() -> KafkaClusterError:
    return KafkaClusterError("Kafka's jars come through Maven, and there is no mvn: install Maven (apt install maven).")


def _pom_digest() -> str:
    return hashlib.sha256(POM.read_bytes()).hexdigest()


def _libs_complete() -> bool:
    # A changed pom is another set of jars; a directory without the note is one whose copying was cut short.
    note = LIBS / "pom.sha256"
    return note.is_file() and note.read_text(encoding="utf-8") == _pom_digest()


# ------------------------------------------------------------------------------------------------------ the cluster


@dataclass(frozen=True)
class Tls:
    """Files in PEM: a private key of the nodes with its certificate, and the authority of their clients."""

    node: Path
    authority: Path

    def properties(self) -> dict[str, str]:
        """What they are to Kafka."""
        return {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self.node),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.authority),
            "listener.name.ssl.ssl.client.auth": "required",
        }


class KafkaCluster:
    """Apache Kafka in ``directory``: its data, its logs, its process ids.

    ``ports`` are those of the plain-text listeners, one a node; None takes free ones. With ``sasl`` each node has a
    second listener (SASL_PLAINTEXT; PLAIN, SCRAM-SHA-256, SCRAM-SHA-512; user ``SASL_USER``) ten ports higher.
    ``properties`` go over the defaults of ``server.properties``. Nodes count from 1. ``jvm_options`` choose the
    collector of each node, ``heap_mb`` its heap.

    With ``tls`` there are two more listeners beside that of ``sasl``: SASL_SSL, for the same users, and SSL, which asks
    its clients for certificates. ``users`` gives further users of the SASL listeners, with their passwords: they log in
    by PLAIN and SCRAM-SHA-512.

    ``extra_listeners`` gives further plain-text listeners by name, each with the port that a node advertises for it:
    ``{"R1": {1: 7001, 2: 7002}}``. Whoever asks there is sent to the advertised ports, behind which the caller has a
    proxy to ``extra_ports[name][node]``: so a test can cut the network between one client and one node.

    As a context manager it starts and stops. ``detached`` leaves the nodes running when this process ends.
    Start it from a thread that lives as long as the cluster shall: without ``detached`` the kernel watches the thread.
    """

    def __init__(
        self,
        directory: str | Path,
        nodes: int = 1,
        ports: Sequence[int] | None = None,
        properties: Mapping[str, str] | None = None,
        *,
        sasl: bool = False,
        detached: bool = False,
        heap_mb: int = 512,
        jvm_options: Sequence[str] = SMALL_JVM,
        extra_listeners: Mapping[str, Mapping[int, int]] | None = None,
        tls: Tls | None = None,
        users: Mapping[str, str] | None = None,
    ) -> None:
        if nodes < 1:
            raise KafkaClusterError(f"A cluster of {nodes} nodes is none: nodes must be 1 or more.")
        if ports is not None and len(ports) != nodes:
            raise KafkaClusterError(f"{nodes} nodes and {len(ports)} ports: give one port a node.")
        self.directory = Path(directory).absolute()
        self.nodes = nodes
        if tls and (detached or not sasl):
            raise KafkaClusterError("TLS is for tests: with sasl, and not detached.")
        self.sasl = sasl
        self.tls = tls
        self.users = dict(users or {})
        self.detached = detached
        self.heap_mb = heap_mb
        self.jvm_options = tuple(jvm_options)
        self.properties = dict(properties or {})
        self.extra_listeners = {name: dict(advertised) for name, advertised in (extra_listeners or {}).items()}
        if any(set(advertised) != set(self._node_ids()) for advertised in self.extra_listeners.values()):
            raise KafkaClusterError(f"An extra listener advertises one port for each of the nodes 1 to {nodes}.")
        extra = free_ports(nodes * len(self.extra_listeners))
        self.extra_ports = {
            name: dict(zip(self._node_ids(), extra[index * nodes :], strict=False))
            for index, name in enumerate(self.extra_listeners)
        }
        tls_ports = free_ports(2 * nodes if tls else 0)
        self._tls_ports = {"SASL_SSL": tls_ports[:nodes], "SSL": tls_ports[nodes:]} if tls else {}
        chosen = free_ports(nodes * (2 if ports else 3))
        self.ports = list(ports) if ports else chosen[:nodes]
        self.sasl_ports = [port + 10 for port in self.ports] if ports else chosen[nodes : 2 * nodes]
        self._controller_ports = chosen[-nodes:]
        self._cluster_id = _new_cluster_id()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    @classmethod
    def load(cls, directory: str | Path) -> KafkaCluster | None:
        """The cluster that another process started there, or None."""
        path = Path(directory).absolute() / "cluster.json"
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        extra_listeners = {name: _by_node(ports) for name, ports in state["extra_listeners"].items()}
        cluster = cls(
            directory,
            state["nodes"],
            state["ports"],
            state["properties"],
            sasl=state["sasl"],
            detached=True,
            extra_listeners=extra_listeners,
        )
        cluster.extra_ports = {name: _by_node(ports) for name, ports in state["extra_ports"].items()}
        cluster.sasl_ports = state["sasl_ports"]
        cluster._controller_ports = state["controller_ports"]
        cluster._cluster_id = state["cluster_id"]
        cluster.heap_mb = state["heap_mb"]
        cluster.jvm_options = tuple(state["jvm_options"])
        return cluster

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def bootstrap_servers(self) -> str:
        """Every node's plain-text address, with commas between."""
        return ",".join(f"{HOST}:{port}" for port in self.ports)

    @property
    def sasl_bootstrap_servers(self) -> str:
        """Every node's SASL address; empty without ``sasl``."""
        return ",".join(f"{HOST}:{port}" for port in self.sasl_ports) if self.sasl else ""

    def tls_bootstrap_servers(self, listener: str) -> str:
        """Every node's address of the listener SASL_SSL or SSL; only with ``tls``."""
        return ",".join(f"{HOST}:{port}" for port in self._tls_ports[listener])

    def start(self, timeout_s: float = 120.0) -> None:
        """Start every node and return when all of them are members of the cluster; on failure stop them again."""
        deadline = time.monotonic() + timeout_s
        java, libs = find_java(), fetch_libs()
        self._check_ports()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write_configuration()
        try:
            self._format(java, libs)
            for node in self._node_ids():
                self._spawn(node, java, libs)
            self._wait_for_members(self._node_ids(), set(self._node_ids()), deadline)
        except BaseException:
            self.stop(keep=True, timeout_s=0)
            raise

    def stop(self, *, keep: bool = False, timeout_s: float | None = None) -> None:
        """Stop every node (SIGTERM, then SIGKILL) and remove the data unless ``keep``. Fine when nothing runs."""
        if timeout_s is None:
            # Of nodes that stop together the last look for a controller in vain; data to be removed is not worth it.
            timeout_s = 20.0 if keep else 2.0
        alive = [node for node in self._node_ids() if self.pid(node) is not None]
        for node in alive:
            self._signal(node, signal.SIGCONT)  # a paused process takes no other signal
            self._signal(node, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        for node in alive:
            if not self._ends(node, deadline):
                self.kill(node)
            (self._home(node) / "pid").unlink(missing_ok=True)
        self._reap()
        if not keep:
            for node in self._node_ids():
                shutil.rmtree(self._home(node), ignore_errors=True)
            (self.directory / "cluster.json").unlink(missing_ok=True)

    def kill(self, node: int) -> None:
        """End one node without warning (SIGKILL), as a power cut would; its data stays."""
        self._signal(node, signal.SIGKILL)
        self._ends(node, time.monotonic() + 10)

    def pause(self, node: int) -> None:
        """Stop one node's clock (SIGSTOP): its connections stay open and nobody answers.

        Returns once it stands still: on a busy machine its threads may run on for a moment.
        """
        self._signal(node, signal.SIGSTOP)
        pid = self.pid(node)
        if pid is not None:
            _wait_for(lambda: _stands_still(pid), time.monotonic() + 5)

    def resume(self, node: int) -> None:
        """Let a paused node go on."""
        self._signal(node, signal.SIGCONT)

    def restart(self, node: int, timeout_s: float = 120.0) -> None:
        """Start one node again, after an orderly stop if it runs; returns when it is a member of the cluster."""
        deadline = time.monotonic() + timeout_s
        self._signal(node, signal.SIGCONT)
        self._signal(node, signal.SIGTERM)
        if not self._ends(node, min(deadline, time.monotonic() + 30)):
            self.kill(node)
        self._spawn(node, find_java(), fetch_libs())
        self._wait_for_members([node], {node}, deadline)

    def pid(self, node: int) -> int | None:
        """The process id of a node, or None when it does not run."""
        process = self._processes.get(node)
        if process is not None:
            return process.pid if process.poll() is None else None
        try:
            pid = int((self._home(node) / "pid").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return pid if str(self._configuration(node)) in _command_line(pid) else None

    def running(self) -> list[int]:
        """The nodes whose process is there."""
        return [node for node in self._node_ids() if self.pid(node) is not None]

    def answering(self) -> list[int]:
        """The nodes that answer, know of a controller and are members of the cluster."""
        return [node for node in self._node_ids() if node in self._members(node)]

    def log_tail(self, node: int, lines: int = 30) -> str:
        """The end of a node's log."""
        try:
            return _last_lines((self._home(node) / "kafka.log").read_text(encoding="utf-8", errors="replace"), lines)
        except FileNotFoundError:
            return ""

    # -------------------------------------------------------------------------------------------------- its parts

    def _complaints(self, node: int) -> str:
        """The first errors in a node's log, with what they came from; its end, which is goodbyes, where it has none."""
        lines = self.log_tail(node, LAST_LINES).splitlines()
        told = list(dict.fromkeys(it for it in lines if " ERROR " in it or "Exception: " in it or "Error: " in it))
        return "\n".join(told[:30] or lines[-30:])

    def _node_ids(self) -> range:
        return range(1, self.nodes + 1)

    def _home(self, node: int) -> Path:
        return self.directory / f"node-{node}"

    def _configuration(self, node: int) -> Path:
        return self._home(node) / "server.properties"

    def _check_ports(self) -> None:
        extra = [port for ports in self.extra_ports.values() for port in ports.values()]
        extra += [port for ports in self._tls_ports.values() for port in ports]
        for port in [*self.ports, *self._controller_ports, *(self.sasl_ports if self.sasl else []), *extra]:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((HOST, port))
                except OSError as error:
                    raise KafkaClusterError(
                        f"Port {port} is in use: stop what listens there or choose another with --port."
                    ) from error

    def _write_configuration(self) -> None:
        state = {
            "nodes": self.nodes,
            "ports": self.ports,
            "sasl_ports": self.sasl_ports,
            "controller_ports": self._controller_ports,
            "extra_listeners": self.extra_listeners,
            "extra_ports": self.extra_ports,
            "properties": self.properties,
            "sasl": self.sasl,
            "heap_mb": self.heap_mb,
            "jvm_options": self.jvm_options,
            "cluster_id": self._cluster_id,
            "version": kafka_version(),
        }
        (self.directory / "cluster.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        for node in self._node_ids():
            self._home(node).mkdir(exist_ok=True)
            text = "".join(f"{key}={value}\n" for key, value in self._server_properties(node).items())
            self._configuration(node).write_text(text, encoding="utf-8")
            (self._home(node) / "log4j2.properties").write_text(_LOG4J, encoding="utf-8")

    def _server_properties(self, node: int) -> dict[str, str]:
        listeners = {"PLAINTEXT": self.ports[node - 1], "CONTROLLER": self._controller_ports[node - 1]}
        if self.sasl:
            listeners["SASL_PLAINTEXT"] = self.sasl_ports[node - 1]
        listeners |= {name: ports[node - 1] for name, ports in self._tls_ports.items()}
        listeners |= {name: ports[node] for name, ports in self.extra_ports.items()}
        advertised = listeners | {name: ports[node] for name, ports in self.extra_listeners.items()}
        del advertised["CONTROLLER"]
        protocols = dict.fromkeys(listeners, "PLAINTEXT")
        protocols |= {name: name for name in ("SASL_PLAINTEXT", *self._tls_ports)}
        voters = ",".join(f"{n}@{HOST}:{self._controller_ports[n - 1]}" for n in self._node_ids())
        replicas = str(min(self.nodes, 3))
        in_sync = str(min(self.nodes, 2))
        made = {
            "process.roles": "broker,controller",
            "node.id": str(node),
            "controller.quorum.voters": voters,
            "controller.listener.names": "CONTROLLER",
            "listeners": ",".join(f"{name}://{HOST}:{port}" for name, port in listeners.items()),
            "advertised.listeners": ",".join(f"{name}://{HOST}:{port}" for name, port in advertised.items()),
            "inter.broker.listener.name": "PLAINTEXT",
            "listener.security.protocol.map": ",".join(f"{name}:{by}" for name, by in protocols.items()),
            "log.dirs": str(self._home(node) / "data"),
            # A topic that nobody declared is an error to report, not one to create in silence.
            "auto.create.topics.enable": "false",
            "default.replication.factor": replicas,
            "min.insync.replicas": in_sync,
            "offsets.topic.replication.factor": replicas,
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": replicas,
            "transaction.state.log.min.isr": in_sync,
            "transaction.state.log.num.partitions": "4",
            "share.coordinator.state.topic.replication.factor": replicas,
            "share.coordinator.state.topic.min.isr": in_sync,
            "share.coordinator.state.topic.num.partitions": "4",
            # A test that starts one consumer does not wait three seconds for a second one.
            "group.initial.rebalance.delay.ms": "0",
            # Chaos tests wait for a dead consumer, and for a dead broker, to be noticed.
            "group.min.session.timeout.ms": "1000",
            "broker.heartbeat.interval.ms": "500",
            "broker.session.timeout.ms": "4000",
            # The default is a heap of its own (128 MiB), for compacted topics of a size that nobody has here.
            "log.cleaner.dedupe.buffer.size": str(16 << 20),
        }
        if self.sasl:
            made |= _sasl_properties(["SASL_PLAINTEXT", *(["SASL_SSL"] if self.tls else [])], self.users)
        if self.tls:
            made |= self.tls.properties()
        return made | self.properties

    def _format(self, java: str, libs: Path) -> None:
        scram = [f"SCRAM-SHA-{bits}=[name={SASL_USER},password={SASL_PASSWORD}]" for bits in (256, 512)]
        scram += [f"SCRAM-SHA-512=[name={name},password={password}]" for name, password in self.users.items()]
        users = [argument for entry in scram for argument in ("--add-scram", entry)] if self.sasl else []
        formatting = {}
        for node in self._node_ids():
            if (self._home(node) / "data" / "meta.properties").exists():
                continue  # kept data: formatting it again would refuse, and should
            command = [
                *(java, "-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{libs}/*"),
                f"-Dlog4j2.configurationFile={self._home(node) / 'log4j2.properties'}",
                *("kafka.tools.StorageTool", "format", "--cluster-id", self._cluster_id),
                *("--config", str(self._configuration(node)), *users),
            ]
            formatting[node] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for node, process in formatting.items():
            said, _ = process.communicate(timeout=120)
            if process.returncode != 0:
                raise KafkaClusterError(
                    f"Kafka's storage of node {node} could not be formatted; is a property wrong?\n"
                    f"{_last_lines(said, 8)}"
                )

    def _spawn(self, node: int, java: str, libs: Path) -> None:
        home = self._home(node)
        start_mb = self.heap_mb if self.jvm_options == QUIET_JVM else min(self.heap_mb, 256)
        command = [
            *(java, f"-Xms{start_mb}m", f"-Xmx{self.heap_mb}m", *self.jvm_options, "-Xshare:auto"),
            # Where it unpacks its compression libraries: a killed node leaves them there, and they go with the data.
            f"-Djava.io.tmpdir={home}",
            *("-Djava.awt.headless=true", f"-Dlog4j2.configurationFile={home / 'log4j2.properties'}"),
            *("-cp", f"{libs}/*", "kafka.Kafka", str(self._configuration(node))),
        ]
        if not self.detached and sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
        # A session of its own: Ctrl-C in the terminal is for the one who started it, who then stops it in order.
        with (home / "kafka.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=home, start_new_session=True
            )
        self._processes[node] = process
        (home / "pid").write_text(f"{process.pid}\n", encoding="utf-8")

    def _members(self, node: int) -> set[int]:
        return known_brokers(HOST, self.ports[node - 1])

    def _wait_for_members(self, nodes: Sequence[int], members: set[int], deadline: float) -> None:
        """Until each of ``nodes`` answers and knows all of ``members``, or one of them ended."""
        missing = list(nodes)

        def complete() -> bool:
            ended = [node for node in nodes if self.pid(node) is None]
            if ended:
                raise KafkaClusterError(
                    f"Kafka's node {ended[0]} ended while it started; its log says:\n{self._complaints(ended[0])}"
                )
            missing[:] = [node for node in missing if not members <= self._members(node)]
            return not missing

        if not _wait_for(complete, deadline, every_s=0.1):
            raise KafkaClusterError(
                f"Kafka's node {missing[0]} does not answer at {HOST}:{self.ports[missing[0] - 1]} within the time "
                f"given; is the machine busy? Its log says:\n{self.log_tail(missing[0])}"
            )

    def _ends(self, node: int, deadline: float) -> bool:
        return _wait_for(lambda: self.pid(node) is None, deadline)

    def _signal(self, node: int, number: signal.Signals) -> None:
        pid = self.pid(node)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _reap(self) -> None:
        for process in self._processes.values():
            process.wait(timeout=10)
        self._processes.clear()


def _sasl_properties(listeners: Sequence[str], users: Mapping[str, str]) -> dict[str, str]:
    everybody = {SASL_USER: SASL_PASSWORD, **users}
    plain = "".join(f' user_{name}="{password}"' for name, password in everybody.items())
    plain = f'username="{SASL_USER}" password="{SASL_PASSWORD}"{plain}'
    scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    made = {"sasl.enabled.mechanisms": ",".join(SASL_MECHANISMS)}
    for name in listeners:
        listener = f"listener.name.{name.lower()}"
        made |= {
            f"{listener}.plain.sasl.jaas.config": (
                f"org.apache.kafka.common.security.plain.PlainLoginModule required {plain};"
            ),
            f"{listener}.scram-sha-256.sasl.jaas.config": scram,
            f"{listener}.scram-sha-512.sasl.jaas.config": scram,
        }
    return made


# -------------------------------------------------------------------------------------------------------- the parts


def _wait_for(condition: Callable[[], bool], deadline: float, every_s: float = 0.05) -> bool:
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(every_s)
    return True


def _new_cluster_id() -> str:
    # As Kafka does it: never with a dash first, which its commands take for an option.
    while (made := urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        pass
    return made


def _last_lines(text: str, count: int) -> str:
    # Without the frames of Java's stack traces, of which there are more than of what they belong to.
    lines = [line for line in text.strip().splitlines() if not line.startswith("\tat ")]
    return "\n".join(lines[-count:])


def _stands_still(pid: int) -> bool:
    """Whether every thread of a process is stopped; nothing to wait for where the system does not tell."""
    states = []
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            # After the name, which is in parentheses and may hold anything.
            states.append(stat.read_text().rpartition(")")[2].split()[0])
    return all(state in "Tt" for state in states)


def _command_line(pid: int) -> str:
    """The command line of a process; empty when there is none, or only what is left of one that ended."""
    proc = Path("/proc")
    if (proc / "self").exists():
        try:
            return (proc / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return ""
    asked = subprocess.run(
        ["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False, timeout=10
    )
    return asked.stdout


def _by_node(ports: Mapping[str, int]) -> dict[int, int]:
    return {int(node): port for node, port in ports.items()}


class _Ports:
    """What this process was given of the machine's ports, so that no other gets them while it lives.

    Each is a lock on the byte of its number in one file. Between choosing a port and listening at it lie seconds, more
    where a node is killed and comes back, and there may be others who look for free ones meanwhile.
    """

    def __init__(self) -> None:
        self._given: set[int] = set()
        self._file: int | None = None

    def take(self, port: int) -> bool:
        """Whether it is this process's from now on; it never is twice."""
        if port in self._given:
            return False
        if self._file is None:
            path = Path(tempfile.gettempdir()) / f"streamproc-ports-{os.getuid()}.lock"
            # Never closed: that would end the locks.
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
        except OSError:
            return False
        self._given.add(port)
        return True


_PORTS = _Ports()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens at, and that nobody else was given here."""
    # Below the range that outgoing connections take theirs from: there, a client that keeps trying to reach a node that
    # was killed can connect to itself, and the port is gone.
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
        highest = int(text.split()[0])
    except (OSError, ValueError):
        highest = 32768
    numbers = list(range(min(15000, highest // 2), highest))
    random.shuffle(numbers)
    found: list[int] = []
    for port in numbers:
        if len(found) == count:
            return found
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        if _PORTS.take(port):
            found.append(port)
    raise KafkaClusterError(f"There are no {count} free ports below {highest}: stop something that listens.")


def known_brokers(host: str, port: int, timeout_s: float = 2.0) -> set[int]:
    """The node ids that a broker knows of, once it has a controller; empty while nobody answers.

    A Metadata request (version 1, no topics) by hand: this file does without a Kafka client.
    """
    client = b"kafka.py"
    body = struct.pack(">hhih", 3, 1, 1, len(client)) + client + struct.pack(">i", 0)
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            connection.settimeout(timeout_s)
            connection.sendall(struct.pack(">i", len(body)) + body)
            with connection.makefile("rb") as stream:
                (size,) = struct.unpack(">i", stream.read(4))
                answer = stream.read(size)
        return _parse_metadata(answer)
    except (OSError, struct.error):
        return set()


def _parse_metadata(answer: bytes) -> set[int]:
    stream = io.BytesIO(answer)

    def take(form: str) -> int:
        (value,) = struct.unpack(form, stream.read(struct.calcsize(form)))
        return cast("int", value)

    take(">i")  # the correlation id
    nodes = set()
    for _ in range(take(">i")):
        nodes.add(take(">i"))
        stream.read(take(">h"))  # the host's name
        take(">i")  # its port
        stream.read(max(take(">h"), 0))  # its rack, which may be null
    controller = take(">i")
    return nodes if controller >= 0 else set()


# ------------------------------------------------------------------------------------------------------ the command


def _up(arguments: argparse.Namespace) -> int:
    ports = [arguments.port + index for index in range(arguments.nodes)]
    cluster = KafkaCluster(
        arguments.dir, arguments.nodes, ports, dict(arguments.property), sasl=arguments.sasl, detached=True
    )
    there = KafkaCluster.load(arguments.dir)
    if there is not None:
        same = (there.nodes, there.ports, there.properties, there.sasl) == (
            *(cluster.nodes, cluster.ports, cluster.properties, cluster.sasl),
        )
        if there.running():
            if not same:
                raise KafkaClusterError(
                    f"A Kafka with other settings runs at {there.bootstrap_servers}: stop it first, with down."
                )
            if len(there.answering()) == there.nodes:
                print(f"Kafka {kafka_version()} runs already at {there.bootstrap_servers}")
                return 0
            there.stop(keep=True)
        if (there.nodes, there.sasl) != (cluster.nodes, cluster.sasl):
            raise KafkaClusterError(
                f"The data kept in {cluster.directory} is that of {there.nodes} node(s), sasl {there.sasl}: "
                "give the same, or remove it with down."
            )
        # Kept data: the same identity and the same quorum, or the nodes refuse it.
        cluster._cluster_id, cluster._controller_ports = there._cluster_id, there._controller_ports  # noqa: SLF001  # own class
    began = time.monotonic()
    cluster.start(arguments.timeout)
    _say_started(cluster, time.monotonic() - began)
    return 0


def _say_started(cluster: KafkaCluster, seconds: float) -> None:
    plural = "node" if cluster.nodes == 1 else "nodes"
    print(
        f"Kafka {kafka_version()}, {cluster.nodes} {plural}, answers at {cluster.bootstrap_servers} ({seconds:.1f} s)"
    )
    if cluster.sasl:
        print(f"SASL_PLAINTEXT at {cluster.sasl_bootstrap_servers}, user {SASL_USER}, password {SASL_PASSWORD}")


def _down(arguments: argparse.Namespace) -> int:
    cluster = KafkaCluster.load(arguments.dir)
    if cluster is None:
        print(f"No Kafka in {arguments.dir}")
        return 0
    was = cluster.running()
    cluster.stop(keep=arguments.keep)
    kept = "its data is kept" if arguments.keep else "its data is removed"
    print(f"Kafka stopped; {kept}" if was else f"No Kafka ran in {arguments.dir}; {kept}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    cluster = KafkaCluster.load(arguments.dir)
    if cluster is None:
        print(f"No Kafka in {arguments.dir}")
        return 1
    answering = cluster.answering()
    for node, port in zip(range(1, cluster.nodes + 1), cluster.ports, strict=True):
        pid = cluster.pid(node)
        state = "answers" if node in answering else "does not answer" if pid is not None else "stopped"
        print(f"node {node}  {HOST}:{port}  pid {pid or '-'}  {state}")
    print(f"bootstrap {cluster.bootstrap_servers}")
    return 0 if len(answering) == cluster.nodes else 1


def _run(arguments: argparse.Namespace) -> int:
    there = KafkaCluster.load(arguments.dir)
    if there is not None:
        if there.running():
            raise KafkaClusterError(f"A Kafka runs at {there.bootstrap_servers}: stop it first, with down.")
        there.stop()
    ports = [arguments.port + index for index in range(arguments.nodes)]
    cluster = KafkaCluster(arguments.dir, arguments.nodes, ports, dict(arguments.property), sasl=arguments.sasl)
    began = time.monotonic()
    with _terminable(), cluster:
        _say_started(cluster, time.monotonic() - began)
        print("Ctrl-C stops it")
        sys.stdout.flush()
        while len(cluster.running()) == cluster.nodes:
            time.sleep(0.5)
        ended = next(node for node in range(1, cluster.nodes + 1) if node not in cluster.running())
        raise KafkaClusterError(f"Kafka's node {ended} ended; its log says:\n{cluster.log_tail(ended)}")
    return 0


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and Ctrl-C end the block in order, and both are a success: somebody asked for the end."""

    def ask(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, ask)
    with contextlib.suppress(KeyboardInterrupt):
        yield


def _property(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kafka.py", description="Apache Kafka from its jars, on loopback.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function, text in (
        ("up", _up, "start in the background; returns when the cluster answers"),
        ("run", _run, "start and stay in the foreground; nothing is kept"),
        ("down", _down, "stop, and remove the data"),
        ("status", _status, "what runs; exit 1 unless all of it answers"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        command.add_argument("--dir", type=Path, default=BUILD, help="data, logs and process ids (build/kafka)")
        if name in {"up", "run"}:
            command.add_argument("--nodes", type=int, default=1, choices=(1, 3))
            command.add_argument("--port", type=int, default=9092, help="of the first node; the next ones follow")
            command.add_argument("--sasl", action="store_true", help="a SASL_PLAINTEXT listener beside, ten ports up")
            command.add_argument("--property", type=_property, action="append", default=[], metavar="K=V")
            command.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS")
        if name == "down":
            command.add_argument("--keep", action="store_true", help="keep the data for the next up")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 is success, 1 a failure that was told in one sentence."""
    arguments = _parser().parse_args(argv)
    try:
        function = cast("Callable[[argparse.Namespace], int]", arguments.function)
        return function(arguments)
    except KafkaClusterError as error:
        print(f"kafka.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
