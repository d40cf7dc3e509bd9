"""Whole comparisons: real runs, here and in processes of their own, interrupted, failing; and the pages they make."""

import dataclasses
import json
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import wandb_file
import yaml
from html_page import Page
from tiny_federation import experiment

from hfedmoe_ray.cli import main
from hfedmoe_ray.comparison import running
from hfedmoe_ray.comparison.design import Design, Run, read_design
from hfedmoe_ray.comparison.outcome import METRICS, Outcome, read_outcome
from hfedmoe_ray.comparison.page import render
from hfedmoe_ray.comparison.record import read_outcomes, write_comparison
from hfedmoe_ray.comparison.running import carry_out, fitting_processes, stage_of
from hfedmoe_ray.comparison.tables import escape_latex, latex, make_tables, markdown
from hfedmoe_ray.config.load import dump_experiment
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.runtime import session

EVIL = "</title><script>alert('x')</script>\"'&|*_%$#~^\\{}"


@pytest.fixture(scope="module")
def config(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two strategies by two seeds on the tiny encoder."""
    made = experiment(
        sources,
        name="tiny-comparison",
        strategy="hfedmoe",
        local={"steps": 2, "batch_size": 4, "learning_rate": 1e-2, "profile_examples": 8},
        evaluate={"own": "always", "personalised": True, "target": 0.3},
        tracking={"wandb": {"mode": "offline", "project": "tests"}},
    )
    values = yaml.safe_load(dump_experiment(made))
    values["compare"] = {
        "strategies": ["hfedmoe", "all"],
        "seeds": [0, 1],
        "variants": {"all": {"strategy": "random", "budget": 1.0}},
    }
    path = tmp_path_factory.mktemp("comparison") / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def done(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Design:
    """The comparison, its runs made in this process."""
    design = read_design(config, (), output=tmp_path_factory.mktemp("out") / "whole")
    for one in design.runs:
        session.run(one.experiment, one.directory, resume=False, render=lambda *_: None)
    write_comparison(design, [])
    return design


def deterministic(directory: Path) -> tuple[bytes, bytes, str]:
    """All that two comparisons must agree on."""
    values = json.loads((directory / "comparison.json").read_text())
    measured = values.pop("measured")
    assert len(measured) == len(values["runs"]) and all(one["peak_client_mib"] > 0 for one in measured.values())
    texts = [(directory / f"comparison.{kind}").read_bytes() for kind in ("md", "tex")]
    return texts[0], texts[1], json.dumps(values)


def copy_of(design: Design, config: Path, directory: Path, *left_out: Run) -> Design:
    """The same comparison in another directory, some of its runs not done yet."""
    shutil.copytree(design.directory, directory)
    for run in left_out:
        shutil.rmtree(directory / "runs" / run.experiment.name)
    return read_design(config, (), output=directory)


def test_the_figures_are_those_of_the_runs(done: Design):
    values = json.loads((done.directory / "comparison.json").read_text())
    (table,) = values["table"]
    for strategy in done.strategies:
        runs = [run for run in done.runs if run.strategy == strategy]
        summaries = [json.loads((run.directory / "summary.json").read_text()) for run in runs]
        assert [summary["status"] for summary in summaries] == ["finished"] * 2
        for key in ("accuracy", "best_accuracy", "own_accuracy", "personalised_accuracy", "bytes_up", "own_variance"):
            cell = table["rows"][strategy][key]
            assert list(cell["values"].values()) == [summary[key] for summary in summaries]
            assert cell["mean"] == pytest.approx(sum(summary[key] for summary in summaries) / 2)
        lines = [json.loads(line) for line in (runs[0].directory / "metrics.jsonl").read_text().splitlines()]
        trained = [sum(count > 0 for row in line["selected"] for count in row) for line in lines[1:]]
        cell = table["rows"][strategy]["experts_a_round"]
        assert cell["values"]["0"] == pytest.approx(sum(trained) / len(trained))
    ups = {strategy: cells["bytes_up"]["mean"] for strategy, cells in table["rows"].items()}
    assert ups["all"] > ups["hfedmoe"], "a strategy without a budget sends more"
    assert table["rows"]["hfedmoe"]["bytes_up"]["best"]


def test_an_interrupted_comparison_goes_on_to_the_same_tables(done: Design, config: Path, tmp_path: Path):
    """One run is missing, one is stopped in the middle; both are done again, each in a process of its own."""
    missing, cut = done.runs[1], done.runs[2]
    again = copy_of(done, config, tmp_path / "again", missing)
    half = next(run for run in again.runs if run.experiment.name == cut.experiment.name)
    (half.directory / "summary.json").unlink()
    shutil.rmtree(half.directory / "checkpoints" / "round-0002")
    (half.directory / "checkpoints" / "LATEST").write_text("round-0001\n")
    untouched = (again.runs[0].directory / "summary.json").stat().st_mtime_ns
    assert [stage_of(run) for run in again.runs] == ["finished", "new", "half done", "finished"]
    told: list[tuple[str, str]] = []
    assert (
        carry_out(again, processes=2, show=lambda event, run, _: told.append((event, run.strategy if run else "")))
        == []
    )
    write_comparison(again, [])
    assert deterministic(again.directory) == deterministic(done.directory)
    assert (again.runs[0].directory / "summary.json").stat().st_mtime_ns == untouched
    events = [json.loads(line) for line in (half.directory / "events.jsonl").read_text().splitlines()]
    assert [event["resumed_from"] for event in events if event["event"] == "resumed"] == [1]
    assert sorted(event for event, _ in told if event != "round") == [
        "finished",
        "finished",
        "preparing",
        "started",
        "started",
    ]
    assert carry_out(again, processes=2, show=lambda *_: pytest.fail("nothing is left to do")) == []


def test_a_failing_run_takes_no_other_with_it(done: Design, config: Path, tmp_path: Path, capsys):
    """One run cannot write its record: the tables are written without it, and what is missing is told."""
    blocked = done.runs[3]
    again = copy_of(done, config, tmp_path / "again", blocked)
    (again.directory / "runs" / blocked.experiment.name).write_text("in the way")
    assert main(["compare", str(config), "--output", str(again.directory), "--processes", "1"]) == 7
    told = capsys.readouterr().err
    assert "1 of 4 runs failed and are missing from the tables; give the same command again" in told
    assert f"{blocked.experiment.name}: " in told
    table = json.loads((again.directory / "comparison.json").read_text())
    assert [one["name"] for one in table["runs"]] == [run.experiment.name for run in done.runs[:3]]
    assert table["failed"][0].startswith(blocked.experiment.name)
    assert "Runs are missing." in Page((again.directory / "comparison.html").read_text()).text
    assert "Traceback" in (again.directory / "logs" / f"{blocked.experiment.name}.log").read_text()
    assert f"| {blocked.strategy} | 1 |" in (again.directory / "comparison.md").read_text()


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every process that a comparison starts."""
    started: list[Any] = []
    start = running._Children.start

    def watched(self: Any, *arguments: Any) -> Any:
        started.append(start(self, *arguments))
        return started[-1]

    monkeypatch.setattr(running._Children, "start", watched)
    return started


def test_a_killed_process_is_a_failure_with_a_reason(
    done: Design, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: list[Any]
):
    again = copy_of(done, config, tmp_path / "again", *done.runs[:2])
    start = running._Children.start

    def killed(self: Any, *arguments: Any) -> Any:
        process = start(self, *arguments)
        process.send_signal(signal.SIGKILL)
        return process

    monkeypatch.setattr(running._Children, "start", killed)
    failures = carry_out(again, processes=1, show=lambda *_: None)
    assert [failure.run for failure in failures] == list(again.runs[:2]), "the second was tried all the same"
    assert len(children) == 2
    assert all("ended by SIGKILL" in failure.reason for failure in failures)


def test_ctrl_c_ends_every_process_and_loses_nothing(
    done: Design, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: list[Any]
):
    again = copy_of(done, config, tmp_path / "again", *done.runs[:2])
    monkeypatch.setattr(running, "wait", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        carry_out(again, processes=2, show=lambda *_: None)
    assert len(children) >= 2
    assert all(child is None or child.poll() is not None for child in children)
    assert [stage_of(run) for run in again.runs[2:]] == ["finished"] * 2


def test_a_run_of_another_configuration_is_refused_before_anything_starts(done: Design, config: Path):
    changed = read_design(config, ["local.steps=9"], output=done.directory)
    with pytest.raises(ConfigError, match=r"there local.steps is 2, here it is 9\..*Nothing has been started") as told:
        carry_out(changed, processes=1, show=lambda *_: pytest.fail("something was started"))
    assert "--output" in str(told.value)
    # What no figure depends on may change.
    elsewhere = read_design(config, ["backend=ray", "runtime.quorum=0.9"], output=done.directory)
    assert {stage_of(run) for run in elsewhere.runs} == {"finished"}


def test_runs_that_need_the_whole_cluster_take_turns(config: Path, tmp_path: Path):
    on_ray = read_design(config, ["backend=ray"], output=tmp_path)
    with pytest.raises(ConfigError, match="takes the whole cluster"):
        carry_out(on_ray, processes=2, show=lambda *_: None)


def test_as_many_run_at_once_as_cores_and_memory_allow(done: Design, monkeypatch: pytest.MonkeyPatch):
    from hfedmoe_ray.runtime import machine

    offered = machine.this_machine()
    made = [run.experiment for run in done.runs]
    counts = []
    for cpus, memory in ((64, 2**40), (3, 2**40), (64, 2**20), (64, 2**34)):
        large = dataclasses.replace(offered, cpus=float(cpus), memory_bytes=memory)
        monkeypatch.setattr(machine, "this_machine", lambda offer=large: offer)
        counts.append(fitting_processes(made))
    assert counts[:3] == [64, 3, 1]
    assert 1 < counts[3] < 64


# -------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    ("own", "reached"),
    [([None, 0.2, 0.4], 2), ([0.3, 0.1, 0.4], 0), ([None, None, 0.4], None), ([0.1, 0.1, 0.2], None)],
)
def test_the_round_in_which_clients_reached_the_target_on_their_own_data(done: Design, tmp_path: Path, own, reached):
    run = tmp_path / "run"
    shutil.copytree(done.runs[0].directory, run, ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    changed = [line | {"own_accuracy": accuracy} for line, accuracy in zip(lines[:3], own, strict=True)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    outcome = read_outcome(run, strategy="hfedmoe", setting="", seed=0)
    assert outcome.figures["rounds_to_own_target"] == reached, "the target is 0.3"


def test_wandb_sees_the_runs_of_a_comparison_as_one_group(done: Design):
    logged = [wandb_file.run_record(next(run.directory.glob("wandb/**/*.wandb"))) for run in done.runs]
    assert {record.run_group for record in logged} == {"tiny-comparison"}
    assert [record.display_name for record in logged] == [run.experiment.name for run in done.runs]


def test_the_page_is_self_contained_and_draws_every_figure(done: Design):
    html = (done.directory / "comparison.html").read_text()
    page = Page(html)
    assert "<script" not in html and "@import" not in html and "url(" not in html
    assert not re.search(r"https?://", html)
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href", "srcset", "data", "action") or value == "data:,"
    drawn = {value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")}
    assert drawn == {
        "Accuracy of the global model by round and strategy",
        "Accuracy of the global model by bytes sent and strategy",
        "Accuracy of every client on its own test data by strategy",
        "Clients that train an expert in a round, experts by popularity",
    }
    for strategy in done.strategies:
        for round in range(3):
            assert any(tip.startswith(f"{strategy}, round {round}: ") for tip in page.tips)
        for when in ("before", "after local training"):
            assert any(tip.startswith(f"{strategy}, {when}: worst tenth") for tip in page.tips)
    clients = sum(name == "class" and value.startswith("client ") for _, name, value in page.attributes)
    assert clients == 2 * 2 * 2 * 4, "strategies, seeds, before and after, clients"
    assert html.count('class="best"') >= len(METRICS) - 1
    assert "prefers-color-scheme: dark" in html
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    rows = page.table("Strategy", "Peak memory (MiB)")
    assert [row["Strategy"] for row in rows] == list(done.strategies)


def made_up(design: Design, names: Sequence[str]) -> tuple[Design, list[Outcome]]:
    """The comparison with other names for its strategies, and far more of a difference."""
    renamed = dict(zip(design.strategies, names, strict=True))
    outcomes = [dataclasses.replace(one, strategy=renamed[one.strategy]) for one in read_outcomes(design)]
    for one in outcomes:
        better = one.strategy == names[1]
        one.figures["accuracy"] = (0.9 if better else 0.1) + 0.001 * one.seed * (1 + better)
        one.figures["rounds_to_target"] = 2 if one.seed == 0 or better else None
    return dataclasses.replace(design, strategies=tuple(names), name=EVIL), outcomes


def test_the_best_is_marked_and_what_is_worse_has_a_star(done: Design):
    design, outcomes = made_up(done, ["low", "high"])
    text = markdown(design, make_tables(design, outcomes), [])
    (low,) = [line for line in text.splitlines() if line.startswith("| low | 2 | 10")]
    (high,) = [line for line in text.splitlines() if line.startswith("| high | 2 | **90")]
    # half width: t(0.975, 1) = 12.7062 times s / sqrt(2), which is half of the difference of two seeds
    assert low.startswith("| low | 2 | 10.1 ± 0.6 \\* |")
    assert high.startswith("| high | 2 | **90.1 ± 1.3** |")
    assert "2.00 (1 of 2)" in text
    one = dataclasses.replace(design, seeds=(0,))
    text = markdown(one, make_tables(one, [o for o in outcomes if o.seed == 0]), [])
    assert "| high | 1 | **90.0** |" in text and "neither intervals nor tests" in text


def test_names_from_outside_break_no_table_and_no_page(done: Design):
    design, outcomes = made_up(done, [EVIL, "[*] b"])
    tables = make_tables(design, outcomes)
    html = render(design, tables, outcomes, [EVIL])
    assert "<script" not in html
    assert Page(html).text.count("alert('x')") > 8
    for line in markdown(design, tables, [EVIL]).splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)
            assert len(cells) in (4 + 4, 6 + 4), line
    tex = latex(design, tables)
    assert balanced(tex)
    for row in tex.splitlines():
        if row.endswith(r"\\"):
            assert len(re.findall(r"(?<!\\)&", row)) in (5, 7), row
            assert not row.strip().startswith(("[", "*"))
    assert not re.search(r"(?<!\\)[#%_]", "\n".join(tex.splitlines()[2:]))


def balanced(tex: str) -> bool:
    """Whether braces, dollars and environments of LaTeX text close in the order in which they were opened."""
    code = re.sub(r"(?m)^%.*$", "", tex)
    code = re.sub(r"\\[\\{}$%&#_]", "", code)
    environments: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", code):
        if kind == "begin":
            environments.append(name)
        elif environments.pop() != name:
            return False
    depth = 0
    for letter in code:
        depth += (letter == "{") - (letter == "}")
        if depth < 0:
            return False
    return depth == 0 and not environments and code.count("$") % 2 == 0


def test_latex_prints_what_it_is_given():
    assert escape_latex("50 % of a_b & c") == r"50 \% of a\_b \& c"
    assert escape_latex("1.0 ± 0.5") == r"1.0 $\pm$ 0.5"
    assert not balanced(r"\begin{a}{\end{a}") and not balanced("a } b {")


def test_a_comparison_with_nothing_finished_is_a_page_too(config: Path, tmp_path: Path):
    empty = read_design(config, (), output=tmp_path / "empty")
    write_comparison(empty, [])
    page = Page((tmp_path / "empty" / "comparison.html").read_text())
    assert "0 of 4 runs finished" in page.text
    assert balanced((tmp_path / "empty" / "comparison.tex").read_text())


def test_a_run_reads_back_as_it_was(done: Design):
    run = done.runs[0]
    outcome = read_outcome(run.directory, strategy="s", setting="", seed=0)
    assert [round for round, _, _ in outcome.curve] == [0, 1, 2]
    sent = [total for _, _, total in outcome.curve]
    assert sent == sorted(sent)
    assert sent[-1] == outcome.figures["bytes_up"] + outcome.figures["bytes_down"]
    assert sorted(outcome.own) == sorted(outcome.personalised) == ["0", "1", "2", "3"]
    assert outcome.rounds == 2
