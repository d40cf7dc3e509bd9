"""The runs of a study: each made once, kept under the hash of its configuration, and found again by any study."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.studies.study import Setting
from hfedmoe_ray.tracking.record import RunRecord, read_run

Variants = Mapping[str, Sequence[str]]
"""Overrides by the name of what is varied."""
_IRRELEVANT = {"name", "output", "tracking", "backend", "actors", "runtime", "compare"}
"""Sections that no result depends on."""


def make_runs(setting: Setting, variants: Variants) -> dict[str, list[RunRecord]]:
    """Runs every variant with every seed; returns their records, a list by variant in the order of the seeds.

    A run lies in `output`/runs under a name that holds the hash of its configuration: one that is complete is read,
    one that was interrupted is continued, and studies that need the same run share it. They are carried out as those
    of a comparison are, in processes of their own; one at a time, in this process.

    Raises:
        TrainingError: A run failed; the others are kept.
    """
    wanted = {
        (variant, seed): named(setting.experiment(seed, *overrides), setting.output)
        for variant, overrides in variants.items()
        for seed in setting.seeds
    }
    different = {one.name: (variant, seed, one) for (variant, seed), one in wanted.items()}
    if setting.processes == 1:
        for number, (variant, seed, experiment) in enumerate(different.values(), start=1):
            setting.tell(f"run {number}/{len(different)}: {variant}, seed {seed}")
            _run_here(experiment)
    else:
        _carry_out(setting, different)
    return {
        variant: [read_run(Path(one.output) / one.name) for (name, _), one in wanted.items() if name == variant]
        for variant in variants
    }


def named(experiment: Experiment, output: Path) -> Experiment:
    """The experiment under a name of its strategy, its seed, and the hash of all that decides its result."""
    fields = experiment.model_dump(mode="json", exclude=_IRRELEVANT)
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{experiment.strategy.name}-seed{experiment.seed}-{digest}"
    return experiment.model_copy(update={"name": name, "output": str(output / "runs"), "compare": None})


def _run_here(experiment: Experiment) -> None:
    """Makes a run, or what is left of it."""
    from hfedmoe_ray.runtime import session

    run_dir = Path(experiment.output) / experiment.name
    summary = run_dir / "summary.json"
    if not summary.is_file() or json.loads(summary.read_text())["status"] != "finished":
        resume = (run_dir / "checkpoints" / "LATEST").is_file()
        session.run(experiment, run_dir, resume=resume, render=lambda *_: None)


def _carry_out(setting: Setting, different: Mapping[str, tuple[str, int, Experiment]]) -> None:
    from hfedmoe_ray.comparison.design import Design, Run
    from hfedmoe_ray.comparison.running import carry_out

    def show(event: str, run: Run | None, fields: dict[str, Any]) -> None:
        if event == "preparing":
            setting.tell(f"{fields['runs']} runs, {fields['processes']} at a time; {fields['finished']} found")
        elif run is not None and event in ("finished", "failed"):
            setting.tell(f"{event}: {run.strategy}, seed {run.seed}")

    runs = tuple(
        Run(strategy=variant, setting=(), seed=seed, experiment=experiment)
        for variant, seed, experiment in different.values()
    )
    design = Design(
        name="study",
        directory=setting.output,
        strategies=tuple(dict.fromkeys(run.strategy for run in runs)),
        settings=((),),
        seeds=setting.seeds,
        runs=runs,
        processes=setting.processes,
        target=None,
    )
    failures = carry_out(design, processes=setting.processes, show=show)
    if failures:
        first = failures[0]
        raise TrainingError(
            f"{len(failures)} of {len(runs)} runs failed, {first.run.strategy} with seed {first.run.seed} because: "
            f"{first.reason} Its log is {first.log}. The others are kept: mend the cause and repeat the command."
        )
