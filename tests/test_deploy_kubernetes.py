"""Manifests are valid, select only their own pods, and match the settings of the service."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from serve_fake import read_settings

from service.server import AdminPortApp

VERSION = "1.34"
"""Version of Kubernetes whose schemas the manifests are validated against."""
OVERLAYS = ("base", "registry", "gpu", "prometheus", "kserve")
NAME = {"app.kubernetes.io/name": "useg"}


@pytest.fixture
def folder(repository: Path) -> Path:
    return repository / "deploy" / "kubernetes"


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return document


def list_variables(container: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container["env"]}


def render(folder: Path, overlay: str) -> list[dict[str, Any]]:
    """The objects of an overlay."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not on the PATH")
    done = subprocess.run(["kubectl", "kustomize", str(folder / overlay)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def check(document: dict[str, Any]) -> None:
    """Raise unless the schema of its kind allows an object; custom kinds have none here."""
    validator = pytest.importorskip("kubernetes_validate")
    if "." not in document["apiVersion"] or document["apiVersion"].split("/")[0].endswith("k8s.io"):
        validator.validate(document, VERSION, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_can_be_rendered_and_is_valid(folder: Path, overlay: str) -> None:
    for document in render(folder, overlay):
        check(document)


def test_nothing_selects_pods_of_others(folder: Path) -> None:
    assert read(folder / "base/network.yaml")["spec"]["podSelector"]["matchLabels"] == NAME
    assert read(folder / "base/disruption.yaml")["spec"]["selector"]["matchLabels"] == NAME
    assert read(folder / "prometheus/monitor.yaml")["spec"]["selector"]["matchLabels"] == NAME
    labels = read(folder / "base/kustomization.yaml")["labels"][0]
    assert (labels["pairs"], labels["includeSelectors"]) == (NAME, True)


def test_the_service_understands_its_variables_and_its_end_is_waited_for(folder: Path) -> None:
    pod = read(folder / "base/deployment.yaml")["spec"]["template"]["spec"]
    more = read(folder / "registry/deployment.yaml")["spec"]["template"]["spec"]["containers"][0]
    gpu = read(folder / "gpu/deployment.yaml")["spec"]["template"]["spec"]["containers"][0]
    container = pod["containers"][0]
    image = {"USEG_HOST": "0.0.0.0", "USEG_SHUTDOWN_DELAY_S": "5"}
    settings = read_settings(image | list_variables(container) | list_variables(more) | list_variables(gpu))
    assert pod["terminationGracePeriodSeconds"] > settings.shutdown_delay_s + settings.graceful_shutdown_timeout_s
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"http": settings.port, "admin": settings.admin_port}
    mounted = {each["mountPath"] for part in (container, more, gpu) for each in part["volumeMounts"]}
    assert {str(settings.registry), str(settings.api_key_file and settings.api_key_file.parent)} <= mounted


@pytest.mark.anyio
async def test_probes_use_paths_of_the_admin_port(folder: Path) -> None:
    container = read(folder / "base/deployment.yaml")["spec"]["template"]["spec"]["containers"][0]
    probes = [container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {probe["port"] for probe in probes} == {"admin"}
    asked: list[str] = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope["path"])

    for probe in probes:
        await AdminPortApp(answer)({"type": "http", "path": probe["path"]}, None, None)  # type: ignore[arg-type]
    assert asked == ["/readyz", "/readyz", "/livez"]


def test_the_autoscaler_uses_the_metric_of_the_adapter(folder: Path) -> None:
    wanted = read(folder / "base/autoscaler.yaml")["spec"]["metrics"][0]["pods"]["metric"]["name"]
    rule = read(folder / "prometheus/adapter.yaml")["rules"][0]
    assert rule["name"]["as"] == wanted
    assert set(re.findall(r"\buseg_stage\w+", rule["metricsQuery"] + rule["seriesQuery"])) == {
        "useg_stage_duration_seconds_sum",
        "useg_stage_duration_seconds_count",
    }


def test_the_rules_for_the_operator_are_those_of_prometheus(folder: Path, repository: Path) -> None:
    plain = repository / "deploy" / "prometheus"
    made = subprocess.run([plain / "wrap.sh"], capture_output=True, text=True, check=True).stdout
    assert (folder / "prometheus/rules.yaml").read_text(encoding="utf-8") == made
    rules = yaml.safe_load(made)
    assert (rules["apiVersion"], rules["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert rules["spec"] == read(plain / "alerts.yml")
    assert "rules.yaml" in read(folder / "prometheus/kustomization.yaml")["resources"]


def test_the_alerts_match_the_job_name_of_the_operator(folder: Path) -> None:
    assert read(folder / "prometheus/monitor.yaml")["spec"]["jobLabel"] in NAME
    (down,) = re.findall(r'up\{job=~"([^"]+)"\}', (folder / "prometheus/rules.yaml").read_text(encoding="utf-8"))
    assert re.fullmatch(down, NAME["app.kubernetes.io/name"])


def test_kserve_starts_the_service_on_its_own_port_and_mount(folder: Path) -> None:
    container = read(folder / "kserve/runtime.yaml")["spec"]["containers"][0]
    flags = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
    assert flags == {"--artifact": "/mnt/models", "--port": str(container["ports"][0]["containerPort"])}
    assert read_settings({"USEG_HOST": "0.0.0.0"} | list_variables(container)).host == "0.0.0.0"
    model = read(folder / "kserve/model.yaml")["spec"]["predictor"]["model"]
    assert model["runtime"] == read(folder / "kserve/runtime.yaml")["metadata"]["name"]
    assert model["protocolVersion"] in read(folder / "kserve/runtime.yaml")["spec"]["protocolVersions"]
