"""Whole runs in which some clients lie: they are left out, and only a fault that is ours stops the run."""

from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import pytest
from faulty_worker import FaultyWorker
from tiny_federation import Recorder, experiment, run

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.federation.evaluation import summarise
from hfedmoe_ray.federation.quorum import Proof, raise_common_flaw
from hfedmoe_ray.federation.validation import NotAsTrained
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.trust.limits import claims
from hfedmoe_ray.types import ClientMetrics, ClientTask, ExpertKey, ExpertPlan, Role, TaskResult

ONE, TWO = ExpertKey(0, 0), ExpertKey(1, 2)
RANDOM = {"name": "random"}
"""Every client trains all that it holds."""


def run_with(faults: dict[tuple[int, int], str], made: Experiment, run_dir: Path) -> tuple[dict[str, Any], Recorder]:
    worker = partial(FaultyWorker, faults=faults)
    return run(made, run_dir, where=partial(LocalExecutor, worker_factory=worker))[1:]


def test_wrong_checksums_of_single_clients_are_theirs_and_change_nothing_else(sources: Path, tmp_path: Path):
    made = experiment(sources, strategy=RANDOM)
    lies = {(1, 0): "untrained", (2, 0): "untrained", (2, 3): "examples"}
    summary, recorder = run_with(lies, made, tmp_path / "lies")
    assert summary["status"] == "finished"
    told = {(r.round, r.client): r.reason for report in recorder.rounds for r in report.clients if r.reason}
    assert told.keys() == lies.keys()
    assert "unchanged: it was not trained as planned" in told[1, 0]
    assert "1000000000000 training examples, and can have" in told[2, 3]
    absent = {who: f"client {who[1]} is away" for who in lies}
    assert run_with(absent, made, tmp_path / "absent")[0]["model_sha256"] == summary["model_sha256"]


def test_experts_that_silently_never_train_stop_the_run(sources: Path, tmp_path: Path):
    """A step so short that no number changes: what every client reports is true, and no client's doing."""
    local = experiment(sources).local.model_dump() | {"learning_rate": 1e-30}
    with pytest.raises(TrainingError, match=r"round 1: client 0 took steps on expert .*, unchanged.* fault in the fra"):
        run(experiment(sources, strategy=RANDOM, local=local), tmp_path / "run")


def test_a_fault_of_one_tier_stops_the_run_too(sources: Path, tmp_path: Path):
    """Clients are phones or servers; they start from wherever the others do, so it is in how these are run."""
    made = experiment(sources, strategy=RANDOM)
    summary, recorder = run_with({}, made, tmp_path / "honest")
    servers = [r.client for r in recorder.rounds[1].clients if r.tier == "server"]
    assert len(servers) == 2
    assert summary["status"] == "finished"
    with pytest.raises(TrainingError, match=rf"client {servers[0]} took .* and so did {servers[1]} \(took steps on an"):
        run_with({(1, client): "untrained" for client in servers}, made, tmp_path / "faulty")


@pytest.mark.parametrize("lie", ["nested", "endless"])
def test_answers_that_cannot_be_read_are_no_common_fault(sources: Path, tmp_path: Path, lie: str):
    made = experiment(sources, rounds=1, runtime={"quorum": 0.25})
    summary, recorder = run_with({(1, client): lie for client in (0, 1, 2)}, made, tmp_path / "run")
    assert summary["clients"]["rejected"] == 3
    assert all("metrics cannot be read" in r.reason for r in recorder.rounds[1].clients[:3])


def proofs(flawed: dict[int, tuple[str, ExpertKey]], tiers: str, trains: dict[int, set[ExpertKey]]) -> list[Proof]:
    """A proof of each client, whose tier is a letter."""
    return [
        Proof(
            client=client,
            round=4,
            tier=tier,
            trainable=trains.get(client, {ONE}),
            flaw=NotAsTrained(*(fact := flawed[client])[:1], [fact[1]], "it did") if client in flawed else None,
        )
        for client, tier in enumerate(tiers)
    ]


@pytest.mark.parametrize(
    ("tiers", "flawed", "trains", "ours"),
    [
        ("aaaa", {}, {}, False),
        ("aaaa", {0: ("lost", ONE)}, {}, False),
        ("aaaa", {0: ("lost", ONE), 1: ("lost", ONE)}, {}, False),
        ("aaaaaa", {0: ("lost", ONE), 1: ("lost", ONE), 2: ("lost", ONE)}, {}, True),
        ("aaaaaaa", {0: ("lost", ONE), 1: ("lost", ONE), 2: ("lost", ONE)}, {}, False),
        ("aaaaaabb", {6: ("lost", ONE), 7: ("lost", ONE)}, {}, True),
        ("aaaaaabb", {6: ("lost", ONE), 7: ("other", ONE)}, {}, False),
        ("aaaaaaab", {7: ("lost", ONE)}, {}, False),
        ("aaaaaaaa", {0: ("lost", TWO), 1: ("lost", TWO)}, {0: {ONE, TWO}, 1: {ONE, TWO}}, True),
        ("aaaaaaaa", {0: ("lost", TWO), 1: ("lost", TWO)}, {0: {ONE, TWO}, 1: {TWO}, 2: {TWO}}, False),
    ],
)
def test_the_same_flaw_at_enough_of_those_it_can_strike_is_ours(tiers, flawed, trains, ours):
    found = proofs(flawed, tiers, trains)
    if not ours:
        raise_common_flaw(found)
        return
    with pytest.raises(TrainingError, match=r"round 4: client \d it did.* \(lost\)"):
        raise_common_flaw(found)


def answer(task: ClientTask, **metrics: Any) -> TaskResult:
    said = {"client": task.client, "round": task.round, "kind": task.kind, "samples": 4, "tokens": 9, "loss": 1.0}
    told = ClientMetrics(**(said | {"examples": 4, "correct": 4} | metrics))
    return TaskResult(task=task, status="ok", metrics=told)


def test_an_evaluation_counts_what_answers_for_its_own_task():
    plan = ExpertPlan(roles=((Role.FROZEN,),))
    own = [
        ClientTask(kind="evaluate", round=1, client=client, seed=0, plan=plan, version=0, split="own_test")
        for client in (0, 1, 2)
    ]
    found = summarise([answer(own[0]), answer(own[1], client=0), answer(own[2], round=0)])
    assert found.own == {0: 1.0}
    with pytest.raises(TrainingError, match="evaluation of slice 1/1"):
        summarise([answer(replace(own[0], split="global_test"), kind="train")])


def test_a_client_can_claim_what_it_was_dealt_or_what_the_configuration_believes(sources: Path):
    made = experiment(sources)
    task = ClientTask(kind="train", round=1, client=0, seed=0, plan=ExpertPlan(roles=((Role.TRAIN,),)), version=0)
    assert claims(made, task, 30).samples == 30
    assert claims(made, task, 0).samples == inf
    clients = made.clients.model_copy(update={"most_examples": 500})
    assert claims(made.model_copy(update={"clients": clients}), task, 0).samples == 500
    assert claims(made.model_copy(update={"clients": clients}), task, 30).samples == 30
    local, length = made.local, made.data.max_length
    assert claims(made, task, 0).tokens == 2 * local.steps * local.batch_size * length
    assert claims(made, replace(task, kind="profile"), 0).tokens == local.profile_examples * length
