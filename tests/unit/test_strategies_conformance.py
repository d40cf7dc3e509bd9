"""Every strategy of the package, and the documented one, through all of `hfedmoe_ray.conformance`; then trained.

A strategy that is added is in here by being registered.
"""

import re
from pathlib import Path

import pytest
from tiny_federation import experiment, final_weights, run

from hfedmoe_ray.conformance import CHECKS
from hfedmoe_ray.federation.state import model_sha256
from hfedmoe_ray.strategies import built_in

VARIANTS = [
    {"name": "hfedmoe", "resident": "all"},
    {"name": "hfedmoe", "scope": "per_layer", "unselected": "frozen"},
    {"name": "hfedmoe", "coverage": 0.5},
    {"name": "flex_moe", "fitness": "loss", "tolerance": None, "unselected": "mean"},
    {"name": "random", "resident": "all", "unselected": "reroute"},
]
MODELS: dict[str, str] = {}
"""Strategies that need another model than the tiny BERT, and its family."""


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory):
    """The strategy that docs/adding-a-strategy.md adds, as a module of its own."""
    text = (Path(__file__).parents[2] / "docs" / "adding-a-strategy.md").read_text(encoding="utf-8")
    module, *_ = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert module.count("\n") < 60
    root = tmp_path_factory.mktemp("plugins")
    (root / "least_trained.py").write_text(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        yield {"name": "least_trained:LeastTrained", "noise": 0.25}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("strategy", [*built_in(), *VARIANTS], ids=str)
def test_every_strategy_keeps_its_promises(strategy, check):
    check(strategy)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_so_does_the_documented_one(documented, check):
    check(documented)


@pytest.mark.parametrize("name", built_in())
def test_a_run_of_any_strategy_repeats_itself_through_a_killed_server(sources: Path, tmp_path: Path, name: str):
    made = experiment(sources, MODELS.get(name, "bert"), strategy=name, evaluate={"own": "never", "every": 2})
    straight, summary, _ = run(made, tmp_path / "straight")
    run(made, tmp_path / "cut", stop_after=1)
    resumed, again, _ = run(made, tmp_path / "cut", resume=True)
    assert again["model_sha256"] == summary["model_sha256"]
    assert summary["model_sha256"] == model_sha256(final_weights(straight), straight.model.sha256)
    assert again["accuracy"] == summary["accuracy"]
    assert resumed.model == straight.model
