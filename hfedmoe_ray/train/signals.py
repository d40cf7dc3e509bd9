"""What a client measures of each expert while it trains, where its strategy asks for it (`types.Signal`)."""

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hfedmoe_ray.data.batches import Batch
from hfedmoe_ray.moe.routing import RoutingTape
from hfedmoe_ray.train.ranks import Ranks
from hfedmoe_ray.types import ExpertKey, FloatArray, Signal


class Signals:
    """Streams the steps of one task into [L, E] arrays."""

    def __init__(self, wanted: Collection[Signal], shape: tuple[int, int]) -> None:
        """Starts empty; what is not wanted costs nothing."""
        self._wanted = wanted
        self._weight = np.zeros(shape)
        self._sums: dict[Signal, FloatArray] = {signal: np.zeros(shape) for signal in wanted}
        self._steps = np.zeros(shape)

    @torch.no_grad()
    def add_examples(self, tape: RoutingTape, batch: Batch, logits: Tensor, labels: Tensor) -> None:
        """Adds a forward pass. Of an example that asks for several predictions, it is their mean that counts.

        Args:
            tape: Its routing.
            batch: Its examples, B of them.
            logits: One row for each prediction, [B, C] or [N, V].
            labels: [B] or [N].
        """
        values: dict[Signal, Tensor] = {}
        if "accuracy" in self._wanted:
            values["accuracy"] = (logits.argmax(dim=-1) == labels).double()
        if "loss" in self._wanted:
            values["loss"] = cross_entropy(logits.float(), labels, reduction="none").double()
        if not values:
            return
        if batch.targets is not None:
            values = {signal: _means(value, batch) for signal, value in values.items()}
        # Which example a real token belongs to, [T], in layers of an encoder (or all) and of a decoder.
        sides = [torch.from_numpy(batch.owners(decoder=decoder)) for decoder in (False, True)]
        for layer, index in enumerate(tape.index):
            assert index is not None
            experts = self._weight.shape[1]
            tokens = torch.zeros(batch.examples, experts + 1, dtype=torch.float64, device=index.device)
            of = sides[tape.decodes(layer)].to(index.device)[:, None].expand_as(index)
            tokens.index_put_((of, index), tokens.new_ones(()), accumulate=True)
            tokens = tokens[:, :experts]  # [B, E] tokens of an example that were sent to an expert
            self._weight[layer] += tokens.sum(dim=0).cpu().numpy()
            for signal, value in values.items():
                self._sums[signal][layer] += (value @ tokens).cpu().numpy()

    @torch.no_grad()
    def add_gradients(
        self, active: Iterable[ExpertKey], parameters: Mapping[ExpertKey, Mapping[str, nn.Parameter]]
    ) -> None:
        """Adds the gradients of a step before the optimizer takes it; `active` are the experts that have one."""
        if "gradient" not in self._wanted:
            return
        for key in active:
            gradients = [p.grad for p in parameters[key].values() if p.grad is not None]
            self._sums["gradient"][key] += float(sum(g.double().square().sum() for g in gradients))
            self._steps[key] += 1

    def add_estimates(self, squared: Mapping[ExpertKey, float]) -> None:
        """Adds squared gradient norms that were estimated without a backward pass, each as of one step."""
        for key, value in squared.items():
            self._sums["gradient"][key] += value
            self._steps[key] += 1

    def become_all(self, ranks: Ranks) -> None:
        """Adds up over a client's ranks what each has measured on its examples; they have the same gradients."""
        own = [self._weight, *(self._sums[signal] for signal in sorted(self._sums) if signal != "gradient")]
        if self._wanted:
            for one, summed in zip(own, ranks.gather(np.stack(own)).sum(axis=0), strict=True):
                one[:] = summed

    def result(self) -> dict[Signal, FloatArray]:
        """The signals, in the order of their names."""
        found: dict[Signal, FloatArray] = {}
        for signal in sorted(self._sums):
            divisor = self._steps if signal == "gradient" else self._weight
            found[signal] = np.divide(self._sums[signal], divisor, out=np.zeros_like(divisor), where=divisor > 0)
        return found


def _means(value: Tensor, batch: Batch) -> Tensor:
    """Means over the predictions of each example, [B], of values [N]."""
    owner = torch.from_numpy(batch.asked).to(value.device)
    sums = value.new_zeros(batch.examples).index_add(0, owner, value)
    counts = torch.bincount(owner, minlength=batch.examples)
    return sums / counts.to(value).clamp_min(1)
