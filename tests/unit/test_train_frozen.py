"""A frozen tensor that training writes is noticed, whatever kind it is; what trains may move."""

from pathlib import Path

import pytest
import torch
from moe_models import batch, plan, prepare, save_mixtral, task_weights

from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.train.frozen import check_unwritten, frozen_versions


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
