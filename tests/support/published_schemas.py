"""The published schemas that tests hold our deployment files and documents against, vendored in ``tests/schemas``.

    kubernetes.json   Kubernetes 1.34, the kinds in KINDS: the strict schemas of the package kubernetes-validate (PyPI)
    keda.json         KEDA's ScaledObject and TriggerAuthentication: the models of cloudcoil-models-keda (PyPI)
    asyncapi.json     AsyncAPI 3.0.0: the package @asyncapi/specs (npm)

All three are published under the Apache License 2.0. They are cut down to what is reached from the kinds in use, and
lose their descriptions and examples; where KEDA's schema names an object's fields, no others are let through, so that a
misspelt one is found. Nothing else is changed. To write them anew, with those packages installed or unpacked:

    python -m tests.support.published_schemas kubernetes …/kubernetes_validate
    python -m tests.support.published_schemas keda
    python -m tests.support.published_schemas asyncapi …/package/schemas/3.0.0.json
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs

SCHEMAS = Path(__file__).resolve().parents[1] / "schemas"
KUBERNETES = "v1.34.0-local-strict"
KINDS = {
    ("apps/v1", "Deployment"): "io.k8s.api.apps.v1.Deployment",
    ("policy/v1", "PodDisruptionBudget"): "io.k8s.api.policy.v1.PodDisruptionBudget",
    ("networking.k8s.io/v1", "NetworkPolicy"): "io.k8s.api.networking.v1.NetworkPolicy",
    ("v1", "ConfigMap"): "io.k8s.api.core.v1.ConfigMap",
    ("v1", "Secret"): "io.k8s.api.core.v1.Secret",
    ("v1", "Service"): "io.k8s.api.core.v1.Service",
    ("v1", "ServiceAccount"): "io.k8s.api.core.v1.ServiceAccount",
    ("batch/v1", "Job"): "io.k8s.api.batch.v1.Job",
}
KEDA = {
    ("keda.sh/v1alpha1", "ScaledObject"): "ScaledObject",
    ("keda.sh/v1alpha1", "TriggerAuthentication"): "TriggerAuthentication",
}
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions")
"""Below these the keys are names, and not the schema's own words."""


@functools.cache
def validator(api_version: str, kind: str) -> jsonschema_rs.Validator:
    """What an object of a cluster has to match; KeyError where no schema of its kind is kept."""
    file, names = ("keda.json", KEDA) if (api_version, kind) in KEDA else ("kubernetes.json", KINDS)
    schema = json.loads((SCHEMAS / file).read_text(encoding="utf-8"))
    return jsonschema_rs.validator_for({**schema, "$ref": f"#/$defs/{names[api_version, kind]}"})


@functools.cache
def asyncapi_validator() -> jsonschema_rs.Validator:
    """What an AsyncAPI document of version 3.0.0 has to match."""
    return jsonschema_rs.validator_for(json.loads((SCHEMAS / "asyncapi.json").read_text(encoding="utf-8")))


def kubernetes(folder: Path) -> dict[str, Any]:
    """From ``kubernetes_validate``'s folder."""
    path = folder / "kubernetes-json-schema" / KUBERNETES / "_definitions.json"
    definitions = json.loads(path.read_text(encoding="utf-8"))["$defs"]
    return _bundle(definitions, KINDS.values(), lambda ref: ref.removeprefix("/api/_definitions.json"))


def keda() -> dict[str, Any]:
    """From the installed models."""
    models = importlib.import_module("cloudcoil.models.keda.v1alpha1")
    definitions: dict[str, Any] = {}
    for kind in KEDA.values():
        schema = getattr(models, kind).model_json_schema(by_alias=True)
        definitions |= {**schema.pop("$defs"), kind: schema}
    closed: dict[str, Any] = _closed(_bundle(definitions, KEDA.values(), lambda ref: ref))
    return closed


def asyncapi(file: Path) -> dict[str, Any]:
    """From the package's file."""
    stripped: dict[str, Any] = _stripped(json.loads(file.read_text(encoding="utf-8")))
    return stripped


def _bundle(definitions: Mapping[str, Any], roots: Any, local: Callable[[str], str]) -> dict[str, Any]:
    """The definitions that are reached from the roots, their references made local."""
    found: dict[str, Any] = {}
    waiting = list(roots)

    def relocated(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: _reach(local(it)) if key == "$ref" and isinstance(it, str) else relocated(it)
                for key, it in value.items()
            }
        return [relocated(it) for it in value] if isinstance(value, list) else value

    def _reach(ref: str) -> str:
        waiting.append(ref.removeprefix("#/$defs/"))
        return ref

    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = None
            found[name] = relocated(_stripped(definitions[name]))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": dict(sorted(found.items()))}


def _stripped(value: Any, *, names: bool = False) -> Any:
    """A schema without its descriptions, titles and examples."""
    if isinstance(value, list):
        return [_stripped(it) for it in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _stripped(it, names=not names and key in _OF_NAMES)
        for key, it in value.items()
        if names or key not in ("description", "title", "examples", "example")
    }


def _closed(value: Any) -> Any:
    if isinstance(value, list):
        return [_closed(it) for it in value]
    if not isinstance(value, dict):
        return value
    closed = {key: _closed(it) for key, it in value.items()}
    if isinstance(value.get("properties"), dict) and value.get("type") == "object":
        closed["additionalProperties"] = False
    return closed


def main(which: str, *where: str) -> None:
    """Write one of them."""
    schema = {"kubernetes": kubernetes, "keda": keda, "asyncapi": asyncapi}[which](*map(Path, where))  # type: ignore[operator]
    SCHEMAS.mkdir(exist_ok=True)
    text = json.dumps(schema, separators=(",", ":"), ensure_ascii=False)
    (SCHEMAS / f"{which}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
