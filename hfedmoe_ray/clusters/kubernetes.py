"""Kubernetes objects and KubeRay's, as far as this project writes them: strict models, names as in their schemas."""

from typing import Literal

from hfedmoe_ray.clusters.document import CamelPart


class ObjectMeta(CamelPart):
    """Name and labels of an object."""

    name: str | None = None
    labels: dict[str, str] | None = None


# ------------------------------------------------------------------------------------------------------------ pods


class Resources(CamelPart):
    """What a container gets: the same as it asks for, so that Ray can count on it."""

    requests: dict[str, str]
    limits: dict[str, str]


class SecurityContext(CamelPart):
    """What a container may not do."""

    run_as_non_root: bool
    run_as_user: int
    allow_privilege_escalation: bool


class PodSecurityContext(CamelPart):
    """The group that owns a pod's volumes."""

    fs_group: int
    """Lets the unprivileged user write to the volume."""


class SecretKeyRef(CamelPart):
    """A key of a secret."""

    name: str
    key: str


class EnvSource(CamelPart):
    """Where a variable's value is."""

    secret_key_ref: SecretKeyRef


class EnvVar(CamelPart):
    """A variable of a container's environment."""

    name: str
    value: str | None = None
    value_from: EnvSource | None = None


class ContainerPort(CamelPart):
    """A port that a container listens at."""

    container_port: int
    name: str


class VolumeMount(CamelPart):
    """Where a volume is seen in a container."""

    name: str
    mount_path: str


class Container(CamelPart):
    """A container."""

    name: str
    image: str
    args: tuple[str, ...] | None = None
    env: tuple[EnvVar, ...] | None = None
    ports: tuple[ContainerPort, ...] | None = None
    resources: Resources
    security_context: SecurityContext
    volume_mounts: tuple[VolumeMount, ...]


class EmptyDir(CamelPart):
    """A volume of memory."""

    medium: Literal["Memory"]
    size_limit: str


class ClaimRef(CamelPart):
    """A volume that outlives the pod."""

    claim_name: str


class Volume(CamelPart):
    """A volume of a pod."""

    name: str
    empty_dir: EmptyDir | None = None
    """Ray's object store lies in /dev/shm; what is used of it counts towards the memory limit."""
    persistent_volume_claim: ClaimRef | None = None


class PodSpec(CamelPart):
    """A pod."""

    restart_policy: Literal["Always", "Never"] | None = None
    """Ray's second autoscaler replaces pods itself."""
    security_context: PodSecurityContext | None = None
    containers: tuple[Container, ...]
    volumes: tuple[Volume, ...]


class PodTemplate(CamelPart):
    """A pod to be made."""

    metadata: ObjectMeta
    spec: PodSpec


# --------------------------------------------------------------------------------------------------------- KubeRay


class AuthOptions(CamelPart):
    """Who may use the cluster."""

    mode: Literal["token"] = "token"


class AutoscalerOptions(CamelPart):
    """How the cluster grows and shrinks."""

    version: Literal["v2"] = "v2"
    idle_timeout_seconds: int


class RedisPassword(CamelPart):
    """Redis's password."""

    value_from: EnvSource


class FaultTolerance(CamelPart):
    """Where the head keeps what it knows."""

    redis_address: str
    redis_password: RedisPassword


class HeadGroup(CamelPart):
    """The head pod."""

    labels: dict[str, str]
    ray_start_params: dict[str, str]
    """No client runs on the head, nor the server: num-cpus is 0."""
    template: PodTemplate


class WorkerGroup(CamelPart):
    """Equal worker pods."""

    group_name: str
    replicas: int
    min_replicas: int
    max_replicas: int
    labels: dict[str, str]
    """Of the Ray nodes: a tier of the configuration with these `labels` has its clients placed here."""
    ray_start_params: dict[str, str]
    """What Ray is told the node offers: memory in bytes."""
    template: PodTemplate


class RayClusterSpec(CamelPart):
    """A cluster."""

    ray_version: str
    auth_options: AuthOptions
    """The operator makes a secret with a random token and gives it to every pod. Without it, whoever reaches the head
    can run code in the cluster."""
    gcs_fault_tolerance_options: FaultTolerance | None = None
    """The head's knowledge of nodes and actors is kept in Redis: a head that dies comes back and runs go on."""
    enable_in_tree_autoscaling: bool | None = None
    """Worker pods come when a run asks for them (`runtime.scale_up_s`) and go when they are idle."""
    autoscaler_options: AutoscalerOptions | None = None
    head_group_spec: HeadGroup
    worker_group_specs: tuple[WorkerGroup, ...]


class RayCluster(CamelPart):
    """A standing cluster."""

    api_version: Literal["ray.io/v1"] = "ray.io/v1"
    kind: Literal["RayCluster"] = "RayCluster"
    metadata: ObjectMeta
    spec: RayClusterSpec


class RayJobSpec(CamelPart):
    """One run on a cluster of its own."""

    entrypoint: str
    entrypoint_resources: str
    """Where the driver runs, and beside it the server: on the pod that has the volume, not on the head."""
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: int
    active_deadline_seconds: int
    """A run that has not ended by then hangs; the cluster is then removed all the same."""
    backoff_limit: int
    """A second attempt would find the first one's directory: go on with it by `hfedmoe resume` instead."""
    ray_cluster_spec: RayClusterSpec


class RayJob(CamelPart):
    """One run on a cluster of its own."""

    api_version: Literal["ray.io/v1"] = "ray.io/v1"
    kind: Literal["RayJob"] = "RayJob"
    metadata: ObjectMeta
    spec: RayJobSpec


# ------------------------------------------------------------------------------------------------- what is beside it


class StorageRequest(CamelPart):
    """How large a volume is."""

    requests: dict[str, str]


class ClaimSpec(CamelPart):
    """A volume that is asked for."""

    access_modes: tuple[Literal["ReadWriteOnce"], ...]
    resources: StorageRequest


class VolumeClaim(CamelPart):
    """A volume that outlives the cluster."""

    api_version: Literal["v1"] = "v1"
    kind: Literal["PersistentVolumeClaim"] = "PersistentVolumeClaim"
    metadata: ObjectMeta
    spec: ClaimSpec


class Selector(CamelPart):
    """Objects with these labels; with none, all."""

    match_labels: dict[str, str] | None = None


class Peer(CamelPart):
    """Pods that a rule lets in."""

    namespace_selector: Selector | None = None
    pod_selector: Selector


class PolicyPort(CamelPart):
    """A port that a rule opens."""

    protocol: Literal["TCP"] = "TCP"
    port: int


class IngressRule(CamelPart):
    """Who may open connections, and to what."""

    from_: tuple[Peer, ...]
    ports: tuple[PolicyPort, ...] | None = None


class PolicySpec(CamelPart):
    """Who may reach some pods."""

    pod_selector: Selector
    policy_types: tuple[Literal["Ingress"], ...]
    ingress: tuple[IngressRule, ...]


class NetworkPolicy(CamelPart):
    """A wall around some pods."""

    api_version: Literal["networking.k8s.io/v1"] = "networking.k8s.io/v1"
    kind: Literal["NetworkPolicy"] = "NetworkPolicy"
    metadata: ObjectMeta
    spec: PolicySpec


class ServicePort(CamelPart):
    """A port of a service."""

    name: str
    port: int


class ServiceSpec(CamelPart):
    """An address for pods."""

    selector: dict[str, str]
    ports: tuple[ServicePort, ...]


class Service(CamelPart):
    """An address for pods."""

    api_version: Literal["v1"] = "v1"
    kind: Literal["Service"] = "Service"
    metadata: ObjectMeta
    spec: ServiceSpec


class Strategy(CamelPart):
    """How pods are replaced."""

    type: Literal["Recreate"]


class DeploymentSpec(CamelPart):
    """Pods that are kept alive."""

    replicas: int
    strategy: Strategy
    selector: Selector
    template: PodTemplate


class Deployment(CamelPart):
    """Pods that are kept alive."""

    api_version: Literal["apps/v1"] = "apps/v1"
    kind: Literal["Deployment"] = "Deployment"
    metadata: ObjectMeta
    spec: DeploymentSpec
