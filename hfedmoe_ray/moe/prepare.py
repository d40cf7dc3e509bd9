"""From the configuration's `model` section to a prepared model in the cache, its first weights, and back to a model.

Importing this module, and finding a model in the cache, takes no torch: the server of a run needs none.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hfedmoe_ray.config.lora import Lora
from hfedmoe_ray.config.model import Model
from hfedmoe_ray.config.section import Precision
from hfedmoe_ray.context import PreparedModel
from hfedmoe_ray.data.tokenize import load_tokenizer, tokenizer_hash
from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe import store
from hfedmoe_ray.moe.factors import adapted_shape, initial_experts, initial_shared
from hfedmoe_ray.moe.shape import check_family, read_shape
from hfedmoe_ray.moe.sources import commit_of, read_config, resolve
from hfedmoe_ray.moe.upcycle.target import upcycled_config
from hfedmoe_ray.types import Weights


def prepare_model(
    model: Model, num_labels: int, seed: int, calibration_texts: Sequence[str], cache: Path
) -> PreparedModel:
    """Builds the model a run fine-tunes, or finds it in the cache.

    Args:
        model: Section `model` of the configuration.
        num_labels: Classes of the head; 0 for a language model.
        seed: Run seed; decides clustering, noise, calibration and the head.
        calibration_texts: Unlabelled texts for the routers' distillation; may be empty.
        cache: Cache directory; the model lies in `models/<key>`, the key covering everything that determines it.

    Raises:
        ModelError: The source cannot be found, loaded or understood, or `upcycle` is missing or out of place.
        ConfigError: `upcycle` or `lora` does not fit the model.
    """
    source = resolve(model.source, model.revision)
    config = read_config(source)
    check_family(config, model.upcycle, model.task)
    if model.upcycle is not None:
        upcycled_config(config, model.upcycle)  # refuses what does not fit before anything is loaded
    directory = cache / "models" / _key(source, model, num_labels, seed, calibration_texts)
    if not (directory / store.META).is_file():
        from hfedmoe_ray.moe.build import build

        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".preparing-") as temporary:
            complete = Path(temporary) / "model"
            complete.mkdir()
            build(
                source=source,
                model=model,
                num_labels=num_labels,
                seed=seed,
                texts=calibration_texts,
                directory=complete,
            )
            _publish(complete, directory)
    meta = store.read_meta(directory)
    shape = read_shape(model.model_copy(update={"lora": None}), num_labels, cache)
    if model.lora is not None:
        shapes = store.read_expert_shapes(directory)
        shape = adapted_shape(
            shape,
            model.lora,
            model.trainable,
            expert_shapes=shapes,
            transposed=meta.transposed,
            projections=meta.projections,
            stored_bytes=store.stored_bytes(directory),
        )
        if model.lora.base != "exact":
            from hfedmoe_ray.moe.quantised import quantise_experts

            quantise_experts(directory, model.lora.base)
    return PreparedModel(path=directory.resolve(), sha256=meta.sha256, shape=shape, commit=commit_of(source))


def initial_weights(
    prepared: PreparedModel, trainable: store.Trainable, lora: Lora | None = None, seed: int = 0
) -> Weights:
    """Returns version 0 of the weights: what trains of experts and shared parameters, and the experts' mean outputs.

    Args:
        prepared: The prepared model.
        trainable: Which shared parameters train.
        lora: LoRA, where factors train instead of experts.
        seed: Run seed, from which factors are drawn.
    """
    if lora is None:
        shared, experts = store.read_shared(prepared.path, trainable), store.read_experts(prepared.path)
    else:
        shared = initial_shared(prepared, trainable, lora, seed)
        experts = initial_experts(prepared, lora, seed)
    return Weights(version=0, shared=shared, experts=experts, means=store.read_means(prepared.path))


def router_layers(prepared: PreparedModel) -> dict[str, int]:
    """Returns the MoE layer of every router parameter, by its full name in `Weights.shared`."""
    return dict(store.read_meta(prepared.path).router_layers)


def head_parameters(prepared: PreparedModel) -> tuple[str, str]:
    """Returns the full names of the task head's weight and bias; raises ModelError for a head that is not linear."""
    names = [name for name, group in store.read_meta(prepared.path).groups.items() if group == "head"]
    match sorted(names):
        case [bias, weight] if bias.endswith(".bias") and weight.endswith(".weight"):
            return weight, bias
    raise ModelError(f"model.head: `prototypes` needs a linear task head with a bias; this model's head is {names}.")


def save_full(
    prepared: PreparedModel,
    weights: Weights,
    directory: Path,
    lora: Lora | None = None,
    *,
    label_names: Sequence[str] = (),
    dtype: Precision = "fp32",
) -> None:
    """Writes the whole model with trained weights through save_pretrained, tokenizer included.

    LoRA factors are merged into the matrices they adapt; over quantised experts, into what these stand for.

    A model of a transformers family is read back by transformers alone, where transformers has no head for it (OLMoE,
    Switch) its backbone is; those with their heads, and an upcycled encoder, by the Auto classes once
    `hfedmoe_ray.moe.layout` is imported.

    Args:
        prepared: The prepared model: whatever `weights` lacks comes from it.
        weights: Trained weights.
        directory: Where to write; made if need be.
        lora: What `weights` was trained with, if it holds factors.
        label_names: Name of each class, for the model's config; without them it has transformers' LABEL_0 and so on.
        dtype: What its parameters are rounded to, once, after merging; the directory is half as large in bf16.
    """
    import torch

    from hfedmoe_ray.moe.adapters import AdaptedExperts, merge_attention
    from hfedmoe_ray.moe.quiet import quiet_transformers
    from hfedmoe_ray.moe.subset import assign_base, read_base, skeleton

    module, layout = skeleton(prepared.path)
    module.config.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    module.to(module.config.dtype)  # before it has storage: in bf16 a large model is never in memory in fp32
    for block in layout.blocks:
        getattr(block, layout.experts_name).to_empty(device="cpu")
    shared = {name: torch.tensor(array) for name, array in weights.shared.items()}
    base = read_base(prepared.path)
    assign_base(module, base | (merge_attention(base, shared, layout.projections, lora.scale) if lora else shared))
    adapted = AdaptedExperts(prepared.path, lora, layout, torch.device("cpu"), {}) if lora else None
    for key, arrays in (store.read_experts(prepared.path) | dict(weights.experts)).items():
        tensors = {name: torch.tensor(array) for name, array in arrays.items()}
        layout.write_expert(key, adapted.merged(key, tensors) if adapted and key in weights.experts else tensors)
    if label_names:
        module.config.id2label = dict(enumerate(label_names))
        module.config.label2id = {name: number for number, name in enumerate(label_names)}
    for parameter in module.parameters():
        parameter.data = parameter.data.to(module.config.dtype)
    with quiet_transformers():
        module.save_pretrained(directory)
    load_tokenizer(prepared.path).save_pretrained(directory)


def _publish(complete: Path, directory: Path) -> None:
    """Moves a complete model to its place at once; if another process was faster, its equal one stays."""
    try:
        complete.rename(directory)
    except OSError:
        if not (directory / store.META).is_file():
            shutil.rmtree(directory)  # left by something else: a rename makes all of a model appear or nothing
            complete.rename(directory)


def _key(source: Path, model: Model, num_labels: int, seed: int, texts: Sequence[str]) -> str:
    """Hashes everything that determines the prepared model. Weight files count by name, size and time."""
    files = [file for pattern in ("*.json", "*.safetensors", "*.txt", "*.model") for file in source.glob(pattern)]
    parts = {
        "format": store.FORMAT,
        "files": sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files),
        "config": (source / "config.json").read_text(encoding="utf-8"),
        "upcycle": None if model.upcycle is None else model.upcycle.model_dump(mode="json"),
        "tokenizer": tokenizer_hash(source),
        "task": model.task,
        "labels": num_labels,
        "seed": seed,
        "texts": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
