"""The work of one client, as a pure function of (task, published weights, the client's own data).

Both backends run this same class, in one process or in many; one thread computes, because the number of threads
decides the last bits of a matrix product.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hfedmoe_ray.budget import tier_of
from hfedmoe_ray.config.section import Precision
from hfedmoe_ray.config.strategies import HFedMoE
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.data.batches import Batch
from hfedmoe_ray.data.benchmarks import stored_benchmark
from hfedmoe_ray.data.dataset import FederatedDataset, Split
from hfedmoe_ray.data.tokenize import load_tokenizer
from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.routing import ProfileAccumulator
from hfedmoe_ray.moe.store import check
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.moe.threads import one_thread
from hfedmoe_ray.seeds import derive_seed, generator
from hfedmoe_ray.strategies import build_strategy
from hfedmoe_ray.train.activations import checkpointed_layers
from hfedmoe_ray.train.answering import answered
from hfedmoe_ray.train.deepspeed_config import deepspeed_config
from hfedmoe_ray.train.engine import Engine, RankedEngine
from hfedmoe_ray.train.examples import Examples, batches, task_examples
from hfedmoe_ray.train.explore import squared_gradients
from hfedmoe_ray.train.frozen import check_unwritten, frozen_versions
from hfedmoe_ray.train.hostile import hostile_clients
from hfedmoe_ray.train.memory import PeakMemory, return_freed_memory
from hfedmoe_ray.train.private_steps import PrivateSteps, poisson_batches, step_noise
from hfedmoe_ray.train.proximal import Proximity
from hfedmoe_ray.train.ranks import JoinedRanks, Ranks
from hfedmoe_ray.train.steps import LocalSteps, Run, batch_labels
from hfedmoe_ray.train.telling import Telling
from hfedmoe_ray.types import (
    Array,
    ClientMetrics,
    ClientTask,
    ClientUpdate,
    ExpertKey,
    Prototypes,
    Role,
    TaskWeights,
)
from hfedmoe_ray.wire import Upload, checksum, dump_metrics, expert_name, make_upload, pack_update

if TYPE_CHECKING:
    from hfedmoe_ray.train.secure import SecureClients

ShouldStop = Callable[[], bool]


class Stopped(Exception):
    """The task was asked to stop between two steps; it leaves nothing behind."""


class ClientWorker:
    """Serves one client after another. Keeps the frozen base model between tasks and nothing of any client."""

    def __init__(self, context: RunContext, frozen: Mapping[str, Tensor] | None = None) -> None:
        """Loads the frozen base and opens the data.

        Args:
            context: The run.
            frozen: The frozen tensors, where another process of this GPU has read them (`moe.sharing`).

        Raises:
            ModelError: Another model lies where this run's should.
        """
        check(context.model)
        self._context = context
        self._experiment = context.experiment
        self._local = context.experiment.local
        self._tiers = tier_of(context.experiment.clients)
        self._alone = Ranks()
        self._joined: JoinedRanks | None = None
        with one_thread():
            self._model = SparseModel(context.model.path, lora=context.experiment.model.lora, frozen=frozen)
            self._data = FederatedDataset(context.data, context.experiment.data)
        self._strategy = build_strategy(self._experiment.strategy, context.model.shape, self._experiment.seed)
        self._secure = _secure_clients(context)
        self._hostile = hostile_clients(context)
        self._telling = Telling(self._experiment, self._strategy, self._tiers, self._model.shape)
        self._specific = self._experiment.strategy.specific if isinstance(self._experiment.strategy, HFedMoE) else "max"
        self._last: tuple[str, str] | None = None
        """Kind and tier of the task before."""
        # An engine is freed by the garbage collector; what has been loaded so far it need not search each time.
        gc.collect()
        gc.freeze()

    @property
    def device(self) -> torch.device:
        """Where this worker computes."""
        return self._model.device

    def join(self, ranks: JoinedRanks) -> None:
        """Makes this worker one of several ranks, for clients whose tier has so many."""
        self._joined, self._alone = ranks, ranks.alone

    def execute(self, task: ClientTask, weights: TaskWeights, should_stop: ShouldStop) -> tuple[bytes, bytes, bytes]:
        """Runs one task; with several ranks, as the first of them.

        Args:
            task: What to do.
            weights: The published weights the plan needs, read-only arrays that are never written, and the client's
                own state.
            should_stop: Polled between steps.

        Returns:
            The payload (safetensors; empty for an evaluation), the metrics (JSON of `ClientMetrics`), and the client's
            state where training changed it, else empty.

        Raises:
            Stopped: `should_stop` turned true.
        """
        started = time.perf_counter()
        state = b""
        if task.kind in ("keys", "shares", "upload", "unmask"):
            assert self._secure is not None, "a step of secure aggregation, which the run has not"
            payload, metrics = self._secure.answer(task)
            return payload, dump_metrics(replace(metrics, seconds=time.perf_counter() - started)), state
        with self._bound(task, weights) as examples:
            match task.kind:
                case "profile":
                    payload, metrics = self._profile(task, examples, should_stop)
                case "train":
                    upload, metrics = self._train(task, weights, examples, should_stop)
                    payload, state = upload.payload, upload.state
                case "evaluate" if task.split == "benchmark":
                    payload, metrics = self._answer(task, examples, should_stop)
                case "evaluate":
                    payload, metrics = self._evaluate(task, examples, should_stop)
                case "personalise":
                    payload, metrics = self._personalise(task, weights, examples, should_stop)
        seconds = time.perf_counter() - started
        if self._experiment.privacy.examples is not None and task.kind in ("profile", "train"):
            metrics = replace(metrics, loss=math.nan, tokens=0)
        return payload, dump_metrics(replace(metrics, seconds=seconds)), state

    def follow(self, task: ClientTask, weights: TaskWeights) -> None:
        """Takes a further rank's part in a task that the first one executes: in its local steps.

        Raises:
            Stopped: The first rank was asked to stop.
        """
        with self._bound(task, weights) as examples:
            if task.kind == "train":
                self._local_steps(task, weights, examples, _never)
            elif len(examples.split) > 0:
                task = _next_round(task)
                self._local_steps(task, weights, self._examples(task), _never)

    @contextmanager
    def _bound(self, task: ClientTask, weights: TaskWeights) -> Iterator[Examples]:
        """Gives the model a task's weights within a block, and yields the task's examples."""
        # Ranks draw dropout for different examples; that of a single one is the first's.
        rank = self._ranks_of(task).rank
        seed = derive_seed(task.seed, "torch", task.round, task.client, *((rank,) if rank else ()))
        work = (task.kind, self._tiers[task.client].name)
        if work != self._last:
            # The next one of its like needs what the last one has freed; another would be taken to need all of it.
            return_freed_memory()
        self._last = work
        # Models with dropout draw from torch's generator: forked, so that neither callers nor tasks share it.
        with one_thread(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self._model.bind(task.plan, weights, self._experiment.model.trainable)
                yield self._examples(task)
            finally:
                self._model.release()

    def _ranks_of(self, task: ClientTask) -> Ranks:
        """Who takes the local steps of a task's client together."""
        if self._joined is None or self._tiers[task.client].ranks == 1:
            return self._alone
        return self._joined

    # ------------------------------------------------------------------------------------------- the four tasks

    def _profile(self, task: ClientTask, examples: Examples, should_stop: ShouldStop) -> tuple[bytes, ClientMetrics]:
        """Forward passes over a sample of the client's data: its routing profile and the experts' mean outputs."""
        split = examples.split
        order = generator(task.seed, "profile", task.client).permutation(len(split))[: self._local.profile_examples]
        profile = self._new_profile()
        prototypes = self._empty_prototypes() if self._experiment.model.head == "prototypes" else None
        loss, predictions = 0.0, 0
        size = min(task.micro_batch or self._local.batch_size, self._local.batch_size)
        self._model.module.eval()
        with torch.inference_mode():
            for start in range(0, len(order), size):
                self._poll(should_stop)
                batch, logits = self._forward(examples, order[start : start + size])
                labels = batch_labels(batch, self._model.device)
                loss += float(cross_entropy(logits.float(), labels, reduction="sum"))
                predictions += len(labels)
                profile.add(self._model.tape)
                if prototypes is not None:
                    np.add.at(prototypes.sums, batch.labels, self._features())
                    np.add.at(prototypes.counts, batch.labels, 1)
        measured = profile.profile()
        means = _without_counts(profile.means())
        told, means = self._telling.told(task, measured, means)
        payload = pack_update({}, {}, told, means, prototypes, lossy=self._experiment.wire.lossy)
        return payload, _metrics(task, split, tokens=measured.tokens, loss=loss / predictions, examples=predictions)

    def _train(
        self, task: ClientTask, weights: TaskWeights, examples: Examples, should_stop: ShouldStop
    ) -> tuple[Upload, ClientMetrics]:
        """Local steps: forward, choose the batch's experts, give only them a gradient (eq. 15)."""
        model, keys = self._model, task.plan.trainable
        before = self._checksums(keys)
        explored = self._explore(task, examples, should_stop)
        done, peak_mib = self._local_steps(task, weights, examples, should_stop)
        done.signals.add_estimates(explored)
        measured = done.profile.profile()
        moved: Mapping[ExpertKey, Mapping[str, Array]] = {
            key: model.read_expert(key) for key, steps in done.trained.items() if steps
        }
        means, after = done.profile.means(), self._checksums(keys)
        shared: Mapping[str, Array] = model.read_shared()
        if self._hostile is not None:
            moved, shared = self._hostile.update(task, weights, moved, shared)
            after |= {expert_name(key): checksum(tensors) for key, tensors in moved.items()}
        told, sent = self._telling.told(task, measured, _without_counts(means))
        upload = Upload(payload=b"")
        if task.secure is None:
            upload = make_upload(
                self._experiment.wire,
                weights,
                moved,
                shared,
                profile=told,
                means=sent,
                signals=done.signals.result(),
            )
        metrics = _metrics(
            task,
            examples.split,
            tokens=measured.tokens,
            loss=done.loss / max(done.predictions, 1),
            examples=done.predictions,
            trained={expert_name(key): done.trained[key] for key in moved},
            before=before,
            after=after,
            rebuilt=upload.rebuilt,
            step_seconds=done.seconds,
            peak_mib=peak_mib,
            scale=tuple(float(scale.detach()) for scale in self._model.scales),
        )
        if self._secure is not None and task.secure is not None:
            update = ClientUpdate(
                client=task.client,
                samples=metrics.samples,
                experts=moved,
                shared=shared,
                trained={key: done.trained[key] for key in moved},
                profile=measured,
                means=means,
            )
            payload, metrics = self._secure.take_part(task, weights, update, told, metrics)
            upload = Upload(payload=payload)
        return upload, metrics

    def _evaluate(self, task: ClientTask, examples: Examples, should_stop: ShouldStop) -> tuple[bytes, ClientMetrics]:
        """Loss and accuracy of the bound model on a split."""
        split = examples.split
        loss, correct, predictions, tokens = 0.0, 0, 0, 0
        size = self._experiment.evaluate.batch_size
        self._model.module.eval()
        with torch.inference_mode():
            for start in range(0, len(split), size):
                self._poll(should_stop)
                batch, logits = self._forward(examples, np.arange(start, min(start + size, len(split))))
                labels = batch_labels(batch, self._model.device)
                loss += float(cross_entropy(logits.float(), labels, reduction="sum"))
                correct += int((logits.argmax(dim=-1) == labels).sum())
                predictions += len(labels)
                tokens += self._model.tape.tokens
        mean = loss / max(predictions, 1)
        return b"", _metrics(task, split, tokens=tokens, loss=mean, correct=correct, examples=predictions)

    def _answer(self, task: ClientTask, examples: Examples, should_stop: ShouldStop) -> tuple[bytes, ClientMetrics]:
        """What the model answers to a part of a benchmark."""
        benchmark = self._experiment.evaluate.named(task.benchmark)
        asked = stored_benchmark(self._data, benchmark).part(*task.part)
        self._model.module.eval()
        found = answered(
            asked,
            self._model,
            benchmark,
            forward=partial(self._forward, examples),
            tokenizer=lambda: load_tokenizer(self._context.model.path),
            size=self._experiment.evaluate.batch_size,
            precision=self._computing(self._local.precision),
            poll=partial(self._poll, should_stop),
        )
        return b"", _metrics(task, examples.split, **found)

    def _personalise(
        self, task: ClientTask, weights: TaskWeights, examples: Examples, should_stop: ShouldStop
    ) -> tuple[bytes, ClientMetrics]:
        """One more round of local training, then loss and accuracy on a split; the trained weights are forgotten."""
        if len(examples.split) == 0:
            return self._evaluate(task, examples, should_stop)
        next_round = _next_round(task)
        done, peak_mib = self._local_steps(next_round, weights, self._examples(next_round), should_stop)
        payload, metrics = self._evaluate(task, examples, should_stop)
        trained = {expert_name(key): steps for key, steps in done.trained.items() if steps}
        return payload, replace(metrics, trained=trained, step_seconds=done.seconds, peak_mib=peak_mib)

    # ------------------------------------------------------------------------------------------------- the parts

    def _explore(self, task: ClientTask, examples: Examples, should_stop: ShouldStop) -> dict[ExpertKey, float]:
        """Estimates the squared gradient of FROZEN experts on the round's first batch, if the strategy asks for it."""
        keys = task.plan.with_role(Role.FROZEN)
        if not self._strategy.probes or not keys:
            return {}
        indices = next(self._batches(task, len(examples.split)))
        # Other ranks wait for this one in the first step: it stops there, together with them.
        alone = self._ranks_of(task).size == 1

        def loss() -> float:
            if alone:
                self._poll(should_stop)
            batch, logits = self._forward(examples, indices, precision="fp32")
            return float(cross_entropy(logits.double(), batch_labels(batch, self._model.device)))

        self._model.module.eval()
        seed = derive_seed(task.seed, "explore", task.round, task.client)
        return squared_gradients(self._model, loss, keys, self._strategy.probes, seed)

    def _local_steps(
        self, task: ClientTask, weights: TaskWeights, examples: Examples, should_stop: ShouldStop
    ) -> tuple[LocalSteps, float]:
        """Takes a round's optimizer steps on the bound model; returns what they told, and their peak memory in MiB."""
        model, tier, ranks = self._model, self._tiers[task.client], self._ranks_of(task)
        if task.micro_batch is not None:
            tier = tier.model_copy(update={"micro_batch": task.micro_batch})
        private = self._experiment.privacy.examples
        done = (LocalSteps if private is None else PrivateSteps)(
            model,
            self._strategy,
            partial(self._forward, examples),
            examples.split.weight,
            tier=tier,
            plan=task.plan,
            rng=generator(task.seed, "select", task.round, task.client),
            specific=self._specific,
            proximity=Proximity(self._strategy.proximal, model, weights),
            ranks=ranks,
        )
        if isinstance(done, PrivateSteps) and private is not None:
            expected = float(min(self._local.batch_size, len(examples.split)))
            done.protect(private, step_noise(private, task), expected)
        shared = [*model.shared_parameters.values(), *model.scales]
        model.module.train()
        frozen = frozen_versions(model)
        config = deepspeed_config(self._local, tier, model.device.type)
        build = RankedEngine if ranks.size > 1 else Engine
        with (
            checkpointed_layers(model.module, tier.checkpoint_activations),
            build(model.module, shared, model.expert_parameters, self._local, config, ranks=ranks) as engine,
            PeakMemory(model.device) as peak,
        ):
            for indices in self._batches(task, len(examples.split)):
                self._poll(lambda: ranks.any(should_stop()))
                done.take(engine, indices)
                peak.look()
            done.finish()
        check_unwritten(frozen)
        return done, peak.mib

    def _examples(self, task: ClientTask) -> Examples:
        model_key = self._context.model.sha256
        return task_examples(self._model, model_key, self._data, self._experiment, task, hostile=self._hostile)

    def _batches(self, task: ClientTask, count: int) -> Iterator[Array]:
        private = self._experiment.privacy.examples
        if private is not None and task.kind == "train":
            return poisson_batches(private, self._local, task, count)
        return batches(self._local, task, count)

    def _forward(
        self,
        examples: Examples,
        indices: Array,
        *,
        precision: Precision | None = None,
        run: Run | None = None,
    ) -> tuple[Batch, Tensor]:
        """Returns a batch and its logits, [B, C], or of the tokens to be written [N, V].

        Args:
            examples: Where the batch comes from.
            indices: Numbers of its examples.
            precision: What to compute in. Default: the run's, which everything must be evaluated in.
            run: Stands in for the module, such as an engine around it.
        """
        batch, inputs = examples.inputs(self._model, indices)
        with self._computing(precision or self._local.precision):
            return batch, (run or self._model.module)(**inputs).logits

    def _computing(self, precision: Precision) -> AbstractContextManager[Any]:
        """Within it the model computes in a precision."""
        return torch.autocast(self._model.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def _new_profile(self) -> ProfileAccumulator:
        return ProfileAccumulator(self._model.shape, self._specific)

    def _checksums(self, keys: Sequence[ExpertKey]) -> dict[str, str]:
        return {expert_name(key): checksum(self._model.read_expert(key)) for key in keys}

    def _empty_prototypes(self) -> Prototypes:
        classes = len(self._context.data.label_names)
        return Prototypes(
            sums=np.zeros((classes, self._model.shape.hidden), np.float32), counts=np.zeros(classes, np.float32)
        )

    def _features(self) -> Array:
        """What entered the task head in the latest forward pass, [B, H]."""
        features = self._model.features
        if features is None or features.dim() != 2:
            raise ModelError(
                "model.head: `prototypes` needs a model that pools its tokens before the task head, and this one does "
                "not. Write `head: random`."
            )
        return features.float().cpu().numpy()

    @staticmethod
    def _poll(should_stop: ShouldStop) -> None:
        if should_stop():
            raise Stopped


def _secure_clients(context: RunContext) -> "SecureClients | None":
    """The clients' part in secure aggregation, where the run asks for it."""
    if context.experiment.secure is None:
        return None
    from hfedmoe_ray.train.secure import SecureClients  # with cryptography, which is an extra

    return SecureClients(context)


def _metrics(task: ClientTask, split: Split, **measured: Any) -> ClientMetrics:
    """Metrics of a task with what was measured in it."""
    return ClientMetrics(client=task.client, round=task.round, kind=task.kind, samples=len(split), **measured)


def _never() -> bool:
    return False


def _next_round(task: ClientTask) -> ClientTask:
    """A task with the draws of the round that would come next: the batches of its own have been seen."""
    return replace(task, round=task.round + 1, split="train")


def _without_counts(means: Mapping[ExpertKey, tuple[Array, int]]) -> dict[ExpertKey, Array]:
    return {key: mean for key, (mean, _) in means.items()}
