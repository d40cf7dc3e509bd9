"""A model's MoE shape and sizes by arithmetic on its config.json: planning before anything is loaded.

Torch-free; a test holds every number equal to the real model's. Legend: L MoE layers, E experts, H hidden, F ffn.
"""

from collections.abc import Mapping
from typing import Any

from hfedmoe_ray.config.schema import Model, Upcycle
from hfedmoe_ray.errors import ConfigError, ModelError
from hfedmoe_ray.moe.sources import read_config, resolve
from hfedmoe_ray.types import ModelShape

DENSE_FAMILY = "bert"
MOE_FAMILIES = ("hfedmoe_encoder", "mixtral")
_BYTES = 4
"""Everything is trained, sent and counted in fp32."""


def read_shape(model: Model, num_labels: int = 0) -> ModelShape:
    """Returns the shape of a configured model without loading it.

    Args:
        model: Section `model` of the configuration.
        num_labels: Classes, C. 0 where they are not known yet: the head, a few kilobytes, is then not counted.

    Raises:
        ModelError: The source cannot be found, or its family is not known.
        ConfigError: `model.upcycle` does not fit the model.
    """
    config = read_config(resolve(model.source, model.revision, config_only=True))
    family = check_family(config, model.upcycle)
    if family == DENSE_FAMILY:
        assert model.upcycle is not None
        config = upcycled_config(config, model.upcycle)
    if family == "mixtral":
        return _mixtral_shape(config, model, num_labels)
    return _encoder_shape(config, model, num_labels)


def check_family(config: Mapping[str, Any], upcycle: Upcycle | None) -> str:
    """Returns the family of a config.json; raises ModelError unless it is MoE, or dense with `upcycle`."""
    family = str(config["model_type"])
    if family not in (DENSE_FAMILY, *MOE_FAMILIES):
        raise ModelError(
            f"model.source: models of the family {family!r} are not supported. Supported are {DENSE_FAMILY} (dense; "
            f"made a Mixture of Experts by `model.upcycle`) and {', '.join(MOE_FAMILIES)}."
        )
    if family == DENSE_FAMILY and upcycle is None:
        raise ModelError(
            "model.upcycle is missing: the model is dense and has no experts to choose from. "
            "Write e.g. `upcycle: {how: split, experts: 16, top_k: 4}`."
        )
    if family != DENSE_FAMILY and upcycle is not None:
        raise ModelError(f"model.upcycle: the model is a Mixture of Experts already ({family}). Remove `upcycle`.")
    return family


def upcycled_config(config: Mapping[str, Any], upcycle: Upcycle) -> dict[str, Any]:
    """Returns the config.json of a dense BERT after upcycling; raises ConfigError if that is not possible."""
    depth, neurons = int(config["num_hidden_layers"]), int(config["intermediate_size"])
    layers = sorted(upcycle.layers) if upcycle.layers is not None else list(range(depth // 2, depth))
    if layers[-1] >= depth:
        raise ConfigError(
            f"model.upcycle.layers: there is no layer {layers[-1]}; the model has layers 0 to {depth - 1}."
        )
    if upcycle.how == "split" and neurons % upcycle.experts:
        fitting = [count for count in range(2, min(neurons, 256) + 1) if neurons % count == 0]
        raise ConfigError(
            f"model.upcycle.experts: the {neurons} neurons of a layer cannot be split into {upcycle.experts} equal "
            f"experts. Choose one of {', '.join(map(str, fitting))}, or `how: copy`."
        )
    dropped = {"model_type", "architectures", "transformers_version", "_name_or_path", "id2label", "label2id"}
    return {
        **{name: value for name, value in config.items() if name not in dropped},
        "moe_layers": layers,
        "num_experts": upcycle.experts,
        "num_experts_per_tok": upcycle.top_k,
        "expert_size": neurons // upcycle.experts if upcycle.how == "split" else neurons,
        "combine": "sum" if upcycle.how == "split" else "mean",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": False,
    }


def _encoder_shape(config: Mapping[str, Any], model: Model, num_labels: int) -> ModelShape:
    hidden, neurons = config["hidden_size"], config["intermediate_size"]
    experts, size, layers = config["num_experts"], config["expert_size"], config["moe_layers"]
    embeddings = (config["vocab_size"] + config["max_position_embeddings"] + config["type_vocab_size"] + 2) * hidden
    attention = 4 * (hidden * hidden + hidden) + 2 * hidden  # query, key, value, output, and its norm
    dense = 2 * hidden * neurons + neurons + hidden
    norm = 2 * hidden
    depth = config["num_hidden_layers"]
    first = min(layers)
    router_and_head = len(layers) * experts * hidden + num_labels * (hidden + 1)
    top = (depth - first) * (attention + norm) + len(layers) * hidden  # and the shared output biases
    rest = embeddings + first * (attention + norm) + (depth - len(layers)) * dense
    return _shape(
        model,
        layers=len(layers),
        experts=experts,
        top_k=config["num_experts_per_tok"],
        hidden=hidden,
        expert=2 * hidden * size + size,
        groups=(router_and_head, top, rest),
    )


def _mixtral_shape(config: Mapping[str, Any], model: Model, num_labels: int) -> ModelShape:
    # What a config.json leaves out has transformers' defaults.
    hidden, size, depth = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    key_heads = config.get("num_key_value_heads") or (heads if "num_key_value_heads" in config else 8)
    head = config.get("head_dim") or hidden // heads
    experts = config.get("num_local_experts", 8)
    attention = 2 * hidden * heads * head + 2 * hidden * key_heads * head
    return _shape(
        model,
        layers=depth,
        experts=experts,
        top_k=config.get("num_experts_per_tok", 2),
        hidden=hidden,
        expert=3 * hidden * size,
        groups=(
            depth * experts * hidden + num_labels * hidden,
            depth * (attention + 2 * hidden) + hidden,
            config["vocab_size"] * hidden,
        ),
    )


def _shape(
    model: Model, *, layers: int, experts: int, top_k: int, hidden: int, expert: int, groups: tuple[int, int, int]
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
    )
