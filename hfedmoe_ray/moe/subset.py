"""One client's model: the frozen base, its own copies of what trains, and only the experts its plan names.

The fused experts of the full model are never allocated. The module is built without storage, its non-expert tensors
are memory-mapped, and `bind` gives it one task's weights: private copies of everything that trains, read-only aliases
of the experts that only take part in the forward pass. A worker keeps one `SparseModel` and binds it to one client
after another; nothing of a client outlives the next `bind`.

Legend: L MoE layers, E experts, B batch, S sequence, H hidden, C classes, V vocabulary.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from hfedmoe_ray.config.lora import Lora
from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.adapters import AdaptedExperts, adapt_attention
from hfedmoe_ray.moe.factors import adapted_shape, attention_shapes, replaces
from hfedmoe_ray.moe.frozen_experts import experts_file
from hfedmoe_ray.moe.layout import MoELayout, layout_of
from hfedmoe_ray.moe.layout.base import assign, on_meta
from hfedmoe_ray.moe.residents import ResidentExperts
from hfedmoe_ray.moe.routing import RoutingTape
from hfedmoe_ray.moe.sharing import part
from hfedmoe_ray.moe.store import BASE, CONFIG, Task, Trainable, read_meta, stored_bytes
from hfedmoe_ray.types import Array, ExpertKey, ExpertPlan, ModelShape, TaskWeights

_TARGETS = "targets"
_REAL = "real_tokens"

AUTO_CLASSES: Mapping[Task, Any] = {
    "classification": AutoModelForSequenceClassification,
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}


def skeleton(directory: Path) -> tuple[PreTrainedModel, MoELayout]:
    """Returns a prepared model on the meta device, without any storage, and its layout."""
    fields = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    return skeleton_from(fields, read_meta(directory).task)


def skeleton_from(fields: Mapping[str, Any], task: Task = "classification") -> tuple[PreTrainedModel, MoELayout]:
    """Returns the model of a config.json, given as a mapping, on the meta device, and its layout."""
    config = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        model = AUTO_CLASSES[task].from_config(config)
    return model, layout_of(model)


def read_base(directory: Path) -> dict[str, Tensor]:
    """Returns all non-expert tensors of a prepared model, memory-mapped."""
    with safe_open(directory / BASE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def assign_base(model: PreTrainedModel, base: Mapping[str, Tensor]) -> None:
    """Makes non-expert tensors the model's own; raises ModelError if that leaves anything without storage."""
    for name, tensor in base.items():
        assign(model, name, tensor)
    model.tie_weights()
    missing = on_meta(model)
    if missing:
        raise ModelError(f"the prepared model lacks {', '.join(missing[:5])}. Delete its directory and run again.")


class SparseModel:
    """A prepared model that holds the experts of one plan at a time."""

    module: PreTrainedModel
    """The transformers model, its fused experts replaced."""
    tape: RoutingTape
    """The routing of the latest forward pass."""
    shape: ModelShape
    """Its bytes count what trains in the present binding (before the first one: routers and head)."""
    expert_parameters: dict[ExpertKey, dict[str, Parameter]]
    """Parameters of every TRAIN expert by tensor name."""
    features: Tensor | None
    """What entered the task head in the latest forward pass, detached: [B, H] where the model pools before it."""
    shared_parameters: dict[str, Parameter]
    """Routers and other shared parameters that train, by full name."""

    def __init__(
        self,
        prepared: Path,
        device: torch.device | str | None = None,
        *,
        lora: Lora | None = None,
        frozen: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Loads the frozen base of a prepared model; no expert is present yet.

        Args:
            prepared: Directory of the prepared model.
            device: Where to compute. Default: a GPU if torch sees one.
            lora: What trains are factors over the frozen experts, and over attention if it says so.
            frozen: What never trains, where another process has read it onto the device (`sharing.read_frozen`).

        Raises:
            ModelError: The directory holds no prepared model, or not the quantised experts that `lora` asks for.
        """
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        read_meta(prepared)
        self._stored_bytes = stored_bytes(prepared)
        self.module, self.layout = skeleton(prepared)
        self.tape = RoutingTape(self.layout.layers, self.layout.gate_values, self.layout.decoder_from)
        self._lora = lora
        frozen = frozen or {}
        held = part(frozen, experts_file(lora.base)) if lora else {}
        adapted = AdaptedExperts(prepared, lora, self.layout, self.device, held) if lora else None
        self._residents = tuple(ResidentExperts(i, self.layout, self.tape, adapted) for i in range(self.layout.layers))
        for layer, (block, residents) in enumerate(zip(self.layout.blocks, self._residents, strict=True)):
            setattr(block, self.layout.experts_name, residents)
            self.layout.router(layer).register_forward_hook(self._routed(residents))
        self.module.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.features = None
        self._targets: Tensor | None = None
        self._writes = False
        language_head = self.module.get_output_embeddings()
        if language_head is None:
            self.module.get_submodule(self.layout.heads[0]).register_forward_pre_hook(self._note_features)
        else:
            language_head.register_forward_pre_hook(self._only_targets)
        self._sizes = {name: p.numel() for name, p in self.module.named_parameters()}
        base, renamed = part(frozen, BASE) or read_base(prepared), {}
        if lora and lora.attention:
            renamed = adapt_attention(self.module, self.layout.projections, lora)
            shapes = attention_shapes(self.layout.projections, lora.rank)
            base |= {name: torch.zeros(shape) for name, shape in shapes.items()}
        self._base = {renamed.get(name, name): tensor.to(self.device) for name, tensor in base.items()}
        assign_base(self.module, self._base)
        self.shape = self._shape("experts")
        self.module.requires_grad_(False)
        self.module.eval()
        # Decoders otherwise keep every layer's keys and values for a next token, which never comes.
        self.module.config.use_cache = False
        self._trainable: Trainable = "experts"
        self.expert_parameters = {}
        self.shared_parameters = {}

    def bind(self, plan: ExpertPlan, weights: TaskWeights, trainable: Trainable) -> None:
        """Loads the weights of one task in place of the last one's.

        Args:
            plan: The role of every expert.
            weights: Read-only arrays: `shared` holds at least what trains, `experts` every present expert.
            trainable: Which shared parameters train.

        Raises:
            ValueError: `weights` lacks something that the plan or `trainable` asks for, or a shape is wrong.
        """
        shape = tuple(map(len, plan.roles))
        if shape != (self.layout.num_experts,) * self.layout.layers:
            raise ValueError(f"the plan has {shape} experts a layer, the model {self.layout.num_experts}")
        # Every parameter is made anew, so that nothing an optimizer or engine did to the old ones is left.
        trains = self._trains(trainable)
        self.shared_parameters = {}
        for name, tensor in self._base.items():
            if name in trains:
                private = self._private(name, tensor, weights)
                assign(self.module, name, private, requires_grad=True)
                self.shared_parameters[name] = self.module.get_parameter(name)
            else:
                assign(self.module, name, tensor)
        self.module.tie_weights()
        for layer, residents in enumerate(self._residents):
            means = None if weights.means is None else weights.means[layer]
            residents.bind(plan, weights.experts, means, self.device, weights.merged)
        self.expert_parameters = {key: self._residents[key.layer].parameters_of(key.expert) for key in plan.trainable}
        self.shape = self._shape(trainable)
        self._trainable = trainable
        self.tape.differentiable = plan.balance is not None
        self.tape.begin(None)

    @property
    def scales(self) -> tuple[Parameter, ...]:
        """The learnable factors on what each layer's routed experts give, [1] each; none where the plan has none."""
        return tuple(residents.scale for residents in self._residents if residents.scale is not None)

    def release(self) -> None:
        """Lets go of the bound task's weights, private and shared; the frozen base alone stays."""
        for name in self.shared_parameters:
            assign(self.module, name, self._base[name])
        for residents in self._residents:
            residents.release()
        self.expert_parameters, self.shared_parameters = {}, {}
        self.features = self._targets = None
        self.tape.begin(None)

    def frozen_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that does not train in the present binding, by name: of the base, and of FROZEN experts."""
        yield from ((name, one) for name, one in self.module.named_parameters() if not one.requires_grad)
        for residents in self._residents:
            yield from residents.frozen_tensors()

    def forward(
        self,
        batch: Tensor,
        mask: Tensor,
        hidden: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        decoder: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Returns logits, [B, C] or of a language model [N, V], and records the routing on `tape`.

        Args:
            batch: Token ids, [B, S].
            mask: 1 for real tokens, [B, S].
            hidden: What `prefix` returned for these tokens, [B, S, H]; the lower layers are then skipped.
            targets: Of a language model, the N places where the next token is asked for, [B, S]; of one with an
                encoder [B, D], and every real token of the decoder is one. Default: all.
            decoder: What the decoder reads where an encoder reads `batch`, [B, D].
            positions: Place of each token in its own text, [B, S], where rows hold several; 0 for padding.
        """
        return self.module(**self.inputs(batch, mask, hidden, targets, decoder=decoder, positions=positions)).logits

    def inputs(
        self,
        batch: Tensor,
        mask: Tensor,
        hidden: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        decoder: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> dict[str, Any]:
        """Returns the module's keyword arguments for `forward`, for callers that wrap the module in an engine."""
        asked: dict[str, Any] = {} if targets is None else {_TARGETS: targets}
        if decoder is not None:
            # Padding is to the right of a decoder's tokens, so that no real one attends to it.
            asked |= {"decoder_input_ids": decoder.long(), "use_cache": False}
        if positions is not None:
            return {"input_ids": batch.long(), _REAL: mask, **self.layout.apart(positions.long()), **asked}
        if hidden is not None:
            return {"hidden_states": hidden, "attention_mask": mask.long(), **asked}
        return {"input_ids": batch.long(), "attention_mask": mask.long(), **asked}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within the block `module.generate` writes; every token counts as real."""
        self._targets, self._writes = None, True
        self.tape.begin(None)
        try:
            yield
        finally:
            self._writes = False

    @property
    def supports_prefix(self) -> bool:
        """Whether `prefix` exists for this family and, with what now trains, is the same for every client and round."""
        return self.layout.supports_prefix and self._trainable != "full"

    def prefix(self, batch: Tensor, mask: Tensor) -> Tensor:
        """Returns the hidden states that enter the first MoE layer, [B, S, H]."""
        return self.module.prefix(batch.long(), mask.long())

    def read_expert(self, key: ExpertKey) -> dict[str, Array]:
        """Returns fp32 copies of the tensors of a present expert as they are published: dense, or LoRA factors."""
        return {name: _copy(tensor) for name, tensor in self._residents[key.layer].tensors_of(key.expert).items()}

    def tensors_of(self, key: ExpertKey) -> Mapping[str, Tensor]:
        """Returns the tensors of a present expert as it holds them; those of FROZEN ones must never be written."""
        return self._residents[key.layer].tensors_of(key.expert)

    def replaced(self, key: ExpertKey, tensors: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Lets a present expert compute with other dense tensors within a block."""
        return self._residents[key.layer].replaced(key.expert, tensors)

    def read_shared(self) -> dict[str, Array]:
        """Returns fp32 copies of the routers and the other shared parameters that train."""
        return {name: _copy(parameter) for name, parameter in self.shared_parameters.items()}

    def _trains(self, trainable: Trainable) -> set[str]:
        """Full names of the shared parameters that train."""
        names = set(self.layout.shared_names(trainable))
        if self._lora is None or not self._lora.attention:
            return names
        projections = self.layout.projections
        return {n for n in names if not replaces(n, projections)} | set(attention_shapes(projections, self._lora.rank))

    def _shape(self, trainable: Trainable) -> ModelShape:
        layout, shape = self.layout, self.layout.shape(trainable, self._sizes)
        if self._lora is None:
            return shape
        return adapted_shape(
            shape,
            self._lora,
            trainable,
            expert_shapes=layout.expert_shapes,
            transposed=layout.transposed,
            projections=layout.projections,
            stored_bytes=self._stored_bytes,
        )

    def _private(self, name: str, base: Tensor, weights: TaskWeights) -> Tensor:
        array = weights.shared.get(name)
        if array is None or np.shape(array) != tuple(base.shape):
            found = "is missing" if array is None else f"has shape {np.shape(array)}"
            raise ValueError(f"shared parameter {name} {found} in the published weights; expected {tuple(base.shape)}")
        # torch.tensor copies: what trains never aliases the published arrays.
        return torch.tensor(array, dtype=torch.float32, device=self.device)

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._writes:
            self.tape.begin(None)
            return args, kwargs
        # No argument of the module's own: its head is told by the hook below.
        self._targets = kwargs.pop(_TARGETS, None)
        mask = kwargs.pop(_REAL, kwargs.get("attention_mask"))
        self.tape.begin(mask, self._targets if "decoder_input_ids" in kwargs else None)
        return args, kwargs

    def _only_targets(self, _head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Hands a language model's head the states it is asked about: logits of all tokens would need much memory."""
        (states,) = args
        return (states if self._targets is None else states[self._targets],)

    def _note_features(self, _head: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.features = args[0].detach()

    def _routed(self, residents: ResidentExperts) -> Any:
        """Makes a forward hook for a router: re-routes where the plan says so, and records."""

        def hook(_router: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            routers_own = self.layout.read_routing(output)
            routing = residents.route(routers_own)
            self.tape.record(residents.layer, routing.logits, routing.index)
            return output if routing is routers_own else self.layout.write_routing(routing)

        return hook


def _copy(tensor: Tensor) -> Array:
    array: Array = tensor.detach().to("cpu", torch.float32, copy=True).numpy()
    return array
