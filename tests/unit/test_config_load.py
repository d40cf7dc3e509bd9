"""A configuration is read exactly, or refused with its place and a remedy."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hfedmoe_ray.config.load import dump_experiment, load_experiment
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import ConfigError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def write(tmp_path: Path):
    def to_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return to_file


def test_every_shipped_configuration_loads():
    # A sweep of W&B is no experiment; what it runs is tested with W&B.
    configs = sorted(path for path in QUICKSTART.parent.glob("*.yaml") if path.name != "sweep.yaml")
    assert QUICKSTART in configs
    for path in configs:
        assert load_experiment(path).name


def test_dump_reads_back_equal(tmp_path: Path):
    experiment = load_experiment(QUICKSTART, ["strategy.tau=0.3", "local.learning_rate=1e-7", "local.cache=off"])
    (tmp_path / "config.yaml").write_text(dump_experiment(experiment))
    assert load_experiment(tmp_path / "config.yaml") == experiment


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.one_of(st.sampled_from(["1e-4", "off", "007", "1:30", "~", "2024-01-01", ".5", "<<", "="]), st.text()))
)
def test_text_stays_text_through_dump_and_load(tmp_path_factory: pytest.TempPathFactory, labels: list[str]):
    values = yaml.safe_load(QUICKSTART.read_text())
    values["data"]["labels"] = labels
    experiment = Experiment.model_validate(values)
    path = tmp_path_factory.mktemp("labels") / "config.yaml"
    path.write_text(dump_experiment(experiment), encoding="utf-8")
    assert load_experiment(path) == experiment


def test_scalars_follow_yaml_1_2(write):
    path = write(
        "a.yaml", f"extends: {QUICKSTART}\nlocal: {{learning_rate: 1e-4, cache: off}}\ndata: {{label: 1:30}}\n"
    )
    experiment = load_experiment(path)
    assert (experiment.local.learning_rate, experiment.local.cache, experiment.data.label) == (1e-4, "off", "1:30")


def test_overrides_reach_nested_keys_and_list_items():
    overrides = ["local.steps=3", "clients.tiers.1.experts=0.3", "model.upcycle.layers=[1, 2]", "clients.per_round=4"]
    experiment = load_experiment(QUICKSTART, overrides)
    assert experiment.local.steps == 3
    assert [tier.experts for tier in experiment.clients.tiers] == [0.125, 0.3, 0.5]
    assert experiment.model.upcycle is not None
    assert experiment.model.upcycle.layers == (1, 2)
    assert experiment.clients.cohort == 4


def test_a_later_override_wins():
    assert load_experiment(QUICKSTART, ["rounds=2", "rounds=3"]).rounds == 3


@pytest.mark.parametrize("written", ["hfedmoe", "{name: hfedmoe, tau: 3.0}"])
@pytest.mark.parametrize("order", [1, -1])
def test_switching_the_strategy_drops_the_options_of_the_old_one(write, written: str, order: int):
    path = write("a.yaml", f"extends: {QUICKSTART}\nstrategy: {written}\n")
    switched = load_experiment(path, ["strategy=random", "strategy.scope=per_layer"][::order])
    assert switched.strategy.model_dump() == {
        "name": "random",
        "resident": "budget",
        "unselected": "mean",
        "scope": "per_layer",
    }
    assert load_experiment(path, ["strategy.name=fedavg"]).strategy.model_dump() == {"name": "fedavg"}


def test_naming_the_same_strategy_keeps_its_options(write):
    path = write("a.yaml", f"extends: {QUICKSTART}\nstrategy: {{name: hfedmoe, tau: 3.0}}\n")
    assert load_experiment(path, ["strategy=hfedmoe"]).strategy.model_dump()["tau"] == 3.0
    assert load_experiment(path, ["strategy.beta=0"]).strategy.model_dump()["tau"] == 3.0


def test_extends_merges_sections_and_replaces_lists(write, tmp_path: Path):
    (tmp_path / "below").mkdir()
    write("below/base.yaml", QUICKSTART.read_text() + "evaluate: {every: 2, batch_size: 8}\n")
    write("below/middle.yaml", "extends: base.yaml\nevaluate: {every: 3}\nstrategy: {name: hfedmoe, tau: 2.0}\n")
    tiers = "[{name: one, share: 1, experts: 0.5}]"
    top = write("top.yaml", f"extends: below/middle.yaml\nname: top\nstrategy: random\nclients: {{tiers: {tiers}}}\n")
    experiment = load_experiment(top)
    assert (experiment.name, experiment.strategy.name, experiment.clients.count) == ("top", "random", 10)
    assert (experiment.evaluate.every, experiment.evaluate.batch_size) == (3, 8)
    assert [tier.name for tier in experiment.clients.tiers] == ["one"]


def test_extends_in_a_circle_is_refused(write):
    write("b.yaml", "extends: a.yaml\n")
    message = refusal(write("a.yaml", "extends: b.yaml\n"))
    assert "extends itself" in message
    assert message.index("a.yaml") < message.index("b.yaml")


@pytest.mark.parametrize(
    ("override", "phrases"),
    [
        ("local.step=4", ["local.step is not a known key", "Did you mean steps?"]),
        ("per_round=3", ["per_round is not a known key", "Did you mean clients.per_round?"]),
        ("strategy=rndom", ["is 'rndom'", "it must be one of hfedmoe,", "Did you mean random?"]),
        ("backend=rai", ["one of ray, local", "Did you mean ray?"]),
        ("rounds=-3", ["rounds is -3", "greater than 0"]),
        ("runtime.slots=many", ["runtime.slots is 'many'", "a whole number or auto"]),
        ("name=7", ["name is 7", "quotes"]),
        ("clients={}", ["clients.tiers is required"]),
        ("local=3", ["local is 3", "a section"]),
    ],
)
def test_a_bad_override_is_explained(override: str, phrases: list[str]):
    message = refusal(QUICKSTART, override)
    assert message.startswith("command line: ")
    for phrase in phrases:
        assert phrase in message


@pytest.mark.parametrize("override", ["rounds", "=3", "rounds=[1", "clients.tiers.9.share=1", "data.source.x=3"])
def test_an_override_that_cannot_be_applied_is_named(override: str):
    assert override.partition("=")[0] in refusal(QUICKSTART, override)


def test_an_option_of_another_strategy_is_unknown():
    message = refusal(QUICKSTART, "strategy.tau=2", "strategy=random")
    assert "strategy.tau is not a known key" in message
    assert "name, resident, unselected, scope" in message


def test_a_mistake_is_reported_with_the_file_and_line_it_stands_in(write):
    base = write("base.yaml", QUICKSTART.read_text() + "evaluate:\n  evry: 2\n")
    line = len(base.read_text().splitlines())
    message = refusal(write("top.yaml", "extends: base.yaml\nname: top\n"))
    assert message.startswith(f"{base}:{line}: evaluate.evry is not a known key")


def test_further_problems_are_listed_briefly():
    message = refusal(QUICKSTART, "rounds=0", "backend=x", "actors=y", "local.steps=0", "local.batch_size=0", "seed=-1")
    assert message.count("command line: ") == 4
    assert message.endswith("and 2 more.")


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("a: 1\nb: 2\na: 3\n", [":3: a is already set in line 1"]),
        ("local:\n  steps: 1\n  steps: 2\n", [":3: local.steps is already set in line 2"]),
        ("name: [1\n", [":2, column 1", "not valid YAML"]),
        ("name: !!python/name:os.system x\n", [":1, column 7", "not valid YAML"]),
        ("", ["holds no keys"]),
        ("- 1\n", ["holds no keys"]),
        ("1: 2\n", [":1: the key 1 is not a word"]),
        ("extends: [a]\n", [":1: `extends`"]),
        ("extends: nowhere.yaml\n", ["no configuration file", "nowhere.yaml"]),
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused(write, text: str, phrases: list[str]):
    message = refusal(write("bad.yaml", text))
    for phrase in phrases:
        assert phrase in message


def test_a_missing_file_is_refused_with_the_nearest_name():
    assert "Did you mean" in refusal(QUICKSTART.with_name("quikstart.yaml"))
