"""The optimizer steps of one task: forward, choose the batch's experts, give only them a gradient (eq. 15)."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hfedmoe_ray.config.schema import Tier
from hfedmoe_ray.config.section import Precision
from hfedmoe_ray.data.dataset import Batch
from hfedmoe_ray.moe.routing import ProfileAccumulator, Specific
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.strategies import AnyStrategy
from hfedmoe_ray.train.balance import balance_loss
from hfedmoe_ray.train.engine import Engine
from hfedmoe_ray.train.proximal import Proximity
from hfedmoe_ray.train.signals import Signals
from hfedmoe_ray.types import Array, ExpertKey, ExpertPlan

Run = Callable[..., Any]
"""Stands in for a module's forward pass."""


class Forward(Protocol):
    """A forward pass over some of the client's examples."""

    def __call__(
        self, indices: Array, *, precision: Precision | None = None, run: Run | None = None
    ) -> tuple[Batch, Tensor]:
        """Returns the batch and its logits, [B, C]."""


class LocalSteps:
    """What the optimizer steps of one task share, and what they add up to."""

    def __init__(
        self,
        model: SparseModel,
        strategy: AnyStrategy,
        forward: Forward,
        *,
        tier: Tier,
        plan: ExpertPlan,
        rng: np.random.Generator,
        specific: Specific,
        proximity: Proximity,
    ) -> None:
        """Starts with no step taken.

        Args:
            model: Bound to the task's weights.
            strategy: Chooses the experts of each batch.
            forward: Runs the model on the client's examples.
            tier: Of the client.
            plan: What it may train.
            rng: Of strategies that choose by chance.
            specific: The statistic of eq. 4 in routing profiles.
            proximity: Pulls towards the weights the task started from.
        """
        self._model = model
        self._strategy = strategy
        self._forward = forward
        self._tier = tier
        self._plan = plan
        self._rng = rng
        self._specific = specific
        self._proximity = proximity
        self.profile = self._new_profile()
        self.trained = dict.fromkeys(plan.trainable, 0)
        """Steps in which an expert received a gradient."""
        self.signals = Signals(strategy.signals, strategy.shape)
        """What else the strategy wants to know of each expert."""
        self.loss = 0.0
        """Summed over examples."""
        self.examples = 0
        self.seconds = 0.0

    def take(self, engine: Engine, indices: Array) -> None:
        """One optimizer step on one batch.

        Eq. 15 chooses by the routing of the whole batch. A batch that passes in parts is therefore looked at first,
        without gradients, where the choice may leave an expert out; the parts then add up the gradients of the chosen
        ones alone. The result is that of the undivided batch within rounding.
        """
        started = time.perf_counter()
        size = self._tier.micro_batch or len(indices)
        parts = [indices[start : start + size] for start in range(0, len(indices), size)]
        seen = self._new_profile()
        whole = len(parts) == 1
        ahead = not whole and self._strategy.selective(self._plan)
        # Where nothing may be left out, all that may train are chosen.
        chosen = self._choose_ahead(parts, seen) if ahead else frozenset(self._plan.trainable)
        for part in parts:
            batch, logits = self._forward(part, precision=self._tier.precision, run=engine.forward)
            labels = batch_labels(batch, self._model.device)
            share = len(part) / len(indices)
            loss = cross_entropy(logits.float(), labels) * share
            self.signals.add_examples(self._model.tape, torch.from_numpy(batch.attention_mask), logits, labels)
            if not ahead:
                seen.add(self._model.tape)
            routing = seen.profile()
            if whole:
                chosen = self._strategy.select(routing, self._plan, self._rng)
            # An expert without a token has no gradient, and must not move by momentum either.
            active = [key for key in self._plan.trainable if key in chosen and routing.routed[key]]
            pull = self._proximity.term(active) if part is parts[-1] else 0.0
            balance = self._plan.balance
            spread = 0.0 if balance is None else share * balance_loss(self._model.tape, balance)
            engine.backward(loss + pull + spread, active)
            self.loss += float(loss.detach()) * len(indices)
        self.signals.add_gradients(active, self._model.expert_parameters)
        engine.step()
        for key in active:
            self.trained[key] += 1
        self.profile.merge(seen)
        self.examples += len(indices)
        self.seconds += time.perf_counter() - started

    def _choose_ahead(self, parts: Sequence[Array], seen: ProfileAccumulator) -> frozenset[ExpertKey]:
        """Returns the experts chosen by the routing of a divided batch, which is added to `seen`."""
        # Forked, so that dropout draws the same again.
        device = self._model.device
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for part in parts:
                self._forward(part, precision=self._tier.precision)
                seen.add(self._model.tape)
        return self._strategy.select(seen.profile(), self._plan, self._rng)

    def _new_profile(self) -> ProfileAccumulator:
        return ProfileAccumulator(self._model.shape, self._specific)


def batch_labels(batch: Batch, device: torch.device) -> Tensor:
    """Returns a batch's labels where the model computes, [B]."""
    return torch.from_numpy(batch.labels).to(device)
