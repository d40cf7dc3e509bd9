"""What editors know of a configuration: the committed schema is the code's, and accepts what the code accepts."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hfedmoe_ray.config.json_schema import configuration_schema, schema_comment, schema_text
from hfedmoe_ray.config.load import dump_experiment, load_experiment, parse_value

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
EXPERIMENTS = [file for file in FILES if schema_comment("schema.json") in file.read_text().splitlines()]
TIER = {"name": "a", "share": 1, "experts": 0.5}
WHOLE: dict[str, Any] = {
    "name": "x",
    "clients": {"tiers": [TIER]},
    "model": {"source": "m"},
    "data": {"source": "d.csv"},
}
VALIDATOR = jsonschema.Draft202012Validator(configuration_schema())


def test_the_committed_schema_is_the_one_of_the_code():
    jsonschema.Draft202012Validator.check_schema(configuration_schema())
    committed = (CONFIGS / "schema.json").read_text()
    assert committed == schema_text(), "run: hfedmoe schema > configs/schema.json"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_configuration_says_what_it_is_for_and_names_its_schema(file: Path):
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(lines[0]) > 30
    assert "yaml-language-server" not in lines[0]
    # A sweep has W&B's shape, not ours.
    assert file in EXPERIMENTS or {"method", "parameters"} <= set(parse_value(file.read_text(), file.name))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.name)
def test_every_experiment_is_valid_as_written_and_as_resolved(file: Path):
    VALIDATOR.validate(parse_value(file.read_text(), file.name))
    VALIDATOR.validate(parse_value(dump_experiment(load_experiment(file)), file.name))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"strategy": "random", "rules": "fedmoe"},
        {"strategy": {"name": "hfedmoe", "beta": 0.2}},
        {"strategy": {"lam": 0.5}},
        {"strategy": "my_module:Mine"},
        {"strategy": {"name": "my_module:Mine", "anything": [1]}},
        {"runtime": {"slots": "auto"}, "asynchronous": None},
        {"compare": {"strategies": ["hfedmoe[beta=0]"], "grid": {"alpha": [0.1, 1]}}},
    ],
)
def test_what_may_be_written_is_accepted(change: dict[str, Any]):
    VALIDATOR.validate(WHOLE | change)


@pytest.mark.parametrize(
    "change",
    [
        {"rouds": 3},
        {"rounds": 0},
        {"rounds": "three"},
        {"clients": {}},
        {"clients": {"tiers": [{"name": "a", "share": 2, "experts": 0.5}]}},
        {"strategy": "hfedmeo"},
        {"strategy": {"name": "fedavg", "lam": 0.5}},
        {"strategy": {"lmbda": 0.5}},
        {"data": {"source": "d.csv", "partition": {"how": "sorted"}}},
    ],
)
def test_mistakes_are_marked(change: dict[str, Any]):
    assert not VALIDATOR.is_valid(WHOLE | change)


def test_only_what_extends_another_file_may_leave_keys_out():
    partial = {"name": "x", "model": {"trainable": "top"}, "asynchronous": {"buffer": 3}}
    assert not VALIDATOR.is_valid(partial)
    VALIDATOR.validate(partial | {"extends": "other.yaml"})
    assert not VALIDATOR.is_valid({"extends": "other.yaml", "clients": {"tiers": [{"name": "a"}]}})


def test_every_key_that_is_explained_in_the_code_is_explained_to_the_editor():
    schema = json.loads(schema_text())
    assert schema["$defs"]["Tier"]["properties"]["experts"]["description"].startswith("Memory budget: share of all")
    assert schema["$defs"]["HFedMoE"]["properties"]["resident"]["description"].startswith("budget: a client holds")
    assert "\n" not in schema["$defs"]["Data"]["properties"]["source"]["description"]
