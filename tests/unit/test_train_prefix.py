"""Cached hidden states: what the layers computed, whoever wrote them, in no more room than was given."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_models import batch, plan, prepare, save_bert, task_weights

from hfedmoe_ray.config.schema import Experiment, LocalTraining
from hfedmoe_ray.data.dataset import Split
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.train.local import ClientWorker
from hfedmoe_ray.train.prefix import prefix_states
from hfedmoe_ray.types import ClientTask, TaskWeights

EXAMPLES, LENGTH, HIDDEN = 150, 9, 24
MIB_OF_ENTRY = EXAMPLES * LENGTH * HIDDEN * 4 / 2**20
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SparseModel:
    """A BERT whose layers 1 and 3 are MoE, bound so that layer 0 and the embeddings are frozen."""
    prepared = prepare(save_bert(tmp_path_factory.mktemp("bert")), tmp_path_factory.mktemp("cache"))
    made = SparseModel(prepared.path)
    made.bind(plan("TTFF..", "TTTTTT"), task_weights(prepared), "top")
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HFEDMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefix"


def split(key: str = "data/0/train") -> Split:
    ids, mask = batch(texts=EXAMPLES, length=LENGTH)
    return Split(
        input_ids=ids.numpy().astype(np.int32),
        lengths=mask.sum(1).numpy().astype(np.int32),
        labels=np.zeros(EXAMPLES, np.int64),
        key=key,
    )


def states(model: SparseModel, examples: Split, mib: float = 1.0, **config: Any) -> torch.Tensor:
    """All states of a split, [N, S, H], in the room of `mib`."""
    opened = prefix_states(model, "k" * 64, examples, LocalTraining(cache_gib=mib / 2**10, **config))
    assert opened is not None
    return opened.batch(np.arange(len(examples)), LENGTH, CPU)


def computed(model: SparseModel) -> torch.Tensor:
    ids, mask = batch(texts=EXAMPLES, length=LENGTH)
    hidden = torch.zeros(EXAMPLES, LENGTH, HIDDEN)
    with torch.inference_mode():
        for start in range(0, EXAMPLES, 16):
            rows = slice(start, start + 16)
            longest = int(mask[rows].sum(1).max())
            hidden[rows, :longest] = model.prefix(ids[rows, :longest], mask[rows, :longest])
    return hidden


def entries(cache: Path) -> list[str]:
    return sorted(file.relative_to(cache).as_posix() for file in cache.rglob("*") if file.is_file())


def test_fp32_states_are_what_the_layers_compute(model: SparseModel, cache: Path) -> None:
    examples = split()
    expected = computed(model)
    for _ in ("computed", "read"):
        assert torch.equal(states(model, examples), expected)
    assert entries(cache) == [f"{'k' * 16}/data/0/train.9.fp32.npy"]
    some = np.array([140, 3, 77])
    opened = prefix_states(model, "k" * 64, examples, LocalTraining())
    assert opened is not None
    assert torch.equal(opened.batch(some, 4, CPU), expected[some, :4])


@pytest.mark.parametrize(("precision", "bits"), [("bf16", 8), ("fp16", 11)])
def test_half_precision_halves_the_room_and_keeps_so_many_bits(
    model: SparseModel, cache: Path, precision: str, bits: int
) -> None:
    examples = split()
    exact = states(model, examples)
    stored = states(model, examples, cache_precision=precision)
    assert stored.dtype == torch.float32
    assert not torch.equal(stored, exact)
    # Below the smallest normal number of fp16 the steps no longer shrink.
    torch.testing.assert_close(stored, exact, rtol=2.0**-bits, atol=2.0**-25)
    full, half = ((cache / ("k" * 16) / f"data/0/train.9.{name}.npy").stat().st_size for name in ("fp32", precision))
    assert half < 0.51 * full


def test_what_fp16_cannot_hold_is_refused(model: SparseModel, cache: Path) -> None:
    norm = model.module.layer[0].output.LayerNorm
    weight = norm.weight.data
    norm.weight.data = weight * 1e6
    with pytest.raises(ConfigError, match="cache_precision: bf16"):
        states(model, split(), cache_precision="fp16")
    assert entries(cache) == []
    assert torch.isfinite(states(model, split(), cache_precision="bf16")).all()
    norm.weight.data = weight


def test_the_entries_used_longest_ago_make_way(model: SparseModel, cache: Path) -> None:
    """Room for three and a half: the fourth takes the place of the one that was not read again."""
    room = 3.5 * MIB_OF_ENTRY
    first = prefix_states(model, "k" * 64, split("a"), LocalTraining(cache_gib=room / 2**10))
    for age, key in ((30, "a"), (20, "b"), (10, "c")):
        states(model, split(key), room)
        when = time.time() - age
        os.utime(cache / ("k" * 16) / f"{key}.9.fp32.npy", (when, when))
    states(model, split("b"), room)
    states(model, split("d"), room)
    assert [name.split("/")[1][0] for name in entries(cache)] == ["b", "c", "d"]
    states(model, split("a"), room)
    assert [name.split("/")[1][0] for name in entries(cache)] == ["a", "b", "d"]
    assert sum((cache / name).stat().st_size for name in entries(cache)) <= room * 2**20
    # Who had the removed entry open still reads it.
    assert first is not None
    assert torch.equal(first.batch(np.arange(EXAMPLES), LENGTH, CPU), computed(model))


def test_what_does_not_fit_is_not_kept(model: SparseModel, cache: Path) -> None:
    states(model, split("a"))
    tight = LocalTraining(cache_gib=0.9 * MIB_OF_ENTRY / 2**10)
    assert prefix_states(model, "k" * 64, split("b"), tight) is None
    assert len(entries(cache)) == 1


def test_an_interrupted_entry_leaves_nothing(model: SparseModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one whose process was killed is swept away a day later, but not while it may be being written."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(model.module, "prefix", lambda *_: 1 / 0)
        states(model, split())
    assert entries(cache) == []
    for name, age in (("young", 3600), ("old", 90_000)):
        partial = cache / ("k" * 16) / f"{name}.npy.0.partial"
        partial.write_bytes(bytes(1000))
        when = time.time() - age
        os.utime(partial, (when, when))
    states(model, split("a"))
    assert [name.split("/")[1] for name in entries(cache)] == ["a.9.fp32.npy", "young.npy.0.partial"]


def _fill(model: SparseModel, ready: Any, results: Any) -> None:
    torch.set_num_threads(1)
    ready.wait(60)
    results.put(states(model, split()).numpy().tobytes())


def test_two_processes_fill_one_entry(model: SparseModel, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_fill, args=(model, ready, results)) for _ in range(2)]
    for process in processes:
        process.start()
    expected = computed(model).numpy().tobytes()
    assert [results.get(timeout=60) for _ in processes] == [expected, expected]
    for process in processes:
        process.join(60)
    assert len(entries(cache)) == 1
    assert states(model, split()).numpy().tobytes() == expected


# -------------------------------------------------------------------------------------------------- training tasks


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., tuple[bytes, float]]:
    """Trains one client; returns its update and its loss. All texts have one length: batches differ in nothing else."""
    source = save_bert(tmp_path / "bert")
    rows = [
        {"text": " ".join(f"word{3 * ((i + j * j) % 5) + i % 3}" for j in range(12)), "label": f"class {i % 3}"}
        for i in range(120)
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(**local: Any) -> tuple[bytes, float]:
        experiment = Experiment.model_validate(
            {
                "name": "tiny",
                "backend": "local",
                "clients": {"count": 2, "tiers": [{"name": "one", "share": 1.0, "experts": 0.5, "device": 0.1}]},
                "model": {"source": str(source), "upcycle": {"experts": 6, "top_k": 2, "layers": [1, 3]}},
                "data": {"source": str(tmp_path / "texts.jsonl"), "max_length": 10, "partition": {"how": "iid"}},
                "local": {"steps": 3, "batch_size": 8, "learning_rate": 1e-2, **local},
            }
        )
        context = prepare_run(experiment, tmp_path / "run")
        weights = initial_weights(context.model, "top")
        task = ClientTask(kind="train", round=1, client=1, seed=0, version=0, weight=1.0, plan=plan("TTT...", "TTT..."))
        shared = TaskWeights(shared=weights.shared, experts=weights.experts, means=weights.means)
        payload, metrics, _ = ClientWorker(context).execute(task, shared, lambda: False)
        return payload, json.loads(metrics)["loss"]

    return run


def test_training_is_the_same_with_and_without_the_cache(
    train: Callable[..., tuple[bytes, float]], cache: Path
) -> None:
    """In fp32 bit for bit: computing the states, reading them, or running the lower layers in every step."""
    without = train(cache="off")
    assert not cache.exists()
    filled, read = train(), train()
    assert len(entries(cache)) == 1
    assert filled == read == without


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2.0**-8), ("fp16", 2.0**-11)])
def test_training_on_half_precision_states_is_close(
    train: Callable[..., tuple[bytes, float]], precision: str, tolerance: float
) -> None:
    exact, half = train(), train(cache_precision=precision)
    assert half[0] != exact[0]
    assert half[1] == pytest.approx(exact[1], rel=4 * tolerance)


def test_training_goes_on_where_the_states_do_not_fit(train: Callable[..., tuple[bytes, float]], cache: Path) -> None:
    assert train(cache_gib=1e-7) == train(cache="off")
    assert entries(cache) == []
