"""DP-SGD in a client: an example moves a step by no more than its bound, and the noise is what was asked for."""

from pathlib import Path
from typing import Any

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting import rdp
from pydantic import ValidationError
from tiny_federation import experiment, final_weights, run

from hfedmoe_ray.config.privacy import Examples
from hfedmoe_ray.config.schema import LocalTraining
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.train import private_steps
from hfedmoe_ray.train.engine import Engine
from hfedmoe_ray.trust.accounting import example_epsilon

RANDOM = {"name": "random", "unselected": "reroute"}


def private(sources: Path, **options: Any):
    return experiment(
        sources,
        rounds=1,
        strategy=RANDOM,
        evaluate={"own": "never"},
        privacy={"examples": {"unprotected": True, "noise_seed": 0} | options},
    )


def test_steps_are_sums_of_clipped_gradients_with_the_stated_noise(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    handed: list[tuple[list[np.ndarray], int]] = []
    batches: list[int] = []
    take, drawn = Engine.take, private_steps.poisson_batches

    def kept(self: Engine, gradients, active) -> None:
        handed.append(([one.detach().numpy().copy() for one in gradients], len(active)))
        take(self, gradients, active)

    def counted(*args):
        for batch in drawn(*args):
            batches.append(len(batch))
            yield batch

    monkeypatch.setattr(Engine, "take", kept)
    monkeypatch.setattr("hfedmoe_ray.train.local.poisson_batches", counted)
    # Next to no noise: what is handed over is a mean of gradients of norm 0.01 at most, over 4 expected examples.
    run(private(sources, noise_multiplier=1e-9, clip=0.01), tmp_path / "clipped")
    assert len(handed) == 4 * 3  # clients, steps
    assert len(set(batches)) > 1  # Poisson
    for (gradients, active), size in zip(handed, batches, strict=True):
        norm = np.sqrt(sum(float((one.astype(np.float64) ** 2).sum()) for one in gradients))
        assert norm <= 0.01 * size / 4 * (1 + 1e-4)
        assert active in (3, 6)  # all of its budget, whatever the batch was routed to
    handed.clear()
    # Next to nothing but noise.
    context, _, recorder = run(private(sources, noise_multiplier=1e6, clip=1e-6), tmp_path / "noise")
    numbers = np.concatenate([one.ravel() for gradients, _ in handed for one in gradients]).astype(np.float64)
    assert abs(numbers.var() / (1.0 / 4) ** 2 - 1) < 5 * (2 / len(numbers)) ** 0.5
    assert abs(numbers.mean()) < 5 * 0.25 / len(numbers) ** 0.5
    before, after = initial_weights(context.model, "experts"), final_weights(context)
    assert any((after.shared[name] != before.shared[name]).any() for name in before.shared)
    # Nothing that was measured on the data is told.
    rounds = recorder.rounds
    assert [report.loss for report in rounds] == [None, None]
    np.testing.assert_allclose(rounds[1].usage, 1 / context.model.shape.experts)
    counts = np.array(rounds[1].selected)
    assert counts.sum() == sum(record.resident for record in rounds[1].clients)


def test_epsilon_of_an_example_is_the_accountants_own():
    options, local = Examples(noise_multiplier=1.1, delta=1e-5), LocalTraining(steps=5, batch_size=8)
    own = rdp.RdpAccountant()
    own.compose(dp.PoissonSampledDpEvent(8 / 200, dp.GaussianDpEvent(1.1)), 15)
    assert example_epsilon(options, local, [300, 200, 900], 3) == pytest.approx(own.get_epsilon(1e-5), rel=1e-9)


def test_what_is_not_covered_is_refused(sources: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="fewest examples"):
        run(private(sources, noise_multiplier=0.3, unprotected=False), tmp_path / "run")
    with pytest.raises(ValidationError, match=r"hfedmoe with `privacy\.selection`"):
        experiment(sources, privacy={"examples": {"noise_multiplier": 1.0}}, evaluate={"own": "never"})
