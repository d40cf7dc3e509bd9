"""What an experiment needs of machines, and what a cluster's nodes say of themselves: findings with their remedies."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hfedmoe_ray import __version__
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import HFedMoEError
from hfedmoe_ray.packing import NodeCapacity
from hfedmoe_ray.tracking.formatting import plural, size

STORED_VERSIONS = 2
"""Of the weights, in the object store: the current one, and the one before for whoever still reads it."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the examination."""

    level: Literal["ok", "note", "problem"]
    """note: works, but is worth knowing."""
    what: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """What one node of a cluster says of itself."""

    name: str
    """Its address."""
    error: str = ""
    """Why it could not say anything else."""
    python: str = ""
    package: str = ""
    """Version of this package there."""
    store_bytes: int = 0
    """Ray's object store."""
    shm_bytes: int = 0
    """Size of /dev/shm, where that store should lie; 0 where there is none."""
    sees: bool = False
    """Whether a file that another node has just written is there."""
    writes: bool = False
    """Whether it can write beside it."""


def fits(experiment: Experiment, nodes: Sequence[NodeCapacity]) -> Finding:
    """Whether every tier's clients find room, GPU fractions and labels included, on these nodes."""
    from hfedmoe_ray.moe.shape import read_shape
    from hfedmoe_ray.plan import plan_experiment
    from hfedmoe_ray.sampled_lengths import sampled_lengths, why_unknown

    try:
        lengths = None if why_unknown(experiment) else sampled_lengths(experiment)
        plan = plan_experiment(experiment, read_shape(experiment.model), nodes, lengths)
    except HFedMoEError as error:
        return Finding(level="problem", what=f"{experiment.name} does not fit: {error}")
    actors = Counter(str(slot.resources) for slot in plan.slots)
    told = ", ".join(f"{count} x ({asked})" for asked, count in actors.items()) or "in one process"
    return Finding(level="ok", what=f"the clients of {experiment.name} fit, {len(plan.slots)} at once: {told}")


def store_holds(experiment: Experiment, store: int, where: str) -> Finding:
    """Whether an object store holds what a round publishes: versions of the weights, and the updates sent back."""
    from hfedmoe_ray.moe.shape import read_shape
    from hfedmoe_ray.plan import forecast

    try:
        shape = read_shape(experiment.model)
    except HFedMoEError as error:
        return Finding(level="problem", what=f"the model of {experiment.name} cannot be read: {error}")
    published = STORED_VERSIONS * (shape.shared_bytes + shape.total_experts * shape.expert_bytes)
    forecasts = forecast(experiment, shape, gpus_available=False)
    average = sum(one.bytes_up * len(one.clients) for one in forecasts) / experiment.clients.count
    needed = int(published + average * experiment.round_size)
    what = (
        f"the object store of {where} has {size(store)}; a round of {experiment.name} puts up to {size(needed)} there"
    )
    if needed > store:
        remedy = (
            f"Ray then writes objects to disk, which is slow. Start Ray with --object-store-memory={needed} (and a "
            "/dev/shm as large), ask fewer clients a round (clients.per_round), or send less (wire.upload)."
        )
        return Finding(level="note", what=what, remedy=remedy)
    return Finding(level="ok", what=what)


def survey_findings(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    """What the nodes' reports mean for a run."""
    for one in reports:
        if one.error:
            remedy = "Install this package there, in the environment that `ray start` runs in, with the same versions."
            yield Finding(level="problem", what=f"node {one.name} cannot run clients: {one.error}", remedy=remedy)
    told = [one for one in reports if not one.error]
    other = [one for one in told if one.package != __version__]
    if other:
        names = ", ".join(f"{one.name} has {one.package}" for one in other)
        remedy = "A run's nodes must have one version: install this one there, or send runs by hfedmoe submit."
        yield Finding(level="problem", what=f"this node has hfedmoe_ray {__version__}, but {names}", remedy=remedy)
    elif told:
        yield Finding(level="ok", what=f"{plural(len(told), 'node')} with hfedmoe_ray {__version__}")
    for one in told:
        if one.shm_bytes and one.shm_bytes < one.store_bytes:
            what = f"node {one.name}: /dev/shm has {size(one.shm_bytes)}, Ray's object store {size(one.store_bytes)}"
            remedy = "Ray keeps the rest in a file, which is slow: docker run --shm-size, or a Memory volume in a pod."
            yield Finding(level="note", what=what, remedy=remedy)
    yield from _storage(told)


def _storage(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    mute = [one.name for one in reports if not one.writes]
    blind = [one.name for one in reports if not one.sees]
    if blind:
        remedy = (
            "A run's checkpoints stay on the node that its server is on, and `hfedmoe resume` works there alone. To go "
            "on elsewhere, set `output` to a directory that all nodes mount."
        )
        what = f"the run directory is not shared: not seen by {plural(len(blind), 'node')} ({', '.join(blind[:3])})"
        yield Finding(level="note", what=what, remedy=remedy)
    elif mute:
        what = f"the run directory is shared, but cannot be written on {', '.join(mute[:3])}"
        yield Finding(level="problem", what=what, remedy="Make it writable for the user that Ray runs as.")
    elif reports:
        yield Finding(level="ok", what=f"the run directory is shared by {plural(len(reports), 'node')} and writable")
