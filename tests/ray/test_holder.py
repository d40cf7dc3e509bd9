"""Frozen tensors of one process in others: the protocol of GPU sharing, as far as a machine without one shows it."""

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from gpu_client import FrozenReader, GpuClient
from mapped import mapping
from moe_models import batch, plan, prepare, save_mixtral, task_weights
from tiny_worker import Log, context, task, weights

from hfedmoe_ray.config.lora import Lora
from hfedmoe_ray.context import PreparedModel
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.moe.sharing import alias, part, read_frozen
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.runtime import gang
from hfedmoe_ray.runtime.client import capped_fraction
from hfedmoe_ray.runtime.holder import start_holder
from hfedmoe_ray.runtime.pool import RayExecutor
from hfedmoe_ray.types import TaskWeights

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
NAME = "base.safetensors/model.embed_tokens.weight"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    directory = tmp_path_factory.mktemp("holder")
    return prepare(save_mixtral(directory / "mixtral"), directory / "cache")


@pytest.fixture(scope="module")
def holder(prepared: PreparedModel) -> Iterator[Any]:
    made = start_holder(prepared.path, Lora(rank=2), ray.get_runtime_context().get_node_id(), "")
    yield made
    # What this process maps of it goes first: torch cannot let go of a file whose keeper is gone, and would abort.
    gc.collect()
    ray.kill(made)


@pytest.fixture(scope="module", autouse=True)
def nothing_stays_in_shared_memory() -> Iterator[None]:
    """A killed holder's names stay in /dev/shm; on a GPU, where holders are for, there are none."""
    yield
    for file in Path("/dev/shm").glob("torch_*"):
        if not psutil.pid_exists(int(file.name.split("_")[1])):
            file.unlink(missing_ok=True)


@ray.remote(num_cpus=0)
class Reader:
    """Another process that looks into the holder's memory."""

    def __init__(self, handles: Any) -> None:
        self._frozen = alias(handles)

    def found(self) -> tuple[int, int, float]:
        import os

        tensor = self._frozen[NAME]
        return os.getpid(), tensor.data_ptr(), float(tensor.double().sum())


def test_two_processes_have_the_holders_tensors_in_the_same_memory(prepared: PreparedModel, holder: Any):
    readers = [Reader.remote(ray.get(holder.handles.remote())) for _ in range(2)]
    found = ray.get([reader.found.remote() for reader in readers], timeout=120)
    places = {mapping(pid, address)[0] for pid, address, _ in found}
    assert len({pid for pid, _, _ in found}) == 2
    assert len(places) == 1
    assert places != {("", "", 0)}
    expected = read_frozen(prepared.path, None, torch.device("cpu"))[NAME].double().sum()
    assert {total for _, _, total in found} == {float(expected)}


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["experts", "factors"])
def test_a_model_in_shared_memory_computes_what_one_read_from_files_does(
    prepared: PreparedModel, holder: Any, lora: Lora | None
):
    frozen = alias(ray.get(holder.handles.remote()))
    start = initial_weights(prepared, "top", lora)
    given = task_weights(prepared) if lora is None else TaskWeights(shared=start.shared, experts=start.experts)
    logits = []
    for source in (frozen, None):
        model = SparseModel(prepared.path, "cpu", lora=lora, frozen=source)
        model.bind(plan("TF....", "TFF...", absent="drop"), given, "top")
        logits.append(model.forward(*batch()).detach())
        if source is not None:
            embedded = model.module.get_parameter("model.embed_tokens.weight")
            assert embedded.data_ptr() == frozen[NAME].data_ptr(), "a copy was made"
    assert torch.equal(*logits)


def test_experts_are_held_only_where_factors_train_over_them(prepared: PreparedModel):
    cpu = torch.device("cpu")
    assert not part(read_frozen(prepared.path, None, cpu), "experts.safetensors")
    stacks = part(read_frozen(prepared.path, Lora(rank=2), cpu), "experts.safetensors")
    assert {name: len(stack) for name, stack in stacks.items()} == {
        f"{layer}.{name}": 6 for layer in (0, 1) for name in ("gate_up_proj", "down_proj")
    }


def test_shares_are_of_what_the_holder_leaves():
    assert [capped_fraction(0.25, held, 80) for held in (0, 16, 80)] == [0.25, 0.2, 0.0]
    # Four quarters and the frozen part are one GPU.
    assert 4 * capped_fraction(0.25, 16, 80) * 80 + 16 == 80


@pytest.fixture
def executor(prepared: PreparedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayExecutor]:
    groups = {"health": 1, "lifeline": 1}
    monkeypatch.setattr(gang, "RemoteClient", ray.remote(max_restarts=0, concurrency_groups=groups)(GpuClient))
    run = replace(context(tmp_path, runtime={"slots": 2}), model=prepared)
    made = RayExecutor(run, worker_factory=FrozenReader)
    made.publish(weights())
    yield made
    made.close()


def test_clients_of_a_gpu_get_one_holder_and_a_dead_one_is_replaced(executor: RayExecutor):
    def places() -> set[Any]:
        """Where the frozen tensors of every client are, as files of the system."""
        log = Log()
        results = list(executor.run([task(client) for client in range(6)], log))
        assert {result.status for result in results} == {"ok"}
        slots = {fields["client"]: fields["slot"] for fields in log.named("task_started")}
        pids = {s.number: ray.get(s.ping(), timeout=30)["pid"] for s in executor.slots}
        found = {result.task.client: json.loads(result.payload())[NAME] for result in results}
        return {mapping(pids[slots[client]], address)[0] for client, address in found.items()}

    before = places()
    assert len(before) == 1
    assert len(executor._holders) == 1
    (holder,) = executor._holders.values()
    ray.kill(holder)
    for one in executor.slots:
        ray.kill(one._actor)
    after = places()
    assert len(after) == 1
    assert after != before
