"""Clients that run out of memory are given less at once, then fewer experts, and never the same again."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_federation import HFEDMOE, Recorder, experiment, run

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.federation.executor import Executor
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.train.local import ClientWorker
from hfedmoe_ray.types import ClientTask, TaskWeights

SCARCE = 1
"""The client of the first tier."""
Where = Callable[[RunContext], Executor]


class ScarceWorker(ClientWorker):
    """Has no room for more of one client's examples or experts than so many at once."""

    examples, experts, kind = 10**9, 10**9, "train"

    def execute(
        self, task: ClientTask, weights: TaskWeights, should_stop: Callable[[], bool]
    ) -> tuple[bytes, bytes, bytes]:
        if (task.client, task.kind) == (SCARCE, self.kind):
            at_once = task.micro_batch or self._tiers[SCARCE].micro_batch or self._local.batch_size
            if at_once > self.examples or len(task.plan.trainable) > self.experts:
                raise MemoryError(f"no room for {at_once} examples and {len(task.plan.trainable)} experts")
        return super().execute(task, weights, should_stop)


def scarce(**limits: Any) -> Where:
    """A local executor whose worker has these limits."""
    return partial(LocalExecutor, worker_factory=type("Worker", (ScarceWorker,), limits))


def made(sources: Path, **first: Any) -> Any:
    """Four clients, the second one alone in the first tier."""
    tiers = [
        {"name": "scarce", "share": 0.25, "experts": 0.5} | first,
        {"name": "ample", "share": 0.75, "experts": 0.25},
    ]
    strategy = first.pop("strategy", HFEDMOE)
    tiers[0].pop("strategy", None)
    return experiment(sources, clients={"count": 4, "tiers": tiers}, strategy=strategy)


def tries(recorder: Recorder, kind: str = "train") -> list[list[str]]:
    """By round: what happened to the client until it was done, as one letter each for a start and a demotion."""
    told: dict[int, list[str]] = {}
    for name, fields in recorder.events:
        if name in ("task_started", "demoted") and (fields["client"], fields["kind"]) == (SCARCE, kind):
            told.setdefault(fields["round"], []).append("start" if name == "task_started" else fields["to"])
    return list(told.values())


def test_fewer_examples_at_once_give_the_model_of_a_run_configured_so(sources: Path, tmp_path: Path):
    _, summary, recorder = run(made(sources), tmp_path / "demoted", where=scarce(examples=1))
    _, expected, _ = run(made(sources, micro_batch=1), tmp_path / "configured")
    first = ["start", "2 examples at once", "start", "1 examples at once", "start"]
    assert tries(recorder) == [first, ["start"]]
    assert summary["model_sha256"] == expected["model_sha256"]
    assert summary["clients"]["ok"] == 12
    assert summary["training_failures"] == 1 / 8
    assert [[r.demotions for r in report.clients] for report in recorder.rounds[1:]] == [[0, 2, 0, 0], [0, 0, 0, 0]]


def test_then_fewer_experts_give_the_model_of_a_run_configured_so(sources: Path, tmp_path: Path):
    _, summary, recorder = run(made(sources, micro_batch=2), tmp_path / "demoted", where=scarce(experts=2))
    _, expected, _ = run(made(sources, micro_batch=1, experts=0.17), tmp_path / "configured")
    told = ["1 examples at once", "3 experts that train", "2 experts that train"]
    first = ["start", *(word for step in told for word in (step, "start"))]
    assert tries(recorder) == [first, ["start"]]
    assert summary["model_sha256"] == expected["model_sha256"]
    assert recorder.rounds[-1].clients[SCARCE].resident == 2


@pytest.mark.parametrize(("strategy", "experts"), [(HFEDMOE, [3, 2]), ({"name": "fedavg"}, [])])
def test_a_client_without_any_room_says_so_and_the_run_goes_on(
    sources: Path, tmp_path: Path, strategy: dict[str, Any], experts: list[int]
):
    """A method without a budget has no smaller plan to offer."""
    _, summary, recorder = run(made(sources, strategy=strategy), tmp_path, where=scarce(examples=0))
    told = ["2 examples at once", "1 examples at once", *(f"{n} experts that train" for n in experts)]
    first = ["start", *(word for step in told for word in (step, "start"))]
    assert tries(recorder) == [first, ["start"]], "in a later round the lowest rung is tried, once"
    assert (summary["status"], summary["clients"]["memory"]) == ("finished", 2)
    assert summary["training_failures"] == 2 / 8
    reason = recorder.rounds[1].clients[SCARCE].reason
    assert "clients.tiers.0.memory_gib" in reason
    assert "MemoryError: no room for 1 examples" in reason


def test_a_round_below_quorum_is_not_tried_again_with_what_did_not_fit(sources: Path, tmp_path: Path):
    strict = made(sources).model_copy(update={"runtime": made(sources).runtime.model_copy(update={"quorum": 1.0})})
    with pytest.raises(Exception, match=r"client 1: memory .*clients\.tiers\.0\.memory_gib") as stopped:
        run(strict, tmp_path, where=scarce(examples=0))
    assert "only 3 of 4" in str(stopped.value)


def test_profiling_takes_fewer_examples_at_once_too(sources: Path, tmp_path: Path):
    _, summary, recorder = run(made(sources), tmp_path, where=scarce(kind="profile", examples=2))
    assert tries(recorder, "profile") == [["start", "2 examples at once", "start"]]
    assert summary["clients"]["ok"] == 12


def test_a_resumed_run_goes_on_with_what_fits(sources: Path, tmp_path: Path):
    limits = scarce(examples=1, experts=3)
    _, whole, _ = run(made(sources), tmp_path / "whole", where=limits)
    run(made(sources), tmp_path / "parts", where=limits, stop_after=1)
    _, resumed, recorder = run(made(sources), tmp_path / "parts", where=limits, resume=True)
    assert tries(recorder) == [["start"]]
    for key in ("model_sha256", "training_failures", "clients"):
        assert resumed[key] == whole[key]
