"""A Flower client that trains every expert of a prepared model, as a PyTorch user writes it.

Batches, optimizer, clipping and number of steps are those of `train.local`; there is no engine and no prefix cache.
One model per process is kept from client to client, as our workers keep theirs.
"""

import pickle
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults import Fault
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.data.dataset import FederatedDataset
from hfedmoe_ray.moe.quiet import quiet_transformers
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.seeds import derive_seed, generator
from hfedmoe_ray.strategies.scores import uniform_plan
from hfedmoe_ray.types import Array as NumpyArray
from hfedmoe_ray.types import ExpertKey, Role, TaskWeights

Named = dict[str, NumpyArray]


def run_context(path: Path) -> RunContext:
    """The run that both frameworks carry out, from a file that this benchmark has written itself."""
    context: RunContext = pickle.loads(path.read_bytes())
    return context


def expert_name(key: ExpertKey, tensor: str) -> str:
    """Name of an expert's tensor in a message."""
    return f"expert/{key.layer}/{key.expert}/{tensor}"


@cache
def _loaded(path: Path) -> tuple[RunContext, SparseModel, FederatedDataset]:
    torch.set_num_threads(1)
    context = run_context(path)
    with quiet_transformers():
        return context, SparseModel(context.model.path), FederatedDataset(context.data, context.experiment.data)


def train(path: Path, message: Message, flower: Context) -> tuple[Named, dict[str, float]]:
    """One client's round: what it sends, and what it tells of it."""
    context, model, data = _loaded(path)
    local, shape, seed = context.experiment.local, context.model.shape, context.experiment.seed
    round, client = int(message.content["config"]["server-round"]), int(flower.node_config["partition-id"])
    weights = _unpacked({name: array.numpy() for name, array in message.content["arrays"].items()})
    model.bind(uniform_plan((shape.layers, shape.experts), Role.TRAIN), weights, context.experiment.model.trainable)
    model.module.train()
    torch.manual_seed(derive_seed(seed, "torch", round, client))
    experts = [p for tensors in model.expert_parameters.values() for p in tensors.values()]
    parameters = [*model.shared_parameters.values(), *experts]
    optimizer = torch.optim.AdamW(parameters, lr=local.learning_rate, weight_decay=local.weight_decay, fused=True)
    split = data.train(client)
    rng = generator(seed, "batches", round, client)
    size, order, loss = min(local.batch_size, len(split)), rng.permutation(len(split)), torch.zeros(())
    for _ in range(local.steps):
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(len(split))])
        batch, order = split.batch(order[:size]), order[size:]
        optimizer.zero_grad()
        logits = model.forward(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask))
        loss = cross_entropy(logits, torch.from_numpy(batch.labels))
        torch.autograd.backward(loss)
        clip_grad_norm_(parameters, local.clip_norm)
        optimizer.step()
    sent: Named = dict(model.read_shared())
    for key in model.expert_parameters:
        sent |= {expert_name(key, name): array for name, array in model.read_expert(key).items()}
    model.release()
    return sent, {"num-examples": len(split), "loss": float(loss.detach())}


def _unpacked(received: Named) -> TaskWeights:
    """Arrays of a message as a task's weights."""
    shared: Named = {}
    experts: dict[ExpertKey, Named] = {}
    for name, array in received.items():
        if name.startswith("expert/"):
            _, layer, expert, tensor = name.split("/")
            experts.setdefault(ExpertKey(int(layer), int(expert)), {})[tensor] = array
        else:
            shared[name] = array
    return TaskWeights(shared=shared, experts=experts)


def client_app(path: Path, fault: Fault | None) -> ClientApp:
    """The app of all clients.

    Args:
        path: File with the pickled `RunContext`.
        fault: What one of them does wrong.
    """
    app = ClientApp()

    def answer(message: Message, flower: Context) -> Message:
        round, client = int(message.content["config"]["server-round"]), int(flower.node_config["partition-id"])
        due = fault is not None and fault.due(client, round)
        if fault is not None and due:
            fault.strike()
        started = time.perf_counter()
        sent, metrics = train(path, message, flower)
        metrics["seconds"] = time.perf_counter() - started
        arrays = {name: Array(array) for name, array in sent.items()}
        if fault is not None and due:
            arrays = _spoilt(arrays, fault)
        record: dict[str, Any] = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics)}
        return Message(content=RecordDict(record), reply_to=message)

    app.train()(answer)
    return app


def _spoilt(arrays: dict[str, Array], fault: Fault) -> dict[str, Array]:
    """An update with half of its experts, or cut off in its last array."""
    if fault.what == "half":
        experts = sorted({name.rpartition("/")[0] for name in arrays if name.startswith("expert/")})
        left_out = set(experts[len(experts) // 2 :])
        return {name: array for name, array in arrays.items() if name.rpartition("/")[0] not in left_out}
    name, last = list(arrays.items())[-1]
    cut = Array(dtype=last.dtype, shape=last.shape, stype=last.stype, data=last.data[: len(last.data) // 2])
    return arrays | {name: cut}
