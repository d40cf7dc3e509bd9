"""Manifests for KubeRay: a standing cluster, the same with a head that may die, and one run on a cluster of its own."""

import json

from hfedmoe_ray.clusters.design import SERVER_RESOURCE, ClusterDesign, NodeGroup
from hfedmoe_ray.clusters.document import CamelPart
from hfedmoe_ray.clusters.kubernetes import (
    AuthOptions,
    AutoscalerOptions,
    ClaimRef,
    ClaimSpec,
    Container,
    ContainerPort,
    Deployment,
    DeploymentSpec,
    EmptyDir,
    EnvSource,
    EnvVar,
    FaultTolerance,
    HeadGroup,
    IngressRule,
    NetworkPolicy,
    ObjectMeta,
    Peer,
    PodSecurityContext,
    PodSpec,
    PodTemplate,
    PolicyPort,
    PolicySpec,
    RayCluster,
    RayClusterSpec,
    RayJob,
    RayJobSpec,
    RedisPassword,
    Resources,
    SecretKeyRef,
    SecurityContext,
    Selector,
    Service,
    ServicePort,
    ServiceSpec,
    StorageRequest,
    Strategy,
    Volume,
    VolumeClaim,
    VolumeMount,
    WorkerGroup,
)
from hfedmoe_ray.clusters.pins import RUNS, Pins
from hfedmoe_ray.packing import GIB

PART_OF = {"app.kubernetes.io/part-of": "hfedmoe"}
"""Label of every pod, by which the network policy knows them."""
DASHBOARD = 8265
USER = 1000
"""The image's user."""
IDLE_SECONDS = 600
DEADLINE_SECONDS = 6 * 3600
REDIS = "redis:7.4.1-bookworm"
REDIS_SECRET = "hfedmoe-redis"
UNPRIVILEGED = SecurityContext(run_as_non_root=True, run_as_user=USER, allow_privilege_escalation=False)


def standing_cluster(design: ClusterDesign, pins: Pins) -> tuple[CamelPart, ...]:
    """The objects of a cluster for many runs."""
    cluster = RayCluster(metadata=ObjectMeta(name="hfedmoe"), spec=_spec(design, pins, "hfedmoe-runs", scales=True))
    return (_policy("hfedmoe"), _claim("hfedmoe-runs", "20Gi"), cluster)


def fault_tolerant_cluster(design: ClusterDesign, pins: Pins) -> tuple[CamelPart, ...]:
    """The same with a Redis that outlives the head."""
    secret = EnvSource(secret_key_ref=SecretKeyRef(name=REDIS_SECRET, key="password"))
    tolerance = FaultTolerance(redis_address=f"{REDIS_SECRET}:6379", redis_password=RedisPassword(value_from=secret))
    spec = _spec(design, pins, "hfedmoe-runs", scales=True)
    cluster = RayCluster(
        metadata=ObjectMeta(name="hfedmoe"), spec=spec.model_copy(update={"gcs_fault_tolerance_options": tolerance})
    )
    return (_policy("hfedmoe"), _claim("hfedmoe-runs", "20Gi"), *_redis(secret), cluster)


def run_as_job(design: ClusterDesign, pins: Pins, name: str, entrypoint: str) -> tuple[CamelPart, ...]:
    """The objects of one run on a cluster of its own, which is removed afterwards."""
    job = RayJob(
        metadata=ObjectMeta(name=f"hfedmoe-{name}"),
        spec=RayJobSpec(
            entrypoint=entrypoint,
            entrypoint_resources=json.dumps({SERVER_RESOURCE: 1}),
            shutdown_after_job_finishes=True,
            ttl_seconds_after_finished=600,
            active_deadline_seconds=DEADLINE_SECONDS,
            backoff_limit=0,
            ray_cluster_spec=_spec(design, pins, "hfedmoe-runs", scales=False),
        ),
    )
    return (_policy(f"hfedmoe-{name}"), _claim("hfedmoe-runs", "20Gi"), job)


def _spec(design: ClusterDesign, pins: Pins, claim: str, *, scales: bool) -> RayClusterSpec:
    head = _pod(design.head, "ray-head", pins, never=scales)
    ports = (
        ContainerPort(container_port=6379, name="gcs-server"),
        ContainerPort(container_port=8265, name="dashboard"),
    )
    (container,) = head.spec.containers
    containers = (container.model_copy(update={"ports": ports}),)
    return RayClusterSpec(
        ray_version=pins.ray,
        auth_options=AuthOptions(),
        enable_in_tree_autoscaling=True if scales else None,
        autoscaler_options=AutoscalerOptions(idle_timeout_seconds=IDLE_SECONDS) if scales else None,
        head_group_spec=HeadGroup(
            labels=dict(design.head.labels),
            ray_start_params=_start_params(design.head),
            template=head.model_copy(update={"spec": head.spec.model_copy(update={"containers": containers})}),
        ),
        worker_group_specs=tuple(
            WorkerGroup(
                group_name=group.name,
                replicas=group.minimum if scales else group.maximum,
                min_replicas=group.minimum if scales else group.maximum,
                max_replicas=group.maximum,
                labels=dict(group.labels),
                ray_start_params=_start_params(group),
                template=_pod(group, "ray-worker", pins, never=scales, claim=claim if group is design.server else None),
            )
            for group in design.workers
        ),
    )


def _start_params(group: NodeGroup) -> dict[str, str]:
    params = {"num-cpus": str(group.client_cpus)}
    if group.client_gib:
        params["memory"] = str(group.client_gib * GIB)
    params["object-store-memory"] = str(group.store_gib * GIB)
    if group.resources:
        # Quoted twice: the operator pastes it into a shell command.
        params["resources"] = json.dumps(json.dumps(group.resources))
    return params


def _pod(group: NodeGroup, name: str, pins: Pins, *, never: bool, claim: str | None = None) -> PodTemplate:
    wanted = {"cpu": str(group.cores), "memory": f"{group.memory_gib}Gi"}
    if group.gpus:
        wanted["nvidia.com/gpu"] = str(group.gpus)
    # One GiB more than the store: only what is used of it counts.
    shm = Volume(name="shm", empty_dir=EmptyDir(medium="Memory", size_limit=f"{group.store_gib + 1}Gi"))
    volumes, mounts = [shm], [VolumeMount(name="shm", mount_path="/dev/shm")]
    if claim:
        volumes.append(Volume(name="runs", persistent_volume_claim=ClaimRef(claim_name=claim)))
        mounts.append(VolumeMount(name="runs", mount_path=RUNS))
    return PodTemplate(
        metadata=ObjectMeta(labels=PART_OF),
        spec=PodSpec(
            restart_policy="Never" if never else None,
            security_context=PodSecurityContext(fs_group=USER) if claim else None,
            containers=(
                Container(
                    name=name,
                    image=pins.image(gpus=group.gpus > 0),
                    resources=Resources(requests=wanted, limits=wanted),
                    security_context=UNPRIVILEGED,
                    volume_mounts=tuple(mounts),
                ),
            ),
            volumes=tuple(volumes),
        ),
    )


def _claim(name: str, size: str) -> VolumeClaim:
    return VolumeClaim(
        metadata=ObjectMeta(name=name),
        spec=ClaimSpec(access_modes=("ReadWriteOnce",), resources=StorageRequest(requests={"storage": size})),
    )


def _policy(name: str) -> NetworkPolicy:
    """Lets in the cluster's own pods, and to the job server the operator and what it submits jobs with."""
    own, dashboard = Selector(match_labels=PART_OF), (PolicyPort(port=DASHBOARD),)
    operator = Selector(match_labels={"app.kubernetes.io/name": "kuberay-operator"})
    submitter = Selector(match_labels={"ray.io/originated-from-crd": "RayJob"})
    return NetworkPolicy(
        metadata=ObjectMeta(name=name),
        spec=PolicySpec(
            pod_selector=own,
            policy_types=("Ingress",),
            ingress=(
                IngressRule(from_=(Peer(pod_selector=own),)),
                IngressRule(
                    from_=(Peer(namespace_selector=Selector(match_labels={}), pod_selector=operator),), ports=dashboard
                ),
                IngressRule(from_=(Peer(pod_selector=submitter),), ports=dashboard),
            ),
        ),
    )


def _redis(password: EnvSource) -> tuple[CamelPart, ...]:
    """One Redis with a volume of its own."""
    labels = PART_OF | {"app.kubernetes.io/name": REDIS_SECRET}
    wanted = {"cpu": "500m", "memory": "1Gi"}
    container = Container(
        name="redis",
        image=REDIS,
        args=("redis-server", "--requirepass", "$(REDIS_PASSWORD)", "--appendonly", "yes", "--dir", "/data"),
        env=(EnvVar(name="REDIS_PASSWORD", value_from=password),),
        ports=(ContainerPort(container_port=6379, name="redis"),),
        resources=Resources(requests=wanted, limits=wanted),
        security_context=UNPRIVILEGED,
        volume_mounts=(VolumeMount(name="data", mount_path="/data"),),
    )
    pod = PodSpec(
        security_context=PodSecurityContext(fs_group=USER),
        containers=(container,),
        volumes=(Volume(name="data", persistent_volume_claim=ClaimRef(claim_name=REDIS_SECRET)),),
    )
    return (
        _claim(REDIS_SECRET, "1Gi"),
        Deployment(
            metadata=ObjectMeta(name=REDIS_SECRET),
            spec=DeploymentSpec(
                replicas=1,
                strategy=Strategy(type="Recreate"),
                selector=Selector(match_labels=labels),
                template=PodTemplate(metadata=ObjectMeta(labels=labels), spec=pod),
            ),
        ),
        Service(
            metadata=ObjectMeta(name=REDIS_SECRET),
            spec=ServiceSpec(selector=labels, ports=(ServicePort(name="redis", port=6379),)),
        ),
    )
