"""One actor per shared GPU that reads the frozen part of the model once, for the clients of that GPU (`moe.sharing`).

It asks Ray for no share of the GPU: clients are capped to their shares of what it leaves (`client.cap`). It belongs to
the server, not to a client, so that it outlives them all. If it dies, tasks that read its memory fail; the next actor
that starts on that GPU gets another holder.
"""

from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hfedmoe_ray.config.lora import Lora
from hfedmoe_ray.runtime import timeouts
from hfedmoe_ray.train.environment import ENVIRONMENT


class FrozenHolder:
    """Holds the frozen tensors of one prepared model on the one device it sees."""

    def __init__(self, prepared: Path, lora: Lora | None) -> None:
        """Reads them."""
        import torch

        from hfedmoe_ray.moe.sharing import read_frozen

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._frozen = read_frozen(prepared, lora, device)

    def live(self) -> None:
        """Answers as long as this process is there."""

    def handles(self) -> Any:
        """Handles for one client (`moe.sharing.Handles`)."""
        from hfedmoe_ray.moe.sharing import export

        return export(self._frozen)


_RemoteHolder: Any = ray.remote(max_restarts=0, num_cpus=0, num_gpus=0)(FrozenHolder)


def start_holder(prepared: Path, lora: Lora | None, node: str, gpu: str) -> Any:
    """Starts the holder of a GPU.

    Args:
        prepared: Directory of the prepared model on that node.
        lora: LoRA, whose frozen experts are then held too.
        node: Ray's id of the node.
        gpu: The GPU as CUDA_VISIBLE_DEVICES names it to a client there; empty for the CPU.
    """
    # Ray hides every GPU from an actor that asks for none, unless it is told to leave that to us.
    environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": gpu, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    return _RemoteHolder.options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), runtime_env={"env_vars": environment}
    ).remote(prepared, lora)


def alive(holder: Any) -> bool:
    """Whether a holder answers."""
    try:
        ray.get(holder.live.remote(), timeout=timeouts.FETCH)
    except ray.exceptions.RayError:
        return False
    return True
