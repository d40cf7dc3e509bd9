"""A frozen tensor that training writes is noticed, whatever kind it is; what trains may move."""

from pathlib import Path

import pytest
import torch
from moe_models import batch, plan, prepare, save_mixtral, task_weights

from hfedmoe_ray.config.lora import Lora
from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.moe.adapters import AdaptedExperts
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.train.frozen import check_unwritten, frozen_versions
from hfedmoe_ray.types import ExpertKey


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SparseModel:
    directory = tmp_path_factory.mktemp("frozen")
    prepared = prepare(save_mixtral(directory / "mixtral"), directory / "cache")
    model = SparseModel(prepared.path, "cpu")
    model.bind(plan("TF....", "TFF..."), task_weights(prepared), "top")
    return model


def test_training_itself_writes_nothing_frozen(model: SparseModel):
    frozen = frozen_versions(model)
    model.forward(*batch()).sum().backward()
    for parameter in model.shared_parameters.values():
        parameter.data.add_(1.0)
    check_unwritten(frozen)
    assert {"0.1.down_proj", "1.2.gate_up_proj", "model.embed_tokens.weight"} <= frozen.keys()


@pytest.mark.parametrize("name", ["1.2.down_proj", "model.embed_tokens.weight"])
def test_a_write_is_named(model: SparseModel, name: str):
    frozen = frozen_versions(model)
    tensor = frozen[name][0]
    before = tensor.clone()
    with torch.no_grad():
        tensor.add_(1.0)
    with pytest.raises(TrainingError, match=f"frozen tensor {name} was written"):
        check_unwritten(frozen)
    tensor.data.copy_(before)


def test_a_released_model_holds_its_base_alone(tmp_path: Path):
    prepared = prepare(save_mixtral(tmp_path / "mixtral"), tmp_path / "cache")
    model = SparseModel(prepared.path, "cpu")
    empty = frozen_versions(model).keys()
    model.bind(plan("TF....", "TFF..."), task_weights(prepared), "top")
    model.release()
    assert frozen_versions(model).keys() == empty
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    # And can be bound again.
    model.bind(plan("T.....", "..F..."), task_weights(prepared), "top")
    assert model.forward(*batch()).isfinite().all()


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["base", "base and experts under factors"])
def test_a_write_to_what_is_read_from_a_file_reaches_no_other_process(tmp_path: Path, lora: Lora | None):
    """The files are mapped privately: a written page becomes the writer's own copy."""
    prepared = prepare(save_mixtral(tmp_path / "mixtral"), tmp_path / "cache")
    files = {file: file.read_bytes() for file in prepared.path.glob("*.safetensors")}
    model = SparseModel(prepared.path, "cpu", lora=lora)
    tensors = [parameter.data for parameter in model.module.parameters() if parameter.device.type == "cpu"]
    if lora:
        adapted = AdaptedExperts(prepared.path, lora, model.layout, torch.device("cpu"), {})
        factors = {name: torch.zeros(shape) for name, shape in adapted.factor_shapes.items()}
        tensors += [weight.base for weight in adapted.weights(ExpertKey(0, 0), factors).values()]
    assert len(tensors) > 10
    for tensor in tensors:
        tensor.add_(1.0)
    assert all(file.read_bytes() == content for file, content in files.items())
