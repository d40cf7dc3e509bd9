"""What stands in for absent experts, layer by layer: the error of merging, of means, and of dropping (2508.19078).

Every layer gets the very inputs it has in the whole model, and only its own absent experts are replaced, so that errors
of lower layers do not add up. The error is |out' - out| / |out| over the vectors of all real tokens, where out is the
weighted sum of a token's experts. Legend: L MoE layers, E experts, f share of a layer's choices that fall on an expert.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.studies.plots import Curve, curves, grouped_bars
from hfedmoe_ray.studies.statistics import Mean, mean_of
from hfedmoe_ray.studies.study import Figure, Findings, Setting, Study, Table
from hfedmoe_ray.tracking.charts import legend
from hfedmoe_ray.tracking.formatting import percent
from hfedmoe_ray.types import ExpertPlan, FloatArray, Role, Weights

if TYPE_CHECKING:
    from hfedmoe_ray.moe.subset import SparseModel

PER_LAYER = (1, 2, 4, 8)
"""Merged experts, as a multiple of the number of layers; how they are spread over layers is Flux's rule."""
COMPONENTS = 8
"""Principal components of the expert weights that clusters are made from."""
MERGE, MEAN, DROP, MORE = "merge", "mean", "drop", "drop, more residents"
_EXAMPLES = 64
"""Examples of a client that pass through the model."""

Errors = dict[str, dict[int, FloatArray]]
"""By treatment and number of merged experts: error of each layer, [L], mean over clients."""


def measure(setting: Setting) -> Findings:
    """Error of each treatment in each layer, by the number of merged experts."""
    from hfedmoe_ray.prepare import prepare_run

    found: list[Errors] = []
    for seed in setting.seeds:
        setting.tell(f"forward passes, seed {seed}")
        found.append(layer_errors(prepare_run(setting.experiment(seed), setting.output)))
    totals = list(found[0][MERGE])
    layers = len(found[0][MERGE][totals[0]])
    by_layer = {
        name: {
            total: [mean_of([float(one[name][total][layer]) for one in found]) for layer in range(layers)]
            for total in totals
        }
        for name in (MERGE, MEAN, DROP, MORE)
    }
    whole = {
        name: {total: mean_of([float(one[name][total].mean()) for one in found]) for total in totals}
        for name in by_layer
    }
    return _findings(setting, by_layer, whole)


def layer_errors(context: RunContext) -> Errors:
    """The errors of one model, whose clients keep their most used experts within their budgets."""
    from hfedmoe_ray import budget
    from hfedmoe_ray.data.dataset import FederatedDataset
    from hfedmoe_ray.moe.prepare import initial_weights
    from hfedmoe_ray.moe.subset import SparseModel
    from hfedmoe_ray.strategies.merging import merge_absent, principal_components
    from hfedmoe_ray.strategies.scores import mask, resident_plan, top_experts, uniform_plan
    from hfedmoe_ray.train.examples import Examples
    from hfedmoe_ray.types import TaskWeights

    experiment, shape = context.experiment, (context.model.shape.layers, context.model.shape.experts)
    weights = initial_weights(context.model, experiment.model.trainable, experiment.model.lora, experiment.seed)
    model = SparseModel(context.model.path, lora=experiment.model.lora)
    everything = TaskWeights(shared=weights.shared, experts=weights.experts)
    model.bind(uniform_plan(shape, Role.FROZEN), everything, experiment.model.trainable)
    points = [principal_components(weights.experts, layer, COMPONENTS) for layer in range(shape[0])]
    data = FederatedDataset(context.data, experiment.data)
    held_by = [budget.expert_counts(tier, context.model.shape)[0] for tier in budget.tier_of(experiment.clients)]
    # Numbers that every client has absent experts for, so that each is a mean over the same clients.
    totals = [n for n in (shape[0] * each for each in PER_LAYER) if max(held_by) + n < shape[0] * shape[1]]
    if not totals:
        raise ConfigError(
            "The study replaces the experts that clients do not hold, but with these budgets some client holds nearly "
            "all. Lower the tiers' `experts`, such as clients.tiers.0.experts=0.125."
        )
    errors: dict[str, dict[int, list[FloatArray]]] = {name: {} for name in (MERGE, MEAN, DROP, MORE)}
    for client, held in enumerate(held_by):
        split = data.train(client)
        seen = Layers(model)
        _, inputs = Examples(split, None).inputs(model, np.arange(min(len(split), _EXAMPLES)))
        seen.run(inputs)
        counts = model.tape.counts()
        frequency = counts / counts.sum(axis=1, keepdims=True)

        def kept(number: int, used: FloatArray = frequency) -> ExpertPlan:
            chosen = top_experts(used, np.ones(shape, dtype=bool), min(number, used.size), "global")
            # Held for the forward pass alone: nothing trains here.
            plan = resident_plan(shape, chosen, "drop", None)
            return replace(plan, roles=tuple(tuple(min(role, Role.FROZEN) for role in row) for row in plan.roles))

        base = kept(held)
        absent = ~mask(shape, base.present)
        for total in totals:
            merged = merge_absent(absent, points, frequency, total)
            for name, plan in (
                (MERGE, replace(base, absent="merge", merged=merged)),
                (MEAN, replace(base, absent="mean")),
                (DROP, base),
                (MORE, kept(held + len(merged))),
            ):
                errors[name].setdefault(total, []).append(seen.errors(plan, weights))
    return {name: {total: np.mean(some, axis=0) for total, some in one.items()} for name, one in errors.items()}


class Layers:
    """The experts of every layer of a whole model, with what they were given in one forward pass and returned."""

    def __init__(self, model: "SparseModel") -> None:
        self._model = model
        self._inputs: list[Any] = []
        self.outputs: list[Any] = []
        """What the experts of each layer returned, [B * S, H]."""

    def run(self, inputs: Mapping[str, Any]) -> None:
        """Passes a batch through the whole model, whose arguments are given."""
        import torch

        layout = self._model.layout
        modules = [getattr(block, layout.experts_name) for block in layout.blocks]
        hooks = [module.register_forward_hook(self._note) for module in modules]
        with torch.inference_mode():
            self._model.module(**inputs)
        for hook in hooks:
            hook.remove()

    def _note(self, _module: Any, args: tuple[Any, ...], output: Any) -> None:
        self._inputs.append(args)
        self.outputs.append(output)

    def errors(self, plan: ExpertPlan, weights: Weights) -> FloatArray:
        """Relative error of every layer that holds a plan's experts and gets the whole model's inputs, [L]."""
        import torch

        from hfedmoe_ray.moe.derived import merged_expert
        from hfedmoe_ray.moe.residents import ResidentExperts

        made = [merged_expert(one, weights.experts) for one in plan.merged]
        found = []
        for layer, (given, exact) in enumerate(zip(self._inputs, self.outputs, strict=True)):
            part = ResidentExperts(layer, self._model.layout, self._model.tape)
            means = None if weights.means is None else weights.means[layer]
            part.bind(plan, weights.experts, means, self._model.device, made)
            real = self._model.tape.real(layer)
            with torch.inference_mode():
                off = part(*given) - exact
                errors = [(one if real is None else one[real]).norm() for one in (off, exact)]
            found.append(float(errors[0] / errors[1]))
        return np.array(found)


def _findings(
    setting: Setting, by_layer: dict[str, dict[int, list[Mean]]], whole: dict[str, dict[int, Mean]]
) -> Findings:
    totals = list(whole[MERGE])
    few, many = totals[0], totals[-1]
    names = list(whole)
    layers = range(len(by_layer[MERGE][few]))
    below = [
        total
        for total in totals
        if all(by_layer[MERGE][total][layer].mean < by_layer[DROP][total][layer].mean for layer in layers)
    ]
    return Findings(
        numbers={"error_by_layer": by_layer, "error": whole, "below_drop_in_every_layer": below},
        headline=(
            f"With {few} merged experts in all, merging leaves an error of {percent(whole[MERGE][few].mean, 0)} of a "
            f"layer's output, means {percent(whole[MEAN][few].mean, 0)}, dropping {percent(whole[DROP][few].mean, 0)}."
        ),
        paragraph=(
            f"Merging is below dropping in every layer with {_listed(below)} merged experts of {_listed(totals)}. "
            f"With {many} of them its error is {percent(whole[MERGE][many].mean, 0)}; if the same room is given to "
            f"{many} further residents, and the rest is dropped, {percent(whole[MORE][many].mean, 0)}. Clients keep "
            "their most used experts within their budgets; the others are merged, replaced by their mean output, or "
            "left out. Each layer is given the inputs it has in the whole model, before training, so errors do not "
            "add up over layers. Merged experts are spread over layers and clustered by Flux's rules."
        ),
        figures=[
            Figure(
                caption="Error of a layer's output, mean of the layers",
                html=legend(names, lines=True)
                + curves(
                    [
                        Curve(
                            name=name,
                            points=[(total, one.mean) for total, one in whole[name].items()],
                            spread=[(one.low, one.high) for one in whole[name].values()],
                        )
                        for name in names
                    ],
                    label="Relative error by number of merged experts",
                    across="merged experts, all layers",
                    write=lambda share: f"{100 * share:.0f} %",
                    write_x=lambda total: f"{total:.0f}",
                    doubling=True,
                ),
            ),
            Figure(
                caption=f"By layer, {few} merged experts in all",
                html=legend(names)
                + grouped_bars(
                    {f"layer {layer}": {name: by_layer[name][few][layer].mean for name in names} for layer in layers},
                    label="Relative error by layer",
                    write=lambda share: f"{100 * share:.1f} %",
                ),
            ),
        ],
        tables=[
            Table(
                title="Error by layer",
                headings=["*Merged", *(f"*Layer {layer}: {name}" for layer in layers for name in names)],
                rows=[
                    [str(total), *(percent(by_layer[name][total][layer].mean) for layer in layers for name in names)]
                    for total in totals
                ],
                note="Relative error |out' − out| / |out| of a layer's experts, mean over clients and "
                f"{len(setting.seeds)} seeds.",
            )
        ],
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


STUDY = Study(
    name="merging",
    title="What stands in for absent experts",
    shows="error of each layer's output: merging against means and dropping",
    cost="forward passes only: two minutes, and three models to prepare",
    config="study_small.yaml",
    measure=measure,
)
