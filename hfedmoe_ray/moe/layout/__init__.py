"""The uniform view of MoE models: ask `layout_of`. A new family is a class in this package and a line in `FAMILIES`."""

from transformers import PreTrainedModel

from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.layout.base import MoELayout
from hfedmoe_ray.moe.layout.fused import MixtralLayout, MoEEncoderLayout

FAMILIES: dict[str, type[MoELayout]] = {layout.family: layout for layout in (MoEEncoderLayout, MixtralLayout)}
"""Layouts by transformers' model_type."""


def layout_of(model: PreTrainedModel) -> MoELayout:
    """Returns the uniform view of a transformers MoE model.

    Raises:
        ModelError: The family is not known, or the model has no MoE layer.
    """
    family = model.config.model_type
    if family not in FAMILIES:
        raise ModelError(
            f"model.source: no layout is known for models of the family {family!r}. Known are {', '.join(FAMILIES)}; "
            "a dense bert becomes one of them with `model.upcycle`."
        )
    return FAMILIES[family](model)


__all__ = ["FAMILIES", "MoELayout", "layout_of"]
