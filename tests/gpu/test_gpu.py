"""What only a GPU can show: the CPU's results on it, and a client's share of its memory as a hard limit."""

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_models import TEXTS, batch, model_section, plan, prepare, save_bert, save_family, save_mixtral, task_weights
from ranked_clients import alone, pair
from tiny_federation import experiment, write_sources
from torch.nn.functional import cross_entropy

from hfedmoe_ray.config.lora import Lora
from hfedmoe_ray.config.schema import LocalTraining, Tier
from hfedmoe_ray.moe import adapters
from hfedmoe_ray.moe.prepare import initial_weights, prepare_model
from hfedmoe_ray.moe.sharing import alias, export, read_frozen
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.runtime.client import cap_gpu_memory
from hfedmoe_ray.train.deepspeed_config import deepspeed_config
from hfedmoe_ray.train.engine import Engine
from hfedmoe_ray.types import ClientTask, TaskWeights
from hfedmoe_ray.wire import unpack_update

pytestmark = pytest.mark.gpu
BITSANDBYTES = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")
PLAN = plan("TF.T..", ".TF.T.")


def trained(prepared, device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss before, and one trained expert after, two steps on a device."""
    model = SparseModel(prepared.path, device)
    model.bind(PLAN, task_weights(prepared), "top")
    ids, mask = (tensor.to(device) for tensor in batch())
    labels = torch.arange(len(ids), device=device) % 5
    shared, experts = list(model.shared_parameters.values()), model.expert_parameters
    local = LocalTraining(learning_rate=1e-3)
    config = deepspeed_config(local, Tier(name="any", share=1, experts=1), device)
    with Engine(model.module, shared, experts, local, config) as engine:
        first = cross_entropy(model.forward(ids, mask), labels)
        engine.backward(first, PLAN.trainable)
        engine.step()
        engine.backward(cross_entropy(model.forward(ids, mask), labels), PLAN.trainable)
        engine.step()
    key = PLAN.trainable[0]
    return first.detach().cpu(), {name: torch.from_numpy(array) for name, array in model.read_expert(key).items()}


def test_training_on_the_gpu_is_training_on_the_cpu_within_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The latter in a process that sees no GPU, as a CPU client's does not: DeepSpeed would move the model to it."""
    prepared = prepare(save_bert(tmp_path / "bert"), tmp_path / "cache")
    gpu_loss, gpu = trained(prepared, "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as hidden:
        cpu_loss, cpu = hidden.submit(trained, prepared, "cpu").result()
    torch.testing.assert_close(gpu_loss, cpu_loss, rtol=1e-4, atol=1e-5)
    for name, expected in cpu.items():
        torch.testing.assert_close(gpu[name], expected, rtol=1e-3, atol=1e-3)


def test_a_client_cannot_allocate_beyond_its_share():
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        cap_gpu_memory(0.1)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(total // 5, dtype=torch.uint8, device="cuda")
        torch.empty(total // 50, dtype=torch.uint8, device="cuda")
    finally:
        cap_gpu_memory(1.0)


def _allocate(share: float, wanted: float, both: Any) -> str:
    """In a process of its own, capped to a share of the GPU: tries to allocate another."""
    cap_gpu_memory(share)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.empty(2**20, device="cuda")
    both.wait(60)
    try:
        held = torch.empty(int(total * wanted), dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError:
        return "out of memory"
    return f"{held.numel() / total:.2f}"


def test_of_two_clients_on_a_gpu_the_one_beyond_its_share_alone_fails():
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(2, mp_context=spawn) as clients:
        both = manager.Barrier(2)
        greedy, modest = (clients.submit(_allocate, 0.2, wanted, both) for wanted in (0.3, 0.1))
        assert greedy.result() == "out of memory"
        assert modest.result() == "0.10"


def _aliasing(prepared: Any, handles: Any) -> tuple[int, float]:
    """In a process of its own: what a model in the holder's memory allocates, and the sum of its embeddings."""
    frozen = alias(handles)
    model = SparseModel(prepared.path, "cuda", frozen=frozen)
    allocated = torch.cuda.memory_allocated()
    return allocated, float(model.module.get_input_embeddings().weight.double().sum())


def test_clients_of_a_gpu_share_one_frozen_base(tmp_path: Path):
    prepared = prepare(save_mixtral(tmp_path / "mixtral"), tmp_path / "cache")
    frozen = read_frozen(prepared.path, None, torch.device("cuda"))
    size = sum(tensor.nbytes for tensor in frozen.values())
    expected = float(frozen["base.safetensors/model.embed_tokens.weight"].double().sum())
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as clients:
        found = [clients.submit(_aliasing, prepared, export(frozen)) for _ in range(2)]
        for one in found:
            allocated, total = one.result()
            assert total == expected
            assert allocated < size / 2, "the client has a copy of the base"


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize("form", ["exact", "int8", pytest.param("nf4", marks=BITSANDBYTES)])
def test_experts_computed_together_are_those_computed_one_by_one(
    tmp_path: Path, family: str, form: str, monkeypatch: pytest.MonkeyPatch
):
    """In bf16, in which alone they are computed together; the same experts held by another process too."""
    inner = {"moe_intermediate_size": 96} if family == "deepseek_v2" else {"intermediate_size": 96}
    source = save_family(family, tmp_path / "source", hidden_size=64, **inner)
    lora = Lora(rank=8, base=form)
    prepared = prepare_model(model_section(source, lora=lora.model_dump()), 5, 0, TEXTS, tmp_path / "cache")
    weights = initial_weights(prepared, "experts", lora)
    rng = np.random.default_rng(3)
    for arrays in weights.experts.values():
        arrays.update({n: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32) for n, a in arrays.items()})
    task = TaskWeights(shared=weights.shared, experts=weights.experts, means=weights.means)
    ids, mask = (tensor.to("cuda") for tensor in batch())
    labels = torch.arange(len(ids), device="cuda") % 5

    def trained_with(frozen: dict[str, torch.Tensor] | None) -> tuple[torch.Tensor, dict[str, torch.Tensor], bool]:
        model = SparseModel(prepared.path, "cuda", lora=lora, frozen=frozen)
        model.bind(plan("TFTF.T", "FTTTTF"), task, "experts")
        with torch.autocast("cuda", torch.bfloat16):
            logits = model.forward(ids, mask)
        cross_entropy(logits.float(), labels).backward()
        named = [(k, n, p.grad) for k, of_one in model.expert_parameters.items() for n, p in of_one.items()]
        gradients = {f"{key} {name}": grad for key, name, grad in named if grad is not None and grad.any()}
        return logits.detach(), gradients, all(one._grouped is not None for one in model._residents)

    together = [trained_with(frozen) for frozen in (None, read_frozen(prepared.path, lora, torch.device("cuda")))]
    monkeypatch.setattr(adapters, "groups_on", lambda _: False)
    logits, gradients, grouped = trained_with(None)
    assert not grouped and all(was for _, _, was in together)
    for found, grads, _ in together:
        assert float((found - logits).norm() / logits.norm()) < 0.03
        assert grads.keys() == gradients.keys()
        apart = [float((grads[name] - one).norm() / one.norm()) for name, one in gradients.items()]
        assert float(np.median(apart)) < 0.05


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("stage", [0, 2])
def test_two_ranks_over_nccl_are_one_within_rounding(tmp_path: Path, stage: int):
    write_sources(tmp_path)
    local = {"steps": 3, "batch_size": 5, "learning_rate": 1e-3, "cache": "off"}
    found = []
    for devices in (2, 1):
        tier = {"name": "any", "share": 1, "experts": 1, "device": devices, "zero_stage": stage}
        made = experiment(tmp_path, "mixtral", clients={"count": 4, "tiers": [tier]}, local=local)
        context = prepare_run(made, tmp_path / f"run-{devices}")
        weights = initial_weights(context.model, "experts", None)
        task = ClientTask(kind="train", round=1, client=0, seed=0, plan=PLAN, version=0)
        needed = TaskWeights(shared=weights.shared, experts={key: weights.experts[key] for key in PLAN.present})
        if devices == 1:
            found.append(alone(context, task, needed))
            continue
        with pair(gpus=True) as two:
            payload, metrics, ends = two.work(context, task, needed)
        assert ends[0] == ends[1]
        found.append((payload, metrics))
    (ours, told), (theirs, expected) = found
    assert told.trained == expected.trained
    one, other = unpack_update(ours, told), unpack_update(theirs, expected)
    for key, named in other.experts.items():
        for name, array in named.items():
            assert float(np.quantile(np.abs(one.experts[key][name] - array), 0.95)) <= 1e-4
