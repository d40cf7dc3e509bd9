"""How long an experiment's texts really are, in tokens: what a batch occupies follows from it. Torch-free."""

from dataclasses import dataclass

import numpy as np

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.data.dataset import FederatedDataset
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.types import Array

_BATCHES = 200
"""Batches that are drawn."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of texts, and of the prompts they begin with."""

    texts: Array
    """Of each text [N]."""
    prompts: Array | None = None
    """Of each prompt [N]; None where nothing is to be written."""

    def batch(self, examples: int, batches: int) -> tuple[float, float]:
        """Returns the tokens, padding included, and the predictions of the largest of so many batches, on average.

        Peak memory is that of the largest batch a client sees in its round.

        Args:
            examples: In a batch.
            batches: In a round.
        """
        rng = generator(0, "lengths")
        rows = rng.integers(len(self.texts), size=(_BATCHES, batches, examples))
        padded = examples * self.texts[rows].max(axis=-1)  # [_BATCHES, batches]
        largest = padded.max(axis=-1)
        if self.prompts is None:
            return float(largest.mean()), float(examples)
        written = (self.texts - self.prompts)[rows].sum(axis=-1)
        return float(largest.mean()), float(written.max(axis=-1).mean())


def typical_lengths(context: RunContext) -> Lengths | None:
    """Returns the lengths of a prepared run's training texts; None where they are on the clients' own nodes."""
    split = FederatedDataset(context.data, context.experiment.data).all_train()
    if not len(split):
        return None
    prompts = None if split.prompts is None else np.asarray(split.prompts)
    return Lengths(texts=np.asarray(split.lengths), prompts=prompts)
