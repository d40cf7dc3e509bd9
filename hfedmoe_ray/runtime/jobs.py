"""Sending a run to a Ray cluster as a job, following it, and bringing its record home.

What is uploaded is this package, `jobs/federate.py` and the resolved configuration: a megabyte, whatever lies beside
them. The cluster's own Python environment is used; nothing is installed there.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ray.job_submission import JobSubmissionClient

import hfedmoe_ray
from hfedmoe_ray.config.load import dump_experiment, load_experiment
from hfedmoe_ray.config.plugins import plugin_source
from hfedmoe_ray.errors import ClusterError, ConfigError
from hfedmoe_ray.runtime import job_server, timeouts
from hfedmoe_ray.runtime.archive import Receiver

PACKAGE = Path(hfedmoe_ray.__file__).parent
Show = Callable[[str], object]
"""Is given a job's log, piece by piece."""


def _on_screen(piece: str) -> None:
    print(piece, end="", flush=True)


def submit(
    config: Path,
    overrides: Sequence[str],
    address: str | None,
    *,
    follow: bool = True,
    overwrite: bool = False,
    python: str = "python",
    show: Show = _on_screen,
) -> int:
    """Submits `hfedmoe run CONFIG OVERRIDES` to a cluster and returns the job's exit code (0 if not followed).

    The driver, and with it the server actor, which runs the rounds, goes to the node that was made for it, else to any
    but the head (`job_server.place_of_driver`). The run directory is `output`/`name` there, below the home directory
    unless `output` is absolute. A job that succeeds sends its record (metrics, summary, report; no checkpoints), which
    is written to `output`/`name` here when the job has been followed to its end.

    Args:
        config: Configuration file; read, resolved and checked here.
        overrides: key=value.
        address: URL of the cluster's job server (its dashboard). Default: $RAY_API_SERVER_ADDRESS, else this machine.
        follow: Show the log until the job ends.
        overwrite: Delete an earlier run of the same name, there and here.
        python: The cluster's interpreter.
        show: Is given the log, piece by piece.

    Raises:
        ConfigError: the configuration is wrong, the run exists here already, or this is not a checkout.
        ClusterError: the cluster cannot be reached or refuses the token.
        KeyboardInterrupt: Ctrl-C while following; the job goes on.
    """
    experiment = load_experiment(config, overrides)
    target = Path(experiment.output) / experiment.name
    if follow and target.exists() and not overwrite:
        raise ConfigError(
            f"{target} exists already, and the record of this run would be written there. Choose another name "
            "(name=…), or have it deleted first (--overwrite)."
        )
    if overwrite and (target / "config.yaml").is_file():
        shutil.rmtree(target)
    client = job_server.connect(address)
    with tempfile.TemporaryDirectory(prefix="hfedmoe-job-") as upload:
        fill_upload(Path(upload), dump_experiment(experiment), plugin_source(experiment.strategy.name))
        options = ["--send-files", *["--overwrite"] * overwrite]
        entrypoint = " ".join([python, "-u", "jobs/federate.py", *options, "config.yaml"])
        about = {"run": experiment.name, "record": str(target)}
        job = _submit_job(client, entrypoint, upload, about, job_server.place_of_driver(address))
    if not follow:
        show(f"submitted {job}; hfedmoe status tells how it goes, hfedmoe logs {experiment.name} brings its record\n")
        return 0
    return _accompany(client, job, target, show)


def logs(run: str | None, address: str | None, *, follow: bool = True, show: Show = _on_screen) -> int:
    """Shows the log of a submitted run; when the run has ended, its record is written here as `submit` does.

    Args:
        run: Its name, or its job's. Default: the latest.
        address: URL of the cluster's job server. Default: $RAY_API_SERVER_ADDRESS, else this machine.
        follow: Wait for the end, rather than show what there is.
        show: Is given the log, piece by piece.

    Returns:
        The job's exit code; 0 for one that has not ended.

    Raises:
        ClusterError: the cluster cannot be reached, refuses the token, or knows no such run.
        KeyboardInterrupt: Ctrl-C while following; the job goes on.
    """
    client = job_server.connect(address)
    found = job_server.find_run(client, run)
    if follow or found.over:
        return _accompany(client, found.job, Path(found.record), show)
    receiver = Receiver()
    show(receiver.feed(client.get_job_logs(found.job)))
    show(receiver.flush())
    return 0


def _accompany(client: JobSubmissionClient, job: str, target: Path, show: Show) -> int:
    """Shows a job's log to its end, brings the run's record to `target`, and returns the job's exit code."""
    receiver = Receiver()
    try:
        job_server.follow(client, job, lambda piece: show(receiver.feed(piece)))
    except KeyboardInterrupt:
        show(f"\nnot followed any more; the job goes on: hfedmoe logs {job}. To end it: hfedmoe stop {job}\n")
        raise
    show(receiver.flush())
    info = client.get_job_info(job)
    if info.status != "SUCCEEDED":
        show(f"{info.message}\n")
        return info.driver_exit_code or 1
    if (target / "summary.json").is_file():
        show(f"the run is in {target}\n")
        return 0
    files = receiver.write(target)
    show(f"received {', '.join(sorted(file.name for file in files))} in {target}\n")
    return 0


def _submit_job(
    client: JobSubmissionClient, entrypoint: str, upload: str, about: dict[str, str], place: dict[str, str]
) -> str:
    """Hands the job over; a cluster that has just been started is given time until it takes jobs."""
    until = time.monotonic() + timeouts.JOB_AGENT
    while True:
        try:
            job: str = client.submit_job(
                entrypoint=entrypoint,
                runtime_env={"working_dir": upload},
                metadata=about,
                entrypoint_label_selector=place or None,
            )
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > until:
                raise ClusterError(
                    f"The cluster takes no job: after {timeouts.JOB_AGENT:g} s no node has an agent for jobs running. "
                    "Ray must be installed as ray[default] on its nodes; their dashboard_agent.log says more."
                ) from error
            time.sleep(1.0)
        else:
            return job


def fill_upload(directory: Path, config: str, plugin: Path | None = None) -> None:
    """Puts what the job needs into an empty directory.

    Args:
        directory: Where.
        config: The resolved configuration.
        plugin: The module or package of the user's strategy, if it is not installed.

    Raises:
        ConfigError: the package was installed without its checkout, so that there is no `jobs/federate.py`.
    """
    entry = PACKAGE.parent / "jobs" / "federate.py"
    if not entry.is_file():
        raise ConfigError(
            f"{entry} is missing: `hfedmoe submit` uploads the checkout it runs from. Run it from a clone of the "
            "repository (pip install --editable)."
        )
    shutil.copytree(PACKAGE, directory / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "jobs").mkdir()
    shutil.copy(entry, directory / "jobs")
    if plugin is not None and plugin.is_dir():
        shutil.copytree(plugin, directory / plugin.name, ignore=shutil.ignore_patterns("__pycache__"))
    elif plugin is not None:
        shutil.copy(plugin, directory)
    (directory / "config.yaml").write_text(config, encoding="utf-8")
