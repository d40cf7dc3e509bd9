"""What the server is told of how a client's tokens use the experts."""

from collections.abc import Sequence

from hfedmoe_ray.budget import expert_counts
from hfedmoe_ray.config.schema import Experiment, Tier
from hfedmoe_ray.config.strategies import HFedMoE as Options
from hfedmoe_ray.strategies import AnyStrategy
from hfedmoe_ray.strategies.hfedmoe import HFedMoE
from hfedmoe_ray.trust import selection
from hfedmoe_ray.types import Array, ClientTask, ExpertKey, ModelShape, RoutingProfile


class Telling:
    """All of it, or where that is private (`privacy`) nothing but one answer."""

    def __init__(self, experiment: Experiment, strategy: AnyStrategy, tiers: Sequence[Tier], shape: ModelShape) -> None:
        """Takes note of the run, its strategy, the tier of every client and the model's shape."""
        self._options, self._privacy = experiment.strategy, experiment.privacy
        self._strategy = strategy
        self._tiers = tiers
        self._shape = shape

    def told(
        self, task: ClientTask, measured: RoutingProfile, means: dict[ExpertKey, Array]
    ) -> tuple[RoutingProfile, dict[ExpertKey, Array]]:
        """Returns the routing profile and the mean outputs that are sent of those that were measured."""
        options = self._privacy.selection
        if options is None and self._privacy.examples is None:
            return measured, means
        if task.kind != "profile" or options is None:
            return selection.nothing(self._strategy.shape), {}
        assert isinstance(self._options, Options)
        assert isinstance(self._strategy, HFedMoE)
        residents, _ = expert_counts(self._tiers[task.client], self._shape)
        score = self._strategy.score(measured)
        return selection.answer(options, measured, score, residents, self._options.scope, client=task.client), {}
