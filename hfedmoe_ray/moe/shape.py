"""A model's MoE shape and sizes from its config.json: planning before anything is loaded.

Our own encoder is counted by arithmetic, without torch. A model of a transformers family is built once without storage
and counted, and so is any with LoRA; the answer is kept, so that torch is needed the first time only. Tests hold every
number equal to the real model's. Legend: L MoE layers, E experts, H hidden.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfedmoe_ray.config.model import Model, Upcycle
from hfedmoe_ray.context import cache_dir
from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.factors import adapted_shape
from hfedmoe_ray.moe.skeleton import describe
from hfedmoe_ray.moe.sources import read_config, resolve
from hfedmoe_ray.moe.store import Task
from hfedmoe_ray.moe.upcycle.target import DENSE_FAMILIES, upcycled_config
from hfedmoe_ray.types import ModelShape

ENCODER_FAMILY = "hfedmoe_encoder"
MOE_FAMILIES = (
    ENCODER_FAMILY,
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "switch_transformers",
)
"""Families with a layout, by transformers' model_type: the keys of `moe.layout.FAMILIES`, readable without torch."""
_ENCODERS = ("bert", ENCODER_FAMILY, "switch_transformers")
"""Families that write nothing after a prompt by a decoder alone."""
_TWO_STACKS = ("switch_transformers",)
"""Families with an encoder and a decoder."""
_BYTES = 4
"""Everything is trained, sent and counted in fp32."""


def read_shape(model: Model, num_labels: int = 0, cache: Path | None = None) -> ModelShape:
    """Returns the shape of a configured model without loading it.

    Args:
        model: Section `model` of the configuration.
        num_labels: Classes, C. 0 where they are not known yet: the head, a few kilobytes, is then not counted.
        cache: Cache directory; shapes lie in `shapes/<key>.json`. Default: `cache_dir()`.

    Raises:
        ModelError: The source cannot be found, or its family is not known.
        ConfigError: `model.upcycle` or `model.lora` does not fit the model.
    """
    config = read_config(resolve(model.source, model.revision, config_only=True))
    check_family(config, model.upcycle, model.task)
    if model.upcycle is not None:
        config = upcycled_config(config, model.upcycle)
    if model.lora is None and config["model_type"] == ENCODER_FAMILY:
        return _encoder_shape(config, model, num_labels)
    skeleton = describe(config, num_labels, model.trainable, cache or cache_dir(), model.task)
    if model.lora is None:
        return skeleton.shape
    return adapted_shape(
        skeleton.shape,
        model.lora,
        model.trainable,
        expert_shapes=skeleton.expert_shapes,
        transposed=skeleton.transposed,
        projections=skeleton.projections,
        stored_bytes=2 if _published_in_bf16(config) and model.upcycle is None else _BYTES,
    )


def check_family(config: Mapping[str, Any], upcycle: Upcycle | None, task: Task) -> str:
    """Returns the family of a config.json.

    Raises:
        ModelError: It is neither MoE, nor dense with `upcycle`; or it cannot do the task.
    """
    family = str(config["model_type"])
    if family not in (*DENSE_FAMILIES, *MOE_FAMILIES):
        raise ModelError(
            f"model.source: models of the family {family!r} are not supported. Supported are "
            f"{', '.join(DENSE_FAMILIES)} (dense; made a Mixture of Experts by `model.upcycle`) and "
            f"{', '.join(MOE_FAMILIES)}. How to add a family: docs/adding-a-family.md."
        )
    if task == "causal" and family in _ENCODERS:
        raise ModelError(
            f"model.task: a model of the family {family!r} is asked to write (`causal`), but it only reads: it has no "
            "head for a next token. Choose a decoder, such as a mixtral or an olmoe, or write `task: classification`"
            + (", or `task: seq2seq`." if family in _TWO_STACKS else ".")
        )
    if task == "seq2seq" and family not in _TWO_STACKS:
        raise ModelError(
            f"model.task: `seq2seq` needs an encoder that reads and a decoder that writes, and a model of the family "
            f"{family!r} has not both. Choose {' or '.join(_TWO_STACKS)}, or write `task: causal`."
        )
    if family in DENSE_FAMILIES and upcycle is None:
        raise ModelError(
            "model.upcycle is missing: the model is dense and has no experts to choose from. "
            "Write e.g. `upcycle: {how: split, experts: 16, top_k: 4}`."
        )
    if family not in DENSE_FAMILIES and upcycle is not None:
        raise ModelError(f"model.upcycle: the model is a Mixture of Experts already ({family}). Remove `upcycle`.")
    return family


def _published_in_bf16(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says so, by its present key or the earlier one."""
    return config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def _encoder_shape(config: Mapping[str, Any], model: Model, num_labels: int) -> ModelShape:
    hidden, neurons = config["hidden_size"], config["intermediate_size"]
    experts, size, layers = config["num_experts"], config["expert_size"], config["moe_layers"]
    tables = (config["vocab_size"] + config["max_position_embeddings"] + config["type_vocab_size"]) * hidden
    attention = 4 * (hidden * hidden + hidden) + 2 * hidden  # query, key, value, output, and its norm
    dense = 2 * hidden * neurons + neurons + hidden
    norm = 2 * hidden
    depth = config["num_hidden_layers"]
    first = min(layers)
    router_and_head = len(layers) * experts * hidden + num_labels * (hidden + 1)
    # Dense FFNs whose place experts take: their output biases stay and serve all experts.
    replaced = 0 if config.get("adapters") else len(layers)
    top = (depth - first) * (attention + norm) + replaced * hidden
    rest = tables + norm + first * (attention + norm) + (depth - replaced) * dense
    return _shape(
        model,
        layers=len(layers),
        experts=experts,
        top_k=config["num_experts_per_tok"],
        hidden=hidden,
        expert=2 * hidden * size + size,
        groups=(router_and_head, top, rest),
        tables=tables,
    )


def _shape(
    model: Model,
    *,
    layers: int,
    experts: int,
    top_k: int,
    hidden: int,
    expert: int,
    groups: tuple[int, int, int],
    tables: int,
) -> ModelShape:
    """Turns element counts into bytes; `groups` are (routers and head, top, rest), which train in this order."""
    training = {"experts": 1, "top": 2, "full": 3}[model.trainable]
    return ModelShape(
        layers=layers,
        experts=experts,
        top_k=top_k,
        hidden=hidden,
        expert_bytes=_BYTES * expert,
        shared_bytes=_BYTES * sum(groups[:training]),
        frozen_bytes=_BYTES * sum(groups[training:]),
        table_bytes=_BYTES * tables,
    )
