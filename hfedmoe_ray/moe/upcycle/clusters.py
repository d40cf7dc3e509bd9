"""Neurons to experts of equal size: balanced k-means on the unit sphere, one assignment problem per step.

Legend: D neurons, H hidden, E experts.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from hfedmoe_ray.types import Array

_BALANCING_STEPS = 2
"""Rounds of balanced assignment and centroid update after plain k-means; further ones change the error by < 1 %."""


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
