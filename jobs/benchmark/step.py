"""What a training step costs, relative to training every expert, to bare PyTorch and to no prefix cache.

Every figure comes from `ClientWorker.execute`, the code that serves clients: it asks before each step whether to stop,
and the time between two questions is a step. The first steps of a task, which allocate, are left out. One thread
computes, and on the CPU its seconds are counted, not the wall's, so that other processes count less. Variants take
turns; a ratio is the median of the turns' ratios.

A batch has 8 texts of 64 tokens. In `masked`, all experts are held and a quarter get gradients; in `reroute`, `mean`
and `drop`, a quarter are held, chosen from the client's routing profile.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import model as benchmark
import numpy as np
import torch
from output import Row, json_option, publish
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.strategies import HFedMoE
from hfedmoe_ray.context import RunContext, cache_dir
from hfedmoe_ray.data.dataset import FederatedDataset
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.moe.quiet import quiet_transformers
from hfedmoe_ray.moe.routing import ProfileAccumulator, RoutingTape
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.strategies import hfedmoe
from hfedmoe_ray.strategies.scores import uniform_plan
from hfedmoe_ray.train.deepspeed_config import deepspeed_config
from hfedmoe_ray.train.engine import Engine
from hfedmoe_ray.train.local import ClientWorker
from hfedmoe_ray.types import Array, ClientInfo, ClientTask, ExpertPlan, Role, RoutingProfile, TaskKind, TaskWeights
from hfedmoe_ray.wire import parse_metrics, unpack_update

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SHARE = 0.25
WARM_UP, COUNTED = 2, 3
"""Steps of a task, at each of its turns."""
BARS = {"reroute": None, "mean": 0.65, "drop": 0.65, "masked": 0.85}
CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time
Turn = Callable[[], Sequence[float]]
"""Takes some steps and returns the seconds of each."""


class Client:
    """A worker that serves client 0, and the weights it starts from each time."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.worker = ClientWorker(context)
        self.shape = context.model.shape
        weights = initial_weights(context.model, context.experiment.model.trainable)
        means = np.zeros((self.shape.layers, self.shape.experts, self.shape.hidden), np.float32)
        self.weights = TaskWeights(shared=weights.shared, experts=weights.experts, means=means)

    def everything(self, batch_budget: int | None = None) -> ExpertPlan:
        """Every expert trains, or `batch_budget` of them in a batch."""
        return uniform_plan((self.shape.layers, self.shape.experts), Role.TRAIN, batch_budget)

    def residents(self, absent: str, share: float) -> ExpertPlan:
        """A share of the experts, as HFedMoE chooses them from the client's profile."""
        count = int(share * self.shape.total_experts)
        info = ClientInfo(client=0, tier="any", resident_experts=count, batch_experts=count, samples=1)
        strategy = hfedmoe.HFedMoE(HFedMoE.model_validate({"unselected": absent}), self.shape, 0)
        return strategy.plan(1, [info], {0: self._profile()})[0]

    def steps(self, plan: ExpertPlan) -> list[float]:
        """Seconds of each counted step of one task."""
        asked: list[float] = []

        def should_stop() -> bool:
            asked.append(CLOCK())
            return False

        self.worker.execute(self.task("train", plan), self.weights, should_stop)
        return [after - before for before, after in pairwise(asked)][WARM_UP:]

    def _profile(self) -> RoutingProfile:
        payload, metrics, _ = self.worker.execute(self.task("profile", self.everything()), self.weights, lambda: False)
        profile = unpack_update(payload, parse_metrics(metrics)).profile
        assert profile is not None
        return profile

    @staticmethod
    def task(kind: TaskKind, plan: ExpertPlan) -> ClientTask:
        """A task for client 0."""
        return ClientTask(kind=kind, round=1, client=0, seed=0, plan=plan, version=0)


def bare_pytorch(client: Client, **adamw: Any) -> Turn:
    """The same sub-model, batches and steps as a PyTorch user writes them: no engine, no selection, no profile."""
    experiment = client.context.experiment
    local = experiment.local
    split = FederatedDataset(client.context.data, experiment.data).train(0)
    model = SparseModel(client.context.model.path)

    def turn() -> list[float]:
        model.bind(client.everything(), client.weights, experiment.model.trainable)
        model.module.train()
        experts = [p for tensors in model.expert_parameters.values() for p in tensors.values()]
        parameters = [*model.shared_parameters.values(), *experts]
        optimizer = torch.optim.AdamW(parameters, lr=local.learning_rate, weight_decay=local.weight_decay, **adamw)
        seconds = []
        for step in range(WARM_UP + COUNTED):
            started = CLOCK()
            batch = split.batch(np.arange(step * local.batch_size, (step + 1) * local.batch_size))
            optimizer.zero_grad()
            logits = model.forward(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask))
            torch.autograd.backward(cross_entropy(logits, torch.from_numpy(batch.labels)))
            clip_grad_norm_(parameters, local.clip_norm)
            optimizer.step()
            seconds.append(CLOCK() - started)
        # Between turns it should hold no more than the worker's model does.
        model.bind(uniform_plan((client.shape.layers, client.shape.experts), Role.ABSENT), client.weights, "experts")
        return seconds[WARM_UP:]

    return turn


def take_turns(variants: Mapping[str, Turn], repetitions: int) -> dict[str, Array]:
    """Seconds of a step of each variant, at each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repetitions):
        for name, turn in variants.items():
            seconds[name].append(statistics.median(turn()))
            gc.collect()
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(one: Array, other: Array) -> float:
    """Median of the turns' ratios."""
    return round(float(np.median(one / other)), 3)


@contextmanager
def clock(*methods: tuple[type, str]) -> Iterator[list[float]]:
    """Yields a list to which every call of one of these methods adds its seconds."""
    seconds: list[float] = []

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = CLOCK()
            result = method(*args, **kwargs)
            seconds.append(CLOCK() - started)
            return result

        return wrapper

    originals = [(owner, name, getattr(owner, name)) for owner, name in methods]
    for owner, name, method in originals:
        setattr(owner, name, timed(method))
    try:
        yield seconds
    finally:
        for owner, name, method in originals:
            setattr(owner, name, method)


def selection_overhead(client: Client, plan: ExpertPlan, repetitions: int) -> float:
    """Share of a step spent on recording the routing, profiling it, scoring and selecting."""
    parts = [(RoutingTape, "record"), (RoutingTape, "record_output"), (hfedmoe.HFedMoE, "select")]
    parts += [(ProfileAccumulator, name) for name in ("__init__", "add", "profile", "merge")]
    shares = []
    for _ in range(repetitions):
        asked: list[float] = []
        spent: list[float] = []
        with clock(*parts) as seconds:

            def should_stop(asked: list[float] = asked, spent: list[float] = spent, seconds: Any = seconds) -> bool:
                asked.append(CLOCK())
                spent.append(sum(seconds))
                return False

            client.worker.execute(client.task("train", plan), client.weights, should_stop)
        shares += list((np.diff(spent) / np.diff(asked))[WARM_UP:])
    return float(np.median(shares))


def engine_seconds(client: Client, plan: ExpertPlan) -> float:
    """Seconds to build an engine for a bound model and to take it down."""
    local, tier = client.context.experiment.local, client.context.experiment.clients.tiers[0]
    model = SparseModel(client.context.model.path)
    model.bind(plan, client.weights, client.context.experiment.model.trainable)
    shared, config = list(model.shared_parameters.values()), deepspeed_config(local, tier, model.device.type)
    seconds = []
    for _ in range(5):
        started = CLOCK()
        with Engine(model.module, shared, model.expert_parameters, local, config):
            pass
        seconds.append(CLOCK() - started)
    return statistics.median(seconds)


def prefix_cache_speedup(repetitions: int) -> dict[str, float]:
    """Time of a step of the quickstart without the cache over one with it: of its clients together, and by tier."""
    steps = WARM_UP + COUNTED + 1
    clients = {}
    for cache in ("auto", "off"):
        experiment = load_experiment(QUICKSTART, [f"local.cache={cache}", f"local.steps={steps}"])
        clients[cache] = Client(prepare_run(experiment, cache_dir() / "benchmark" / "run"))
    tiers = {}
    for tier in experiment.clients.tiers:
        plan = clients["off"].residents("mean", tier.experts)
        variants = {name: partial(client.steps, plan) for name, client in clients.items()}
        tiers[tier.name] = take_turns(variants, repetitions)
    shares = np.array([tier.share for tier in experiment.clients.tiers])
    off, auto = (shares @ np.array([seconds[cache] for seconds in tiers.values()]) for cache in ("off", "auto"))
    return {"all": ratio(off, auto)} | {name: ratio(seconds["off"], seconds["auto"]) for name, seconds in tiers.items()}


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--repetitions", type=click.IntRange(1), default=5, show_default=True, help="Turns of each variant.")
@json_option
def main(repetitions: int, json_file: Path | None) -> None:
    """Measures and publishes."""
    torch.set_num_threads(1)
    with quiet_transformers():
        client = Client(benchmark.prepared(f"local.steps={WARM_UP + COUNTED + 1}"))
        count = int(SHARE * client.shape.total_experts)
        plans = {"full": client.everything(), "masked": client.everything(count)}
        plans |= {absent: client.residents(absent, SHARE) for absent in ("reroute", "mean", "drop")}
        variants: dict[str, Turn] = {name: partial(client.steps, plan) for name, plan in plans.items()}
        variants |= {"torch": bare_pytorch(client, fused=True), "default torch": bare_pytorch(client)}
        seconds = take_turns(variants, repetitions)
        overhead = {name: round(selection_overhead(client, plans[name], 2), 4) for name in ("full", "masked", "drop")}
        build = {name: round(engine_seconds(client, plans[name]), 4) for name in ("full", "drop")}
        cache = prefix_cache_speedup(repetitions)
    figures = {
        "deepspeed_over_torch": ratio(seconds["full"], seconds["torch"]),
        "deepspeed_over_torch_default_adamw": ratio(seconds["full"], seconds["default torch"]),
        "time_ratio": {name: {str(SHARE): ratio(seconds[name], seconds["full"])} for name in BARS},
        "selection_overhead": max(overhead.values()),
        "selection_overhead_by_variant": overhead,
        "prefix_cache_speedup": cache.pop("all"),
        "prefix_cache_speedup_by_tier": cache,
        "engine_seconds": {"1.0": build["full"], str(SHARE): build["drop"]},
        "step_seconds": {name: round(float(np.median(values)), 4) for name, values in seconds.items()},
        "repetitions": repetitions,
    }
    publish("Time of a training step", figures, _rows(figures), json_file)


def _rows(figures: dict[str, Any]) -> list[Row]:
    over, overhead, cache = (figures[k] for k in ("deepspeed_over_torch", "selection_overhead", "prefix_cache_speedup"))
    default = figures["deepspeed_over_torch_default_adamw"]
    rows = [
        Row(what="engine over bare PyTorch, fused AdamW both", measured=f"{over:.2f}", bar="≤ 1.10", ok=over <= 1.1),
        Row(what="engine over bare PyTorch, its default AdamW", measured=f"{default:.2f}"),
    ]
    for name, bar in BARS.items():
        value = figures["time_ratio"][name][str(SHARE)]
        what = f"{SHARE:.0%} of the experts {'active' if name == 'masked' else 'held'} ({name}) over all"
        asked = {} if bar is None else {"bar": f"≤ {bar:.2f}", "ok": value <= bar}
        rows.append(Row(what=what, measured=f"{value:.2f}", **asked))
    rows += [
        Row(
            what="profile, score and selection in a step", measured=f"{overhead:.1%}", bar="≤ 3 %", ok=overhead <= 0.03
        ),
        Row(what="quickstart without over with prefix cache", measured=f"{cache:.2f}", bar="≥ 2", ok=cache >= 2),
    ]
    rows += [
        Row(what=f"engine for {float(share):.0%} of the experts, made and left", measured=f"{seconds:.3f} s")
        for share, seconds in figures["engine_seconds"].items()
    ]
    return rows


if __name__ == "__main__":
    main()
