"""A prepared model on disk: the form in which server and workers read it. Torch-free.

    tokenizer files                transformers' own
    model_config.json              transformers' config.json under another name: beside a config.json of a family that
                                   it does not know, AutoTokenizer warns
    base.safetensors               every parameter and buffer that is not an expert's, by full name, in fp32
    experts.safetensors            every expert tensor as "layer.expert.name": in fp32, or in bf16 where the source is
                                   published in bf16 throughout, which is exact and half the bytes
    experts.int8.safetensors       the same with quantised matrices, where LoRA trains over them (`quantised`);
    experts.nf4.safetensors        made when first asked for
    means.safetensors              mean output of every expert over calibration tokens, [L, E, H]
    meta.json                      family, what each parameter is, hash of all tensors, what upcycling cost

Safetensors files are memory-mapped by those who compute: the frozen base exists once per node, in the page cache.
Non-persistent buffers (position numbers, rotary frequencies) are stored too, so that a model built without storage is
complete once it was given what is in the file.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from safetensors import safe_open

from hfedmoe_ray.context import PreparedModel
from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.types import Array, ExpertKey

FORMAT = 5
"""Raised whenever the files above change; models are then prepared anew."""
BASE, EXPERTS, MEANS = "base.safetensors", "experts.safetensors", "means.safetensors"
CONFIG, META = "model_config.json", "meta.json"

Group = Literal["expert", "router", "head", "top", "rest"]
"""What a parameter is: see `MoELayout.groups`."""
Trainable = Literal["experts", "top", "full"]
Task = Literal["classification", "causal", "seq2seq"]

TRAINABLE_GROUPS: Mapping[Trainable, frozenset[Group]] = {
    "experts": frozenset({"router", "head"}),
    "top": frozenset({"router", "head", "top"}),
    "full": frozenset({"router", "head", "top", "rest"}),
}
"""Groups of shared parameters that train, by the configuration's `model.trainable`."""


class LinearSize(NamedTuple):
    """The size of a linear map."""

    outputs: int
    inputs: int
    bias: bool

    @property
    def parameters(self) -> int:
        """Numbers in its weight and bias."""
        return self.outputs * (self.inputs + self.bias)


@dataclass(frozen=True, kw_only=True)
class Meta:
    """meta.json."""

    format: int = FORMAT
    family: str
    task: Task
    """What is on top: a head that classifies, or a language model's own, of a decoder alone or after an encoder."""
    sha256: str
    """Over names, shapes and bytes of all tensors."""
    groups: Mapping[str, Group]
    """Group of every non-expert parameter by full name."""
    router_layers: Mapping[str, int]
    """MoE layer of every router parameter."""
    projections: Mapping[str, LinearSize]
    """Linear maps of attention that LoRA can adapt (`MoELayout.projections`)."""
    transposed: bool
    """Whether expert matrices are stored as [in, out]."""
    upcycling: list[dict[str, Any]]
    """What turning the dense model into a MoE lost, per layer (`upcycle.LayerReport`); empty if nothing did."""


def write_meta(directory: Path, meta: Meta) -> None:
    """Writes meta.json."""
    (directory / META).write_text(json.dumps(vars(meta), indent=2))


def read_meta(directory: Path) -> Meta:
    """Reads meta.json; raises ModelError if the directory holds no prepared model of this format."""
    try:
        fields = {"projections": {}, "transposed": False} | json.loads((directory / META).read_text())
        sizes = {name: LinearSize(*size) for name, size in fields["projections"].items()}
        meta = Meta(**fields | {"projections": sizes})
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{directory} holds no prepared model ({error}). On another node than the one that started the run, the "
            "cache directory must be shared, or the model prepared there too ($HFEDMOE_CACHE names it)."
        ) from error
    if meta.format != FORMAT:
        raise ModelError(
            f"{directory} was prepared by another version (format {meta.format}). Delete it and run again."
        )
    return meta


def check(prepared: PreparedModel) -> None:
    """Raises ModelError unless this node holds the very model that the run was started with."""
    found = read_meta(prepared.path).sha256
    if found != prepared.sha256:
        raise ModelError(
            f"{prepared.path} holds another model here ({found[:12]}) than where the run was started "
            f"({prepared.sha256[:12]}). Delete that directory on this node, or share the cache between nodes."
        )


def read_experts(directory: Path) -> dict[ExpertKey, dict[str, Array]]:
    """Returns fp32 copies of all experts' tensors in (layer, expert) order."""
    experts: dict[ExpertKey, dict[str, Array]] = {}
    for name, array in _arrays(directory / EXPERTS):
        layer, expert, tensor = name.split(".", 2)
        experts.setdefault(ExpertKey(int(layer), int(expert)), {})[tensor] = array
    return dict(sorted(experts.items()))


def read_expert_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of one expert, without reading any."""
    with safe_open(directory / EXPERTS, framework="np") as file:
        first = {name.removeprefix("0.0."): name for name in file.keys() if name.startswith("0.0.")}  # noqa: SIM118
        return {name: tuple(file.get_slice(full).get_shape()) for name, full in first.items()}


def stored_bytes(directory: Path) -> int:
    """Returns the bytes of a number of an expert as it is stored: 4, or 2 of a model published in bf16."""
    with safe_open(directory / EXPERTS, framework="np") as file:
        return 2 if file.get_slice(next(iter(file.keys()))).get_dtype() == "BF16" else 4


def read_shared(directory: Path, trainable: Trainable) -> dict[str, Array]:
    """Returns copies of the routers and the other shared parameters that train, in the model's order."""
    groups = read_meta(directory).groups
    names = [name for name, group in groups.items() if group in TRAINABLE_GROUPS[trainable]]
    with safe_open(directory / BASE, framework="np") as file:
        return {name: file.get_tensor(name) for name in names}


def read_means(directory: Path) -> Array:
    """Returns the experts' mean outputs, [L, E, H] float32."""
    return dict(_arrays(directory / MEANS))["means"]


def _arrays(path: Path) -> Iterator[tuple[str, Array]]:
    with safe_open(path, framework="np") as file:
        widened = _Bf16(path)
        for name in file.keys():  # noqa: SIM118 - not a mapping
            yield name, widened.read(name) if file.get_slice(name).get_dtype() == "BF16" else file.get_tensor(name)


class _Bf16:
    """Reads bfloat16 tensors of a safetensors file, of which NumPy knows nothing, as fp32 arrays of the same values."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._header = json.loads(file.read(size))
        self._bytes = np.memmap(path, np.uint8, "r", offset=8 + size)

    def read(self, name: str) -> Array:
        start, end = self._header[name]["data_offsets"]
        upper = self._bytes[start:end].view(np.uint16).astype(np.uint32)
        values: Array = (upper << 16).view(np.float32).reshape(self._header[name]["shape"])
        return values
