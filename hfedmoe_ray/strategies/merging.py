"""Which absent experts one merged expert stands for: Flux's layer budgets and clusters, as pure functions of arrays.

Legend: L MoE layers, E experts, P numbers of one expert, r principal components, n points, k clusters.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from hfedmoe_ray.types import Array, ExpertKey, FloatArray, MergedExpert

_LLOYD_ROUNDS = 100
_NOISE = 1e-12
"""Share of the experts' squared length below which what sets them apart is rounding (ours)."""
_TIE = 9
"""Decimals to which similarities are compared, so that rounding decides nothing (ours)."""


def layer_budgets(total: int, frequency: FloatArray, caps: Sequence[int]) -> tuple[int, ...]:
    """Returns how many merged experts each layer gets: b_l in proportion to (L - l + 1) / var_l(f) [paper].

    Low layers get more, and layers whose experts are used alike. By largest remainder, at least one where anything is
    absent, and never more than are absent; what a layer cannot use goes to the others (ours).

    Args:
        total: Merged experts over all layers.
        frequency: f, the share of a layer's choices that fall on each expert, [L, E].
        caps: Absent experts of each layer.

    Returns:
        Budgets that sum to `total`, as far as one a layer and `caps` allow.
    """
    layers = len(caps)
    variance = np.maximum(frequency.var(axis=1), 1e-9)
    weight = (layers - np.arange(layers)) / variance
    quota = total * weight / weight.sum()
    least = [min(1, cap) for cap in caps]
    budget = [int(np.clip(np.floor(q + 1e-9), low, cap)) for q, low, cap in zip(quota, least, caps, strict=True)]
    goal = min(max(total, sum(least)), sum(caps))
    while sum(budget) != goal:
        step = 1 if sum(budget) < goal else -1
        able = [i for i in range(layers) if (budget[i] < caps[i] if step > 0 else budget[i] > least[i])]
        budget[max(able, key=lambda i: (step * (quota[i] - budget[i]), -i))] += step
    return tuple(budget)


def principal_components(experts: Mapping[ExpertKey, Mapping[str, Array]], layer: int, components: int) -> FloatArray:
    """Returns the principal components of one layer's expert weights, [E, r]: as one long vector each, centred.

    By the Gram matrix [E, E], whose size does not depend on P; read tensor by tensor.
    """
    keys = sorted(key for key in experts if key.layer == layer)
    gram = np.zeros((len(keys), len(keys)))
    length = 0.0
    for name in experts[keys[0]]:
        rows = np.stack([experts[key][name].reshape(-1) for key in keys]).astype(np.float64)  # [E, P of this tensor]
        length += float((rows**2).sum())
        rows -= rows.mean(axis=0)
        gram += rows @ rows.T
    values, vectors = np.linalg.eigh(gram)
    values = np.where(values > _NOISE * length, values, 0.0)
    best = np.argsort(-values, kind="stable")[:components]
    scores: FloatArray = vectors[:, best] * np.sqrt(values[best])
    return scores


def cosine_clusters(points: FloatArray, clusters: int) -> Array:
    """K-means by cosine distance [paper]; returns the cluster of each point, [n], numbered by first appearance.

    It starts from points far from one another, beginning with the one least like their mean: no draw is made, so that
    the order of the points decides nothing but ties (ours). Fewer clusters result where points coincide.

    Args:
        points: [n, r]; a zero vector is like nothing.
        clusters: k, at least 1.
    """
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    unit = np.divide(points, lengths, out=np.zeros_like(points), where=lengths > 0)
    nearest = (unit @ unit.mean(axis=0)).round(_TIE)
    centres: list[FloatArray] = []
    while len(centres) < min(clusters, len(points)):
        farthest = int(np.argmin(nearest))
        centres.append(unit[farthest])
        similar = (unit @ unit[farthest]).round(_TIE)
        nearest = similar if len(centres) == 1 else np.maximum(nearest, similar)
        if (nearest >= 1.0).all():
            break
    centre = np.stack(centres)  # [k, r]
    labels = np.full(len(points), -1)
    for _ in range(_LLOYD_ROUNDS):
        found = np.argmax((unit @ centre.T).round(_TIE), axis=1)
        if (found == labels).all():
            break
        labels = found
        for cluster in set(labels.tolist()):
            mean = unit[labels == cluster].mean(axis=0)
            length = np.linalg.norm(mean)
            centre[cluster] = mean / length if length > 0 else mean
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))
    numbered: Array = order[inverse]
    return numbered


def merge_absent(
    absent: Array, points: Sequence[FloatArray], frequency: FloatArray, total: int
) -> tuple[MergedExpert, ...]:
    """Groups a client's absent experts into about `total` merged ones.

    Args:
        absent: Which experts are absent, bool [L, E].
        points: Principal components of each layer's experts, [L][E, r].
        frequency: f, [L, E].
        total: Merged experts over all layers.

    Returns:
        In the order of layers. The weight alpha_e of a member is f_e alone: the mean attention its tokens receive,
        the paper's other factor, is not available, because attention never forms its map (SDPA). Members that no token
        chose weigh alike (ours).
    """
    budgets = layer_budgets(total, frequency, absent.sum(axis=1).tolist())
    merged = []
    for layer, budget in enumerate(budgets):
        members = np.flatnonzero(absent[layer])
        if not len(members):
            continue
        labels = cosine_clusters(points[layer][members], budget)
        for cluster in range(labels.max() + 1):
            chosen = members[labels == cluster]
            alpha = frequency[layer, chosen]
            alpha = alpha / alpha.sum() if alpha.sum() > 0 else np.full(len(chosen), 1 / len(chosen))
            merged.append(MergedExpert(layer=layer, members=tuple(map(int, chosen)), shares=tuple(map(float, alpha))))
    return tuple(merged)
