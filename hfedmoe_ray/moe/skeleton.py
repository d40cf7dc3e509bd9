"""What a model says of itself when built without storage: counted once, then read from the cache without torch."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hfedmoe_ray.moe.store import LinearSize, Task, Trainable
from hfedmoe_ray.types import ModelShape

_FORMAT = 2
"""Raised whenever `Skeleton` changes."""
_IRRELEVANT = {"architectures", "id2label", "label2id", "num_labels", "transformers_version", "_name_or_path"}


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """Sizes of a model that trains in full."""

    shape: ModelShape
    expert_shapes: Mapping[str, tuple[int, ...]]
    """Shape of each tensor of one expert, by name."""
    transposed: bool
    """Whether an expert's matrices are stored as [in, out]."""
    projections: Mapping[str, LinearSize]
    """Linear maps of attention from the first MoE layer up, by full name."""


def describe(config: Mapping[str, Any], num_labels: int, trainable: Trainable, cache: Path, task: Task) -> Skeleton:
    """Returns the sizes of the model of a config.json.

    Args:
        config: Its config.json.
        num_labels: Classes of the task head; 0: the head is not counted.
        trainable: Which shared parameters train.
        cache: Cache directory; answers lie in `shapes/<key>.json`.
        task: What is on top.

    Raises:
        ModelError: The family has no layout, or the model no MoE layer.
    """
    fields = {name: value for name, value in config.items() if name not in _IRRELEVANT}
    parts = [
        _FORMAT,
        fields,
        num_labels,
        trainable,
        task,
        version("transformers"),
        list(ModelShape.__dataclass_fields__),
    ]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
    path = cache / "shapes" / f"{key}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(asdict(_count(fields, num_labels, trainable, task))), encoding="utf-8")
        partial.replace(path)  # at once: another process may be reading
    kept = json.loads(path.read_text(encoding="utf-8"))
    return Skeleton(
        shape=ModelShape(**kept["shape"]),
        expert_shapes={name: tuple(shape) for name, shape in kept["expert_shapes"].items()},
        transposed=kept["transposed"],
        projections={name: LinearSize(*size) for name, size in kept["projections"].items()},
    )


def _count(fields: Mapping[str, Any], num_labels: int, trainable: Trainable, task: Task) -> Skeleton:
    from hfedmoe_ray.moe.subset import skeleton_from

    module, layout = skeleton_from({**fields, "num_labels": max(num_labels, 1)}, task)
    uncounted = {"expert"} if num_labels else {"expert", "head"}
    sizes = {name: p.numel() for name, p in module.named_parameters() if layout.groups[name] not in uncounted}
    return Skeleton(
        shape=layout.shape(trainable, sizes),
        expert_shapes=layout.expert_shapes,
        transposed=layout.transposed,
        projections=layout.projections,
    )
