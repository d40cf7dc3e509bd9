"""Who is told of a run besides its files and the screen, as its configuration asks for."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from hfedmoe_ray.config.plugins import load_tracker
from hfedmoe_ray.config.running import Tracking
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.tracking.aside import Aside
from hfedmoe_ray.tracking.mlflow import MLflowTracker, store_uri
from hfedmoe_ray.tracking.tensorboard import TensorBoardTracker
from hfedmoe_ray.tracking.tracker import Tracker
from hfedmoe_ray.tracking.wandb import WandbTracker

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def check_destinations(tracking: Tracking) -> None:
    """Makes sure, before anything is started, that what is asked for is installed.

    Raises:
        ConfigError: a package is missing, MLflow is not told where to log, or a class cannot be imported.
    """
    if tracking.tensorboard and not find_spec("tensorboard"):
        raise _missing("tracking.tensorboard", "tensorboard", "write `tensorboard: false`")
    if tracking.mlflow is not None:
        if not find_spec("mlflow"):
            raise _missing("tracking.mlflow", "mlflow-skinny", "leave `mlflow` out")
        scheme = urlsplit(store_uri(tracking.mlflow)).scheme.partition("+")[0]
        if scheme in _DATABASES and not find_spec("sqlalchemy"):
            raise _missing("tracking.mlflow.uri names a database and", "mlflow", "name a tracking server (http://…)")
    for name in tracking.others:
        try:
            load_tracker(name)
        except ValueError as error:
            raise ConfigError(f"tracking.others: {error}.") from error


def destinations(
    experiment: Experiment, run_dir: Path, *, save_model: Callable[[Path], None], warn: Callable[[str], None]
) -> list[Tracker]:
    """The trackers that a run's configuration asks for; none of them can stop it or hold it up for long.

    Args:
        experiment: The configuration, for which `check_destinations` has passed.
        run_dir: The run's directory.
        save_model: Writes the run's model into a directory that does not exist yet.
        warn: Is told in one sentence when one of them has failed.

    Raises:
        ConfigError: a class of the user's own cannot be made.
    """
    tracking = experiment.tracking
    trackers: list[Tracker] = [WandbTracker(run_dir, tracking.wandb, experiment.name, warn=warn, save_model=save_model)]
    if tracking.tensorboard:
        trackers.append(Aside(TensorBoardTracker(run_dir), "TensorBoard", warn=warn))
    if tracking.mlflow is not None:
        mlflow = MLflowTracker(run_dir, tracking.mlflow, experiment.name)
        trackers.append(Aside(mlflow, "MLflow", warn=warn))
    trackers += [Aside(_own(name, run_dir), name, warn=warn) for name in tracking.others]
    return trackers


def _own(name: str, run_dir: Path) -> Tracker:
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        tracker: Tracker = load_tracker(name)(run_dir)
    except Exception as error:
        raise ConfigError(
            f"tracking.others: {name} was called with the run directory and raises {type(error).__name__}: {error}."
        ) from error
    return tracker


def _missing(asked: str, package: str, otherwise: str) -> ConfigError:
    return ConfigError(
        f"{asked} needs the Python package {package}, which is not installed here: pip install {package} (or this "
        f"package with its extra: pip install 'hfedmoe-ray[trackers]'), or {otherwise}."
    )
