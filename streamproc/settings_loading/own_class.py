"""Settings with fields of the user's own: the class that `settings_class` names, made of ours.

It is looked for beside the settings file first, then among the installed packages. Its module is run in every process
and command that reads the settings, so it had better be one that imports little: not the backend's.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from streamproc.errors import SettingsError, name_of_type, text_of
from streamproc.settings import Settings
from streamproc.settings_loading.model_walk import PREFIX
from streamproc.settings_loading.source import Source

KEY = "settings_class"


def own_class(source: Source, environ: Mapping[str, str]) -> type[Settings]:
    """The class of the settings: ours, or that of the file or of ``STREAMPROC_SETTINGS_CLASS``, which goes before it.

    Raises:
        SettingsError: it cannot be imported, or is not made of ours.
    """
    variable = next((name for name in environ if name.upper() == f"{PREFIX}{KEY.upper()}"), None)
    path: object = source.data.get(KEY) if variable is None else environ[variable]
    if not path or not isinstance(path, str):
        return Settings  # what is no text is for validation to complain about
    place = source.place((KEY,)) if variable is None else f"environment variable {variable}"
    found = _find(path, source.path.absolute().parent, place)
    if not (isinstance(found, type) and issubclass(found, Settings)):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"of type {name_of_type(found)}"
        raise SettingsError(
            f"{path!r} is {what}", setting=KEY, place=place, hint="derive a class from streamproc.Settings"
        )
    return found


def _find(path: str, base_dir: Path, place: str) -> Any:
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name.isidentifier()):
        raise SettingsError(
            f"{path!r} is no module and name", setting=KEY, place=place, hint="write it like settings:MySettings"
        )
    try:
        return getattr(_import(module_name, base_dir), name)
    except Exception as error:
        raise SettingsError(
            f"{path!r} cannot be imported: {name_of_type(error)}: {text_of(error)}",
            setting=KEY,
            place=place,
            hint=f"it is looked for in {base_dir}, then among the installed packages",
        ) from error


def _import(module_name: str, base_dir: Path) -> ModuleType:
    file = (base_dir / module_name.replace(".", "/")).with_suffix(".py")
    # Under a name of its own, since another application's module may be called the same.
    spec = importlib.util.spec_from_file_location(f"{module_name} in {base_dir}", file) if file.is_file() else None
    if spec is None or spec.loader is None:
        return importlib.import_module(module_name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where pydantic looks up what annotations mean
    spec.loader.exec_module(module)
    return module
