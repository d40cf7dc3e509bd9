"""Registered clients that a round does not ask cost it nothing: a run may have ten thousand of them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_federation import Recorder, experiment

from hfedmoe_ray.federation.rounds import Federation
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.runtime.local import LocalExecutor

TIERS = [
    {"name": "phone", "share": 0.5, "experts": 0.25, "device": 0.1},
    {"name": "server", "share": 0.5, "experts": 0.5, "device": 0.1},
]


class Touched(tuple):
    """Counts how many of its entries were read."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        for value in super().__iter__():
            self.reads += 1
            yield value


@pytest.mark.parametrize("strategy", ["hfedmoe", "flex_moe", "fedavg"])
def test_a_round_reads_nothing_of_the_clients_it_does_not_ask(sources: Path, tmp_path: Path, strategy: str):
    made = experiment(
        sources,
        strategy={"name": strategy},
        clients={"count": 48, "per_round": 2, "tiers": TIERS},
        data=experiment(sources).data.model_dump() | {"partition": {"how": "iid", "min_examples": 2}},
        evaluate={"own": "never"},
        rounds=3,
    )
    context = prepare_run(made, tmp_path)
    counts = Touched(context.data.counts)
    executor = LocalExecutor(context)
    context = replace(context, data=replace(context.data, counts=counts))
    federation = Federation(context, executor, Recorder(), resume=False)
    tiers = federation.tiers = federation.collector._tiers = Touched(federation.tiers)
    examples = federation.examples = Touched(federation.examples)
    counts.reads = 0
    assert federation.run(lambda: False)
    asked = 4 * 2  # who is asked in round 0 and three rounds of two clients
    assert 0 < tiers.reads <= 8 * asked
    assert examples.reads <= 2 * asked
    assert counts.reads == 0
