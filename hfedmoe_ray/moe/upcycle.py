"""A dense BERT made a Mixture of Experts, keeping what it knows.

split: the neurons of each FFN are clustered by their input weights into E experts of equal size (balanced k-means on
the unit sphere: one assignment problem per step). An expert is then a summand of the FFN, and the router must find the
K summands that matter for a token. It starts at the cluster centroids, scaled down until it is nearly uniform, so that
at K = E the model is the dense one; layer by layer it is then distilled from the dense FFN on calibration texts.

copy: every expert is the whole FFN plus noise; the router starts small and random. Without noise the model is the
dense one for every K, because the weights of the top-k sum to 1.

The distillation costs no expert compute: with y_e(x) the output of expert e, the squared error of weights w is
(w - 1)' G (w - 1) with G = [y_e . y_f], an E x E matrix per token that is computed once.

All of it is ours. Legend: N tokens, H hidden, D neurons of the dense FFN, F = D/E, E experts, K top-k.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize
from transformers import BertModel
from transformers.models.bert.modeling_bert import BertLayer

from hfedmoe_ray.config.schema import Upcycle
from hfedmoe_ray.moe.encoder import (
    MoEEncoderConfig,
    MoEEncoderForSequenceClassification,
    MoEEncoderLayer,
    MoEFeedForward,
)
from hfedmoe_ray.moe.shape import upcycled_config
from hfedmoe_ray.seeds import derive_seed
from hfedmoe_ray.types import Array

_BALANCING_STEPS = 2
"""Rounds of balanced assignment and centroid update after plain k-means; further ones change the error by < 1 %."""
_UNIFORM = 1e-3
"""Norm of an uncalibrated router row."""
_LEARNING_RATE = 3e-3
_BATCH_TOKENS = 1024
_CHUNK_TOKENS = 2048
_GRAM_ELEMENTS = 2**26
"""Most elements of all G together (256 MiB); with many experts fewer tokens are used."""
_HELD_OUT = 8
"""Every eighth token is held out to measure the loss of information."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """Mean over held-out tokens of |MoE FFN - dense FFN|^2 / |dense FFN|^2, both without the output bias."""

    layer: int
    centroid_error: float
    """With the router at the cluster centroids."""
    calibrated_error: float
    """After distillation."""
    best_error: float
    """Choosing for each token the K experts most aligned with the FFN's output, at weight 1: what a perfect choice
    would leave."""


def upcycle(
    dense: BertModel, config: Upcycle, num_labels: int, seed: int, inputs: dict[int, Tensor]
) -> tuple[MoEEncoderForSequenceClassification, list[LayerReport]]:
    """Builds the MoE encoder of a dense one. The head is the caller's to initialise.

    Args:
        dense: The dense model, fp32.
        config: How.
        num_labels: Classes of the head.
        seed: Run seed.
        inputs: What enters the FFN of each layer on calibration texts, [N, H] by layer (`ffn_inputs`); without
            tokens the routers stay uncalibrated.

    Returns:
        The model, and for `split` with calibration what each layer lost.
    """
    moe_config = MoEEncoderConfig(**upcycled_config(dense.config.to_dict(), config), num_labels=num_labels)
    model = MoEEncoderForSequenceClassification(moe_config)
    model.embeddings.load_state_dict(dense.embeddings.state_dict())
    reports = []
    for number, (source, target) in enumerate(zip(dense.encoder.layer, model.layer, strict=True)):
        if not isinstance(target, MoEEncoderLayer):
            target.load_state_dict(source.state_dict())
            continue
        target.attention.load_state_dict(source.attention.state_dict())
        target.LayerNorm.load_state_dict(source.output.LayerNorm.state_dict())
        with torch.no_grad():
            target.moe.output_bias.copy_(source.output.dense.bias)
        if config.how == "copy":
            _copy(source, target.moe, config.noise, derive_seed(seed, "upcycle-copy", number))
        else:
            _split(source, target.moe, derive_seed(seed, "upcycle-split", number))
            if config.calibration_steps and len(inputs.get(number, ())):
                generator = torch.Generator().manual_seed(derive_seed(seed, "upcycle-calibrate", number))
                reports.append(_calibrate(number, target.moe, inputs[number], config.calibration_steps, generator))
    return model.eval(), reports


@torch.no_grad()
def ffn_inputs(dense: BertModel, layers: Sequence[int], batches: Iterator[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """Returns what enters the FFN of each layer for every real token, [N, H], from batches of (ids, mask), [B, S]."""
    seen: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    mask = torch.zeros(0)

    def note(layer: int) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, args: tuple[Tensor]) -> None:
            seen[layer].append(args[0][mask.bool()])

        return dense.encoder.layer[layer].intermediate.register_forward_pre_hook(hook)

    handles = [note(layer) for layer in layers]
    for ids, mask in batches:
        dense(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(parts) if parts else torch.zeros(0) for layer, parts in seen.items()}


def balanced_clusters(rows: Array, clusters: int, seed: int) -> Array:
    """Clusters rows [D, H] by direction into clusters of equal size; returns the cluster of each row, [D].

    Args:
        rows: One row per neuron.
        clusters: E; divides D.
        seed: For the k-means start.
    """
    size = len(rows) // clusters
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    centroids = KMeans(clusters, n_init=4, random_state=seed % 2**32).fit(unit).cluster_centers_  # [E, H]
    labels = np.zeros(len(rows), dtype=np.int64)
    for _ in range(_BALANCING_STEPS):
        # Each cluster is `size` seats; every row takes one seat at the least total cost.
        _, seats = linear_sum_assignment(np.repeat(-unit @ centroids.T, size, axis=1))
        labels = seats // size
        centroids = np.stack([unit[labels == cluster].mean(axis=0) for cluster in range(clusters)])
    return labels


@torch.no_grad()
def _split(dense: BertLayer, moe: MoEFeedForward, seed: int) -> None:
    up, bias, down = dense.intermediate.dense.weight, dense.intermediate.dense.bias, dense.output.dense.weight
    labels = balanced_clusters(up.numpy(), moe.experts.up_proj.shape[0], seed)
    for expert in range(len(moe.experts.up_proj)):
        neurons = torch.from_numpy(np.flatnonzero(labels == expert))  # [F]
        moe.experts.up_proj[expert] = up[neurons]
        moe.experts.up_bias[expert] = bias[neurons]
        moe.experts.down_proj[expert] = down[:, neurons]
        moe.gate.weight[expert] = _UNIFORM * normalize(up[neurons].mean(dim=0), dim=0)


@torch.no_grad()
def _copy(dense: BertLayer, moe: MoEFeedForward, noise: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sources = {
        "up_proj": dense.intermediate.dense.weight,
        "up_bias": dense.intermediate.dense.bias,
        "down_proj": dense.output.dense.weight,
    }
    for name, source in sources.items():
        target = getattr(moe.experts, name)
        target.copy_(source + noise * source.std() * torch.randn(target.shape, generator=generator))
    moe.gate.weight.copy_(0.02 * torch.randn(moe.gate.weight.shape, generator=generator))


def _calibrate(layer: int, moe: MoEFeedForward, inputs: Tensor, steps: int, generator: torch.Generator) -> LayerReport:
    """Distils the router of one layer and adjusts the output bias by the mean error that remains.

    The loss is the relative squared error of the FFN's output, through the weights of the chosen experts, plus the
    cross-entropy of the router to the K experts most aligned with the FFN's output. Top-k passes no gradient to the
    choice itself: without the second term the error of the lower layers grows, and some experts are never chosen.
    """
    top_k, experts = moe.gate.top_k, moe.experts.up_proj.shape[0]
    inputs = inputs[torch.randperm(len(inputs), generator=generator)[: max(_GRAM_ELEMENTS // experts**2, 1)]]
    test = torch.arange(len(inputs)) % _HELD_OUT == 0
    gram = torch.cat([_gram(moe, chunk) for chunk in torch.split(inputs, _CHUNK_TOKENS)])  # [N, E, E]
    alignment = gram.sum(dim=2)  # [N, E], y_e . y
    best = torch.zeros_like(alignment).scatter(1, alignment.topk(top_k, dim=1).indices, 1.0)  # [N, E]

    def error(rows: Tensor) -> Tensor:
        _, weights, index = moe.gate(inputs[rows])
        return _relative_error(gram[rows], torch.zeros_like(best[rows]).scatter(1, index, weights))

    train = (~test).nonzero().squeeze(1)
    held_out = test.nonzero().squeeze(1)
    with torch.no_grad():
        centroid_error = float(error(held_out))
        best_error = float(_relative_error(gram[held_out], best[held_out]))
    optimizer = torch.optim.Adam([moe.gate.weight], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = train[torch.randint(len(train), (min(_BATCH_TOKENS, len(train)),), generator=generator)]
        choice = -(best[rows] / top_k * log_softmax(moe.gate(inputs[rows])[0], dim=1)).sum(dim=1).mean()
        optimizer.zero_grad()
        torch.autograd.backward(error(rows) + choice)
        optimizer.step()
        schedule.step()
    moe.gate.weight.grad = None
    with torch.no_grad():
        bias = torch.stack([_missing(moe, chunk).sum(dim=0) for chunk in torch.split(inputs[train], _CHUNK_TOKENS)])
        moe.output_bias.add_(bias.sum(dim=0) / len(train))
        return LayerReport(
            layer=layer,
            centroid_error=centroid_error,
            calibrated_error=float(error(held_out)),
            best_error=best_error,
        )


def _outputs(moe: MoEFeedForward, tokens: Tensor) -> Tensor:
    """Output of every expert for every token, [N, E, H]."""
    experts = moe.experts
    neurons = experts.activation(torch.einsum("nh,efh->nef", tokens, experts.up_proj) + experts.up_bias)
    return torch.einsum("nef,ehf->neh", neurons, experts.down_proj)


@torch.no_grad()
def _gram(moe: MoEFeedForward, tokens: Tensor) -> Tensor:
    outputs = _outputs(moe, tokens)
    return outputs @ outputs.transpose(1, 2)


def _missing(moe: MoEFeedForward, tokens: Tensor) -> Tensor:
    """What the routed experts lack of the sum of all, [N, H]."""
    _, weights, index = moe.gate(tokens)
    outputs = _outputs(moe, tokens)
    return outputs.sum(dim=1) - (outputs * torch.zeros(outputs.shape[:2]).scatter(1, index, weights)[..., None]).sum(1)


def _relative_error(gram: Tensor, weights: Tensor) -> Tensor:
    """Mean over tokens of (w - 1)' G (w - 1) / (1' G 1); gram [N, E, E], weights [N, E]."""
    lack = weights - 1.0
    squared = torch.einsum("ne,nef,nf->n", lack, gram, lack)
    return (squared / gram.sum(dim=(1, 2)).clamp_min(1e-6)).mean()
