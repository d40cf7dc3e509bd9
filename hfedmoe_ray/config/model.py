"""The pretrained model and what of it trains. Torch-free."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from hfedmoe_ray.config.lora import Lora
from hfedmoe_ray.config.section import NonNegativeFloat, Section


class Upcycle(Section):
    """How a dense model becomes a Mixture of Experts."""

    how: Literal["split", "copy", "adapters"] = "split"
    """split: cluster the FFN's neurons into experts (no growth); copy: every expert is the whole FFN plus noise;
    adapters: small new experts are added to the FFN, which stays dense (FFT-MoE), and change nothing until they train.
    A llama or mistral, all of whose layers are upcycled, keeps what it knows as copies only; split, it learns anew; it
    takes no adapters."""
    experts: int = Field(default=16, ge=2)
    """E, experts in each MoE layer."""
    top_k: PositiveInt = 4
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Numbers of the layers whose FFN is upcycled. Default: the upper half of a bert; with adapters, all of it. A llama
    or mistral becomes a Mixtral, all of whose layers are Mixtures of Experts: leave it out."""
    adapter_hidden: PositiveInt = 64
    """adapters: neurons of each one's hidden layer."""
    noise: NonNegativeFloat = 0.02
    """copy: standard deviation of the noise as a share of the weights' own."""
    calibration_steps: Annotated[int, Field(ge=0)] = 200
    """split: optimizer steps of the layer-wise router distillation."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}, but a layer has only {self.experts} experts")
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise ValueError("layers must name at least one layer, each once")
        return self


class Model(Section):
    """The pretrained model and what of it trains."""

    source: str
    """"package:NAME" (a Python package that carries a model), a local directory or .gguf file, or a hub name."""
    revision: str | None = None
    """Of a hub model: commit, tag or branch. Only a commit is always the same model; `validate` says where none is
    named, and a run records the one it fetched. Code that a repository holds is never run."""
    task: Literal["classification", "causal", "seq2seq"] = "classification"
    """classification: a new head on the model tells classes apart; causal: the language model itself goes on to learn
    what to write after a prompt (`data.response`); seq2seq: the same of a model whose encoder reads the prompt and
    whose decoder writes (Switch Transformers)."""
    upcycle: Upcycle | None = None
    """Needed for dense models; refused for models that are MoE already."""
    head: Literal["random", "prototypes"] = "random"
    """classification: where the new task head starts: at random, or at the class means of the clients' features, of
    which each client sends sums and counts with its routing profile (federated nearest-class-mean)."""
    trainable: Literal["experts", "top", "full"] = "top"
    """experts: routed experts, routers, task head; top: also attention and norms from the first MoE layer up;
    full: everything, the token embeddings and a language model's own head included."""
    lora: Lora | None = None
    """Train low-rank factors of the experts instead of the experts themselves. Default: whole experts train."""

    @model_validator(mode="after")
    def _adapts_what_is_frozen(self) -> Self:
        if self.lora is not None and self.lora.attention and self.trainable == "full":
            raise ValueError(
                "`trainable: full` trains attention itself, so `lora.attention` has nothing to adapt: write "
                "`trainable: top` (or `experts`), or leave `lora.attention` out"
            )
        if self.lora is not None and self.upcycle is not None and self.upcycle.how == "adapters":
            raise ValueError(
                "`upcycle.how: adapters` adds small experts that train whole; low-rank factors of them would save "
                "nothing. Leave `lora` out, and choose their size by `upcycle.adapter_hidden`"
            )
        if self.task != "classification" and self.head != "random":
            raise ValueError(
                f"`task: {self.task}` keeps the language model's own head, so `head: {self.head}` has none to start: "
                "leave `head` out"
            )
        if self.task == "seq2seq" and self.upcycle is not None:
            raise ValueError(
                "`task: seq2seq` needs a model with an encoder and a decoder, and `upcycle` makes none: leave one of "
                "the two out"
            )
        return self
