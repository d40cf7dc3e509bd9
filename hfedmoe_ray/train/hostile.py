"""A worker's part in a simulated attack: what it serves the run's hostile clients with (`trust.attacks`)."""

from collections.abc import Mapping

import numpy as np

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.data.dataset import Split
from hfedmoe_ray.data.tokenize import load_tokenizer
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.trust import attacks
from hfedmoe_ray.types import Array, ClientTask, ExpertKey, TaskWeights

Tensors = Mapping[str, Array]


class HostileClients:
    """Stands between hostile clients and their data, and between what they trained and what they send."""

    def __init__(self, context: RunContext) -> None:
        """Takes note of the run's attack.

        Raises:
            ConfigError: Its label, or the words of its trigger, cannot be used with this model and these data.
        """
        experiment = context.experiment
        assert experiment.attack is not None
        self._attack = experiment.attack
        self._clients = attacks.hostile_clients(experiment.attack, experiment.clients.count, experiment.seed)
        self._classes = len(context.data.label_names)
        self._trigger: attacks.Trigger | None = None
        if self._attack.kind == "backdoor":
            assert self._attack.trigger is not None, "the schema wants one"
            tokenizer = load_tokenizer(context.model.path)
            self._trigger = attacks.read_trigger(tokenizer, self._attack.trigger, experiment.data.max_length)
            self._target = attacks.target_label(self._attack, context.data.label_names)

    def examples(self, task: ClientTask, split: Split) -> Split:
        """A task's examples as it gets to see them: a hostile client's training data are poisoned."""
        if task.split == "backdoor":
            assert self._trigger is not None
            return attacks.led_astray(split, self._trigger, self._target)
        if task.split != "train" or task.client not in self._clients or len(split) == 0:
            return split
        if self._attack.kind == "label_flip":
            return attacks.flipped(split, self._classes)
        if self._trigger is None:
            return split
        share = 0.5 if self._attack.poisoned is None else self._attack.poisoned
        rows = generator(task.seed, "poisoned", task.client).permutation(len(split))
        return attacks.triggered(split, self._trigger, self._target, rows[: max(1, round(share * len(split)))].tolist())

    def update(
        self, task: ClientTask, start: TaskWeights, experts: Mapping[ExpertKey, Tensors], shared: Tensors
    ) -> tuple[Mapping[ExpertKey, Tensors], Tensors]:
        """The experts and shared parameters that a client sends: of an honest one, those that it trained."""
        if task.client not in self._clients:
            return experts, shared
        rng: np.random.Generator = generator(task.seed, "attack", task.round, task.client)
        return attacks.manipulated(self._attack, start, experts, shared, rng)


def hostile_clients(context: RunContext) -> HostileClients | None:
    """What hostile clients are served with, where the run has any."""
    return None if context.experiment.attack is None else HostileClients(context)
