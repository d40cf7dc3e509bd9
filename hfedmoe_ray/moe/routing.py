"""What the routers did: recorded in each forward pass, streamed into a client's routing profile.

Gate values G_e(x) are softmax over all E experts (a family may define them otherwise: `MoELayout.gate_values`), in
float32, of real tokens only (padding is left out by the attention mask). Legend: L MoE layers, E experts, N real tokens
of a batch, K top-k, H hidden.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hfedmoe_ray.types import Array, ExpertKey, FloatArray, ModelShape, RoutingProfile

Specific = Literal["max", "q99"]


def softmax_gates(logits: Tensor) -> Tensor:
    """Returns softmax over all E experts, float32 [..., E]."""
    return torch.softmax(logits.float(), dim=-1)


class RoutingTape:
    """The routing of the latest forward pass, layer by layer. Everything on it is detached, except for `gates`."""

    def __init__(
        self, layers: int, gate_values: Callable[[Tensor], Tensor] = softmax_gates, decoder_from: int | None = None
    ) -> None:
        """Makes an empty tape.

        Args:
            layers: L.
            gate_values: Makes of logits [N, E] values that sum to 1 over E.
            decoder_from: The first layer of a decoder, where an encoder is below it that reads other tokens.
        """
        self._layers = layers
        self._decoder_from = layers if decoder_from is None else decoder_from
        self._gate_values = gate_values
        self.differentiable = False
        """Whether to keep `gates`, for a loss that depends on the routing."""
        self.begin(None)

    def begin(self, attention_mask: Tensor | None, decoder_mask: Tensor | None = None) -> None:
        """Starts a forward pass: forgets the last one and notes which tokens are real.

        Args:
            attention_mask: 1 for real tokens, [B, S]; None: all are.
            decoder_mask: The same of what a decoder reads, where that is something else.
        """
        self._real = None if attention_mask is None else attention_mask.reshape(-1).bool()
        self._real_decoder = None if decoder_mask is None else decoder_mask.reshape(-1).bool()
        self.probabilities: list[Tensor | None] = [None] * self._layers
        """Gate values, [N, E] float32 per layer."""
        self.gates: list[Tensor | None] = [None] * self._layers
        """The same with their gradients' graph, where `differentiable`."""
        self.index: list[Tensor | None] = [None] * self._layers
        """The experts each token was sent to, [N, K] per layer (after re-routing, where that is done); E: to none."""
        self.outputs: dict[ExpertKey, tuple[Tensor, int]] = {}
        """Sum of each held expert's outputs [H], before gate weights, and the number of tokens behind it."""

    def decodes(self, layer: int) -> bool:
        """Whether a layer belongs to a decoder that reads other tokens than the layers below it."""
        return layer >= self._decoder_from

    def real(self, layer: int) -> Tensor | None:
        """Which tokens of a layer are real, [B * S]; None: all."""
        return self._real_decoder if self.decodes(layer) else self._real

    @property
    def tokens(self) -> int:
        """Real tokens of the pass; what an encoder and a decoder read counts together."""
        sides = {self.decodes(layer): layer for layer in range(self._layers)}
        return sum(len(_recorded(self.probabilities[layer])) for layer in sides.values())

    def record(self, layer: int, logits: Tensor, index: Tensor) -> None:
        """Notes the router logits [T, E] or [B, S, E] over all experts, and the chosen experts [T, K], of one layer."""
        logits, index = logits.flatten(end_dim=-2), index.detach()
        if not self.differentiable:
            logits = logits.detach()
        real = self.real(layer)
        if real is not None:
            logits, index = logits[real], index[real]
        gates = self._gate_values(logits)
        self.probabilities[layer] = gates.detach()
        self.gates[layer] = gates if self.differentiable else None
        self.index[layer] = index

    @torch.no_grad()
    def record_output(self, key: ExpertKey, outputs: Tensor) -> None:
        """Notes what one expert returned for its tokens, [n, H]."""
        self.outputs[key] = (outputs.detach().sum(dim=0, dtype=torch.float32), len(outputs))

    @torch.no_grad()
    def record_outputs(self, layer: int, counts: Sequence[int], outputs: Tensor) -> None:
        """Notes what all experts of a layer returned, [P, H] sorted by expert, with so many tokens of each."""
        lengths = torch.tensor(counts, device=outputs.device)
        sums = torch.segment_reduce(outputs.detach().float(), "sum", lengths=lengths, axis=0)
        self.outputs |= {ExpertKey(layer, e): (sums[e], count) for e, count in enumerate(counts) if count}

    def gate_values(self) -> list[Tensor]:
        """Returns all gate values, [N, E] float32 of each layer."""
        return [_recorded(layer) for layer in self.probabilities]

    def counts(self) -> FloatArray:
        """Returns how many tokens were sent to each expert, [L, E]."""
        experts = _recorded(self.probabilities[0]).shape[-1]
        return np.stack(
            [
                torch.bincount(_recorded(index).flatten(), minlength=experts + 1)[:experts].cpu().numpy()
                for index in self.index
            ]
        ).astype(np.float64)


class ProfileAccumulator:
    """Streams forward passes into one `RoutingProfile` and mean expert outputs, in O(L * E * H) memory."""

    def __init__(self, shape: ModelShape, specific: Specific) -> None:
        """Starts empty. `specific` is the statistic of eq. 4: the largest gate value, or its 99 % quantile (ours).

        A quantile cannot be streamed exactly: q99 is the largest of the batches' own quantiles.
        """
        self._specific_of = specific
        self._hidden = shape.hidden
        zeros = np.zeros((shape.layers, shape.experts))
        self._gate, self._gate_log, self._specific, self._routed = zeros, zeros.copy(), zeros.copy(), zeros.copy()
        self._tokens = 0
        self._seen = np.zeros(shape.layers)
        """Tokens of each layer: fewer than all where an encoder reads some of them, and a decoder the others."""
        self._outputs: dict[ExpertKey, tuple[FloatArray, int]] = {}

    def add(self, tape: RoutingTape) -> None:
        """Adds the latest forward pass."""
        for layer, gates in enumerate(tape.gate_values()):
            if len(gates):
                self._gate[layer] += _numpy(gates.sum(dim=0, dtype=torch.float64))
                self._gate_log[layer] += _numpy(torch.xlogy(gates, gates).sum(dim=0, dtype=torch.float64))
                largest = _numpy(_specific(gates, self._specific_of))
                self._specific[layer] = np.maximum(self._specific[layer], largest)
                self._seen[layer] += len(gates)
        self._routed += tape.counts()
        self._tokens += tape.tokens
        if tape.outputs:
            # Together: on a GPU each transfer is waited for.
            totals = _numpy(torch.stack([total for total, _ in tape.outputs.values()]))
            for total, (key, (_, tokens)) in zip(totals, tape.outputs.items(), strict=True):
                self._add_output(key, total, tokens)

    def merge(self, other: "ProfileAccumulator") -> None:
        """Adds everything another one has seen, such as the forward passes of one batch."""
        self._gate += other._gate
        self._gate_log += other._gate_log
        self._specific = np.maximum(self._specific, other._specific)
        self._routed += other._routed
        self._tokens += other._tokens
        self._seen += other._seen
        for key, (total, tokens) in other._outputs.items():
            self._add_output(key, total, tokens)

    def routing(self) -> FloatArray:
        """Returns everything added but the experts' outputs, as numbers for other ranks, [4 L E + L + 1]."""
        sums = (self._gate, self._gate_log, self._routed, self._specific)
        return np.concatenate([np.stack(sums).ravel(), self._seen, [self._tokens]])

    def become_routing(self, ranks: FloatArray) -> None:
        """Takes the `routing` of all ranks together, [k, 4 L E + L + 1], in place of what was added here."""
        sums = ranks.sum(axis=0)
        shape, values = (4, *self._gate.shape), 4 * self._gate.size
        self._gate, self._gate_log, self._routed, _ = sums[:values].reshape(shape)
        self._specific = ranks[:, :values].max(axis=0).reshape(shape)[3]
        self._seen = sums[values:-1]
        self._tokens = int(sums[-1])

    def outputs(self, keys: Sequence[ExpertKey]) -> FloatArray:
        """Returns the summed outputs of some experts and the tokens behind them, for other ranks, [P, H + 1]."""
        none = (np.zeros(self._hidden), 0)
        return np.array([[*total, tokens] for total, tokens in (self._outputs.get(key, none) for key in keys)])

    def become_outputs(self, keys: Sequence[ExpertKey], ranks: FloatArray) -> None:
        """Takes the `outputs` of all ranks together, [k, P, H + 1], in place of those added here."""
        sums = ranks.sum(axis=0)
        self._outputs = {key: (row[:-1], int(row[-1])) for key, row in zip(keys, sums, strict=True)}

    def _add_output(self, key: ExpertKey, total: FloatArray, tokens: int) -> None:
        before, count = self._outputs.get(key, (0.0, 0))
        self._outputs[key] = (before + total, count + tokens)

    def profile(self) -> RoutingProfile:
        """Returns the profile of everything added: of one batch, it is what eq. 15 selects by.

        KL (eq. 11) is streamed exactly: (1/N) sum G log(G / p) = (1/N) sum G log G - p log p with p = (1/N) sum G.
        """
        tokens = np.maximum(self._seen, 1.0)[:, None]
        usage = self._gate / tokens
        return RoutingProfile(
            usage=usage,
            specific=self._specific.copy(),
            kl=_information(self._gate_log / tokens, usage),
            routed=self._routed.copy(),
            tokens=self._tokens,
        )

    def means(self) -> dict[ExpertKey, tuple[Array, int]]:
        """Returns the mean output [H] (float32) of each held expert over the tokens sent to it, and their number."""
        return {
            key: ((total / tokens).astype(np.float32), tokens)
            for key, (total, tokens) in sorted(self._outputs.items())
            if tokens
        }


def _information(gate_log: FloatArray, usage: FloatArray) -> FloatArray:
    """Mean of G log G minus p log p; never below 0, which rounding alone could cause."""
    return np.maximum(gate_log - usage * np.log(np.where(usage > 0, usage, 1.0)), 0.0)


def _specific(gates: Tensor, specific: Specific) -> Tensor:
    """Largest gate value, or its 99 % quantile, over tokens: [N, E] -> [E]."""
    return gates.amax(dim=0) if specific == "max" else torch.quantile(gates, 0.99, dim=0)


def _recorded(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise RuntimeError("the routing tape is empty: run a forward pass first")
    return tensor


def _numpy(tensor: Tensor) -> FloatArray:
    return tensor.double().cpu().numpy()
