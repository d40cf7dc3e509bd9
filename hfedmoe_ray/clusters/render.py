"""From an experiment to the files of a cluster for it: the one place that knows which provider has which files."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hfedmoe_ray.clusters import kuberay
from hfedmoe_ray.clusters.design import ClusterDesign
from hfedmoe_ray.clusters.docker import dockerfile, dockerignore, file_name
from hfedmoe_ray.clusters.document import write_yaml
from hfedmoe_ray.clusters.launcher import HOST_RUNS, aws_launcher, gcp_launcher, local_launcher
from hfedmoe_ray.clusters.pins import CHECKOUT, IN_IMAGE, RUNS, Pins
from hfedmoe_ray.clusters.slurm import slurm_script
from hfedmoe_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Request:
    """What files are made of."""

    name: str
    """Of the experiment."""
    config: Path
    overrides: Sequence[str]
    design: ClusterDesign
    pins: Pins
    hosts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Addresses of machines of one's own, by group."""

    @property
    def shown(self) -> str:
        """The configuration, as it is written on a command line in the checkout."""
        path = self.config.resolve()
        inside = path.relative_to(CHECKOUT) if path.is_relative_to(CHECKOUT) else self.config
        return shlex.join([str(inside), *self.overrides])


def render(provider: str, request: Request) -> dict[str, str]:
    """Returns the text of a provider's files, by path below the directory `cluster`.

    Raises:
        ConfigError: the provider needs something that the configuration has not.
        CapacityError: no machine of a cloud is large enough.
    """
    return {
        "local": _local,
        "aws": _aws,
        "gcp": _gcp,
        "kuberay": _kuberay,
        "rayjob": _rayjob,
        "slurm": _slurm,
        "docker": _docker,
    }[provider](request)


def _header(request: Request, provider: str, what: str, how: str) -> str:
    command = f"hfedmoe cluster render {request.shown} --provider {provider}"
    return f"{what}\nRendered for {request.config.name} by `{command}`.\n\n{how}"


def _local(request: Request) -> dict[str, str]:
    how = f"""Write the machines' addresses (--host GROUP=ADDRESS,ADDRESS when rendering) and the user, then from the
root of this checkout
  ray get-auth-token --generate          (once: makes ~/.ray/auth_token, which goes to every machine)
  ray up cluster/local.yaml
  ray dashboard cluster/local.yaml       (in another terminal: tunnels the head's port 8265 to here)
  hfedmoe submit {request.shown} --address http://127.0.0.1:8265
  ray down cluster/local.yaml
Every machine needs Linux, Python 3.11 and make; the checkout is copied and `make install` run on each."""
    header = _header(request, "local", "Ray on machines you own, over SSH.", how)
    return {"local.yaml": write_yaml(header, local_launcher(request.design, request.hosts))}


def _cloud_how(request: Request, file: str, before: str) -> str:
    return f"""{before}
  docker push {request.pins.image()}     (the image of cluster/docker; --registry PREFIX says where when rendering)
  ray get-auth-token --generate          (once: makes ~/.ray/auth_token, which goes to every machine)
  ray up cluster/{file}
  ray dashboard cluster/{file}         (in another terminal: tunnels the head's port 8265 to here)
  hfedmoe submit {request.shown} --address http://127.0.0.1:8265
  ray down cluster/{file}
Machines of a tier come when a run asks for them (runtime.scale_up_s=900) and go when idle; --min-nodes 0 keeps none.
A run's checkpoints are on the server's machine, in {HOST_RUNS}, as long as that machine is there."""


def _aws(request: Request) -> dict[str, str]:
    how = _cloud_how(
        request, "aws.yaml", "Needs boto3 here (pip install boto3) and credentials that may start machines."
    )
    header = _header(request, "aws", "Ray on Amazon EC2.", how)
    return {"aws.yaml": write_yaml(header, aws_launcher(request.design, request.pins))}


def _gcp(request: Request) -> dict[str, str]:
    before = "Write your project. Needs google-api-python-client here (pip install it) and credentials for the project."
    how = _cloud_how(request, "gcp.yaml", before)
    header = _header(request, "gcp", "Ray on Google Compute Engine.", how)
    return {"gcp.yaml": write_yaml(header, gcp_launcher(request.design, request.pins))}


_KUBERAY_NEEDS = "Needs the KubeRay operator 1.5.1 or newer (token authentication) and the image of cluster/docker."


def _kuberay(request: Request) -> dict[str, str]:
    secret = "kubectl create secret generic hfedmoe-redis --from-literal=password=$(openssl rand -hex 24)"

    def how(file: str, *first: str) -> str:
        lines = (
            *first,
            f"kubectl apply -f cluster/kuberay/{file}",
            "kubectl port-forward service/hfedmoe-head-svc 8265      (in another terminal)",
            f"hfedmoe submit {request.shown} --address http://127.0.0.1:8265",
        )
        return f"{_KUBERAY_NEEDS}\n" + "\n".join(f"  {line}" for line in lines)

    plain, tolerant = "raycluster.yaml", "raycluster-fault-tolerant.yaml"
    what = "A standing Ray cluster for many runs."
    also = "A standing Ray cluster for many runs, whose head may die."
    return {
        f"kuberay/{plain}": write_yaml(
            _header(request, "kuberay", what, how(plain)), *kuberay.standing_cluster(request.design, request.pins)
        ),
        f"kuberay/{tolerant}": write_yaml(
            _header(request, "kuberay", also, how(tolerant, secret)),
            *kuberay.fault_tolerant_cluster(request.design, request.pins),
        ),
    }


def _rayjob(request: Request) -> dict[str, str]:
    path = request.config.resolve()
    if not path.is_relative_to(CHECKOUT / "configs"):
        raise ConfigError(
            f"{request.config} is not in the image that a RayJob runs, which holds the checkout's configs/. Put it "
            "there, or submit it to a standing cluster (--provider kuberay, then hfedmoe submit)."
        )
    words = [f"{IN_IMAGE}/jobs/federate.py", f"{IN_IMAGE}/{path.relative_to(CHECKOUT)}", *request.overrides]
    entrypoint = shlex.join(["python", "-u", *words, f"output={RUNS}"])
    what = "One run on a cluster of its own, which is removed afterwards."
    how = f"{_KUBERAY_NEEDS}\n  kubectl apply -f cluster/kuberay/rayjob.yaml\n"
    how += "The run's directory lies on the volume claim `hfedmoe-runs`, which outlives the cluster."
    name = request.name.lower().replace("_", "-").replace(".", "-")
    objects = kuberay.run_as_job(request.design, request.pins, name, entrypoint)
    return {"kuberay/rayjob.yaml": write_yaml(_header(request, "rayjob", what, how), *objects)}


def _slurm(request: Request) -> dict[str, str]:
    how = """From the root of a checkout on a file system that the nodes share, installed by `make install`:
  sbatch cluster/slurm/hfedmoe.sbatch
Partition and account are your site's: write them as further #SBATCH lines in every component."""
    header = _header(request, "slurm", "A run as a Slurm job: a head, a server, and nodes for every tier.", how)
    arguments = shlex.split(request.shown)
    return {"slurm/hfedmoe.sbatch": slurm_script(request.design, arguments, header)}


def _docker(request: Request) -> dict[str, str]:
    files = {}
    for gpus in (False, True):
        files[f"docker/{file_name(gpus=gpus)}"] = dockerfile(request.pins, gpus=gpus)
        files[f"docker/{file_name(gpus=gpus)}.dockerignore"] = dockerignore()
    return files
