"""Configurations of published language models: planned without a network, and what their headers say is so."""

import re
from pathlib import Path

import pytest

from hfedmoe_ray.cli import main
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.model import Model
from hfedmoe_ray.moe.layout import FAMILIES
from hfedmoe_ray.moe.shape import read_shape
from hfedmoe_ray.moe.sources import read_config, resolve
from hfedmoe_ray.validate import check_sources

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED = {
    "olmoe_1b_7b_lora": "olmoe",
    "deepseek_moe_16b_qlora": "deepseek_v2",
    "qwen3_moe_30b_a3b_qlora": "qwen3_moe",
    "mixtral_8x7b_qlora": "mixtral",
    "switch_base_64_agnews": "switch_transformers",
}


@pytest.mark.parametrize(("name", "family"), PUBLISHED.items())
def test_the_header_is_what_plan_says(name: str, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS / f"{name}.yaml"
    source = load_experiment(config).model.source
    assert read_config(resolve(source, None, config_only=True))["model_type"] == family
    assert family in FAMILIES
    machine = ["--gpus", "4", "--cpus", "32", "--memory-gib", "640"]
    # As it is told where neither the texts nor the weights are.
    assert main(["plan", str(config), *machine, "data.source=elsewhere.jsonl"]) == 0
    printed = [re.sub(r"^(client|\d+) +", "", line).rstrip() for line in capsys.readouterr().out.splitlines()]
    told = [line.removeprefix("#   ") for line in config.read_text().splitlines() if line.startswith("#   ")]
    assert len(told) == 6
    assert set(told) <= set(printed)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("olmoe_1b_7b_lora", 6.92),
        ("deepseek_moe_16b_qlora", 15.7),
        ("qwen3_moe_30b_a3b_qlora", 30.5),
        ("mixtral_8x7b_qlora", 46.7),
    ],
)
def test_a_model_of_these_sizes_has_as_many_parameters_as_was_published(name: str, billions: float) -> None:
    source = load_experiment(CONFIGS / f"{name}.yaml").model.source
    shape = read_shape(Model(source=source, task="causal"))
    parameters = (shape.total_experts * shape.expert_bytes + shape.shared_bytes + shape.frozen_bytes) / 4
    assert parameters / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize("name", [*PUBLISHED, "smollm2_upcycled"])
def test_the_data_has_the_columns_that_are_named(name: str, shared_data: Path) -> None:
    config = CONFIGS / f"{name}.yaml"
    source = load_experiment(config).data.source
    here = shared_data / Path(source).relative_to("../shared/data")
    data = next(iter(check_sources(load_experiment(config, [f"data.source={here}"]))))
    assert "training examples" in data
