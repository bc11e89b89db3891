from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamproc.backend.project import read_project
from streamproc.errors import InferenceBackendLoadError
from streamproc.loaders import InferenceBackendLoader, LocalLoader

SOURCE = """
import os
import beside_the_backend

from streamproc.backend import InferenceBackend

class Backend(InferenceBackend):
    at_import = os.environ.get("PROJECT_MODE")

    def execute(self, inputs):
        return [dict(record, mode=self.at_import, beside=beside_the_backend.VALUE) for record in inputs]
"""

YAML = """
name: my-analytic
version: 0.2.0
maintainers: [alice@example.com]
inference_backend: project_backend:Backend
loader: {loader}
python_version: 3.11.0
env: {{PROJECT_MODE: fast}}
backend_config: {{feature_names: [a], output_keys: [b]}}
extra: {{anything: [1, 2]}}
"""


@pytest.fixture(autouse=True)
def _process_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PROJECT_MODE", "slow")
    modules, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture(params=["local", "module"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "project_backend.py").write_text(SOURCE)
    (tmp_path / "beside_the_backend.py").write_text("VALUE = 7")
    (tmp_path / "packflow.yaml").write_text(YAML.format(loader=request.param))
    return tmp_path


def test_a_project_is_loaded_with_its_configuration_and_environment(project: Path) -> None:
    backend = InferenceBackendLoader.from_project(project)
    assert backend([{"a": 1, "b": 2}]) == [{"a": 1, "mode": "fast", "beside": 7}]
    assert os.environ["PROJECT_MODE"] == "fast"


def test_keyword_arguments_win_over_the_projects_configuration_key_by_key(project: Path) -> None:
    backend = LocalLoader.from_project(str(project), feature_names=["b"])
    assert backend.config.feature_names == ["b"]
    assert backend.config.output_keys == ["b"]


def test_a_variable_that_changes_is_warned_about_without_its_value(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    InferenceBackendLoader.from_project(project)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "PROJECT_MODE" in warnings[0]
    assert "slow" not in warnings[0]
    caplog.clear()
    InferenceBackendLoader.from_project(project)
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_a_minimal_project_has_packflows_defaults(tmp_path: Path) -> None:
    (tmp_path / "packflow.yaml").write_text("name: x")
    project = read_project(tmp_path)
    assert (project.inference_backend, project.loader, project.backend_config, project.env) == (
        "inference:Backend",
        "local",
        {},
        {},
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no packflow project"),
        (b"", "not a valid project file: file: "),
        (b"name: [", "not valid YAML"),
        (b"\xff", "not valid YAML"),
        (b"version: 1.0.0", "name: Field required"),
        (b"name: 1x", "name: "),
        (b"name: x\nunknown: 1", "unknown: "),
        (b"name: x\nloader: remote", "loader: "),
        (b"name: x\ninference_backend: served", "inference_backend: "),
        (b"name: x\nenv: {A: 1}", "env.A: "),
    ],
)
def test_a_project_file_that_cannot_be_used_is_a_load_error_that_says_why(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "packflow.yaml").write_bytes(content)
    with pytest.raises(InferenceBackendLoadError, match=message) as caught:
        InferenceBackendLoader.from_project(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_project_directory_in_the_place_of_the_file_is_a_load_error(tmp_path: Path) -> None:
    (tmp_path / "packflow.yaml").mkdir()
    with pytest.raises(InferenceBackendLoadError, match="cannot be read"):
        read_project(tmp_path)
