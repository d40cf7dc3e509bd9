"""The examples of a task, in batches as the model takes them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hfedmoe_ray.config.schema import Experiment, LocalTraining
from hfedmoe_ray.data.batches import Batch
from hfedmoe_ray.data.benchmarks import stored_benchmark
from hfedmoe_ray.data.dataset import FederatedDataset, Split
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.train.hostile import HostileClients
from hfedmoe_ray.train.prefix import PrefixStates, prefix_states
from hfedmoe_ray.types import Array, ClientTask


@dataclass(frozen=True)
class Examples:
    """A split with the cached states of its examples, if there are any."""

    split: Split
    states: PrefixStates | None

    def inputs(self, model: SparseModel, indices: Array) -> tuple[Batch, dict[str, Any]]:
        """Returns the batch of some examples, and what the model's forward pass is called with."""
        batch = self.split.batch(indices, model.layout.start)
        mask = torch.from_numpy(batch.attention_mask).to(model.device)
        ids = torch.from_numpy(batch.input_ids).to(model.device)
        hidden = None if self.states is None else self.states.batch(indices, mask.shape[1], model.device)
        targets = None if batch.targets is None else torch.from_numpy(batch.targets).to(model.device)
        decoder = None if batch.decoder_ids is None else torch.from_numpy(batch.decoder_ids).to(model.device)
        positions = None if batch.positions is None else torch.from_numpy(batch.positions).to(model.device)
        return batch, model.inputs(ids, mask, hidden, targets, decoder=decoder, positions=positions)


def task_examples(
    model: SparseModel,
    model_key: str,
    data: FederatedDataset,
    experiment: Experiment,
    task: ClientTask,
    *,
    hostile: HostileClients | None,
) -> Examples:
    """Returns a task's part of its split, with states where those are cached; left in evaluation mode then.

    Args:
        model: Bound to the task's weights.
        model_key: Hash of its frozen weights.
        data: Of all clients.
        experiment: Says what is trained and cached.
        task: Whose examples.
        hostile: Shows them to hostile clients as those would have them, where there are any.
    """
    match task.split:
        case "train":
            split = data.train(task.client)
        case "own_test":
            split = data.own_test(task.client)
        case "global_test" | "backdoor":
            split = data.global_test()
        case "benchmark":
            benchmark = experiment.evaluate.named(task.benchmark)
            return Examples(stored_benchmark(data, benchmark).part(*task.part).rows, None)
    split = split.part(*task.part)
    if hostile is not None:
        split = hostile.examples(task, split)
    local = experiment.local
    cached = local.cache == "auto" and model.supports_prefix and experiment.model.trainable != "full"
    if not cached or len(split) == 0:
        return Examples(split, None)
    model.module.eval()
    return Examples(split, prefix_states(model, model_key, split, local))


def batches(local: LocalTraining, task: ClientTask, count: int) -> Iterator[Array]:
    """Yields the indices of a round's batches: passes over the client's `count` examples, each in a fresh order."""
    rng = generator(task.seed, "batches", task.round, task.client)
    size = min(local.batch_size, count)
    order = rng.permutation(count)
    for _ in range(local.steps):
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(count)])
        yield order[:size]
        order = order[size:]
