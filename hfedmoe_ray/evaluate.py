"""Evaluating what a run trained, again or on other data: the global model, and each client's share of it."""

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from hfedmoe_ray.config.evaluation import Evaluation as Settings
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.errors import CheckpointError, ConfigError, DataError
from hfedmoe_ray.federation.evaluation import Evaluation
from hfedmoe_ray.prepare import prepare_run


def evaluate_run(
    run_dir: Path, *, round: int | None = None, own: bool = False, data: Sequence[str] = ()
) -> tuple[int, Evaluation]:
    """Evaluates a run's model as it stood after a round, in this process; nothing of the run is changed.

    Args:
        run_dir: The run's directory.
        round: Which; its checkpoint must be kept. Default: the last complete one.
        own: Also each client's share of the model on the client's own test split.
        data: Overrides of keys below `data`, to evaluate on other texts than the run's.

    Returns:
        The round, and what was found.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
        ConfigError: An override concerns something else than data.
        DataError: The other data have other labels than the run's.
        TrainingError: A slice of the test split could not be evaluated.
    """
    # Here, because they import torch, which refusals of the command line do not wait for.
    from hfedmoe_ray.federation.rounds import Federation
    from hfedmoe_ray.runtime.local import LocalExecutor
    from hfedmoe_ray.tracking.tracker import Trackers

    wrong = [one for one in data if not one.startswith("data.")]
    if wrong:
        raise ConfigError(
            f"{wrong[0]} would change the model that was trained. Only keys below `data` say what it is evaluated on."
        )
    experiment = load_experiment(run_dir / "config.yaml")
    benchmarks = experiment.evaluate.benchmarks
    settings = Settings(own="always" if own else "never", overlap=False, benchmarks=benchmarks)
    experiment = experiment.model_copy(update={"evaluate": settings, "backend": "local"})
    with tempfile.TemporaryDirectory(prefix="hfedmoe-evaluate-") as directory:
        context = replace(prepare_run(experiment, run_dir), run_dir=Path(directory))
        _take(run_dir / "checkpoints", round, context.run_dir / "checkpoints")
        where = context
        if data:
            other = load_experiment(run_dir / "config.yaml", data)
            prepared = prepare_run(experiment.model_copy(update={"data": other.data}), run_dir).data
            if prepared.label_names != context.data.label_names:
                raise DataError(
                    f"The labels to evaluate on are {', '.join(prepared.label_names[:5])}…, but the run learnt "
                    f"{', '.join(context.data.label_names[:5])}…. Name its labels in that order: data.labels=[…]."
                )
            where = replace(context, data=prepared)
        with closing(LocalExecutor(where)) as executor:
            federation = Federation(context, executor, Trackers([]), resume=True)
            executor.publish(federation.state.weights)
            federation.evaluator.begin(federation.state.round)
            return federation.state.round, federation.evaluator.result()


def _take(checkpoints: Path, round: int | None, target: Path) -> None:
    """Links one checkpoint into a directory of its own, as the latest there."""
    latest = checkpoints / "LATEST"
    name = f"round-{round:04d}" if round is not None else latest.read_text().strip() if latest.is_file() else ""
    if not name or not (checkpoints / name).is_dir():
        kept = ", ".join(sorted(one.name for one in checkpoints.glob("round-*"))) or "none"
        raise CheckpointError(
            f"{checkpoints} has no checkpoint {name or 'of a complete round'}; kept are: {kept}. "
            "`runtime.keep_checkpoints` says how many a run keeps."
        )
    target.mkdir()
    shutil.copytree(checkpoints / name, target / name, copy_function=_link)
    (target / "LATEST").write_text(f"{name}\n")


def _link(source: str, target: str) -> None:
    Path(target).symlink_to(Path(source).resolve())
