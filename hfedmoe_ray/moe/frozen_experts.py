"""The experts of a prepared model that never train: one by one, or all of a layer as one stack.

On a CPU each is mapped from its file when it is asked for, so that absent ones are never read. Where another process
holds them (`sharing`), it holds whole layers, stacked, and single experts are views.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.quantised import NF4, Half, Int8, Quantisation, file_name, require
from hfedmoe_ray.moe.store import EXPERTS
from hfedmoe_ray.types import ExpertKey

Form = Literal["exact"] | Quantisation
"""Of frozen experts, as `lora.base` names it."""
Frozen = Tensor | Half | Int8 | NF4
"""A frozen tensor of an expert, or of several as a stack."""


def experts_file(form: Form) -> str:
    """Returns the name of the file in a prepared model that holds its experts in a form."""
    return EXPERTS if form == "exact" else file_name(form)


class FrozenExperts:
    """The experts in one form, on one device."""

    def __init__(
        self,
        prepared: Path,
        form: Form,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        transposed: bool,
        device: torch.device,
        held: Mapping[str, Tensor],
    ) -> None:
        """Maps the file; nothing is read yet.

        Args:
            prepared: Directory of the prepared model.
            form: Of the experts.
            shapes: Of each tensor of one expert as a dense one has it, by name.
            transposed: Whether matrices are stored as [in, out].
            device: Where they are used.
            held: Stacks by "layer.name" that are on the device already (`sharing.read_frozen`); may be empty.

        Raises:
            ModelError: The form is not there, or cannot be used on this machine.
        """
        self._form, self._shapes, self._transposed, self._device, self._held = form, shapes, transposed, device, held
        path = prepared / experts_file(form)
        if form != "exact":
            require(form)
        if not path.is_file():
            raise ModelError(
                f"{prepared} holds no {form} experts. On another node than the one that started the run, the cache "
                "directory must be shared, or the model prepared there too ($HFEDMOE_CACHE names it)."
            )
        self._file: Any = safe_open(path, framework="pt")

    def one(self, key: ExpertKey, name: str) -> Frozen:
        """Returns one tensor of one expert."""
        return self._made(name, [self._part(key, part) for part in self._parts(name)], ())

    def stacks(self, layer: int, experts: Sequence[int]) -> tuple[dict[str, Frozen], Sequence[int]]:
        """Returns the tensors of some experts of a layer as one by name, and the experts that they are of, in order.

        Those are all experts of the layer, and no copy, where they are held; else a copy of those asked for.
        """
        stacks: dict[str, Frozen] = {}
        order = experts
        for name in self._shapes:
            parts = self._parts(name)
            if f"{layer}.{parts[0]}" in self._held:
                tensors = [self._held[f"{layer}.{part}"] for part in parts]
                order = range(len(tensors[0]))
            else:
                tensors = [torch.stack([self._read(ExpertKey(layer, e), part) for e in experts]) for part in parts]
            stacks[name] = self._made(name, tensors, (len(tensors[0]),))
        return stacks, order

    def _parts(self, name: str) -> tuple[str, ...]:
        """Names of the stored tensors that a tensor consists of."""
        if self._form == "exact" or len(self._shapes[name]) == 1:
            return (name,)
        return f"{name}.{self._form}", f"{name}.scale"

    def _part(self, key: ExpertKey, part: str) -> Tensor:
        stack = self._held.get(f"{key.layer}.{part}")
        return self._read(key, part) if stack is None else stack[key.expert]

    def _read(self, key: ExpertKey, part: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(f"{key.layer}.{key.expert}.{part}")
        return tensor.to(self._device)

    def _made(self, name: str, tensors: Sequence[Tensor], stacked: tuple[int, ...]) -> Frozen:
        values, *scale = tensors
        if len(self._shapes[name]) == 1:
            return values.float()
        if not scale:
            return Half(values, self._transposed) if values.dtype == torch.bfloat16 else values
        if self._form == "int8":
            return Int8(values, scale[0], self._transposed)
        return NF4(values, scale[0], torch.Size((*stacked, *self._shapes[name])), self._transposed)
