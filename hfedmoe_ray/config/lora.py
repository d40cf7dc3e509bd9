"""Low-rank adaptation, as a configuration says it."""

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from hfedmoe_ray.config.section import Section


class Lora(Section):
    """Low-rank adaptation of the experts: every matrix W becomes W + (alpha / rank) B A.

    Only the factors A [rank, in] and B [out, rank] train and travel; W, and an expert's biases, stay as they are on
    each node's disk.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    base: Literal["exact", "int8", "nf4"] = "exact"
    """Form of the frozen W, memory-mapped once per node, and once on a GPU that clients share: exact, in fp32 or bf16
    as the model is published, or quantised when the model is prepared and dequantised at each use. int8: one scale a
    row, a quarter of fp32's bytes; nf4: 4 bits and a scale for every 64 numbers, about a seventh (needs the package
    bitsandbytes, on CPU too)."""
    attention: bool = False
    """Adapt attention from the first MoE layer up in the same way. Its matrices are then frozen whatever `trainable`
    says: `experts` trains them by factors instead of not at all, `top` by factors instead of in full."""
    average: Literal["svd", "factors"] = "svd"
    """What the server averages. svd: the products B A, exactly, and of the mean the best approximation of this rank;
    factors: A and B each by itself, which is quicker and is not the mean of the products."""

    @property
    def scale(self) -> float:
        """Factor of the product B A."""
        return self.alpha / self.rank
