"""Experts that are merged, or held in 8 bits: what a client computes with them, and what it fetches for them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from moe_models import batch, plan, prepare, save_bert, save_family, task_weights
from torch.nn.functional import cross_entropy

from hfedmoe_ray.federation.reporting import published_bytes
from hfedmoe_ray.moe.derived import merged_expert, quantised_expert
from hfedmoe_ray.moe.quantised import _int8
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.runtime import local
from hfedmoe_ray.types import ClientTask, ExpertKey, ExpertPlan, MergedExpert, Role, TaskWeights, Weights

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = plan("FFFFFF", "FFFFFF")
FAMILIES = ("bert", "mixtral", "gpt_oss", "switch_transformers", "deepseek_v3")


def merge_plan(*rows: str, groups: tuple[tuple[int, ...], ...]) -> ExpertPlan:
    """A plan whose absent experts are merged by `groups` (layer, members...), each with unequal shares."""
    merged = []
    for layer, *members in groups:
        weights = np.arange(1.0, len(members) + 1)
        shares = tuple(float(share) for share in weights / weights.sum())
        merged.append(MergedExpert(layer=layer, members=tuple(members), shares=shares))
    return replace(plan(*rows, absent="merge"), merged=tuple(merged))


MERGED = merge_plan("T..F..", "..TT..", groups=((0, 1, 4), (0, 2, 5), (1, 0, 1, 4), (1, 5)))


@pytest.fixture(scope="module", params=FAMILIES)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp(request.param)
    source = root / "source"
    source = save_bert(source) if request.param == "bert" else save_family(request.param, source)
    return prepare(source, root / "cache")


def weights_of(prepared, alike: tuple[tuple[int, ...], ...] = ()) -> Weights:
    """The published weights; experts named (layer, members...) are made copies of the first of them."""
    made = task_weights(prepared)
    experts = dict(made.experts)
    for layer, first, *others in alike:
        experts |= {ExpertKey(layer, other): experts[ExpertKey(layer, first)] for other in others}
    return Weights(version=0, shared=made.shared, experts=experts, means=made.means)


def task(plan: ExpertPlan, kind: str = "train") -> ClientTask:
    return ClientTask(kind=kind, round=1, client=0, seed=0, plan=plan, version=0)


def bound(prepared, weights: Weights, plan: ExpertPlan) -> SparseModel:
    model = SparseModel(prepared.path)
    model.bind(plan, local.task_weights(weights, task(plan)), "top")
    return model


def outcome(model: SparseModel) -> dict[str, torch.Tensor]:
    """Logits, and gradients of everything shared and of the trained experts."""
    ids, mask = batch()
    logits = model.forward(ids, mask)
    cross_entropy(logits, torch.arange(len(ids)) % logits.shape[1]).backward()
    gradients = {n: p.grad for n, p in model.shared_parameters.items() if p.grad is not None}
    for key, tensors in model.expert_parameters.items():
        gradients |= {f"{key}.{n}": p.grad for n, p in tensors.items() if p.grad is not None}
    return {"logits": logits.detach()} | gradients


def test_merging_identical_experts_changes_nothing(prepared):
    """Neither what the model says, nor a gradient: the gate's mass of the members is summed, not lost."""
    weights = weights_of(prepared, alike=((0, 1, 4), (0, 2, 5), (1, 0, 1, 4)))
    whole = plan("TFFFFF", "FFTTFF")
    exact = outcome(bound(prepared, weights, whole))
    found = outcome(bound(prepared, weights, MERGED))
    trained = {name for name in found if name in exact}
    assert len(trained) > 4
    for name in trained:
        torch.testing.assert_close(found[name], exact[name], rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_layer_computes_every_unit_with_the_sum_of_its_members_gate_weights(
    prepared, monkeypatch: pytest.MonkeyPatch
):
    """Against a loop over tokens and choices, which sums gate weights by cluster and multiplies once."""
    weights = weights_of(prepared)
    model = bound(prepared, weights, MERGED)
    layout = model.layout
    # Switch hands over its one choice as a mask; here every family is asked for three.
    monkeypatch.setattr(layout, "read_dispatch", lambda index, gates: (index, gates))
    generator = torch.Generator().manual_seed(0)
    for layer, residents in enumerate(model._residents):
        hidden = torch.randn(12, layout.hidden, generator=generator)
        index = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(12)])
        index[3] = torch.tensor([6, 0, 1])  # one choice beyond every capacity
        gates = torch.rand(12, 3, generator=generator)
        clusters = {e: one for one in MERGED.merged if one.layer == layer for e in one.members}
        expected = torch.zeros(12, layout.hidden)
        for token in range(12):
            mass: dict[object, float] = {}
            for expert, gate in zip(index[token].tolist(), gates[token].tolist(), strict=True):
                if expert < 6:
                    unit = clusters.get(expert, expert)
                    mass[unit] = mass.get(unit, 0.0) + gate
            for unit, gate in mass.items():
                merged = isinstance(unit, MergedExpert)
                arrays = merged_expert(unit, weights.experts) if merged else weights.experts[ExpertKey(layer, unit)]
                tensors = {name: torch.tensor(array) for name, array in arrays.items()}
                expected[token] += gate * layout.expert_forward(hidden[token : token + 1], tensors)[0]
        model.tape.begin(None)
        found = residents(hidden, index, gates)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_merged_expert_is_the_weighted_mean_of_every_tensor(prepared):
    experts = weights_of(prepared).experts
    one = MERGED.merged[2]
    for name, array in merged_expert(one, experts).items():
        expected = np.average([experts[key][name].astype(np.float64) for key in one.keys], axis=0, weights=one.shares)
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-9)
        assert array.dtype == np.float32


def test_eight_bits_are_those_of_the_prepared_models_and_nearly_exact(prepared):
    weights = weights_of(prepared)
    for arrays in weights.experts.values():
        made = quantised_expert(arrays, "int8")
        for name, array in arrays.items():
            if array.ndim == 2:
                values, scale = _int8(torch.tensor(array))
                np.testing.assert_array_equal(made[f"{name}.int8"], values.numpy())
                np.testing.assert_array_equal(made[f"{name}.scale"], scale.numpy())
    ids, mask = batch()
    exact = bound(prepared, weights, EXACT).forward(ids, mask)
    close = bound(prepared, weights, replace(EXACT, frozen_as="int8")).forward(ids, mask)
    assert not torch.equal(close, exact)
    assert float(((close - exact).norm() / exact.norm()).detach()) < 0.05


def test_four_bits_are_within_half_a_step_of_every_number(prepared):
    weights = weights_of(prepared)
    model = bound(prepared, weights, replace(EXACT, frozen_as="int4"))
    for key, arrays in weights.experts.items():
        for name, array in arrays.items():
            held = model._residents[key.layer]._weights[key.expert][name]
            if array.ndim == 1:
                np.testing.assert_array_equal(held, array)
            else:
                step = np.abs(array).max(axis=1, keepdims=True) / 7
                assert (np.abs(held.dense(torch.float32).numpy() - array) <= 0.5001 * step).all()
    ids, mask = batch()
    with torch.no_grad():
        exact = bound(prepared, weights, EXACT).forward(ids, mask)
        assert float((model.forward(ids, mask) - exact).norm() / exact.norm()) < 0.5


def test_a_client_fetches_merged_experts_and_no_member(prepared):
    weights = weights_of(prepared)
    sent = local.task_weights(weights, task(MERGED))
    assert set(sent.experts) == set(MERGED.present)
    assert len(sent.merged) == len(MERGED.merged)
    assert published_bytes(weights, task(MERGED)) == nbytes(sent)
    sizes = [nbytes(sent)]
    for bits in ("int8", "int4"):
        fewer = replace(MERGED, frozen_as=bits)
        sent = local.task_weights(weights, task(fewer))
        assert published_bytes(weights, task(fewer)) == nbytes(sent)
        sizes.append(nbytes(sent))
    assert sizes == sorted(set(sizes), reverse=True)
    assert sum(role is Role.FROZEN for row in MERGED.roles for role in row) == 1


def nbytes(sent: TaskWeights) -> int:
    mappings = [sent.shared, *sent.experts.values(), *sent.merged]
    return sum(array.nbytes for arrays in mappings for array in arrays.values())


def test_what_is_not_merged_into_anything_is_refused(prepared):
    short = replace(MERGED, merged=MERGED.merged[:-1])
    with pytest.raises(ValueError, match="not its absent experts"):
        bound(prepared, weights_of(prepared), short)


def test_plans_with_merged_experts_are_values():
    again = merge_plan("T..F..", "..TT..", groups=((0, 1, 4), (0, 2, 5), (1, 0, 1, 4), (1, 5)))
    assert again == MERGED
    assert hash(again) == hash(MERGED)
