"""Runs from Python: the very run the command line makes, whatever interrupts it, and what it left as values."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_federation import experiment

from hfedmoe_ray import Experiment, HFedMoEError, Run, federate, resume
from hfedmoe_ray.cli import main
from hfedmoe_ray.config.load import dump_experiment
from hfedmoe_ray.errors import CheckpointError, ConfigError, TrainingError
from hfedmoe_ray.records import RoundReport


@pytest.fixture(scope="module")
def config(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("library")
    made = experiment(sources, output=str(root), tracking={"wandb": {"mode": "disabled"}})
    (root / "tiny.yaml").write_text(dump_experiment(made))
    return root / "tiny.yaml"


@pytest.fixture(scope="module")
def run(config: Path) -> Run:
    return federate(config, "name=python", progress=False)


STOPPED = "The run was stopped"


@contextmanager
def ctrl_c_in_round_one(_run_dir: Path, **_: Any) -> Iterator[Any]:
    """Instead of a bar: what a person does who has seen enough."""

    def render(name: str, fields: Any) -> None:
        if name == "round" and isinstance(fields, RoundReport) and fields.round == 1:
            signal.raise_signal(signal.SIGINT)

    yield render


def test_the_command_line_python_and_an_interrupted_run_give_the_same_bits(
    config: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    assert main(["run", str(config), "name=cli"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("hfedmoe_ray.library._renderer", ctrl_c_in_round_one)
        with pytest.raises(KeyboardInterrupt) as caught:
            federate(config, "name=interrupted")
    interrupted = config.parent / "interrupted"
    assert f"resume({str(interrupted)!r})" in caught.value.__notes__[0]
    assert Run(interrupted).summary["status"] == "stopped"
    assert STOPPED in (interrupted / "report.html").read_text()
    resumed = resume(interrupted, progress=False)
    assert STOPPED not in (interrupted / "report.html").read_text()
    hashes = {one.summary["model_sha256"] for one in (run, Run(config.parent / "cli"), resumed)}
    assert len(hashes) == 1
    assert "finished, 2 rounds" in repr(resumed)


def test_a_run_that_fails_has_a_report_that_says_why(config: Path, monkeypatch: pytest.MonkeyPatch):
    def render(name: str, _fields: Any) -> None:
        if name == "round":
            raise TrainingError("no more")

    monkeypatch.setattr("hfedmoe_ray.library._renderer", lambda *_args, **_kwargs: nullcontext(render))
    with pytest.raises(TrainingError, match="no more"):
        federate(config, "name=failed")
    assert "no more" in (config.parent / "failed" / "report.html").read_text()


def test_a_run_is_told_as_tables(run: Run):
    lines = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    history = run.history
    assert list(history.index) == [0, 1, 2]
    assert history["accuracy"].tolist() == [line["accuracy"] for line in lines]
    assert history["bytes_up"].tolist() == [line["bytes_up"] for line in lines]
    assert history.loc[1:, "experts_trained"].gt(0).all()
    assert history.filter(like="seconds_").notna().any().all()
    clients = run.clients
    assert clients.groupby("round")["bytes_up"].sum().to_dict() == history["bytes_up"].to_dict()
    assert set(clients["tier"]) == {"phone", "server"}
    assert run.experiment.name == "python"


def test_the_model_is_the_one_that_was_evaluated(run: Run, sources: Path):
    model, tokenizer = run.model(), run.tokenizer()
    assert list(model.config.id2label.values()) == ["class 0", "class 1", "class 2"]
    rows = [json.loads(line) for line in (sources / "texts.jsonl").read_text().splitlines()]
    from hfedmoe_ray.data.sources import load_raw

    raw = load_raw(run.experiment.data)
    assert len(rows) > len(raw.test_texts)
    ids = tokenizer(list(raw.test_texts), return_tensors="pt", padding=True, truncation=True, max_length=12)
    with torch.no_grad():
        found = model(**ids).logits.argmax(-1).numpy()
    assert (found == raw.test_labels).mean() == pytest.approx(run.summary["accuracy"])
    assert not list(run.run_dir.glob(".model-*"))


def test_a_report_is_a_path_that_a_notebook_shows(run: Run):
    page = run.report()
    text = Path(page).read_text()
    assert text.startswith("<!doctype html>")
    shown = page._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert "<!doctype" not in shown, "not escaped: it would end the attribute"


def test_experiments_are_made_of_files_mappings_keywords_and_each_other(config: Path):
    from_file = Experiment.load(config, "rounds=5")
    assert from_file.rounds == 5
    sections = {key: value for key, value in from_file.model_dump(mode="json").items() if key != "rounds"}
    assert Experiment.load(**sections, rounds=5) == from_file
    assert Experiment.load(sections | {"rounds": 1}, "rounds=5") == from_file
    assert Experiment.load(from_file, rounds=4, local={"steps": 7}).local == from_file.local.model_copy(
        update={"steps": 7}
    )
    assert Experiment.load(extends=str(config), rounds=5) == from_file
    assert sections == {key: value for key, value in from_file.model_dump(mode="json").items() if key != "rounds"}


def test_mistakes_are_exceptions_that_say_what_to_write(config: Path, run: Run, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"clients\.cuont is not a known key\. Did you mean count"):
        Experiment.load(Experiment.load(config), clients={"cuont": 3})
    with pytest.raises(ConfigError, match="configuration: model is required"):
        Experiment.load(
            name="x", data={"source": "a.csv"}, clients={"tiers": [{"name": "a", "share": 1, "experts": 1}]}
        )
    with pytest.raises(HFedMoEError, match=r"already holds a run.*overwrite=True"):
        federate(config, "name=python")
    assert run.summary
    with pytest.raises(CheckpointError, match="is not the directory of a run"):
        Run(tmp_path / "none")
    with pytest.raises(CheckpointError, match="is not the directory of a run"):
        resume(tmp_path)
