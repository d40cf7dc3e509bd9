"""Server optimizers: the mean of what came back as a gradient (Reddi et al., arXiv 2003.00295).

With Delta = average - old, tensor by tensor and in float64:

    fedavgm   m <- beta_1 m + Delta                    x <- x + eta m
    fedadam   m <- beta_1 m + (1 - beta_1) Delta       x <- x + eta m / (sqrt(v) + tau)
              v <- beta_2 v + (1 - beta_2) Delta^2
    fedyogi   as fedadam, but v <- v - (1 - beta_2) Delta^2 sign(v - Delta^2)

m starts at 0, v at tau^2; there is no bias correction [paper]. Only what somebody contributed to is moved: an expert,
or a router row, that nobody averaged keeps its bytes and its moments [ours]. To move it by momentum would be to train
an expert that no client held.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import EllipsisType

import numpy as np

from hfedmoe_ray.config import server as configs
from hfedmoe_ray.types import Array, FloatArray, Weights
from hfedmoe_ray.wire.names import expert_name


class ServerOptimizer:
    """Takes a step from the old weights towards their average, and remembers the moments."""

    def __init__(self, config: configs.ServerOptimizer, state: dict[str, Array]) -> None:
        """Goes on from a state.

        Args:
            config: Which optimizer.
            state: Moments, float32 arrays by "m/NAME" and "v/NAME" of what has been averaged at least once; gets
                the new ones, and is part of every checkpoint.
        """
        self._config = config
        self._state = state
        adaptive = config.optimizer in ("fedadam", "fedyogi")
        self._rate = config.learning_rate or (0.01 if adaptive else 1.0)
        self._momentum = 0.9 if config.momentum is None else config.momentum
        self._beta2 = 0.99 if config.beta2 is None else config.beta2
        self._tau = config.tau or 1e-3

    def step(self, old: Weights, averaged: Weights, rows: Mapping[str, Array]) -> Weights:
        """Returns the next weights.

        Args:
            old: The published ones.
            averaged: Their average (`Reducer.result`): what nobody contributed to is the very same array as in `old`.
            rows: Rows that were averaged, bool [rows], of parameters averaged row by row (`Reducer.rows`).
        """
        if self._config.optimizer == "mean":
            return averaged
        shared = {
            name: self._moved(f"shared/{name}", old.shared[name], value, rows.get(name))
            for name, value in averaged.shared.items()
        }
        experts = {
            key: {
                name: self._moved(f"expert/{expert_name(key)}/{name}", old.experts[key][name], value, None)
                for name, value in tensors.items()
            }
            for key, tensors in averaged.experts.items()
        }
        return replace(averaged, shared=shared, experts=experts)

    def _moved(self, name: str, old: Array, average: Array, rows: Array | None) -> Array:
        """One tensor after the step; the old one itself if nobody contributed to it."""
        if average is old:
            return old
        part = ... if rows is None else rows
        delta = average[part].astype(np.float64) - old[part].astype(np.float64)
        direction = self._direction(name, part, delta, old)
        new = old.copy()
        new[part] = (old[part].astype(np.float64) + self._rate * direction).astype(old.dtype)
        return new

    def _direction(self, name: str, part: EllipsisType | Array, delta: FloatArray, old: Array) -> FloatArray:
        """Folds a change into the moments; returns what to move by, before the learning rate."""
        adam = self._config.optimizer != "fedavgm"
        m = self._moment(f"m/{name}", old, 0.0)
        m[part] = self._momentum * m[part].astype(np.float64) + (1.0 - self._momentum if adam else 1.0) * delta
        first: FloatArray = m[part].astype(np.float64)
        if not adam:
            return first
        v = self._moment(f"v/{name}", old, self._tau**2)
        before, square = v[part].astype(np.float64), delta**2
        if self._config.optimizer == "fedadam":
            v[part] = self._beta2 * before + (1.0 - self._beta2) * square
        else:
            v[part] = before - (1.0 - self._beta2) * square * np.sign(before - square)
        direction: FloatArray = first / (np.sqrt(v[part].astype(np.float64)) + self._tau)
        return direction

    def _moment(self, name: str, like: Array, start: float) -> Array:
        """A moment to be written; what a checkpoint held may be read-only."""
        kept = self._state.get(name)
        self._state[name] = np.full(like.shape, start, dtype=np.float32) if kept is None else kept.copy()
        return self._state[name]
