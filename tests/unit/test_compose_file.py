"""docker-compose.yml, read as what it is: no engine is needed to see that it keeps its promises."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
OVERRIDABLE = re.compile(r"^\$\{STREAMPROC_(?:[A-Z]+_)?IMAGE:-(?P<default>[a-z0-9./:_-]+)\}$")
ONE_SHOT = {"replay"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = compose["services"]
    return found


def names_a_registry(image: str) -> bool:
    # Docker's own rule: the part before the first slash is a host when it has a dot or a colon, or is localhost.
    first, slash, _ = image.partition("/")
    return bool(slash) and ("." in first or ":" in first or first == "localhost")


def test_it_has_the_processor_with_all_it_needs_a_replay_and_the_monitoring(services: dict[str, Any]) -> None:
    assert set(services) == {"kafka", "topics", "processor", "prometheus", "replay", "grafana", "stats"}
    profiles = {name: service["profiles"] for name, service in services.items() if "profiles" in service}
    assert profiles == {"replay": ["replay"], "grafana": ["monitoring"], "stats": ["monitoring"]}


def test_every_image_has_a_default_and_can_be_another_one(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert OVERRIDABLE.match(service["image"]), f"{name}: {service['image']}"
        for argument, value in service.get("build", {}).get("args", {}).items():
            assert value.startswith("${STREAMPROC_"), f"{name}: build argument {argument} cannot be overridden"


def test_no_default_image_names_a_registry(services: dict[str, Any]) -> None:
    for name, service in services.items():
        images = [service["image"], service.get("build", {}).get("args", {}).get("BASE_IMAGE", "${X_IMAGE:-none}")]
        for image in images:
            default = image.partition(":-")[2].rstrip("}")
            assert default
            assert not names_a_registry(default), f"{name}: {default}"


def test_kafka_is_of_the_version_that_the_tests_run_against(services: dict[str, Any]) -> None:
    pom = (ROOT / "deploy" / "kafka" / "pom.xml").read_text(encoding="utf-8")
    pinned = re.search(r"<kafka\.version>([^<]+)<", pom)
    image = OVERRIDABLE.match(services["kafka"]["image"])
    assert pinned
    assert image
    assert image["default"] == f"apache/kafka:{pinned[1]}"


def test_every_service_that_goes_on_has_a_health_check(services: dict[str, Any]) -> None:
    for name, service in services.items():
        check = service["healthcheck"]
        if name in ONE_SHOT:
            assert check == {"disable": True}
        else:
            assert check["test"][0] == "CMD", name
            assert {"interval", "timeout", "retries", "start_period"} <= set(check), name


def test_ports_are_published_on_loopback_alone(services: dict[str, Any]) -> None:
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published
    for port in published:
        assert port.startswith("127.0.0.1:"), port


def test_the_processor_starts_after_the_topics_and_they_after_kafka(services: dict[str, Any]) -> None:
    assert services["topics"]["depends_on"] == {"kafka": {"condition": "service_healthy"}}
    assert services["processor"]["depends_on"]["topics"] == {"condition": "service_healthy"}
    assert services["replay"]["depends_on"] == {"processor": {"condition": "service_healthy"}}
    (applies,) = services["topics"]["command"]
    assert applies.startswith("streamproc topics apply --yes")
    assert services["processor"]["command"][0] == "run"
    for name in ("processor", "replay"):
        assert services[name]["command"][-2] == "-c"
        assert f"-c {services[name]['command'][-1]} " in applies  # the same settings


def test_no_container_ends_before_the_replay(services: dict[str, Any]) -> None:
    """``--exit-code-from`` stops everything when the first one ends, however it ends."""
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            assert how["condition"] != "service_completed_successfully", f"{name} waits for the end of {needed}"


def test_no_service_may_gain_privileges_and_only_kafka_may_write_its_root(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service.get("read_only", False) == (name != "kafka"), name
        assert "privileged" not in service, name


def test_what_the_services_reach_each_other_by_fits_together(services: dict[str, Any]) -> None:
    kafka = services["kafka"]["environment"]
    listeners = dict(entry.split("://") for entry in kafka["KAFKA_LISTENERS"].split(","))
    advertised = dict(entry.split("://") for entry in kafka["KAFKA_ADVERTISED_LISTENERS"].split(","))
    protocols = dict(entry.split(":") for entry in kafka["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(","))
    assert set(listeners) == set(protocols) == set(advertised) | {kafka["KAFKA_CONTROLLER_LISTENER_NAMES"]}
    inside = advertised[kafka["KAFKA_INTER_BROKER_LISTENER_NAME"]]
    for name in ("topics", "processor"):
        assert services[name]["environment"]["STREAMPROC_KAFKA__BOOTSTRAP_SERVERS"] == inside
    # The host's port is another one when the variable says so, and clients follow what is advertised.
    (port,) = services["kafka"]["ports"]
    assert port.removeprefix("127.0.0.1:").rpartition(":")[0] in advertised["HOST"]


def test_the_statistics_listen_where_they_are_asked_and_read_the_settings_of_the_processor(
    services: dict[str, Any],
) -> None:
    stats = services["stats"]
    port = stats["environment"]["STREAMPROC_STATS__PORT"]
    assert stats["environment"]["STREAMPROC_STATS__HOST"] == "0.0.0.0"  # noqa: S104  # a container's own network
    assert f":{port}/readyz" in stats["healthcheck"]["test"][-1]
    assert stats["ports"] == [f"127.0.0.1:${{STREAMPROC_STATS_PORT:-{port}}}:{port}"]
    assert stats["command"] == ["stats", *services["processor"]["command"][1:]]


def test_prometheus_scrapes_the_processor_where_it_listens(services: dict[str, Any]) -> None:
    scrape = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = [job for job in scrape["scrape_configs"] if job["job_name"] == "streamproc"]
    (target,) = job["dns_sd_configs"]
    processor = services["processor"]
    assert target["names"] == ["processor"]
    assert str(target["port"]) == processor["environment"]["STREAMPROC_HTTP__PORT"]
    assert processor["environment"]["STREAMPROC_HTTP__HOST"] == "0.0.0.0"  # noqa: S104  # a container's own network
    assert f":{target['port']}/readyz" in processor["healthcheck"]["test"][-1]


def test_what_a_service_mounts_of_this_repository_is_there_and_cannot_be_written(services: dict[str, Any]) -> None:
    mounts = [volume for service in services.values() for volume in service.get("volumes", []) if volume[0] == "."]
    assert len(mounts) >= 5
    for mount in mounts:
        source, _, mode = mount.split(":")
        assert (ROOT / source).exists(), mount
        assert mode == "ro", mount


def test_every_volume_of_a_service_is_declared_and_every_declared_one_used(compose: dict[str, Any]) -> None:
    used = {
        volume.partition(":")[0]
        for service in compose["services"].values()
        for volume in service.get("volumes", [])
        if volume[0] != "."
    }
    assert used == set(compose["volumes"])


def test_every_default_image_has_a_version_of_its_own(services: dict[str, Any]) -> None:
    for name, service in services.items():
        image = OVERRIDABLE.match(service["image"])
        assert image
        if "build" not in service:  # ours is built here
            assert re.search(r":v?\d+\.\d+\.\d+$", image["default"]), f"{name}: {image['default']}"


def test_prometheus_reads_the_alert_rules_where_they_are_mounted(services: dict[str, Any]) -> None:
    folder = ROOT / "deploy" / "prometheus"
    config = yaml.safe_load((folder / "prometheus.yml").read_text(encoding="utf-8"))
    mounted = [volume.split(":")[1] for volume in services["prometheus"]["volumes"]]
    for file in config["rule_files"]:
        assert (folder / file).is_file()
        assert f"/etc/prometheus/{file}" in mounted


def test_grafana_finds_prometheus_and_the_dashboard(services: dict[str, Any]) -> None:
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "9090" in services["prometheus"]["ports"][0]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "streamproc.yml").read_text())["providers"]
    mounts = {volume.split(":")[1]: volume.split(":")[0] for volume in services["grafana"]["volumes"]}
    dashboards = ROOT / mounts[provider["options"]["path"]]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/streamproc.json"
    assert (dashboards / "streamproc.json").is_file()
    assert ROOT / mounts["/etc/grafana/provisioning"] == provisioning


def test_grafana_has_no_account_to_guess(services: dict[str, Any]) -> None:
    environment = services["grafana"]["environment"]
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert not [name for name in environment if "PASSWORD" in name]


def test_docker_compose_itself_accepts_it() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed")
    asked = subprocess.run(
        [docker, "compose", "-f", str(COMPOSE), "config", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr
