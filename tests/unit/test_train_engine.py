"""The DeepSpeed engine: what a batch does not select keeps its exact bytes."""

import weakref

import psutil
import pytest
import torch
from torch import nn

from hfedmoe_ray.config.schema import LocalTraining, Tier
from hfedmoe_ray.train.deepspeed_config import deepspeed_config
from hfedmoe_ray.train.engine import Engine
from hfedmoe_ray.types import ExpertKey

LOCAL = LocalTraining(learning_rate=1e-2, weight_decay=0.1, clip_norm=1.0, batch_size=4)
TIER = Tier(name="any", share=1.0, experts=1.0)
CONFIG = deepspeed_config(LOCAL, TIER, "cpu")
KEYS = [ExpertKey(0, e) for e in range(3)]


class Sum(nn.Module):
    """Three experts, always all used."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, x):
        return sum(expert(x) for expert in self.experts)


def data(steps):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=generator) for _ in range(steps)]


def experts_of(module):
    """Its parameters as an engine takes them: no shared ones."""
    return {KEYS[e]: dict(expert.named_parameters()) for e, expert in enumerate(module.experts)}


def train(module, batches, selected, local=LOCAL):
    """Trains with expert `selected(step)` active; yields the bytes of all experts after each step."""
    with Engine(module, [], experts_of(module), local, deepspeed_config(local, TIER, "cpu")) as engine:
        for step, x in enumerate(batches):
            engine.backward(module(x).pow(2).mean(), [KEYS[selected(step)]])
            engine.step()
            yield [expert.weight.detach().clone() for expert in module.experts]


def test_an_expert_outside_the_selection_keeps_its_bytes_through_momentum_and_decay():
    module = Sum()
    before = [expert.weight.detach().clone() for expert in module.experts]
    # Experts 0 and 1 take turns, so that each has momentum whenever it is masked; expert 2 never trains.
    for step, after in enumerate(train(module, data(6), lambda step: step % 2)):
        moved = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
        assert moved == [step % 2 == 0, step % 2 == 1, False]
        before = after


def test_a_masked_step_leaves_no_trace_in_later_steps():
    x = data(4)
    *_, alone = train(Sum(), [x[0], x[2]], lambda _: 0)
    module = Sum()
    frozen = [expert.weight.detach().clone() for expert in module.experts]
    interrupted = []
    with Engine(module, [], experts_of(module), LOCAL, CONFIG) as engine:
        for step in (0, 1, 2):
            engine.backward(module(x[step]).pow(2).mean(), [] if step == 1 else [KEYS[0]])
            engine.step()
        interrupted = [expert.weight.detach().clone() for expert in module.experts]
    assert torch.equal(alone[0], interrupted[0])
    assert torch.equal(frozen[1], interrupted[1])


def test_a_second_engine_starts_without_the_firsts_momentum():
    fresh, reused = Sum(), Sum()
    *_, _ = train(reused, data(3), lambda _: 0)
    reused.load_state_dict(Sum().state_dict())
    *_, expected = train(fresh, data(2), lambda _: 0)
    *_, result = train(reused, data(2), lambda _: 0)
    assert torch.equal(expected[0], result[0])


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_step_equals_bare_pytorch(clip):
    local = LOCAL.model_copy(update={"clip_norm": clip})
    module, plain = Sum(), Sum()
    *_, result = train(module, data(3), lambda _: 0, local)
    optimizer = torch.optim.AdamW(plain.experts[0].parameters(), lr=local.learning_rate, weight_decay=0.1)
    for x in data(3):
        optimizer.zero_grad()
        plain(x).pow(2).mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(plain.experts[0].parameters(), clip)
        optimizer.step()
    torch.testing.assert_close(result[0], plain.experts[0].weight.detach(), rtol=1e-6, atol=1e-7)


def test_nothing_listens_beyond_this_machine():
    with Engine(Sum(), list(Sum().parameters()), {}, LOCAL, CONFIG):
        listening = [c.laddr.ip for c in psutil.Process().net_connections(kind="inet") if c.status == "LISTEN"]
    assert all(address in ("127.0.0.1", "::1") for address in listening)


def test_an_engine_leaves_nothing_on_the_module_and_nothing_in_memory():
    module, alive = Sum(), []
    for _ in range(3):
        with Engine(module, [], experts_of(module), LOCAL, CONFIG) as engine:
            engine.backward(module(data(1)[0]).pow(2).mean(), KEYS)
            engine.step()
            alive.append(weakref.ref(engine._engine))
    assert [ref() for ref in alive] == [None] * 3
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
