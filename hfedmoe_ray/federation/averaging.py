"""How a round's updates become the next weights: folded one at a time, in client order.

In this order: each update is folded into the means, its tensors are let go; the server's optimizer steps; what clients
keep to themselves, their profiles and the strategy's state follow. A mechanism that protects clients from the server,
or the model from clients, comes in at one of these places.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hfedmoe_ray.config.robust import Robust
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.federation import reporting
from hfedmoe_ray.federation.collecting import Collector
from hfedmoe_ray.federation.quorum import below_quorum
from hfedmoe_ray.federation.secure import SecureAggregation
from hfedmoe_ray.federation.state import FederationState
from hfedmoe_ray.records import ClientRecord
from hfedmoe_ray.strategies import AnyStrategy
from hfedmoe_ray.strategies.aggregation import MeanOutputs, Reducer
from hfedmoe_ray.strategies.robust import RobustReducer, mean_outputs
from hfedmoe_ray.strategies.server import ServerOptimizer
from hfedmoe_ray.train.memory import return_freed_memory
from hfedmoe_ray.trust.central import CentralPrivacy
from hfedmoe_ray.types import ClientUpdate, ExpertPlan, PersonalWeights, TaskResult, Weights


@dataclass(frozen=True, kw_only=True)
class Averaged:
    """What became of a round's results."""

    records: list[ClientRecord]
    """One per client."""
    updates: dict[int, ClientUpdate]
    """The accepted updates without their tensors, by client."""
    participation: float | None
    """Mean of |S_c| / |S_global| (eq. 18); None if nothing was averaged."""
    privacy: Mapping[str, float] = field(default_factory=dict)
    """What has been spent so far, where the model is private (`CentralPrivacy.spent`)."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the round's report that the updates do not tell: what only their sum does (`secure`), or what was kept
    from it (`robust`)."""


class Averaging:
    """Makes results the next weights, in place of the state's."""

    def __init__(
        self,
        experiment: Experiment,
        strategy: AnyStrategy,
        state: FederationState,
        *,
        collector: Collector,
        router_layers: Mapping[str, int],
        central: CentralPrivacy | None,
        secure: SecureAggregation | None,
    ) -> None:
        """Takes note of the run.

        Args:
            experiment: The run's server optimizer, robust rules, and how it averages LoRA factors.
            strategy: Its rules of reduction.
            state: What is renewed, in place.
            collector: Validates what came back.
            router_layers: Router parameter name -> its MoE layer.
            central: Where the model is private, what that draws and spends.
            secure: Takes the masks off sums, where updates come masked.
        """
        self._secure = secure
        self._robust = experiment.robust
        self._strategy = strategy
        self._state = state
        self._collector = collector
        self._router_layers = router_layers
        self._central = central
        # Where a client's choice of experts is private, its one answer stands; what others route like is not mixed in.
        self._answered_once = experiment.privacy.selection is not None
        self._lora_average = experiment.model.lora.average if experiment.model.lora else "factors"
        self._optimizer = ServerOptimizer(experiment.server, state.server)

    def reduce(self, results: Sequence[TaskResult], plans: Mapping[int, ExpertPlan]) -> Averaged:
        """Folds a round's updates into the next weights and the clients' profiles.

        Raises:
            TrainingError: Too few of them may be used; the state is as it was, but for what clients keep.
        """
        state = self._state
        records: list[ClientRecord] = []
        accepted = self._collector.accepted(results, plans, records, state)
        if self._central is not None:
            averaged = self._fold_private(self._central, accepted, records)
        elif self._secure is not None:
            averaged = self._fold_masked(self._secure, accepted, records)
        else:
            fold = self._fold_federated if self._strategy.federated else self._fold_apart
            averaged = fold(accepted, plans, records)
        self._follow(averaged.updates, plans)
        return_freed_memory()  # the sums, and the updates that were read by other threads, from heaps of their own
        return averaged

    def _fold_federated(
        self, accepted: Iterable[ClientUpdate], plans: Mapping[int, ExpertPlan], records: list[ClientRecord]
    ) -> Averaged:
        """Averages updates; where routers are private each client keeps its own."""
        old = self._state.weights
        reducer, means = self._reducer(old)
        private = dict(old.personal or {})
        updates: dict[int, ClientUpdate] = {}
        taken: list[int] = []
        for update in accepted:
            taken.append(len(reducer.add(update, plans[update.client])))
            means.add(update)
            if self._strategy.private_router:
                routers = {name: value for name, value in update.shared.items() if name in self._router_layers}
                private[update.client] = PersonalWeights(shared=routers, experts={})
            updates[update.client] = self._let_go(update)
        self._check_quorum(records)
        weights = self._optimizer.step(old, reducer.result(), reducer.rows)
        self._state.weights = replace(weights, means=means.result(weights.means), personal=private or None)
        everyone = len(reducer.participants)
        participation = sum(taken) / (everyone * len(taken)) if everyone else None
        told = {"robust": reducer.told()} if isinstance(reducer, RobustReducer) else {}
        return Averaged(records=records, updates=updates, participation=participation, told=told)

    def _reducer(self, old: Weights) -> tuple[Reducer, MeanOutputs]:
        """What a round's updates and the mean outputs in them are folded by."""
        options, layers, rules = self._robust, self._strategy.shape[0], self._strategy.rules
        if options == Robust():
            plain = Reducer(
                old=old, router_layers=self._router_layers, layers=layers, rules=rules, average=self._lora_average
            )
            return plain, MeanOutputs()
        robust = RobustReducer(
            old=old,
            router_layers=self._router_layers,
            layers=layers,
            rules=rules,
            average=self._lora_average,
            options=options,
        )
        return robust, mean_outputs(options)

    def _fold_private(
        self, central: CentralPrivacy, accepted: Iterable[ClientUpdate], records: list[ClientRecord]
    ) -> Averaged:
        """Averages bounded changes with noise on them; of clients' statistics nothing is published."""
        old = self._state.weights
        mean = central.mean(old)
        updates: dict[int, ClientUpdate] = {}
        for update in accepted:
            mean.add(update)
            updates[update.client] = self._let_go(update)
        self._check_quorum(records)
        self._state.weights = self._optimizer.step(old, central.release(mean, self._state.round + 1), {})
        return Averaged(records=records, updates=updates, participation=None, privacy=central.told(mean))

    def _fold_apart(
        self, accepted: Iterable[ClientUpdate], plans: Mapping[int, ExpertPlan], records: list[ClientRecord]
    ) -> Averaged:
        """Averages nothing: everyone keeps what it has trained."""
        del plans
        old: Weights = self._state.weights
        private = dict(old.personal or {})
        updates: dict[int, ClientUpdate] = {}
        for update in accepted:
            before = private[update.client].experts if update.client in private else {}
            private[update.client] = PersonalWeights(shared=update.shared, experts={**before, **update.experts})
            updates[update.client] = self._let_go(update)
        self._check_quorum(records)
        self._state.weights = replace(old, version=old.version + 1, personal=private or None)
        return Averaged(records=records, updates=updates, participation=None)

    def _fold_masked(
        self, secure: SecureAggregation, accepted: Iterable[ClientUpdate], records: list[ClientRecord]
    ) -> Averaged:
        """Averages from the sum of masked updates, which is all there is to see."""
        old = self._state.weights
        updates: dict[int, ClientUpdate] = {}
        for update in accepted:
            secure.add(update)
            updates[update.client] = self._let_go(update)
        self._check_quorum(records)
        found = secure.unmask()
        records[:] = map(secure.counted, records)
        updates = {client: update for client, update in updates.items() if client in secure.delivered}
        averaged, rows = found.averaged(old, self._strategy.rules, len(updates), secure.options.min_clients)
        weights = self._optimizer.step(old, averaged, rows)
        self._state.weights = replace(weights, means=found.means(weights.means))
        taken = found.counts
        participation = sum(taken.values()) / (len(taken) * len(updates)) if taken else None
        return Averaged(records=records, updates=updates, participation=participation, told=secure.told(found))

    def _let_go(self, update: ClientUpdate) -> ClientUpdate:
        """An update without its tensors, which would make memory grow with the cohort; notes its examples."""
        self._state.samples[update.client] = update.samples
        return replace(update, experts={}, shared={}, means={}, masked=())

    def _check_quorum(self, records: Sequence[ClientRecord]) -> None:
        """Raises TrainingError if too few have delivered; dropping out is the experiment's doing, and no fault."""
        if not self._collector.quorum(record.status == "ok" for record in records if record.status != "dropped"):
            raise TrainingError(below_quorum([(r.client, r.status, r.reason) for r in records]))

    def _follow(self, updates: Mapping[int, ClientUpdate], plans: Mapping[int, ExpertPlan]) -> None:
        """Brings the clients' profiles and the strategy's state up to date."""
        state, strategy = self._state, self._strategy
        if self._central is not None and not self._answered_once:
            # Each client's own, as measured: a plan that followed from others' profiles would carry them on.
            state.profiles |= {client: update.profile for client, update in updates.items() if update.profile}
        if self._central is not None or self._answered_once:
            return
        cohort = reporting.mean_profile([u.profile for u in updates.values() if u.profile is not None])
        for client, update in updates.items():
            if update.profile is not None and cohort is not None:
                state.profiles[client] = strategy.blend(update.profile, plans[client], cohort)
        strategy.observe(state.round + 1, updates, plans)
        state.strategy = strategy.state  # which it may have filled or put another in place of
