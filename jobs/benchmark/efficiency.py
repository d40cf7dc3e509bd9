"""How much of a round's time is training: seconds of bare PyTorch steps over the round's wall time on all cores.

hfedmoe bench efficiency [--json FILE] [--rounds 4] [--steps N]

The quickstart on Ray, ten clients a round, evaluation off. What its clients had to compute is then computed again as a
PyTorch user writes it: the sub-models of the strategy's own plans, with the weights the run ended with, on the same
inputs (states that enter the first MoE layer), as many steps of a new AdamW, without engine, selection or profile, in
as many processes at once as there are cores. The share is

    busy = sum over a round's clients of seconds of such steps / (seconds of the round * cores)

What is missing to 1: fetching and binding weights, making an engine, profiles, checksums, packing, sending, reducing,
publishing, and cores that wait for the round's last client; and what other programs took of the cores in the meantime,
which is told. Bare steps are counted in seconds of their core, so that nothing else on the machine lengthens them.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; the actors of the run get theirs anyway

import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import psutil
import torch
from following import Rounds
from output import Row, json_option, publish
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.data.dataset import FederatedDataset
from hfedmoe_ray.federation.rounds import Federation
from hfedmoe_ray.moe.quiet import quiet_transformers
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.runtime import session
from hfedmoe_ray.runtime.local import LocalExecutor, task_weights
from hfedmoe_ray.runtime.machine import this_machine
from hfedmoe_ray.tracking.tracker import Trackers
from hfedmoe_ray.train.examples import batches
from hfedmoe_ray.train.prefix import prefix_states
from hfedmoe_ray.types import ClientTask

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
FIXED = (
    "evaluate.every=1000",
    "evaluate.overlap=false",
    "evaluate.own=never",
    "tracking.wandb.mode=disabled",
    "name=efficiency",
)
BAR = 0.85


class BusyRounds(Rounds):
    """Training rounds, and how busy the cores were meanwhile."""

    def __init__(self) -> None:
        """Starts empty."""
        super().__init__()
        self._seen: list[tuple[float, float]] = []
        """Seconds that all cores were busy, and those that they were for this process and all below it, by round."""

    def __call__(self, name: str, fields: Any) -> None:
        """Follows a run (see `federate.Render`)."""
        super().__call__(name, fields)
        if name == "round":
            self._seen.append((_busy_seconds(), _own_seconds()))

    def others(self) -> float:
        """Seconds of the cores in these rounds that other programs took."""
        (all_before, own_before), (all_after, own_after) = self._seen[0], self._seen[-1]
        return max(0.0, all_after - all_before - (own_after - own_before))


def _busy_seconds() -> float:
    """Seconds that the cores of this machine have worked."""
    times = psutil.cpu_times()
    return float(sum(times[:8]) - times.idle - getattr(times, "iowait", 0.0))


def _own_seconds() -> float:
    """Seconds of them for this process and all below it."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue  # it has ended since it was listed
    return total


def bare_step_seconds(context: RunContext, share: tuple[int, int]) -> dict[int, float]:
    """Seconds of a bare step by client, of the core of this process.

    Args:
        context: Of the run that has ended, whose last checkpoint is read.
        share: (i, n): clients i, i + n, ... are this process's part.
    """
    torch.set_num_threads(1)
    experiment = context.experiment
    federation = Federation(context, LocalExecutor(context), Trackers(()), resume=True)
    weights, round = federation.state.weights, federation.state.round
    federation.strategy.study(weights)
    clients = [federation.client_info(client) for client in range(experiment.clients.count)]
    plans = federation.strategy.plan(round, clients, federation.state.profiles)
    data = FederatedDataset(context.data, experiment.data)
    mine = range(share[0], len(clients), share[1])
    seconds = {}
    with quiet_transformers():
        model = SparseModel(context.model.path)
        for client in (mine[-1], *mine):  # the first one warms the process up, and is done again
            task = federation.task("train", round, client, plans[client])
            model.bind(plans[client], task_weights(weights, task), experiment.model.trainable)
            seconds[client] = _steps(context, model, data, task)
    return seconds


def _steps(context: RunContext, model: SparseModel, data: FederatedDataset, task: ClientTask) -> float:
    """Mean seconds of a bound model's steps on the batches of a client's task."""
    local, split = context.experiment.local, data.train(task.client)
    model.module.eval()
    states = prefix_states(model, context.model.sha256, split, local)
    assert states is not None, "the quickstart's states fit the cache"
    model.module.train()
    experts = [p for tensors in model.expert_parameters.values() for p in tensors.values()]
    parameters = [*model.shared_parameters.values(), *experts]
    optimizer = torch.optim.AdamW(parameters, lr=local.learning_rate, weight_decay=local.weight_decay, fused=True)
    taken = []
    for indices in batches(local, task, len(split)):
        started = time.process_time()
        batch = split.batch(indices)
        mask = torch.from_numpy(batch.attention_mask)
        optimizer.zero_grad()
        hidden = states.batch(indices, mask.shape[1], model.device)
        logits = model.forward(torch.from_numpy(batch.input_ids), mask, hidden)
        torch.autograd.backward(cross_entropy(logits, torch.from_numpy(batch.labels)))
        clip_grad_norm_(parameters, local.clip_norm)
        optimizer.step()
        taken.append(time.process_time() - started)
    return mean(taken)


def bare_on_all_cores(context: RunContext, cores: int) -> dict[int, float]:
    """Seconds of a bare step by client while every core is at it."""
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        parts = [pool.submit(bare_step_seconds, context, (part, cores)) for part in range(cores)]
        return {client: value for part in parts for client, value in part.result().items()}


@click.command()
@json_option
@click.option("--rounds", default=4, show_default=True, help="Training rounds, of which the median is told.")
@click.option("--steps", type=int, help="Optimizer steps of a round. Default: the quickstart's.")
def main(json_file: Path | None, rounds: int, steps: int | None) -> None:
    """Share of the cores' time in a round that is training."""
    keys = [*FIXED, f"rounds={rounds}", *([f"local.steps={steps}"] if steps else [])]
    experiment = load_experiment(CONFIG, keys)
    cores = int(this_machine().cpus)
    followed = BusyRounds()
    with tempfile.TemporaryDirectory() as directory:
        session.run(experiment, Path(directory), resume=False, render=followed)
        bare = bare_on_all_cores(prepare_run(experiment, Path(directory)), cores)
    steps = experiment.local.steps
    busy, inside, stepping = [], [], []
    for report in followed.reports:
        available = cores * (report.seconds - report.phases.get("evaluate", 0.0))
        busy.append(sum(steps * bare[record.client] for record in report.clients) / available)
        inside.append(sum(record.seconds for record in report.clients) / available)
        stepping.append(sum(record.step_seconds for record in report.clients) / available)
    records = [record for report in followed.reports for record in report.clients]
    tiers = dict.fromkeys(record.tier for record in records)
    bare_s = {tier: mean(bare[r.client] for r in records if r.tier == tier) for tier in tiers}
    engine_s = {tier: mean(r.step_seconds / steps for r in records if r.tier == tier) for tier in tiers}
    share = median(busy)
    others = followed.others() / (cores * sum(report.seconds for report in followed.reports))
    figures = {
        "busy_share": share,
        "busy_share_of_ours": share / (1 - others),
        "share_of_others": others,
        "share_of_steps": median(stepping),
        "share_inside_clients": median(inside),
        "round_s": median(report.seconds for report in followed.reports),
        "bare_step_s": bare_s,
        "engine_step_s": engine_s,
        "steps": steps,
        "cores": cores,
    }
    rows = [
        Row(what="bare PyTorch steps over wall time x cores", measured=f"{share:.2f}", bar=f"≥ {BAR}", ok=share >= BAR),
        Row(what="the same of what other programs left", measured=f"{share / (1 - others):.2f}"),
        Row(what="the clients' steps, with engine and profile", measured=f"{median(stepping):.2f}"),
        Row(what="the clients' whole tasks", measured=f"{median(inside):.2f}"),
        Row(what="a round of ten clients", measured=f"{figures['round_s']:.1f} s"),
        *(
            Row(what=f"a step, {tier}", measured=f"{1000 * engine_s[tier]:.0f} ms, bare {1000 * bare_s[tier]:.0f}")
            for tier in tiers
        ),
    ]
    publish(f"Efficiency of a round, {experiment.local.steps} steps", figures, rows, json_file)


if __name__ == "__main__":
    main()
