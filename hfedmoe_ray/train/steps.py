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
from hfedmoe_ray.data.batches import Batch
from hfedmoe_ray.moe.routing import ProfileAccumulator, Specific
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.strategies import AnyStrategy
from hfedmoe_ray.train.balance import balance_loss
from hfedmoe_ray.train.engine import Engine
from hfedmoe_ray.train.proximal import Proximity
from hfedmoe_ray.train.ranks import Ranks
from hfedmoe_ray.train.signals import Signals
from hfedmoe_ray.types import Array, ExpertKey, ExpertPlan

Run = Callable[..., Any]
"""Stands in for a module's forward pass."""


class Forward(Protocol):
    """A forward pass over some of the client's examples."""

    def __call__(
        self, indices: Array, *, precision: Precision | None = None, run: Run | None = None
    ) -> tuple[Batch, Tensor]:
        """Returns the batch and its logits, [B, C], or of the tokens to be written [N, V]."""


class LocalSteps:
    """What the optimizer steps of one task share, and what they add up to."""

    def __init__(
        self,
        model: SparseModel,
        strategy: AnyStrategy,
        forward: Forward,
        weight: Callable[[Array], int],
        *,
        tier: Tier,
        plan: ExpertPlan,
        rng: np.random.Generator,
        specific: Specific,
        proximity: Proximity,
        ranks: Ranks,
    ) -> None:
        """Starts with no step taken.

        Args:
            model: Bound to the task's weights.
            strategy: Chooses the experts of each batch.
            forward: Runs the model on the client's examples.
            weight: How many predictions some of its examples ask for: the loss is the mean over those of a batch.
            tier: Of the client.
            plan: What it may train.
            rng: Of strategies that choose by chance.
            specific: The statistic of eq. 4 in routing profiles.
            proximity: Pulls towards the weights the task started from.
            ranks: The client's.
        """
        self._model = model
        self._strategy = strategy
        self._forward = forward
        self._weight = weight
        self._tier = tier
        self._plan = plan
        self._rng = rng
        self._specific = specific
        self._proximity = proximity
        self._ranks = ranks
        self.profile = self._new_profile()
        self.trained = dict.fromkeys(plan.trainable, 0)
        """Steps in which an expert received a gradient."""
        self.signals = Signals(strategy.signals, strategy.shape)
        """What else the strategy wants to know of each expert."""
        self.loss = 0.0
        """Summed over predictions: those of this rank until `finish`, while `profile`'s routing is the client's."""
        self.predictions = 0
        self.seconds = 0.0

    def take(self, engine: Engine, indices: Array) -> None:
        """One optimizer step on one batch, of which this rank takes its share.

        Eq. 15 chooses by the routing of the whole batch, on all ranks. A share that passes in parts is therefore looked
        at first, without gradients, where the choice may leave an expert out; the parts then add up the gradients of
        the chosen ones alone. The result is that of the undivided batch within rounding.
        """
        started = time.perf_counter()
        ranks, own = self._ranks, self._ranks.share(indices)
        predictions = self._weight(indices)
        size = self._tier.micro_batch or len(indices)
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        seen = self._new_profile()
        whole = ranks.largest_share(len(indices)) <= size
        ahead = not whole and self._strategy.selective(self._plan)
        # Where nothing may be left out, all that may train are chosen.
        chosen = self._choose_ahead(parts, seen) if ahead else frozenset(self._plan.trainable)
        for part in parts:
            batch, logits = self._forward(part, precision=self._tier.precision, run=engine.forward)
            labels = batch_labels(batch, self._model.device)
            share = self._weight(part) / predictions
            loss = cross_entropy(logits.float(), labels) * share
            self.signals.add_examples(self._model.tape, batch, logits, labels)
            if not ahead:
                seen.add(self._model.tape)
            if whole:
                chosen = self._choose(seen)
            active = self._active(chosen, seen)
            pull = self._proximity.term(active) if ranks.size == 1 and part is parts[-1] else 0.0
            balance = self._plan.balance
            spread = 0.0 if balance is None else share * balance_loss(self._model.tape, balance)
            engine.backward(loss + pull + spread, active)
            self.loss += float(loss.detach()) * predictions
        if ranks.size > 1:
            active = self._join_ranks(engine, chosen, seen, nothing=not parts, whole=whole, ahead=ahead)
        self.signals.add_gradients(active, self._model.expert_parameters)
        engine.step()
        for key in active:
            self.trained[key] += 1
        self.profile.merge(seen)
        self.predictions += predictions
        self.seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Makes of what the ranks have each found in their shares what the client has found, on all of them."""
        ranks, keys = self._ranks, self._plan.present
        if ranks.size > 1:
            self.profile.become_outputs(keys, ranks.gather(self.profile.outputs(keys)))
            self.signals.become_all(ranks)
            self.loss = float(ranks.gather(np.array([self.loss])).sum())

    def _join_ranks(
        self,
        engine: Engine,
        chosen: frozenset[ExpertKey],
        seen: ProfileAccumulator,
        *,
        nothing: bool,
        whole: bool,
        ahead: bool,
    ) -> list[ExpertKey]:
        """Adds up the ranks' gradients of a batch and returns the experts that have one, the same on every rank.

        Args:
            engine: After this rank's backward passes.
            chosen: For the batch, unless this rank has not taken part in the choice.
            seen: The batch's routing, of all ranks if it was chosen by.
            nothing: Whether this rank's share is empty; then the others' pass undivided.
            whole: Whether no rank divides its share.
            ahead: Whether the batch was looked at first.
        """
        if whole and nothing:
            chosen = self._choose(seen)
        elif not whole and not ahead:
            seen.become_routing(self._ranks.gather(seen.routing()))
        active = self._active(chosen, seen)
        pull = self._proximity.term(active)
        if self._ranks.rank == 0 and isinstance(pull, Tensor):
            engine.backward(pull, active)
        engine.reduce(active)
        return active

    def _choose(self, seen: ProfileAccumulator) -> frozenset[ExpertKey]:
        """Returns the experts chosen by the routing of a batch; `seen` becomes that of all ranks."""
        if self._ranks.size > 1:
            seen.become_routing(self._ranks.gather(seen.routing()))
        return self._strategy.select(seen.profile(), self._plan, self._rng)

    def _active(self, chosen: frozenset[ExpertKey], seen: ProfileAccumulator) -> list[ExpertKey]:
        """The chosen experts that have a token: another has no gradient, and must not move by momentum either."""
        routed = seen.profile().routed
        return [key for key in self._plan.trainable if key in chosen and routed[key]]

    def _choose_ahead(self, parts: Sequence[Array], seen: ProfileAccumulator) -> frozenset[ExpertKey]:
        """Returns the experts chosen by the routing of a divided batch, which is added to `seen`."""
        # Forked, so that dropout draws the same again.
        device = self._model.device
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for part in parts:
                self._forward(part, precision=self._tier.precision)
                seen.add(self._model.tape)
        return self._choose(seen)

    def _new_profile(self) -> ProfileAccumulator:
        return ProfileAccumulator(self._model.shape, self._specific)


def batch_labels(batch: Batch, device: torch.device) -> Tensor:
    """Returns a batch's labels where the model computes: one for each prediction."""
    return torch.from_numpy(batch.labels).to(device)
