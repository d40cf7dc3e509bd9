"""The first minutes: `init` writes what runs, `--help` shows how, and shells complete it."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from moe_models import save_mixtral

from hfedmoe_ray.cli import main
from hfedmoe_ray.cli.app import commands
from hfedmoe_ray.config.json_schema import configuration_schema
from hfedmoe_ray.config.load import load_experiment, parse_value

REPOSITORY = Path(__file__).parents[2]


def tickets(directory: Path) -> Path:
    rows = [f'"{word} broken again",{word}' for word in ("printer", "screen", "cable") for _ in range(40)]
    (directory / "tickets.csv").write_text("\n".join(["body,team", *rows]))
    return directory / "tickets.csv"


def test_init_writes_an_experiment_that_is_valid_and_never_overwrites_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "first"]) == 0
    file = Path("first/experiment.yaml")
    assert main(["validate", str(file)]) == 0
    assert load_experiment(file).name == "first"
    assert (tmp_path / "first" / "hfedmoe.schema.json").is_file()
    jsonschema.validate(parse_value(file.read_text(), "file"), configuration_schema())
    before = file.read_text()
    assert main(["init", "first"]) == 2
    assert "is not overwritten" in capsys.readouterr().err
    assert file.read_text() == before


def test_init_looks_at_the_data_and_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, model = tickets(tmp_path), save_mixtral(tmp_path / "my mixtral")
    options = ["--data", str(data), "--model", str(model), "--clients", "5", "--rounds", "3"]
    file = tmp_path / "new" / "trial.yaml"
    assert main(["init", str(file), *options]) == 2
    assert "body, team: say which one with --label" in capsys.readouterr().err
    assert not file.exists()
    assert main(["init", str(file), *options, "--label", "team"]) == 0
    assert main(["validate", str(file)]) == 0
    made = load_experiment(file)
    assert (made.name, made.data.text, made.data.label, made.clients.count, made.rounds) == (
        "trial",
        "body",
        "team",
        5,
        3,
    )
    assert made.model.upcycle is None, "it is a Mixture of Experts already"
    assert main(["init", str(tmp_path / "other.yaml"), "--data", str(tmp_path / "none.csv")]) == 3
    assert not (tmp_path / "other.yaml").exists()


def test_init_for_clients_that_read_their_own_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["init", str(tmp_path), "--data", "/silo/client-{client}.jsonl"]
    assert main(options) == 2
    assert "--labels" in capsys.readouterr().err
    assert main([*options, "--labels", "yes,no, a: b"]) == 0
    made = load_experiment(tmp_path / "experiment.yaml")
    assert made.data.partition.how == "files"
    assert made.data.labels == ("yes", "no", "a: b")


@pytest.mark.parametrize("name", list(commands.commands))
def test_every_help_has_examples_that_the_command_accepts(name: str):
    command = commands.commands[name]
    lines = (command.epilog or "").partition("Examples:\n")[2].replace("\\\n", " ").splitlines()
    uses = [
        words[words.index("hfedmoe") + 1 :]
        for line in lines
        if "hfedmoe" in (words := shlex.split(line, comments=True))
    ]
    assert uses
    for words in uses:
        assert words[0] == name
        options = words[1 : words.index(">")] if ">" in words else words[1:]
        command.make_context(name, options)  # raises click.UsageError for what does not exist


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]):
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == (REPOSITORY / "configs" / "schema.json").read_text()


# ------------------------------------------------------------------------------------------------- shell completion

COMPLETE = """
set -e
source <(hfedmoe completion bash)
compopt() { echo "option $2"; }
COMP_LINE=$1 COMP_POINT=${#1} COMP_WORDBREAKS=$' \\t\\n"\\x27><=;|&(:'
_hfedmoe_completion hfedmoe
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def in_bash(tmp_path_factory: pytest.TempPathFactory):
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    directory = tmp_path_factory.mktemp("bin")
    (directory / "hfedmoe").write_text(f'#!/bin/sh\nexec {sys.executable} -m hfedmoe_ray.cli "$@"\n')
    (directory / "hfedmoe").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{directory}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
    }

    def complete(line: str) -> list[str]:
        done = subprocess.run(
            ["bash", "--norc", "-c", COMPLETE, "bash", line],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()

    return complete


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("hfedmoe r", ["run", "resume", "report"]),
        ("hfedmoe run c", ["option default", ""]),
        ("hfedmoe run c.yaml local.cache_p", ["option nospace", "local.cache_precision="]),
        ("hfedmoe run c.yaml clients.tiers.0.exp", ["option nospace", "clients.tiers.0.experts="]),
        ("hfedmoe plan c.yaml strategy=fed", ["fedavg", "fedprox", "fedmoe"]),
    ],
)
def test_bash_completes(in_bash, line: str, offered: list[str]):
    assert in_bash(line) == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_clicks_script(shell: str, capsys: pytest.CaptureFixture[str]):
    assert main(["completion", shell]) == 0
    assert "_HFEDMOE_COMPLETE" in capsys.readouterr().out
