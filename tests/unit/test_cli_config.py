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


def test_secrets_in_lists_and_texts_and_below_secret_keys_are_hidden(show: Show, tmp_path: Path) -> None:
    config = (
        "{dbs: [{password: hunter2}], dsn: 'host=a password=hunter2', secrets: {a: hunter2, b: [hunter2]}, "
        "tokenizer: bert, max_tokens: 5}"
    )
    (tmp_path / "streamproc.yaml").write_text(SETTINGS.replace("{feature_names: [a, b]", f"{{all: {config}"))
    out = show()
    assert "hunter2" not in out
    shown = yaml.safe_load(out)["backend"]["config"]["all"]
    assert (shown["tokenizer"], shown["max_tokens"]) == ("bert", 5)
    assert "hunter2" not in show("--json")


def test_odd_values_are_shown_as_they_are_read(show: Show, tmp_path: Path) -> None:
    config = (
        '{"yes": 1, "on": 2, "1": 3, "a: b": 4, nan: .nan, inf: [-.inf, .inf], big: 123456789012345678901234567890, '
        'large: 1.0e+300, small: 5.0e-324, text: "1e3", odd: "\\x7f\\u2028\\U0001f600\\n", empty: {}}'
    )
    (tmp_path / "streamproc.yaml").write_text(SETTINGS.replace("{feature_names: [a, b]", f"{{odd: {config}"))
    shown = yaml.safe_load(show())["backend"]["config"]["odd"]
    assert repr(shown) == repr(yaml.safe_load(config))


def test_a_place_that_cannot_be_printed_is_escaped(show: Show, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMPROC_POOL__ENV__A\x7f\nB", "1")
    (tmp_path / "a\udcff\nb.yaml").write_text(SETTINGS)
    out = show("-c", str(tmp_path / "a\udcff\nb.yaml"))
    assert yaml.safe_load(out)["pool"]["env"]["A\x7f\nB"] == "1"
    assert "environment variable STREAMPROC_POOL__ENV__A\\x7f\\nB" in out
    assert r"a\udcff\nb.yaml:1" in out
    assert json.loads(show("-c", str(tmp_path / "a\udcff\nb.yaml"), "--json"))["places"]["name"].endswith(r"\nb.yaml:1")
