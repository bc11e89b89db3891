from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import packflow
import pytest

from streamproc.backend import BackendConfig, InferenceBackend, MultiTaskBackend, Task, resolve_task
from streamproc.errors import InferenceBackendInitializationError, InferenceBackendLoadError, PreprocessorInitError


class Clip(MultiTaskBackend):
    loads = 0
    up = True

    def initialize(self) -> None:
        type(self).loads += 1
        self.scale = 10

    def ready(self) -> bool:
        return self.up

    class Text(Task["Clip"]):
        backend_config = {"feature_names": ["text"]}  # noqa: RUF012 as a user would write it

        def execute(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [{"length": self.backend.scale * len(record["text"]), "seen": list(record)} for record in inputs]

    class ImagePixels(Task["Clip"]):
        backend_config = {"input_format": "numpy", "feature_names": ["x", "y"]}  # noqa: RUF012

        def transform_inputs(self, inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return inputs * self.backend.scale

        def execute(self, inputs: np.ndarray[Any, Any]) -> Any:
            return inputs.sum(axis=1)

        def transform_outputs(self, outputs: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
            return [{"sum": float(value)} for value in outputs]


def test_tasks_share_the_weights_and_nothing_else() -> None:
    before = Clip.loads
    backend = Clip()
    assert backend.task_names == ("text", "image_pixels")
    text, image = backend.task("text"), backend.task("image_pixels")
    assert text([{"text": "abc", "other": 1}]) == [{"length": 30, "seen": ["text"]}]
    assert image([{"x": 1, "y": 2}] * 5) == [{"sum": 30.0}] * 5
    assert text({"text": "a"}) == {"length": 10, "seen": ["text"]}
    assert (text.get_metrics().batch_size, image.get_metrics().batch_size) == (1, 5)
    assert text.get_metrics().execution_times.transform_inputs is None
    assert image.get_metrics().execution_times.transform_inputs is not None
    assert Clip.loads == before + 1


def test_a_task_can_be_checked_as_a_backend_can() -> None:
    assert Clip().task("text").check_io({"text": "a"}) == {"length": 10, "seen": ["text"]}


def test_a_task_is_ready_when_its_backend_is() -> None:
    backend = Clip()
    assert backend.task("text").ready() is True
    backend.up = False
    assert backend.task("text").ready() is False


def test_settings_hold_for_all_tasks_and_the_nearer_to_the_task_the_stronger() -> None:
    backend = Clip(
        verbose=True, feature_names=["everywhere"], tasks={"image_pixels": {"feature_names": ["z"], "verbose": False}}
    )
    text, image = backend.task("text").config, backend.task("image_pixels").config
    assert backend.config.feature_names == ["everywhere"]
    assert (text.feature_names, text.verbose) == (["text"], True)
    assert (image.feature_names, image.verbose, image.input_format.value) == (["z"], False, "numpy")


def test_the_configuration_file_reaches_a_single_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"configs": {"tasks": {"text": {"rename_fields": {"body": "text"}}}}}))
    monkeypatch.setenv("BACKEND_CONFIG_FILE_PATH", str(file))
    backend = Clip(tasks={"text": {"output_keys": ["length"]}})
    assert backend.task("text")({"body": "ab"}) == {"length": 20, "seen": ["text"]}
    assert backend.task("text").config.output_keys == ["length"]


def test_a_task_has_a_configuration_model_of_its_own() -> None:
    class LimitConfig(BackendConfig):
        limit: int

    class Limited(MultiTaskBackend):
        class Cut(Task["Limited"]):
            backend_config_model = LimitConfig
            config: LimitConfig

            def execute(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
                return inputs[: self.config.limit]

    assert Limited(tasks={"cut": {"limit": 1}}).task("cut")([{}, {}]) == [{}]


def test_a_subclass_inherits_replaces_and_removes_tasks() -> None:
    class Smaller(Clip):
        class Text(Task["Smaller"]):
            def execute(self, inputs: Any) -> Any:
                return [{"replaced": True} for _ in inputs]

        ImagePixels = None  # type: ignore[assignment]

    backend = Smaller()
    assert backend.task_names == ("text",)
    assert backend.task("text")({}) == {"replaced": True}


def test_task_classes_may_be_defined_elsewhere_and_share_a_base() -> None:
    class Encode(Task):
        side = ""

        def execute(self, inputs: Any) -> Any:
            return [{"side": self.side} for _ in inputs]

    class Query(Encode):
        name = "search-query"
        side = "q"

    class Pair(MultiTaskBackend):
        _Common = Encode
        query = Query
        passage = type("Passage", (Encode,), {"side": "p"})

    backend = Pair()
    assert backend.task_names == ("search-query", "passage")
    assert backend.task("search-query")({}) == {"side": "q"}
    assert backend.task("search-query").name == "search-query"


def test_a_failing_initialize_is_an_initialization_error() -> None:
    class Broken(Clip):
        def initialize(self) -> None:
            raise OSError("no weights")

    with pytest.raises(InferenceBackendInitializationError, match=r"Broken.*no weights"):
        Broken()


def test_a_wrong_setting_of_a_task_is_found_before_the_weights_are_loaded() -> None:
    before = Clip.loads
    with pytest.raises(PreprocessorInitError):
        Clip(tasks={"image_pixels": {"feature_names": []}})
    with pytest.raises(InferenceBackendLoadError, match=r"no task 'txt'.*text, image_pixels"):
        Clip(tasks={"txt": {}})
    assert Clip.loads == before


def test_tasks_that_cannot_be_served_are_refused_by_name() -> None:
    class Same(Clip):
        class Other(Task["Same"]):
            name = "text"

            def execute(self, inputs: Any) -> Any:
                return inputs

    class Abstract(MultiTaskBackend):
        class Text(Task["Abstract"]):
            pass

    with pytest.raises(InferenceBackendLoadError, match="two tasks named 'text'"):
        Same()
    with pytest.raises(InferenceBackendLoadError, match=r"'text' of Abstract.*execute\(\)"):
        Abstract()
    with pytest.raises(InferenceBackendLoadError, match="has no tasks"):
        type("Empty", (MultiTaskBackend,), {})()


def test_a_task_name_is_resolved_to_what_serves_it() -> None:
    backend = Clip()
    assert resolve_task(backend, "text") is backend.task("text")
    with pytest.raises(InferenceBackendLoadError, match=r"no task 'audio'.*text, image_pixels"):
        resolve_task(backend, "audio")


def test_a_plain_backend_serves_any_task_with_itself() -> None:
    class Plain(InferenceBackend):
        def execute(self, inputs: Any) -> Any:
            return inputs

    backend = Plain()
    assert resolve_task(backend, "anything") is backend


def test_packflows_backend_serves_any_task_with_itself() -> None:
    class Theirs(packflow.InferenceBackend):  # type: ignore[misc]  # it has no types
        def execute(self, inputs: Any) -> Any:
            return inputs

    backend = Theirs()
    served = resolve_task(backend, "anything")
    assert served is backend
    assert served({"a": 1}) == {"a": 1}
    assert served.get_metrics().batch_size == 1


def test_what_is_no_backend_serves_no_task() -> None:
    with pytest.raises(InferenceBackendLoadError, match=r"'text'.*dict.*no backend"):
        resolve_task({}, "text")
