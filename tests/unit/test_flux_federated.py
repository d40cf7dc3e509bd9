"""Flux at work: stale profiles in 8 bits, forward-only estimates, merged experts instead of none, and whole runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_models import LABELS, batch, plan, prepare, save_bert, save_family, task_weights
from tiny_federation import Elsewhere, Recorder, experiment, final_weights, run
from torch.nn.functional import cross_entropy

from hfedmoe_ray.config import strategies as configs
from hfedmoe_ray.errors import CapacityError
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity
from hfedmoe_ray.federation.rounds import Federation
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.moe.routing import ProfileAccumulator
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.plan import check_memory, forecast
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.runtime import local
from hfedmoe_ray.strategies.flux import frequency
from hfedmoe_ray.strategies.merging import merge_absent, principal_components
from hfedmoe_ray.train.explore import squared_gradients
from hfedmoe_ray.types import ClientTask, ExpertKey, ExpertPlan, Role, Weights

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = plan("FFFFFF", "FFFFFF")
FLUX = {"name": "flux", "epsilon": 0.5, "epsilon_last": 0.5}


def bound(prepared, plan: ExpertPlan, model: SparseModel | None = None) -> SparseModel:
    made = task_weights(prepared)
    weights = Weights(version=0, shared=made.shared, experts=made.experts, means=made.means)
    task = ClientTask(kind="train", round=1, client=0, seed=0, plan=plan, version=0)
    model = model or SparseModel(prepared.path)
    model.bind(plan, local.task_weights(weights, task), "top")
    return model


@pytest.fixture(scope="module", params=["split", "copy", "mixtral"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "mixtral":
        return prepare(save_family("mixtral", root / "source"), root / "cache")
    sizes = {"experts": 6, "top_k": 2, "layers": [1, 3]}
    how = {"split": {"how": "split", "calibration_steps": 20}, "copy": {"how": "copy", "noise": 0.3}}[request.param]
    return prepare(save_bert(root / "source"), root / "cache", upcycle=sizes | how)


def test_merging_comes_closer_to_a_layers_output_than_dropping_in_every_layer(prepared):
    model = bound(prepared, EXACT)
    ids, mask = batch(24)
    inputs: dict[int, tuple[torch.Tensor, ...]] = {}
    hooks = [
        residents.register_forward_pre_hook(lambda module, args: inputs.update({module.layer: args}))
        for residents in model._residents
    ]
    with torch.no_grad():
        model.forward(ids, mask)
    for hook in hooks:
        hook.remove()
    seen = ProfileAccumulator(model.shape, "max")
    seen.add(model.tape)
    f = frequency(seen.profile())

    def outputs(plan: ExpertPlan) -> list[torch.Tensor]:
        bound(prepared, plan, model).tape.begin(mask)
        with torch.no_grad():
            return [residents(*inputs[residents.layer]) for residents in model._residents]

    absent = np.ones((2, 6), dtype=bool)
    np.put_along_axis(absent, f.argmax(axis=1)[:, None], values=False, axis=1)
    roles = tuple(tuple(Role.ABSENT if gone else Role.FROZEN for gone in row) for row in absent)
    experts = task_weights(prepared).experts
    points = [principal_components(experts, layer, 8) for layer in range(2)]
    exact = outputs(EXACT)
    dropped = outputs(ExpertPlan(roles=roles, absent="drop"))
    for total in (2, 4):
        merged = outputs(ExpertPlan(roles=roles, absent="merge", merged=merge_absent(absent, points, f, total)))
        for whole, one, other in zip(exact, merged, dropped, strict=True):
            assert (one - whole).norm() < (other - whole).norm()


@pytest.mark.parametrize(("bits", "least", "most"), [("int8", 0.99, 0.05), ("int4", 0.95, 0.2)])
def test_a_profile_in_few_bits_is_nearly_the_exact_one(prepared, bits: str, least: float, most: float):
    """Correlation and relative error of f; the paper reports an error of about 11 %."""
    ids, mask = batch(64)
    found = {}
    for form in ("exact", bits):
        model = bound(prepared, replace(EXACT, frozen_as=form))
        seen = ProfileAccumulator(model.shape, "max")
        with torch.no_grad():
            model.forward(ids, mask)
        seen.add(model.tape)
        found[form] = seen.profile()
    exact, close = (frequency(found[form]) for form in ("exact", bits))
    assert np.corrcoef(exact.ravel(), close.ravel())[0, 1] > least
    assert np.abs(exact - close).sum() / exact.sum() < most
    assert (found["exact"].usage != found[bits].usage).any(), "the second profile was not taken in few bits"


def test_forward_only_estimates_have_the_mean_of_the_true_squared_gradients_and_their_order(tmp_path: Path):
    """In 40 directions for each expert: (g z)^2 / |g|^2 has mean 1 and variance at most 2, so 5 standard errors."""
    mixtral = prepare(save_family("mixtral", tmp_path / "source"), tmp_path / "cache")
    ids, mask = batch(12)
    labels = torch.arange(len(ids)) % LABELS
    true = bound(mixtral, plan("TTTTTT", "TTTTTT"))
    cross_entropy(true.forward(ids, mask), labels).backward()
    squared = np.array(
        [sum(float(p.grad.double().square().sum()) for p in one.values()) for one in true.expert_parameters.values()]
    )
    model = bound(mixtral, EXACT)
    before = {name: tensor.clone() for name, tensor in model.frozen_tensors()}

    def loss() -> float:
        return float(cross_entropy(model.forward(ids, mask).double(), labels))

    def estimates(probes: int) -> np.ndarray:
        with torch.no_grad():
            return np.array(list(squared_gradients(model, loss, all_keys(), probes, 0).values()))

    many, few = estimates(40), estimates(configs.Flux().probes)
    used = squared > 0
    assert used.sum() > 8
    assert (many[~used] == 0).all(), "an expert without a token has no gradient"
    assert (many[used] / squared[used]).mean() == pytest.approx(1, abs=5 * np.sqrt(2 / (used.sum() * 40)))
    assert rank_correlation(many, squared) > 0.9
    assert rank_correlation(few, squared) > 0.6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.frozen_tensors())


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(np.argsort(np.argsort(one)), np.argsort(np.argsort(other)))[0, 1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, sources: Path):
    made = experiment(sources, strategy=FLUX, evaluate={"own": "final"})
    return made, *run(made, tmp_path_factory.mktemp("flux") / "run")


def test_a_run_moves_tuned_experts_only_and_measures_the_others(finished):
    _, context, summary, recorder = finished
    started = initial_weights(context.model, "experts")
    moved = changed(started, final_weights(context))
    trained = {
        ExpertKey(layer, expert)
        for report in recorder.rounds
        for layer, row in enumerate(report.selected)
        for expert, clients in enumerate(row)
        if clients
    }
    assert moved == trained
    assert 0 < len(moved) < 12
    state = load_checkpoint(context.run_dir / "checkpoints", run_identity(context)).strategy
    measured = sum(int((value > 0).sum()) for value in state.values())
    tuned = sum(record.trained for report in recorder.rounds[1:] for record in report.clients)
    assert len(state) == 4
    assert measured > tuned / 2
    assert any((value[tuple(zip(*sorted(set(all_keys()) - moved), strict=True))] > 0).any() for value in state.values())
    assert summary["own_accuracy"] is not None


def changed(one: Weights, other: Weights) -> set[ExpertKey]:
    return {
        key for key, tensors in one.experts.items() if any((tensors[n] != other.experts[key][n]).any() for n in tensors)
    }


def all_keys() -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for layer in range(2) for expert in range(6)]


def test_profiles_taken_while_the_server_reduces_are_those_taken_before(finished, tmp_path: Path):
    """The overlap changes no bit, and no byte counted."""
    made, _, summary, recorder = finished
    _, overlapped, again = run(made, tmp_path / "overlapped", where=Elsewhere)
    assert overlapped["model_sha256"] == summary["model_sha256"]
    assert overlapped["bytes_down"] == summary["bytes_down"]
    assert [r.accuracy for r in again.rounds] == [r.accuracy for r in recorder.rounds]


def test_the_profile_of_a_round_is_that_of_the_weights_the_round_before_started_from(sources: Path, tmp_path: Path):
    made = experiment(sources, strategy=FLUX, evaluate={"own": "never"})
    context = prepare_run(made, tmp_path / "run")
    executor = local.LocalExecutor(context)
    federation = Federation(context, executor, Recorder(), resume=False)
    executor.publish(federation.state.weights)
    federation.profile_round()
    start = federation.state.weights
    federation.train_round(1)
    stale = dict(federation.state.profiles)
    assert federation.state.weights.version != start.version
    # The same clients, the same weights, but profiled one by one when the round is long over.
    executor.publish(start)
    eight = replace(EXACT, frozen_as="int8")
    tasks = [
        ClientTask(kind="profile", round=2, client=client, seed=0, plan=eight, version=start.version)
        for client in range(4)
    ]
    results = list(executor.run(tasks, lambda *_: None))
    executor.close()
    for update in federation.collector.accepted(results, dict.fromkeys(range(4), eight), [], federation.state):
        np.testing.assert_array_equal(stale[update.client].routed, update.profile.routed)
        np.testing.assert_array_equal(stale[update.client].usage, update.profile.usage)


def test_bytes_of_profiling_count_and_those_of_members_do_not(finished):
    _, context, _, recorder = finished
    first, last = recorder.rounds[1:]
    weights = final_weights(context)
    shared = sum(array.nbytes for array in weights.shared.values())
    expert = sum(array.nbytes for array in weights.experts[ExpertKey(0, 0)].values())
    for record in last.clients:
        assert record.bytes_down == shared + record.resident * expert
        assert record.resident < 12
    assert last.bytes_down == sum(record.bytes_down for record in last.clients), "nobody is profiled for a last round"
    profiling = first.bytes_down - sum(record.bytes_down for record in first.clients)
    eight_bits = (profiling - 4 * shared) / (4 * 12)
    assert expert / 4 < eight_bits < expert / 2


def test_what_plan_predicts_is_what_a_round_takes(finished):
    made, context, _, recorder = finished
    first = recorder.rounds[1]
    predicted = {one.tier: one for one in forecast(made, context.model.shape, gpus_available=False)}
    for record in first.clients:
        assert record.resident == predicted[record.tier].present
        assert record.trained <= predicted[record.tier].batch
    # The tiny experts have short rows, so that the scales of 8 bits weigh more than in any real model.
    total = sum(predicted[record.tier].bytes_down for record in first.clients)
    assert 0.8 * first.bytes_down < total < first.bytes_down
    fewer = replace(context.model.shape, expert_bytes=2**28)
    with pytest.raises(CapacityError, match=r"or lower clients.tiers.0.experts from 0.25"):
        check_memory(made, fewer, forecast(made, fewer, gpus_available=False))
