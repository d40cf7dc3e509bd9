"""Strategies named by their class: checked like built-in ones, kept through files and processes, or refused."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_federation import experiment, run

from hfedmoe_ray.config.load import dump_experiment, load_experiment
from hfedmoe_ray.config.plugins import plugin_source
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.runtime.jobs import fill_upload
from hfedmoe_ray.strategies import build_strategy
from hfedmoe_ray.types import ModelShape

SHAPE = ModelShape(layers=1, experts=4, top_k=2, hidden=4, expert_bytes=1, shared_bytes=1, frozen_bytes=1)
MODULE = '''
from hfedmoe_ray.config.section import NonNegativeFloat
from hfedmoe_ray.strategies import StrategyOptions
from hfedmoe_ray.strategies.controls import FedAvg


class Mine(FedAvg):
    """FedAvg of which the first experts stay as they are."""

    class Options(StrategyOptions):
        """How many."""

        kept: int = 1
        unused: NonNegativeFloat = 0.0

    def select(self, batch, plan, rng):
        return frozenset(key for key in plan.trainable if key.expert >= self.config.kept)

    def selective(self, plan):
        return True


class Plain(FedAvg):
    """Nothing to choose."""


class Wrong(FedAvg):
    """Its options are none."""

    Options = dict


class NoStrategy:
    """Something else."""
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package of the user's in the working directory, with one module that works and some that do not."""
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "mine.py").write_text(MODULE)
    (package / "broken.py").write_text("import os\n\nvalue = undefined_name\n")
    (package / "unfinished.py").write_text("def f(:\n")
    (package / "needy.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield "my_package.mine:Mine"
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def test_options_are_checked_kept_in_files_and_cross_processes(quickstart: Path, tmp_path: Path, plugin: str):
    made = load_experiment(quickstart, [f"strategy={plugin}", "strategy.kept=3"])
    assert (made.strategy.name, made.strategy.kept, made.strategy.unused) == (plugin, 3, 0.0)
    (tmp_path / "config.yaml").write_text(dump_experiment(made))
    assert load_experiment(tmp_path / "config.yaml") == made
    assert pickle.loads(pickle.dumps(made)) == made
    strategy = build_strategy(made.strategy, SHAPE, 0)
    assert type(strategy).__name__ == "Mine"
    assert strategy.config.kept == 3
    named = load_experiment(quickstart, ["strategy=my_package.mine:Plain"])
    assert named.strategy.model_dump() == {"name": "my_package.mine:Plain"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["strategy={}", "strategy.kpet=3"],
            "strategy.kpet is not a known key. Did you mean kept? Known here: name, kept",
        ),
        (["strategy={}", "strategy.kept=many"], "strategy.kept is 'many'; it must be a whole number"),
        (["strategy={}", "strategy.unused=-1"], "strategy.unused is -1; it must be at least 0"),
        (["strategy=nowhere.mine:Mine"], "there is no module nowhere. Write package.module:Class"),
        (["strategy=my_package.needy:Mine"], "there is no module a_library_that_is_not_there"),
        (["strategy=my_package.mine:Mien"], "has no class Mien (strategies in it: Mine, Plain, Wrong)"),
        (["strategy=my_package.mine:NoStrategy"], "is no strategy: derive the class"),
        (["strategy=my_package.mine:Wrong"], "Options is no section of options"),
        (["strategy=my_package.broken:Mine"], "NameError: name 'undefined_name' is not defined"),
        (["strategy=my_package.unfinished:Mine"], "raises SyntaxError"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused_in_one_paragraph(quickstart, plugin, overrides, said):
    with pytest.raises(ConfigError) as refused:
        load_experiment(quickstart, [one.format(plugin) for one in overrides])
    message = str(refused.value)
    assert said in message
    assert "\n" not in message
    assert message.startswith("command line: strategy")


def test_the_line_of_the_users_file_is_named(quickstart: Path, plugin: str):
    del plugin
    with pytest.raises(ConfigError, match=r"broken\.py:3"):
        load_experiment(quickstart, ["strategy=my_package.broken:Mine"])


def test_the_command_line_says_it_too(quickstart: Path, tmp_path: Path, plugin: str):
    del plugin
    command = [sys.executable, "-m", "hfedmoe_ray.cli", "validate", str(quickstart), "strategy=my_package.nope:Mine"]
    path = os.pathsep.join([str(quickstart.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 2
    assert "there is no module my_package.nope" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_trains(sources: Path, tmp_path: Path, plugin: str):
    made = experiment(sources, rounds=1, strategy={"name": plugin, "kept": 4}, evaluate={"own": "never"})
    _, summary, recorder = run(made, tmp_path / "run")
    assert summary["strategy"] == plugin
    selected = recorder.rounds[1].selected
    assert all(count == 0 for row in selected for count in row[:4])
    assert all(count > 0 for row in selected for count in row[4:])


def test_a_job_takes_a_strategy_of_the_working_directory_along(tmp_path: Path, plugin: str):
    for name in ("package", "module"):
        (tmp_path / name).mkdir()
    (tmp_path / "alone.py").write_text(MODULE)
    fill_upload(tmp_path / "package", "name: x\n", plugin_source(plugin))
    fill_upload(tmp_path / "module", "name: x\n", plugin_source("alone:Mine"))
    assert (tmp_path / "package" / "my_package" / "mine.py").read_text() == MODULE
    assert (tmp_path / "module" / "alone.py").read_text() == MODULE
    assert plugin_source("hfedmoe") is None
    assert plugin_source("numpy.core:Mine") is None
