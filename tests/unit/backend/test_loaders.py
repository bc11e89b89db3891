from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import packflow
import pytest
from pydantic import ValidationError

from streamproc.backend import InferenceBackend, MultiTaskBackend
from streamproc.errors import (
    InferenceBackendInitializationError,
    InferenceBackendLoadError,
    InferenceBackendRuntimeError,
    PreprocessorInitError,
)
from streamproc.loaders import InferenceBackendLoader, LocalLoader, ModuleLoader

SOURCE = """
from {library} import InferenceBackend

class Backend(InferenceBackend):
    def initialize(self):
        self.logger.info("Loading {{}}", "weights")
        if "fail" in self.config.output_keys:
            raise OSError("no weights")

    def execute(self, inputs):
        return [dict(record, by=__name__) for record in inputs]

class Abstract(InferenceBackend):
    pass

class NoBackend:
    pass

instance = Backend(feature_names=["a"])
number = 5
def function():
    return Backend()
"""


@pytest.fixture(autouse=True)
def _modules_stay_as_they_were() -> Iterator[None]:
    modules, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture(params=["streamproc", "packflow"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "served.py").write_text(SOURCE.format(library=request.param))
    return tmp_path


def test_a_class_is_made_an_instance_with_the_keyword_arguments(project: Path) -> None:
    backend = LocalLoader("served:Backend", base_dir=project).load(feature_names=["a"])
    assert backend([{"a": 1, "b": 2}]) == [{"a": 1, "by": "served"}]
    assert backend.get_metrics().batch_size == 1
    assert backend.ready() is True


def test_an_instance_is_taken_as_it_is(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader = LocalLoader("served:instance", base_dir=project)
    assert loader.load()({"a": 1, "b": 2}) == {"a": 1, "by": "served"}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    loader.load(verbose=True)
    assert "has no effect" in caplog.text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("served", "exactly one colon"),
        ("served:Backend:x", "exactly one colon"),
        (":Backend", "exactly one colon"),
        ("served:", "exactly one colon"),
        ("missing:Backend", r"no file .*missing\.py"),
        ("served:Missing", "no 'Missing'"),
        ("served:NoBackend", "the class NoBackend, which is no backend"),
        ("served:number", "a int, which is no backend"),
        ("served:function", "a function, which is no backend"),
        ("served:Abstract", r"does not define execute\(\)"),
    ],
)
def test_what_leads_to_no_backend_is_a_load_error(project: Path, path: str, message: str) -> None:
    with pytest.raises(InferenceBackendLoadError, match=message):
        LocalLoader(path, base_dir=project).load()


def test_a_module_that_fails_is_a_load_error_with_its_cause_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    with pytest.raises(InferenceBackendLoadError, match="nothing_of_that_name") as caught:
        LocalLoader("broken:Backend", base_dir=tmp_path).load()
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert "broken" not in sys.modules


def test_a_backend_that_fails_to_start_raises_our_error_whichever_library_it_is_written_for(project: Path) -> None:
    loader = LocalLoader("served:Backend", base_dir=project)
    with pytest.raises(InferenceBackendInitializationError, match="no weights"):
        loader.load(output_keys=["fail"])
    with pytest.raises(PreprocessorInitError, match="feature_names"):
        loader.load(input_format="numpy")
    with pytest.raises(ValidationError):
        loader.load(input_format="parquet")


def test_a_file_that_was_written_within_the_same_second_is_run_anew(tmp_path: Path) -> None:
    file = tmp_path / "quick_.py"
    for version in (1, 2):
        file.write_text(
            "from streamproc.backend import InferenceBackend\n"
            f"class Backend(InferenceBackend):\n    version = {version}\n    def execute(self, inputs): return inputs\n"
        )
        os.utime(file, (1_700_000_000, 1_700_000_000))
        assert LocalLoader("quick_:Backend", base_dir=tmp_path).load().version == version


def test_dots_are_folders_and_siblings_of_both_kinds_can_be_imported(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "text"
    folder.mkdir(parents=True)
    (tmp_path / "at_the_root_.py").write_text("ROOT = 1")
    (folder / "beside_.py").write_text("BESIDE = 2")
    (folder / "encoder_.py").write_text(
        "from streamproc.backend import InferenceBackend\n"
        "from at_the_root_ import ROOT\nfrom beside_ import BESIDE\nfrom .beside_ import BESIDE as again\n"
        "class Backend(InferenceBackend):\n"
        "    def execute(self, inputs):\n"
        "        return [{'sum': ROOT + BESIDE + again} for _ in inputs]\n"
    )
    assert LocalLoader("models.text.encoder_:Backend", base_dir=tmp_path).load()({}) == {"sum": 5}


def test_the_working_directory_matters_only_when_the_loader_is_made(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    loader = LocalLoader("served:Backend")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert loader.load()({"a": 1}) == {"a": 1, "by": "served"}


def test_two_projects_with_a_file_of_the_same_name_do_not_mix(tmp_path: Path) -> None:
    for number in (1, 2):
        directory = tmp_path / str(number)
        directory.mkdir()
        source = SOURCE.format(library="streamproc").replace("by=__name__", f"by={number}")
        (directory / "served.py").write_text(source)
    backends = [LocalLoader("served:Backend", base_dir=tmp_path / str(number)).load() for number in (1, 2)]
    assert [backend({}) for backend in backends] == [{"by": 1}, {"by": 2}]


def test_an_installed_module_is_imported(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(project)
    assert ModuleLoader("served:Backend").load()({"a": 1}) == {"a": 1, "by": "served"}


@pytest.mark.parametrize("path", ["no_such_package_:Backend", "json:Backend", "json:dumps", "json"])
def test_an_installed_module_without_the_backend_is_a_load_error(path: str) -> None:
    with pytest.raises(InferenceBackendLoadError, match=path):
        ModuleLoader(path).load()


def test_a_multi_task_backend_is_loaded_alike(tmp_path: Path) -> None:
    (tmp_path / "multi_.py").write_text(
        "from streamproc.backend import MultiTaskBackend, Task\n"
        "class Backend(MultiTaskBackend):\n"
        "    class Text(Task):\n"
        "        def execute(self, inputs):\n"
        "            return inputs\n"
    )
    backend = LocalLoader("multi_:Backend", base_dir=tmp_path).load(tasks={"text": {"feature_names": ["a"]}})
    assert isinstance(backend, MultiTaskBackend)
    assert backend.task("text")({"a": 1, "b": 2}) == {"a": 1}


def test_a_loader_of_ones_own_needs_only_to_find_the_object() -> None:
    class Plain(InferenceBackend):
        def execute(self, inputs: Any) -> Any:
            return inputs

    class Registry(InferenceBackendLoader):
        def load_backend_module(self) -> Any:
            return {"plain": Plain, "theirs": packflow.InferenceBackend}[self.path]

    assert isinstance(Registry("plain").load(), Plain)
    with pytest.raises(InferenceBackendLoadError, match="KeyError"):
        Registry("unknown").load()
    with pytest.raises(InferenceBackendLoadError, match=r"execute\(\)"):
        Registry("theirs").load()


def test_packflow_is_never_imported_for_the_sake_of_a_check(tmp_path: Path) -> None:
    (tmp_path / "served.py").write_text(SOURCE.format(library="streamproc"))
    code = (
        "import sys; from streamproc.loaders import LocalLoader;"
        f"backend = LocalLoader('served:Backend', {str(tmp_path)!r}).load(); backend({{'a': 1}});"
        "sys.exit(any(name.split('.')[0] in ('packflow', 'loguru', 'torch', 'pandas') for name in sys.modules))"
    )
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_at_run_time_a_packflow_class_raises_packflows_errors(tmp_path: Path) -> None:
    (tmp_path / "served.py").write_text(SOURCE.format(library="packflow"))
    backend = LocalLoader("served:Backend", base_dir=tmp_path).load()
    with pytest.raises(packflow.exceptions.InferenceBackendRuntimeError) as caught:
        backend("text")
    assert not isinstance(caught.value, InferenceBackendRuntimeError)
