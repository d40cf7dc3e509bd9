"""Fractional clients on one GPU, at the real sizes of a published model, against bare PyTorch.

hfedmoe bench gpu [CONFIG [key=value ...]] [--json FILE] [--keep DIRECTORY]

The configuration's model with random weights of its published shapes, in bf16, so that nothing is downloaded; its
tiers, method, form and data are its own. After two federated rounds on Ray, one client trains alone on the GPU, by this
package's worker and by the loop a PyTorch user writes around the same sub-model (AdamW, no engine, no selection, no
profile), once with experts computed together and once one by one, and, where the frozen weights are exact, the whole
model by transformers and peft, factors on the same matrices. Memory is what torch's allocator of each client reserved
at its peak, against what `hfedmoe plan` says, told how long the texts are, without what CUDA keeps for a process.
"""

import gc
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch
from following import Rounds
from output import Row, json_option, publish
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from hfedmoe_ray.budget import expert_counts, tier_of
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.schema import Experiment, Tier
from hfedmoe_ray.context import RunContext, cache_dir
from hfedmoe_ray.data.dataset import FederatedDataset
from hfedmoe_ray.data.lengths import typical_lengths
from hfedmoe_ray.data.sources import load_raw
from hfedmoe_ray.estimates import CONTEXT_BYTES
from hfedmoe_ray.moe import adapters
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.moe.quiet import quiet_transformers
from hfedmoe_ray.moe.sharing import read_frozen
from hfedmoe_ray.moe.sources import read_config, resolve
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.plan import forecast
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.records import ClientRecord
from hfedmoe_ray.runtime import session
from hfedmoe_ray.train.examples import Examples, task_examples
from hfedmoe_ray.train.local import ClientWorker
from hfedmoe_ray.types import ClientTask, ExpertPlan, Role, TaskWeights
from hfedmoe_ray.wire import parse_metrics

CONFIG = Path(__file__).parents[2] / "configs" / "olmoe_1b_7b_lora.yaml"
FIXED = (
    "name=gpu",
    "rounds=2",
    "data.test_examples=64",
    "evaluate.every=1000",
    "evaluate.own=never",
    "tracking.wandb.mode=disabled",
)
TOLD = ("client", "tier", "tokens", "step_seconds", "seconds", "peak_mib")
WARM_UP, COUNTED = 2, 5
"""Steps of a loop."""
VOCABULARY = 8000
"""Words of the tokenizer, which is made from the data."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GIB = 2**30


# ---------------------------------------------------------------------------------------------------- the model


def random_model(experiment: Experiment, directory: Path) -> None:
    """Writes a model of the configured one's shapes, random, in bf16, and a tokenizer of its data's words."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    section = experiment.model
    fields = read_config(resolve(section.source, section.revision, config_only=True))
    config = AutoConfig.for_model(**fields)
    torch.manual_seed(0)
    with quiet_transformers(), torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(directory, max_shard_size="2GB")
    del model
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    raw = load_raw(experiment.data)
    words = ByteLevelBPETokenizer()
    texts = (*raw.train_texts[:2000], *(raw.train_prompts or ())[:2000])
    words.train_from_iterator(texts, vocab_size=min(VOCABULARY, config.vocab_size), special_tokens=["<pad>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(directory)


# ------------------------------------------------------------------------------------------------ federated rounds


@contextmanager
def device_memory() -> Iterator[list[int]]:
    """Yields a list that holds, when the block is left, the most bytes that all processes had on the GPU together."""
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            free, total = torch.cuda.mem_get_info()
            most[0] = max(most[0], total - free)

    thread = threading.Thread(target=watch)
    if DEVICE == "cuda":
        thread.start()
    try:
        yield most
    finally:
        ended.set()
        if DEVICE == "cuda":
            thread.join()


# --------------------------------------------------------------------------------------------------- one client


class Alone:
    """A client of the smallest tier with the GPU to itself."""

    def __init__(self, context: RunContext) -> None:
        """Reads the frozen weights onto the GPU, once for everything that follows."""
        experiment, shape = context.experiment, context.model.shape
        self._context = context
        self._tier: Tier = min(experiment.clients.tiers, key=lambda tier: tier.experts)
        names = [tier.name for tier in tier_of(experiment.clients)]
        self._client = names.index(self._tier.name)
        self._frozen = read_frozen(context.model.path, experiment.model.lora, torch.device(DEVICE))
        weights = initial_weights(context.model, experiment.model.trainable, experiment.model.lora, experiment.seed)
        self._weights = TaskWeights(shared=weights.shared, experts=weights.experts, means=weights.means)
        resident, _ = expert_counts(self._tier, shape)
        row = tuple(Role.TRAIN if e < resident // shape.layers else Role.FROZEN for e in range(shape.experts))
        plan = ExpertPlan(roles=(row,) * shape.layers)
        self._task = ClientTask(kind="train", round=1, client=self._client, seed=0, plan=plan, version=0)

    def worker(self) -> float:
        """Tokens a second of this package's worker."""
        worker = ClientWorker(self._context, frozen=self._frozen)
        for _ in range(2):  # the first task allocates
            _, answer, _ = worker.execute(self._task, self._weights, lambda: False)
        metrics = parse_metrics(answer)
        return metrics.tokens / metrics.step_seconds

    def bare(self, *, together: bool = True) -> float:
        """Tokens a second of a plain loop around the same sub-model; experts one by one unless `together`."""
        experiment = self._context.experiment
        model = SparseModel(self._context.model.path, lora=experiment.model.lora, frozen=self._frozen)
        with nullcontext() if together else patch.object(adapters, "groups_on", lambda _: False):
            model.bind(self._task.plan, self._weights, experiment.model.trainable)
        data = FederatedDataset(self._context.data, experiment.data)
        examples = task_examples(model, self._context.model.sha256, data, experiment, self._task, hostile=None)
        factors = [p for tensors in model.expert_parameters.values() for p in tensors.values()]
        model.module.train()

        def forward(indices: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
            batch, inputs = examples.inputs(model, indices)
            logits = model.module(**inputs).logits
            return logits, torch.from_numpy(batch.labels).to(DEVICE), int(batch.attention_mask.sum())

        return self._steps(forward, [*model.shared_parameters.values(), *factors], examples)

    def peft(self, source: Path) -> float:
        """Tokens a second of transformers and peft, with factors on every expert and on attention."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        experiment = self._context.experiment
        assert experiment.model.lora is not None
        sparse = SparseModel(self._context.model.path, lora=experiment.model.lora, frozen=self._frozen)
        data = FederatedDataset(self._context.data, experiment.data)
        examples = task_examples(sparse, self._context.model.sha256, data, experiment, self._task, hostile=None)
        with quiet_transformers():
            plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).to(DEVICE)
        plain.config.use_cache = False
        layout = sparse.layout
        lora = LoraConfig(
            r=experiment.model.lora.rank,
            lora_alpha=experiment.model.lora.alpha,
            target_modules=list(layout.projections),
            target_parameters=[f"{layout.experts_name}.{name}" for name in layout.expert_shapes],
        )
        adapted = get_peft_model(plain, lora)
        adapted.train()

        def forward(indices: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
            batch, inputs = examples.inputs(sparse, indices)
            targets = next(inputs.pop(name) for name in list(inputs) if name not in ("input_ids", "attention_mask"))
            logits = adapted(**inputs).logits[targets]
            return logits, torch.from_numpy(batch.labels).to(DEVICE), int(batch.attention_mask.sum())

        return self._steps(forward, [p for p in adapted.parameters() if p.requires_grad], examples)

    def _steps(self, forward: Callable[[Any], Any], parameters: list[Any], examples: Examples) -> float:
        local, rng = self._context.experiment.local, np.random.default_rng(0)
        optimizer = torch.optim.AdamW(parameters, lr=local.learning_rate, weight_decay=local.weight_decay, fused=True)
        size = min(self._tier.micro_batch or local.batch_size, local.batch_size)
        speeds = []
        for _ in range(WARM_UP + COUNTED):
            started, tokens = time.perf_counter(), 0
            indices = rng.permutation(len(examples.split))[: local.batch_size]
            optimizer.zero_grad()
            for start in range(0, len(indices), size):
                with torch.autocast(DEVICE, torch.bfloat16, enabled=local.precision == "bf16"):
                    logits, labels, read = forward(indices[start : start + size])
                torch.autograd.backward(cross_entropy(logits.float(), labels) * size / len(indices))
                tokens += read
            clip_grad_norm_(parameters, local.clip_norm)
            optimizer.step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            speeds.append(tokens / (time.perf_counter() - started))
        return statistics.median(speeds[WARM_UP:])


def free() -> None:
    """Gives the memory of what is gone back to the GPU."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------- figures


@contextmanager
def timed(what: str, seconds: dict[str, float]) -> Iterator[None]:
    """Notes and tells how long a block takes."""
    started = time.perf_counter()
    yield
    seconds[what] = round(time.perf_counter() - started, 1)
    click.echo(f"{what}: {seconds[what]} s", err=True)


def memory(context: RunContext, results: list[ClientRecord]) -> dict[str, dict[str, float]]:
    """Predicted and seen peak of a client's memory in MiB, by tier; without what CUDA keeps for its process."""
    gpu = DEVICE == "cuda"
    lengths = typical_lengths(context)
    told = forecast(context.experiment, context.model.shape, gpus_available=gpu, lengths=lengths, measured=False)
    found = {}
    for one in told:
        peaks = [result.peak_mib for result in results if result.tier == one.tier]
        if peaks:
            predicted = (one.memory_bytes - (CONTEXT_BYTES if gpu else 0)) / 2**20
            found[one.tier] = {"experts": one.resident, "predicted_mib": round(predicted), "seen_mib": max(peaks)}
    return found


@click.command()
@click.argument("config", default=CONFIG, type=click.Path(exists=True, path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--keep", type=click.Path(path_type=Path), help="Where the random model is written, and stays.")
@json_option
def main(config: Path, overrides: tuple[str, ...], keep: Path | None, json_file: Path | None) -> None:
    """Fractional clients on one GPU at the real sizes of a published model."""
    named = load_experiment(config, overrides)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=_made(cache_dir() / "benchmark")) as temporary:
        source = keep or Path(temporary) / "model"
        if not source.is_dir():
            with timed("making a random model", seconds):
                random_model(named, source)
        keys = [*FIXED, *overrides, f"model.source={source}", "model.revision=null"]
        experiment = load_experiment(config, keys)
        with timed("preparing it", seconds):
            context = prepare_run(experiment, Path(temporary) / "run")
        followed = Rounds()
        free()
        with timed("two federated rounds", seconds), device_memory() as most:
            session.run(experiment, Path(temporary) / "run", resume=False, render=followed)
        results = [record for report in followed.reports for record in report.clients]
        failed = [record.reason for record in results if record.status != "ok"]
        if failed:
            raise click.ClickException(f"{len(failed)} of {len(results)} clients failed: {failed[0]}")
        alone = Alone(context)
        speeds = {}
        with timed("one client alone", seconds):
            for name, measure in (
                ("worker", alone.worker),
                ("bare", alone.bare),
                ("bare, one by one", lambda: alone.bare(together=False)),
            ):
                speeds[name] = round(measure(), 1)
                click.echo(f"{name}: {speeds[name]} tokens/s", err=True)
                free()
        if experiment.model.lora and experiment.model.lora.base == "exact":
            with timed("transformers and peft", seconds):
                try:
                    speeds["peft"] = round(alone.peft(source), 1)
                except torch.OutOfMemoryError as error:
                    click.echo(f"transformers and peft need more than the GPU has: {error}", err=True)
        if keep is None:
            shutil.rmtree(source)
    last = followed.reports[-1]
    busy = sum(last.phases.get(phase, 0.0) for phase in ("train", "wait"))
    figures = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "model": config.stem,
        "parameters": round(_parameters(context)),
        "clients_a_round": len(last.clients),
        "together_tokens_per_s": round(sum(record.tokens for record in last.clients) / busy, 1),
        "alone_tokens_per_s": speeds,
        "worker_over_bare": round(speeds["worker"] / speeds["bare"], 3),
        "memory": memory(context, results),
        "device_peak_gib": round(most[0] / GIB, 1),
        "seconds": seconds,
        "round_seconds": [round(report.seconds, 1) for report in followed.reports],
        "phases": {name: round(value, 2) for name, value in last.phases.items()},
        "clients": [{name: getattr(record, name) for name in TOLD} for record in last.clients],
    }
    click.echo(json.dumps(figures), err=True)
    publish("Fractional clients on one GPU", figures, _rows(figures), json_file)


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _parameters(context: RunContext) -> float:
    shape = context.model.shape
    expert = shape.dense_expert_bytes or shape.expert_bytes
    return (shape.total_experts * expert + shape.shared_bytes + shape.frozen_bytes) / 4


def _rows(figures: dict[str, Any]) -> list[Row]:
    alone = figures["alone_tokens_per_s"]
    rows = [
        Row(what="parameters", measured=f"{figures['parameters'] / 1e9:.1f} billion"),
        Row(
            what=f"{figures['clients_a_round']} clients of a round together",
            measured=f"{figures['together_tokens_per_s']:.0f} tokens/s",
        ),
        *(Row(what=f"one client alone: {name}", measured=f"{speed:.0f} tokens/s") for name, speed in alone.items()),
        Row(
            what="worker over the plain loop",
            measured=f"{figures['worker_over_bare']:.2f}",
            bar="≥ 0.90",
            ok=figures["worker_over_bare"] >= 0.9,
        ),
        Row(what="most on the GPU", measured=f"{figures['device_peak_gib']:.1f} GiB"),
    ]
    for tier, found in figures["memory"].items():
        off = found["predicted_mib"] / found["seen_mib"] - 1
        rows.append(
            Row(
                what=f"{tier}, {found['experts']} experts",
                measured=f"{found['seen_mib']:.0f} MiB; predicted {found['predicted_mib']:.0f}, {off:+.0%}",
                bar="± 15%",
                ok=abs(off) <= 0.15,
            )
        )
    return rows


if __name__ == "__main__":
    main()
