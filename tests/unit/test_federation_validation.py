"""What is refused, and what stops the run."""

import dataclasses

import numpy as np
import pytest

from hfedmoe_ray.config.wire import Wire
from hfedmoe_ray.federation.validation import NotAsTrained, Rejected, accept, check_canary, check_update
from hfedmoe_ray.types import (
    ClientMetrics,
    ClientTask,
    ClientUpdate,
    ExpertKey,
    ExpertPlan,
    Prototypes,
    Role,
    RoutingProfile,
    TaskResult,
    Weights,
)
from hfedmoe_ray.wire import checksum, pack_update

MINE, OTHER = ExpertKey(0, 0), ExpertKey(0, 1)
PLAN = ExpertPlan(roles=((Role.TRAIN, Role.ABSENT, Role.TRAIN),))
OLD = Weights(
    version=0,
    shared={"head": np.zeros((2, 4), np.float32)},
    experts={ExpertKey(0, e): {"w": np.full(3, e, np.float32)} for e in range(3)},
    means=np.zeros((1, 3, 4), np.float32),
)
NEW = np.full(3, 7, np.float32)
FLAT = np.full((1, 3), 1 / 3)
PROFILE = RoutingProfile(usage=FLAT, specific=FLAT, kl=FLAT * 0, routed=FLAT * 9, tokens=9)
UPDATE = ClientUpdate(
    client=1,
    samples=5,
    experts={MINE: {"w": NEW}},
    shared={"head": np.ones((2, 4), np.float32)},
    trained={MINE: 2},
    profile=PROFILE,
    means={},
)
METRICS = ClientMetrics(
    client=1,
    round=1,
    kind="train",
    samples=5,
    tokens=9,
    loss=1.0,
    trained={"0.0": 2},
    before={"0.0": checksum(OLD.experts[MINE]), "0.2": checksum(OLD.experts[ExpertKey(0, 2)])},
    after={"0.0": checksum({"w": NEW}), "0.2": checksum(OLD.experts[ExpertKey(0, 2)])},
)


def changed(**fields):
    return dataclasses.replace(UPDATE, **fields)


def test_a_proper_update_passes_both_checks():
    check_update(UPDATE, PLAN, OLD, trains=True)
    check_canary(UPDATE, METRICS, PLAN, OLD)


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (changed(experts={OTHER: {"w": NEW}}, trained={OTHER: 2}), "not assigned"),
        (changed(trained={}), "not the experts it says"),
        (changed(trained={MINE: 0}), "0 steps"),
        (changed(samples=0), "0 training examples"),
        (changed(experts={MINE: {"w": np.float32([1, np.nan, 1])}}), "NaN or infinity"),
        (changed(experts={MINE: {"w": np.float32([1, np.inf, 1])}}), "NaN or infinity"),
        (changed(experts={MINE: {"w": np.float32([0, 2e3, 0])}}), r"norm 2e\+03, more than 100 times the 0 before"),
        (changed(experts={MINE: {"w": np.float32([0, 1e30, 0])}}), r"norm (inf|1e\+30)"),
        (changed(shared={"head": np.full((2, 4), -1e4, np.float32)}), r"norm 2.83e\+04"),
        (changed(experts={MINE: {"w": np.zeros(4, np.float32)}}), r"expected float32 \[3\]"),
        (changed(experts={MINE: {"w": np.zeros(3, np.float64)}}), "float64"),
        (changed(experts={MINE: {"x": NEW}}), "unexpected or missing"),
        (changed(shared={}), "shared parameters"),
        (changed(profile=None), "no routing profile"),
        (changed(profile=dataclasses.replace(PROFILE, kl=np.full((1, 3), np.nan))), "kl"),
        (changed(profile=dataclasses.replace(PROFILE, usage=np.ones((3, 1)))), "usage"),
        (changed(prototypes=Prototypes(sums=np.ones((2, 5)), counts=np.ones(2))), "task head's shape"),
        (changed(prototypes=Prototypes(sums=np.ones((2, 4)), counts=np.ones(3))), "task head's shape"),
        (
            changed(prototypes=Prototypes(sums=np.ones((2, 4), np.float32), counts=-np.ones(2, np.float32))),
            "negative counts",
        ),
        (
            changed(prototypes=Prototypes(sums=np.full((2, 4), np.inf, np.float32), counts=np.ones(2, np.float32))),
            "infinity",
        ),
        (changed(means={OTHER: (np.zeros(4, np.float32), 3)}), "does not hold"),
        (changed(means={MINE: (np.zeros(5, np.float32), 3)}), "mean output"),
    ],
)
def test_a_bad_update_is_rejected_with_its_reason(update, reason):
    with pytest.raises(Rejected, match=reason):
        check_update(update, PLAN, OLD, trains=True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"after": {**METRICS.after, "0.0": METRICS.before["0.0"]}}, "unchanged"),
        ({"after": {**METRICS.after, "0.2": "moved"}}, "without a step"),
        ({"after": {**METRICS.after, "0.0": "other"}}, "other than it stood"),
        ({"before": {**METRICS.before, "0.2": "elsewhere"}}, "other weights than those published"),
        ({"before": {}}, "did not report a checksum"),
    ],
)
def test_the_canary_sees_what_was_not_trained_as_planned(changes, told):
    with pytest.raises(NotAsTrained, match=told):
        check_canary(UPDATE, dataclasses.replace(METRICS, **changes), PLAN, OLD)


def test_an_answer_for_another_task_or_unreadable_bytes_are_rejected():
    task = ClientTask(kind="train", round=1, client=1, seed=0, plan=PLAN, version=0)
    payload = pack_update(UPDATE.experts, UPDATE.shared, PROFILE, {})
    good = TaskResult(task=task, status="ok", metrics=METRICS, payload=lambda: payload)
    assert accept(good, PLAN, OLD, Wire()).trained == {MINE: 2}
    for bad in (
        dataclasses.replace(good, metrics=dataclasses.replace(METRICS, client=2)),
        dataclasses.replace(good, metrics=dataclasses.replace(METRICS, round=0)),
        dataclasses.replace(good, payload=lambda: payload[:-3]),
        dataclasses.replace(good, payload=None),
    ):
        with pytest.raises(Rejected):
            accept(bad, PLAN, OLD, Wire())
