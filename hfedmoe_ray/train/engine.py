"""The DeepSpeed engine of one client. The only module that imports deepspeed.

A client is one rank of its own world: it joins a process group whose rendezvous lives in its own memory, so there is
no master port to agree on or to collide over, and any number of clients start on one machine at once. (Gloo still binds
loopback sockets on ports that the kernel picks.)

The engine is built for the round's trainable parameters and thrown away after it, so nothing of one client's optimizer
reaches the next. That costs 0.012 s where 24 of a benchmark model's 96 experts train and 0.03 s where all do
(`hfedmoe bench step`), and about as much again to free the optimizer's state: under 1 % of ten steps. Reuse would spare
the first only where the next client trains the very same experts, and would have to clear every state and, under ZeRO,
refresh every flat copy.
"""

import gc
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from hfedmoe_ray.config.schema import LocalTraining
from hfedmoe_ray.types import ExpertKey

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

import deepspeed  # after DS_ACCELERATOR is set: it is read on import
import deepspeed.ops

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# This op is compiled when the first engine is built, for up to a minute, and serves ranks that share a machine;
# a client has one rank.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


ExpertParameters = Mapping[ExpertKey, Mapping[str, nn.Parameter]]
"""Parameters of experts by tensor name."""


def _join_own_world() -> None:
    """Makes this process the only rank of an in-memory process group, once."""
    if torch.distributed.is_initialized():
        return
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in world.items():
        os.environ.setdefault(name, value)
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)


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
    ) -> None:
        """Builds a DeepSpeed engine around `module` whose optimizer holds exactly these parameters.

        Args:
            module: The whole model.
            shared: Parameters that train in every step.
            experts: Parameters of every expert that may train, by tensor name.
            local: Learning rate and weight decay.
            config: DeepSpeed's, from `deepspeed_config`.
        """
        _join_own_world()
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
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        if not self._partitions:
            # Reduction between ranks would fill in gradients of zeros. There is one rank: nothing to reduce.
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
        wanted = [*self._shared, *(p for key in active for p in self._experts[key])]
        if not wanted:
            return
        torch.autograd.backward(self._engine.scale(loss) if self._partitions else loss, inputs=wanted)
        self._active |= {None, *active}

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
