"""What a comparison runs: names, variants, grids, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import CONFIG

from hfedmoe_ray.cli import main
from hfedmoe_ray.comparison import running
from hfedmoe_ray.comparison.design import Design, read_design, show_setting, split_items
from hfedmoe_ray.errors import ConfigError

VARIANTS = {
    "paper's": {"strategy": {"name": "hfedmoe", "resident": "all"}, "local": {"steps": 7}},
    "small": {"strategy": "random", "budget": 0.05, "data.partition.alpha": 2},
}


def write(directory: Path, **section: Any) -> Path:
    path = directory / "compared.yaml"
    path.write_text(yaml.safe_dump({"extends": str(CONFIG), "name": "compared", "compare": section}))
    return path


def designed(directory: Path, *overrides: str, **section: Any) -> Design:
    return read_design(write(directory, **section), overrides, output=directory / "out")


def test_every_strategy_has_every_setting_and_every_seed(tmp_path: Path):
    made = designed(tmp_path, strategies=["hfedmoe", "fedavg"], seeds=[3, 1], grid={"alpha": [0.1, 1], "rounds": [2]})
    assert len(made.runs) == 8
    assert [run.seed for run in made.runs] == [3] * 4 + [1] * 4, "whatever is done first can be compared"
    assert {(r.strategy, show_setting(r.setting), r.seed) for r in made.runs} == {
        (strategy, f"alpha = {alpha}, rounds = 2", seed)
        for strategy in ("hfedmoe", "fedavg")
        for alpha in ("0.1", "1")
        for seed in (3, 1)
    }
    for run in made.runs:
        assert run.experiment.strategy.name == run.strategy
        assert run.experiment.seed == run.seed
        assert run.experiment.rounds == 2
        assert run.experiment.data.partition.alpha == dict(run.setting)["alpha"]
        assert run.experiment.compare is None
        assert run.experiment.tracking.wandb.group == "compared"
        assert run.directory == tmp_path / "out" / "runs" / run.experiment.name
    assert len({run.directory for run in made.runs}) == 8


def test_a_budget_is_that_of_every_tier(tmp_path: Path):
    made = designed(tmp_path, strategies=["hfedmoe"], seeds=[0], grid={"budget": [0.5]})
    assert [tier.experts for tier in made.runs[0].experiment.clients.tiers] == [0.5, 0.5, 0.5]


def test_variants_and_options_make_strategies(tmp_path: Path):
    names = ["paper's", "small", "hfedmoe[beta=0,local.steps=3]", "small[alpha=5]", "paper's[lam=1]"]
    made = designed(tmp_path, "local.steps=9", strategies=names, variants=VARIANTS, seeds=[0])
    paper, small, options, alpha, both = (run.experiment for run in made.runs)
    assert (paper.strategy.name, paper.strategy.resident, paper.local.steps) == ("hfedmoe", "all", 7)
    assert (small.strategy.name, small.local.steps, small.data.partition.alpha) == ("random", 9, 2)
    assert {tier.experts for tier in small.clients.tiers} == {0.05}
    assert (options.strategy.beta, options.local.steps) == (0, 3)
    assert alpha.data.partition.alpha == 5
    assert (both.strategy.resident, both.strategy.lam) == ("all", 1)


def test_the_command_line_replaces_the_file(tmp_path: Path):
    path = write(tmp_path, strategies=["hfedmoe"], seeds=[0], grid={"alpha": [0.1]}, variants=VARIANTS)
    made = read_design(path, (), replaced={"strategies": ["small", "fedavg"], "seeds": [4, 5]})
    assert (made.strategies, made.seeds) == (("small", "fedavg"), (4, 5))
    assert [show_setting(setting) for setting in made.settings] == ["alpha = 0.1"]
    assert made.directory == Path("runs/compared")


@pytest.mark.parametrize("name", ["compare_20news", "compare_placements"])
def test_the_repositorys_own_comparisons_stand_in_their_files(name):
    made = read_design(CONFIG.parent / f"{name}.yaml", ())
    assert len(made.strategies) >= 8 and len(made.seeds) >= 3
    assert all(run.experiment.backend == "local" and run.experiment.evaluate.personalised for run in made.runs)


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"strategies": ["hfedmo"]}, "strategy is 'hfedmo'.*Did you mean hfedmoe"),
        ({"strategies": ["smal"], "variants": VARIANTS}, "Did you mean small\\? Variants of .* are paper's, small"),
        ({"strategies": ["hfedmoe[betta=1]"]}, r"strategies, hfedmoe\[betta=1\]: .*Did you mean beta"),
        ({"strategies": ["hfedmoe[beta]"]}, r"Write hfedmoe\[key=value\]"),
        ({"strategies": ["hfedmoe[beta=0"]}, "not a name with options in brackets"),
        ({"strategies": ["v"], "variants": {"v": {"local": {"stebs": 1}}}}, "variant v: local.stebs .*Did you mean"),
        ({"strategies": ["hfedmoe"], "grid": {"bugdet": [0.1]}}, "Did you mean budget"),
        ({"strategies": ["hfedmoe"], "grid": {"local.stepz": [1]}}, "grid: local.stepz is not a known key"),
        ({"strategies": ["hfedmoe"], "grid": {"seed": [1]}}, "seed is no setting"),
        ({"strategies": ["hfedmoe"], "grid": {"budget": [1.5]}}, "grid, budget: .* at most 1"),
        ({"strategies": ["hfedmoe"], "grid": {"alpha": []}}, "grid.alpha has no value"),
        ({"strategies": ["hfedmoe", "hfedmoe"]}, "names hfedmoe twice"),
        ({"strategies": ["hfedmoe"], "seeds": [1, 1]}, "names 1 twice"),
        ({"strategies": ["hfedmoe[beta=0]", "hfedmoe[beta=+0]", "hfedmoe[beta= 0]"]}, "Give one of them another name"),
        ({}, "does not say what to compare"),
        ({"strategy": ["hfedmoe"]}, "compare.strategy is not a known key"),
    ],
)
def test_mistakes_are_refused_in_one_paragraph(section: dict[str, Any], told: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=told) as refused:
        designed(tmp_path, **section)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seeds", "0,x"], "write whole numbers"),
        (["--grid", "alpha"], "Write key=value,value"),
        (["--strategies", "hfedmoe[beta=0"], "bracket that is not closed"),
    ],
)
def test_mistakes_on_the_command_line_are_refused(arguments: list[str], told: str, tmp_path: Path, capsys):
    assert main(["compare", str(write(tmp_path)), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_grid_takes_all_settings_that_follow_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Design] = []

    def stop(design: Design, **_: object) -> None:
        seen.append(design)
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "carry_out", stop)
    arguments = ["compare", str(write(tmp_path)), "local.steps=3", "--output", str(tmp_path / "out")]
    arguments += ["--grid", "budget=0.25,0.5", "alpha=0.1,1", "--strategies", "hfedmoe,hfedmoe[lam=0,beta=1]"]
    assert main(arguments) == 130
    assert [show_setting(one) for one in seen[0].settings] == [
        f"budget = {budget}, alpha = {alpha}" for budget in (0.25, 0.5) for alpha in (0.1, 1)
    ]
    assert seen[0].strategies == ("hfedmoe", "hfedmoe[lam=0,beta=1]")
    assert {run.experiment.local.steps for run in seen[0].runs} == {3}


def test_commas_inside_brackets_do_not_separate():
    assert split_items("a, b[x=1,y=[2,3]] ,c{k: 1, l: 2}") == ("a", "b[x=1,y=[2,3]]", "c{k: 1, l: 2}")


def test_a_long_name_stays_a_directory(tmp_path: Path):
    options = ",".join(f"local.steps={n}" for n in range(1, 30))
    made = designed(tmp_path, strategies=[f"hfedmoe[{options}]", f"hfedmoe[{options},lam=1]"], seeds=[0])
    names = [run.experiment.name for run in made.runs]
    assert max(map(len, names)) <= 120
    assert len(set(names)) == 2
