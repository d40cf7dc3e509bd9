"""Trading time for memory: activations that are computed again in the backward pass instead of being kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from hfedmoe_ray.errors import ModelError


@contextmanager
def checkpointed_layers(module: nn.Module, on: bool) -> Iterator[None]:
    """Within the block, if `on`, each layer of a module in training keeps only what entered it.

    A layer runs again in the backward pass and then writes the routing tape again, with the same values: whoever reads
    the tape does so between the two, or finds no difference. The checkpoint is the non-reentrant one, which can be
    told which gradients are wanted and leaves out what only others need.

    Raises:
        ModelError: transformers knows no layers of this family that can be checkpointed.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)] if on else []
    if on and not layers:
        raise ModelError(
            f"{type(module).__name__} has no layers whose activations can be checkpointed. Write "
            "`checkpoint_activations: false` in every tier, and a smaller `micro_batch` where memory is short."
        )
    try:
        for layer in layers:
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            layer.gradient_checkpointing = True
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False
