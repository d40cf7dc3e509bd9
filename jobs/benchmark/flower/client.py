"""A Flower client that trains every expert of a prepared model, as a PyTorch user writes it.

Batches, optimizer, clipping and number of steps are those of `train.local`; there is no engine and no prefix cache.
One model per process is kept from client to client, as our workers keep theirs.
"""

import os
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.data.dataset import FederatedDataset
from hfedmoe_ray.moe.quiet import quiet_transformers
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.strategies.scores import uniform_plan
from hfedmoe_ray.types import Array as NumpyArray
from hfedmoe_ray.types import ExpertKey, Role, TaskWeights

CONTEXT = "PEERS_CONTEXT"
"""Environment variable that names the pickled `RunContext`."""
Named = dict[str, NumpyArray]


def run_context() -> RunContext:
    """The run that both frameworks carry out, from a file that this benchmark has written itself."""
    context: RunContext = pickle.loads(Path(os.environ[CONTEXT]).read_bytes())
    return context


def expert_name(key: ExpertKey, tensor: str) -> str:
    """Name of an expert's tensor in a message."""
    return f"expert/{key.layer}/{key.expert}/{tensor}"


@cache
def _loaded() -> tuple[RunContext, SparseModel, FederatedDataset]:
    torch.set_num_threads(1)
    context = run_context()
    with quiet_transformers():
        return context, SparseModel(context.model.path), FederatedDataset(context.data, context.experiment.data)


def train(message: Message, flower: Context) -> Message:
    """One client's round."""
    context, model, data = _loaded()
    local, shape = context.experiment.local, context.model.shape
    client = int(flower.node_config["partition-id"])
    received = {name: array.numpy() for name, array in message.content["arrays"].items()}
    weights = _unpacked(received)
    model.bind(uniform_plan((shape.layers, shape.experts), Role.TRAIN), weights, context.experiment.model.trainable)
    model.module.train()
    experts = [p for tensors in model.expert_parameters.values() for p in tensors.values()]
    parameters = [*model.shared_parameters.values(), *experts]
    optimizer = torch.optim.AdamW(parameters, lr=local.learning_rate, weight_decay=local.weight_decay, fused=True)
    split = data.train(client)
    rng = generator(context.experiment.seed, "batches", int(message.content["config"]["server-round"]), client)
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
    sent: dict[str, Any] = dict(model.read_shared())
    for key in model.expert_parameters:
        sent |= {expert_name(key, name): array for name, array in model.read_expert(key).items()}
    model.release()
    arrays = ArrayRecord({name: Array(array) for name, array in sent.items()})
    metrics = MetricRecord({"num-examples": len(split), "loss": float(loss.detach())})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


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


def client_app() -> ClientApp:
    """The app of all clients."""
    app = ClientApp()
    app.train()(train)
    return app
