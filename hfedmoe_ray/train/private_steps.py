"""DP-SGD in a client (Abadi et al., arXiv 1607.00133): optimizer steps that bound what one example can do to them.

A step's batch is a Poisson sample. Each example's gradient, of all that trains as one vector, is clipped; to the sum
comes Gaussian noise, on experts that no token was routed to as well, as whether one was is what the data say. Examples
pass one at a time: Opacus takes gradients per example from modules whose input's first dimension is the batch, while
experts here compute on the tokens of all examples that were routed to them.
"""

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from hfedmoe_ray.config.privacy import Examples as Options
from hfedmoe_ray.config.schema import LocalTraining
from hfedmoe_ray.train.engine import Engine
from hfedmoe_ray.train.steps import LocalSteps, batch_labels
from hfedmoe_ray.trust.noise import Source, source
from hfedmoe_ray.types import Array, ClientTask


def poisson_batches(options: Options, local: LocalTraining, task: ClientTask, count: int) -> Iterator[Array]:
    """Yields the indices of a round's batches: each of `count` examples with the same chance, so some may be empty."""
    draws = source(options.noise_seed, "private-batches", task.round, task.client)
    rate = min(1.0, local.batch_size / count)
    for _ in range(local.steps):
        yield np.flatnonzero(draws.random(count) < rate)


def step_noise(options: Options, task: ClientTask) -> Source:
    """Where the noise of a task's steps is drawn from."""
    return source(options.noise_seed, "private-steps", task.round, task.client)


class PrivateSteps(LocalSteps):
    """Local steps of which each example's part is bounded, and noised."""

    options: Options
    noise: Source
    expected: float
    """Examples of a batch, on average: what the sum is divided by."""

    def protect(self, options: Options, noise: Source, expected: float) -> None:
        """Says by how much; before the first step."""
        self.options, self.noise, self.expected = options, noise, expected

    def take(self, engine: Engine, indices: Array) -> None:
        """One optimizer step on one batch, which may be empty."""
        started = time.perf_counter()
        active = self._plan.trainable
        wanted = engine.wanted(active)
        total = [torch.zeros_like(parameter) for parameter in wanted]
        seen = self._new_profile()
        for index in indices:
            batch, logits = self._forward(np.array([index]), precision=self._tier.precision, run=engine.forward)
            loss = cross_entropy(logits.float(), batch_labels(batch, self._model.device))
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
            norm = float(torch.stack(squares).sum().sqrt())
            factor = min(1.0, self.options.clip / max(norm, 1e-12))
            for into, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    into.add_(gradient, alpha=factor)
            seen.add(self._model.tape)
            predictions = self._weight(np.array([index]))
            self.loss += float(loss.detach()) * predictions
            self.predictions += predictions
        sigma = self.options.noise_multiplier * self.options.clip
        for into in total:
            drawn = torch.from_numpy(sigma * self.noise.standard_normal(into.numel())).to(into)
            into.add_(drawn.view_as(into)).div_(self.expected)
        engine.take(total, active)
        engine.step()
        for key in active:
            self.trained[key] += 1
        self.profile.merge(seen)
        self.seconds += time.perf_counter() - started
