"""Distilling the router of a split FFN from the dense one.

It costs no expert compute: with y_e(x) the output of expert e for token x, s the gate weight at which all experts
together are the FFN, and G = [y_e . y_f], an E x E matrix per token that is computed once, the squared error of the
gate weights w is (w - s)' G (w - s), and |FFN|^2 is s^2 1' G 1.

All of it is ours. Legend: N tokens, H hidden, E experts, K top-k.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from hfedmoe_ray.moe.layout import MoELayout
from hfedmoe_ray.types import ExpertKey

_LEARNING_RATE = 3e-3
_BATCH_TOKENS = 1024
_CHUNK_TOKENS = 2048
_CHUNK_ELEMENTS = 2**25
"""Most elements of the experts' outputs at a time (128 MiB); with wide models fewer tokens than `_CHUNK_TOKENS`."""
_GRAM_ELEMENTS = 2**26
"""Most elements of all G together (256 MiB); with many experts fewer tokens are used."""
_HELD_OUT = 8
"""Every eighth token is held out to measure the loss of information."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """Mean over held-out tokens of |MoE FFN - dense FFN|^2 / |dense FFN|^2, both without the output bias."""

    layer: int
    """Number of the layer in the dense model."""
    centroid_error: float
    """With the router at the cluster centroids."""
    calibrated_error: float
    """After distillation."""
    best_error: float
    """Choosing for each token the K experts most aligned with the FFN's output, at the weight s: what a perfect choice
    would leave."""


class LayerInputs:
    """What enters the FFNs of a dense model on calibration texts, one layer after the other.

    Only the states of one layer exist at a time: those of all layers of a large model would need more memory than it.
    """

    def __init__(self, dense: PreTrainedModel, layers_name: str, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Computes what enters the first layer.

        Args:
            dense: The dense model. Its layers are called by `advance` alone, so they may be taken apart after that.
            layers_name: Full name of the list of its layers.
            batches: Token ids and masks, [B, S] each.
        """
        layers, first = dense.get_submodule(layers_name), _Recorder()
        dense.set_submodule(layers_name, nn.ModuleList([first]))
        self._masks = []  # [B, S] each
        with torch.no_grad():
            for ids, mask in batches:
                dense(input_ids=ids, attention_mask=mask, use_cache=False)
                self._masks.append(mask.bool())
        dense.set_submodule(layers_name, layers)
        self._calls = first.calls

    @torch.no_grad()
    def advance(self, layer: nn.Module, ffn_name: str) -> Tensor:
        """Passes the states through the next layer; returns what entered its FFN for every real token, [N, H]."""
        seen: list[Tensor] = []

        def note(_module: nn.Module, args: tuple[Tensor]) -> None:
            seen.append(args[0])

        handle = layer.get_submodule(ffn_name).register_forward_pre_hook(note)
        inputs = []
        for call, mask in zip(self._calls, self._masks, strict=True):
            call.states = layer(call.states, *call.args, **call.kwargs)
            inputs.append(seen.pop()[mask])
        handle.remove()
        return torch.cat(inputs) if inputs else torch.zeros(0)


@dataclass
class _Call:
    states: Tensor  # [B, S, H]
    args: tuple[object, ...]
    kwargs: dict[str, object]


class _Recorder(nn.Module):
    """Stands in for all layers and notes how the first one is called: all are called alike, but for the states."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def forward(self, states: Tensor, *args: object, **kwargs: object) -> Tensor:
        self.calls.append(_Call(states, args, kwargs))
        return states


class Distillation:
    """One layer of a MoE whose experts are written, and the inputs of the dense FFN that it replaces."""

    def __init__(
        self, layout: MoELayout, layer: int, inputs: Tensor, weight: float, generator: torch.Generator
    ) -> None:
        """Computes G.

        Args:
            layout: The MoE.
            layer: Its MoE layer, whose router is to be calibrated.
            inputs: Inputs of the FFN, [N, H].
            weight: s, the gate weight at which all experts together are the FFN.
            generator: Draws the tokens and the batches.
        """
        self._layout, self._layer, self._weight, self._generator = layout, layer, weight, generator
        self._router = layout.router(layer)
        limit = max(_GRAM_ELEMENTS // layout.num_experts**2, 1)
        self._inputs = inputs[torch.randperm(len(inputs), generator=generator)[:limit]]
        held_out = torch.arange(len(self._inputs)) % _HELD_OUT == 0
        self._train, self._test = (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)
        with torch.no_grad():
            self._gram = torch.cat([y @ y.transpose(1, 2) for _, y in self._outputs(self._inputs)])  # [N, E, E]

    def calibrate(self, number: int, steps: int) -> LayerReport:
        """Distils the router.

        The loss is the relative squared error of the FFN's output, through the weights of the chosen experts, plus the
        cross-entropy of the router to the K experts most aligned with the FFN's output. Top-k passes no gradient to
        the choice itself: without the second term the error of the lower layers grows, and some experts are never
        chosen.

        Args:
            number: Number of the layer in the dense model, for the report.
            steps: Optimizer steps.
        """
        top_k = self._layout.top_k
        alignment = self._gram.sum(dim=2)  # [N, E], y_e . FFN up to a factor
        best = torch.zeros_like(alignment).scatter(1, alignment.topk(top_k, dim=1).indices, 1.0)  # [N, E]
        with torch.no_grad():
            centroid_error = float(self._error(self._test))
            best_error = float(self._relative_error(self._test, self._weight * best[self._test]))
        parameters = list(self._router.parameters())
        optimizer = torch.optim.Adam(parameters, lr=_LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        size = min(_BATCH_TOKENS, len(self._train))
        for _ in range(steps):
            rows = self._train[torch.randint(len(self._train), (size,), generator=self._generator)]
            logits = self._layout.read_routing(self._router(self._inputs[rows])).logits
            choice = -(best[rows] / top_k * log_softmax(logits, dim=1)).sum(dim=1).mean()
            optimizer.zero_grad()
            torch.autograd.backward(self._error(rows) + choice)
            optimizer.step()
            schedule.step()
        for parameter in parameters:
            parameter.grad = None
        with torch.no_grad():
            return LayerReport(
                layer=number,
                centroid_error=centroid_error,
                calibrated_error=float(self._error(self._test)),
                best_error=best_error,
            )

    @torch.no_grad()
    def mean_lack(self) -> Tensor:
        """Returns what the routed experts lack of the FFN, on average over the training tokens, [H]."""
        total = torch.zeros(self._layout.hidden)
        for tokens, outputs in self._outputs(self._inputs[self._train]):
            lack = self._weight - self._gate_weights(tokens)  # [N, E]
            total += torch.einsum("ne,neh->h", lack, outputs)
        return total / len(self._train)

    def _outputs(self, inputs: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Yields tokens [n, H] and the output of every expert for them, [n, E, H]."""
        experts = [self._layout.read_expert(ExpertKey(self._layer, e)) for e in range(self._layout.num_experts)]
        chunk = max(min(_CHUNK_TOKENS, _CHUNK_ELEMENTS // (len(experts) * inputs.shape[1])), 1)
        for tokens in torch.split(inputs, chunk):
            yield tokens, torch.stack([self._layout.expert_forward(tokens, tensors) for tensors in experts], dim=1)

    def _gate_weights(self, tokens: Tensor) -> Tensor:
        routing = self._layout.read_routing(self._router(tokens))
        absent = routing.weights.new_zeros(len(tokens), self._layout.num_experts)  # [N, E]
        return absent.scatter(1, routing.index, routing.weights)

    def _error(self, rows: Tensor) -> Tensor:
        return self._relative_error(rows, self._gate_weights(self._inputs[rows]))

    def _relative_error(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Mean over tokens of (w - s)' G (w - s) / (s^2 1' G 1); weights [N, E]."""
        gram, lack = self._gram[rows], weights - self._weight
        squared = torch.einsum("ne,nef,nf->n", lack, gram, lack)
        return (squared / (self._weight**2 * gram.sum(dim=(1, 2))).clamp_min(1e-6)).mean()
