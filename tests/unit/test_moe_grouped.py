"""Experts computed together: what a GPU's clients do, here by torch's grouped product on a CPU."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_models import FAMILIES, LABELS, TEXTS, batch, model_section, plan, save_family
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from hfedmoe_ray.config.lora import Lora
from hfedmoe_ray.context import PreparedModel
from hfedmoe_ray.moe import adapters, grouped
from hfedmoe_ray.moe.prepare import initial_weights, prepare_model
from hfedmoe_ray.moe.shape import read_shape
from hfedmoe_ray.moe.sharing import read_frozen
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.types import TaskWeights

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="needs torch 2.10"),
]
SIZES = {"hidden_size": 16, "intermediate_size": 24}
FORMS = ["exact", "int8"] + ["nf4"] * (importlib.util.find_spec("bitsandbytes") is not None)
PARTLY = plan("T.F.T.", ".TT.F.")
ALL = plan("TFTFTT", "FTTTTF")


@pytest.fixture(scope="module", params=["mixtral", "deepseek_v2", "gpt_oss"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    inner = {"moe_intermediate_size": 24} if "moe_intermediate_size" in FAMILIES[request.param] else {}
    return save_family(request.param, tmp_path_factory.mktemp(request.param) / "source", **SIZES, **inner)


def prepared_as(source: Path, form: str) -> tuple[PreparedModel, Lora]:
    lora = Lora(rank=8, alpha=6, base=form)
    section = model_section(source, lora=lora.model_dump())
    return prepare_model(section, LABELS, 0, TEXTS, source.parent / "cache"), lora


def trained_by(
    prepared: PreparedModel, lora: Lora, roles: object, held: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[object, tuple[np.ndarray, int]]]:
    """Logits, gradients of every factor, and what was recorded of the experts' outputs."""
    frozen = read_frozen(prepared.path, lora, torch.device("cpu")) if held else None
    model = SparseModel(prepared.path, "cpu", lora=lora, frozen=frozen)
    weights = initial_weights(prepared, "experts", lora)
    rng = np.random.default_rng(3)
    for arrays in weights.experts.values():
        for name, array in arrays.items():
            arrays[name] = array + 0.1 * rng.standard_normal(array.shape).astype(np.float32)
    task = TaskWeights(shared=weights.shared, experts=weights.experts, means=weights.means)
    model.bind(roles, task, "experts")
    ids, mask = batch()
    logits = model.forward(ids, mask)
    cross_entropy(logits.float(), torch.arange(len(ids)) % LABELS).backward()
    gradients = {
        f"{key} {name}": parameter.grad
        for key, named in model.expert_parameters.items()
        for name, parameter in named.items()
        if parameter.grad is not None and parameter.grad.any()
    }
    outputs = {key: (total.numpy().copy(), count) for key, (total, count) in model.tape.outputs.items()}
    return logits.detach(), gradients, outputs


@pytest.mark.parametrize("held", [False, True], ids=["own", "held"])
@pytest.mark.parametrize("roles", [PARTLY, ALL], ids=["partly", "all"])
@pytest.mark.parametrize("form", FORMS)
def test_together_they_compute_what_each_computes_alone(
    source: Path, form: str, roles: object, held: bool, monkeypatch: pytest.MonkeyPatch
):
    prepared, lora = prepared_as(source, form)
    logits, gradients, outputs = trained_by(prepared, lora, roles, held)
    called = []
    forward = grouped.GroupedExperts.forward
    monkeypatch.setattr(
        grouped.GroupedExperts, "forward", lambda *all_, **named: called.append(1) or forward(*all_, **named)
    )
    monkeypatch.setattr(adapters, "groups_on", lambda _: True)
    together, again, seen = trained_by(prepared, lora, roles, held)
    assert called
    torch.testing.assert_close(together, logits, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == again.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert outputs.keys() == seen.keys()
    for key, (total, count) in outputs.items():
        assert seen[key][1] == count
        np.testing.assert_allclose(seen[key][0], total, rtol=1e-4, atol=1e-5)


def test_in_bf16_too_within_its_rounding(source: Path, monkeypatch: pytest.MonkeyPatch):
    prepared, lora = prepared_as(source, "exact")
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradients, _ = trained_by(prepared, lora, ALL, True)
        monkeypatch.setattr(adapters, "groups_on", lambda _: True)
        together, again, _ = trained_by(prepared, lora, ALL, True)
    assert float((together - logits).norm() / logits.norm()) < 0.02
    apart = [float((again[name] - one).norm() / one.norm()) for name, one in gradients.items()]
    assert float(np.median(apart)) < 0.05


def test_factors_of_other_sizes_are_computed_one_by_one(source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapters, "groups_on", lambda _: True)
    prepared, _ = prepared_as(source, "exact")
    model = SparseModel(prepared.path, "cpu", lora=Lora(rank=3))
    weights = initial_weights(prepared, "experts", Lora(rank=3))
    task = TaskWeights(shared=weights.shared, experts=weights.experts, means=weights.means)
    model.bind(PARTLY, task, "experts")
    assert all(one._grouped is None for one in model._residents)
    model.forward(*batch())


def test_a_model_published_in_bf16_is_kept_in_bf16_exactly(source: Path, tmp_path: Path):
    """Its frozen experts take half the bytes, and everything computed is what it is from fp32 files."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        directory = tmp_path / str(dtype)
        directory.mkdir()
        for file in source.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        path = directory / "model.safetensors"
        rounded = {name: one.bfloat16().to(dtype) for name, one in load_file(path).items()}
        save_file(rounded, path, {"format": "pt"})
        config = directory / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float32"', f'"dtype": "{str(dtype)[6:]}"'))
        prepared, lora = prepared_as(directory, "exact")
        section = model_section(directory, lora=lora.model_dump())
        assert read_shape(section, LABELS) == prepared.shape
        weights = initial_weights(prepared, "top")
        logits, _, _ = trained_by(prepared, lora, ALL, False)
        found.append((prepared.shape.base_expert_bytes, weights.shared, weights.experts, logits))
    (half, shared, experts, logits), (full, expected_shared, expected, expected_logits) = found
    biases = sum(4 * len(one) for one in expected[next(iter(expected))].values() if one.ndim == 1)
    assert half - biases == (full - biases) / 2
    for name, array in expected_shared.items():
        np.testing.assert_array_equal(shared[name], array)
    for key, arrays in expected.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(experts[key][name], array)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-6)
