"""The runs of a study: each made once, kept under the hash of its configuration, and found again by any study."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.studies.study import Setting
from hfedmoe_ray.tracking.record import RunRecord, read_run

Variants = Mapping[str, Sequence[str]]
"""Overrides by the name of what is varied."""


def make_runs(setting: Setting, variants: Variants) -> dict[str, list[RunRecord]]:
    """Runs every variant with every seed; returns their records, a list by variant in the order of the seeds.

    A run lies in `output`/runs under a name that holds the hash of its configuration: one that is complete is read,
    one that was interrupted is continued, and studies that need the same run share it.
    """
    found: dict[str, list[RunRecord]] = {}
    count = len(variants) * len(setting.seeds)
    for variant, overrides in variants.items():
        for seed in setting.seeds:
            done = sum(map(len, found.values()))
            experiment = setting.experiment(seed, *overrides)
            run_dir = directory(setting.output, experiment)
            setting.tell(f"run {done + 1}/{count}: {variant}, seed {seed}")
            found.setdefault(variant, []).append(make_run(experiment, run_dir))
    return found


def make_run(experiment: Experiment, run_dir: Path) -> RunRecord:
    """Makes a run, or what is left of it, and returns its record."""
    from hfedmoe_ray.runtime import session

    summary = run_dir / "summary.json"
    if not summary.is_file() or json.loads(summary.read_text())["status"] != "finished":
        resume = (run_dir / "checkpoints" / "LATEST").is_file()
        session.run(experiment, run_dir, resume=resume, render=lambda *_: None)
    return read_run(run_dir)


def directory(output: Path, experiment: Experiment) -> Path:
    """Where a run is kept: named by its strategy, its seed, and the hash of all that decides its result."""
    fields = experiment.model_dump(mode="json", exclude={"name", "output", "tracking", "backend", "actors", "runtime"})
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]
    return output / "runs" / f"{experiment.strategy.name}-seed{experiment.seed}-{digest}"
