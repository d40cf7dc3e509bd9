"""Files for Ray's cluster launcher (`ray up`): machines of one's own, AWS and Google Cloud."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from hfedmoe_ray.clusters.design import ClusterDesign, Machine, NodeGroup, smallest
from hfedmoe_ray.clusters.document import CamelPart, Part, PascalPart
from hfedmoe_ray.clusters.pins import BIN, RUNS, Pins
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.packing import GIB

TOKEN_FILE = "~/.ray/auth_token"
HOME = "~/hfedmoe-ray"
"""The checkout on machines of one's own."""
HOST_RUNS = "/runs"
"""Where a cloud's machine keeps the runs, which so outlive the container."""
IDLE_MINUTES = 10
DISK_GB = 100

AWS_MACHINES = (
    *(Machine(name=f"c6i.{size}", cores=n, memory_gib=2 * n) for size, n in (("large", 2), ("xlarge", 4))),
    *(
        Machine(name=f"{family}.{size}", cores=n, memory_gib=gib * n)
        for family, gib in (("m6i", 4), ("r6i", 8))
        for size, n in (("large", 2), ("xlarge", 4), ("2xlarge", 8), ("4xlarge", 16), ("8xlarge", 32))
    ),
    *(
        Machine(name=f"g5.{size}", cores=n, memory_gib=4 * n, gpus=gpus, gpu_gib=24)
        for size, n, gpus in (("xlarge", 4, 1), ("2xlarge", 8, 1), ("4xlarge", 16, 1), ("12xlarge", 48, 4))
    ),
)
GCP_MACHINES = (
    *(
        Machine(name=f"n2-{family}-{n}", cores=n, memory_gib=gib * n)
        for family, gib in (("standard", 4), ("highmem", 8))
        for n in (2, 4, 8, 16, 32)
    ),
    *(
        Machine(name=f"g2-standard-{n}", cores=n, memory_gib=4 * n, gpus=gpus, gpu_gib=24)
        for n, gpus in ((4, 1), (8, 1), (16, 1), (24, 2), (48, 4))
    ),
)


# ---------------------------------------------------------------------------------------------------------- models


class LocalProvider(Part):
    """Machines that are there already."""

    type: Literal["local"] = "local"
    head_ip: str
    worker_ips: tuple[str, ...]


class AwsProvider(Part):
    """Amazon EC2."""

    type: Literal["aws"] = "aws"
    region: str
    cache_stopped_nodes: bool
    """Machines that are not needed are given back, not stopped: a stopped one's disk still costs."""


class GcpProvider(Part):
    """Google Compute Engine."""

    type: Literal["gcp"] = "gcp"
    region: str
    availability_zone: str
    project_id: str


class Auth(Part):
    """How the launcher reaches the machines."""

    ssh_user: str


class Docker(Part):
    """The container that everything runs in."""

    image: str
    container_name: str
    pull_before_run: bool
    run_options: tuple[str, ...]


class NodeDocker(Part):
    """What differs in the containers of one node type."""

    worker_image: str | None = None
    worker_run_options: tuple[str, ...]


class Ebs(PascalPart):
    """A disk's size and kind on AWS."""

    volume_size: int
    volume_type: str


class BlockDevice(PascalPart):
    """A disk on AWS."""

    device_name: str
    ebs: Ebs


class AwsNode(PascalPart):
    """An EC2 instance; the image, subnet and key are those that Ray fills in."""

    instance_type: str
    block_device_mappings: tuple[BlockDevice, ...]


class DiskParams(CamelPart):
    """What a disk on Google Cloud starts as."""

    disk_size_gb: int
    source_image: str


class GcpDisk(CamelPart):
    """A disk on Google Cloud."""

    boot: bool
    auto_delete: bool
    type: Literal["PERSISTENT"]
    initialize_params: DiskParams


class MetadataItem(CamelPart):
    """One of an instance's metadata."""

    key: str
    value: str


class Metadata(CamelPart):
    """An instance's metadata."""

    items: tuple[MetadataItem, ...]


class Maintenance(CamelPart):
    """What happens to an instance when its host is serviced."""

    on_host_maintenance: Literal["TERMINATE"]


class GcpNode(CamelPart):
    """A Compute Engine instance."""

    machine_type: str
    disks: tuple[GcpDisk, ...]
    metadata: Metadata | None = None
    scheduling: tuple[Maintenance, ...] | None = None


class NodeType(Part):
    """Nodes that the launcher may start."""

    min_workers: int | None = None
    max_workers: int | None = None
    resources: dict[str, int]
    """What Ray is told the node offers: memory in bytes."""
    labels: dict[str, str]
    docker: NodeDocker | None = None
    node_config: AwsNode | GcpNode


class Launcher(Part):
    """A file for `ray up`."""

    cluster_name: str
    max_workers: int | None = None
    idle_timeout_minutes: int | None = None
    provider: LocalProvider | AwsProvider | GcpProvider
    auth: Auth
    docker: Docker | None = None
    head_node_type: str | None = None
    available_node_types: dict[str, NodeType] | None = None
    file_mounts: dict[str, str]
    """The token: whoever has it can run code on the cluster."""
    rsync_exclude: tuple[str, ...] | None = None
    initialization_commands: tuple[str, ...] | None = None
    setup_commands: tuple[str, ...]
    head_setup_commands: tuple[str, ...] | None = None
    """The head starts and ends machines by the cloud's own library."""
    head_start_ray_commands: tuple[str, ...]
    """`ray stop` ends every Ray on the machine, as the launcher expects. PATH is how a submitted job finds its Python.
    The dashboard, which takes jobs, listens on the machine itself only: `ray dashboard` tunnels to it."""
    worker_start_ray_commands: tuple[str, ...]


# --------------------------------------------------------------------------------------------------------- writing


def _start(options: str, path: str = BIN, *, before: str = "") -> str:
    return f"export PATH={path}:$PATH RAY_AUTH_MODE=token; ulimit -n 65536;{before or ' '}ray start {options}"


HEAD_OPTIONS = "--head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml"
WORKER_OPTIONS = "--address=$RAY_HEAD_IP:6379"


def local_launcher(design: ClusterDesign, hosts: Mapping[str, Sequence[str]]) -> Launcher:
    """The file for machines reached over SSH.

    Args:
        design: Says how many machines each group has.
        hosts: Addresses by group; groups without any get made-up ones of 192.168.1.0/24, as many as they need.

    Raises:
        ConfigError: `hosts` names a group that the design has not, or the head more than once.
    """
    addresses = _addresses(design, hosts)
    python = f"{HOME}/.venv/bin"
    # Every machine is started by the same command, so it looks up by its address what it is.
    cases = [f"  {_any_of(addresses[group.name])}) set -- {_own_options(group)};;" for group in design.workers]
    which = "\n".join(['\ncase " $(hostname -I) " in', *cases, "esac\n"])
    return Launcher(
        cluster_name="hfedmoe",
        provider=LocalProvider(
            head_ip=addresses["head"][0],
            worker_ips=tuple(address for group in design.workers for address in addresses[group.name]),
        ),
        auth=Auth(ssh_user="ubuntu"),
        file_mounts={HOME: ".", TOKEN_FILE: TOKEN_FILE},
        rsync_exclude=(".venv", ".git", "runs", "**/__pycache__"),
        setup_commands=(f"chmod 600 {TOKEN_FILE}", f"make -C {HOME} install"),
        head_start_ray_commands=(
            f"{python}/ray stop",
            _start(f"{HEAD_OPTIONS} {_own_options(design.head)}", python),
        ),
        worker_start_ray_commands=(f"{python}/ray stop", _start(f'{WORKER_OPTIONS} "$@"', python, before=which)),
    )


def _any_of(addresses: Sequence[str]) -> str:
    """A pattern of the shell for a list of words that holds one of these."""
    return "|".join(f'*" {address} "*' for address in addresses)


def _own_options(group: NodeGroup) -> str:
    """Options of `ray start`; machines of clients offer all they have."""
    labels = ",".join(f"{key}={value}" for key, value in group.labels.items())
    options = [f"--labels={labels}"]
    if not group.client_cpus:
        options.append("--num-cpus=0")
    if group.resources:
        named = ", ".join(f'"{name}": {amount}' for name, amount in group.resources.items())
        options.append(f"--resources='{{{named}}}'")
    return " ".join(options)


def _addresses(design: ClusterDesign, hosts: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    groups = (design.head, *design.workers)
    unknown = [name for name in hosts if name not in {group.name for group in groups}]
    if unknown:
        names = ", ".join(group.name for group in groups)
        raise ConfigError(f"--host names {unknown[0]}, but the groups of machines are: {names}.")
    if len(hosts.get("head", ())) > 1:
        raise ConfigError("--host names several heads; a cluster has one.")
    number = iter(range(10, 255))
    return {
        group.name: hosts.get(group.name) or [f"192.168.1.{next(number)}" for _ in range(group.maximum)]
        for group in groups
    }


def aws_launcher(design: ClusterDesign, pins: Pins) -> Launcher:
    """The file for Amazon EC2."""

    def node(group: NodeGroup) -> AwsNode:
        disk = BlockDevice(device_name="/dev/sda1", ebs=Ebs(volume_size=DISK_GB, volume_type="gp3"))
        return AwsNode(instance_type=smallest(AWS_MACHINES, group).name, block_device_mappings=(disk,))

    provider = AwsProvider(region="us-west-2", cache_stopped_nodes=False)
    return _cloud(design, pins, provider, node, "boto3>=1.34,<2")


def gcp_launcher(design: ClusterDesign, pins: Pins) -> Launcher:
    """The file for Google Compute Engine."""

    def node(group: NodeGroup) -> GcpNode:
        family = "common-gpu" if group.gpus else "common-cpu"
        image = f"projects/deeplearning-platform-release/global/images/family/{family}"
        disk = GcpDisk(
            boot=True,
            auto_delete=True,
            type="PERSISTENT",
            initialize_params=DiskParams(disk_size_gb=DISK_GB, source_image=image),
        )
        driver = Metadata(items=(MetadataItem(key="install-nvidia-driver", value="True"),))
        return GcpNode(
            machine_type=smallest(GCP_MACHINES, group).name,
            disks=(disk,),
            metadata=driver if group.gpus else None,
            scheduling=(Maintenance(on_host_maintenance="TERMINATE"),) if group.gpus else None,
        )

    provider = GcpProvider(region="us-west1", availability_zone="us-west1-a", project_id="YOUR-PROJECT")
    return _cloud(design, pins, provider, node, "google-api-python-client>=2.100,<3")


def _cloud(design: ClusterDesign, pins: Pins, provider: AwsProvider | GcpProvider, node: Any, library: str) -> Launcher:
    """What the clouds have in common: everything runs in the image."""

    def node_type(group: NodeGroup) -> NodeType:
        worker = group is not design.head
        image = pins.image(gpus=True) if group.gpus else None
        shm = NodeDocker(worker_image=image, worker_run_options=(f"--shm-size={group.store_gib + 1}g",))
        return NodeType(
            min_workers=group.minimum if worker else None,
            max_workers=group.maximum if worker else None,
            resources=group.offered | {"object_store_memory": group.store_gib * GIB},
            labels=dict(group.labels),
            docker=shm if worker else None,
            node_config=node(group),
        )

    return Launcher(
        cluster_name="hfedmoe",
        max_workers=sum(group.maximum for group in design.workers),
        idle_timeout_minutes=IDLE_MINUTES,
        provider=provider,
        auth=Auth(ssh_user="ubuntu"),
        docker=Docker(
            image=pins.image(),
            container_name="hfedmoe",
            pull_before_run=True,
            run_options=(
                "--ulimit nofile=65536:65536",
                f"--shm-size={design.head.store_gib + 1}g",
                f"-v {HOST_RUNS}:{RUNS}",
            ),
        ),
        head_node_type=design.head.name,
        available_node_types={group.name: node_type(group) for group in (design.head, *design.workers)},
        file_mounts={TOKEN_FILE: TOKEN_FILE},
        initialization_commands=(
            "sudo usermod -aG docker $USER || true",
            # The image's user, who writes there, is number 1000.
            f"sudo install -d -o 1000 -g 1000 {HOST_RUNS}",
        ),
        setup_commands=(f"chmod 600 {TOKEN_FILE}",),
        head_setup_commands=(f"{BIN}/pip install --quiet '{library}'",),
        head_start_ray_commands=(f"{BIN}/ray stop", _start(HEAD_OPTIONS)),
        worker_start_ray_commands=(f"{BIN}/ray stop", _start(WORKER_OPTIONS)),
    )
