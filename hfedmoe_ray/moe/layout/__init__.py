"""The uniform view of MoE models: ask `layout_of`. How to add a family: docs/adding-a-family.md."""

from transformers import PreTrainedModel

# Registers the heads that transformers lacks with its Auto classes.
import hfedmoe_ray.moe.heads  # noqa: F401
from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.layout.base import MoELayout, Routing
from hfedmoe_ray.moe.layout.deepseek import DeepseekV2Layout, DeepseekV3Layout
from hfedmoe_ray.moe.layout.fused import (
    MixtralLayout,
    MoEEncoderLayout,
    OlmoeLayout,
    Qwen2MoeLayout,
    Qwen3MoeLayout,
)
from hfedmoe_ray.moe.layout.gpt_oss import GptOssLayout
from hfedmoe_ray.moe.layout.switch import SwitchLayout
from hfedmoe_ray.moe.upcycle.target import DENSE_FAMILIES

FAMILIES: dict[str, type[MoELayout]] = {
    layout.family: layout
    for layout in (
        MoEEncoderLayout,
        MixtralLayout,
        OlmoeLayout,
        Qwen2MoeLayout,
        Qwen3MoeLayout,
        DeepseekV2Layout,
        DeepseekV3Layout,
        GptOssLayout,
        SwitchLayout,
    )
}
"""Layouts by transformers' model_type; `moe.shape.MOE_FAMILIES` names them where torch is not loaded."""


def layout_of(model: PreTrainedModel) -> MoELayout:
    """Returns the uniform view of a transformers MoE model.

    Raises:
        ModelError: The family is not known, or the model has no MoE layer.
    """
    family = model.config.model_type
    if family not in FAMILIES:
        raise ModelError(
            f"model.source: no layout is known for models of the family {family!r}. Known are {', '.join(FAMILIES)}; "
            f"a dense {' or '.join(DENSE_FAMILIES)} becomes one of them with `model.upcycle`. How to add a family: "
            "docs/adding-a-family.md."
        )
    return FAMILIES[family](model)


__all__ = ["FAMILIES", "MoELayout", "Routing", "layout_of"]
