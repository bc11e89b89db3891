"""docker-compose.yml without Docker: each service's own command, environment and health check, run as processes.

What an engine would do, as far as the file says it: variables with their defaults, the order of ``depends_on`` with its
conditions, health checks, exit codes. What only an engine has is put in its place: the names of services are this
machine's loopback, ports that the file fixes are free ones, volumes are a folder. Kafka is the version of the image,
from its jars, and takes its configuration from the service's environment as the image does. Images are not built.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from deploy.kafka.kafka import HOST, LIBS, KafkaCluster, find_java, free_ports

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docker-compose.yml"
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}")
KAFKA_COMMANDS = {"/opt/kafka/bin/kafka-broker-api-versions.sh": "org.apache.kafka.tools.BrokerApiVersionsCommand"}
"""What the scripts of Kafka's image run."""
UP_S = 120.0


class Compose:
    """A compose file on its way up; a context manager that ends what it started."""

    def __init__(self, directory: Path, *, file: Path = FILE, environ: Mapping[str, str] | None = None) -> None:
        """``environ`` is what a user would set before ``docker compose``; volumes and logs go to ``directory``."""
        self._directory = directory
        names = ("HOST", "INTERNAL", "CONTROLLER", "HTTP", "STATS")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        environ = {"STREAMPROC_KAFKA_PORT": str(self.ports["HOST"]), **(environ or {})}
        text = VARIABLE.sub(lambda it: environ.get(it["name"]) or it["default"] or "", file.read_text())
        loaded: dict[str, Any] = yaml.safe_load(text)
        self.services: dict[str, dict[str, Any]] = loaded["services"]
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._kafka: KafkaCluster | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self._processes.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._kafka is not None:
            self._kafka.stop()

    @property
    def bootstrap_servers(self) -> str:
        """Kafka as it is published to the host."""
        return f"{HOST}:{self.ports['HOST']}"

    def selected(self, *profiles: str) -> list[str]:
        """The services that ``docker compose --profile …`` starts."""
        return [
            name
            for name, service in self.services.items()
            if not service.get("profiles") or set(service["profiles"]) & set(profiles)
        ]

    def up(self, name: str) -> subprocess.Popen[bytes]:
        """Start a service after what it depends on, each as far as the file asks; its process."""
        if name not in self._processes:
            for needed, how in self.services[name].get("depends_on", {}).items():
                if needed == "kafka":
                    self._start_kafka()
                else:
                    self.up(needed)
                self.until(needed, how["condition"])
            self._processes[name] = self._start(name)
        return self._processes[name]

    def has_ended(self, name: str) -> bool:
        """Whether a service that was started has ended."""
        return name in self._processes and self._processes[name].poll() is not None

    def log(self, name: str) -> str:
        """What a service has said."""
        return (self._directory / f"{name}.log").read_text(errors="replace")

    def healthy(self, name: str) -> bool:
        """One run of a service's own health check."""
        kind, *command = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        command = [self._here(it) for it in command]
        if command[0] in KAFKA_COMMANDS:
            command = [find_java(), "-cp", f"{LIBS}/*", KAFKA_COMMANDS[command[0]], *command[1:]]
        elif command[0] == "python":
            command[0] = sys.executable
        return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0

    def until(self, name: str, condition: str) -> None:
        """Wait for a condition of ``depends_on``."""
        deadline = time.monotonic() + UP_S
        with self._told_by(name):
            if condition == "service_healthy":
                while not self.healthy(name):
                    assert time.monotonic() < deadline, f"{name} did not become healthy"
                    assert name == "kafka" or self._processes[name].poll() is None, f"{name} has ended"
            else:
                assert condition == "service_started", condition

    # -- what an engine does

    @contextlib.contextmanager
    def _told_by(self, name: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if name in self._processes:
                error.add_note(f"{name}'s log:\n{self.log(name)[-4_000:]}")
            raise

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        service = self.services[name]
        entrypoint = [self._here(it) for it in service.get("entrypoint", ["streamproc"])]
        command = [*entrypoint, *(self._here(it) for it in service["command"])]
        own = {key: self._here(str(value)) for key, value in service.get("environment", {}).items()}
        # The image has `streamproc` on its path.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        inherited = {key: os.environ[key] for key in ("HOME", "TMPDIR", "LANG") if key in os.environ} | {"PATH": path}
        with (self._directory / f"{name}.log").open("wb") as log:
            return subprocess.Popen(command, cwd=ROOT, env={**inherited, **own}, stdout=log, stderr=log)

    def _start_kafka(self) -> None:
        if self._kafka is not None:
            return
        environment = self.services["kafka"]["environment"]
        # As the image does it: KAFKA_NODE_ID is node.id.
        properties = {
            key.removeprefix("KAFKA_").lower().replace("_", "."): self._here(str(value))
            for key, value in environment.items()
        }
        properties["log.dirs"] = str(self._directory / "kafka" / "node-1" / "data")
        self._kafka = KafkaCluster(self._directory / "kafka", ports=[self.ports["HOST"]], properties=properties)
        self._kafka.start()

    def _here(self, text: str) -> str:
        """A text of the file, with this machine's addresses."""
        ports = self.ports
        text = text.replace("INTERNAL://:19092", f"INTERNAL://{HOST}:{ports['INTERNAL']}")
        text = text.replace("HOST://:9092", f"HOST://{HOST}:{ports['HOST']}")
        for there in ("kafka:19092", "localhost:19092"):
            text = text.replace(there, f"{HOST}:{ports['INTERNAL']}")
        text = text.replace("localhost:9093", f"{HOST}:{ports['CONTROLLER']}")
        for there, port in (("8080", str(ports["HTTP"])), ("8090", str(ports["STATS"]))):
            text = port if text == there else text.replace(f"127.0.0.1:{there}", f"{HOST}:{port}")
        # Each container has a /tmp of its own.
        return text.replace("/tmp/applied", f"{self._directory}/applied")  # noqa: S108 - what the file says
