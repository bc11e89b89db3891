"""The pytest plugin costs nothing where it is not used."""

from __future__ import annotations

import subprocess
import sys

import streamproc.testing


def test_loading_the_plugin_imports_nothing_else_of_ours() -> None:
    code = (
        "import sys, pytest; before = set(sys.modules)\n"
        "import streamproc.testing.plugin\n"
        "print(sorted(it for it in set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(eval(done.stdout))  # noqa: S307 - our own list
    ours = {it for it in loaded if it.partition(".")[0] == "streamproc"}
    assert ours == {"streamproc", "streamproc.testing", "streamproc.testing.plugin"}
    assert not {"pydantic", "aiokafka", "numpy", "orjson"} & loaded


def test_every_public_name_is_there() -> None:
    for name in streamproc.testing.__all__:
        assert getattr(streamproc.testing, name) is not None
    assert set(streamproc.testing._HOME) == set(streamproc.testing.__all__)
    assert "Pipeline" in dir(streamproc.testing)
