"""``run_backend``: what a worker would deliver, and what it would not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamproc import BackendConfig, InferenceBackend, MultiTaskBackend, RecordError, Settings, Task
from streamproc.errors import InferenceBackendLoadError, InferenceBackendValidationError
from streamproc.testing import run_backend

Rows = list[dict[str, Any]]


class Config(BackendConfig):
    factor: int = 2


class Doubling(InferenceBackend):
    backend_config_model = Config
    config: Config
    sizes: list[int]

    def initialize(self) -> None:
        self.sizes = []

    def execute(self, inputs: Rows) -> list[Any]:
        self.sizes.append(len(inputs))
        return [
            RecordError("odd") if it["n"] is None else {"n": np.float64(it["n"] * self.config.factor)} for it in inputs
        ]


def test_outputs_are_as_a_consumer_sees_them() -> None:
    outputs = run_backend(Doubling, [{"n": 1}, {"n": None}, {"n": 2.5}])
    assert outputs[0] == {"n": 2.0}
    assert isinstance(outputs[1], RecordError)
    assert outputs[2] == {"n": 5.0}
    assert type(outputs[0]["n"]) is float


def test_batches_and_configuration() -> None:
    backend = Doubling()
    assert run_backend(backend, [{"n": it} for it in range(5)], batch_size=2) == [{"n": 2.0 * it} for it in range(5)]
    assert backend.sizes == [2, 2, 1]
    assert run_backend(Doubling, [{"n": 1}], config={"factor": 10}) == [{"n": 10.0}]
    assert run_backend(Doubling, []) == []


def test_a_path_and_settings_name_a_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shouting.py").write_text(
        "from streamproc import InferenceBackend\n"
        "class Backend(InferenceBackend):\n"
        "    def execute(self, inputs):\n"
        "        return [{'text': it['text'].upper()} for it in inputs]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run_backend("shouting:Backend", [{"text": "a"}]) == [{"text": "A"}]
    with pytest.raises(InferenceBackendLoadError):
        run_backend("whispering:Backend", [])
    settings = Settings.model_validate(
        {
            "name": "app",
            "backend": {"path": "shouting:Backend", "base_dir": str(tmp_path)},
            "tasks": {"text": {"input": {"topics": ["in"]}}},
        }
    )
    assert run_backend(settings, [{"text": "a"}], task="text") == [{"text": "A"}]


class Both(MultiTaskBackend):
    class Text(Task["Both"]):
        def execute(self, inputs: Rows) -> Rows:
            return [{"is": "text"} for _ in inputs]

    class Image(Task["Both"]):
        def execute(self, inputs: Rows) -> Rows:
            return [{"is": "image"} for _ in inputs]


def test_of_several_tasks_the_one_that_is_named() -> None:
    assert run_backend(Both, [{}], task="image") == [{"is": "image"}]
    assert run_backend(Both, [{}], task="text") == [{"is": "text"}]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ([], "one output per input, but returned 0 for 1"),
        ([1], "the output at index 0 is not a dict but int"),
        ([{"a": object()}], "the output at index 0 cannot be written as JSON"),
        ({"a": 1}, "the outputs must be a list, "),
    ],
)
def test_what_a_worker_would_not_deliver_is_an_error(answer: Any, why: str) -> None:
    class Wrong(InferenceBackend):
        def execute(self, inputs: Rows) -> Any:  # noqa: ARG002 - whatever they are
            return answer

    with pytest.raises(Exception, match=why) as caught:
        run_backend(Wrong, [{}])
    assert type(caught.value).__name__ in (InferenceBackendValidationError.__name__, "InferenceBackendRuntimeError")


ECHO = """
from streamproc import InferenceBackend

class Backend(InferenceBackend):
    def execute(self, inputs):
        return [{key: value for key, value in it.items()} for it in inputs]
"""


@pytest.mark.parametrize(
    ("input_format", "output_format", "record", "result"),
    [
        ("raw", "raw", {"value": b"\xff\x00"}, {"value": b"\xff\x00"}),
        ("msgpack", "msgpack", {"text": "a", "image": b"\xff"}, {"text": "a", "image": b"\xff"}),
        ("msgpack", "msgpack", {"image": {"$base64": "/w=="}}, {"image": b"\xff"}),
        ("avro", "avro", {"text": "a", "image": b"\xff"}, {"text": "a", "image": "/w=="}),
        ("msgpack", "json", {"text": "a"}, {"text": "a"}),
        ("json", "msgpack", {"text": "a"}, {"text": "a"}),
    ],
)
def test_with_settings_records_and_outputs_are_those_of_the_tasks_formats(
    tmp_path: Path, input_format: str, output_format: str, record: dict[str, Any], result: dict[str, Any]
) -> None:
    (tmp_path / "echoing.py").write_text(ECHO)
    settings = Settings.model_validate(
        {
            "name": "app",
            "backend": {"path": "echoing:Backend", "base_dir": str(tmp_path)},
            "tasks": {
                "text": {"input": {"topics": ["in"], "format": input_format}, "output": {"format": output_format}}
            },
            "schema_registry": {"url": "http://127.0.0.1:1"},
        }
    )
    assert run_backend(settings, [record], task="text") == [result]
    assert run_backend(settings, [record]) == [result], "of the only task"


def test_bytes_are_no_json() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        run_backend(Doubling, [{"n": b"bytes"}])
