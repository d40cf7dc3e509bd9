"""Which task starts first follows from what tasks took; what they compute does not."""

from pathlib import Path

from tiny_federation import experiment, final_weights, run

from hfedmoe_ray.federation import collecting
from hfedmoe_ray.federation.durations import Durations
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.strategies.scores import uniform_plan
from hfedmoe_ray.types import ClientTask, Role

PLAN = uniform_plan((2, 4), Role.TRAIN)


def task(client: int, kind: str = "train") -> ClientTask:
    return ClientTask(kind=kind, round=1, client=client, seed=0, plan=PLAN, version=0)


def test_a_client_is_predicted_by_its_own_last_task_then_by_its_tier_then_by_all_then_by_its_experts():
    durations = Durations()
    assert durations.predict("train", 0, "phone", 3) == 3
    durations.add(task(0), "phone", 10.0)
    durations.add(task(0), "phone", 4.0)
    durations.add(task(1), "phone", 1.0)
    durations.add(task(2, "profile"), "server", 100.0)
    assert durations.predict("train", 0, "phone", 3) == 4
    assert durations.predict("train", 7, "phone", 3) == 5
    assert durations.predict("train", 8, "server", 3) == 5, "a profile says nothing of training"
    assert durations.predict("profile", 8, "server", 3) == 100


def test_tasks_are_given_out_with_what_they_took_and_end_in_the_same_model(sources: Path, tmp_path: Path, monkeypatch):
    seen: list[dict[int, float]] = []

    class Watched(LocalExecutor):
        def run(self, tasks, notify, further):
            if tasks and all(one.kind == "train" for one in tasks):
                seen.append({one.client: one.weight for one in tasks})
            return super().run(tasks, notify, further)

    context, _, recorder = run(experiment(sources), tmp_path / "watched", where=Watched)
    took = {record.client: record.seconds for record in recorder.rounds[1].clients}
    assert seen[1] == took
    assert all(weight == int(weight) for weight in seen[0].values()), "experts, as nothing was measured"

    class Contrary(Durations):
        def predict(self, kind, client, tier, experts):
            return -super().predict(kind, client, tier, experts)

    monkeypatch.setattr(collecting, "Durations", Contrary)
    other, _, _ = run(experiment(sources), tmp_path / "contrary")
    one, two = final_weights(context), final_weights(other)
    for key, tensors in one.experts.items():
        assert all((value == two.experts[key][name]).all() for name, value in tensors.items())
