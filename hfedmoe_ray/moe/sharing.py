"""Frozen tensors of one process as the tensors of others: the same memory of a GPU, or of the machine.

On a GPU every process that reads a prepared model would have a copy of its frozen part. Here one process, the holder,
reads it; it exports a handle for each tensor, from which another process makes a tensor in the same memory (CUDA IPC).
Then n clients of a GPU need one frozen part and n times what trains. On a CPU files mapped into memory are shared
already and clients read those; the same protocol over the machine's shared memory is there so that it can be tested.

A handle is made for one process and used once. The memory lives as long as the holder's tensors.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from hfedmoe_ray.config.lora import Lora
from hfedmoe_ray.moe.frozen_experts import experts_file
from hfedmoe_ray.moe.store import BASE


@dataclass(frozen=True)
class Handle:
    """How another process of this machine gets at a tensor: a function of torch, or ours, and its arguments."""

    rebuild: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    nbytes: int


Handles = Mapping[str, Handle]
"""By file and name, as in `read_frozen`."""


def read_frozen(prepared: Path, lora: Lora | None, device: torch.device) -> dict[str, Tensor]:
    """Reads what never trains of a prepared model onto a device, by "file/name".

    Everything outside experts and, where factors train over them, the experts too: those of a layer stacked, by
    "file/layer.name" (`frozen_experts`). On a CPU the tensors lie in memory that can be shared.
    """
    frozen = {
        f"{BASE}/{name}": tensor.to(device) if device.type == "cuda" else tensor.clone()
        for name, tensor in _tensors(prepared / BASE)
    }
    if lora is not None:
        file = experts_file(lora.base)
        frozen |= {f"{file}/{name}": tensor for name, tensor in _stacks(prepared / file, device)}
    return frozen


def _stacks(path: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yields the experts' tensors of each layer as one, by "layer.name", with the expert as first dimension."""
    with safe_open(path, framework="pt") as file:
        layers: dict[str, dict[int, str]] = {}
        for full in file.keys():  # noqa: SIM118 - not a mapping
            layer, expert, name = full.split(".", 2)
            layers.setdefault(f"{layer}.{name}", {})[int(expert)] = full
        for stack, experts in layers.items():
            first = file.get_tensor(experts[0])
            stacked = torch.empty((len(experts), *first.shape), dtype=first.dtype, device=device)
            for expert, full in experts.items():
                stacked[expert].copy_(file.get_tensor(full))
            yield stack, stacked


def part(frozen: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """Those tensors of `read_frozen` that are of one file, by name."""
    return {name.removeprefix(f"{file}/"): one for name, one in frozen.items() if name.startswith(f"{file}/")}


def export(tensors: Mapping[str, Tensor]) -> dict[str, Handle]:
    """Makes handles for one other process. The tensors must outlive their use there."""
    return {name: _handle(tensor) for name, tensor in tensors.items()}


def alias(handles: Handles) -> dict[str, Tensor]:
    """Makes tensors in the exporting process's memory."""
    return {name: handle.rebuild(*handle.arguments) for name, handle in handles.items()}


def _handle(tensor: Tensor) -> Handle:
    if tensor.device.type == "cuda":
        rebuild, arguments = reduce_tensor(tensor)  # type: ignore[no-untyped-call]
        return Handle(rebuild, arguments, tensor.nbytes)
    shared = tensor.untyped_storage()._share_filename_cpu_()
    place = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
    return Handle(_from_shared_memory, (shared, tensor.dtype, place), tensor.nbytes)


def _from_shared_memory(
    shared: tuple[Any, ...], dtype: torch.dtype, place: tuple[int, tuple[int, ...], tuple[int, ...]]
) -> Tensor:
    storage = torch.UntypedStorage._new_shared_filename_cpu(*shared)
    return torch.empty(0, dtype=dtype).set_(storage, *place)


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            yield name, file.get_tensor(name)
