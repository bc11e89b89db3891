"""The estimate of a task: found beside the settings, compared with here and now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamproc.errors import EstimateError
from streamproc.runtime.estimate_file import Estimate, TimeCoefficients, write_estimate
from streamproc.runtime.estimates import FoundEstimate, differences, estimate_path, find_estimate, fingerprint_of
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


def found(it: Settings, environ: dict[str, str] | None = None) -> FoundEstimate:
    found = find_estimate(it, "text", ENVIRON if environ is None else environ)
    assert found is not None
    return found


def test_without_a_file_there_is_no_estimate(tmp_path: Path) -> None:
    assert find_estimate(settings(tmp_path), "text", ENVIRON) is None


def test_under_the_same_conditions_nothing_is_said(tmp_path: Path) -> None:
    import numpy as np

    it = settings(tmp_path, config={"size": 7})
    estimate = written(it, packages={"numpy": np.__version__})
    assert found(it) == FoundEstimate(tmp_path / "text.estimate.json", estimate, "")


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
    tmp_path: Path, backend: dict[str, Any], environ: dict[str, str], said: str
) -> None:
    estimate = written(settings(tmp_path))
    it = found(settings(tmp_path, **backend), environ)
    assert it.estimate == estimate
    assert said in it.warning
    assert "run `streamproc estimate --task text` again" in it.warning
    assert it.warning.count(", now ") == 1


def test_another_version_of_a_library_is_said(tmp_path: Path) -> None:
    written(settings(tmp_path), packages={"numpy": "0.1", "no-such-package": "3"})
    it = found(settings(tmp_path))
    assert it.estimate is not None
    assert "numpy 0.1, now " in it.warning
    assert "no-such-package 3, now none" in it.warning


def test_lengths_that_are_measured_otherwise_make_it_useless(tmp_path: Path) -> None:
    written(settings(tmp_path))
    it = found(settings(tmp_path, length=None))
    assert it.estimate is None
    assert "is not used: its lengths are bytes, and those of task text are not measured" in it.warning


def test_a_file_that_is_no_estimate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.estimate.json").write_text("{}")
    with pytest.raises(EstimateError, match=r"text\.estimate\.json"):
        find_estimate(settings(tmp_path), "text", ENVIRON)


def test_a_configuration_is_in_the_fingerprint_by_a_digest_only(tmp_path: Path) -> None:
    one, other = (fingerprint_of(settings(tmp_path, config={"token": it}), ENVIRON, {}) for it in ("secret", "hidden"))
    assert "secret" not in str(one)
    assert one["backend configuration"] != other["backend configuration"]


def test_what_a_fingerprint_lacks_is_no_difference() -> None:
    assert differences({"cpu": "x"}, {"cpu": "x", "python": "3"}) == []
    assert differences({"cpu": "x", "gpu": "y"}, {"cpu": "z"}) == ["cpu x, now z", "gpu y, now none"]
