"""Clients that drop out by lot: seeded, indifferent to company and order, and nothing of theirs is used."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from tiny_federation import experiment, final_weights, run

from hfedmoe_ray.federation.dropout import drops_out, without_dropouts
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.types import ClientTask, ExpertPlan, Role, TaskResult


def results(clients: list[int]) -> list[TaskResult]:
    plan = ExpertPlan(roles=((Role.TRAIN,),))
    return [
        TaskResult(
            task=ClientTask(kind="train", round=3, client=client, seed=7, plan=plan, version=1),
            status="ok" if client % 10 else "late",
            payload=lambda: b"update",
            state=lambda: b"state",
        )
        for client in clients
    ]


def test_the_lot_is_the_clients_own_whoever_else_takes_part() -> None:
    everyone = {r.task.client: r for r in without_dropouts(results(list(range(100))), 0.4)}
    order = [int(client) for client in np.random.default_rng(1).permutation(100)]
    for some in (order, order[:30], [5]):
        found = without_dropouts(results(some), 0.4)
        assert [r.task.client for r in found] == some
        assert [r.status for r in found] == [everyone[client].status for client in some]
    dropped = [r for r in everyone.values() if r.status == "dropped"]
    assert 20 < len(dropped) < 60
    assert all(r.payload is None and r.state is None and r.reason for r in dropped)
    assert all(everyone[client].status == "late" for client in range(0, 100, 10)), "what was lost already stays so"
    assert any(drops_out(0.4, 7, 3, c) != drops_out(0.4, 7, 4, c) for c in range(100))
    assert any(drops_out(0.4, 7, 3, c) != drops_out(0.4, 8, 3, c) for c in range(100))


def test_a_higher_rate_adds_failures_and_moves_none() -> None:
    lost = [{c for c in range(500) if drops_out(rate, 7, 3, c)} for rate in (0.0, 0.1, 0.3, 0.9, 1.0)]
    assert [len(one) for one in lost] == sorted(len(one) for one in lost)
    assert all(few <= many for few, many in itertools.pairwise(lost))
    assert lost[0] == set()
    assert lost[-1] == set(range(500))
    assert len(lost[2]) / 500 == pytest.approx(0.3, abs=0.07)


def test_a_run_loses_exactly_those_clients_and_keeps_what_the_others_trained(sources: Path, tmp_path: Path) -> None:
    clients = experiment(sources).clients.model_dump() | {"failure_rate": 0.5}
    made = experiment(sources, rounds=3, clients=clients)
    context, summary, recorder = run(made, tmp_path / "run")
    expected = [[c for c in range(4) if drops_out(0.5, 0, number, c)] for number in range(1, 4)]
    found = [[r.client for r in report.clients if r.status == "dropped"] for report in recorder.rounds[1:]]
    assert found == expected
    assert sum(map(len, expected)) == summary["clients"]["dropped"]
    assert 0 < summary["clients"]["dropped"] < 12, "or this seed shows nothing"
    lost = [r for report in recorder.rounds for r in report.clients if r.status == "dropped"]
    assert all(r.bytes_up == 0 and r.trained == 0 and r.bytes_down > 0 and r.seconds > 0 for r in lost)
    assert final_weights(context).version > 0


def test_a_round_that_loses_everybody_changes_nothing(sources: Path, tmp_path: Path) -> None:
    rate = 1 - 1e-12
    clients = experiment(sources).clients.model_dump() | {"failure_rate": rate}
    context, summary, recorder = run(experiment(sources, rounds=1, clients=clients), tmp_path / "run")
    assert summary["clients"]["dropped"] == 4
    before, after = initial_weights(context.model, "experts"), final_weights(context)
    for key, tensors in before.experts.items():
        assert all((after.experts[key][name] == array).all() for name, array in tensors.items())
    assert all((after.shared[name] == array).all() for name, array in before.shared.items())
    assert recorder.rounds[1].loss is None
