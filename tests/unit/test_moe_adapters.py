"""Experts that train by low-rank factors over matrices every process of a node shares."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_models import FAMILIES, LABELS, TEXTS, batch, model_section, plan, prepare, save_bert, save_family
from safetensors import safe_open
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForSequenceClassification

from hfedmoe_ray.config.lora import Lora
from hfedmoe_ray.config.model import Model
from hfedmoe_ray.context import PreparedModel
from hfedmoe_ray.errors import ConfigError, ModelError, TrainingError
from hfedmoe_ray.moe import quantised
from hfedmoe_ray.moe.adapters import LowRank
from hfedmoe_ray.moe.factors import factor_shapes, matrices
from hfedmoe_ray.moe.prepare import initial_weights, prepare_model, save_full
from hfedmoe_ray.moe.quantised import Int8, quantise_experts
from hfedmoe_ray.moe.shape import read_shape
from hfedmoe_ray.moe.store import EXPERTS
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.train.frozen import check_unwritten, frozen_versions
from hfedmoe_ray.types import ExpertKey, ExpertPlan, TaskWeights, Weights

pytestmark = pytest.mark.usefixtures("one_thread")
ALL_TRAIN = plan("TTTTTT", "TTTTTT")
ALL_FROZEN = plan("FFFFFF", "FFFFFF")
PARTLY = plan("T.F.T.", ".TT.F.")
LORA = Lora(rank=4, alpha=6)
BOTH = Lora(rank=4, alpha=6, attention=True)
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
QUANTISED = ["int8", pytest.param("nf4", marks=pytest.mark.skipif(not HAS_BITSANDBYTES, reason="no bitsandbytes"))]


@pytest.fixture(scope="module", params=["encoder", *FAMILIES])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    return save_bert(root / "source") if request.param == "encoder" else save_family(request.param, root / "source")


@pytest.fixture(scope="module")
def prepared(source: Path) -> PreparedModel:
    return prepare(source, source.parent / "cache")


def trained(prepared: PreparedModel, lora: Lora, trainable: str = "top") -> Weights:
    """Weights as after some rounds: every factor moved."""
    rng = np.random.default_rng(5)

    def moved(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {n: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32) for n, a in arrays.items()}

    weights = initial_weights(prepared, trainable, lora, seed=0)
    return replace(
        weights,
        shared=moved(dict(weights.shared)),
        experts={key: moved(dict(arrays)) for key, arrays in weights.experts.items()},
    )


def task(weights: Weights) -> TaskWeights:
    for arrays in (weights.shared, *weights.experts.values()):
        for array in arrays.values():
            array.setflags(write=False)
    return TaskWeights(shared=weights.shared, experts=weights.experts, means=weights.means)


def bound(
    prepared: PreparedModel,
    lora: Lora | None,
    weights: Weights | None = None,
    plan: ExpertPlan = ALL_TRAIN,
    trainable: str = "top",
) -> SparseModel:
    model = SparseModel(prepared.path, lora=lora)
    model.bind(plan, task(weights or initial_weights(prepared, trainable, lora)), trainable)
    return model


def logits_of(model: SparseModel) -> torch.Tensor:
    return model.forward(*batch()).detach()


@pytest.mark.parametrize("lora", [LORA, BOTH])
def test_before_training_it_is_the_base_model_bit_for_bit(prepared: PreparedModel, lora: Lora) -> None:
    """The base model's experts are given as the same mapped memory: its alignment decides the last bits."""
    initial = initial_weights(prepared, "top")
    with safe_open(prepared.path / EXPERTS, framework="pt") as file:
        mapped = {
            key: {name: file.get_tensor(f"{key.layer}.{key.expert}.{name}").numpy() for name in arrays}
            for key, arrays in initial.experts.items()
        }
    base = SparseModel(prepared.path)
    base.bind(ALL_FROZEN, TaskWeights(shared=initial.shared, experts=mapped, means=initial.means), "top")
    assert torch.equal(logits_of(bound(prepared, lora)), logits_of(base))


def test_first_factors_follow_from_the_seed_alone(prepared: PreparedModel) -> None:
    def flat(seed: int) -> dict[str, np.ndarray]:
        weights = initial_weights(prepared, "top", BOTH, seed)
        return {**weights.shared, **{f"{k}{n}": a for k, t in weights.experts.items() for n, a in t.items()}}

    first, again, other = flat(1), flat(1), flat(2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    drawn = {name for name in first if "lora_A" in name}
    assert drawn == {name for name in first if not np.array_equal(first[name], other[name])}
    # Every expert and matrix has a draw of its own.
    assert len({first[name].tobytes() for name in drawn}) == len(drawn)


@pytest.mark.parametrize("lora", [LORA, BOTH])
def test_merged_model_computes_the_same(prepared: PreparedModel, lora: Lora, tmp_path: Path) -> None:
    """To 1e-5: W + scale B A is summed before the product with the tokens instead of after it."""
    weights = trained(prepared, lora)
    adapted = logits_of(bound(prepared, lora, weights))
    save_full(prepared, weights, tmp_path, lora)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids, mask = batch()
    torch.testing.assert_close(merged(input_ids=ids, attention_mask=mask).logits, adapted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(adapted, logits_of(bound(prepared, None)), atol=1e-2)
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_may_be_stored_either_way(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, w = torch.randn(7, 5, generator=generator), torch.randn(3, 5, generator=generator)
    a, b = torch.randn(2, 5, generator=generator), torch.randn(3, 2, generator=generator)
    expected = linear(tokens, w + 0.5 * b @ a)
    low = LowRank(w.T.contiguous() if transposed else w, a, b, 0.5, transposed)
    torch.testing.assert_close(low.project(tokens), expected)
    merged = low.merged()
    torch.testing.assert_close(linear(tokens, merged.T if transposed else merged), expected)
    shape = (5, 3) if transposed else (3, 5)
    assert factor_shapes({"w": shape, "bias": (3,)}, transposed, 2) == {"w.lora_A": (2, 5), "w.lora_B": (3, 2)}
    assert list(matrices({"w": shape, "bias": (3,)}, transposed)) == ["w"]


def test_gradients_are_those_of_the_merged_matrix(prepared: PreparedModel) -> None:
    """dL/dA = scale B^T dL/dW and dL/dB = scale dL/dW A^T, dL/dW taken from a model whose experts are dense."""
    weights = trained(prepared, LORA)
    low = bound(prepared, LORA, weights)
    adapted = low._residents[0]._adapted
    assert adapted is not None
    dense = {
        key: {n: t.numpy() for n, t in adapted.merged(key, {n: torch.tensor(a) for n, a in arrays.items()}).items()}
        for key, arrays in weights.experts.items()
    }
    full = bound(prepared, None, replace(weights, experts=dense))
    labels = torch.arange(6) % LABELS
    for model in (low, full):
        cross_entropy(model.forward(*batch()), labels).backward()
    compared = 0
    for key, factors in low.expert_parameters.items():
        for name, parameter in full.expert_parameters[key].items():
            if parameter.dim() == 1 or parameter.grad is None:
                continue
            a, b = factors[f"{name}.lora_A"], factors[f"{name}.lora_B"]
            assert a.grad is not None and b.grad is not None
            gradient = parameter.grad.T if full.layout.transposed else parameter.grad
            torch.testing.assert_close(a.grad, LORA.scale * b.T @ gradient, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(b.grad, LORA.scale * gradient @ a.T, rtol=1e-3, atol=1e-6)
            compared += 1
    assert compared >= 8


def test_roles_decide_what_is_private(prepared: PreparedModel) -> None:
    """TRAIN: own factors over the mapped base; FROZEN: both shared; ABSENT: neither."""
    weights = trained(prepared, LORA)
    model = bound(prepared, LORA, weights, PARTLY)
    mapped = [
        (int(low, 16), int(high, 16))
        for low, high in re.findall(rf"^(\w+)-(\w+) .*{EXPERTS}", Path("/proc/self/maps").read_text(), re.MULTILINE)
    ]
    for residents in model._residents:
        for expert, computed in residents._weights.items():
            key = ExpertKey(residents.layer, expert)
            for name, tensor in residents.tensors_of(expert).items():
                aliased = tensor.data_ptr() == weights.experts[key][name].ctypes.data
                assert aliased == (key not in PARTLY.trainable)
            for weight in computed.values():
                base = weight.base if isinstance(weight, LowRank) else weight
                assert not base.requires_grad
                assert any(low <= base.data_ptr() < high for low, high in mapped)
        assert set(residents._weights) == {key.expert for key in PARTLY.present if key.layer == residents.layer}
    assert {n for p in model.expert_parameters.values() for n in p} == set(weights.experts[ExpertKey(0, 0)])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts mapped pages as Linux does")
def test_absent_experts_are_not_even_read(tmp_path: Path) -> None:
    """Of a mapped file only the pages of present experts are in this process, and none of them is its own."""
    source = save_family("mixtral", tmp_path / "source", hidden_size=64, intermediate_size=512)
    prepared = prepare(source, tmp_path / "cache")

    def resident(kind: str) -> int:
        entry = Path("/proc/self/smaps").read_text().partition(str(prepared.path / EXPERTS))[2]
        return 1024 * int(re.search(rf"^{kind}: +(\d+) kB", entry, re.MULTILINE)[1])  # type: ignore[index]

    model = bound(prepared, LORA, plan=plan("T.....", "..F..."))
    model.module.train()
    cross_entropy(model.forward(*batch()), torch.arange(6) % LABELS).backward()
    two_of_twelve = 2 * model.shape.base_expert_bytes
    assert 0.5 * two_of_twelve < resident("Rss") < 2 * two_of_twelve  # the kernel maps a few pages around each it needs
    assert resident("Anonymous") == 0


@pytest.mark.parametrize("form", ["exact", *QUANTISED])
def test_what_is_frozen_is_watched(prepared: PreparedModel, form: str) -> None:
    """Every tensor but the parameters is among those whose in-place writes stop the run."""
    if form != "exact":
        quantise_experts(prepared.path, form)
    model = bound(prepared, Lora(rank=4, base=form), plan=PARTLY)
    frozen = dict(model.frozen_tensors())
    before = frozen_versions(model)
    check_unwritten(before)
    weight = next(weight for weight in model._residents[0]._weights[0].values() if isinstance(weight, LowRank))
    base = weight.base if form == "exact" else weight.base._values
    assert any(tensor is base for tensor in frozen.values())
    assert sum(".lora_" in name for name in frozen) == len(set(PARTLY.present) - set(PARTLY.trainable)) * sum(
        "lora_" in name for name in initial_weights(prepared, "top", LORA).experts[ExpertKey(0, 0)]
    )
    base.add_(0)
    with pytest.raises(TrainingError, match=r"0\.0"):
        check_unwritten(before)


def test_a_training_step_moves_factors_only(prepared: PreparedModel) -> None:
    model = bound(prepared, BOTH, plan=PARTLY)
    before = (prepared.path / EXPERTS).read_bytes()
    base = {name: tensor.clone() for name, tensor in model._base.items()}
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    assert len(parameters) == len(model.shared_parameters) + sum(map(len, model.expert_parameters.values()))
    cross_entropy(model.forward(*batch()), torch.arange(6) % LABELS).backward()
    torch.optim.AdamW(parameters, lr=0.1).step()
    assert all(torch.equal(tensor, model._base[name]) for name, tensor in base.items())
    assert (prepared.path / EXPERTS).read_bytes() == before
    fresh = initial_weights(prepared, "top", BOTH)
    routed = model.tape.counts()
    for key in PARTLY.trainable:
        same = all(np.array_equal(a, fresh.experts[key][n]) for n, a in model.read_expert(key).items())
        assert same == (routed[key] == 0)
    assert any("lora_B" in n and a.any() for n, a in model.read_shared().items())


def test_attention_trains_by_its_factors_alone(prepared: PreparedModel) -> None:
    names = {t: set(bound(prepared, BOTH, trainable=t).shared_parameters) for t in ("experts", "top")}
    plain = {t: set(bound(prepared, LORA, trainable=t).shared_parameters) for t in ("experts", "top")}
    factors = {name for name in names["experts"] if "lora_" in name}
    assert factors and names["experts"] == plain["experts"] | factors
    replaced = plain["top"] - names["top"]
    assert names["top"] == (plain["top"] - replaced) | factors
    assert replaced and all(
        re.search("attention|attn", name.lower()) and "norm" not in name.lower() for name in replaced
    )
    assert {name.rpartition(".")[0] for name in replaced} == {name.rpartition(".lora_")[0] for name in factors}
    with pytest.raises(ValueError, match="nothing to adapt"):
        Model(source="any", trainable="full", lora=BOTH)


@pytest.mark.parametrize("trainable", ["experts", "top"])
@pytest.mark.parametrize("attention", [False, True])
def test_shapes_are_known_from_the_configuration(source: Path, trainable: str, attention: bool) -> None:
    section = model_section(source, trainable=trainable, lora={"rank": 4, "attention": attention})
    prepared = prepare_model(section, LABELS, 0, TEXTS, source.parent / "cache")
    model = bound(prepared, section.lora, trainable=trainable)
    assert read_shape(section, LABELS) == prepared.shape == model.shape
    weights = initial_weights(prepared, trainable, section.lora)
    assert model.shape.shared_bytes == sum(array.nbytes for array in weights.shared.values())
    key = ExpertKey(1, 3)
    assert model.shape.expert_bytes == sum(array.nbytes for array in weights.experts[key].values())
    base = [w.base if isinstance(w, LowRank) else w for w in model._residents[1]._weights[3].values()]
    assert model.shape.base_expert_bytes == sum(tensor.nbytes for tensor in base) == model.shape.dense_expert_bytes
    everything = sum(4 * p.numel() for p in model.module.parameters()) - 12 * model.shape.expert_bytes
    assert model.shape.shared_bytes + model.shape.frozen_bytes - sum(
        a.nbytes for n, a in weights.shared.items() if "lora_" in n
    ) == everything - sum(a.nbytes for n, a in weights.shared.items() if "lora_" in n)


def test_a_rank_no_matrix_has_is_refused(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.rank is 99"):
        read_shape(model_section(source, lora={"rank": 99}))


def test_dense_weights_are_refused_where_factors_belong(prepared: PreparedModel) -> None:
    with pytest.raises(ValueError, match="lora_A"):
        bound(prepared, LORA, initial_weights(prepared, "top"))


@pytest.mark.parametrize("form", QUANTISED)
def test_quantised_matrices_are_smaller_and_close(source: Path, form: str) -> None:
    section = model_section(source, lora={"rank": 4, "base": form})
    prepared = prepare_model(section, LABELS, 0, TEXTS, source.parent / "cache")
    exact, low = bound(prepared, LORA, plan=PARTLY), bound(prepared, section.lora, plan=PARTLY)
    # Half the widest step: of 1/127 of a row's largest number, or of nf4's 0.304 of its block's.
    half_step = {"int8": 1 / 254, "nf4": 0.153}[form]
    for mine, theirs in zip(low._residents, exact._residents, strict=True):
        for expert, weights in mine._weights.items():
            for name, weight in weights.items():
                reference = theirs._weights[expert][name]
                if isinstance(weight, torch.Tensor):
                    assert torch.equal(weight, reference)
                    continue
                dense = weight.base.dense(torch.float32)
                error = (dense - reference.base).abs().flatten()
                groups = reference.base.abs().flatten().split(64 if form == "nf4" else reference.base.shape[1])
                largest = torch.cat([group.amax().expand(len(group)) for group in groups])
                assert (error <= half_step * largest * 1.001).all(), name
                assert error.max() > 0
    difference = (logits_of(low) - logits_of(exact)).norm() / logits_of(exact).norm()
    assert 0 < difference < {"int8": 0.03, "nf4": 0.4}[form]
    share = low.shape.base_expert_bytes / exact.shape.dense_expert_bytes
    assert share < {"int8": 0.5, "nf4": 0.2}[form]
    assert read_shape(section, LABELS) == low.shape == prepared.shape
    file = prepared.path / quantised.file_name(form)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == 12 * low.shape.base_expert_bytes


@pytest.mark.parametrize("form", QUANTISED)
def test_quantised_models_train_and_merge(source: Path, form: str, tmp_path: Path) -> None:
    lora = Lora(rank=4, base=form)
    prepared = prepare_model(model_section(source, lora=lora.model_dump()), LABELS, 0, TEXTS, source.parent / "cache")
    weights = trained(prepared, lora)
    model = bound(prepared, lora, weights)
    cross_entropy(model.forward(*batch()), torch.arange(6) % LABELS).backward()
    # In the first layer: a causal model reads only the last token of the last one.
    routed = [key for key in ALL_TRAIN.trainable if key.layer == 0 and model.tape.counts()[key]]
    assert all(p.grad is not None and p.grad.any() for key in routed for p in model.expert_parameters[key].values())
    save_full(prepared, weights, tmp_path, lora)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids, mask = batch()
    expected = merged(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)


def test_a_quantised_product_has_the_gradient_of_the_dense_one() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-127, 128, (3, 5), generator=generator, dtype=torch.int8)
    weight = Int8(values, torch.rand(3, 1, generator=generator), transposed=False)
    tokens = torch.randn(4, 5, generator=generator, requires_grad=True)
    gradients = []
    for output in (weight.project(tokens), linear(tokens, weight.dense(torch.float32))):
        gradients.append(torch.autograd.grad((output**2).sum(), tokens)[0])
        saved = output.grad_fn
    torch.testing.assert_close(*gradients)
    assert saved is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert weight.project(tokens).dtype == torch.bfloat16


def test_missing_quantised_experts_are_named(prepared: PreparedModel, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    for file in prepared.path.iterdir():
        if "int8" not in file.name:
            (clone / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="holds no int8 experts"):
        SparseModel(clone, lora=Lora(base="int8"))
    quantise_experts(clone, "int8")
    SparseModel(clone, lora=Lora(base="int8"))


def test_without_bitsandbytes_nf4_says_what_to_write(prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("No module named 'bitsandbytes'")

    monkeypatch.setattr(quantised, "_bitsandbytes", missing)
    with pytest.raises(ModelError, match="base: int8"):
        quantise_experts(prepared.path, "nf4")
