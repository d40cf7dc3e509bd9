"""A round of secure aggregation, as the server runs it: what it asks of clients, and what it makes of their answers.

    agree      tasks "keys", then "shares": who answers both takes part (U2)
    add        the masked vectors that "train" tasks end with (U3)
    unmask     tasks "unmask" of those who delivered; with enough answers the masks of the sum are taken off

Who fails in `agree` is out of the round, with a record of that step. Who does later is a dropout: its vector is in the
sum or is not, and the others make up for its masks.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.config.secure import Secure
from hfedmoe_ray.errors import ConfigError, TrainingError
from hfedmoe_ray.federation import reporting
from hfedmoe_ray.federation.executor import Notify
from hfedmoe_ray.federation.state import FederationState
from hfedmoe_ray.records import ClientRecord
from hfedmoe_ray.strategies import AnyStrategy
from hfedmoe_ray.strategies.scores import uniform_plan
from hfedmoe_ray.types import ClientTask, ClientUpdate, ExpertKey, ExpertPlan, Role, TaskKind

if TYPE_CHECKING:
    from hfedmoe_ray.federation.collecting import Collector
    from hfedmoe_ray.trust.secure.client import Revealed
    from hfedmoe_ray.trust.secure.keys import PublicKeys
    from hfedmoe_ray.trust.secure.layout import Aggregate
    from hfedmoe_ray.trust.secure.messages import Request
    from hfedmoe_ray.trust.secure.server import Sum

Answer = TypeVar("Answer")
MakeTask = Callable[[TaskKind, int, int, ExpertPlan], ClientTask]
"""(kind, round, client, plan) -> task."""


def secure_aggregation(
    experiment: Experiment,
    strategy: AnyStrategy,
    state: FederationState,
    *,
    collector: "Collector",
    router_layers: Mapping[str, int],
    make_task: MakeTask,
    notify: Notify,
) -> "SecureAggregation | None":
    """Returns the server's side of secure aggregation; None where the configuration asks for none.

    Raises:
        ConfigError: The package cryptography is missing.
    """
    if experiment.secure is None:
        return None
    try:
        import cryptography
    except ModuleNotFoundError as error:
        raise ConfigError(
            "secure: needs the package cryptography, which is not installed. Install hfedmoe-ray[privacy], here and on "
            "every node, or leave `secure` out."
        ) from error
    del cryptography
    return SecureAggregation(
        experiment,
        strategy,
        state,
        collector=collector,
        router_layers=router_layers,
        make_task=make_task,
        notify=notify,
    )


class SecureAggregation:
    """Knows one round at a time. Nothing of it is part of a checkpoint: a round repeated is another session."""

    def __init__(
        self,
        experiment: Experiment,
        strategy: AnyStrategy,
        state: FederationState,
        *,
        collector: "Collector",
        router_layers: Mapping[str, int],
        make_task: MakeTask,
        notify: Notify,
    ) -> None:
        """Takes note of the run.

        Args:
            experiment: The run, with a section `secure`.
            strategy: Its rules weigh updates, on the clients.
            state: Has the published weights.
            collector: Runs tasks to a quorum.
            router_layers: Router parameter name -> its MoE layer.
            make_task: Makes the tasks.
            notify: Is told what happens.
        """
        assert experiment.secure is not None
        self.options: Secure = experiment.secure
        self._experiment = experiment
        self._strategy = strategy
        self._state = state
        self._collector = collector
        self._router_layers = router_layers
        self._make_task = make_task
        self._notify = notify
        self._round = self._threshold = 0
        self._roster: Mapping[int, PublicKeys] = {}
        self._letters: Mapping[int, Mapping[int, bytes]] = {}
        self._training: Request | None = None
        self._sum: Sum | None = None
        self._up: Counter[int] = Counter()
        self._down: Counter[int] = Counter()

    def agree(self, round: int, plans: Mapping[int, ExpertPlan]) -> tuple[dict[int, ExpertPlan], list[ClientRecord]]:
        """Has clients send keys and share their secrets.

        Returns:
            The plans of those who take part, and a record of each other one.

        Raises:
            TrainingError: Fewer than the threshold take part.
        """
        from hfedmoe_ray.trust.secure.layout import make_layout
        from hfedmoe_ray.trust.secure.messages import Request, read_keys, read_letters
        from hfedmoe_ray.trust.secure.server import Sum
        from hfedmoe_ray.trust.secure.session import Session, threshold_of

        self._round = round
        self._up.clear()
        self._down.clear()
        lost: list[ClientRecord] = []
        self._threshold = threshold_of(self.options.threshold, len(plans))
        session = Session(number=time.time_ns(), threshold=self._threshold, ring=self.options.ring)
        first = Request(session=session)
        self._roster = self._ask("keys", dict.fromkeys(plans, first), lambda _, payload: read_keys(payload), lost)
        second = replace(first, roster=self._roster)
        others = {client: [one for one in self._roster if one != client] for client in self._roster}
        self._letters = self._ask(
            "shares", dict.fromkeys(self._roster, second), lambda c, payload: read_letters(payload, others[c]), lost
        )
        present = tuple(sorted(self._letters))
        self._enough(present, "sent keys and shared their secrets")
        taking_part = {client: plans[client] for client in present}
        local, data = self._experiment.local, self._experiment.data
        layout = make_layout(
            self.options,
            self._strategy.rules,
            self._state.weights,
            taking_part,
            routers=self._router_layers,
            shape=self._strategy.shape,
            max_tokens=2 * local.steps * local.batch_size * data.max_length,  # a prompt and what is to be written
        ).among(present, self.options.min_clients)
        self._training = replace(second, present=present, layout=layout)
        self._sum = Sum(session, layout.blocks())
        self._down.update(dict.fromkeys(present, self._training.nbytes))
        return taking_part, lost

    def request(self, client: int) -> "Request | None":
        """What a client is told with its training task."""
        del client  # all are told the same
        return self._training

    def add(self, update: ClientUpdate) -> None:
        """Adds a masked vector, which has been checked, to the sum."""
        assert self._sum is not None
        self._sum.add(update.client, update.masked)

    def unmask(self) -> "Aggregate":
        """Takes the masks off the sum, with the help of those whose vectors are in it.

        Raises:
            TrainingError: Too few delivered or helped, or what they revealed does not fit.
        """
        from hfedmoe_ray.trust.secure.messages import Request, read_revealed
        from hfedmoe_ray.trust.secure.session import BelowThreshold

        assert self._sum is not None and self._training is not None and self._training.layout is not None
        arrived, present = frozenset(self._sum.arrived), self._training.present
        self._enough(arrived, "delivered a masked update")
        requests = {
            client: Request(
                session=self._training.session,
                roster=self._roster,
                present=present,
                arrived=arrived,
                letters={sender: self._letters[sender][client] for sender in present if sender != client},
            )
            for client in sorted(arrived)
        }
        silent: list[ClientRecord] = []
        revealed: dict[int, Revealed] = self._ask(
            "unmask", requests, lambda client, payload: read_revealed(payload, requests[client]), silent
        )
        try:
            sums = self._sum.unmask(self._roster, present, revealed)
        except (BelowThreshold, ValueError) as error:
            raise TrainingError(self._failed(str(error))) from error
        found = self._training.layout.decode(sums)
        held = len(found.experts)
        self._notify(
            "aggregated",
            {
                "round": self._round,
                "threshold": self._training.session.threshold,
                "keys": sorted(self._roster),
                "shares": list(present),
                "delivered": sorted(arrived),
                "unmasked": sorted(revealed),
                "silent": {record.client: record.reason for record in silent},
                "experts": held,
                "withheld": len(self._state.weights.experts) - held,
                "clipped": found.clipped,
            },
        )
        if found.clipped:
            self._notify(
                "warning",
                {
                    "message": f"round {self._round}: {found.clipped} numbers of the clients' updates were larger than "
                    f"secure.clip ({self.options.clip:g}) allows and were clipped"
                },
            )
        return found

    def told(self, found: "Aggregate") -> dict[str, Any]:
        """What the report of a round says of the clients together."""
        layers, experts = self._strategy.shape
        counts = found.counts
        told: dict[str, Any] = {
            "loss": found.loss,
            "selected": tuple(
                tuple(counts.get(ExpertKey(layer, expert), 0) for expert in range(experts)) for layer in range(layers)
            ),
        }
        if found.usage is not None:
            told["usage"] = tuple(tuple(map(float, row)) for row in found.usage)
        return told

    def counted(self, record: ClientRecord) -> ClientRecord:
        """A client's record with the bytes of keys, letters and shares."""
        if record.kind != "train":
            return record
        up, down = self._up[record.client], self._down[record.client]
        return replace(record, bytes_up=record.bytes_up + up, bytes_down=record.bytes_down + down)

    # --------------------------------------------------------------------------------------------------- details

    def _ask(
        self,
        kind: TaskKind,
        requests: Mapping[int, "Request"],
        read: Callable[[int, bytes], Answer],
        lost: list[ClientRecord],
    ) -> dict[int, Answer]:
        """Runs one step of clients; returns their answers in client order, and adds a record of each that gave none."""
        nothing = replace(uniform_plan(self._strategy.shape, Role.ABSENT), absent="drop")
        tasks = [
            replace(self._make_task(kind, self._round, client, nothing), secure=request)
            for client, request in requests.items()
        ]
        answers: dict[int, Answer] = {}
        for delivered in self._collector.collect(tasks):
            client, result = delivered.task.client, delivered
            size = 0
            if result.status == "ok" and result.payload is not None:
                payload = result.payload()
                size = len(payload)
                try:
                    answers[client] = read(client, payload)
                except ValueError as error:
                    result = replace(result, status="rejected", reason=f"{kind}: {error}")
            self._up[client] += size
            self._down[client] += requests[client].nbytes
            if client not in answers:
                record = reporting.client_record(result, self._collector.tier(client), None, self._state.weights)
                lost.append(replace(record, resident=0, bytes_up=self._up[client], bytes_down=self._down[client]))
        return answers

    def _enough(self, there: Sequence[int] | frozenset[int], did: str) -> None:
        """Raises TrainingError below the threshold."""
        if len(there) < self._threshold:
            raise TrainingError(self._failed(f"only {len(there)} clients {did}, and {self._threshold} must"))

    def _failed(self, reason: str) -> str:
        return (
            f"round {self._round}: the updates cannot be added up: {reason} (`secure.threshold: "
            f"{self.options.threshold:g}`). Nothing was learned of any of them. The last checkpoint is complete: mend "
            "the cause and `hfedmoe resume`, or ask more clients."
        )
