"""The estimate of a task: found beside the settings, compared with here and now."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from streamproc.errors import EstimateError
from streamproc.runtime.estimate_file import Estimate, TimeCoefficients, write_estimate
from streamproc.runtime.estimates import differences, estimate_path, fingerprint_of, load_estimate
from streamproc.settings import BASE_DIR, Settings

ENVIRON = {"OMP_NUM_THREADS": "2"}


def settings(folder: Path, *, length: str | None = "bytes", **backend: Any) -> Settings:
    batch = {} if length is None else {"length": length}
    return Settings.model_validate(
        {
            "name": "app",
            "backend": {"path": "inference:Backend", **backend},
            "tasks": {"text": {"input": {"topics": ["in"]}, "batch": batch}},
        },
        context={BASE_DIR: folder},
    )


def written(it: Settings, *, length: str | None = "bytes", packages: dict[str, str] | None = None) -> Estimate:
    fingerprint = fingerprint_of(it, ENVIRON, packages or {})
    estimate = Estimate(length=length, fingerprint=fingerprint, time=TimeCoefficients(alpha_ms=1))
    write_estimate(estimate_path(it, "text"), estimate)
    return estimate


def test_an_estimate_is_beside_the_settings(tmp_path: Path) -> None:
    assert estimate_path(settings(tmp_path), "text") == tmp_path / "text.estimate.json"


def test_without_a_file_there_is_no_estimate(tmp_path: Path) -> None:
    assert load_estimate(settings(tmp_path), "text", ENVIRON) is None


def test_under_the_same_conditions_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import numpy as np

    it = settings(tmp_path, config={"size": 7})
    estimate = written(it, packages={"numpy": np.__version__})
    assert load_estimate(it, "text", ENVIRON) == estimate
    assert not caplog.records


@pytest.mark.parametrize(
    ("backend", "environ", "said"),
    [
        ({"path": "other:Backend"}, ENVIRON, "backend inference:Backend, now other:Backend"),
        ({"version": "2"}, ENVIRON, "backend version none, now 2"),
        ({"config": {"size": 8}}, ENVIRON, "backend configuration "),
        ({}, {"OMP_NUM_THREADS": "8"}, "threads 2, now 8"),
    ],
)
def test_what_differs_is_said_and_the_estimate_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, backend: dict[str, Any], environ: dict[str, str], said: str
) -> None:
    estimate = written(settings(tmp_path))
    assert load_estimate(settings(tmp_path, **backend), "text", environ) == estimate
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert said in warning.getMessage()
    assert "run `streamproc estimate --task text` again" in warning.getMessage()
    assert warning.getMessage().count(", now ") == 1


def test_another_version_of_a_library_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(settings(tmp_path), packages={"numpy": "0.1", "no-such-package": "3"})
    assert load_estimate(settings(tmp_path), "text", ENVIRON) is not None
    assert "numpy 0.1, now " in caplog.text
    assert "no-such-package 3, now none" in caplog.text


def test_lengths_that_are_measured_otherwise_make_it_useless(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(settings(tmp_path))
    assert load_estimate(settings(tmp_path, length=None), "text", ENVIRON) is None
    assert "is not used: its lengths are bytes, and those of task text are not measured" in caplog.text


def test_a_file_that_is_no_estimate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.estimate.json").write_text("{}")
    with pytest.raises(EstimateError, match=r"text\.estimate\.json"):
        load_estimate(settings(tmp_path), "text", ENVIRON)


def test_a_configuration_is_in_the_fingerprint_by_a_digest_only(tmp_path: Path) -> None:
    one, other = (fingerprint_of(settings(tmp_path, config={"token": it}), ENVIRON, {}) for it in ("secret", "hidden"))
    assert "secret" not in str(one)
    assert one["backend configuration"] != other["backend configuration"]


def test_what_a_fingerprint_lacks_is_no_difference() -> None:
    assert differences({"cpu": "x"}, {"cpu": "x", "python": "3"}) == []
    assert differences({"cpu": "x", "gpu": "y"}, {"cpu": "z"}) == ["cpu x, now z", "gpu y, now none"]
