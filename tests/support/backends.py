"""Backends for tests: what a record says is what happens to it."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from streamproc import BackendConfig, InferenceBackend, RecordError

Rows = list[dict[str, Any]]


class Identity(InferenceBackend):
    """Answers what it was asked."""

    def execute(self, inputs: Rows) -> Rows:
        """The inputs."""
        return inputs


class Scripted(InferenceBackend):
    """Does to a batch what its records ask for by ``do``; a file at ``once`` makes it happen one time only."""

    def execute(self, inputs: Rows) -> list[Any]:
        """An output for each record."""
        return [self._act(record) for record in inputs]

    def transform_outputs(self, inputs: list[Any]) -> list[Any]:
        """Leave out an output where a record asks for it."""
        return [output for output in inputs if output != "omit"]

    def _act(self, record: dict[str, Any]) -> Any:
        action = record.get("do")
        if action is None or not self._first_time(record):
            return {"id": record["id"], "pid": os.getpid()}
        if action == "fail" and not Path(record["until"]).exists():
            raise ValueError("the model is broken")
        self._raise(action, record)
        if action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "exit":
            os._exit(3)
        if action == "refuse":
            return RecordError(f"record {record['id']} is refused: {record.get('why', chr(0xD800))}")
        if action == "list":
            return [1, 2]
        if action == "object":
            return {"object": object()}
        if action == "environment":
            return {"id": record["id"], "value": os.environ.get(record["name"])}
        if action == "print":
            os.write(int(sys.argv[1]), record["text"].encode())
        if action == "fork":
            with subprocess.Popen(["sleep", "600"]) as child:
                Path(record["child"]).write_text(str(child.pid))
                self._compute(record)
        if action == "compute":
            self._compute(record)
        return "omit" if action == "omit" else {"id": record["id"]}

    def _raise(self, action: str, record: dict[str, Any]) -> None:
        """What raises: by itself, far down, or since memory ran out as Python says it, or torch of a GPU."""
        if action == "raise":
            raise ValueError(f"record {record['id']} is at fault")
        if action == "surrogate":
            raise ValueError("half a pair: \ud800")
        if action == "nest":
            self._nest(record["depth"], record["why"])
        if action == "memory":
            raise MemoryError("no more")
        if action == "device":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if action == "allocate":
            self._allocate()

    def _nest(self, depth: int, why: str) -> None:
        if depth == 0:
            raise ValueError(why)
        (self._nest if depth % 2 else self._nest_too)(depth - 1, why)

    def _nest_too(self, depth: int, why: str) -> None:
        self._nest(depth, why)

    @staticmethod
    def _allocate() -> None:
        """Take memory without end, but not so fast that nobody can look."""
        held = []
        while True:
            held.append(b"x" * 16_777_216)
            time.sleep(0.01)

    @staticmethod
    def _compute(record: dict[str, Any]) -> None:
        """Hold the processor until ``until`` exists: a test decides when."""
        until = Path(record["until"])
        while not until.exists():
            time.sleep(0.005)

    @staticmethod
    def _first_time(record: dict[str, Any]) -> bool:
        if "once" not in record:
            return True
        try:
            Path(record["once"]).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class Growing(InferenceBackend):
    """Answers with as many bytes as a record asks for by ``bytes``."""

    def execute(self, inputs: Rows) -> Rows:
        """The id, and that many characters."""
        return [{"id": record["id"], "pad": "y" * record.get("bytes", 0)} for record in inputs]


class Broken(InferenceBackend):
    """Cannot be initialized."""

    def initialize(self) -> None:
        """Fail."""
        raise OSError("the weights are not there")

    def execute(self, inputs: Rows) -> Rows:
        """Never reached."""
        return inputs


class ReadyWhenTold(InferenceBackend):
    """Is ready when the file named by the environment exists."""

    def ready(self) -> bool:
        """Whether the file is there."""
        return Path(os.environ["READY_FILE"]).exists()

    def execute(self, inputs: Rows) -> Rows:
        """The inputs."""
        return inputs


class OneAtATime(InferenceBackend):
    """Is like a model that fits the device once: a second one cannot be initialized."""

    def initialize(self) -> None:
        """Take the place, or say that it is taken."""
        place = Path(os.environ["ONLY_ONCE_FILE"])
        if place.exists():
            place.with_suffix(".again").touch()
            raise MemoryError("the device is full")
        place.touch()

    def execute(self, inputs: Rows) -> Rows:
        """The inputs."""
        return inputs


class NamedConfig(BackendConfig):
    """With a mapping from numbers."""

    names: dict[int, str]


class Named(InferenceBackend):
    """Answers with a name from its configuration."""

    backend_config_model = NamedConfig
    config: NamedConfig

    def execute(self, inputs: Rows) -> Rows:
        """The name of each id."""
        return [{"name": self.config.names[record["id"]]} for record in inputs]


class Forking(InferenceBackend):
    """Starts a process as multiprocessing does by default on Linux, and ends it."""

    def execute(self, inputs: Rows) -> Rows:
        """How the process ended."""
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
        child.terminate()
        child.join()
        return [{"code": child.exitcode} for _ in inputs]


class Measured(Identity):
    """Tells lengths, and does to the process that measures what a record asks for by ``measure``."""

    def initialize(self) -> None:
        """Load the weights, which the measuring process must not."""
        self.initialized = True

    def length(self, record: dict[str, Any]) -> Any:
        """The words of the text."""
        if hasattr(self, "initialized"):
            raise AssertionError("the weights were loaded")
        action = record.get("measure")
        if action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "raise":
            raise ValueError("no words")
        if action == "wait":
            Path(record["began"]).touch()
            while not Path(record["until"]).exists():
                time.sleep(0.01)
        if action == "print":
            os.write(int(sys.argv[1]), b"what a library prints, all of it longer than a header")
        return record["answer"] if action == "answer" else len(record["text"].split())


class Padding(InferenceBackend):
    """Pads like an attention model, to the longest ``pad``: n records take 4·n·L² bytes, and ROOM_MB there are."""

    def initialize(self) -> None:
        """Take the limit from here on."""
        import numpy
        import psutil

        self.ones = numpy.ones
        limit = psutil.Process().memory_info().vms + (int(os.environ["ROOM_MB"]) << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    def execute(self, inputs: Rows) -> Rows:
        """How much the batch took; raises MemoryError where that is more than there is."""
        longest = max(len(record["pad"]) for record in inputs)
        scores = self.ones((len(inputs), longest, longest), "float32")
        return [{"id": record["id"], "bytes": scores.nbytes} for record in inputs]
