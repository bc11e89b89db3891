"""What a processor is told before it starts: who may ask for predictions, and what of."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamproc.broker.declared_topics import DeclaredTopic
from streamproc.errors import SettingsError
from streamproc.observe.prediction import TaskInput
from streamproc.runtime.startup import http_token, predict_token, task_inputs, warn_of_open_secrets
from streamproc.settings import HttpSettings, Settings


def test_the_token_is_that_of_the_settings_or_of_a_file_without_the_end_of_its_line(tmp_path: Path) -> None:
    assert http_token(HttpSettings()) is None
    assert http_token(HttpSettings.model_validate({"token": "hunter2"})) == "hunter2"
    (tmp_path / "token").write_text("hunter3\n")
    assert http_token(HttpSettings(token_file=tmp_path / "token")) == "hunter3"


def test_a_file_without_a_token_is_refused_since_everybody_could_guess_it(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")
    with pytest.raises(SettingsError, match="is empty; put the token into it"):
        http_token(HttpSettings(token_file=tmp_path / "token"))
    with pytest.raises(SettingsError, match="cannot be read"):
        http_token(HttpSettings(token_file=tmp_path / "nowhere"))


def test_a_tasks_input_is_what_its_first_topic_declares() -> None:
    raw = {"name": "app", "backend": {"path": "a:B"}, "tasks": {"main": {"input": {"topics": ["first", "second"]}}}}
    settings = Settings.model_validate(raw)
    schema = {"type": "object", "required": ["text"]}
    declared = {
        "first": DeclaredTopic("first", description="Texts.", schema_document=schema, samples=[{"text": "a"}]),
        "second": DeclaredTopic("second", schema_document={}),
    }
    assert task_inputs(settings, declared) == {"main": TaskInput(schema, [{"text": "a"}], "Texts.")}
    assert task_inputs(settings, {}) == {"main": TaskInput()}


def test_the_token_for_predictions_is_one_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("for predictions\n")
    http = HttpSettings.model_validate({"token": "for all", "predict": {"token_file": tmp_path / "token"}})
    assert (http_token(http), predict_token(http)) == ("for all", "for predictions")
    http = HttpSettings.model_validate({"host": "10.0.0.1", "predict": {"token": "for predictions"}})
    assert (http_token(http), predict_token(http)) == (None, "for predictions")
    assert http.predicts
    (tmp_path / "token").write_text(" ")
    with pytest.raises(SettingsError, match=r"http\.predict\.token_file: .* is empty"):
        predict_token(HttpSettings.model_validate({"predict": {"token_file": tmp_path / "token"}}))


def test_secrets_that_everybody_may_read_are_told_of_in_one_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, mode in (("password", 0o644), ("token", 0o640), ("key", 0o604)):
        (tmp_path / name).write_text("secret")
        (tmp_path / name).chmod(mode)
    settings = Settings.model_validate(
        {
            "name": "app",
            "backend": {"path": "inference:Backend"},
            "tasks": {"main": {"input": {"topics": ["in"]}}},
            "kafka": {
                "security_protocol": "SASL_SSL",
                "sasl_username": "app",
                "sasl_password_file": tmp_path / "password",
            },
            "http": {
                "token_file": tmp_path / "token",
                "tls_cert_file": tmp_path / "certificate",
                "tls_key_file": tmp_path / "key",
            },
        }
    )
    warn_of_open_secrets(settings)
    (record,) = caplog.records
    told = record.getMessage()
    assert f"{tmp_path / 'password'} (kafka.sasl_password_file), {tmp_path / 'key'} (http.tls_key_file)" in told
    assert "token" not in told.replace(str(tmp_path), "")
    caplog.clear()
    for name in ("password", "key"):
        (tmp_path / name).chmod(0o440)
    warn_of_open_secrets(settings)
    assert not caplog.records


def test_where_the_topic_has_no_schema_the_backends_models_say_what_records_look_like() -> None:
    raw = {"name": "app", "backend": {"path": "a:B"}, "tasks": {"main": {"input": {"topics": ["first"]}}}}
    settings = Settings.model_validate(raw)
    mine, theirs, result = {"title": "topic"}, {"title": "model"}, {"title": "result"}
    models = {"main": {"input": theirs, "output": result}}
    assert task_inputs(settings, {}, models)["main"] == TaskInput(theirs, result=result)
    with_schema = {"first": DeclaredTopic("first", schema_document=mine, samples=[])}
    assert task_inputs(settings, with_schema, models)["main"] == TaskInput(mine, result=result), "it is what is checked"
    without = {"first": DeclaredTopic("first", description="Texts.", samples=[])}
    assert task_inputs(settings, without, models)["main"] == TaskInput(theirs, description="Texts.", result=result)
