"""Runs from Python, as from the command line: `federate`, `resume`, and what a run left as tables and a model."""

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import CheckpointError, HFedMoEError
from hfedmoe_ray.rundir import check_can_resume, check_is_run, how_to_go_on, is_run, make_room

if TYPE_CHECKING:
    import pandas as pd

    from hfedmoe_ray.tracking.record import RunRecord

REPORT_HEIGHT_PX = 720
"""Height of a report shown in a notebook; it scrolls."""


def federate(
    experiment: Experiment | Mapping[str, Any] | str | Path,
    *overrides: str,
    overwrite: bool = False,
    progress: bool = True,
) -> "Run":
    """Runs an experiment and writes its record to `output`/`name`, as `hfedmoe run` does.

    Args:
        experiment: What to run: an `Experiment`, the path of a YAML file, or a mapping of the same keys.
        overrides: `key=value`, such as "rounds=2" or "clients.tiers.0.experts=0.25".
        overwrite: Delete an earlier run of the same name first.
        progress: Whether to show rounds as they come: as HTML in a notebook, else on the terminal.

    Raises:
        HFedMoEError: it cannot start or cannot go on: one paragraph that says what to do instead.
        KeyboardInterrupt: it was interrupted; `resume` goes on from the last complete round.
    """
    if overrides or not isinstance(experiment, Experiment):
        experiment = Experiment.load(experiment, *overrides)
    run_dir = Path(experiment.output) / experiment.name
    make_room(run_dir, overwrite=overwrite)
    return _train(experiment, run_dir, resume=False, progress=progress)


def resume(run_dir: str | Path, *, progress: bool = True) -> "Run":
    """Goes on with an interrupted run from its last complete round; the result is that of an undisturbed run.

    Args:
        run_dir: The run's directory, such as "runs/quickstart".
        progress: As in `federate`.

    Raises:
        HFedMoEError: there is no complete round, or the run cannot go on.
        KeyboardInterrupt: it was interrupted again.
    """
    run_dir = Path(run_dir)
    check_can_resume(run_dir)
    return _train(load_experiment(run_dir / "config.yaml"), run_dir, resume=True, progress=progress)


class Run:
    """A run and what it left, finished or not. Everything is read from its directory when it is asked for."""

    def __init__(self, run_dir: str | Path) -> None:
        """Opens the run in a directory, whoever ran it.

        Raises:
            CheckpointError: there is no run.
        """
        self.run_dir = Path(run_dir)
        check_is_run(self.run_dir)

    @property
    def experiment(self) -> Experiment:
        """The configuration, defaults included."""
        return load_experiment(self.run_dir / "config.yaml")

    @property
    def summary(self) -> dict[str, Any]:
        """The result: accuracies, bytes, seconds, `model_sha256`, … ; empty before the run has ended."""
        return dict(self._record().summary)

    @property
    def history(self) -> "pd.DataFrame":
        """A row a round (its index): losses, accuracies, bytes, seconds by phase, experts and clients that trained.

        Accuracies are shares, bytes are bytes, times are seconds; NaN where a round was not evaluated.
        """
        import pandas as pd

        from hfedmoe_ray.tracking.tables import round_rows

        return pd.DataFrame(round_rows(self._record())).set_index("round")

    @property
    def clients(self) -> "pd.DataFrame":
        """A row for each client's result in each round: `records.ClientRecord`."""
        import pandas as pd

        from hfedmoe_ray.tracking.tables import client_rows

        return pd.DataFrame(client_rows(self._record()))

    def model(self) -> Any:
        """The global model after the last complete round, for transformers: in fp32, on the CPU, not in training mode.

        LoRA factors are merged. `config.id2label` has the label names.

        Raises:
            CheckpointError: no round is complete.
        """
        from hfedmoe_ray.export import export_run, load_exported

        # Exported anew each time: what an earlier call had left may be older than the run.
        with tempfile.TemporaryDirectory(prefix=".model-", dir=self.run_dir) as directory:
            export_run(self.run_dir, "hf", Path(directory))
            return load_exported(Path(directory))

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from hfedmoe_ray.data.tokenize import load_tokenizer
        from hfedmoe_ray.prepare import prepare_run

        return load_tokenizer(prepare_run(self.experiment, self.run_dir).model.path)

    def report(self) -> "ReportPage":
        """Writes report.html; in a notebook, the last expression of a cell shows it."""
        from hfedmoe_ray.tracking.report import write_report

        return ReportPage(write_report(self.run_dir))

    def __repr__(self) -> str:
        return f"Run({str(self.run_dir)!r}): {_in_words(self._record())}"

    def _record(self) -> "RunRecord":
        from hfedmoe_ray.tracking.record import read_run

        return read_run(self.run_dir)


class ReportPage(os.PathLike[str]):
    """A report on disk: a path, which a notebook shows as the page."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"ReportPage({str(self.path)!r})"

    def _repr_html_(self) -> str:
        # In a frame of its own, so that neither the page's style nor the notebook's reaches the other.
        page = escape(self.path.read_text(encoding="utf-8"), quote=True)
        return (
            f'<iframe srcdoc="{page}" title="report" style="width:100%;height:{REPORT_HEIGHT_PX}px;border:0"></iframe>'
        )


def _train(experiment: Experiment, run_dir: Path, *, resume: bool, progress: bool) -> Run:
    """Runs the experiment in this process's terminal or notebook and writes the report, however the run ended."""
    from hfedmoe_ray.runtime import session
    from hfedmoe_ray.tracking.report import write_report

    try:
        with _renderer(run_dir, progress=progress) as render:
            session.run(experiment, run_dir, resume=resume, render=render)
    except (KeyboardInterrupt, HFedMoEError) as end:
        if isinstance(end, KeyboardInterrupt):
            end.add_note(how_to_go_on(run_dir))
        if is_run(run_dir):
            try:
                write_report(run_dir)
            except (OSError, CheckpointError) as problem:  # such as the full disk that ended the run
                end.add_note(f"There is no new report of it: {problem}")
        raise
    write_report(run_dir)
    return Run(run_dir)


def _renderer(run_dir: Path, *, progress: bool) -> AbstractContextManager[Callable[[str, Any], None]]:
    """Who shows a run as it goes."""
    if not progress:
        return nullcontext(lambda _name, _fields: None)
    from hfedmoe_ray.tracking.console import ConsoleRenderer
    from hfedmoe_ray.tracking.notebook import NotebookRenderer, in_notebook

    return NotebookRenderer(run_dir) if in_notebook() else ConsoleRenderer(run_dir)


def _in_words(run: "RunRecord") -> str:
    from hfedmoe_ray.tracking.formatting import percent, plural

    status = run.summary.get("status", "failed" if run.summary else "not ended")
    rounds = plural(max((report.round for report in run.rounds), default=0), "round")
    accuracies = [report.accuracy for report in run.rounds if report.accuracy is not None]
    return f"{status}, {rounds}" + (f", test accuracy {percent(accuracies[-1])}" if accuracies else "")
