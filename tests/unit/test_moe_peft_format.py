"""An adapter written for peft computes in peft what it computes here, and comes back bit for bit."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_models import FAMILIES, batch, plan, prepare, save_bert, save_family
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from hfedmoe_ray.config.lora import Lora
from hfedmoe_ray.context import PreparedModel
from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.peft_format import BASE, TENSORS, load_peft, save_peft
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.moe.quantised import quantise_experts
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.types import TaskWeights, Weights


@pytest.fixture(scope="module", params=["encoder", *FAMILIES])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    root = tmp_path_factory.mktemp(request.param)
    source = save_bert(root / "source") if request.param == "encoder" else save_family(request.param, root / "source")
    return prepare(source, root / "cache")


def trained(prepared: PreparedModel, lora: Lora) -> Weights:
    """Weights as after some rounds: everything moved."""
    weights = initial_weights(prepared, "top", lora, seed=0)
    rng = np.random.default_rng(5)
    for arrays in (weights.shared, *weights.experts.values()):
        for array in arrays.values():
            np.add(array, 0.05 * rng.standard_normal(array.shape).astype(np.float32), out=array)
    return weights


def test_peft_computes_what_was_trained_and_gives_it_back(prepared: PreparedModel, tmp_path: Path) -> None:
    """Logits to 1e-5: peft adds the correction to the matrices, we add it to their outputs."""
    attention = "gpt_oss" not in str(prepared.path)  # one family without, to see that nothing of it is written
    lora = Lora(rank=2, alpha=3, attention=attention)
    weights = trained(prepared, lora)
    model = SparseModel(prepared.path, lora=lora)
    everything = TaskWeights(shared=weights.shared, experts=weights.experts, means=weights.means)
    model.bind(plan("TTTTTT", "TTTTTT"), everything, "top")
    ids, mask = batch()
    ours = model.forward(ids, mask).detach()

    save_peft(prepared, weights, lora, tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / BASE, dtype=torch.float32)
    without = base.eval()(input_ids=ids, attention_mask=mask).logits.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of keys it does not find
        theirs = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(theirs(input_ids=ids, attention_mask=mask).logits, ours, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(without, ours, atol=1e-3)

    back = load_peft(prepared, tmp_path)
    assert back.lora == Lora(rank=2, alpha=3, attention=attention)
    assert list(back.experts) == list(weights.experts)
    for key, factors in weights.experts.items():
        assert back.experts[key].keys() == factors.keys()
        assert all(np.array_equal(back.experts[key][name], array) for name, array in factors.items())
    expected = {name: array for name, array in weights.shared.items() if "lora_" in name}
    assert back.attention.keys() == expected.keys()
    assert bool(expected) == attention
    assert all(np.array_equal(back.attention[name], array) for name, array in expected.items())


def test_over_quantised_experts_the_base_is_what_they_stand_for(tmp_path: Path) -> None:
    prepared = prepare(save_family("mixtral", tmp_path / "source"), tmp_path / "cache")
    quantise_experts(prepared.path, "int8")
    lora = Lora(rank=2, base="int8")
    weights = trained(prepared, lora)
    model = SparseModel(prepared.path, lora=lora)
    model.bind(plan("TTTTTT", "TTTTTT"), TaskWeights(shared=weights.shared, experts=weights.experts), "top")
    save_peft(prepared, weights, lora, tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter" / BASE, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids, mask = batch()
    expected = model.forward(ids, mask).detach()
    torch.testing.assert_close(theirs(input_ids=ids, attention_mask=mask).logits, expected, rtol=1e-5, atol=1e-5)


def test_what_is_no_adapter_of_this_model_is_refused(tmp_path: Path) -> None:
    prepared = prepare(save_family("mixtral", tmp_path / "source"), tmp_path / "cache")
    with pytest.raises(ModelError, match="holds no peft adapter"):
        load_peft(prepared, tmp_path)
    adapter = tmp_path / "adapter"
    save_peft(prepared, trained(prepared, Lora(rank=2)), Lora(rank=2), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    with pytest.raises(ModelError, match="use_rslora"):
        load_peft(prepared, adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(ModelError, match="does not fit"):
        load_peft(prepared, adapter)
    (adapter / TENSORS).write_bytes(b"nothing")
    with pytest.raises(ModelError, match="can be read"):
        load_peft(prepared, adapter)
