"""Building a prepared model: the dense one upcycled, or a Mixture of Experts as it is, with a new head.

Loads the whole model once, on the node that prepares it, in fp32, or a Mixture of Experts that is published in bf16 in
that; workers never do. One thread computes, because the number of threads decides the last bits of a matrix product and
thereby the hash.

Legend: B batch, S sequence, L MoE layers, E experts, H hidden.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from hfedmoe_ray.config.model import Model
from hfedmoe_ray.data.tokenize import load_tokenizer, pad_id, tokenize
from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.layout import MoELayout, layout_of
from hfedmoe_ray.moe.quiet import quiet_transformers
from hfedmoe_ray.moe.store import BASE, CONFIG, EXPERTS, MEANS, Meta, write_meta
from hfedmoe_ray.moe.tensor_file import write_tensors
from hfedmoe_ray.moe.threads import one_thread
from hfedmoe_ray.moe.upcycle.assemble import upcycle
from hfedmoe_ray.seeds import derive_seed
from hfedmoe_ray.types import Array, ExpertKey

_TEXT_TOKENS = 64
"""Tokens of a calibration text that are read."""
_BATCH_TEXTS = 32
_MEAN_TEXTS = 64
"""Calibration texts from which the experts' first mean outputs are measured, at most."""
_MEAN_OPERATIONS = 1e12
"""Floating-point operations that may take, on one thread: large models read fewer texts."""
_HEAD_STD = 0.02
_PLAIN_DTYPES = {"F64", "F32", "F16", "BF16"}
"""Of a safetensors file: weights that are numbers by themselves."""
_UNPACKED = ("mxfp4", "fp8")
"""Quantisation methods that transformers undoes while loading: those in which GPT-OSS and DeepSeek-V3 are published."""


def build(*, source: Path, model: Model, num_labels: int, seed: int, texts: Sequence[str], directory: Path) -> None:
    """Builds a model and writes it into an existing directory (files: see `store`).

    Args:
        source: Directory of the source model.
        model: Section `model` of the configuration.
        num_labels: Classes of the new head; not read where a language model keeps its own.
        seed: Run seed; decides clustering, noise, calibration batches and the head.
        texts: Calibration texts, unlabelled; may be empty.
        directory: Where to write.

    Raises:
        ModelError: The source cannot be loaded.
    """
    tokenizer = load_tokenizer(source)
    tokenizer.save_pretrained(directory)
    upcycling: list[dict[str, Any]] = []
    writes = model.task == "causal"
    dtype = torch.bfloat16 if model.upcycle is None and _dtypes(source) == {"BF16"} else torch.float32
    with one_thread(), threadpool_limits(1), quiet_transformers():
        if model.upcycle is not None:
            kind = AutoModelForCausalLM if writes else AutoModel
            loaded = _load(kind, source, ("pooler",), _full_precision(source), dtype)
            dense = loaded.base_model
            batches = _batches(tokenizer, texts)
            module, reports = upcycle(dense, model.upcycle, num_labels, seed, batches, task=model.task)
            if writes and not module.config.tie_word_embeddings:
                module.get_output_embeddings().weight = loaded.get_output_embeddings().weight
            upcycling = [asdict(report) for report in reports]
        elif writes:
            module = _load(AutoModelForCausalLM, source, (), _full_precision(source), dtype)
        elif model.task == "seq2seq":
            module = _load(AutoModelForSeq2SeqLM, source, (), _full_precision(source), dtype)
        else:
            config = _full_precision(source, num_labels=num_labels)
            module = _load(AutoModelForSequenceClassification, source, ("score", "classifier"), config, dtype)
        if module.config.pad_token_id is None:
            module.config.pad_token_id = pad_id(tokenizer)
        layout = layout_of(module.eval())
        head = _new_head(layout, torch.Generator().manual_seed(derive_seed(seed, "head")))
        means = mean_outputs(layout, _batches(tokenizer, texts[: _mean_texts(layout)]))
    module.config.dtype = torch.float32  # of what is built of it again: what trains of it does so in fp32
    module.config.to_json_file(directory / CONFIG)
    groups = {name: group for name, group in layout.groups.items() if group != "expert"}
    named = {name: one for name, one in module.named_parameters() if name in groups} | dict(module.named_buffers())
    experts = {
        f"{key.layer}.{key.expert}.{name}": tensor
        for key in layout.expert_keys()
        for name, tensor in layout.read_expert(key).items()
    }
    files: dict[str, Mapping[str, Tensor]] = {
        BASE: {name: one.float() if one.dtype == torch.bfloat16 else one for name, one in named.items()} | head,
        EXPERTS: experts,
        MEANS: {"means": torch.from_numpy(means)},
    }
    digest = hashlib.sha256(b"".join(write_tensors(directory / name, tensors) for name, tensors in files.items()))
    write_meta(
        directory,
        Meta(
            family=layout.family,
            task=model.task,
            sha256=digest.hexdigest(),
            groups=groups,
            router_layers=layout.router_layers,
            projections=layout.projections,
            transposed=layout.transposed,
            upcycling=upcycling,
        ),
    )


@torch.no_grad()
def mean_outputs(layout: MoELayout, batches: Iterator[tuple[Tensor, Tensor]]) -> Array:
    """Returns the mean output of every expert, before gate weights, over the real tokens routed to it.

    Args:
        layout: A complete model. Where it has an encoder and a decoder, both read the texts.
        batches: Token ids and masks, [B, S] each.

    Returns:
        [L, E, H] float32; 0 for an expert no token was routed to.
    """
    totals = torch.zeros(layout.layers, layout.num_experts, layout.hidden, dtype=torch.float64)
    counts = torch.zeros(layout.layers, layout.num_experts, 1)
    real = torch.zeros(0, dtype=torch.bool)

    def note(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            tokens, *dispatch = args
            index, _ = layout.read_dispatch(*dispatch)
            for expert in torch.unique(index[index < layout.num_experts]).tolist():
                routed = tokens[(index == expert).any(dim=1) & real]
                tensors = layout.read_expert(ExpertKey(layer, expert))
                totals[layer, expert] += layout.expert_forward(routed, tensors).double().sum(dim=0)
                counts[layer, expert] += len(routed)

        return getattr(layout.blocks[layer], layout.experts_name).register_forward_pre_hook(hook)

    handles = [note(layer) for layer in range(layout.layers)]
    for ids, mask in batches:
        real = mask.bool().reshape(-1)
        both = {} if layout.start is None else {"decoder_input_ids": ids, "use_cache": False}
        layout.model(input_ids=ids, attention_mask=mask, **both)
    for handle in handles:
        handle.remove()
    means: Array = (totals / counts.clamp_min(1)).float().numpy()
    return means


def _mean_texts(layout: MoELayout) -> int:
    """How many texts the experts' first mean outputs are measured from: two operations a parameter and token."""
    rest = sum(one.numel() for name, one in layout.model.named_parameters() if layout.groups[name] != "expert")
    active = rest + layout.layers * layout.top_k * layout.expert_bytes // 4
    return min(_MEAN_TEXTS, max(1, int(_MEAN_OPERATIONS / (2 * active * _TEXT_TOKENS))))


def _full_precision(source: Path, **fields: Any) -> PreTrainedConfig:
    """Returns a model's configuration by which transformers loads its weights unpacked.

    A model that was quantised once and saved again in full precision may still name it: that is forgotten.

    Args:
        source: Directory of the source model.
        fields: What the configuration is to say besides.

    Raises:
        ModelError: The weights are quantised in a form that cannot be unpacked while loading.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **fields)
    packing = getattr(config, "quantization_config", None)
    if packing is None:
        return config
    packed = sorted(_dtypes(source) - _PLAIN_DTYPES)
    if not packed:
        del config.quantization_config
    elif packing["quant_method"] in _UNPACKED:
        # On a machine that can compute with packed weights, transformers would otherwise keep them.
        config.quantization_config = packing | {"dequantize": True}
    else:
        raise ModelError(
            f"model.source: the weights in {source} are quantised ({', '.join(packed)}), and experts are trained from "
            "full precision. Load the model with transformers, call dequantize(), save_pretrained() it, and give that "
            "directory."
        )
    return config


def _dtypes(source: Path) -> set[str]:
    """Returns the types of all tensors in a model's files, as safetensors names them."""
    dtypes: set[str] = set()
    for path in source.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            dtypes.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118 - not a mapping
    return dtypes


def _load(
    model_class: Any, source: Path, may_differ: tuple[str, ...], config: PreTrainedConfig, dtype: torch.dtype
) -> Any:
    """Loads a model; only modules named in `may_differ` may lack weights or have others than the file."""
    try:
        model, report = model_class.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            config=config,
            trust_remote_code=False,  # otherwise transformers asks, on a terminal
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model.source: {source} cannot be loaded: {error}") from error
    assert isinstance(model, PreTrainedModel)
    differing = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    unexplained = sorted(name for name in differing if name.split(".")[0] not in may_differ)
    if unexplained:
        raise ModelError(
            f"model.source: the weights in {source} do not fit its config.json: {', '.join(unexplained[:5])} missing "
            "or of another shape. Give a complete checkpoint written by save_pretrained."
        )
    return model


@torch.no_grad()
def _new_head(layout: MoELayout, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws the head's matrices from N(0, 0.02^2) and zeroes its biases; returns them in fp32, by full name."""
    head = {}
    for name, parameter in layout.model.named_parameters():
        if layout.groups[name] == "head":
            drawn = torch.zeros(parameter.shape)
            head[name] = drawn.normal_(std=_HEAD_STD, generator=generator) if parameter.dim() > 1 else drawn
            parameter.copy_(head[name])
    return head


def _batches(tokenizer: Any, texts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields token ids and attention masks of the texts, [B, S] each."""
    ids, lengths = tokenize(tokenizer, texts, _TEXT_TOKENS)
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    for start in range(0, len(ids), _BATCH_TEXTS):
        rows = slice(start, start + _BATCH_TEXTS)
        yield torch.from_numpy(ids[rows]).long(), torch.from_numpy(mask[rows]).long()
