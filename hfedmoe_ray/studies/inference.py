"""An attack: which class does a client have most of, by what the server is told of its use of experts?

The attacker is the server. It has the model, the global test split, and knows how clients measure, choose and protect;
so it deals its own examples to shadow clients as the federation's were dealt, looks at what each would tell, and trains
a classifier on that (logistic regression). Legend: N examples, L MoE layers, E experts, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.data.dataset import Split
from hfedmoe_ray.data.partition import deal
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.types import Array, FloatArray, RoutingProfile

_FORWARD = 32
View = Callable[[RoutingProfile, int], FloatArray]
"""(a client's profile as measured, its number) -> what the attacker sees of it, as one vector."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What the routers made of examples, so that a client of any of them can be profiled without passing them again."""

    gate: FloatArray
    """Sum of gate values over the tokens of each example, [N, L, E]."""
    gate_log: FloatArray
    """The same of G log G."""
    most: FloatArray
    """Their largest."""
    routed: FloatArray
    """Tokens that were sent to each expert."""
    tokens: Array
    """Of each example, [N]."""
    labels: Array
    """Class of each example, [N]."""

    def profile(self, rows: Array) -> RoutingProfile:
        """The profile of a client that measures on these examples (`moe.routing.ProfileAccumulator.profile`)."""
        tokens = int(self.tokens[rows].sum())
        usage: FloatArray = self.gate[rows].sum(axis=0) / tokens
        entropy = usage * np.log(np.where(usage > 0, usage, 1.0))
        return RoutingProfile(
            usage=usage,
            specific=self.most[rows].max(axis=0),
            kl=np.maximum(self.gate_log[rows].sum(axis=0) / tokens - entropy, 0.0),
            routed=self.routed[rows].sum(axis=0),
            tokens=tokens,
        )


@dataclass(frozen=True, kw_only=True)
class Client:
    """Whom the attack learns from, or is about."""

    profile: RoutingProfile
    dominant: int
    """The class it has most examples of."""


@dataclass(frozen=True, kw_only=True)
class Victims:
    """The clients of a run, and shadow clients of the attacker's own data."""

    clients: Sequence[Client]
    shadows: Sequence[Client]


def victims(context: RunContext, shadows: int) -> Victims:
    """Profiles the clients of a run on its first model, as the server would have them, and about so many shadows.

    Raises:
        ConfigError: The clients' data were not dealt by a rule that the attacker could repeat, or have no classes.
    """
    from hfedmoe_ray.data.dataset import FederatedDataset

    experiment = context.experiment
    how = experiment.data.partition.how
    if how in ("files", "natural") or experiment.model.task == "causal":
        raise ConfigError(
            "the study deals shadow clients as the federation's were dealt, and asks for their classes: write "
            "`data.partition.how: dirichlet`, `shards`, `quantity` or `iid`, with labels"
        )
    route = _router(context)
    data = FederatedDataset(context.data, experiment.data)
    least = experiment.local.profile_examples
    clients, sizes = [], []
    for client in range(experiment.clients.count):
        split = data.train(client)
        order = generator(experiment.seed, "profile", client).permutation(len(split))[:least]
        measured = route(split, np.sort(order))
        clients.append(Client(profile=measured.profile(np.arange(len(order))), dominant=_dominant(split.labels)))
        sizes.append(len(split))
    test = data.global_test()
    seen = route(test, np.arange(len(test)))
    at_once = max(2, round(len(test) / np.mean(sizes)))
    made: list[Client] = []
    while len(made) < shadows:
        rng = generator(experiment.seed, "shadow-clients", len(made))
        for part in deal(experiment.data.partition, seen.labels, None, at_once, int(rng.integers(2**31))):
            profiled = rng.permutation(part)[:least]
            made.append(Client(profile=seen.profile(profiled), dominant=_dominant(seen.labels[part])))
    return Victims(clients=clients, shadows=made)


def success(found: Victims, view: View) -> float:
    """Share of the clients whose dominant class the attacker names."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # Numbers of shadows lie beyond those of clients, so that their noise is not theirs.
    shadows = np.stack([view(one.profile, 10**6 + n) for n, one in enumerate(found.shadows)])
    clients = np.stack([view(one.profile, n) for n, one in enumerate(found.clients)])
    attack = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=500))
    attack.fit(shadows, [one.dominant for one in found.shadows])
    return float((attack.predict(clients) == [one.dominant for one in found.clients]).mean())


def baseline(found: Victims) -> float:
    """Share of the clients that have most of the class which is dominant most often among the shadows."""
    guess = np.bincount([one.dominant for one in found.shadows]).argmax()
    return float(np.mean([one.dominant == guess for one in found.clients]))


def _dominant(labels: Array) -> int:
    return int(np.bincount(labels).argmax())


def _router(context: RunContext) -> Callable[[Split, Array], Routing]:
    """Returns what passes some rows of a split through the model as it is before training, all experts held."""
    import torch

    from hfedmoe_ray.moe.prepare import initial_weights
    from hfedmoe_ray.moe.subset import SparseModel
    from hfedmoe_ray.moe.threads import one_thread
    from hfedmoe_ray.strategies.scores import uniform_plan
    from hfedmoe_ray.types import Role, TaskWeights

    experiment, shape = context.experiment, context.model.shape
    weights = initial_weights(context.model, experiment.model.trainable, experiment.model.lora, experiment.seed)
    model = SparseModel(context.model.path, lora=experiment.model.lora)
    plan = uniform_plan((shape.layers, shape.experts), Role.FROZEN)
    model.bind(plan, TaskWeights(shared=weights.shared, experts=weights.experts), experiment.model.trainable)
    model.module.eval()

    def route(split: Split, rows: Array) -> Routing:
        sums = np.zeros((4, len(rows), shape.layers, shape.experts))
        tokens = np.zeros(len(rows), dtype=np.int64)
        for start in range(0, len(rows), _FORWARD):
            batch = split.batch(rows[start : start + _FORWARD])
            with one_thread(), torch.inference_mode():
                model.forward(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask))
            lengths = batch.attention_mask.sum(axis=1)
            example = start + np.repeat(np.arange(len(lengths)), lengths)  # [T]
            tokens[start : start + len(lengths)] = lengths
            gates = [of_layer.double().numpy() for of_layer in model.tape.gate_values()]  # [T, E] each
            for layer, index in enumerate(model.tape.index):
                assert index is not None
                np.add.at(sums[0, :, layer], example, gates[layer])
                np.add.at(sums[1, :, layer], example, gates[layer] * np.log(np.maximum(gates[layer], 1e-300)))
                np.maximum.at(sums[2, :, layer], example, gates[layer])
                np.add.at(sums[3, :, layer], (example[:, None], index.numpy()), 1.0)
        gate, gate_log, most, routed = sums
        return Routing(
            gate=gate, gate_log=gate_log, most=most, routed=routed, tokens=tokens, labels=np.asarray(split.labels[rows])
        )

    return route
