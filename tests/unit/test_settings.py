"""What one setting alone cannot know: checks across settings, and the topics and groups that follow from them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from streamproc.records import Cause
from streamproc.settings import CauseSettings, CrossFieldError, HttpSettings, Settings


def _settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "name": "app",
        "backend": {"path": "inference:Backend"},
        "tasks": {"text": {"input": {"topics": ["in"]}}},
        **changes,
    }
    return Settings.model_validate(values)


def _clash(**changes: Any) -> CrossFieldError:
    with pytest.raises(ValidationError) as caught:
        _settings(**changes)
    error = caught.value.errors()[0]["ctx"]["error"]
    assert isinstance(error, CrossFieldError)
    assert error.hint
    return error


def _task(**changes: Any) -> dict[str, Any]:
    return {"tasks": {"text": {"input": {"topics": ["in"]}, **changes}}}


def test_a_target_is_above_the_margin_that_is_kept_from_it() -> None:
    error = _clash(**_task(batch={"target_latency_ms": 2}))
    assert error.keys == (("target_latency_ms",), ("target_margin_ms",))
    assert _settings(**_task(batch={"target_latency_ms": 2, "target_margin_ms": 1})).tasks["text"].batch.predicts


def test_topics_that_are_left_out_follow_from_the_input_and_the_application() -> None:
    settings = _settings()
    topics = settings.topics_of("text")
    assert (topics.inputs, topics.results, topics.metrics, topics.dead) == (
        ("in",),
        "in.results",
        "app.metrics",
        "in.dead",
    )
    assert settings.group_of("text") == "app.text"


def test_tasks_may_share_a_metrics_topic() -> None:
    tasks = {"a": {"input": {"topics": ["one"]}}, "b": {"input": {"topics": ["two"]}}}
    settings = _settings(tasks=tasks)
    assert settings.topics_of("a").metrics == settings.topics_of("b").metrics


def test_two_tasks_on_one_result_topic_are_refused() -> None:
    tasks = {
        "a": {"input": {"topics": ["one"]}, "output": {"topic": "out"}},
        "b": {"input": {"topics": ["two"]}, "output": {"topic": "out"}},
    }
    error = _clash(tasks=tasks)
    assert "tasks a and b both write results to out" in error.problem
    assert error.keys[0] == ("tasks", "b", "output", "topic")


@pytest.mark.parametrize("role", ["output", "metrics", "dead_letters"])
def test_a_task_that_would_read_what_it_writes_is_refused(role: str) -> None:
    error = _clash(**_task(**{role: {"topic": "in"}}))
    assert "the stream would feed itself" in error.problem
    assert error.keys[0] == ("tasks", "text", role, "topic")


def test_tasks_of_one_application_are_not_chained() -> None:
    tasks = {
        "a": {"input": {"topics": ["one"]}, "output": {"topic": "two"}},
        "b": {"input": {"topics": ["two"]}},
    }
    assert "applications of their own" in _clash(tasks=tasks).hint


def test_results_and_dead_letters_are_kept_apart() -> None:
    error = _clash(**_task(output={"topic": "out"}, dead_letters={"topic": "out"}))
    assert "two of results, metrics and dead letters" in error.problem


def test_a_wait_longer_than_the_poll_interval_is_refused() -> None:
    error = _clash(**_task(batch={"max_wait_ms": 300_000}))
    assert error.keys[0] == ("tasks", "text", "batch", "max_wait_ms")
    assert "kafka.max_poll_interval_ms (300000)" in error.problem


def test_a_drain_longer_than_the_poll_interval_is_refused() -> None:
    assert _clash(rebalance_drain_s=300).keys[0] == ("rebalance_drain_s",)


def test_a_session_longer_than_the_poll_interval_is_refused() -> None:
    assert _clash(kafka={"session_timeout_ms": 300_001}).keys[0] == ("kafka", "session_timeout_ms")


def test_a_batch_that_can_never_fill_is_refused() -> None:
    error = _clash(**_task(batch={"max_size": 100}, limits={"max_in_flight_records": 99}))
    assert error.keys[0] == ("limits", "max_in_flight_records")


@pytest.mark.parametrize(
    ("kafka", "key"),
    [
        ({"security_protocol": "SASL_SSL"}, "security_protocol"),
        ({"security_protocol": "SASL_SSL", "sasl_username": "me"}, "security_protocol"),
        ({"sasl_password": "x", "sasl_password_file": "file"}, "sasl_password_file"),
        ({"ssl_cert_file": "cert.pem"}, "ssl_cert_file"),
        ({"ssl_key_file": "key.pem"}, "ssl_key_file"),
    ],
)
def test_incomplete_credentials_are_refused(kafka: dict[str, str], key: str) -> None:
    assert _clash(kafka=kafka).keys[0] == (key,)


URL = "https://registry:8081/path"


@pytest.mark.parametrize(
    ("registry", "key"),
    [
        ({"url": "registry:8081"}, "url"),
        ({"url": "ftp://registry"}, "url"),
        ({"url": "http://"}, "url"),
        ({"url": "http://registry:99999"}, "url"),
        ({"url": "http://[::1"}, "url"),
        ({"url": "http://registry/a b"}, "url"),
        ({"url": "http://registry?key=1"}, "url"),
        ({"url": "https://me:hunter2@registry"}, "url"),
        ({"url": URL, "username": "me"}, "username"),
        ({"url": URL, "password": "hunter2"}, "username"),
        ({"url": URL, "username": "me", "password": "hunter2", "password_file": "f"}, "password_file"),
        ({"url": URL, "username": "me", "password": "x", "token": "hunter2"}, "token"),
        ({"url": URL, "username": "me", "password": "x", "token_file": "f"}, "token_file"),
        ({"url": URL, "token": "hunter2", "token_file": "f"}, "token_file"),
        ({"url": URL, "ssl_cert_file": "cert.pem"}, "ssl_cert_file"),
        ({"url": URL, "ssl_key_file": "key.pem"}, "ssl_key_file"),
    ],
)
def test_a_registry_that_cannot_be_asked_is_refused_and_its_secrets_are_not_quoted(
    registry: dict[str, str], key: str
) -> None:
    error = _clash(schema_registry=registry)
    assert error.keys[0] == (key,)
    assert "hunter2" not in str(error) + error.hint


@pytest.mark.parametrize("role", ["input", "output"])
@pytest.mark.parametrize("format_", ["avro", "protobuf", "json_schema"])
def test_formats_with_schemas_need_a_registry(role: str, format_: str) -> None:
    task = _task(**{"input": {"topics": ["in"]}, role: {"topics": ["in"], "format": format_}})
    if role == "output":
        task["tasks"]["text"]["output"].pop("topics")
    assert _clash(**task).keys[0] == ("tasks", "text", role, "format")
    assert _settings(**task, schema_registry={"url": URL}).schema_registry.url == URL


@pytest.mark.parametrize("format_", ["raw", "avro", "protobuf", "json_schema"])
def test_results_that_have_no_room_for_the_envelope_are_bare(format_: str) -> None:
    registry = {"url": URL}
    settings = _settings(**_task(output={"format": format_}), schema_registry=registry)
    assert settings.tasks["text"].output.envelope == "result"
    error = _clash(**_task(output={"format": format_, "envelope": "full"}), schema_registry=registry)
    assert error.keys[0] == ("envelope",)


@pytest.mark.parametrize(
    ("output", "key"),
    [
        ({"subject": "s"}, "subject"),
        ({"format": "raw", "schema_version": 1}, "schema_version"),
        ({"format": "msgpack", "message": "M"}, "message"),
    ],
)
def test_what_a_format_has_no_use_for_is_refused(output: dict[str, Any], key: str) -> None:
    assert _clash(**_task(output=output)).keys[0] == (key,)


def test_a_password_is_never_shown() -> None:
    kafka = {"security_protocol": "SASL_SSL", "sasl_username": "me", "sasl_password": "hunter2"}
    settings = _settings(kafka=kafka)
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in settings.model_dump_json()


def _policies(**on_error: Any) -> dict[str, tuple[int, int, str]]:
    settings = _settings(**_task(on_error=on_error))
    return {cause.value: settings.tasks["text"].on_error.policy(cause) for cause in Cause}


def test_only_exceptions_are_retried_unless_a_cause_says_otherwise() -> None:
    assert _policies(retries=5, backoff_ms=7, then="drop") == {
        **dict.fromkeys(("invalid", "rejected", "output", "crash", "timeout", "oom", "too_large"), (0, 7, "drop")),
        "exception": (5, 7, "drop"),
        "registry": (5, 1_000, "drop"),
    }


def test_a_registry_has_its_retries_also_where_something_else_is_said_of_it() -> None:
    assert _policies(causes={"registry": {"then": "stop"}})["registry"] == (5, 1_000, "stop")
    assert _policies(causes={"registry": {"retries": 0}})["registry"] == (0, 1_000, "dead_letter")


def test_a_cause_overrides_what_it_names_and_leaves_the_rest() -> None:
    causes = {"crash": {"retries": 2, "then": "stop"}, "exception": {"retries": 0}, "invalid": {"then": "drop"}}
    policies = _policies(causes={**causes, "timeout": {"backoff_ms": 0}})
    assert policies["crash"] == (2, 100, "stop")
    assert policies["exception"] == (0, 100, "dead_letter")
    assert policies["invalid"] == (0, 100, "drop")
    assert policies["timeout"] == (0, 0, "dead_letter")
    assert policies["oom"] == (0, 100, "dead_letter")


def test_every_cause_has_its_settings() -> None:
    assert set(CauseSettings.model_fields) == {cause.value for cause in Cause}


@pytest.mark.parametrize("cause", ["invalid", "rejected", "too_large"])
def test_what_fails_by_itself_has_nothing_to_retry(cause: str) -> None:
    with pytest.raises(ValidationError, match="retries"):
        _policies(causes={cause: {"retries": 1}})


def test_a_worker_must_not_be_killed_before_it_is_recycled() -> None:
    pool = {"max_worker_memory_mb": 500, "recycle": {"max_rss_mb": 500}}
    assert _clash(pool=pool).keys[0] == ("recycle", "max_rss_mb")
    pool["max_worker_memory_mb"] = 501
    assert _settings(pool=pool).pool.max_worker_memory_mb == 501


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        _settings().name = "other"  # type: ignore[misc] # what mypy's plugin refuses, pydantic shall refuse too


@pytest.mark.parametrize(
    ("http", "predicts"),
    [
        ({}, True),
        ({"host": "localhost"}, True),
        ({"host": "::1"}, True),
        ({"host": "0.0.0.0"}, False),  # noqa: S104 - nothing listens here
        ({"host": "0.0.0.0", "token": "x"}, True),  # noqa: S104 - as above
        ({"host": "sidecar.example", "token_file": "x"}, True),
        ({"predict": {"enabled": False}}, False),
    ],
)
def test_predictions_are_answered_where_not_everybody_can_ask(http: dict[str, Any], predicts: bool) -> None:
    assert HttpSettings.model_validate(http).predicts is predicts


@pytest.mark.parametrize(
    ("http", "says"),
    [
        ({"host": "0.0.0.0", "predict": {"enabled": True}}, "set http.token_file"),  # noqa: S104 - as above
        ({"token": "x", "token_file": "y"}, "keep one of them"),
        ({"token": ""}, "at least 1"),
        ({"predict": {"max_waiting_bytes": 10}}, "raise the one or lower the other"),
    ],
)
def test_predictions_for_everybody_or_of_bodies_that_could_never_wait_are_refused(
    http: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValidationError, match=says):
        HttpSettings.model_validate(http)
