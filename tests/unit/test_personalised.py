"""What clients reach on their own data before and after they make the final model their own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from recorded_run import summary as recorded_summary
from tiny_federation import HFEDMOE, experiment, final_weights, run

from hfedmoe_ray import strategies
from hfedmoe_ray.federation.evaluation import mean_accuracy, variance, worst_tenth
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.strategies.controls import FedAvg
from hfedmoe_ray.tracking.fairness import fairness
from hfedmoe_ray.types import ClientTask, Role, TaskResult

BOTH = {"own": "final", "personalised": True}


class PrivateRouters(FedAvg):
    """FedAvg whose clients keep their routers."""

    private_router = True


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[TaskResult]:
    """Every result of every task that runs."""
    seen: list[TaskResult] = []
    execute = LocalExecutor._execute

    def watched(self: Any, worker: Any, task: ClientTask, notify: Any) -> TaskResult:
        seen.append(execute(self, worker, task, notify))
        return seen[-1]

    monkeypatch.setattr(LocalExecutor, "_execute", watched)
    return seen


@pytest.mark.parametrize("name", ["hfedmoe", "private", "local"])
def test_training_alone_changes_what_is_told_and_nothing_else(
    name: str, sources: Path, tmp_path: Path, tasks: list[TaskResult], monkeypatch: pytest.MonkeyPatch
):
    strategy: Any = HFEDMOE if name == "hfedmoe" else name
    if name == "private":
        monkeypatch.setattr(strategies, "_STRATEGIES", dict.fromkeys(strategies._STRATEGIES, PrivateRouters))
        strategy = "fedavg"
    made = experiment(sources, strategy=strategy)
    _, plain, _ = run(made, tmp_path / "plain")
    assert plain["personalised_accuracy"] is None
    tasks.clear()
    context, found, recorder = run(experiment(sources, strategy=strategy, evaluate=BOTH), tmp_path / "both")
    assert found["model_sha256"] == plain["model_sha256"]
    assert found["own_accuracy_by_client"] == plain["own_accuracy_by_client"]
    alone = {r.task.client: r for r in tasks if r.task.kind == "personalise"}
    before = {r.task.client: r for r in tasks if r.task.split == "own_test" and r.task.kind == "evaluate"}
    assert sorted(alone) == sorted(before) == [0, 1, 2, 3]
    assert sum(report.personalised_accuracy is not None for report in recorder.rounds) == 1
    weights = final_weights(context)
    for client, result in alone.items():
        held, metrics = before[client].task.plan, result.metrics
        assert result.task.plan.present == held.present, "the same experts before and after"
        assert result.task.personal == (client if client in (weights.personal or {}) else None)
        assert not held.trainable
        trained = {tuple(map(int, key.split("."))) for key in metrics.trained}
        assert trained <= set(result.task.plan.trainable) and trained
        budget = result.task.plan.batch_budget
        if name == "hfedmoe":
            assert budget == recorder.facts["clients"][client]["batch_experts"]
            assert sum(metrics.trained.values()) <= budget * made.local.steps
        assert result.payload() == b"" and result.state is None, "it sends metrics only"
        assert metrics.examples == before[client].metrics.examples
        assert found["personalised_accuracy_by_client"][str(client)] == metrics.correct / metrics.examples
    # Local training from the final weights does change the model.
    assert any(result.metrics.loss != before[client].metrics.loss for client, result in alone.items())


def test_it_repeats_and_survives_a_resume(sources: Path, tmp_path: Path):
    made = experiment(sources, evaluate=BOTH)
    _, whole, _ = run(made, tmp_path / "whole")
    run(made, tmp_path / "cut", stop_after=1)
    _, resumed, _ = run(made, tmp_path / "cut", resume=True)
    keys = [key for key in whole if key.startswith(("own", "personalised"))]
    assert len(keys) == 8
    assert {key: resumed[key] for key in keys} == {key: whole[key] for key in keys}
    # A run that has ended and is resumed once more has nothing left to train, and forgets nothing.
    _, again, _ = run(made, tmp_path / "cut", resume=True)
    assert {key: again[key] for key in keys} == {key: whole[key] for key in keys}


def test_experts_that_a_strategy_deploys_as_trainable_are_those_that_train(
    sources: Path, tmp_path: Path, tasks: list[TaskResult], monkeypatch: pytest.MonkeyPatch
):
    class OneExpert(FedAvg):
        def deploy(self, round: int, clients: Any, profiles: Any) -> Any:
            plans = super().deploy(round, clients, profiles)
            rows = ((Role.TRAIN, *[Role.FROZEN] * (self.shape[1] - 1)),) * self.shape[0]
            return {client: replace(plan, roles=rows, top_k=1) for client, plan in plans.items()}

    monkeypatch.setattr(strategies, "_STRATEGIES", dict.fromkeys(strategies._STRATEGIES, OneExpert))
    run(experiment(sources, strategy="fedavg", rounds=1, evaluate=BOTH), tmp_path / "run")
    alone = [r for r in tasks if r.task.split == "own_test"]
    assert {r.task.plan.top_k for r in alone} == {1}, "what a client routes to holds whenever it uses the model"
    for result in alone:
        trains = result.task.kind == "personalise"
        assert set(result.metrics.trained) <= {"0.0", "1.0"}
        assert [len(result.task.plan.trainable), bool(result.metrics.trained)] == [2 * trains, trains]


def test_the_worst_tenth_and_the_variance():
    accuracies = {client: client / 20 for client in range(20)}
    assert worst_tenth(accuracies) == pytest.approx(0.025)
    assert worst_tenth({client: 0.1 * client for client in range(11)}) == pytest.approx(0.05)
    assert worst_tenth({4: 0.25}) == 0.25
    assert variance({0: 0.2, 1: 0.6}) == pytest.approx(0.04)
    assert mean_accuracy({}) is worst_tenth({}) is variance({}) is None


def test_the_report_says_how_unequally_clients_fare():
    told = recorded_summary(own_worst_tenth=0.5, own_variance=0.01, own_accuracy=0.7)
    assert "the worst tenth of them 50.0 %; the standard deviation over clients is 10.0 points" in fairness(told)
    assert "one more local round" not in fairness(told)
    told |= {"personalised_accuracy": 0.8, "personalised_worst_tenth": 0.6, "personalised_variance": 0.0025}
    assert "after one more local round each, clients reach 80.0 % on average" in fairness(told)


def test_there_is_no_after_without_a_before(sources: Path):
    with pytest.raises(ValidationError, match="write `own: final`"):
        experiment(sources, evaluate={"own": "never", "personalised": True})
