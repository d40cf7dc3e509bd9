"""A dense model to a Mixture of Experts, layer by layer.

The MoE is built without storage and given the dense model's own tensors; a dense FFN is let go as soon as its experts
are written. At no time does anything exist twice but one FFN.

Legend: N tokens, S sequence, B batch, H hidden, D neurons of the dense FFN, F neurons of an expert, E experts, K top-k.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from hfedmoe_ray.config.model import Upcycle
from hfedmoe_ray.moe.layout import MoELayout
from hfedmoe_ray.moe.layout.base import assign, on_meta
from hfedmoe_ray.moe.store import Task
from hfedmoe_ray.moe.subset import skeleton_from
from hfedmoe_ray.moe.upcycle.calibrate import Distillation, LayerInputs, LayerReport
from hfedmoe_ray.moe.upcycle.clusters import balanced_clusters
from hfedmoe_ray.moe.upcycle.dense import DenseFamily, family_of
from hfedmoe_ray.moe.upcycle.target import upcycled_config
from hfedmoe_ray.seeds import derive_seed
from hfedmoe_ray.types import ExpertKey

_UNIFORM = 1e-3
"""Norm of an uncalibrated router row."""
_COPY_STD = 0.02
"""Standard deviation of a router over copies or adapters."""


def upcycle(
    dense: PreTrainedModel,
    config: Upcycle,
    num_labels: int,
    seed: int,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    task: Task = "classification",
) -> tuple[PreTrainedModel, list[LayerReport]]:
    """Builds a MoE of a dense model. A classifier's head is zero: the caller's to draw.

    A language model's is the embedding table where they are tied, else the caller's to put in place.

    Args:
        dense: The dense base model, fp32. It is used up: the MoE takes its tensors.
        config: How.
        num_labels: Classes of a classifier's head.
        seed: Run seed.
        batches: Token ids and masks of calibration texts, [B, S] each. Read by `split` with calibration; without any
            the routers stay at the centroids.
        task: What is on top.

    Returns:
        The model, and for `split` with calibration what each layer lost.

    Raises:
        ConfigError: The model cannot be upcycled in this way.
        ModelError: The model cannot be upcycled without changing what it computes.
    """
    family = family_of(dense)
    fields = upcycled_config(dense.config.to_dict(), config)
    model, layout = skeleton_from(fields if task == "causal" else {**fields, "num_labels": num_labels}, task)
    _take_over(dense, model, family)
    model.tie_weights()
    for name in layout.heads:
        for parameter in model.get_submodule(name).to_empty(device="cpu").parameters():
            torch.nn.init.zeros_(parameter)
    distils = config.how == "split" and config.calibration_steps > 0
    inputs = LayerInputs(dense, family.layers_name, batches if distils else ())
    moe_layers = {_layer_number(name): layer for layer, name in enumerate(layout.block_names)}
    reports = []
    for number, source in enumerate(dense.get_submodule(family.layers_name).children()):
        tokens = inputs.advance(source, family.ffn_name)
        if number not in moe_layers:
            continue
        made = _MoELayer(family, layout, moe_layers[number], family.neurons(source))
        source.to("meta")  # lets go of the FFN once `made` does; the rest is the MoE's by now
        if config.how == "copy":
            made.copy(config.noise, derive_seed(seed, "upcycle-copy", number))
            continue
        if config.how == "adapters":
            made.adapt(config.adapter_hidden, derive_seed(seed, "upcycle-adapters", number))
            continue
        made.split(derive_seed(seed, "upcycle-split", number))
        if len(tokens):
            generator = torch.Generator().manual_seed(derive_seed(seed, "upcycle-calibrate", number))
            reports.append(made.distil(number, tokens, config.calibration_steps, generator))
    assert not [name for name in on_meta(model) if task == "classification" or "lm_head" not in name]
    return model.eval(), reports


def _take_over(dense: PreTrainedModel, model: PreTrainedModel, family: DenseFamily) -> None:
    """Makes what is not a neuron's the MoE's own: the tensors themselves, buffers included."""
    wanted = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    for name, tensor in [*dense.named_parameters(), *dense.named_buffers()]:
        places = (re.sub(pattern, place, name) for pattern, place in family.places if re.search(pattern, name))
        place = next((place for place in places if place in wanted), None)
        if place is not None:
            assign(model, place, tensor.detach())


class _MoELayer:
    """One MoE layer that is made of a dense FFN."""

    def __init__(self, family: DenseFamily, layout: MoELayout, layer: int, neurons: Mapping[str, Tensor]) -> None:
        """Gives the layer's router and experts storage.

        Args:
            family: Of the dense model.
            layout: Of the MoE.
            layer: The MoE layer.
            neurons: The FFN's, [D, ...].
        """
        self._family, self._layout, self._layer, self._neurons = family, layout, layer, neurons
        self._block = layout.blocks[layer]
        getattr(self._block, layout.experts_name).to_empty(device="cpu")
        (self._router,) = layout.router(layer).to_empty(device="cpu").parameters()  # [E, H]
        equal, _ = layout.choose(layer, torch.zeros(1, layout.num_experts), layout.top_k)  # [1, K]
        self._weight = float(equal[0, 0])
        """Gate weight of each of K equally good experts, at which summands of one FFN are to add up to it."""

    def copy(self, noise: float, seed: int) -> None:
        """Makes every expert the whole FFN plus noise, and the router random."""
        generator = torch.Generator().manual_seed(seed)
        deviations = {name: noise * tensor.std() for name, tensor in self._neurons.items()}
        for expert in range(self._layout.num_experts):
            noisy = {
                name: tensor + deviations[name] * torch.randn(tensor.shape, generator=generator)
                for name, tensor in self._neurons.items()
            }
            self._write(expert, noisy, 1.0)
        self._router.data.normal_(std=_COPY_STD, generator=generator)

    def adapt(self, size: int, seed: int) -> None:
        """Makes every expert an adapter of `size` neurons whose second layer is zero, and the router random.

        The first layer keeps the variance of its input: N(0, 1/H).
        """
        generator = torch.Generator().manual_seed(seed)
        hidden = self._layout.hidden
        for expert in range(self._layout.num_experts):
            new = {
                "up_proj": torch.randn(size, hidden, generator=generator) / hidden**0.5,
                "up_bias": torch.zeros(size),
                "down_proj": torch.zeros(size, hidden),
            }
            self._write(expert, new, 1.0)
        self._router.data.normal_(std=_COPY_STD, generator=generator)

    def split(self, seed: int) -> None:
        """Deals the FFN's neurons to the experts, and points the router at the cluster centroids."""
        directions = self._neurons[self._family.direction]
        labels = balanced_clusters(directions.numpy(), self._layout.num_experts, seed)
        for expert in range(self._layout.num_experts):
            members = torch.from_numpy(np.flatnonzero(labels == expert))  # [F]
            # The gate weights are what the MoE's family makes of them: their scale is folded into the experts.
            self._write(expert, {name: tensor[members] for name, tensor in self._neurons.items()}, 1.0 / self._weight)
            self._router.data[expert] = _UNIFORM * normalize(directions[members].mean(dim=0), dim=0)

    def distil(self, number: int, tokens: Tensor, steps: int, generator: torch.Generator) -> LayerReport:
        """Calibrates the router, and adjusts the output bias, if there is one, by the mean error that remains.

        Args:
            number: Number of the layer in the dense model.
            tokens: Inputs of its FFN, [N, H].
            steps: Optimizer steps.
            generator: Draws tokens and batches.
        """
        distillation = Distillation(self._layout, self._layer, tokens, self._weight, generator)
        report = distillation.calibrate(number, steps)
        if self._family.output_bias is not None:
            bias = self._block.get_parameter(self._family.output_bias)
            bias.data = bias.data + distillation.mean_lack()
        return report

    def _write(self, expert: int, neurons: Mapping[str, Tensor], scale: float) -> None:
        self._layout.write_expert(ExpertKey(self._layer, expert), self._family.expert(neurons, scale))


def _layer_number(block_name: str) -> int:
    """The number, among all layers, of the layer that holds a MoE block."""
    match = re.search(r"\.(\d+)\.", block_name)
    assert match is not None
    return int(match[1])
