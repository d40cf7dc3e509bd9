"""MLflow: one run in an experiment of a tracking server or store, with the same names as in W&B.

The client's own interface is used, so that no run or address that other code of the process has set is touched.
"""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hfedmoe_ray.config.running import MLflow
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.tracking.files import CONFIG, FACTS, SUMMARY
from hfedmoe_ray.tracking.jsonl import dumps, plain
from hfedmoe_ray.tracking.scalars import RoundScalars, tier_names
from hfedmoe_ray.tracking.told import Told
from hfedmoe_ray.tracking.versions import software_versions

DIRECTORY = "mlflow"
LONGEST_VALUE = 500
"""Characters of a parameter that every MLflow store takes."""
BATCH = 100
"""Parameters in one request, by MLflow's limits."""
_ENDS = {"finished": "FINISHED", "stopped": "KILLED"}


class MLflowTracker:
    """Logs a run to MLflow (see `Tracker`). It waits for the network, so it is run in a thread of its own (`Aside`)."""

    def __init__(self, run_dir: Path, settings: MLflow, name: str) -> None:
        self._dir = run_dir
        self._settings = settings
        self._name = name
        self._told = Told(run_dir, DIRECTORY)
        self._client: Any = None
        self._run = ""
        self._scalars: RoundScalars | None = None

    def start(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Opens a run with the configuration as parameters; a resumed run continues the one it had."""
        # Before the import: MLflow reports its use to its makers unless it is told not to, as Ray would.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = store_uri(self._settings)
        if urlsplit(uri).scheme in ("", "file"):
            # Newer versions ask for this before they write to a directory, which is what the user has named.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        resumed_from = facts.get("resumed_from")
        self._client = MlflowClient(tracking_uri=uri)
        identity = self._dir / DIRECTORY / "run-id"
        self._told.begin(resumed=resumed_from is not None)
        self._scalars = RoundScalars(self._dir, tier_names(config), resumed_from)
        if resumed_from is not None and identity.exists():
            self._run = identity.read_text(encoding="utf-8").strip()
            self._client.update_run(self._run, status="RUNNING")
        else:
            tags = {"strategy": config["strategy"]["name"]} | {
                f"version.{package}": number for package, number in software_versions().items()
            }
            found = self._client.get_experiment_by_name(self._settings.experiment)
            experiment = found.experiment_id if found else self._client.create_experiment(self._settings.experiment)
            self._run = self._client.create_run(experiment, run_name=self._name, tags=tags).info.run_id
            identity.write_text(self._run + "\n", encoding="utf-8")
            params = [Param(key, value) for key, value in parameters(config)]
            for begin in range(0, len(params), BATCH):
                self._client.log_batch(self._run, params=params[begin : begin + BATCH])
        for report in self._told.missed() if resumed_from is not None else ():
            self.round(report)

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Events are for the files and the screen."""

    def round(self, report: RoundReport) -> None:
        """Logs a round, unless the run has it already."""
        from mlflow.entities import Metric

        assert self._scalars is not None
        numbers = self._scalars.of(report)  # also of a round that is there already: it counts in the totals
        if report.round in self._told:
            return
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, report.round) for name, value in numbers.items()]
        for begin in range(0, len(metrics), BATCH):
            self._client.log_batch(self._run, metrics=metrics[begin : begin + BATCH])
        self._told.set(report.round)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Closes the run; its configuration, facts and summary become artifacts."""
        self._client.set_terminated(self._run, _ENDS.get(str(summary.get("status")), "FAILED"))
        for name in (CONFIG, FACTS, SUMMARY):
            if (self._dir / name).is_file():
                self._client.log_artifact(self._run, str(self._dir / name))


def store_uri(settings: MLflow) -> str:
    """Where to log.

    Raises:
        ConfigError: nowhere is said.
    """
    uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise ConfigError(
            "tracking.mlflow does not say where to log, and MLFLOW_TRACKING_URI is not set: write the address of the "
            "tracking server, such as tracking.mlflow.uri=http://localhost:5000, or of a database, such as "
            "sqlite:////data/mlflow.db."
        )
    return uri


def parameters(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """The values of a configuration by dotted name; lists as JSON, long ones cut."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from parameters(value, f"{above}{key}.")
        elif value is not None:
            yield f"{above}{key}", (value if isinstance(value, str) else dumps(plain(value)))[:LONGEST_VALUE]
