"""Where a run runs, for how long, and who is told. Torch-free."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from hfedmoe_ray.config.section import NonNegativeFloat, Section, Share


class Runtime(Section):
    """Where and how long things run."""

    address: str | None = None
    """Ray cluster to join ("auto" or host:port). Default: a private one on this machine."""
    slots: PositiveInt | Literal["auto"] = "auto"
    """pooled: client actors alive at once. auto: as many as fit and have a core to run on."""
    scale_up_s: NonNegativeFloat = 0.0
    """On a cluster with an autoscaler: seconds to wait for nodes, which it is asked for once, until the clients fit;
    and for others, when those that some clients need are lost. Room that other work holds is waited for as long, if
    this is more than a minute. Say `num_gpus` and `num_cpus` in the tiers where no GPU node is there at the start.
    0: what is there must do."""
    deadline_s: PositiveFloat = 600.0
    """Seconds a client may take for one task before it counts as late."""
    memory_cap: bool = True
    """Whether a client on a CPU that allocates more than its tier's `memory_gib` fails, as one on a GPU always does,
    and is then demoted: fewer examples at once, then fewer experts. For `backend: ray`, on Linux."""
    quorum: Share = 0.5
    """Share of a round's clients whose updates must arrive."""
    retries: Annotated[int, Field(ge=0)] = 1
    """Times a task is tried again, on another slot, after its process died."""
    round_attempts: PositiveInt = 2
    """Times a round below quorum is tried before the run stops."""
    keep_checkpoints: PositiveInt = 3
    """Newest rounds whose checkpoints are kept: 3, so that `hfedmoe verify` can run two rounds again."""


class Wandb(Section):
    """Weights & Biases, written by the server alone."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with an API key, else offline."""
    project: str = "hfedmoe"
    entity: str | None = None
    group: str | None = None
    model_mib: NonNegativeFloat = 0.0
    """Log the final model, as `hfedmoe export` writes it, as an artifact if it has at most so many MiB; it is also kept
    below wandb/. 0: never."""


class MLflow(Section):
    """MLflow, written by the server alone. Needs the package mlflow or mlflow-skinny."""

    uri: str | None = None
    """Tracking server or store: http://host:5000, sqlite:////data/mlflow.db. Default: $MLFLOW_TRACKING_URI."""
    experiment: str = "hfedmoe"


class Tracking(Section):
    """Who is told what happened, besides the files of the run directory."""

    wandb: Wandb = Wandb()
    tensorboard: bool = False
    """Write event files to tensorboard/ in the run directory. Needs the package tensorboard."""
    mlflow: MLflow | None = None
    others: tuple[str, ...] = ()
    """Trackers of your own, as "package.module:Class": each is called with the run directory and has the methods of
    `hfedmoe_ray.tracking.tracker.Tracker`."""
