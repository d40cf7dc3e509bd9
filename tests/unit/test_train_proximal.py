"""FedProx: the gradient of its term, on what a step moves and on nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from moe_models import batch, plan, prepare, task_weights
from tiny_federation import experiment, final_weights, run

from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.strategies.hfedmoe import HFedMoE
from hfedmoe_ray.train.proximal import Proximity
from hfedmoe_ray.types import ExpertKey

MU = 0.3


@pytest.mark.usefixtures("one_thread")
def test_its_gradient_is_that_of_the_squared_distance_and_masked_experts_have_none(
    sources: Path, tmp_path_factory: pytest.TempPathFactory
):
    prepared = prepare(sources / "bert", tmp_path_factory.mktemp("cache"))
    weights = task_weights(prepared)
    model = SparseModel(prepared.path, "cpu")
    model.bind(plan("TTT.FF", "TT.TTF"), weights, "top")
    proximity = Proximity(MU, model, weights)
    active = [ExpertKey(0, 0), ExpertKey(0, 2), ExpertKey(1, 1)]
    masked = [key for key in model.expert_parameters if key not in active]
    wanted = [
        *((parameter, weights.shared[name]) for name, parameter in model.shared_parameters.items()),
        *(
            (parameter, weights.experts[key][name])
            for key in active
            for name, parameter in model.expert_parameters[key].items()
        ),
    ]
    with torch.no_grad():
        for parameter, _ in wanted:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))

    def gradients(term):
        for parameter, _ in wanted:
            parameter.grad = None
        loss = model.forward(*batch()).square().mean() + term
        torch.autograd.backward(loss, inputs=[parameter for parameter, _ in wanted])
        return [parameter.grad.clone() for parameter, _ in wanted]

    distance = sum((parameter - torch.tensor(start)).square().sum() for parameter, start in wanted)
    for ours, reference in zip(gradients(proximity.term(active)), gradients(MU / 2 * distance), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for key in masked for p in model.expert_parameters[key].values())
    assert all(not array.flags.writeable for _, array in wanted)
    assert Proximity(0.0, model, weights).term(active) == 0.0


def distance(sources: Path, run_dir: Path, **strategy) -> float:
    made = experiment(sources, rounds=1, strategy=strategy, evaluate={"own": "never"})
    context, summary, _ = run(made, run_dir)
    assert summary["clients"]["ok"] == 4
    before, after = initial_weights(context.model, "experts"), final_weights(context)
    return float(
        np.sqrt(
            sum(
                ((after.experts[key][name] - value).astype(np.float64) ** 2).sum()
                for key, tensors in before.experts.items()
                for name, value in tensors.items()
            )
        )
    )


def test_the_stronger_the_pull_the_closer_clients_stay(sources: Path, tmp_path: Path):
    free = distance(sources, tmp_path / "free", name="fedavg")
    weak = distance(sources, tmp_path / "weak", name="fedprox", mu=1e-9)
    strong = distance(sources, tmp_path / "strong", name="fedprox", mu=10.0)
    assert weak == pytest.approx(free, rel=1e-3)
    assert strong < 0.8 * free


def test_under_the_pull_masked_experts_keep_their_bytes(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The canary of a run stops it if an expert moved without a step; half of each client's are masked in a batch."""
    monkeypatch.setattr(HFedMoE, "proximal", MU)
    tiers = [{"name": "any", "share": 1.0, "experts": 0.5, "micro_batch": 2}]
    made = experiment(
        sources, clients={"count": 2, "tiers": tiers}, strategy={"name": "hfedmoe", "resident": "all", "tau": 0.0}
    )
    context, summary, recorder = run(made, tmp_path / "run")
    assert summary["status"] == "finished"
    untouched = np.array(sum(np.array(report.selected) for report in recorder.rounds)) == 0
    assert untouched.any()
    before, after = initial_weights(context.model, "experts"), final_weights(context)
    for key, tensors in before.experts.items():
        same = all((tensors[name] == after.experts[key][name]).all() for name in tensors)
        assert same == untouched[key]
