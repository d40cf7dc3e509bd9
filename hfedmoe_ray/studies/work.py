"""What one optimizer step of a client costs, counted on its real sub-model: FLOPs, and bytes of memory traffic.

FLOPs are those of matrix products, attention included, forward and backward, as torch counts them while they happen;
the layers below the first trainable one are computed each time, not cached. Traffic is counted of weights alone, each
read once forward and once backward (4 bytes a number), and of what trains also a gradient written and read, two moments
and the weight read and written (32 bytes in all); activations are left out, so it is a lower bound.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from hfedmoe_ray.data.dataset import FederatedDataset
from hfedmoe_ray.federation.clock import BYTES, READS, TRAINS
from hfedmoe_ray.federation.rounds import Federation
from hfedmoe_ray.moe.routing import ProfileAccumulator
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.runtime.local import task_weights
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.train.examples import Examples


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """One optimizer step of one client."""

    flops: float
    traffic: float
    """Bytes."""


def step_costs(federation: Federation) -> dict[int, StepCost]:
    """Counts a step of every client that the server can plan for, with the plan it would get in the next round."""
    context, strategy, state = federation.context, federation.strategy, federation.state
    experiment = federation.experiment
    number = state.round + 1
    known = [c for c in range(experiment.clients.count) if not strategy.needs_profile or c in state.profiles]
    plans = strategy.plan(number, [federation.client_info(client) for client in known], state.profiles)
    model = SparseModel(context.model.path, lora=experiment.model.lora)
    data = FederatedDataset(context.data, experiment.data)
    costs = {}
    for client, plan in plans.items():
        task = federation.task("train", number, client, plan)
        model.bind(plan, task_weights(state.weights, task), experiment.model.trainable)
        split = data.train(client)
        rng = generator(experiment.seed, "batches", number, client)
        rows = rng.permutation(len(split))[: experiment.local.batch_size]
        batch, inputs = Examples(split, None).inputs(model, rows)
        model.module.train()
        with FlopCounterMode(display=False) as counter:
            logits = model.module(**inputs).logits
            seen = ProfileAccumulator(model.shape, "max")
            seen.add(model.tape)
            routing = seen.profile()
            chosen = strategy.select(routing, plan, generator(experiment.seed, "select", number, client))
            active = [key for key in plan.trainable if key in chosen and routing.routed[key]]
            training = [
                *model.shared_parameters.values(),
                *(p for key in active for p in model.expert_parameters[key].values()),
            ]
            loss = cross_entropy(logits, torch.from_numpy(batch.labels))
            torch.autograd.grad(loss, training, allow_unused=True)
        # Of an embedding only the rows of the batch's tokens are read.
        tables = {id(one.weight) for one in model.module.modules() if isinstance(one, nn.Embedding)}
        dense = sum(one.numel() for one in model.module.parameters() if id(one) not in tables)
        frozen = sum(
            int(np.prod(array.shape))
            for key in plan.present
            if key not in model.expert_parameters
            for array in state.weights.experts[key].values()
        )
        trained = sum(one.numel() for one in training)
        costs[client] = StepCost(
            flops=float(counter.get_total_flops()), traffic=float(BYTES * (READS * (dense + frozen) + TRAINS * trained))
        )
    model.release()
    return costs
