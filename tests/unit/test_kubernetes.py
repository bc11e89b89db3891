"""deploy/kubernetes: valid against the published schemas, and in keeping with the settings, the image and the sidecar.

The files of the base and the components are checked as they are, everywhere; what ``kubectl kustomize`` makes of the
folders, the overlay among them, where kubectl or kustomize is installed: tests that are skipped say so. The schemas are
vendored (``tests/support/published_schemas.py``).
"""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamproc.broker.declared_topics import load_topics
from streamproc.observe.http import create_app
from streamproc.settings import HttpSettings, Settings
from streamproc.settings_loading import load_with_places
from tests.support.published_schemas import validator

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
BASE = FOLDER / "base"
EXAMPLE = FOLDER / "overlays" / "example"
KUSTOMIZATIONS = sorted(path.parent for path in FOLDER.rglob("kustomization.yaml"))
BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
PARENT_BYTES = 100 * 2**20

Object = dict[str, Any]
SettingsOf = Callable[[Path, Object], Settings]


def quantity(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMG]i)", text)
    assert found, text
    return int(found[1]) * BINARY[found[2]]


def files() -> Iterator[tuple[str, Object]]:
    """The objects of the folder's files, one a file, without what is kustomize's own: patches and lists of them."""
    for path in sorted(FOLDER.rglob("*.yaml")):
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(written, dict) and "kind" in written and path.name not in ("kustomization.yaml", "scaling.yaml"):
            yield str(path.relative_to(FOLDER)), written


def rendered(folder: Path) -> list[Object]:
    """What is applied to a cluster."""
    if kubectl := shutil.which("kubectl"):
        command = [kubectl, "kustomize", str(folder)]
    elif kustomize := shutil.which("kustomize"):
        command = [kustomize, "build", str(folder)]
    else:
        pytest.skip("neither kubectl nor kustomize is installed: the files alone are checked, not what is made of them")
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "deprecated" not in made.stderr, made.stderr
    return list(yaml.safe_load_all(made.stdout))


def faults(it: Object) -> list[str]:
    errors = validator(it["apiVersion"], it["kind"]).iter_errors(it)
    return [f"{'.'.join(map(str, error.instance_path))}: {error.message}" for error in errors]


def one(objects: list[Object], kind: str) -> Object:
    (found,) = [it for it in objects if it["kind"] == kind]
    return found


@pytest.fixture(scope="module")
def base() -> list[Object]:
    return [it for name, it in files() if name.startswith("base/")]


@pytest.fixture(scope="module")
def deployment(base: list[Object]) -> Object:
    return one(base, "Deployment")


@pytest.fixture(scope="module")
def example() -> list[Object]:
    return rendered(EXAMPLE)


def pod(workload: Object) -> Object:
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def container(workload: Object) -> Object:
    (it,) = pod(workload)["containers"]
    found: Object = it
    return found


@pytest.fixture
def settings_of(tmp_path: Path) -> SettingsOf:
    """What a replica makes of its settings file, under the environment and with the folders of its container."""
    (tmp_path / "model" / "topics").mkdir(parents=True)
    (tmp_path / "kafka").mkdir()
    here = {"/app/topics": ROOT / "topics", "/model": tmp_path / "model", "/run/secrets/kafka": tmp_path / "kafka"}

    def in_the_container(text: str) -> str:
        for there, path in here.items():
            text = text.replace(there, str(path))
        return text

    def load(file: Path, workload: Object) -> Settings:
        for volume in pod(workload)["volumes"]:
            for item in volume.get("secret", {}).get("items", []):
                (tmp_path / "kafka" / item["path"]).write_text("secret")
        copied = tmp_path / file.name
        copied.write_text(in_the_container(file.read_text(encoding="utf-8")))
        environ = {it["name"]: in_the_container(it.get("value", "secret")) for it in container(workload)["env"]}
        return load_with_places(copied, environ).settings

    return load


# -- schemas


@pytest.mark.parametrize(("name", "it"), list(files()), ids=lambda it: it if isinstance(it, str) else "")
def test_every_file_matches_the_published_schema_of_its_kind(name: str, it: Object) -> None:
    assert not faults(it), name


@pytest.mark.parametrize("folder", [BASE, EXAMPLE], ids=lambda it: it.name)
def test_what_kustomize_makes_of_a_folder_matches_the_schemas(folder: Path) -> None:
    made = rendered(folder)
    assert len(made) >= 7
    for it in made:
        assert not faults(it), f"{it['kind']} {it['metadata']['name']}"


@pytest.mark.parametrize(
    ("name", "where", "key"),
    [
        ("base/deployment.yaml", ("spec", "template", "spec"), "terminationGracePeriodSecond"),
        ("base/deployment.yaml", ("spec",), "replica"),
        ("base/poddisruptionbudget.yaml", ("spec",), "maxUnavailables"),
        ("base/networkpolicy.yaml", ("spec",), "podselector"),
        ("components/keda/scaledobject.yaml", ("spec",), "maxReplicas"),
        ("components/keda/scaledobject.yaml", ("spec", "scaleTargetRef"), "nam"),
    ],
)
def test_the_schemas_find_what_is_misspelt(name: str, where: tuple[str, ...], key: str) -> None:
    it = copy.deepcopy(dict(files())[name])
    inner = it
    for part in where:
        inner = inner[part]
    inner[key] = 1
    assert any(key in fault for fault in faults(it))


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda it: str(it.relative_to(FOLDER)))
def test_every_file_of_a_folder_is_named_by_its_kustomization_and_is_there(folder: Path) -> None:
    written = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    named = [*written.get("resources", []), *written.get("components", []), *written.get("configurations", [])]
    named += [it["path"] for it in written.get("patches", [])]
    named += [file for it in written.get("configMapGenerator", []) for file in it["files"]]
    for it in named:
        assert (folder / it).exists(), it
    assert {path.name for path in folder.glob("*.yaml")} == {it for it in named if "/" not in it} | {
        "kustomization.yaml"
    }


# -- security


@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_no_container_is_root_writes_its_root_or_may_gain_rights(base: list[Object], kind: str) -> None:
    workload = one(base, kind)
    outer, inner = pod(workload)["securityContext"], container(workload)["securityContext"]
    assert outer["runAsNonRoot"] is True
    assert outer["seccompProfile"] == {"type": "RuntimeDefault"}
    # The user of the image, whom its folders belong to.
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert user
    assert (outer["runAsUser"], outer["runAsGroup"]) == (int(user[1]), int(user[2]))
    assert inner == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod(workload)["automountServiceAccountToken"] is False
    assert pod(workload)["enableServiceLinks"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod(workload))
    mounts = {it["name"]: it for it in container(workload)["volumeMounts"]}
    for volume in pod(workload)["volumes"]:
        if "emptyDir" in volume:
            assert volume["emptyDir"]["sizeLimit"]
        else:
            assert mounts[volume["name"]]["readOnly"] is True
    assert mounts["tmp"]["mountPath"] == "/tmp"  # noqa: S108 - the container's


def test_passwords_are_files_and_nowhere_in_the_environment(example: list[Object]) -> None:
    for kind in ("Deployment", "Job"):
        names = {it["name"]: it for it in container(one(example, kind))["env"]}
        assert not [name for name in names if "PASSWORD" in name and not name.endswith("_FILE")]
        file = names["STREAMPROC_KAFKA__SASL_PASSWORD_FILE"]["value"]
        (mount,) = [it for it in container(one(example, kind))["volumeMounts"] if it["name"] == "kafka-login"]
        (volume,) = [it for it in pod(one(example, kind))["volumes"] if it["name"] == "kafka-login"]
        assert file in {f"{mount['mountPath']}/{it['path']}" for it in volume["secret"]["items"]}
        assert volume["secret"]["defaultMode"] == 0o440
    assert not [it for it in example if it["kind"] == "Secret"]


def test_only_prometheus_and_chosen_clients_reach_the_sidecar(base: list[Object], deployment: Object) -> None:
    policy = one(base, "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    (rule,) = policy["ingress"]
    assert all(rule["from"]), "an empty selector lets everybody in"
    assert rule["ports"] == [{"port": "http", "protocol": "TCP"}]


# -- what fits together


def test_the_probes_ask_paths_of_the_sidecar_at_its_port(deployment: Object, settings_of: SettingsOf) -> None:
    it = container(deployment)
    paths = create_app(None, None, HttpSettings()).openapi()["paths"]  # type: ignore[arg-type]  # for its routes alone
    probes = {name: it[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/livez",
        "liveness": "/livez",
        "readiness": "/readyz",
    }
    notes = deployment["spec"]["template"]["metadata"]["annotations"]
    assert {notes["prometheus.io/path"], *(probe["path"] for probe in probes.values())} <= set(paths)
    (port,) = it["ports"]
    assert all(probe["port"] == port["name"] for probe in probes.values())
    http = settings_of(BASE / "streamproc.yaml", deployment).http
    assert (http.host, http.port) == ("0.0.0.0", port["containerPort"])  # noqa: S104 - the pod's own address
    assert notes["prometheus.io/port"] == str(port["containerPort"])
    assert notes["prometheus.io/scrape"] == "true"


def test_a_replica_has_longer_to_end_than_it_takes_to_drain(
    deployment: Object, example: list[Object], settings_of: SettingsOf
) -> None:
    for file, workload in (
        (BASE / "streamproc.yaml", deployment),
        (EXAMPLE / "streamproc.yaml", one(example, "Deployment")),
    ):
        drain = settings_of(file, workload).shutdown_timeout_s
        assert pod(workload)["terminationGracePeriodSeconds"] >= drain + 10


def test_the_memory_limit_holds_the_parent_and_all_workers(
    deployment: Object, example: list[Object], settings_of: SettingsOf
) -> None:
    """The parent with what it may have in flight, twice; what workers may hold; the shared memory of full batches."""
    for file, workload in (
        (BASE / "streamproc.yaml", deployment),
        (EXAMPLE / "streamproc.yaml", one(example, "Deployment")),
    ):
        settings = settings_of(file, workload)
        assert settings.pool.max_worker_memory_mb is not None
        workers = settings.pool.workers * settings.pool.max_worker_memory_mb * 2**20
        in_flight = sum(2 * task.limits.max_in_flight_bytes for task in settings.tasks.values())
        segments = 4 * settings.pool.workers * max(task.batch.max_bytes for task in settings.tasks.values())
        limit = quantity(container(workload)["resources"]["limits"]["memory"])
        assert PARENT_BYTES + workers + in_flight + segments <= limit


def test_selectors_find_the_pods_and_no_others(base: list[Object], deployment: Object) -> None:
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        one(base, "Service")["spec"]["selector"],
        one(base, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        *(it["labelSelector"]["matchLabels"] for it in pod(deployment)["topologySpreadConstraints"]),
    ]
    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    job = one(base, "Job")["spec"]["template"].get("metadata", {}).get("labels", {})
    assert not any(selector.items() <= job.items() for selector in selectors)


def test_a_drained_node_takes_one_replica_at_a_time(base: list[Object], deployment: Object) -> None:
    assert one(base, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert "replicas" not in deployment["spec"], "an apply would undo what KEDA has scaled"


def test_the_job_applies_the_topics_of_the_settings_that_the_replicas_run_with(base: list[Object]) -> None:
    job, deployment = container(one(base, "Job")), container(one(base, "Deployment"))
    assert job["args"][:3] == ["topics", "apply", "--yes"]
    assert deployment["args"][0] == "run"
    assert job["args"][-2:] == deployment["args"][-2:] == ["-c", "/etc/streamproc/streamproc.yaml"]
    assert job["image"] == deployment["image"]


# -- scaling


def scaling(objects: list[Object], settings: Settings, partitions: int | None) -> None:
    spec = one(objects, "ScaledObject")["spec"]
    assert len(spec["triggers"]) == sum(len(task.input.topics) for task in settings.tasks.values())
    for trigger in spec["triggers"]:
        asked = trigger["metadata"]
        (task,) = [name for name, it in settings.tasks.items() if asked["topic"] in it.input.topics]
        assert trigger["type"] == "kafka"
        assert asked["consumerGroup"] == settings.group_of(task)
        assert asked["bootstrapServers"] == settings.kafka.bootstrap_servers
        assert asked["offsetResetPolicy"] == settings.tasks[task].input.auto_offset_reset
        # Behind what one replica has in flight there is work for another.
        assert 0 < int(asked["lagThreshold"]) <= settings.tasks[task].limits.max_in_flight_records
    if partitions is not None:
        assert spec["maxReplicaCount"] == partitions
    assert 1 <= spec["minReplicaCount"] <= spec["fallback"]["replicas"] <= spec["maxReplicaCount"]
    down = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    assert down["stabilizationWindowSeconds"] >= spec["cooldownPeriod"] >= 300
    assert down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 120}]


def test_keda_scales_the_deployment_by_the_lag_of_the_settings_group_up_to_the_partitions(
    deployment: Object, settings_of: SettingsOf
) -> None:
    objects = [it for name, it in files() if name.startswith("components/keda/")]
    partitions = load_topics(ROOT / "topics")["digits"].partitions
    scaling(objects, settings_of(BASE / "streamproc.yaml", deployment), partitions)
    assert one(objects, "ScaledObject")["spec"]["scaleTargetRef"] == {"name": deployment["metadata"]["name"]}


def test_the_example_scales_its_own_deployment_by_its_own_group_with_its_own_login(
    example: list[Object], settings_of: SettingsOf
) -> None:
    deployment, scaled = one(example, "Deployment"), one(example, "ScaledObject")
    settings = settings_of(EXAMPLE / "streamproc.yaml", deployment)
    scaling(example, settings, None)
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"] == "sentiment-streamproc"
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["authenticationRef"]["name"] == one(example, "TriggerAuthentication")["metadata"]["name"]
    assert trigger["metadata"]["sasl"] == settings.kafka.sasl_mechanism.lower().replace("scram-sha-", "scram_sha")
    assert (trigger["metadata"]["tls"] == "enable") == settings.kafka.security_protocol.endswith("SSL")


def test_the_example_has_names_of_its_own_and_settings_that_follow_the_file(example: list[Object]) -> None:
    assert {it["metadata"]["namespace"] for it in example} == {"sentiment"}
    config = one(example, "ConfigMap")
    for kind in ("Deployment", "Job"):
        (volume,) = [it for it in pod(one(example, kind))["volumes"] if it["name"] == "settings"]
        assert volume["configMap"]["name"] == config["metadata"]["name"]
        assert pod(one(example, kind))["serviceAccountName"] == one(example, "ServiceAccount")["metadata"]["name"]
        assert container(one(example, kind))["image"] == "my-team/my-model:1.4.0"
    assert re.fullmatch(r"sentiment-streamproc-settings-\w{10}", config["metadata"]["name"])
    assert config["data"]["streamproc.yaml"] == (EXAMPLE / "streamproc.yaml").read_text(encoding="utf-8")
    instance = {"app.kubernetes.io/instance": "sentiment"}.items()
    assert instance <= one(example, "Service")["spec"]["selector"].items()
    assert instance <= one(example, "Deployment")["spec"]["selector"]["matchLabels"].items()


def test_each_gpu_has_a_worker(example: list[Object], settings_of: SettingsOf) -> None:
    deployment = one(example, "Deployment")
    pool = settings_of(EXAMPLE / "streamproc.yaml", deployment).pool
    gpus = int(container(deployment)["resources"]["limits"]["nvidia.com/gpu"])
    assert pool.devices == [str(index) for index in range(gpus)]
    assert pool.workers % gpus == 0
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod(deployment)["tolerations"]


def test_no_image_names_a_registry(example: list[Object]) -> None:
    for it in (*(it for _, it in files()), *example):
        if it["kind"] in ("Deployment", "Job"):
            assert "." not in container(it)["image"].split("/")[0].split(":")[0]
