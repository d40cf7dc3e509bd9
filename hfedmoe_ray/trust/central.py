"""Differential privacy of whole clients: clip each change, sum, add noise, divide by a number known beforehand.

    w <- w + (sum_c clip(w_c - w) + N(0, (z S)^2)) / m        (McMahan et al., arXiv 1710.06963, estimator f_f)

A client's change is one vector over all that trains; experts it did not train are zeros in it. So one client more
changes the sum by at most S in L2, whatever it holds. A mean per expert over those who trained it could not be bounded
so: where few did, its divisor is itself data, and one client can be all of the mean. m is the expected cohort, not how
many came; no weight depends on data. An expert that k clients trained moves by k/m of their mean change, and is
noised like all others, also if nobody trained it: that nobody did would tell of everybody.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hfedmoe_ray.config.privacy import Central
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.federation.availability import available
from hfedmoe_ray.trust.accounting import epsilon, planned
from hfedmoe_ray.trust.ledger import Ledger
from hfedmoe_ray.trust.noise import Source, source
from hfedmoe_ray.types import Array, ClientUpdate, ExpertKey, FloatArray, Weights

Owner = ExpertKey | None
"""An expert; None: what all share."""
Changes = dict[Owner, dict[str, FloatArray]]
_TOLERANCE = 1e-6


class CentralPrivacy:
    """What a run with `privacy.central` draws and spends."""

    def __init__(self, experiment: Experiment, directory: Path, *, rounds: int | None) -> None:
        """Takes note of the run and of what it has spent.

        Args:
            experiment: With `privacy.central` that is active.
            directory: Of the run's checkpoints.
            rounds: Rounds that the checkpoint has, where the run is resumed.

        Raises:
            ConfigError: Its epsilon would be meaningless.
            CheckpointError: What a resumed run has spent is not known.
        """
        plan, options = planned(experiment), experiment.privacy.central
        assert plan is not None
        assert options is not None
        self.options = options
        self.multiplier = plan["noise_multiplier"]
        self._experiment = experiment
        self._rate = plan["rate"]
        self._ledger = Ledger(directory / "privacy.jsonl", rounds=rounds)
        self._cohorts: dict[int, tuple[int, ...]] = {}

    def cohort(self, round: int) -> tuple[int, ...]:
        """Who takes part in a round: each client that is available with the same chance; nobody, at times.

        The chance is the accountant's, and drawn in secret: who knows who took part does not have to guess.
        """
        if round not in self._cohorts:
            there = available(self._experiment.clients, self._experiment.seed, round)
            drawn = source(self.options.noise_seed, "private-cohort", round).random(len(there)) < self._rate
            self._cohorts = {round: tuple(int(client) for client in there[drawn])}
        return self._cohorts[round]

    def mean(self, old: Weights) -> "PrivateMean":
        """Returns an empty mean over a round's clients."""
        return PrivateMean(old, self.options, expected=self._experiment.clients.cohort)

    def release(self, mean: "PrivateMean", round: int) -> Weights:
        """Writes down what is spent, then draws the noise.

        Raises:
            TrainingError: The budget does not suffice; nothing was drawn.
        """
        release = (self._rate, self.multiplier)
        target = self.options.epsilon
        if target is not None and epsilon(self.options, [*self._ledger.releases, release]) > target * (1 + _TOLERANCE):
            raise TrainingError(
                f"round {round} would spend more than privacy.central.epsilon, {target:g}: "
                f"{len(self._ledger.releases)} models have been noised, those of repeated rounds among them. The last "
                "checkpoint is the run's result; a run that may be interrupted more often needs a larger "
                "privacy.central.repeats from its start."
            )
        self._ledger.write(round, release)
        clip = self.options.clip
        sigma = self.multiplier * clip if clip is not None else 0.0
        return mean.result(sigma, source(self.options.noise_seed, "privacy-noise", round))

    def spent(self) -> dict[str, float]:
        """What all releases so far have spent: epsilon, delta, noise_multiplier, releases."""
        return {
            "epsilon": epsilon(self.options, self._ledger.releases),
            "delta": self.options.delta or 0.0,
            "noise_multiplier": self.multiplier,
            "releases": float(len(self._ledger.releases)),
        }

    def told(self, mean: "PrivateMean") -> dict[str, float]:
        """What is spent after a round; where the record is full, also how many of its clients were clipped."""
        clipped = {"clipped": mean.clipped / max(mean.clients, 1)} if self.options.record == "full" else {}
        return self.spent() | clipped

    def summary(self) -> dict[str, Any]:
        """What is said at the end of a run; an epsilon that is infinite as null."""
        spent = self.spent()
        finite = math.isfinite(spent["epsilon"])
        return {
            **spent,
            "epsilon": spent["epsilon"] if finite else None,
            "clip": self.options.clip,
            "accountant": self.options.accountant,
            "relation": "one client added or removed",
            "void": self.options.noise_seed is not None or self.options.record == "full" or not finite,
        }


class PrivateMean:
    """Folds clipped changes, one client at a time, into a sum in float64."""

    def __init__(self, old: Weights, options: Central, *, expected: int) -> None:
        """Starts with nothing.

        Args:
            old: What all clients started from.
            options: How far a change may go.
            expected: m, what the sum is divided by.
        """
        self._old = old
        self._options = options
        self._expected = expected
        self._sum: Changes = {}
        self.clients = 0
        self.clipped = 0
        """Clients whose change was shortened."""

    def add(self, update: ClientUpdate) -> None:
        """Folds one client's change."""
        changes, shortened = clip(change(update, self._old), self._options)
        for owner, tensors in changes.items():
            total = self._sum.setdefault(owner, {})
            for name, value in tensors.items():
                total[name] = total[name] + value if name in total else value
        self.clients += 1
        self.clipped += shortened

    def result(self, sigma: float, noise: Source) -> Weights:
        """The next version of the weights, each number of it noised.

        Args:
            sigma: Standard deviation of the noise on the sum.
            noise: Where it is drawn from.
        """
        old = self._old
        experts = {key: self._moved(key, tensors, sigma, noise) for key, tensors in sorted(old.experts.items())}
        shared = self._moved(None, old.shared, sigma, noise)
        return replace(old, version=old.version + 1, shared=shared, experts=experts)

    def _moved(self, owner: Owner, old: Mapping[str, Array], sigma: float, noise: Source) -> dict[str, Array]:
        summed = self._sum.get(owner, {})
        moved = dict(old)
        for name in sorted(old):  # a checkpoint does not keep their order, and the noise is drawn one after the other
            value = old[name]
            total: Any = summed.get(name, 0.0)
            if sigma > 0:
                total = total + sigma * noise.standard_normal(value.size).reshape(value.shape)
            moved[name] = (value.astype(np.float64) + total / self._expected).astype(value.dtype)
        return moved


def change(update: ClientUpdate, old: Weights) -> Changes:
    """Returns what a client moved, in float64: of the experts it trained, and of what all share under None."""
    changes: Changes = {key: _difference(tensors, old.experts[key]) for key, tensors in update.experts.items()}
    changes[None] = _difference(update.shared, old.shared)
    return changes


def clip(changes: Changes, options: Central) -> tuple[Changes, bool]:
    """Returns changes within the bounds, and whether they had to be shortened; what is within them is as it was."""
    shortened = False
    if options.expert_clip is not None:
        for owner in [owner for owner in changes if owner is not None]:
            length = _norm({owner: changes[owner]})
            if length > options.expert_clip:
                changes = {**changes, owner: _scaled(changes[owner], options.expert_clip / length)}
                shortened = True
    length = _norm(changes)
    if options.clip is not None and length > options.clip:
        changes = {owner: _scaled(tensors, options.clip / length) for owner, tensors in changes.items()}
        shortened = True
    return changes, shortened


def _difference(new: Mapping[str, Array], old: Mapping[str, Array]) -> dict[str, FloatArray]:
    return {name: value.astype(np.float64) - old[name].astype(np.float64) for name, value in new.items()}


def _scaled(tensors: Mapping[str, FloatArray], factor: float) -> dict[str, FloatArray]:
    return {name: value * factor for name, value in tensors.items()}


def _norm(changes: Changes) -> float:
    return math.sqrt(sum(float(np.vdot(value, value)) for tensors in changes.values() for value in tensors.values()))
