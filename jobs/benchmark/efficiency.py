"""How much of a round's time is training: seconds of bare PyTorch steps over the round's wall time on all cores.

hfedmoe bench efficiency [--json FILE] [--rounds 4] [--steps N]

The quickstart on Ray, ten clients a round, evaluation off. What its clients had to compute is then computed again as a
PyTorch user writes it: the same sub-models on the same inputs (states that enter the first MoE layer), AdamW, without
engine, selection or profile, in as many processes at once as there are cores. The share is

    busy = sum over a round's clients of steps * seconds of such a step / (seconds of the round * cores)

What is missing to 1: fetching and binding weights, making an engine, checksums, packing, sending, reducing, publishing,
and cores that wait for the round's last client.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; the actors of the run get theirs anyway

import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import numpy as np
import torch
from output import Row, json_option, publish
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from hfedmoe_ray.budget import expert_counts, tier_of
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.data.dataset import FederatedDataset
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.moe.quiet import quiet_transformers
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.runtime import session
from hfedmoe_ray.runtime.machine import this_machine
from hfedmoe_ray.strategies.scores import resident_plan, top_experts
from hfedmoe_ray.train.prefix import prefix_states
from hfedmoe_ray.types import TaskWeights

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
FIXED = ("evaluate.every=1000", "evaluate.own=never", "tracking.wandb.mode=disabled", "name=efficiency")
BAR = 0.85
WARM_UP, COUNTED = 3, 12
"""Steps of bare PyTorch by tier and process."""


class Rounds:
    """The training rounds of a run."""

    def __init__(self) -> None:
        """Starts empty."""
        self.reports: list[RoundReport] = []

    def __call__(self, name: str, fields: Any) -> None:
        """Follows a run (see `federate.Render`)."""
        if name == "round" and isinstance(fields, RoundReport) and fields.round > 0:
            self.reports.append(fields)


def bare_step_seconds(context: RunContext) -> dict[str, float]:
    """Seconds of a bare step by tier, in this process."""
    torch.set_num_threads(1)
    experiment, shape = context.experiment, context.model.shape
    tiers = tier_of(experiment.clients)
    data = FederatedDataset(context.data, experiment.data)
    weights = initial_weights(context.model, experiment.model.trainable, None, experiment.seed)
    means = np.zeros((shape.layers, shape.experts, shape.hidden), np.float32)
    seconds = {}
    with quiet_transformers():
        model = SparseModel(context.model.path)
        for tier in experiment.clients.tiers:
            client = max((c for c, own in enumerate(tiers) if own.name == tier.name), key=lambda c: len(data.train(c)))
            # As many experts as the tier holds, those that would be taken where all score the same.
            everywhere = np.ones((shape.layers, shape.experts))
            kept = top_experts(everywhere, everywhere > 0, expert_counts(tier, shape)[0], "per_layer")
            plan = resident_plan((shape.layers, shape.experts), kept, "mean", None)
            experts = {key: weights.experts[key] for key in plan.present}
            task = TaskWeights(shared=weights.shared, experts=experts, means=means)
            model.bind(plan, task, experiment.model.trainable)
            seconds[tier.name] = _steps(context, model, data, client)
    return seconds


def _steps(context: RunContext, model: SparseModel, data: FederatedDataset, client: int) -> float:
    """Mean seconds of a step of a bound model on a client's batches."""
    local, split = context.experiment.local, data.train(client)
    model.module.eval()
    states = prefix_states(model, context.model.sha256, split, local)
    assert states is not None, "the quickstart's states fit the cache"
    model.module.train()
    experts = [p for tensors in model.expert_parameters.values() for p in tensors.values()]
    parameters = [*model.shared_parameters.values(), *experts]
    optimizer = torch.optim.AdamW(parameters, lr=local.learning_rate, weight_decay=local.weight_decay, fused=True)
    rng, taken = np.random.default_rng(0), []
    for _ in range(WARM_UP + COUNTED):
        started = time.perf_counter()
        indices = rng.permutation(len(split))[: local.batch_size]
        batch = split.batch(indices)
        mask = torch.from_numpy(batch.attention_mask)
        optimizer.zero_grad()
        hidden = states.batch(indices, mask.shape[1], model.device)
        logits = model.forward(torch.from_numpy(batch.input_ids), mask, hidden)
        torch.autograd.backward(cross_entropy(logits, torch.from_numpy(batch.labels)))
        clip_grad_norm_(parameters, local.clip_norm)
        optimizer.step()
        taken.append(time.perf_counter() - started)
    return mean(taken[WARM_UP:])


def bare_on_all_cores(context: RunContext, cores: int) -> Mapping[str, float]:
    """Seconds of a bare step by tier while every core is at it."""
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        found = [future.result() for future in [pool.submit(bare_step_seconds, context) for _ in range(cores)]]
    return {tier: mean(one[tier] for one in found) for tier in found[0]}


@click.command()
@json_option
@click.option("--rounds", default=4, show_default=True, help="Training rounds, of which the median is told.")
@click.option("--steps", type=int, help="Optimizer steps of a round. Default: the quickstart's.")
def main(json_file: Path | None, rounds: int, steps: int | None) -> None:
    """Share of the cores' time in a round that is training."""
    keys = [*FIXED, f"rounds={rounds}", *([f"local.steps={steps}"] if steps else [])]
    experiment = load_experiment(CONFIG, keys)
    cores = int(this_machine().cpus)
    followed = Rounds()
    with tempfile.TemporaryDirectory() as directory:
        context = prepare_run(experiment, Path(directory) / "bare")
        before = bare_on_all_cores(context, cores)
        session.run(experiment, Path(directory) / "run", resume=False, render=followed)
        after = bare_on_all_cores(context, cores)
    # The machine may have become quicker or slower meanwhile.
    bare = {tier: (before[tier] + after[tier]) / 2 for tier in before}
    busy, inside = [], []
    for report in followed.reports:
        available = cores * (report.seconds - report.phases.get("evaluate", 0.0))
        busy.append(sum(experiment.local.steps * bare[record.tier] for record in report.clients) / available)
        inside.append(sum(record.seconds for record in report.clients) / available)
    figures = {
        "busy_share": median(busy),
        "share_inside_clients": median(inside),
        "round_s": median(report.seconds for report in followed.reports),
        "bare_step_s": bare,
        "engine_step_s": {
            tier: mean(
                record.step_seconds / experiment.local.steps
                for report in followed.reports
                for record in report.clients
                if record.tier == tier
            )
            for tier in bare
        },
        "steps": experiment.local.steps,
        "cores": cores,
    }
    share = median(busy)
    rows = [
        Row(what="bare PyTorch steps over wall time x cores", measured=f"{share:.2f}", bar=f"≥ {BAR}", ok=share >= BAR),
        Row(what="clients' own time over wall time x cores", measured=f"{median(inside):.2f}"),
        Row(what="a round of ten clients", measured=f"{figures['round_s']:.1f} s"),
        *(Row(what=f"a bare step, {tier}", measured=f"{1000 * value:.0f} ms") for tier, value in bare.items()),
    ]
    publish(f"Efficiency of a round, {experiment.local.steps} steps", figures, rows, json_file)


if __name__ == "__main__":
    main()
