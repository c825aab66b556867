"""Images and compose files name existing files, run without root, and publish ports on localhost only."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from serve_fake import read_settings

COMPOSE_FILES = (("docker-compose.yml",), ("docker-compose.yml", "docker-compose.gpu.yml"))


@pytest.fixture
def dockerfile(repository: Path) -> str:
    return (repository / "Dockerfile").read_text(encoding="utf-8")


@pytest.fixture
def services(repository: Path) -> dict[str, Any]:
    compose = yaml.safe_load((repository / "docker-compose.yml").read_text(encoding="utf-8"))
    read: dict[str, Any] = compose["services"]
    return read


def read_stage(dockerfile: str, name: str) -> str:
    """The instructions of a stage."""
    found = re.search(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", dockerfile, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def test_hadolint_finds_no_problem(repository: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "Dockerfile"], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("files", COMPOSE_FILES, ids=" ".join)
def test_compose_files_are_valid(repository: Path, files: tuple[str, ...]) -> None:
    if not shutil.which("docker-compose"):
        pytest.skip("docker-compose is not on the PATH")
    flags = [flag for file in files for flag in ("--file", file)]
    command = ["docker-compose", *flags, "config", "--quiet"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", ["service", "service-gpu", "train"])
def test_an_image_runs_without_root_and_has_labels(repository: Path, dockerfile: str, target: str) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stage = read_stage(dockerfile, target)
    assert "\nUSER 65532:65532\n" in stage
    assert f'org.opencontainers.image.licenses="{project["license"]}"' in stage
    assert f"ARG VERSION={project['version']}\n" in stage
    assert "\nHEALTHCHECK " in stage
    assert re.search(r'^ENTRYPOINT \["', stage, re.MULTILINE), "a shell would not pass on signals"
    assert "pip install" not in stage, "dependencies are installed in the build stage"


def test_copied_files_are_not_in_dockerignore(repository: Path, dockerfile: str) -> None:
    kept = {line[1:] for line in (repository / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE)
    for name in {name for line in copied for name in line.split()}:
        assert list(repository.glob(name)), name
        assert name in kept or (name.startswith("deploy/") and name.endswith(".sh")), name


@pytest.mark.parametrize("stage", ["service-venv", "service-gpu-venv"])
def test_images_of_the_service_have_no_training_code(dockerfile: str, stage: str) -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", read_stage(dockerfile, stage), re.MULTILINE)
    folders = {name for line in copied for name in line.split() if "." not in name and name.islower()}
    assert folders == {"model", "service"}


def test_every_target_of_a_compose_file_is_a_stage(repository: Path, dockerfile: str) -> None:
    for file in COMPOSE_FILES[1]:
        compose = yaml.safe_load((repository / file).read_text(encoding="utf-8"))
        for service in compose["services"].values():
            if target := service.get("build", {}).get("target"):
                assert f" AS {target}\n" in dockerfile


def test_ports_are_published_on_localhost_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []
    assert len(ports) == 3


def test_our_containers_have_a_read_only_root_and_no_privileges(services: dict[str, Any]) -> None:
    for name in ("service", "seed", "train"):
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]


def test_the_variables_of_the_service_are_valid_settings(services: dict[str, Any]) -> None:
    given = {name: text for name, text in services["service"]["environment"].items() if "${" not in text}
    settings = read_settings(given | {"USEG_HOST": "0.0.0.0"})
    assert settings.registry == Path("/registry")
    assert [each for each in services["service"]["volumes"] if each.endswith(f":{settings.registry}")]


def test_prometheus_scrapes_the_admin_port(repository: Path, services: dict[str, Any]) -> None:
    config = yaml.safe_load((repository / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert targets["useg"] == [f"service:{services['service']['environment']['USEG_ADMIN_PORT']}"]


def test_grafana_finds_its_data_source_and_boards(repository: Path, services: dict[str, Any]) -> None:
    grafana = services["grafana"]
    mounts = dict(each.split(":")[:2] for each in grafana["volumes"])
    inside = {place: repository / folder for folder, place in mounts.items() if folder.startswith("./")}
    provider = inside["/etc/grafana/provisioning"] / "dashboards/useg.yml"
    folder = yaml.safe_load(provider.read_text(encoding="utf-8"))["providers"][0]["options"]["path"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == folder
    assert (inside[folder] / home.name).is_file()


def test_tensorrt_engines_go_to_the_mounted_volume(repository: Path, dockerfile: str) -> None:
    found = re.search(r"USEG_COMPILE_CACHE=(\S+)", read_stage(dockerfile, "service-gpu"))
    assert found
    compose = yaml.safe_load((repository / "docker-compose.gpu.yml").read_text(encoding="utf-8"))
    deployment = yaml.safe_load((repository / "deploy/kubernetes/gpu/deployment.yaml").read_text(encoding="utf-8"))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert compose["services"]["service"]["volumes"] == [f"engines:{found[1]}"]
    assert container["volumeMounts"] == [{"name": "engines", "mountPath": found[1]}]
