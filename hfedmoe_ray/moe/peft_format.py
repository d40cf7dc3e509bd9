"""Our LoRA factors as an adapter that peft reads, and back, bit for bit.

peft adapts a fused tensor of experts as one: A [E*r, in], and B [out, E*r] in which the experts alternate, so that
`B.reshape(out, r, E)[:, :, e]` is expert e's. Where experts are modules, each has a plain adapter of its own, like the
linear maps of attention. Every parameter's place in the adapter is read off the model that peft itself builds.

Legend: E experts, r rank.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hfedmoe_ray.config.lora import Lora
from hfedmoe_ray.config.section import Precision
from hfedmoe_ray.context import PreparedModel
from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.factors import attention_shapes, factor_shapes, matrices
from hfedmoe_ray.moe.layout import MoELayout
from hfedmoe_ray.moe.prepare import save_full
from hfedmoe_ray.moe.subset import skeleton
from hfedmoe_ray.types import LORA_A, LORA_B, Array, ExpertKey, Weights

TENSORS = "adapter_model.safetensors"
BASE = "base"
"""Directory, beside the adapter's files, of the model it belongs on."""
_PREFIX = "base_model.model."
_PLAIN: Mapping[str, Any] = {
    "peft_type": "LORA",
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""What adapter_config.json says of plain LoRA of one rank and scale."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter in our own terms."""

    lora: Lora
    experts: Mapping[ExpertKey, Mapping[str, Array]]
    """Factors of every expert."""
    attention: Mapping[str, Array]
    """Factors of attention by full parameter name; empty if it is not adapted."""


def save_peft(
    prepared: PreparedModel, weights: Weights, lora: Lora, directory: Path, dtype: Precision = "fp32"
) -> None:
    """Writes trained factors as a peft adapter, and under `base` the model it belongs on.

    The base holds whatever else has trained (routers, task head, norms), and what quantised experts stand for: with the
    adapter loaded on it by `peft.PeftModel.from_pretrained` it computes what was trained.

    Args:
        prepared: The prepared model.
        weights: Trained weights.
        lora: What they were trained with.
        directory: Where to write; made if need be.
        dtype: What the base is rounded to. A base that was published in bf16 is the same in it, but for what else has
            trained; factors stay as they were trained.
    """
    model, layout = skeleton(prepared.path)
    config = _config(layout, lora)
    tensors: dict[str, Array] = {}
    for place in _places(model, layout, config):
        for part in (LORA_A, LORA_B):
            if place.name is None:
                tensors[place.key(part)] = weights.shared[f"{place.module}.{part}.default.weight"]
            else:
                factors = [weights.experts[expert][f"{place.name}.{part}"] for expert in place.experts]
                tensors[place.key(part)] = _fuse(factors, part)
    directory.mkdir(parents=True, exist_ok=True)
    save_full(prepared, _without_correction(weights), directory / BASE, lora, dtype=dtype)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, directory / TENSORS)
    config.inference_mode = True
    config.base_model_name_or_path = BASE
    config.save_pretrained(str(directory))


def load_peft(prepared: PreparedModel, directory: Path) -> Adapter:
    """Reads a peft adapter of all experts, and of attention if it has that, for a prepared model.

    Args:
        prepared: The model the adapter was made for; its tensors decide names and shapes.
        directory: Holds adapter_config.json and adapter_model.safetensors.

    Raises:
        ModelError: There is no adapter, it is of a kind we do not train, or it does not fit the model.
    """
    lora = _read_config(directory)
    try:
        found = load_file(directory / TENSORS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{directory} holds no peft adapter that can be read: {error}") from error
    model, layout = skeleton(prepared.path)
    attends = any(f"{_PREFIX}{name}.{LORA_A}.weight" in found for name in layout.projections)
    lora = lora.model_copy(update={"attention": attends})
    expert_shapes = factor_shapes(layout.expert_shapes, layout.transposed, lora.rank)
    experts: dict[ExpertKey, dict[str, Array]] = {key: {} for key in layout.expert_keys()}
    attention: dict[str, Array] = {}
    for place in _places(model, layout, _config(layout, lora)):
        for part in (LORA_A, LORA_B):
            array = found.pop(place.key(part), None)
            if place.name is None:
                name = f"{place.module}.{part}.default.weight"
                attention[name] = _fitting(array, attention_shapes(layout.projections, lora.rank)[name], place, part)
                continue
            rank, inputs = expert_shapes[f"{place.name}.{LORA_A}"]
            outputs, _ = expert_shapes[f"{place.name}.{LORA_B}"]
            count = len(place.experts)
            fused = _fitting(array, (count * rank, inputs) if part == LORA_A else (outputs, rank * count), place, part)
            for key, factor in zip(place.experts, _split(fused, part, count), strict=True):
                experts[key][f"{place.name}.{part}"] = factor
    if found:
        raise ModelError(
            f"{directory} adapts what we do not: {', '.join(sorted(found)[:3])}. Only experts and attention from the "
            "first MoE layer up can have factors here."
        )
    ordered = {key: {name: factors[name] for name in expert_shapes} for key, factors in experts.items()}
    return Adapter(lora=lora, experts=ordered, attention=attention)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """One module that peft adapts."""

    module: str
    """Its full name, without peft's prefix."""
    name: str | None
    """Which tensor of an expert it adapts; None: attention."""
    experts: tuple[ExpertKey, ...] = ()
    """Of which experts."""

    def key(self, part: str) -> str:
        """Name of a factor in the adapter's file."""
        return f"{_PREFIX}{self.module}.{part}.weight"


def _places(model: Any, layout: MoELayout, config: Any) -> Iterator[_Place]:
    """Yields what peft adapts in a model without storage, which it rebuilds for that."""
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer, ParamWrapper

    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    modules = {f"{block}.{layout.experts_name}": layer for layer, block in enumerate(layout.block_names)}
    for full, module in adapted.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = full.removeprefix(_PREFIX)
        layer = next((layer for experts, layer in modules.items() if f"{name}.".startswith(f"{experts}.")), None)
        if layer is None:
            yield _Place(module=name, name=None)
        elif isinstance(module, ParamWrapper):
            every = tuple(ExpertKey(layer, expert) for expert in range(layout.num_experts))
            yield _Place(module=name, name=module.parameter_name, experts=every)
        else:
            expert, tensor = name.split(".")[-2:]
            yield _Place(module=name, name=tensor, experts=(ExpertKey(layer, int(expert.removeprefix("expert_"))),))


def _config(layout: MoELayout, lora: Lora) -> Any:
    """The LoraConfig that adapts what ours does."""
    from peft import LoraConfig

    modules = list(layout.projections) if lora.attention else []
    parameters = []
    for layer, block in enumerate(layout.block_names):
        experts = getattr(layout.blocks[layer], layout.experts_name)
        for name in matrices(layout.expert_shapes, layout.transposed):
            if hasattr(experts, name):
                parameters.append(f"{block}.{layout.experts_name}.{name}")
            else:
                each = (f"expert_{expert}" for expert in range(layout.num_experts))
                modules += [f"{block}.{layout.experts_name}.{expert}.{name}" for expert in each]
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=modules,
        target_parameters=parameters or None,
        lora_dropout=0.0,
        bias="none",
    )


def _read_config(directory: Path) -> Lora:
    """Reads adapter_config.json; raises ModelError for what is not plain LoRA of one rank."""
    try:
        fields = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory} holds no peft adapter: {error}") from error
    unusual = [name for name in _PLAIN if fields.get(name, _PLAIN[name]) not in (_PLAIN[name], None)]
    if unusual:
        raise ModelError(
            f"{directory}: the adapter has {', '.join(f'{name}: {fields[name]}' for name in unusual)}; only plain LoRA "
            "of one rank and scale can be read."
        )
    return Lora(rank=fields["r"], alpha=fields["lora_alpha"])


def _fitting(array: Array | None, shape: tuple[int, ...], place: _Place, part: str) -> Array:
    if array is None or array.shape != shape:
        what = "is missing" if array is None else f"has shape {array.shape}"
        raise ModelError(f"the adapter does not fit the model: {place.key(part)} {what}, expected {shape}.")
    return array


def _fuse(factors: list[Array], part: str) -> Array:
    """Factors of all experts as peft keeps them: A [E*r, in], B [out, r*E]."""
    if part == LORA_A:
        return np.concatenate(factors)
    stacked: Array = np.stack(factors, axis=-1)  # [out, r, E]
    return stacked.reshape(len(stacked), -1)


def _split(fused: Array, part: str, experts: int) -> list[Array]:
    """The inverse of `_fuse`."""
    if part == LORA_A:
        return np.split(fused, experts)
    stacked = fused.reshape(len(fused), -1, experts)  # [out, r, E]
    return [np.ascontiguousarray(stacked[:, :, expert]) for expert in range(experts)]


def _without_correction(weights: Weights) -> Weights:
    """The same weights with every B at zero."""

    def silenced(arrays: Mapping[str, Array]) -> dict[str, Array]:
        return {name: np.zeros_like(a) if f".{LORA_B}" in name else a for name, a in arrays.items()}

    experts = {key: silenced(arrays) for key, arrays in weights.experts.items()}
    return replace(weights, shared=silenced(weights.shared), experts=experts)
