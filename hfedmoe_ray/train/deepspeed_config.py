"""The DeepSpeed configuration of a client, as a pure function of its local training settings, its tier and its device.

What is offered keeps the experts that a batch does not select bit-identical; the reasons for the rest:

- ZeRO stage 0 is the default: with one rank there is nothing to partition. Stages 1 and 2 flatten every parameter group
  into a second fp32 copy and give groups without a gradient zeros; they serve a GPU whose optimizer state is to live
  in the host's memory, which DeepSpeed ties to them, and clients of several ranks, each of which then keeps the state
  of its part alone. Masking holds there because every expert is its own group.
- Stage 3 is refused (by `config.schema.Tier`). Tried with two ranks of a Mixtral, it emptied every frozen tensor, which
  all clients of a node share, and partitioned a private copy; the first backward pass then failed on experts that were
  still empty, with and without `set_z3_leaf_modules` of the modules that hold them.
- bf16 is autocast around fp32 weights, not DeepSpeed's bf16 mode, whose weights lose small updates and which would
  cast (so copy) the shared frozen weights.
- Accumulation: the caller decides when to step, because a client with few examples has fewer micro-batches.
- Activation checkpointing is torch's, around whole layers (`train.activations`); DeepSpeed's recomputes through a
  nested backward pass, which cannot be told which gradients are wanted.
"""

from typing import Any

from hfedmoe_ray.budget import no_gpu_to_offload
from hfedmoe_ray.config.schema import LocalTraining, Tier


def deepspeed_config(local: LocalTraining, tier: Tier, device: str) -> dict[str, Any]:
    """Returns the configuration of an engine with an optimizer of our own.

    Args:
        local: Batch size and clipping.
        tier: ZeRO stage, offload and micro-batch of the client's tier.
        device: Type of the device that computes, "cpu" or "cuda".

    Raises:
        ConfigError: The tier offloads its optimizer and there is no GPU to offload it from.
    """
    zero: dict[str, Any] = {"stage": tier.zero_stage}
    if tier.offload_optimizer:
        if device == "cpu":
            raise no_gpu_to_offload(tier)
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": min(tier.micro_batch or local.batch_size, local.batch_size),
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": local.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
