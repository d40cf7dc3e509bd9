"""How updates travel, as a configuration says it."""

from typing import Literal, Self

from pydantic import model_validator

from hfedmoe_ray.config.section import Section, Share


class Wire(Section):
    """How a client's update travels to the server."""

    upload: Literal["fp32", "bf16", "fp16", "int8", "topk"] = "fp32"
    """fp32: the trained tensors as they are. The others send the change since the published weights in fewer bytes:
    bf16 and fp16 half as many, int8 about a quarter (a scale for each row), topk only the numbers that changed most."""
    share: Share | None = None
    """topk: share of each tensor's numbers that is sent, 8 bytes each. Default: 0.01."""
    error_feedback: bool | None = None
    """Whether a client keeps what the precision lost and adds it to its next update. Default: with topk only."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.share is not None and self.upload != "topk":
            raise ValueError(
                f"share belongs to `upload: topk`; {self.upload} sends every number: leave share out, or write "
                "`upload: topk`"
            )
        if self.error_feedback and not self.lossy:
            raise ValueError(
                "fp32 loses nothing, so there is no error to feed back: leave error_feedback out, or write another "
                "upload (bf16, fp16, int8, topk)"
            )
        return self

    @property
    def lossy(self) -> bool:
        """Whether the server receives something else than what was trained."""
        return self.upload != "fp32"

    @property
    def kept_share(self) -> float:
        """`share` or its default."""
        return 0.01 if self.share is None else self.share

    @property
    def feeds_back(self) -> bool:
        """`error_feedback` or its default."""
        return self.upload == "topk" if self.error_feedback is None else self.error_feedback
