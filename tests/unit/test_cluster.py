"""The cluster files are what an experiment renders, have no key that their readers do not know, and fit each other."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError

import hfedmoe_ray
from hfedmoe_ray.cli import main
from hfedmoe_ray.cli.clustering import PROVIDERS
from hfedmoe_ray.clusters.design import SERVER_RESOURCE, ClusterDesign, NodeGroup, design_cluster
from hfedmoe_ray.clusters.document import Part, write_yaml
from hfedmoe_ray.clusters.kubernetes import RayCluster, RayJob
from hfedmoe_ray.clusters.launcher import Launcher
from hfedmoe_ray.clusters.pins import IN_IMAGE, RUNS, read_pins
from hfedmoe_ray.clusters.slurm import DIRECTIVE, NEXT_COMPONENT, SbatchOptions, sbatch_components
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.errors import CapacityError, ConfigError
from hfedmoe_ray.packing import GIB

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"
CONFIG = REPOSITORY / "configs" / "cluster.yaml"
LAUNCHERS = ["local.yaml", "aws.yaml", "gcp.yaml"]
MANIFESTS = ["kuberay/raycluster.yaml", "kuberay/raycluster-fault-tolerant.yaml", "kuberay/rayjob.yaml"]
RAY_KINDS: dict[str, type[Part]] = {"RayCluster": RayCluster, "RayJob": RayJob}
FREE = {"labels", "metadata", "resources", "file_mounts", "rayStartParams", "requests", "limits", "matchLabels"}
"""Mappings whose keys are anybody's."""


@pytest.fixture(scope="module")
def design() -> ClusterDesign:
    return design_cluster(load_experiment(CONFIG))


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def ray_object(name: str) -> dict[str, Any]:
    (found,) = (one for one in documents(name) if one["kind"] in RAY_KINDS)
    return found


def cluster_spec(name: str) -> dict[str, Any]:
    spec = ray_object(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def groups(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    spec = cluster_spec(name)
    yield "head", spec["headGroupSpec"]
    yield from ((group["groupName"], group) for group in spec["workerGroupSpecs"])


def gib(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi"))


def spoiled(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, document) for every mapping of a fixed form, with a key in it that nobody knows."""

    def with_surprise(at: list[Any]) -> dict[str, Any]:
        copy = json.loads(json.dumps(value))
        target = copy
        for step in at:
            target = target[step]
        target["surprise"] = 1
        return copy

    def places(inner: Any, at: list[Any], name: str) -> Iterator[list[Any]]:
        if isinstance(inner, dict):
            if name not in FREE and not (at and at[-2:-1] == ["available_node_types"]):
                yield at
            for key, one in inner.items():
                if name not in FREE or isinstance(one, dict):
                    yield from places(one, [*at, key], key)
        elif isinstance(inner, list):
            for number, one in enumerate(inner):
                yield from places(one, [*at, number], name)

    for at in places(value, list(path), ""):
        if at[-1:] != ["available_node_types"]:
            yield ".".join(map(str, at)), with_surprise(at)


# ------------------------------------------------------------------------------------------------------ all of them


def test_the_committed_files_are_what_is_rendered(tmp_path: Path):
    assert main(["cluster", "render", str(CONFIG), "--out", str(tmp_path)]) == 0
    rendered = {file.relative_to(tmp_path): file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    committed = {file.relative_to(CLUSTER): file.read_text() for file in CLUSTER.rglob("*") if file.is_file()}
    by_hand = (Path("README.md"), Path("grafana/hfedmoe.json"))
    assert rendered == {path: text for path, text in committed.items() if path not in by_hand}


def test_the_documentation_names_every_file_and_builds_every_image():
    text = (CLUSTER / "README.md").read_text()
    for name in (*LAUNCHERS, *MANIFESTS, "slurm/hfedmoe.sbatch"):
        assert f"]({name})" in text
    for gpus, name in ((False, "Dockerfile"), (True, "Dockerfile.cuda")):
        assert f"docker build -f cluster/docker/{name} -t {read_pins().image(gpus=gpus)} ." in text


def test_every_file_names_this_version_and_the_pinned_ray():
    pin = re.search(r"^ray==(\S+)$", (REPOSITORY / "constraints-cpu.txt").read_text(), re.MULTILINE)
    assert pin
    for file in CLUSTER.rglob("*"):
        if file.is_file():
            text = file.read_text()
            assert ":latest" not in text
            tags = set(re.findall(r"hfedmoe-ray:([\w.-]+)", text))
            assert tags <= {f"{hfedmoe_ray.__version__}-ray{pin[1]}{cuda}" for cuda in ("", "-cuda")}, file
    for name in MANIFESTS:
        assert cluster_spec(name)["rayVersion"] == pin[1]


def test_what_is_rendered_needs_neither_ray_nor_torch():
    program = (
        "import sys; from hfedmoe_ray.cli import main; code = main(sys.argv[1:]);"
        "assert not {'ray', 'torch', 'deepspeed'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "cluster", "render", str(CONFIG)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "kind: RayJob" in done.stdout


def test_yaml_is_read_back_as_it_was_meant():
    class Inner(Part):
        command: str
        """Told above."""
        words: tuple[str, ...] = ()

    class Outer(Part):
        name: str
        inner: tuple[Inner, ...]
        free: dict[str, str]

    made = Outer(
        name="yes",
        inner=(
            Inner(command="word " * 60 + "end", words=("a b", "#c")),
            Inner(command='first "line"\n  second: line # here\nthird'),
        ),
        free={"2": "1e3", "a: b": "null", "empty": ""},
    )
    text = write_yaml("What it is.", made)
    assert yaml.safe_load(text) == json.loads(made.model_dump_json())
    assert text.startswith("# What it is.\n")
    assert text.count("# Told above.") == 1
    assert max(map(len, text.splitlines())) <= 120


# -------------------------------------------------------------------------------------------------------- the design


def test_nodes_hold_a_round_of_clients_and_carry_their_labels(design: ClusterDesign):
    experiment = load_experiment(CONFIG)
    assert (design.head.client_cpus, design.server.client_cpus) == (0, 0)
    assert design.server.resources == {SERVER_RESOURCE: 1}
    wanted = {"phone": 5, "laptop": 3, "server": 2}
    for tier, group in zip(experiment.clients.tiers, design.tiers, strict=True):
        assert group.maximum * group.clients >= wanted[tier.name] > (group.maximum - 1) * group.clients
        assert group.client_gib >= group.clients * tier.memory_gib
        assert group.memory_gib > group.client_gib + group.store_gib
        assert tier.labels.items() <= group.labels.items()
    pooled = load_experiment(CONFIG, ["clients.per_round=2"])
    assert sum(group.maximum * group.clients for group in design_cluster(pooled).tiers) == 2


def test_a_gpu_is_shared_as_the_budget_says():
    experiment = load_experiment(CONFIG)
    (phone, *_), cuda = design_cluster(experiment, gpus=True).tiers, read_pins().image(gpus=True)
    assert (phone.gpus, phone.clients, phone.maximum) == (1, 5, 1)
    assert phone.gpu_gib == 5 * experiment.clients.tiers[0].memory_gib
    assert cuda.endswith("-cuda")


def test_what_no_machine_can_hold_is_refused(capsys: pytest.CaptureFixture[str]):
    huge = ["cluster", "render", str(CONFIG), "clients.tiers.0.memory_gib=900", "--provider", "aws"]
    assert main(huge) == CapacityError.exit_code
    assert "tier-phone" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="same name of nodes"):
        design_cluster(load_experiment(CONFIG, ["clients.tiers.0.name=A.b", "clients.tiers.1.name=a_b"]))


def test_machines_of_ones_own_are_named(capsys: pytest.CaptureFixture[str]):
    render = ["cluster", "render", str(CONFIG), "--provider", "local"]
    assert main([*render, "--host", "head=10.0.0.1", "--host", "tier-phone=10.0.0.2,10.0.0.3"]) == 0
    made = Launcher.model_validate(yaml.safe_load(capsys.readouterr().out))
    assert made.provider.head_ip == "10.0.0.1"
    assert {"10.0.0.2", "10.0.0.3"} <= set(made.provider.worker_ips)
    assert main([*render, "--host", "phones=10.0.0.1"]) == ConfigError.exit_code
    assert "tier-phone" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- ray up


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_launcher_accepts_the_file_and_the_models_know_every_key(name: str):
    from ray.autoscaler._private.util import prepare_config, validate_config

    (launcher,) = documents(name)
    prepared = prepare_config(launcher)
    validate_config(prepared)
    Launcher.model_validate(launcher)
    for place, changed in spoiled(launcher):
        with pytest.raises(ValidationError):
            pytest.fail(f"{place} may hold anything: {Launcher.model_validate(changed)}")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_machine_gets_the_token_and_asks_for_it(name: str):
    (launcher,) = documents(name)
    assert "~/.ray/auth_token" in launcher["file_mounts"]
    for role in ("head", "worker"):
        (start,) = (one for one in launcher[f"{role}_start_ray_commands"] if "ray start" in one)
        assert "RAY_AUTH_MODE=token" in start
        assert subprocess.run(["bash", "-n", "-c", start], check=False).returncode == 0
        if role == "head":
            assert "--dashboard-host=127.0.0.1" in start


def test_a_machine_of_ones_own_finds_its_labels_by_its_address(design: ClusterDesign, tmp_path: Path):
    (launcher,) = documents("local.yaml")
    start = launcher["worker_start_ray_commands"][1]
    for name, body in {"hostname": 'echo "172.17.0.1 $ADDRESS "', "ray": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    start = start.replace("~/hfedmoe-ray/.venv/bin", str(tmp_path))
    told = []
    for address in launcher["provider"]["worker_ips"]:
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "ADDRESS": address, "RAY_HEAD_IP": "192.168.1.10"}
        done = subprocess.run(["bash", "-c", start], env=env, capture_output=True, text=True, check=True)
        verb, where, labels, *rest = done.stdout.splitlines()
        assert (verb, where) == ("start", "--address=192.168.1.10:6379")
        told.append(labels)
        assert rest == (["--num-cpus=0", '--resources={"hfedmoe_server": 1}'] if "server" in labels[:30] else [])
    expected = [
        "--labels=" + ",".join(f"{key}={value}" for key, value in group.labels.items())
        for group in design.workers
        for _ in range(group.maximum)
    ]
    assert told == expected


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_a_cloud_has_a_kind_of_machine_for_every_tier(design: ClusterDesign, name: str):
    (launcher,) = documents(name)
    types = launcher["available_node_types"]
    assert set(types) == {"head", "server", *(f"tier-{tier}" for tier in ("phone", "laptop", "server"))}
    assert types[launcher["head_node_type"]]["resources"]["CPU"] == 0
    for group in design.workers:
        offered = types[group.name]["resources"]
        assert offered["CPU"] == group.client_cpus
        assert types[group.name]["labels"] == dict(group.labels)
        (shm,) = types[group.name]["docker"]["worker_run_options"]
        assert int(re.fullmatch(r"--shm-size=(\d+)g", shm)[1]) * GIB > offered["object_store_memory"]
    assert any(option.endswith(f":{RUNS}") for option in launcher["docker"]["run_options"])


# ---------------------------------------------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_knows_every_key(name: str):
    version = kubernetes_validate.latest_version()
    for document in documents(name):
        if document["kind"] not in RAY_KINDS:
            kubernetes_validate.validate(document, version, strict=True)
            continue
        model = RAY_KINDS[document["kind"]]
        model.model_validate(document)
        for place, changed in spoiled(document):
            with pytest.raises(ValidationError):
                pytest.fail(f"{place} may hold anything: {model.model_validate(changed)}")
    for group, one in groups(name):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": group, **one["template"]["metadata"]}}
        kubernetes_validate.validate(pod | {"spec": one["template"]["spec"]}, version, strict=True)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_pod_gets_what_it_asks_for_has_room_for_the_object_store_and_no_privileges(name: str):
    for _, group in groups(name):
        pod, params = group["template"]["spec"], group["rayStartParams"]
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "allowPrivilegeEscalation": False,
        }
        (shm,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm")
        assert shm["medium"] == "Memory"
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        store, offered = int(params["object-store-memory"]), int(params.get("memory", 0))
        assert store <= gib(shm["sizeLimit"]) * GIB
        assert store + offered < gib(container["resources"]["limits"]["memory"]) * GIB
    assert "--uid 1000" in (CLUSTER / "docker" / "Dockerfile").read_text()


@pytest.mark.parametrize("name", MANIFESTS)
def test_nothing_but_bookkeeping_runs_on_the_head_and_only_the_cluster_reaches_it(name: str):
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    params = {group: one["rayStartParams"] for group, one in groups(name)}
    assert (params["head"]["num-cpus"], params["server"]["num-cpus"]) == ("0", "0")
    # The operator pastes it into a shell command.
    (resources,) = shlex.split(params["server"]["resources"])
    assert json.loads(resources) == {SERVER_RESOURCE: 1}
    (policy,) = (one for one in documents(name) if one["kind"] == "NetworkPolicy")
    selected = policy["spec"]["podSelector"]["matchLabels"].items()
    for _, group in groups(name):
        assert selected <= group["template"]["metadata"]["labels"].items()
    unlimited = [rule["from"] for rule in policy["spec"]["ingress"] if "ports" not in rule]
    assert unlimited == [[{"podSelector": policy["spec"]["podSelector"]}]]


def test_the_job_runs_files_that_the_image_holds_on_the_node_with_its_volume():
    spec = ray_object("kuberay/rayjob.yaml")["spec"]
    words = spec["entrypoint"].split()
    paths = [word.removeprefix(f"{IN_IMAGE}/") for word in words if word.startswith(IN_IMAGE)]
    assert [Path(path).suffix for path in paths] == [".py", ".yaml"]
    for name in ("Dockerfile", "Dockerfile.cuda"):
        text = (CLUSTER / "docker" / name).read_text()
        assert f"WORKDIR {IN_IMAGE}\n" in text
        for path in paths:
            assert (REPOSITORY / path).is_file()
            assert f"COPY --chown=ray {Path(path).parts[0]} {Path(path).parts[0]}\n" in text
    assert f"output={RUNS}" in words
    assert "runtimeEnvYAML" not in spec, "everything is in the image"
    claims = {one["metadata"]["name"] for one in documents("kuberay/rayjob.yaml") if "Claim" in one["kind"]}
    for group, one in groups("kuberay/rayjob.yaml"):
        pod = one["template"]["spec"]
        mounted = {m["name"] for c in pod["containers"] for m in c["volumeMounts"] if m["mountPath"] == RUNS}
        volumes = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if v["name"] in mounted}
        assert volumes == (claims if group == "server" else set())
    assert json.loads(spec["entrypointResources"]) == {SERVER_RESOURCE: 1}


def test_a_head_that_may_die_keeps_what_it_knows_in_a_redis_that_outlives_it():
    found = {one["kind"]: one for one in documents("kuberay/raycluster-fault-tolerant.yaml")}
    options = cluster_spec("kuberay/raycluster-fault-tolerant.yaml")["gcsFaultToleranceOptions"]
    service, deployment = found["Service"], found["Deployment"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["env"][0]["valueFrom"] == options["redisPassword"]["valueFrom"]
    assert f"$({container['env'][0]['name']})" in container["args"]


# ------------------------------------------------------------------------------------------------ Slurm and images


def test_the_batch_script_asks_for_every_group_and_starts_it(design: ClusterDesign):
    text = (CLUSTER / "slurm" / "hfedmoe.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    components: list[dict[str, str]] = [{}]
    for line in text.splitlines():
        if line == NEXT_COMPONENT:
            components.append({})
        elif line.startswith(DIRECTIVE):
            key, _, value = line.removeprefix(f"{DIRECTIVE} --").partition("=")
            components[-1][key.replace("-", "_")] = value
    assert [SbatchOptions.model_validate(one) for one in components] == sbatch_components(design)
    starts = text.replace("\\\n", "").split("srun --het-group=")[1:]
    everyone: tuple[NodeGroup, ...] = (design.head, *design.workers)
    assert [int(start.split()[0]) for start in starts] == list(range(len(everyone)))
    for group, start in zip(everyone, starts, strict=True):
        assert f"--num-cpus={group.client_cpus} " in start
        assert all(f"{key}={value}" in start for key, value in group.labels.items())
    assert text.splitlines()[-1].startswith("hfedmoe submit configs/")


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_an_image_is_built_from_what_exists_and_from_fixed_versions(name: str):
    text = (CLUSTER / "docker" / name).read_text()
    steps = re.findall(r"^([A-Z]+) ", text, re.MULTILINE)
    assert set(steps) <= {"FROM", "RUN", "WORKDIR", "USER", "ARG", "ENV", "COPY"}
    (base,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    assert f"docker build -f cluster/docker/{name} -t {read_pins().image(gpus='cuda' in name)} ." in text
    ignore = (CLUSTER / "docker" / f"{name}.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY --chown=ray (.+)$", text, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (REPOSITORY / source).exists(), source
            assert f"!{Path(source).parts[0]}" in ignore


def test_the_providers_offered_are_those_that_can_be_rendered(tmp_path: Path):
    for provider in PROVIDERS:
        assert main(["cluster", "render", str(CONFIG), "--provider", provider, "--out", str(tmp_path / provider)]) == 0
        assert any((tmp_path / provider).rglob("*"))
