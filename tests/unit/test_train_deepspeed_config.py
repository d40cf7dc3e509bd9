"""Every way of training that a tier may ask for: masked experts keep their bytes, and the result is plain PyTorch's."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from moe_models import LABELS, save_bert, save_mixtral
from pydantic import ValidationError
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from hfedmoe_ray import budget
from hfedmoe_ray.config import strategies as configs
from hfedmoe_ray.config.schema import Experiment, LocalTraining, Tier
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.strategies.base import Strategy
from hfedmoe_ray.strategies.controls import FedAvg
from hfedmoe_ray.train import activations
from hfedmoe_ray.train import local as client_work
from hfedmoe_ray.train.deepspeed_config import deepspeed_config
from hfedmoe_ray.train.steps import LocalSteps
from hfedmoe_ray.types import ClientTask, ExpertKey, ExpertPlan, ModelShape, Role, TaskWeights

STEPS, BATCH, EXPERTS, LAYERS = 5, 6, 6, 2
PLAN = ExpertPlan(roles=((Role.TRAIN,) * 5 + (Role.ABSENT,),) * LAYERS, absent="drop", batch_budget=4)
NEVER = ExpertKey(1, 4)
ZERO = [(0, False), (1, False), (2, False), (1, True), (2, True)]
OFFERED = [
    {"zero_stage": stage, "offload_optimizer": offload, "micro_batch": micro, "checkpoint_activations": again} | kind
    for (stage, offload), micro, again, kind in product(ZERO, (None, 4), (False, True), ({}, {"precision": "bf16"}))
]


State = dict[Any, Mapping[str, np.ndarray]]
TASK = ClientTask(kind="train", round=1, client=0, seed=0, plan=PLAN, version=0)


def named(options: dict[str, object] | str) -> str:
    if isinstance(options, str):
        return options
    return "-".join(f"{key[:5]}={value}" for key, value in options.items() if value)


class Turns(Strategy):
    """Trains all experts but one for two steps, then those of even number alone: the odd ones have momentum."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(configs.FedAvg(), shape, 0)
        self.selected: list[set[ExpertKey]] = []

    def plan(self, round, clients, profiles):
        raise NotImplementedError

    def select(self, batch, plan, _rng):
        early = len(self.selected) < 2
        keys = {key for key in plan.trainable if key != NEVER and (early or key.expert % 2 == 0)}
        self.selected.append({key for key in keys if batch.routed[key]})
        return frozenset(keys)


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A worker that serves one client, and the weights to start from."""
    family = request.param
    root = tmp_path_factory.mktemp(family)
    (save_bert if family == "bert" else save_mixtral)(root / "model")
    upcycle = {"how": "copy", "experts": EXPERTS, "top_k": 2, "layers": [2, 3], "noise": 0.3}
    texts = [" ".join(f"word{(3 * i + j * j) % 17}" for j in range(3 + i % 7)) for i in range(60)]
    rows = [{"text": text, "label": i % LABELS} for i, text in enumerate(texts)]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    experiment = Experiment.model_validate(
        {
            "name": "tiny",
            "clients": {"count": 1, "tiers": [{"name": "any", "share": 1, "experts": 1}]},
            "model": {
                "source": str(root / "model"),
                "upcycle": upcycle if family == "bert" else None,
                "lora": {"rank": 2} if family == "lora" else None,
            },
            "data": {"source": str(root / "texts.jsonl"), "max_length": 12},
            "local": {"steps": STEPS, "batch_size": BATCH, "learning_rate": 1e-3, "weight_decay": 0.1, "cache": "off"},
        }
    )
    context = prepare_run(experiment, root / "run")
    weights = initial_weights(context.model, "top", experiment.model.lora)
    return client_work.ClientWorker(context), TaskWeights(shared=weights.shared, experts=weights.experts)


@pytest.fixture(scope="module")
def plain(made) -> Callable[[str], tuple[State, State]]:
    """What plain PyTorch makes of the same steps, by precision."""
    return cache(partial(train_plainly, made))


@pytest.fixture(autouse=True)
def _offload_from_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a CPU be taken for a GPU: DeepSpeed's offload code runs as it would on one."""

    def as_on_a_gpu(local: LocalTraining, tier: Tier, _device: str) -> dict[str, Any]:
        return deepspeed_config(local, tier, "cuda")

    monkeypatch.setattr(client_work, "deepspeed_config", as_on_a_gpu)


def train(
    made, options: dict[str, object], monkeypatch: pytest.MonkeyPatch, mu: float = 0.0
) -> tuple[list[State], State, Turns]:
    """Trains; returns every held expert after each step, the shared parameters, and what was selected."""
    worker, weights = made
    turns = worker._strategy = Turns(worker._model.shape)
    turns.proximal = mu
    worker._tiers = (Tier.model_validate({"name": "any", "share": 1, "experts": 1} | options),)
    history: list[State] = []
    shared: State = {}
    step = LocalSteps.take

    def watched(self, *args):
        step(self, *args)
        history.append({key: worker._model.read_expert(key) for key in PLAN.trainable})
        shared["shared"] = worker._model.read_shared()

    with monkeypatch.context() as patched:
        patched.setattr(LocalSteps, "take", watched)
        worker.execute(TASK, weights, lambda: False)
    return history, shared, turns


def train_plainly(made, precision: str, mu: float = 0.0) -> tuple[State, State]:
    """The same steps as a PyTorch user writes them: a whole batch, all gradients, those of masked experts dropped."""
    worker, weights = made
    model, local, turns = worker._model, worker._local, Turns(worker._model.shape)
    model.bind(PLAN, weights, "top")
    model.module.train()
    experts, shared = model.expert_parameters, list(model.shared_parameters.values())
    parameters = [*shared, *(p for tensors in experts.values() for p in tensors.values())]
    start = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=local.learning_rate, weight_decay=local.weight_decay)
    examples = worker._examples(TASK)
    for indices in worker._batches(TASK, len(examples.split)):
        optimizer.zero_grad()
        batch, logits = worker._forward(examples, indices, precision=precision)
        loss = cross_entropy(logits.float(), torch.from_numpy(batch.labels))
        if mu:  # 0 times a distance would be a gradient of zeros where there is none, and weight decay a step
            loss = loss + mu / 2 * sum((one - old).square().sum() for one, old in zip(parameters, start, strict=True))
        loss.backward()
        routing = worker._new_profile()
        routing.add(model.tape)
        chosen = turns.select(routing.profile(), PLAN, None)
        for key in experts.keys() - chosen:
            for parameter in experts[key].values():
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(parameters, local.clip_norm)
        optimizer.step()
    return {key: model.read_expert(key) for key in PLAN.trainable}, {"shared": model.read_shared()}


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


def gap(result: State, expected: State) -> float:
    """How far nineteen of twenty numbers at least lie from where they should.

    Adam divides a gradient by its own size: one that is rounding alone, as that of a neuron that no token excites,
    makes a step of full length in any direction. A few such numbers are in every model.
    """
    names = [(key, name) for key in expected for name in expected[key]]
    return float(np.quantile(np.concatenate([np.abs(result[k][n] - expected[k][n]).ravel() for k, n in names]), 0.95))


@pytest.mark.parametrize(
    ("made", "options"),
    [("mixtral", options) for options in OFFERED]
    + [("bert", options) for options in OFFERED if not options["zero_stage"]]
    + [("lora", options) for options in OFFERED if options["checkpoint_activations"] and "precision" not in options],
    indirect=["made"],
    ids=named,
)
def test_masked_experts_keep_their_bytes_and_the_others_train_as_in_plain_pytorch(made, plain, options, monkeypatch):
    before = {key: made[1].experts[key] for key in PLAN.trainable}
    history, shared, turns = train(made, options, monkeypatch)
    assert len(history) == len(turns.selected) == STEPS
    assert any(key.expert % 2 for key in turns.selected[1]), "no expert has momentum when it is masked"
    for after, selected in zip(history, turns.selected, strict=True):
        assert {key for key in PLAN.trainable if not same(before[key], after[key])} == selected
        before = after
    experts, expected_shared = plain(options.get("precision", "fp32"))
    # A step moves a number by up to 1e-3, the learning rate. A divided batch adds gradients up in another order, and
    # the products of bfloat16 depend on its shape.
    divided = 2e-3 if "precision" in options else 2e-4
    bound = divided if options["micro_batch"] else 1e-6
    assert gap(history[-1], experts) <= bound
    assert gap(shared, expected_shared) <= bound


@pytest.mark.parametrize("made", ["mixtral"], indirect=True)
@pytest.mark.parametrize(
    "options",
    [{"zero_stage": 0}, {"zero_stage": 0, "micro_batch": 4}, {"zero_stage": 2, "offload_optimizer": True}],
    ids=named,
)
def test_the_pull_of_fedprox_is_clipped_and_partitioned_as_any_gradient(made, plain, options, monkeypatch):
    before = {key: made[1].experts[key] for key in PLAN.trainable}
    history, shared, turns = train(made, options, monkeypatch, mu=30.0)
    for after, selected in zip(history, turns.selected, strict=True):
        assert {key for key in PLAN.trainable if not same(before[key], after[key])} == selected
        before = after
    bound = 2e-4 if "micro_batch" in options else 1e-6
    experts, expected_shared = plain("fp32", mu=30.0)
    assert gap(history[-1], experts) <= bound
    assert gap(shared, expected_shared) <= bound
    free, _ = plain("fp32")
    assert gap(history[-1], free) > 10 * bound, "without the pull it is another result"


@pytest.mark.parametrize("made", ["mixtral"], indirect=True)
def test_activations_are_computed_again_only_where_asked_for(made, monkeypatch):
    """Otherwise the test above would compare a step with itself."""
    again = []
    monkeypatch.setattr(activations, "checkpoint", lambda *args, **kw: (again.append(1), checkpoint(*args, **kw))[1])
    for on in (True, False):
        again.clear()
        train(made, {"checkpoint_activations": on}, monkeypatch)
        assert bool(again) == on


@pytest.mark.parametrize("made", ["mixtral"], indirect=True)
def test_a_batch_is_looked_at_first_only_where_the_choice_may_leave_an_expert_out(made, monkeypatch):
    passes = []
    forward = client_work.ClientWorker._forward
    monkeypatch.setattr(
        client_work.ClientWorker, "_forward", lambda *args, **kw: (passes.append(1), forward(*args, **kw))[1]
    )
    for plan, expected in ((PLAN, 4), (replace(PLAN, batch_budget=None), 2)):
        passes.clear()
        worker, weights = made
        worker._tiers, worker._strategy = (
            (Tier(name="any", share=1, experts=1, micro_batch=4),),
            Turns(worker._model.shape),
        )
        worker.execute(replace(TASK, plan=plan), weights, lambda: False)
        assert len(passes) == expected * STEPS  # two parts of 4 and 2 examples


@pytest.mark.parametrize("made", ["mixtral"], indirect=True)
def test_an_expert_without_a_token_in_the_batch_does_not_move_by_momentum(made, monkeypatch):
    """Under ZeRO its group has a gradient of zeros; what trains every expert selects it all the same."""
    worker, weights = made
    worker._tiers = (Tier(name="any", share=1, experts=1, zero_stage=1),)
    worker._strategy = FedAvg(configs.FedAvg(), worker._model.shape, 0)
    monkeypatch.setattr(client_work.ClientWorker, "_batches", lambda *_: iter([np.arange(6), np.arange(1)]))
    routed, states = [], []
    step = LocalSteps.take

    def watched(self, *args):
        step(self, *args)
        routed.append(worker._model.tape.counts())
        states.append({key: worker._model.read_expert(key) for key in PLAN.trainable})

    monkeypatch.setattr(LocalSteps, "take", watched)
    worker.execute(TASK, weights, lambda: False)
    idle = [key for key in PLAN.trainable if routed[0][key] and not routed[1][key]]
    assert idle
    assert all(same(states[0][key], states[1][key]) for key in idle)


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        ({"zero_stage": 3}, "Write 0, or 2 with `offload_optimizer: true`"),
        ({"zero_stage": 4}, "write 0, 1 or 2"),
        ({"offload_optimizer": True}, "write `zero_stage: 2`"),
        ({"offload_optimizer": True, "zero_stage": 2, "num_gpus": 0}, "leave one out"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_write_instead(keys, advice):
    with pytest.raises(ValidationError, match=advice):
        Tier.model_validate({"name": "any", "share": 1, "experts": 1} | keys)


def test_offload_is_refused_where_clients_compute_on_the_cpu():
    tier = Tier(name="phone", share=1, experts=1, zero_stage=2, offload_optimizer=True)
    with pytest.raises(ConfigError, match=r"tier phone(?s:.*)`offload_optimizer: false`"):
        deepspeed_config(LocalTraining(), tier, "cpu")
    with pytest.raises(ConfigError, match="tier phone"):
        budget.resources(tier, gpus_available=False)
    assert budget.resources(tier, gpus_available=True).num_gpus == 1
    assert deepspeed_config(LocalTraining(), tier, "cuda")["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
