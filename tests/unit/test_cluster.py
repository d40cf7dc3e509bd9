"""The cluster files fit Ray's own schema, each other, and this repository."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

import hfedmoe_ray

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"
IN_IMAGE = "/opt/hfedmoe/"
MANIFESTS = ["raycluster.yaml", "rayjob.yaml"]


def ray_pin() -> str:
    found = re.search(r"^ray==(\S+)$", (REPOSITORY / "constraints-cpu.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / name).read_text()))


def cluster_spec(name: str) -> dict[str, Any]:
    (owner,) = (one for one in documents(name) if one["kind"] in ("RayCluster", "RayJob"))
    return owner["spec"].get("rayClusterSpec", owner["spec"])


def pods(name: str) -> Iterator[dict[str, Any]]:
    """The pod specification of the head and of every worker group."""
    spec = cluster_spec(name)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]["spec"]


def gib(quantity: str) -> float:
    assert quantity.endswith("Gi")
    return float(quantity.removesuffix("Gi"))


# -------------------------------------------------------------------------------------------------- own machines


def test_the_launcher_file_fits_rays_schema():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load((CLUSTER / "local.yaml").read_text()), schema)


def test_the_launcher_prepares_and_accepts_the_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    launcher = yaml.safe_load((CLUSTER / "local.yaml").read_text())
    prepared = prepare_config(launcher)
    validate_config(prepared)
    assert prepared["max_workers"] == len(launcher["provider"]["worker_ips"])


def test_every_machine_gets_the_token_and_asks_for_it():
    launcher = yaml.safe_load((CLUSTER / "local.yaml").read_text())
    assert "~/.ray/auth_token" in launcher["file_mounts"]
    starts = [
        command
        for role in ("head", "worker")
        for command in launcher[f"{role}_start_ray_commands"]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]


# ---------------------------------------------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_manifest_is_of_the_current_api_and_asks_for_a_token(name: str):
    kinds = {one["kind"]: one["apiVersion"] for one in documents(name)}
    assert {kinds.get("RayCluster", "ray.io/v1"), kinds.get("RayJob", "ray.io/v1")} == {"ray.io/v1"}
    assert kinds.keys() & {"RayCluster", "RayJob"}
    assert cluster_spec(name)["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_image_names_this_version_and_the_pinned_ray(name: str):
    assert cluster_spec(name)["rayVersion"] == ray_pin()
    images = [container["image"] for pod in pods(name) for container in pod["containers"]]
    assert set(images) == {f"hfedmoe-ray:{hfedmoe_ray.__version__}-ray{ray_pin()}"}


def test_the_documentation_builds_the_image_the_manifests_run():
    (image,) = {container["image"] for name in MANIFESTS for pod in pods(name) for container in pod["containers"]}
    for text in (CLUSTER / "README.md", CLUSTER / "docker" / "Dockerfile"):
        assert f"docker build -f cluster/docker/Dockerfile -t {image} ." in text.read_text()
        assert set(re.findall(r"hfedmoe-ray:[\w.-]+", text.read_text())) == {image}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_pod_gets_what_it_asks_for_and_room_for_the_object_store(name: str):
    for pod in pods(name):
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        (shm,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm")
        assert shm["medium"] == "Memory"
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        # Ray takes 30 % of the memory for its object store, and a slow file instead where /dev/shm is smaller.
        assert 0.3 * gib(container["resources"]["limits"]["memory"]) <= gib(shm["sizeLimit"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_containers_are_unprivileged(name: str):
    for pod in pods(name):
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "allowPrivilegeEscalation": False,
        }
    assert "--uid 1000" in (CLUSTER / "docker" / "Dockerfile").read_text()


def test_the_job_runs_files_of_this_repository_that_the_image_holds():
    (job,) = (one for one in documents("rayjob.yaml") if one["kind"] == "RayJob")
    words = job["spec"]["entrypoint"].split()
    paths = [word.removeprefix(IN_IMAGE) for word in words if word.startswith(IN_IMAGE)]
    assert [Path(path).suffix for path in paths] == [".py", ".yaml"]
    dockerfile = (CLUSTER / "docker" / "Dockerfile").read_text()
    assert f"WORKDIR {IN_IMAGE.rstrip('/')}\n" in dockerfile
    for path in paths:
        assert (REPOSITORY / path).is_file()
        folder = Path(path).parts[0]
        assert f"COPY --chown=ray {folder} {folder}\n" in dockerfile


def test_the_job_writes_to_its_volume():
    (job,) = (one for one in documents("rayjob.yaml") if one["kind"] == "RayJob")
    (claim,) = (one["metadata"]["name"] for one in documents("rayjob.yaml") if one["kind"] == "PersistentVolumeClaim")
    head = next(pods("rayjob.yaml"))
    (volume,) = (one["name"] for one in head["volumes"] if one.get("persistentVolumeClaim") == {"claimName": claim})
    (mount,) = (one["mountPath"] for one in head["containers"][0]["volumeMounts"] if one["name"] == volume)
    assert f"output={mount}" in job["spec"]["entrypoint"].split()


# -------------------------------------------------------------------------------------------------------- the image


def test_the_image_is_built_from_what_exists_and_from_fixed_versions():
    text = (CLUSTER / "docker" / "Dockerfile").read_text()
    (base,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    ignore = (CLUSTER / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY --chown=ray (.+)$", text, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (REPOSITORY / source).exists(), source
            assert f"!{Path(source).parts[0]}" in ignore


def test_no_file_takes_whatever_is_latest():
    for file in CLUSTER.rglob("*"):
        if file.is_file():
            assert ":latest" not in file.read_text()
