"""Settings with fields of the user's own: read from file and environment, and complained of, as ours are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from streamproc.cli import config
from streamproc.errors import SettingsError
from streamproc.runtime.startup import backend_setup
from streamproc.settings import Settings
from streamproc.settings_loading import load_settings, load_with_places

CLASS = '''
from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SecretStr, model_validator
from streamproc import Settings
from streamproc.settings import Section


class Model(Section):
    """Where the model is."""

    path: str = "model.onnx"
    layers: list[int] = Field(default_factory=list)


class MySettings(Settings):
    """Ours, and these."""

    threshold: float = Field(default=0.5, ge=0, le=1)
    """Below it nobody is told."""
    device: Literal["cpu", "cuda"] = "cpu"
    api_key: SecretStr | None = None
    model: Model = Model()

    @model_validator(mode="after")
    def _keys_go_with_devices(self) -> MySettings:
        if self.device == "cuda" and self.threshold == 0:
            raise ValueError("threshold 0 is for the CPU")
        return self

    def backend_config(self) -> dict[str, Any]:
        return {**self.backend.config, "threshold": self.threshold, "layers": self.model.layers}
'''
FILE = """\
settings_class: own:MySettings
name: app
backend: {path: "inference:Backend", config: {a: 1}}
tasks: {text: {input: {topics: [in]}}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(CLASS)
    (tmp_path / "streamproc.yaml").write_text(FILE)
    return tmp_path / "streamproc.yaml"


def own(settings: Settings) -> dict[str, object]:
    return settings.model_dump(include={"threshold", "device", "api_key", "model"}, mode="json")


def test_own_fields_have_their_defaults_and_ours_stay(file: Path) -> None:
    settings = load_settings(file, {})
    assert isinstance(settings, Settings)
    assert own(settings) == {
        "threshold": 0.5,
        "device": "cpu",
        "api_key": None,
        "model": {"path": "model.onnx", "layers": []},
    }
    assert settings.tasks["text"].batch.max_size == 64


def test_own_fields_come_from_file_and_environment_and_know_their_place(file: Path) -> None:
    file.write_text(f"{FILE}threshold: 0.25\nmodel: {{path: a.onnx}}\n")
    environ = {"STREAMPROC_DEVICE": "cuda", "STREAMPROC_MODEL__LAYERS": "[1, 2]", "STREAMPROC_API_KEY": "hunter2"}
    loaded = load_with_places(file, environ)
    assert own(loaded.settings) == {
        "threshold": 0.25,
        "device": "cuda",
        "api_key": "**********",
        "model": {"path": "a.onnx", "layers": [1, 2]},
    }
    assert loaded.place_of(("threshold",)).endswith("streamproc.yaml:5")
    assert loaded.place_of(("model", "layers")) == "environment variable STREAMPROC_MODEL__LAYERS"


def test_own_fields_reach_the_backend_where_the_class_says_so(file: Path) -> None:
    settings = load_settings(file, {"STREAMPROC_THRESHOLD": "0.75"})
    assert yaml.safe_load(backend_setup(settings)["config"]) == {"a": 1, "threshold": 0.75, "layers": []}


def test_the_environment_may_name_the_class(file: Path) -> None:
    file.write_text("\n".join(FILE.splitlines()[1:]))
    settings = load_settings(file, {"STREAMPROC_SETTINGS_CLASS": "own:MySettings", "STREAMPROC_THRESHOLD": "1"})
    assert own(settings)["threshold"] == 1.0


@pytest.mark.parametrize(
    ("line", "environ", "says"),
    [
        ("threshold: 2", {}, ["streamproc.yaml:5", "threshold", "expected at most 1, got 2"]),
        ("treshold: 1", {}, ["streamproc.yaml:5", "treshold", "did you mean threshold?"]),
        ("", {"STREAMPROC_DEVICE": "gpu"}, ["STREAMPROC_DEVICE", "expected cpu or cuda, got 'gpu'"]),
        ("", {"STREAMPROC_TRESHOLD": "1"}, ["STREAMPROC_TRESHOLD", "did you mean STREAMPROC_THRESHOLD?"]),
        ("model: {pat: x}", {}, ["model.pat", "did you mean path?"]),
        ("api_key: [hunter2]", {}, ["api_key", "got a list"]),
        ("device: cuda\nthreshold: 0", {}, ["threshold 0 is for the CPU"]),
    ],
)
def test_what_is_wrong_with_own_fields_is_said_as_of_ours(
    file: Path, line: str, environ: dict[str, str], says: list[str]
) -> None:
    file.write_text(f"{FILE}{line}\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(file, environ)
    assert all(it in str(caught.value) for it in says), str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("own", "is no module and name"),
        ("own:No-Name", "is no module and name"),
        ("nowhere:MySettings", "No module named 'nowhere'"),
        ("own:Nothing", "has no attribute 'Nothing'"),
        ("own:Model", "derive a class from streamproc.Settings"),
        ("own:CLASS", "has no attribute"),
        ("broken:MySettings", "ZeroDivisionError"),
    ],
)
def test_a_class_that_is_none_is_refused_at_its_line(file: Path, path: str, says: str) -> None:
    (file.parent / "broken.py").write_text("1 / 0\n")
    file.write_text(FILE.replace("own:MySettings", f'"{path}"'))
    with pytest.raises(SettingsError, match="settings_class") as caught:
        load_settings(file, {})
    assert says in str(caught.value)
    assert "streamproc.yaml:1" in str(caught.value)


def test_a_class_is_forgotten_with_its_file(file: Path, tmp_path: Path) -> None:
    load_settings(file, {})
    plain = tmp_path / "plain.yaml"
    plain.write_text("\n".join([*FILE.splitlines()[1:], "threshold: 1"]))
    with pytest.raises(SettingsError, match="is no setting"):
        load_settings(plain, {})


def test_the_schema_has_own_fields_where_their_file_is_named(file: Path) -> None:
    answer = CliRunner().invoke(config.app, ["schema", "-c", str(file)])
    assert answer.exit_code == 0, answer.output
    properties = json.loads(answer.output)["properties"]
    assert properties["threshold"]["description"] == "Below it nobody is told."
    assert "http" in properties
    assert "threshold" not in json.loads(CliRunner().invoke(config.app, ["schema"]).output)["properties"]
