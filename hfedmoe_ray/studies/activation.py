"""How many experts a batch wakes: the union of its tokens' choices grows with the batch (motivation of 2601.00583).

Forward passes only. What a token is routed to does not depend on what else is in its batch, so each example passes
once, and a batch's experts are the union of its examples'. Legend: N examples, L MoE layers, E experts, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.studies.plots import Curve, curves
from hfedmoe_ray.studies.statistics import mean_of
from hfedmoe_ray.studies.study import Figure, Findings, Setting, Study, Table
from hfedmoe_ray.tracking.charts import legend
from hfedmoe_ray.tracking.formatting import percent, short
from hfedmoe_ray.types import Array, FloatArray

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DRAWS = 64
"""Batches of each size."""
_EXAMPLES = 512
"""Most examples of a client that pass through the model."""
_FORWARD = 32


@dataclass(frozen=True, kw_only=True)
class Routed:
    """What the routers did with some examples."""

    hit: Array
    """Whether a token of the example was routed to the expert, bool [N, L, E]."""
    tokens: Array
    """Real tokens of each example, [N]."""


def measure(setting: Setting) -> Findings:
    """Share of a layer's experts that at least one token of a batch is routed to, by batch size."""
    measured: list[tuple[list[Routed], int]] = []
    for seed in setting.seeds:
        setting.tell(f"forward passes, seed {seed}")
        from hfedmoe_ray.prepare import prepare_run

        context = prepare_run(setting.experiment(seed), setting.output)
        measured.append((routed_examples(context), context.model.shape.top_k))
    most = min(max(len(one.tokens) for one in clients) for clients, _ in measured)
    sizes = [size for size in SIZES if size <= most]
    own, mixed, tokens, even = [], [], [], []
    for seed, (clients, top_k) in zip(setting.seeds, measured, strict=True):
        everyone = Routed(
            hit=np.concatenate([one.hit for one in clients]), tokens=np.concatenate([one.tokens for one in clients])
        )
        alone = [activated(clients, size, seed) for size in sizes]
        together = [activated([everyone], size, seed) for size in sizes]
        own.append([share for share, _ in alone])
        mixed.append([share.mean() for share, _ in together])
        tokens.append([count for _, count in alone])
        even.append([1 - (1 - top_k / everyone.hit.shape[2]) ** count for _, count in alone])
    return _findings(sizes, np.array(own), np.array(mixed), np.mean(tokens, axis=0), np.mean(even, axis=0))


def routed_examples(context: RunContext) -> list[Routed]:
    """Passes every client's training examples through the model as it is before training."""
    import torch

    from hfedmoe_ray.data.dataset import FederatedDataset
    from hfedmoe_ray.moe.prepare import initial_weights
    from hfedmoe_ray.moe.subset import SparseModel
    from hfedmoe_ray.strategies.scores import uniform_plan
    from hfedmoe_ray.train.examples import Examples
    from hfedmoe_ray.types import Role, TaskWeights

    experiment, shape = context.experiment, context.model.shape
    weights = initial_weights(context.model, experiment.model.trainable, experiment.model.lora, experiment.seed)
    model = SparseModel(context.model.path, lora=experiment.model.lora)
    plan = uniform_plan((shape.layers, shape.experts), Role.FROZEN)
    model.bind(plan, TaskWeights(shared=weights.shared, experts=weights.experts), experiment.model.trainable)
    data = FederatedDataset(context.data, experiment.data)
    found = []
    for client in range(experiment.clients.count):
        split = data.train(client)
        count = min(len(split), _EXAMPLES)
        hit = np.zeros((count, shape.layers, shape.experts), dtype=bool)
        for start in range(0, count, _FORWARD):
            rows = np.arange(start, min(start + _FORWARD, count))
            batch, inputs = Examples(split, None).inputs(model, rows)
            with torch.inference_mode():
                model.module(**inputs)
            for layer, index in enumerate(model.tape.index):
                assert index is not None
                chosen = index.cpu().numpy()  # [T, K]; E stands for no expert
                example = rows[batch.owners(decoder=model.tape.decodes(layer))]  # [T]
                padded = np.zeros((count, shape.experts + 1), dtype=bool)
                padded[example[:, None], chosen] = True
                hit[:, layer] |= padded[:, :-1]
        found.append(Routed(hit=hit, tokens=np.asarray(split.lengths[:count], dtype=np.int64)))
    return found


def activated(clients: Sequence[Routed], size: int, seed: int) -> tuple[FloatArray, float]:
    """Draws batches, each from the data of one client that has enough, in turn.

    Returns:
        Mean share of the experts that a batch activates, [L], and mean tokens of a batch.
    """
    able = [one for one in clients if len(one.tokens) >= size]
    rng = generator(seed, "study-activation", size, len(clients))
    shares, tokens = [], []
    for draw in range(DRAWS):
        one = able[draw % len(able)]
        rows = rng.choice(len(one.tokens), size=size, replace=False)
        shares.append(one.hit[rows].any(axis=0).mean(axis=1))
        tokens.append(one.tokens[rows].sum())
    share: FloatArray = np.mean(shares, axis=0)
    return share, float(np.mean(tokens))


def _findings(sizes: Sequence[int], own: FloatArray, mixed: FloatArray, tokens: Array, even: Array) -> Findings:
    """Tells of shares [seed, size, L] of own batches and [seed, size] of mixed ones; tokens and even share [size]."""
    layers = [[mean_of(own[:, size, layer].tolist()) for size in range(len(sizes))] for layer in range(own.shape[2])]
    over_layers = [mean_of(own[:, size].mean(axis=1).tolist()) for size in range(len(sizes))]
    together = [mean_of(mixed[:, size].tolist()) for size in range(len(sizes))]
    drawn = [
        Curve(
            name=f"layer {layer}",
            points=[(size, one.mean) for size, one in zip(sizes, means, strict=True)],
            spread=[(max(0.0, one.low), min(1.0, one.high)) for one in means],
        )
        for layer, means in enumerate(layers)
    ]
    reference = Curve(name="tokens routed evenly", points=list(zip(map(float, sizes), map(float, even), strict=True)))
    names = [one.name for one in (*drawn, reference)]
    nearly = next((size for size, one in zip(sizes, over_layers, strict=True) if one.mean >= 0.9), None)
    return Findings(
        numbers={
            "batch_sizes": sizes,
            "share_by_layer": layers,
            "share": over_layers,
            "share_of_mixed_batches": together,
            "tokens_in_a_batch": tokens,
            "share_if_even": even,
        },
        headline=(
            f"One example wakes {percent(over_layers[0].mean, 0)} of a layer's experts, "
            f"a batch of {sizes[-1]} wakes {percent(over_layers[-1].mean, 0)}."
        ),
        paragraph=(
            "An expert is awake if at least one token of the batch is routed to it; every awake expert must be held "
            "and, if it trains, needs a gradient and optimizer state. "
            + (f"From batches of {nearly} on it is nine tenths of them. " if nearly else "No batch wakes nine tenths. ")
            + f"A batch is drawn from one client's data; drawn from all clients' data, a batch of {sizes[0]} wakes "
            f"{percent(together[0].mean, 0)} and one of {sizes[-1]} {percent(together[-1].mean, 0)}. Were each token's "
            f"experts drawn evenly and independently, {short(float(tokens[0]))} tokens, one example, would wake "
            f"{percent(float(even[0]), 0)}. The model is as it is before training."
        ),
        figures=[
            Figure(
                caption="Share of the experts of a layer that a batch activates",
                html=legend(names, lines=True)
                + curves(
                    [*drawn, reference],
                    label="Share of activated experts by batch size",
                    across="examples in a batch",
                    write=lambda share: f"{100 * share:.0f} %",
                    write_x=lambda size: f"{size:.0f}",
                    doubling=True,
                ),
            )
        ],
        tables=[
            Table(
                title="Activated share by batch size",
                headings=["*Examples", "*Tokens", *(f"*Layer {n}" for n in range(len(layers))), "*Mixed", "*Even"],
                rows=[
                    [
                        str(size),
                        f"{tokens[at]:.0f}",
                        *(percent(means[at].mean) for means in layers),
                        percent(together[at].mean),
                        percent(float(even[at])),
                    ]
                    for at, size in enumerate(sizes)
                ],
                note=f"Means over {own.shape[0]} seeds, each of {DRAWS} batches. Mixed: batches over all clients' "
                "data, mean of the layers. Even: every token's experts drawn evenly and independently.",
            )
        ],
    )


STUDY = Study(
    name="activation",
    title="How many experts a batch activates",
    shows="share of each layer's experts that a batch activates, by batch size",
    cost="forward passes only: a minute, and three models to prepare",
    config="study_small.yaml",
    measure=measure,
)
