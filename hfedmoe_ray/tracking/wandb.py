"""Weights & Biases, written by the server alone, and never able to stop or to hold up a run.

Every metric has `round` as its step, and no round is logged twice, however often a run is resumed. Pictures, tables
and artifacts are bounded in number and size (`pictures`, `wandb.model_mib`).
"""

import netrc
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from hfedmoe_ray.config.running import Wandb
from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.tracking.files import CONFIG, FACTS, METRICS, SUMMARY
from hfedmoe_ray.tracking.jsonl import plain
from hfedmoe_ray.tracking.pictures import Pictures
from hfedmoe_ray.tracking.scalars import RoundScalars, tier_names
from hfedmoe_ray.tracking.told import Told
from hfedmoe_ray.tracking.versions import software_versions

INIT_TIMEOUT_S = 15.0
"""How long a server that does not answer may hold up the start of a run, which is then logged offline."""
FINISH_TIMEOUT_S = 60.0
"""How long the end of a run may wait for what is not sent yet."""
UPLOAD_MIB_S = 1.0
"""How slow the network may be when the final model is sent: the end of a run then waits for longer."""
RECORD_MIB = 32.0
"""Largest file of the run directory that becomes an artifact."""
_MIB = 2.0**20
_CREDENTIALS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


class WandbTracker:
    """Logs a run to W&B, or to `run_dir`/wandb when offline (see `Tracker`)."""

    def __init__(
        self,
        run_dir: Path,
        settings: Wandb,
        name: str,
        *,
        warn: Callable[[str], None],
        save_model: Callable[[Path], None],
    ) -> None:
        """Opens nothing yet.

        Args:
            run_dir: The run's directory.
            settings: `tracking.wandb`.
            name: The run's name.
            warn: Is told, once, in one sentence, when W&B has failed and nothing more will be logged.
            save_model: Writes the run's model into a directory that does not exist yet.
        """
        self._dir = run_dir
        self._settings = settings
        self._name = name
        self._warn = warn
        self._save_model = save_model
        self._mode = resolve_mode(settings.mode)
        self._silent = self._mode == "disabled"
        self._run: Any = None
        self._told = Told(run_dir, "wandb")
        self._scalars: RoundScalars | None = None
        self._pictures: Pictures | None = None

    def start(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Opens the W&B run, offline if that cannot be done online; a resumed run continues the one it had."""
        self._attempt("start", lambda: self._start(config, facts))

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Events are for the files and the screen: W&B is told of whole rounds."""

    def round(self, report: RoundReport) -> None:
        """Logs a round, unless W&B has it already."""
        self._attempt("log a round", lambda: self._log(report))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Logs the summary and closes the run, as failed if the summary holds an error."""
        self._attempt("finish", lambda: self._finish(summary))

    def _attempt(self, what: str, action: Callable[[], None]) -> None:
        """Does something with W&B, or, if that fails, says so once and is silent from then on.

        Any exception is caught and the run goes on, here and in `_start`: they come from a network, a service process
        and a library of many versions, none can be named in advance, and none is worth a training run whose record is
        complete without W&B.
        """
        if self._silent:
            return
        try:
            action()
        except Exception as error:
            self._silent = True
            later = f". What it has of the run can be sent later: {self._sync()}" if self._run is not None else ""
            self._warn(
                f"Weights & Biases could not {what} ({_told(error)}); the run goes on without it, and metrics.jsonl "
                f"has everything{later}"
            )

    def _start(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        import wandb

        resumed_from = facts.get("resumed_from")
        self._dir.mkdir(parents=True, exist_ok=True)
        self._told.begin(resumed=resumed_from is not None)
        sent = _set_aside(self._dir) if resumed_from is not None else False
        self._scalars = RoundScalars(self._dir, tier_names(config), resumed_from)
        self._pictures = Pictures(config["rounds"], facts.get("clients") or ())
        identity = _run_id(self._dir, resumed=resumed_from is not None)
        try:
            self._open(config, facts, identity)
        except Exception as error:
            if self._mode != "online":
                raise
            # Ends W&B's own process, which still holds the run's id.
            wandb.teardown()
            self._mode = "offline"
            self._open(config, facts, identity)
            self._warn(
                f"Weights & Biases cannot be reached ({_told(error)}); the run goes on and is logged offline. Send it "
                f"when it has ended: {self._sync()}"
            )
        if resumed_from is None:
            return
        # How much of what it was told W&B has, it knows itself where it is online. A new file has nothing.
        if self._mode == "online":
            self._told.set(int(self._run.starting_step) - 1)
        elif not sent:
            self._told.set(-1)
        for report in self._told.missed():
            self._log(report)

    def _open(self, config: Mapping[str, Any], facts: Mapping[str, Any], identity: str) -> None:
        import wandb

        options: dict[str, Any] = {"silent": True, "console": "off", "disable_git": True, "save_code": False}
        options["init_timeout"] = INIT_TIMEOUT_S
        if "finish_timeout" in wandb.Settings.model_fields:  # Older versions wait for the network for ever.
            options["finish_timeout"] = FINISH_TIMEOUT_S + self._settings.model_mib / UPLOAD_MIB_S
        versions = software_versions() | dict(facts.get("versions") or {})
        self._run = wandb.init(
            dir=str(self._dir),
            mode=self._mode,
            id=identity,
            resume="allow",
            reinit="create_new",
            project=self._settings.project,
            entity=self._settings.entity,
            group=self._settings.group,
            name=self._name,
            job_type="server",
            tags=[config["strategy"]["name"]],
            config=plain({**config, "versions": versions, "model_shape": facts.get("shape") or {}}),
            settings=wandb.Settings(**options),
        )
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")

    def _log(self, report: RoundReport) -> None:
        assert self._scalars is not None
        assert self._pictures is not None
        numbers = self._scalars.of(report)  # also of a round that is there already: it counts in the totals
        if report.round not in self._told:
            self._run.log(numbers | self._pictures.of(report), step=report.round, commit=True)
            self._told.set(report.round)

    def _finish(self, summary: Mapping[str, Any]) -> None:
        import wandb

        try:
            self._run.summary.update(plain(summary))
            self._log_record()
            if self._settings.model_mib and summary.get("status") == "finished":
                self._log_model()
        finally:
            self._run.finish(exit_code=1 if summary.get("error") else 0)
            # `finish` may return before W&B's own process has written the last of an offline file, and the process of
            # a server is killed as soon as its run is over. This waits for that process to end.
            wandb.teardown()

    def _log_record(self) -> None:
        """The run's own files, from where they are: resolved configuration, facts, rounds, summary."""
        import wandb

        record = wandb.Artifact(f"{self._name}-record", type="record")
        for name in (CONFIG, FACTS, METRICS, SUMMARY):
            file = self._dir / name
            if file.is_file() and file.stat().st_size <= RECORD_MIB * _MIB:
                record.add_file(str(file), name=name, policy="immutable")
        if record.manifest.entries:
            self._run.log_artifact(record)

    def _log_model(self) -> None:
        """The final model, unless it is larger than the configuration allows."""
        import wandb

        directory = self._dir / "wandb" / "model"
        shutil.rmtree(directory, ignore_errors=True)
        self._save_model(directory)
        mib = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) / _MIB
        if mib > self._settings.model_mib:
            shutil.rmtree(directory)
            self._warn(
                f"The final model has {mib:.0f} MiB and is not logged to Weights & Biases: tracking.wandb.model_mib is "
                f"{self._settings.model_mib:g}. It can be written with: hfedmoe export {self._dir}"
            )
            return
        model = wandb.Artifact(f"{self._name}-model", type="model")
        model.add_dir(str(directory), policy="immutable")
        self._run.log_artifact(model)

    def _sync(self) -> str:
        """The command that sends what was written here."""
        return f"`hfedmoe wandb sync {self._dir}`"


def _set_aside(run_dir: Path) -> bool:
    """Renames the offline logs of a run that is resumed, if none was sent yet; returns whether any was.

    Of a process that was killed the last rounds are missing in them, and W&B can not append to one: the new log has all
    rounds, and the others are not to be sent as well.
    """
    logs = list(run_dir.glob("wandb/offline-run-*"))
    if any(list(log.glob("*.wandb.synced")) for log in logs):
        return True
    for log in logs:
        log.rename(log.with_name(f"superseded-{log.name}"))
    return False


def _told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def resolve_mode(mode: Literal["auto", "online", "offline", "disabled"]) -> Literal["online", "offline", "disabled"]:
    """Returns "online", "offline" or "disabled" for a configured mode.

    "auto" obeys $WANDB_MODE if that is set, is online where W&B's own sources hold credentials (its environment
    variables, or the netrc file that `wandb login` writes), and offline otherwise.
    """
    if mode != "auto":
        return mode
    match os.environ.get("WANDB_MODE"):
        case "online" | "offline" | "disabled" as wish:
            return wish
    return "online" if has_credentials() else "offline"


def server_url() -> str:
    """W&B's server, or one's own."""
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def has_credentials() -> bool:
    """Whether there is a key for that server in the environment, or in the netrc file that `wandb login` writes."""
    if any(map(os.environ.get, _CREDENTIALS)):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(urlsplit(server_url()).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(run_dir: Path, *, resumed: bool) -> str:
    """The id under which W&B knows this run: kept beside its files, new for a run that begins anew."""
    path = run_dir / "wandb" / "run-id"
    if resumed and path.exists():
        return path.read_text(encoding="utf-8").strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    # A sweep's agent has made the run that it waits for.
    in_sweep = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    identity = in_sweep or secrets.token_hex(8)
    path.write_text(identity + "\n", encoding="utf-8")
    return identity
