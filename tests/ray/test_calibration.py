"""Predicted memory against the peak of a real client, measured and estimated."""

from collections.abc import Iterator

import pytest
from small_run import small_experiment

from hfedmoe_ray import estimates
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.runtime.pool import RayExecutor
from hfedmoe_ray.train.calibrate import Point, calibrate, fit
from hfedmoe_ray.types import ClientTask, ExpertPlan, Role

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
TOLERANCE = 0.15
HELD = 3


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunContext]:
    """Experts large enough to be seen: copies of whole feed-forward networks, 4.7 MB each."""
    overrides = ["model.upcycle.how=copy", "local.steps=3", "clients.count=1", "clients.tiers.0.experts=1.0"]
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HFEDMOE_CACHE", str(cache))
        yield prepare_run(small_experiment([*overrides, "model.upcycle.layers=[4,5]"]), cache / "run")


def predicted(experiment: Experiment, context: RunContext) -> float:
    tier, shape = experiment.clients.tiers[0], context.model.shape
    held = HELD * shape.layers
    return estimates.predict_memory(experiment, shape, tier, held, held, gpu=False) / 2**20


def measured(context: RunContext) -> float:
    """Peak of a client actor, in MiB."""
    executor = RayExecutor(context)
    executor.publish(initial_weights(context.model, context.experiment.model.trainable))
    row = tuple(Role.TRAIN if expert < HELD else Role.ABSENT for expert in range(context.model.shape.experts))
    roles = ExpertPlan(roles=(row,) * context.model.shape.layers)
    task = ClientTask(kind="train", round=1, client=0, seed=0, plan=roles, version=0)
    (result,) = executor.run([task], lambda *_: None)
    executor.close()
    assert result.metrics is not None, result.reason
    return result.metrics.peak_mib


def test_predictions_are_within_15_percent_of_a_client(context: RunContext):
    experiment = context.experiment
    estimate = predicted(experiment, context)
    calibrate(context, gpu=False)
    prediction = predicted(experiment, context)
    assert prediction != estimate
    peak = measured(context)
    assert prediction == pytest.approx(peak, rel=TOLERANCE), "measured"
    assert estimate == pytest.approx(peak, rel=TOLERANCE), "by arithmetic"


def test_four_points_give_the_four_numbers():
    def peak(resident: int, share: float, examples: int) -> float:
        return 7e7 + 3e6 * resident + examples * (5e6 + 2e6 * share)

    points = [
        Point(resident=r, share=r / 48, examples=n, peak=peak(r, r / 48, n), step=peak(r, r / 48, n) / 1e9)
        for r in (3, 24)
        for n in (8, 16)
    ]
    found = fit(points, 64)
    assert found.peak.of(40, 40 / 48, 32) == pytest.approx(peak(40, 40 / 48, 32))
    assert found.step.of(40, 40 / 48, 32) == pytest.approx(peak(40, 40 / 48, 32) / 1e9)


def test_noise_makes_no_number_negative():
    points = [
        Point(resident=r, share=r / 48, examples=n, peak=1e8 - 1e6 * r, step=1.0) for r in (3, 24) for n in (8, 16)
    ]
    found = fit(points, 64).peak
    assert min(found.fixed, found.expert, found.example, found.routed) >= 0
