"""LoRA factors as arrays: their names, shapes, first values and sizes. Torch-free, for servers and for planning.

A matrix W [out, in] of an expert gets factors A [r, in] and B [out, r], in files and on the wire "NAME.lora_A" and
"NAME.lora_B". A linear map of attention gets what peft calls them, "NAME.lora_A.default.weight" and so on. A starts as
peft draws it and B at zero: before any training the model is the base model, bit for bit.

Legend: r rank.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from hfedmoe_ray.config.lora import Lora
from hfedmoe_ray.context import PreparedModel
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.moe import store
from hfedmoe_ray.moe.store import LinearSize, Trainable
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.types import LORA_A, LORA_B, Array, ExpertKey, ModelShape

Shapes = Mapping[str, tuple[int, ...]]
_BYTES = 4
NF4_BLOCK = 64
"""Numbers that share one nf4 scale."""


def matrices(expert_shapes: Shapes, transposed: bool) -> dict[str, LinearSize]:
    """Returns the size of every matrix of an expert; what has one dimension is a bias and gets no factors."""
    sizes = {name: shape for name, shape in expert_shapes.items() if len(shape) == 2}
    return {
        name: LinearSize(columns if transposed else rows, rows if transposed else columns, bias=False)
        for name, (rows, columns) in sizes.items()
    }


def factor_shapes(expert_shapes: Shapes, transposed: bool, rank: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of one expert's factors by name: what trains and travels of an adapted expert."""
    return _pairs(matrices(expert_shapes, transposed), rank, "{name}.{part}")


def attention_shapes(projections: Mapping[str, LinearSize], rank: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the factors of attention by full parameter name, as peft names them."""
    return _pairs(projections, rank, "{name}.{part}.default.weight")


def replaces(name: str, projections: Mapping[str, LinearSize]) -> bool:
    """Whether a parameter belongs to an adapted linear map: it is then frozen, and its factors train in its place."""
    return name.rpartition(".")[0] in projections


def initial_experts(prepared: PreparedModel, lora: Lora, seed: int) -> dict[ExpertKey, dict[str, Array]]:
    """Returns the first factors of all experts, which are a function of the seed and the expert alone."""
    transposed = store.read_meta(prepared.path).transposed
    shapes = factor_shapes(store.read_expert_shapes(prepared.path), transposed, lora.rank)
    return {key: _draw(shapes, seed, "lora experts", *key) for key in prepared.shape.keys()}  # noqa: SIM118


def initial_shared(prepared: PreparedModel, trainable: Trainable, lora: Lora, seed: int) -> dict[str, Array]:
    """Returns the first values of the shared parameters that train: with LoRA on attention, factors in its place."""
    shared = store.read_shared(prepared.path, trainable)
    if not lora.attention:
        return shared
    projections = store.read_meta(prepared.path).projections
    kept = {name: array for name, array in shared.items() if not replaces(name, projections)}
    return kept | _draw(attention_shapes(projections, lora.rank), seed, "lora attention")


def adapted_shape(
    shape: ModelShape,
    lora: Lora,
    trainable: Trainable,
    *,
    expert_shapes: Shapes,
    transposed: bool,
    projections: Mapping[str, LinearSize],
    stored_bytes: int,
) -> ModelShape:
    """Returns a model's shape when it trains by LoRA, from its shape when it trains in full.

    Args:
        shape: When it trains in full.
        lora: What trains.
        trainable: Which shared parameters train.
        expert_shapes: Of each tensor of one expert.
        transposed: Whether an expert's matrices are stored as [in, out].
        projections: Linear maps of attention.
        stored_bytes: Of a number of an expert as it is published: 4, or 2 in bf16.

    Raises:
        ConfigError: The rank exceeds a side of a matrix.
    """
    sizes = matrices(expert_shapes, transposed)
    adapted = {**sizes, **(projections if lora.attention else {})}
    name, least = min(((n, min(size.outputs, size.inputs)) for n, size in adapted.items()), key=lambda found: found[1])
    if lora.rank > least:
        raise ConfigError(
            f"model.lora.rank is {lora.rank}, but a side of {name} has only {least}: factors of that rank would hold "
            f"more than the matrix. Write at most {least}; 4 to 16 is usual."
        )
    replaced, added = 0, 0
    if lora.attention:
        replaced = _BYTES * sum(size.parameters for size in projections.values()) if trainable != "experts" else 0
        added = _bytes(attention_shapes(projections, lora.rank))
    return replace(
        shape,
        expert_bytes=_bytes(factor_shapes(expert_shapes, transposed, lora.rank)),
        shared_bytes=shape.shared_bytes - replaced + added,
        frozen_bytes=shape.frozen_bytes + replaced,
        base_expert_bytes=base_bytes(expert_shapes, lora.base, stored_bytes),
        dense_expert_bytes=shape.expert_bytes,
    )


def base_bytes(expert_shapes: Shapes, base: str, stored_bytes: int) -> int:
    """Returns the bytes of one expert's frozen tensors in the form `lora.base`; biases are always fp32."""
    total = 0
    for shape in expert_shapes.values():
        count = int(np.prod(shape))
        if len(shape) == 1:
            total += _BYTES * count
        elif base == "exact":
            total += stored_bytes * count
        elif base == "int8":
            total += count + _BYTES * shape[0]
        else:
            total += (NF4_BLOCK // 2 + _BYTES) * -(-count // NF4_BLOCK)
    return total


def _pairs(sizes: Mapping[str, LinearSize], rank: int, pattern: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, size in sizes.items():
        shapes[pattern.format(name=name, part=LORA_A)] = (rank, size.inputs)
        shapes[pattern.format(name=name, part=LORA_B)] = (size.outputs, rank)
    return shapes


def _draw(shapes: Shapes, seed: int, purpose: str, *parts: int) -> dict[str, Array]:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), peft's default; B = 0."""
    values: dict[str, Array] = {}
    for position, (name, shape) in enumerate(shapes.items()):
        if f".{LORA_A}" in name:
            bound = shape[1] ** -0.5
            drawn = generator(seed, purpose, *parts, position).uniform(-bound, bound, shape)
            values[name] = drawn.astype(np.float32)
        else:
            values[name] = np.zeros(shape, np.float32)
    return values


def _bytes(shapes: Shapes) -> int:
    return _BYTES * sum(int(np.prod(shape)) for shape in shapes.values())
