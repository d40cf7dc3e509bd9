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

    def __init__(self, layers: int, gate_values: Callable[[Tensor], Tensor] = softmax_gates) -> None:
        """Makes an empty tape for L layers; `gate_values` makes of logits [N, E] values that sum to 1 over E."""
        self._layers = layers
        self._gate_values = gate_values
        self.differentiable = False
        """Whether to keep `gates`, for a loss that depends on the routing."""
        self.begin(None)

    def begin(self, attention_mask: Tensor | None) -> None:
        """Starts a forward pass: forgets the last one and notes which tokens are real, from a mask [B, S]."""
        self.real = None if attention_mask is None else attention_mask.reshape(-1).bool()
        """Which tokens are real, [B * S]; None: all."""
        self.probabilities: list[Tensor | None] = [None] * self._layers
        """Gate values, [N, E] float32 per layer."""
        self.gates: list[Tensor | None] = [None] * self._layers
        """The same with their gradients' graph, where `differentiable`."""
        self.index: list[Tensor | None] = [None] * self._layers
        """The experts each token was sent to, [N, K] per layer (after re-routing, where that is done); E: to none."""
        self.outputs: dict[ExpertKey, tuple[Tensor, int]] = {}
        """Sum of each held expert's outputs [H], before gate weights, and the number of tokens behind it."""

    def record(self, layer: int, logits: Tensor, index: Tensor) -> None:
        """Notes the router logits [T, E] or [B, S, E] over all experts, and the chosen experts [T, K], of one layer."""
        logits, index = logits.flatten(end_dim=-2), index.detach()
        if not self.differentiable:
            logits = logits.detach()
        if self.real is not None:
            logits, index = logits[self.real], index[self.real]
        gates = self._gate_values(logits)
        self.probabilities[layer] = gates.detach()
        self.gates[layer] = gates if self.differentiable else None
        self.index[layer] = index

    @torch.no_grad()
    def record_output(self, key: ExpertKey, outputs: Tensor) -> None:
        """Notes what one expert returned for its tokens, [n, H]."""
        self.outputs[key] = (outputs.detach().sum(dim=0, dtype=torch.float32), len(outputs))

    def stacked(self) -> Tensor:
        """Returns all gate values, [L, N, E] float32."""
        return torch.stack([_recorded(layer) for layer in self.probabilities])

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
        self._outputs: dict[ExpertKey, tuple[FloatArray, int]] = {}

    def add(self, tape: RoutingTape) -> None:
        """Adds the latest forward pass."""
        gates = tape.stacked()
        if gates.shape[1] == 0:
            return
        self._gate += _numpy(gates.sum(dim=1, dtype=torch.float64))
        self._gate_log += _numpy(torch.xlogy(gates, gates).sum(dim=1, dtype=torch.float64))
        self._specific = np.maximum(self._specific, _numpy(_specific(gates, self._specific_of)))
        self._routed += tape.counts()
        self._tokens += gates.shape[1]
        for key, (total, tokens) in tape.outputs.items():
            self._add_output(key, _numpy(total), tokens)

    def merge(self, other: "ProfileAccumulator") -> None:
        """Adds everything another one has seen, such as the forward passes of one batch."""
        self._gate += other._gate
        self._gate_log += other._gate_log
        self._specific = np.maximum(self._specific, other._specific)
        self._routed += other._routed
        self._tokens += other._tokens
        for key, (total, tokens) in other._outputs.items():
            self._add_output(key, total, tokens)

    def routing(self) -> FloatArray:
        """Returns everything added but the experts' outputs, as numbers for the client's other ranks, [4 L E + 1]."""
        sums = (self._gate, self._gate_log, self._routed, self._specific)
        return np.concatenate([np.stack(sums).ravel(), [self._tokens]])

    def become_routing(self, ranks: FloatArray) -> None:
        """Takes the `routing` of all ranks together, [k, 4 L E + 1], in place of what was added here."""
        sums = ranks.sum(axis=0)
        shape = (4, *self._gate.shape)
        self._gate, self._gate_log, self._routed, _ = sums[:-1].reshape(shape)
        self._specific = ranks[:, :-1].max(axis=0).reshape(shape)[3]
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
        tokens = max(self._tokens, 1)
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
    """Largest gate value, or its 99 % quantile, over tokens: [L, N, E] -> [L, E]."""
    return gates.amax(dim=1) if specific == "max" else torch.quantile(gates, 0.99, dim=1)


def _recorded(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise RuntimeError("the routing tape is empty: run a forward pass first")
    return tensor


def _numpy(tensor: Tensor) -> FloatArray:
    return tensor.double().cpu().numpy()
