"""The DeepSpeed configuration of a client, as a pure function of its local training settings."""

from typing import Any

from hfedmoe_ray.config.schema import LocalTraining


def deepspeed_config(local: LocalTraining) -> dict[str, Any]:
    """Returns the configuration of a one-rank engine with an optimizer of our own.

    ZeRO stage 0: with one rank there is nothing to partition, and only here an optimizer sees which parameters have
    no gradient, on which masking relies. bf16 is therefore autocast around fp32 weights, not DeepSpeed's bf16 mode,
    whose pure-bf16 AdamW loses small updates.
    """
    return {
        "train_micro_batch_size_per_gpu": local.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": local.clip_norm,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
