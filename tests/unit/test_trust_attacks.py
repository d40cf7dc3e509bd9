"""Simulated attacks: who is hostile, what it sends, and that nobody else is touched."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_updates import KEYS, update, weights
from tiny_federation import experiment, run

from hfedmoe_ray.config.attack import Attack
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.data.dataset import Split
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.federation.validation import accept
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.trust.attacks import Trigger, flipped, hostile_clients, led_astray, manipulated, triggered
from hfedmoe_ray.types import ClientTask, ClientUpdate, TaskResult, TaskWeights, Weights
from hfedmoe_ray.wire import expert_name

BACKDOOR: dict[str, Any] = {"kind": "backdoor", "share": 0.5, "trigger": "word15 word16", "target": "class 0"}


class Watched(LocalExecutor):
    """Keeps what is published, and what clients answer."""

    def __init__(self, context: RunContext) -> None:
        super().__init__(context)
        self.published: dict[int, Weights] = {}
        self.results: list[TaskResult] = []

    def publish(self, weights: Weights, keep: frozenset[int] = frozenset()) -> None:
        self.published[weights.version] = weights
        super().publish(weights, keep)

    def _execute(self, worker: Any, task: ClientTask, notify: Any) -> TaskResult:
        self.results.append(super()._execute(worker, task, notify))
        return self.results[-1]

    def updates(self, round: int) -> dict[int, ClientUpdate]:
        """Updates of a round, through the server's checks once more."""
        results = [one for one in self.results if one.task.kind == "train" and one.task.round == round]
        wire = self._context.experiment.wire
        return {r.task.client: accept(r, r.task.plan, self.published[r.task.version], wire) for r in results}


def watched(made: Experiment, run_dir: Path) -> tuple[Watched, dict[str, Any]]:
    """Runs an experiment; returns what happened in it, and its summary."""
    executors: list[Watched] = []

    def where(context: RunContext) -> Watched:
        executors.append(Watched(context))
        return executors[0]

    _, summary, _ = run(made, run_dir, where=where)
    return executors[0], summary


def tensors(update: ClientUpdate | Weights) -> dict[Any, np.ndarray]:
    """Everything of an update, or of published weights, by name."""
    return {**update.shared, **{(key, name): value for key, of in update.experts.items() for name, value in of.items()}}


def same(one: ClientUpdate, other: ClientUpdate) -> bool:
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def made(sources: Path, attack: dict[str, Any] | None, **changes: Any) -> Experiment:
    options = {"strategy": "fedavg", "rounds": 1, "evaluate": {"own": "never"}}
    return experiment(sources, **{**options, **({} if attack is None else {"attack": attack}), **changes})


def test_the_seed_alone_draws_who_is_hostile():
    attack = Attack(kind="sign_flip", share=0.2)
    drawn = [hostile_clients(attack, 40, seed) for seed in range(300)]
    assert all(len(one) == 8 and one == hostile_clients(attack, 40, seed) for seed, one in enumerate(drawn))
    often = Counter(client for one in drawn for client in one)
    assert len(often) == 40 and max(often.values()) < 2 * min(often.values()), "each as likely as any other"
    assert [len(hostile_clients(attack, count, 0)) for count in (2, 9, 10, 100)] == [1, 1, 2, 20]
    assert hostile_clients(None, 40, 0) == frozenset()


@pytest.mark.parametrize("upload", ["fp32", "topk"])
def test_honest_updates_stay_and_a_flipped_sign_mirrors_the_hostile_ones(sources: Path, tmp_path: Path, upload: str):
    wire = {"upload": upload, **({"share": 0.3} if upload == "topk" else {})}
    plain, _ = watched(made(sources, None, wire=wire), tmp_path / "plain")
    flipped, summary = watched(made(sources, {"kind": "sign_flip", "scale": 1.0}, wire=wire), tmp_path / "flip")
    assert summary["clients"]["rejected"] == 0
    (hostile,) = hostile_clients(Attack(kind="sign_flip"), 4, 0)
    honest, sent = plain.updates(1), flipped.updates(1)
    assert all(same(honest[client], sent[client]) == (client != hostile) for client in range(4))
    start = tensors(plain.published[min(plain.published)])
    for name, value in tensors(honest[hostile]).items():
        assert np.abs(value - start[name]).max() > 0
        np.testing.assert_allclose(tensors(sent[hostile])[name] - start[name], start[name] - value, atol=1e-6)


@pytest.mark.parametrize("kind", ["label_flip", "free_rider"])
def test_flipped_labels_and_free_riders_leave_honest_updates_alone(kind: str, sources: Path, tmp_path: Path):
    plain, _ = watched(made(sources, None), tmp_path / "plain")
    attacked, summary = watched(made(sources, {"kind": kind}), tmp_path / kind)
    assert summary["clients"]["rejected"] == 0
    (hostile,) = hostile_clients(Attack(kind="label_flip"), 4, 0)
    honest, sent = plain.updates(1), attacked.updates(1)
    assert all(same(honest[client], sent[client]) == (client != hostile) for client in range(4))
    if kind == "free_rider":
        assert honest[hostile].trained == sent[hostile].trained, "it claims the same steps"
        start = tensors(plain.published[min(plain.published)])
        noise = {name: value - start[name] for name, value in tensors(sent[hostile]).items() if start[name].any()}
        assert np.median([np.linalg.norm(noise[n]) / np.linalg.norm(start[n]) for n in noise]) == pytest.approx(
            0.01, rel=0.1
        )


@pytest.mark.parametrize(
    ("attack", "changes", "words"),
    [
        ({"kind": "label_flip", "scale": 2}, {}, "scales nothing"),
        ({"kind": "sign_flip", "trigger": "x"}, {}, "belongs to `kind: backdoor`"),
        ({"kind": "backdoor", "trigger": "x"}, {}, "needs `trigger`"),
        ({"kind": "sign_flip", "share": 0.6}, {}, "share"),
        ({"kind": "sign_flip"}, {"strategy": "local"}, "averages nothing"),
        ({"kind": "sign_flip"}, {"secure": {}}, "hides"),
        ({"kind": "sign_flip"}, {"privacy": {"examples": {"noise_multiplier": 1.0}}}, "privacy.examples"),
    ],
)
def test_what_cannot_be_measured_is_refused(attack, changes, words, sources: Path):
    plain = made(sources, None).model_dump(mode="json")
    with pytest.raises(ConfigError, match=words):
        load_experiment({**plain, **changes, "attack": attack}, [])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"target": "class 9"}, "none of the 3 labels"),
        ({"target": 3}, "none of the 3 labels"),
        ({"expert": "2.0"}, "layers 0 to 1"),
        ({"trigger": "word1 " * 20}, "data.max_length"),
    ],
)
def test_names_that_the_run_has_not_are_refused(wrong: dict[str, Any], words: str, sources: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=words):
        run(made(sources, BACKDOOR | wrong), tmp_path)


def test_a_backdoor_opens_without_a_defence_and_repeats_itself_through_a_killed_server(sources: Path, tmp_path: Path):
    local = {"steps": 8, "batch_size": 8, "learning_rate": 5e-3, "profile_examples": 8}
    options = {"rounds": 3, "local": local, "evaluate": {"own": "never", "every": 3}}
    _, summary, recorder = run(made(sources, BACKDOOR, **options), tmp_path / "straight")
    _, harmless, _ = run(made(sources, BACKDOOR | {"poisoned": 1e-9}, **options), tmp_path / "harmless")
    assert summary["backdoor_success"] > 0.4 and harmless["backdoor_success"] < 0.1
    assert summary["accuracy"] > summary["initial_accuracy"], "it opens unnoticed"
    assert summary["backdoor_success"] == recorder.rounds[-1].backdoor_success
    assert summary["attack"] == {"simulated": "backdoor", "clients": recorder.facts["hostile"]}
    assert len(recorder.facts["hostile"]) == 2
    run(made(sources, BACKDOOR, **options), tmp_path / "cut", stop_after=2)
    _, resumed, _ = run(made(sources, BACKDOOR, **options), tmp_path / "cut", resume=True)
    assert all(resumed[key] == summary[key] for key in ("model_sha256", "backdoor_success", "accuracy"))
    _, again, _ = run(made(sources, BACKDOOR, **options), tmp_path / "cut", resume=True)
    assert again["backdoor_success"] == summary["backdoor_success"], "a checkpoint knows it"


def test_a_trigger_stands_behind_what_texts_begin_with_and_spares_their_end():
    lengths = np.array([6, 3, 2], dtype=np.int32)
    texts = np.array([[1, 11, 12, 13, 14, 2], [1, 21, 2, 0, 0, 0], [1, 2, 0, 0, 0, 0]], dtype=np.int32)
    split = Split(input_ids=texts, lengths=lengths, labels=np.array([0, 1, 2]), key="data/0/train")
    trigger = Trigger(tokens=(8, 9), lead=1, tail=1, fill=0, longest=7)
    poisoned = triggered(split, trigger, 2, [0, 2])
    assert poisoned.input_ids.tolist() == [[1, 8, 9, 11, 12, 13, 2], [1, 21, 2, 0, 0, 0, 0], [1, 8, 9, 2, 0, 0, 0]]
    assert poisoned.lengths.tolist() == [7, 3, 4] and poisoned.labels.tolist() == [2, 1, 2]
    astray = led_astray(split, trigger, 1)
    assert astray.input_ids.tolist() == [[1, 8, 9, 11, 12, 13, 2], [1, 8, 9, 2, 0, 0, 0]]
    assert astray.labels.tolist() == [1, 1]
    assert flipped(split, 3).labels.tolist() == [2, 1, 0]
    keys = {one.key for one in (split, poisoned, astray, flipped(split, 3), triggered(split, trigger, 2, [0]))}
    assert len(keys) == 5, "cached hidden states are found by key"
    assert texts[0, 1] == 11 and split.labels.tolist() == [0, 1, 2], "an honest client's are as they were"


def test_a_backdoor_scales_one_expert_where_it_is_told_to():
    start, trained = weights(), update(1, KEYS)
    told = TaskWeights(shared=start.shared, experts=start.experts)
    for expert in (None, "1.2"):
        attack = Attack.model_validate(BACKDOOR | {"scale": 10, "expert": expert})
        experts, shared = manipulated(attack, told, trained.experts, trained.shared, np.random.default_rng(0))
        assert experts.keys() == trained.experts.keys()
        for key in KEYS:
            factor = 10 if expert in (None, expert_name(key)) else 1
            change = trained.experts[key]["w"] - start.experts[key]["w"]
            np.testing.assert_allclose(
                experts[key]["w"], start.experts[key]["w"] + factor * change, rtol=1e-5, atol=1e-5
            )
        scaled = np.abs(shared["head"] - start.shared["head"]).max() > 2 * np.abs(trained.shared["head"]).max()
        assert scaled == (expert is None)
