"""Weights & Biases, written by the server alone, and never able to stop or to hold up a run.

Every metric has `round` as its step. What W&B has no chart type for, such as the heat map of expert selection, is
logged twice: as an HTML panel that shows the report's own drawing, and as a table to query.
"""

import netrc
import os
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from hfedmoe_ray.config.running import Wandb
from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.tracking.charts import scale
from hfedmoe_ray.tracking.formatting import plural
from hfedmoe_ray.tracking.jsonl import plain
from hfedmoe_ray.tracking.sections import selection_map
from hfedmoe_ray.tracking.tiers import by_tier
from hfedmoe_ray.tracking.versions import software_versions

INIT_TIMEOUT_S = 15.0
"""How long a server that does not answer may hold up the start of a run, which is then logged offline."""
FINISH_TIMEOUT_S = 60.0
"""How long the end of a run may wait for what is not sent yet."""
_MIB = 2.0**20
_CREDENTIALS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


class WandbTracker:
    """Logs a run to W&B, or to `run_dir`/wandb when offline (see `Tracker`)."""

    def __init__(self, run_dir: Path, settings: Wandb, name: str, *, warn: Callable[[str], None]) -> None:
        """Args: `warn` is told, once, in one sentence, when W&B has failed and nothing more will be logged."""
        self._dir = run_dir
        self._settings = settings
        self._name = name
        self._warn = warn
        self._mode = resolve_mode(settings.mode)
        self._silent = self._mode == "disabled"
        self._run: Any = None
        self._order: tuple[str, ...] = ()
        self._budgets: dict[int, Mapping[str, Any]] = {}

    def start(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Opens the W&B run, offline if that cannot be done online; a resumed run continues the one it had."""
        self._attempt("start", lambda: self._start(config, facts))

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Events are for the files and the screen: W&B is told of whole rounds."""

    def round(self, report: RoundReport) -> None:
        """Logs a round."""
        self._attempt("log a round", lambda: self._run.log(self._metrics(report)))

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

        self._order = tuple(tier["name"] for tier in config["clients"]["tiers"])
        self._budgets = {client["client"]: client for client in facts.get("clients") or ()}
        self._dir.mkdir(parents=True, exist_ok=True)
        identity = _run_id(self._dir, resumed=facts.get("resumed_from") is not None)
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

    def _open(self, config: Mapping[str, Any], facts: Mapping[str, Any], identity: str) -> None:
        import wandb

        options: dict[str, Any] = {"silent": True, "console": "off", "disable_git": True, "save_code": False}
        options["init_timeout"] = INIT_TIMEOUT_S
        if "finish_timeout" in wandb.Settings.model_fields:  # Older versions wait for the network for ever.
            options["finish_timeout"] = FINISH_TIMEOUT_S
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

    def _metrics(self, report: RoundReport) -> dict[str, Any]:
        """A round as W&B names. What was not measured in this round is left out."""
        statuses = Counter(client.status for client in report.clients)
        metrics: dict[str, Any] = {
            "round": report.round,
            "global/accuracy": report.accuracy,
            "global/loss": report.test_loss,
            "own/accuracy": report.own_accuracy,
            "own/personalised_accuracy": report.personalised_accuracy,
            "train/loss": report.loss,
            "experts/trained": sum(count > 0 for layer in report.selected for count in layer),
            "experts/agreement": report.agreement,
            "experts/participation": report.participation,
            "traffic/up_mib": report.bytes_up / _MIB,
            "traffic/down_mib": report.bytes_down / _MIB,
            "seconds/round": report.seconds,
            "seconds/simulated": report.simulated_seconds,
        }
        for benchmark, score in report.benchmarks.items():
            metrics |= {f"benchmark/{benchmark}/{field}": score[field] for field in ("accuracy", "normalised")}
        metrics |= {f"seconds/{phase}": seconds for phase, seconds in report.phases.items()}
        metrics |= {
            f"clients/{status}": statuses[status]
            for status in ("ok", "late", "failed", "memory", "rejected", "dropped")
        }
        for tier, row in by_tier(report.clients, self._order).items():
            metrics |= {
                f"tier/{tier}/loss": row.loss,
                f"tier/{tier}/seconds": row.seconds,
                f"tier/{tier}/experts_held": row.resident,
                f"tier/{tier}/experts_trained": row.trained,
                f"tier/{tier}/up_mib": row.bytes_up / _MIB,
                f"tier/{tier}/down_mib": row.bytes_down / _MIB,
            }
        metrics = {name: value for name, value in metrics.items() if value is not None}
        return metrics | self._pictures(report)

    def _pictures(self, report: RoundReport) -> dict[str, Any]:
        import wandb

        selection = [
            [layer, expert, count, report.usage[layer][expert]]
            for layer, row in enumerate(report.selected)
            for expert, count in enumerate(row)
        ]
        budgets = [
            [
                client.client,
                client.tier,
                self._budgets.get(client.client, {}).get("resident_experts"),
                client.resident,
                client.trained,
                client.status,
            ]
            for client in report.clients
        ]
        peak = max([1, *(count for layer in report.selected for count in layer)])
        heat_map = scale("1", plural(peak, "client")) + selection_map(report.selected, peak, f"round {report.round}")
        return {
            "experts/heatmap": wandb.Html(_page(heat_map), inject=False),
            "experts/selection": wandb.Table(columns=["layer", "expert", "clients", "usage"], data=selection),
            "clients/budgets": wandb.Table(
                columns=["client", "tier", "budget", "held", "trained", "status"], data=budgets
            ),
        }

    def _finish(self, summary: Mapping[str, Any]) -> None:
        import wandb

        self._run.summary.update(plain(summary))
        self._run.finish(exit_code=1 if summary.get("error") else 0)
        # `finish` may return before W&B's own process has written the last of an offline file, and the process of a
        # server is killed as soon as its run is over. This waits for that process to end.
        wandb.teardown()

    def _sync(self) -> str:
        """The command that sends what was written here."""
        return f"`wandb sync {Path(self._run.dir).parent}`"


def _told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _page(drawing: str) -> str:
    style = files("hfedmoe_ray.tracking").joinpath("report.css").read_text(encoding="utf-8")
    style += "body { padding: .5rem }"
    return f'<!doctype html><meta charset="utf-8"><style>{style}</style><figure>{drawing}</figure>'


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
    return "online" if any(map(os.environ.get, _CREDENTIALS)) or _in_netrc() else "offline"


def _in_netrc() -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname or "api.wandb.ai"
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(run_dir: Path, *, resumed: bool) -> str:
    """The id under which W&B knows this run: kept beside its files, new for a run that begins anew."""
    path = run_dir / "wandb" / "run-id"
    if resumed and path.exists():
        return path.read_text(encoding="utf-8").strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = secrets.token_hex(8)
    path.write_text(identity + "\n", encoding="utf-8")
    return identity
