"""``config show``: every setting with its place, and no secret."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from streamproc.cli import root
from streamproc.settings import Settings

SETTINGS = """\
name: app
backend:
  path: "inference:Backend"
  config: {feature_names: [a, b], api_key: hunter2, nested: {token: hunter2, empty: {}}}
pool: {env: {"HF TOKEN": hunter2, OMP_NUM_THREADS: "2"}}
kafka:
  security_protocol: SASL_PLAINTEXT
  sasl_username: me
tasks:
  text:
    input: {topics: [in]}
"""

Show = Callable[..., str]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Show:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STREAMPROC_KAFKA__SASL_PASSWORD", "hunter2")
    (tmp_path / "streamproc.yaml").write_text(SETTINGS)

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            root.command()(args=["config", "show", *arguments], prog_name="streamproc")
        assert caught.value.code == 0
        return capsys.readouterr().out

    return run


def test_the_settings_in_effect_are_yaml_that_could_be_settings(show: Show) -> None:
    out = show()
    assert "hunter2" not in out
    settings = Settings.model_validate(yaml.safe_load(out))
    assert settings.tasks["text"].output.topic == "in.results"
    assert settings.backend.config["feature_names"] == ["a", "b"]


def test_every_setting_has_its_place(show: Show) -> None:
    lines = {line.split(":")[0].strip(): line for line in show().splitlines()}
    assert lines["path"].endswith("# streamproc.yaml:3")
    assert "environment variable STREAMPROC_KAFKA__SASL_PASSWORD" in lines["sasl_password"]
    assert lines["max_size"].endswith("# default")


def test_a_script_gets_settings_and_places_as_json(show: Show) -> None:
    out = show("--json")
    assert "hunter2" not in out
    shown = json.loads(out)
    assert shown["settings"]["backend"]["config"]["nested"] == {"token": "********", "empty": {}}
    assert shown["settings"]["pool"]["env"]["OMP_NUM_THREADS"] == "2"
    assert shown["places"]["pool.env.OMP_NUM_THREADS"] == "streamproc.yaml:5"
