"""Every family of transformers' Mixtures of Experts computes through our parts what transformers computes itself.

Logits of the tiny models have a standard deviation of about 0.1. Where two ways must agree, they do to a relative 1e-5
(logits) and 1e-4 (gradients): sums are taken in another order, nothing else.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_models import (
    DOCUMENTED,
    FAMILIES,
    LABELS,
    batch,
    known_to_the_package,
    model_section,
    plan,
    prepare,
    save_bert,
    save_family,
    task_weights,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForSequenceClassification,
    SwitchTransformersEncoderModel,
)

from hfedmoe_ray.context import PreparedModel
from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe import layout as layouts
from hfedmoe_ray.moe.layout import MoELayout, layout_of
from hfedmoe_ray.moe.prepare import initial_weights, save_full
from hfedmoe_ray.moe.shape import ENCODER_FAMILY, MOE_FAMILIES, read_shape
from hfedmoe_ray.moe.store import read_means
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.train.activations import checkpointed_layers
from hfedmoe_ray.types import ExpertKey, ExpertPlan, TaskWeights, Weights

pytestmark = pytest.mark.usefixtures("one_thread")
ALL_TRAIN = plan("TTTTTT", "TTTTTT")
PRESENT = ((0, 2, 3, 5), (1, 2, 4, 5))
"""Four experts a layer, two of each group where routing is limited to groups."""
CUT = plan("T.TT.T", ".FT.TT", absent="reroute")


@dataclass
class Case:
    """One family: its model as we hold it and as transformers does."""

    family: str
    source: Path
    prepared: PreparedModel
    whole: PreTrainedModel
    """transformers' own model of the source, with the head of the prepared one."""
    sparse: SparseModel
    weights: TaskWeights

    def bind(self, plan: ExpertPlan, trainable: str = "top") -> SparseModel:
        self.sparse.bind(plan, self.weights, trainable)
        self.sparse.module.zero_grad()
        self.sparse.module.eval()
        return self.sparse


@pytest.fixture(scope="module", params=[ENCODER_FAMILY, *FAMILIES, DOCUMENTED])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with known_to_the_package(request.param):
        yield make_case(request.param, tmp_path_factory.mktemp(request.param))


def make_case(family: str, root: Path) -> Case:
    if family == ENCODER_FAMILY:
        # The encoder's source is a dense model: its own export takes the source's place.
        upcycle = {"how": "copy", "experts": 6, "top_k": 2, "layers": [1, 3], "noise": 0.3}
        dense = prepare(save_bert(root / "bert"), root / "cache", upcycle=upcycle)
        source = root / "source"
        save_full(dense, initial_weights(dense, "top"), source)
    else:
        source = save_family(family, root / "source")
    prepared = prepare(source, root / "cache")
    whole = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=LABELS, dtype=torch.float32, ignore_mismatched_sizes=True
    ).eval()
    weights = task_weights(prepared)
    for name, array in weights.shared.items():
        if name.split(".")[0] in layout_of(whole).head_names:
            whole.get_parameter(name).data.copy_(torch.tensor(array))
    return Case(family, source, prepared, whole, SparseModel(prepared.path), weights)


def backward(model: PreTrainedModel | SparseModel) -> Tensor:
    """Logits of the batch, after a backward pass."""
    ids, mask = batch()
    if isinstance(model, SparseModel):
        logits = model.forward(ids, mask)
    else:
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits
    cross_entropy(logits, torch.arange(len(ids)) % LABELS).backward()
    return logits.detach()


def expert_gradients(layout: MoELayout, key: ExpertKey) -> dict[str, Tensor]:
    """Gradients of one expert of a whole model, zero where it has none."""
    experts = getattr(layout.blocks[key.layer], layout.experts_name)
    if layout.family == "switch_transformers":
        parameters = {name: experts[f"expert_{key.expert}"].get_parameter(f"{name}.weight") for name in ("wi", "wo")}
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    return {name: getattr(experts, name).grad[key.expert] for name in layout.expert_shapes}


def assert_same_gradients(sparse: SparseModel, whole: PreTrainedModel, rows: tuple[tuple[int, ...], ...]) -> None:
    """`rows[layer]` are the experts of ours that are experts 0, 1, ... of the whole model."""
    layout = layout_of(whole)
    for name, parameter in sparse.shared_parameters.items():
        expected = whole.get_parameter(name).grad
        layer = layout.router_layers.get(name)
        found = parameter.grad if layer is None or parameter.grad is None else parameter.grad[list(rows[layer])]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    for key, tensors in sparse.expert_parameters.items():
        theirs = expert_gradients(layout, ExpertKey(key.layer, rows[key.layer].index(key.expert)))
        for name, parameter in tensors.items():
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found, theirs[name], rtol=1e-4, atol=1e-7)


def cut(whole: PreTrainedModel, family: str) -> PreTrainedModel:
    """transformers' own model with fewer experts: rows of the router and experts copied, the rest the same."""
    config = copy.deepcopy(whole.config)
    setattr(config, "n_routed_experts" if family.startswith("deepseek") else "num_experts", len(PRESENT[0]))
    small = AutoModelForSequenceClassification.from_config(config).eval()
    large_layout, small_layout = layout_of(whole), layout_of(small)
    with torch.no_grad():
        for name, tensor in [*whole.named_parameters(), *whole.named_buffers()]:
            block = next((i for i, block in enumerate(large_layout.block_names) if name.startswith(block)), None)
            if large_layout.groups.get(name) != "expert":
                target = dict([*small.named_parameters(), *small.named_buffers()])[name]
                # Whatever has a row per expert: the router, and correction biases wherever they are.
                rowwise = block is not None and len(tensor) == large_layout.num_experts
                target.copy_(tensor[list(PRESENT[block])] if rowwise and block is not None else tensor)
        for layer, present in enumerate(PRESENT):
            for row, expert in enumerate(present):
                small_layout.write_expert(ExpertKey(layer, row), large_layout.read_expert(ExpertKey(layer, expert)))
    return small


def test_the_names_known_without_torch_are_the_layouts() -> None:
    assert tuple(layouts.FAMILIES) == MOE_FAMILIES
    assert {ENCODER_FAMILY, *FAMILIES} == set(MOE_FAMILIES)


@pytest.mark.parametrize("trainable", ["top", "full"])
def test_holding_every_expert_is_the_untouched_model(case: Case, trainable: str) -> None:
    """Logits, and the gradients of everything that trains: with `full`, tied embeddings and dense layers too."""
    case = replace(case, weights=task_weights(case.prepared, trainable))
    sparse = case.bind(ALL_TRAIN, trainable)
    torch.testing.assert_close(backward(sparse), backward(case.whole), rtol=1e-5, atol=1e-6)
    everyone = tuple(range(6))
    assert_same_gradients(sparse, case.whole, (everyone, everyone))
    assert any(p.grad is not None and p.grad.any() for p in sparse.expert_parameters[ExpertKey(1, 3)].values())


def test_rerouting_is_transformers_own_model_with_fewer_experts(case: Case) -> None:
    """Cutting router and experts of transformers' model: softmax, groups, normalisation and capacity over what is left.

    Frozen experts take part in the forward pass and have no gradient.
    """
    sparse, small = case.bind(CUT), cut(case.whole, case.family)
    logits = backward(sparse)
    torch.testing.assert_close(logits, backward(small), rtol=1e-5, atol=1e-6)
    assert_same_gradients(sparse, small, PRESENT)
    assert not torch.allclose(logits, backward(case.whole), rtol=1e-3)


def test_dropping_experts_is_transformers_model_with_experts_of_zeros(case: Case) -> None:
    silent = copy.deepcopy(case.whole)
    layout = layout_of(silent)
    for key in layout.expert_keys():
        if key.expert not in PRESENT[key.layer]:
            layout.write_expert(key, {name: torch.zeros(shape) for name, shape in layout.expert_shapes.items()})
    ids, mask = batch()
    expected = silent(input_ids=ids, attention_mask=mask).logits
    dropping = ExpertPlan(roles=CUT.roles, absent="drop")
    torch.testing.assert_close(case.bind(dropping).forward(ids, mask), expected, rtol=1e-5, atol=1e-6)


def test_the_mean_of_an_absent_expert_has_the_tokens_own_weight(case: Case) -> None:
    """Equal to experts that are there and return their mean whatever the token."""
    ids, mask = batch()
    absent_mean = ExpertPlan(roles=CUT.roles, absent="mean")
    found = case.bind(absent_mean).forward(ids, mask)
    sparse = case.bind(ALL_TRAIN)
    means = torch.from_numpy(read_means(case.prepared.path))
    compute = sparse.layout.expert_forward

    def constant(tokens: Tensor, own: dict[str, Tensor]) -> Tensor:
        key = next(key for key, mine in sparse.expert_parameters.items() if all(mine[n] is own[n] for n in mine))
        return compute(tokens, own) if key.expert in PRESENT[key.layer] else means[key].expand(len(tokens), -1)

    assert means.any(dim=-1).sum() > 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse.layout, "expert_forward", constant)
        torch.testing.assert_close(found, sparse.forward(ids, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("absent", ["mean", "drop", "reroute"])
def test_a_layer_may_be_empty(case: Case, absent: str) -> None:
    sparse = case.bind(plan("......", "T.....", absent=absent))  # type: ignore[arg-type]
    assert torch.isfinite(backward(sparse)).all()
    gradients = [p.grad for p in sparse.expert_parameters[ExpertKey(1, 0)].values()]
    assert all(g is None or torch.isfinite(g).all() for g in gradients)
    index = sparse.tape.index[1]
    if absent == "reroute":
        assert any(g is not None and g.any() for g in gradients)
        assert index is not None
        assert set(index.unique().tolist()) <= {0, 6}


def test_gate_values_are_a_distribution_over_all_experts(case: Case) -> None:
    """Softmax of transformers' own logits, except where routers use sigmoids: those, scaled."""
    ids, mask = batch()
    sparse, layout, logits = case.bind(CUT), layout_of(case.whole), []
    # The first layer's router reads the same in both models, whatever is absent.
    handle = layout.router(0).register_forward_hook(lambda *call: logits.append(layout.read_routing(call[2]).logits))
    case.whole(input_ids=ids, attention_mask=mask)
    handle.remove()
    sparse.forward(ids, mask)
    gates = torch.stack(sparse.tape.gate_values())
    torch.testing.assert_close(gates.sum(dim=-1), torch.ones(gates.shape[:2]))
    real = logits[0].flatten(end_dim=-2)[mask.bool().flatten()]
    scores = real.sigmoid() if case.family in ("deepseek_v3", DOCUMENTED) else real.softmax(-1)
    expected = scores / scores.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(gates[0], expected, rtol=1e-5, atol=1e-6)


def test_first_means_are_what_clients_measure(case: Case) -> None:
    """Built from the whole model over texts; measured from resident experts: the same function of the tokens."""
    from hfedmoe_ray.moe.build import mean_outputs
    from hfedmoe_ray.moe.routing import ProfileAccumulator

    ids, mask = batch()
    with torch.no_grad():
        expected = mean_outputs(layout_of(case.whole), iter([(ids, mask)]))
        sparse = case.bind(plan("FFFFFF", "FFFFFF"))
        sparse.forward(ids, mask)
    accumulator = ProfileAccumulator(sparse.shape, "max")
    accumulator.add(sparse.tape)
    measured = accumulator.means()
    assert {key for key in ALL_TRAIN.trainable if expected[key].any()} == set(measured)
    for key, (mean, _) in measured.items():
        np.testing.assert_allclose(mean, expected[key], rtol=1e-4, atol=1e-6)


def test_a_training_step_moves_what_trains_and_a_new_binding_forgets_it(case: Case) -> None:
    ids, mask = batch()
    fresh = case.bind(CUT, "top").forward(ids, mask).detach()
    base = {name: tensor.clone() for name, tensor in case.sparse._base.items()}
    sparse = case.bind(CUT, "top")
    sparse.module.train()
    optimizer = torch.optim.AdamW([p for p in sparse.module.parameters() if p.requires_grad], lr=0.05)
    with torch.random.fork_rng():
        backward(sparse)
    optimizer.step()
    routed = sparse.tape.counts()
    moved = {
        key
        for key in CUT.present
        if any((sparse.read_expert(key)[n] != array).any() for n, array in case.weights.experts[key].items())
    }
    assert moved == {key for key in CUT.trainable if routed[key]}
    assert moved
    assert all(torch.equal(case.sparse._base[name], tensor) for name, tensor in base.items())
    assert torch.equal(case.bind(CUT, "top").forward(ids, mask), fresh)


def test_layers_computed_twice_have_the_same_gradients(case: Case) -> None:
    """Activation checkpointing runs routers and experts again, with the same dropout."""
    sparse, found = case.bind(CUT), []
    sparse.module.train()
    for on in (False, True):
        sparse.module.zero_grad()
        with torch.random.fork_rng(), checkpointed_layers(sparse.module, on):
            torch.manual_seed(0)
            backward(sparse)
        found.append({name: p.grad for name, p in sparse.module.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-8)


def test_transformers_reads_what_is_saved(case: Case, tmp_path: Path) -> None:
    """Trained weights arrive: the same logits from the Auto class, and a backbone that lacks nothing."""
    trained = {key: {n: a + 0.1 for n, a in tensors.items()} for key, tensors in case.weights.experts.items()}
    shared = {name: array * 1.1 for name, array in case.weights.shared.items()}
    save_full(case.prepared, Weights(version=1, shared=shared, experts=trained), tmp_path)
    sparse = replace(case, weights=TaskWeights(shared=shared, experts=trained)).bind(ALL_TRAIN)
    ids, mask = batch()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = sparse.forward(ids, mask)
    torch.testing.assert_close(loaded(input_ids=ids, attention_mask=mask).logits, expected, rtol=1e-5, atol=1e-5)
    if case.family == ENCODER_FAMILY:
        return
    backbone = SwitchTransformersEncoderModel if case.family == "switch_transformers" else AutoModel
    _, report = backbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert {name.split(".")[0] for name in report["unexpected_keys"]} <= set(layout_of(loaded).head_names)


@pytest.mark.parametrize("trainable", ["experts", "top", "full"])
def test_shapes_count_the_real_model(case: Case, tmp_path: Path, trainable: str) -> None:
    """And what is kept of a first count is what a second one reads."""
    section = model_section(case.source, trainable=trainable)
    sizes = {
        name: p.numel() for name, p in case.whole.named_parameters() if case.sparse.layout.groups[name] != "expert"
    }
    measured = case.sparse.layout.shape(section.trainable, sizes)
    assert read_shape(section, LABELS, tmp_path) == measured == read_shape(section, LABELS, tmp_path)
    head = 4 * sum(n for name, n in sizes.items() if case.sparse.layout.groups[name] == "head")
    assert read_shape(section, 0, tmp_path).shared_bytes == measured.shared_bytes - head
    everything = 4 * sum(p.numel() for p in case.whole.parameters())
    assert measured.shared_bytes + measured.frozen_bytes + 12 * measured.expert_bytes == everything


def test_what_serves_every_expert_trains_with_the_norms(case: Case) -> None:
    """Shared experts, their gate, an output bias: group "top"; dense layers stay frozen with the embeddings."""
    groups = layout_of(case.whole).groups
    top = {name for name, group in groups.items() if group == "top"}
    if case.family in ("qwen2_moe", "deepseek_v2", "deepseek_v3"):
        assert any("shared_expert" in name for name in top)
    assert {group for name, group in groups.items() if "shared_expert" in name} <= {"top"}
    blocks = layout_of(case.whole).block_names
    dense = {n for n in groups if ".mlp." in n and not n.startswith(tuple(f"{b}." for b in blocks))}
    assert {groups[name] for name in dense} <= {"rest"}
    assert bool(dense) == (
        case.family in ("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "switch_transformers")
    )


def test_a_kept_shape_is_read_without_torch(tmp_path: Path) -> None:
    source = save_family("deepseek_v3", tmp_path / "source")
    shapes = [read_shape(model_section(source, lora=lora), 0, tmp_path / "cache") for lora in (None, {"rank": 2})]
    program = (
        "import sys; from pathlib import Path; from hfedmoe_ray.config.schema import Model; "
        "from hfedmoe_ray.moe.shape import read_shape; "
        "models = [Model(source=sys.argv[1], lora=lora) for lora in (None, {'rank': 2})]; "
        "print([read_shape(model, 0, Path(sys.argv[2])) for model in models]); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == [str(shapes), "False"]


def test_a_model_without_moe_layers_is_refused() -> None:
    config = Qwen3MoeConfig(**FAMILIES["qwen3_moe"] | {"mlp_only_layers": [0, 1, 2]})
    with pytest.raises(ModelError, match="no MoE layer"):
        layout_of(Qwen3MoeForSequenceClassification(config))


# ---------------------------------------------------------------------------------------- what one family alone has


def of_family(family: str, **changes: object) -> tuple[PreTrainedModel, MoELayout]:
    from transformers import AutoConfig

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(
            AutoConfig.for_model(family, **FAMILIES[family] | changes)
        )
    return model.eval(), layout_of(model)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("olmoe", {"norm_topk_prob": True}),
        ("qwen2_moe", {"norm_topk_prob": True, "mlp_only_layers": [3]}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("deepseek_v2", {"topk_method": "greedy"}),
        ("deepseek_v2", {"n_group": 3, "topk_group": 2}),
        ("deepseek_v3", {"norm_topk_prob": False, "n_group": 3, "topk_group": 1}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
        ("switch_transformers", {"router_bias": True, "expert_capacity": 2}),
    ],
)
def test_every_setting_of_a_router_is_followed(family: str, changes: dict[str, object]) -> None:
    """`choose` of the router's own logits is the router's own choice."""
    _, layout = of_family(family, **changes)
    states = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))
    routing = layout.read_routing(layout.router(0)(states))
    weights, index = layout.choose(0, routing.logits, layout.top_k)
    shares = [
        torch.zeros(21, 7).scatter(1, i, w.detach()) for w, i in ((weights, index), (routing.weights, routing.index))
    ]
    torch.testing.assert_close(shares[0][:, :6], shares[1][:, :6])
    assert all(layout.model.get_parameter(name).shape[0] == 6 for name in layout.router_layers)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_groups_count_what_is_present(family: str) -> None:
    """Against the definition, token by token: the best group by its present experts, and its present experts alone."""
    _, layout = of_family(family)
    router = layout.router(0)
    if family == "deepseek_v3":
        router.get_buffer("e_score_correction_bias").normal_(generator=torch.Generator().manual_seed(1))
    for present in ([0, 3, 4, 5], [0, 1, 3], [2], [3, 4]):
        logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
        masked = torch.full_like(logits, float("-inf"))
        masked[:, present] = logits[:, present]
        top_k = min(2, len(present))
        weights, index = layout.choose(0, masked, top_k)
        for token in range(len(logits)):
            if family == "deepseek_v2":
                scores = dict(zip(present, logits[token, present].softmax(0).tolist(), strict=True))
                ranks = scores
            else:
                scores = {e: float(logits[token, e].sigmoid()) for e in present}
                ranks = {e: scores[e] + float(router.get_buffer("e_score_correction_bias")[e]) for e in present}
            groups = [sorted((ranks[e] for e in present if e // 3 == group), reverse=True) for group in range(2)]
            taken = 1 if family == "deepseek_v2" else 2
            worth = [sum(group[:taken]) if group else float("-inf") for group in groups]
            inside = [e for e in present if e // 3 == int(worth[1] > worth[0])]
            chosen = sorted(inside, key=lambda e: -ranks[e])[:top_k]
            total = sum(scores[e] for e in chosen) if family == "deepseek_v3" else 1.0
            expected = {e: 1.5 * scores[e] / total for e in chosen}
            found = {int(e): float(w) for e, w in zip(index[token], weights[token], strict=True) if e < 6}
            assert found == pytest.approx(expected, rel=1e-5)
            assert not weights[token][index[token] == 6].any()


def test_beyond_capacity_a_token_goes_to_no_expert() -> None:
    """The first three tokens of each sequence sent to an expert are taken; those after them go to none."""
    _, layout = of_family("switch_transformers")
    states = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0))
    routing = layout.read_routing(layout.router(0)(states))
    favourite = routing.logits.argmax(dim=-1)  # [B, S]
    sent = routing.index.view(2, 30)
    for sequence in range(2):
        taken = [0] * 6
        for token in range(30):
            expert = int(favourite[sequence, token])
            taken[expert] += 1
            assert int(sent[sequence, token]) == (expert if taken[expert] <= 3 else 6)
    assert (sent == 6).any()
    weights, index = layout.choose(0, routing.logits, 1)
    assert torch.equal(index, routing.index)
    torch.testing.assert_close(weights, routing.weights)
    again = layout.read_routing(layout.write_routing(routing))
    assert torch.equal(again.index, routing.index)


def test_the_routers_correction_bias_is_no_parameter_but_is_kept(tmp_path: Path) -> None:
    prepared = prepare(save_family("deepseek_v3", tmp_path / "source"), tmp_path / "cache")
    save_full(prepared, initial_weights(prepared, "top"), tmp_path / "export")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    kept = loaded.get_buffer(name)
    assert kept.any()
    assert torch.equal(kept, SparseModel(prepared.path).module.get_buffer(name))
    assert name not in initial_weights(prepared, "full").shared


def pack(source: Path, packing: dict[str, object], tensors: dict[str, Tensor]) -> None:
    """Rewrites a saved model with quantised weights, as a publisher does."""
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": packing}))


def test_gpt_oss_is_read_as_it_is_published(tmp_path: Path) -> None:
    """Experts in MXFP4: two numbers of 4 bits a byte, 32 of them under a power of two."""
    source = save_family("gpt_oss", tmp_path / "source", hidden_size=32, intermediate_size=32)
    generator, tensors, expected = torch.Generator().manual_seed(0), {}, {}
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj"):
            tensors[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(122, 126, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        nibbles = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
        values = magnitudes[nibbles & 7] * (1 - 2 * (nibbles >> 3)) * torch.exp2(scales.float() - 127)[..., None]
        expected[name.rsplit(".", 1)[1], int(name.split(".")[2])] = values.flatten(-2).transpose(1, 2)
    pack(source, {"quant_method": "mxfp4"}, tensors)
    weights = initial_weights(prepare(source, tmp_path / "cache"), "top")
    for (name, layer), dense in expected.items():
        for expert in range(6):
            np.testing.assert_array_equal(weights.experts[ExpertKey(layer, expert)][name], dense[expert].numpy())


def test_deepseek_v3_is_read_as_it_is_published(tmp_path: Path) -> None:
    """Linear maps in 8-bit floating point with a scale for each block."""
    source = save_family("deepseek_v3", tmp_path / "source")
    tensors, expected = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        scale = tensor.abs().max() / 448.0
        tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
        expected[name] = tensors[name].float() * scale
    packing = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    pack(source, packing, tensors)
    prepared = prepare(source, tmp_path / "cache")
    weights = initial_weights(prepared, "full")
    found = weights.experts[ExpertKey(0, 3)]["down_proj"]
    np.testing.assert_allclose(found, expected["model.layers.1.mlp.experts.3.down_proj.weight"].numpy(), rtol=1e-2)
    shared = "model.layers.1.mlp.shared_experts.up_proj.weight"
    np.testing.assert_allclose(weights.shared[shared], expected[shared].numpy(), rtol=1e-2)
    save_full(prepared, weights, tmp_path / "export")
    assert "quantization_config" not in json.loads((tmp_path / "export" / "config.json").read_text())


def test_other_packings_are_refused(tmp_path: Path) -> None:
    source = save_family("olmoe", tmp_path / "source")
    tensors = {name: tensor.to(torch.int8) for name, tensor in load_file(source / "model.safetensors").items()}
    pack(source, {"quant_method": "gptq", "bits": 8}, tensors)
    with pytest.raises(ModelError, match=r"quantised \(I8\)"):
        prepare(source, tmp_path / "cache")
