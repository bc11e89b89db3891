from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from streamproc.backend import BackendConfig, InferenceBackend, InputFormats
from streamproc.backend.configuration import deep_merge, load_backend_configuration

VARIABLE = "BACKEND_CONFIG_FILE_PATH"


class Nested(BackendConfig):
    model: dict[str, Any] = {}  # noqa: RUF012 pydantic copies it


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.json"
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def test_the_defaults_are_packflows() -> None:
    config = BackendConfig()
    assert config.input_format is InputFormats.RECORDS
    assert config.model_dump(exclude={"input_format"}) == {
        "verbose": False,
        "rename_fields": {},
        "feature_names": [],
        "flatten_nested_inputs": False,
        "flatten_lists": False,
        "nested_field_delimiter": ".",
        "ignore_delimiter_collisions": False,
        "output_keys": [],
    }


def test_the_configuration_file_wins_over_the_keyword_arguments_key_by_key(config_file: Path) -> None:
    config_file.write_text(json.dumps({"configs": {"feature_names": ["b"], "model": {"size": {"depth": 3}}}}))
    config = load_backend_configuration(
        Nested, verbose=True, feature_names=["a", "c"], model={"name": "m", "size": {"depth": 1, "width": 2}}
    )
    assert isinstance(config, Nested)
    assert config.verbose is True
    assert config.feature_names == ["b"], "lists are replaced"
    assert config.model == {"name": "m", "size": {"depth": 3, "width": 2}}, "dicts are merged"


def test_a_backend_reads_the_configuration_file(config_file: Path) -> None:
    config_file.write_text(json.dumps({"configs": {"feature_names": ["b"]}}))

    class Backend(InferenceBackend):
        def execute(self, inputs: Any) -> Any:
            return inputs

    assert Backend(feature_names=["a"])({"a": 1, "b": 2}) == {"b": 2}


@pytest.mark.parametrize(
    ("content", "level"),
    [
        (None, logging.ERROR),
        (b"{", logging.ERROR),
        (b"\xff\xfe", logging.ERROR),
        (b"{}", logging.WARNING),
        (b"[1]", logging.WARNING),
        (b'{"configs": [1]}', logging.WARNING),
    ],
)
def test_a_file_that_is_missing_broken_or_without_configs_is_logged_and_ignored(
    config_file: Path, caplog: pytest.LogCaptureFixture, content: bytes | None, level: int
) -> None:
    if content is not None:
        config_file.write_bytes(content)
    config = load_backend_configuration(feature_names=["a"])
    assert config.feature_names == ["a"]
    problems = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.levelno for record in problems] == [level]
    assert str(config_file) in problems[0].getMessage()


def test_an_empty_variable_names_no_file(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert load_backend_configuration(verbose=True).verbose is True
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_merging_edits_neither_side() -> None:
    base, override = {"a": {"b": 1}, "c": 1}, {"a": {"d": 2}, "c": {"e": 3}}
    assert deep_merge(base, override) == {"a": {"b": 1, "d": 2}, "c": {"e": 3}}
    assert (base, override) == ({"a": {"b": 1}, "c": 1}, {"a": {"d": 2}, "c": {"e": 3}})
