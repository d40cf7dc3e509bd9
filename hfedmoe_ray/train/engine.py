"""The DeepSpeed engine of one client. The only module that imports deepspeed.

A client is one rank of its own world (`train.alone`): there is no master port to agree on or to collide over, and any
number of clients start on one machine at once.

The engine is built for the round's trainable parameters and thrown away after it, so nothing of one client's optimizer
reaches the next. That costs 0.012 s where 24 of a benchmark model's 96 experts train and 0.03 s where all do
(`hfedmoe bench step`), and about as much again to free the optimizer's state: under 1 % of ten steps. Reuse would spare
the first only where the next client trains the very same experts, and would have to clear every state and, under ZeRO,
refresh every flat copy.

A client of several ranks (`train.ranks`) has a `RankedEngine` on each. Ranks do not send the same experts to work, so
their backward passes meet other parameters in another order, while DeepSpeed's reduction, which starts within the
backward pass, takes every rank's to come in the same: it would add up what does not belong together, or wait for ever.
There gradients are therefore gathered first and handed to DeepSpeed afterwards, all of them, in one order.
"""

import gc
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hfedmoe_ray.config.schema import LocalTraining
from hfedmoe_ray.train.alone import join_own_world
from hfedmoe_ray.train.environment import absent
from hfedmoe_ray.train.ranks import Ranks
from hfedmoe_ray.types import ExpertKey

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

# DeepSpeed's autotuner, which nobody calls, would import MLflow where it is installed: a second of each client's start.
with absent("mlflow"):
    import deepspeed  # after DS_ACCELERATOR is set: it is read on import
    import deepspeed.ops

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# This op is compiled when the first engine is built, for up to a minute, and serves bfloat16 between CPU ranks; what
# clients' ranks exchange is fp32.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


_ALONE = Ranks()
ExpertParameters = Mapping[ExpertKey, Mapping[str, nn.Parameter]]
"""Parameters of experts by tensor name."""


class _Members:
    """What DeepSpeed asks, as of Megatron's `mpu`, to learn which processes an engine spans."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def get_data_parallel_group(self) -> Any:
        return self._ranks.group

    def get_data_parallel_world_size(self) -> int:
        return self._ranks.size

    def get_data_parallel_rank(self) -> int:
        return self._ranks.rank

    def get_model_parallel_group(self) -> Any:
        # None would be taken for all ranks, and a norm be added up as if each had another part of the model.
        return self._ranks.own

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


class _MaskedAdamW(torch.optim.AdamW):
    """AdamW that leaves parameters without a gradient alone, and groups that are not `active`.

    ZeRO gives a group without gradients zeros, which AdamW turns into a step by momentum and weight decay. It steps
    group by group, so here is where a masked expert can be kept from moving. The fused kernel passes once over
    weights, gradients and moments instead of eight times: a sixth of the time, on the CPU too, equal within rounding.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]], local: LocalTraining) -> None:
        named = [{"params": list(group), "active": False} for group in groups]
        super().__init__(named, lr=local.learning_rate, weight_decay=local.weight_decay, fused=True)

    def step(self, closure: Any = None) -> Any:
        """Steps the active ones of the groups that are in place (ZeRO puts in one at a time)."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["active"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


class Engine:
    """Trains shared parameters and experts; only the experts a batch selects are differentiated and stepped."""

    def __init__(
        self,
        module: nn.Module,
        shared: Sequence[nn.Parameter],
        experts: ExpertParameters,
        local: LocalTraining,
        config: dict[str, Any],
        *,
        ranks: Ranks = _ALONE,
    ) -> None:
        """Builds a DeepSpeed engine around `module` whose optimizer holds exactly these parameters.

        Args:
            module: The whole model.
            shared: Parameters that train in every step.
            experts: Parameters of every expert that may train, by tensor name.
            local: Learning rate and weight decay.
            config: DeepSpeed's, from `deepspeed_config`.
            ranks: The client's; this process alone, even where it is one of several that have joined.
        """
        join_own_world()
        self._module = module
        self._shared = tuple(shared)
        self._experts = {key: tuple(named.values()) for key, named in experts.items()}
        self._partitions = config["zero_optimization"]["stage"] > 0
        keys: list[ExpertKey | None] = [None, *self._experts]
        groups = dict(zip(keys, (self._shared, *self._experts.values()), strict=True))
        if not self._partitions:
            # Masked parameters are told by having no gradient. A group each would only cost: torch and DeepSpeed
            # compare every new group with all earlier ones.
            groups = {None: tuple(parameter for group in groups.values() for parameter in group)}
        groups = {key: group for key, group in groups.items() if group}
        optimizer = _MaskedAdamW(list(groups.values()), local)
        self._groups = dict(zip(groups, optimizer.param_groups, strict=True))
        self._active: set[ExpertKey | None] = set()
        mpu = None if ranks.group is None else _Members(ranks)
        seen = module if self._partitions else _trained(module, optimizer)
        self._engine, *_ = deepspeed.initialize(model=seen, optimizer=optimizer, config=config, mpu=mpu)
        if not self._partitions:
            # DeepSpeed's reduction between ranks would fill in gradients of zeros.
            self._engine.enable_backward_allreduce = False

    def __enter__(self) -> Self:
        """Leaves the engine ready."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Releases the engine, its optimizer state and the gradients.

        `destroy` leaves two hooks on the module, through which every engine ever built would stay alive, and run on
        each later forward pass; the engine and what it holds refer to each other, so only the collector frees them.
        """
        self._engine.module_forward_pre_hook.remove()
        self._engine.module_forward_post_hook.remove()
        self._engine.destroy()
        del self._engine
        for group in (self._shared, *self._experts.values()):
            for parameter in group:
                parameter.grad = None
        gc.collect()

    def forward(self, **inputs: Any) -> Any:
        """Returns what the module makes of `inputs`; a loss computed from it goes to `backward`.

        Where ZeRO partitions gradients, its engine has to see the outputs. At stage 0 it would only refuse them.
        """
        return self._engine(**inputs) if self._partitions else self._module(**inputs)

    def backward(self, loss: Tensor, active: Collection[ExpertKey]) -> None:
        """Adds the gradients of the shared parameters and of the `active` experts to those of earlier calls.

        Autograd is told which gradients are wanted, so it computes no weight gradient of any other expert, nor
        anything below the lowest parameter that is wanted. (Setting `requires_grad` between the forward and the
        backward pass would not do: the products would be computed and thrown away.) DeepSpeed's own `backward` cannot
        be told; it supports a backward pass of the caller's where it partitions, and at stage 0 does nothing more.
        """
        wanted = self.wanted(active)
        if not wanted:
            return
        torch.autograd.backward(self._engine.scale(loss) if self._partitions else loss, inputs=wanted)
        self._active |= {None, *active}

    def take(self, gradients: Sequence[Tensor], active: Collection[ExpertKey]) -> None:
        """Takes gradients that the caller has made, of `wanted`, in place of those of `backward`; not under ZeRO."""
        for parameter, gradient in zip(self.wanted(active), gradients, strict=True):
            parameter.grad = gradient
        self._active |= {None, *active}

    def reduce(self, active: Collection[ExpertKey]) -> None:
        """Adds the gradients of `backward` up over the client's ranks, before `step`.

        Args:
            active: The experts that some rank had in `backward`, the same on all.
        """

    def step(self) -> None:
        """Moves the parameters that `backward` was asked for since the last step.

        The others keep their exact bytes and their optimizer state, momentum and weight decay included.
        """
        if not self._active:
            return
        for key, group in self._groups.items():
            group["active"] = key in self._active
        self._engine.step()
        self._active.clear()

    def wanted(self, active: Collection[ExpertKey]) -> list[nn.Parameter]:
        """The parameters that a step moves: shared ones, then those of the `active` experts."""
        return [*self._shared, *(p for key in active for p in self._experts[key])]


def _trained(module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.ParameterList:
    """The parameters that an optimizer holds, in the module's order.

    Where nothing is partitioned that is all DeepSpeed has to see. It passes over all parameters of a model in Python a
    dozen times when an engine is made, and twice in each step.
    """
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return nn.ParameterList(parameter for parameter in module.parameters() if parameter in held)


class RankedEngine(Engine):
    """The engine of one of several ranks, which makes the same steps as those of the others."""

    def __init__(
        self,
        module: nn.Module,
        shared: Sequence[nn.Parameter],
        experts: ExpertParameters,
        local: LocalTraining,
        config: dict[str, Any],
        *,
        ranks: Ranks,
    ) -> None:
        """Builds the engine together with the other ranks.

        DeepSpeed knows only what trains: it copies the first rank's parameters to all, and the frozen ones are mapped
        from memory that no rank may write.
        """
        trained = [*shared, *(parameter for named in experts.values() for parameter in named.values())]
        super().__init__(_Handover(trained), shared, experts, local, config, ranks=ranks)
        self._computes = module
        self._ranks = ranks
        self._gradients: dict[nn.Parameter, Tensor] = {}

    def forward(self, **inputs: Any) -> Any:
        """See `Engine.forward`."""
        return self._computes(**inputs)

    def backward(self, loss: Tensor, active: Collection[ExpertKey]) -> None:
        """See `Engine.backward`; the gradients are this rank's own until `reduce`."""
        wanted = self.wanted(active)
        if not wanted:
            return
        for parameter, gradient in zip(wanted, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True):
            if gradient is not None:
                earlier = self._gradients.get(parameter)
                self._gradients[parameter] = gradient if earlier is None else earlier + gradient

    def reduce(self, active: Collection[ExpertKey]) -> None:
        """See `Engine.reduce`. Where ZeRO partitions, DeepSpeed adds them up, in `step`.

        An expert that no token of this rank's was sent to has a gradient of zeros here.
        """
        wanted = self.wanted(active)
        if not wanted:
            return
        self._active |= {None, *active}
        self._gradients = {
            one: self._gradients[one] if one in self._gradients else torch.zeros_like(one) for one in wanted
        }
        if not self._partitions:
            self._ranks.add_up(list(self._gradients.values()))
            for parameter, gradient in self._gradients.items():
                parameter.grad = gradient
            self._gradients = {}

    def step(self) -> None:
        """See `Engine.step`."""
        if self._gradients:
            # ZeRO takes the mean over ranks, but each has only its part of the loss.
            handed = self._engine(self._gradients) * self._ranks.size
            torch.autograd.backward(self._engine.scale(handed), inputs=list(self._gradients))
            self._gradients = {}
        super().step()


class _Handover(nn.Module):
    """Gives each parameter a gradient that has been computed already."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)

    def forward(self, gradients: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """Returns 0, with these gradients."""
        total = torch.zeros((), device=next(iter(gradients)).device)
        for parameter, gradient in gradients.items():
            total = total + _Given.apply(parameter, gradient)  # type: ignore[no-untyped-call]
        return total


class _Given(torch.autograd.Function):
    """0, with a given gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return parameter.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient * grad, None
