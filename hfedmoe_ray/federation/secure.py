"""A round of secure aggregation, as the server runs it: what it asks of clients, and what it makes of their answers.

    agree      tasks "keys", then "shares": who answers both takes part (U2)
    add        the masked counts that "train" tasks end with: who takes part in which expert (U3 of the counts)
    unmask     tasks "unmask": how many take part in each expert; tasks "upload": masked updates of those experts that
               enough do (U3 of the values); tasks "unmask": their sum

Who fails in `agree` is out of the round, with a record of that step. Who does later is a dropout: its vector is in the
sum or is not, and the others make up for its masks.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
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
from hfedmoe_ray.types import Array, ClientTask, ClientUpdate, ExpertKey, ExpertPlan, Role, TaskKind

if TYPE_CHECKING:
    from hfedmoe_ray.federation.collecting import Collector
    from hfedmoe_ray.trust.secure.aggregate import Aggregate
    from hfedmoe_ray.trust.secure.client import Revealed
    from hfedmoe_ray.trust.secure.messages import Request
    from hfedmoe_ray.trust.secure.server import Sum
    from hfedmoe_ray.trust.secure.session import Purpose, Roster

Answer = TypeVar("Answer")
MakeTask = Callable[[TaskKind, int, int, ExpertPlan], ClientTask]
"""(kind, round, client, plan) -> task."""


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

        Raises:
            ConfigError: The package cryptography is missing.
        """
        assert experiment.secure is not None
        if find_spec("cryptography") is None:
            raise ConfigError(
                "secure: needs the package cryptography, which is not installed. Install hfedmoe-ray[privacy], here "
                "and on every node, or leave `secure` out."
            )
        self.options: Secure = experiment.secure
        self._experiment = experiment
        self._strategy = strategy
        self._state = state
        self._collector = collector
        self._router_layers = router_layers
        self._make_task = make_task
        self._notify = notify
        self._round = self._threshold = 0
        self._letters: Mapping[int, Mapping[Purpose, Mapping[int, bytes]]] = {}
        self._training: Request | None = None
        self._counts: Sum | None = None
        self._missing: Mapping[int, ClientRecord] = {}
        self.delivered: frozenset[int] = frozenset()
        """Whose updates are in the last sum."""
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
        from hfedmoe_ray.trust.secure.session import PURPOSES, Session, threshold_of

        self._round = round
        self._up.clear()
        self._down.clear()
        lost: list[ClientRecord] = []
        self._threshold = threshold_of(self.options.threshold, len(plans))
        number, ring = time.time_ns(), self.options.ring
        session = Session(number=number, threshold=self._threshold, ring=ring, purpose="counts")
        first = Request(session=session)
        keys = self._ask("keys", dict.fromkeys(plans, first), lambda _, payload: read_keys(payload), lost)
        rosters: dict[Purpose, Roster] = {of: {client: keys[client][of] for client in keys} for of in PURPOSES}
        second = replace(first, rosters=rosters)
        others = {client: [one for one in keys if one != client] for client in keys}
        self._letters = self._ask(
            "shares", dict.fromkeys(keys, second), lambda c, payload: read_letters(payload, others[c]), lost
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
        self._counts = Sum(session, layout.presence())
        self._down.update(dict.fromkeys(present, self._training.nbytes))
        return taking_part, lost

    def request(self, client: int) -> "Request | None":
        """What a client is told with its training task."""
        del client  # all are told the same
        return self._training

    def add(self, update: ClientUpdate) -> None:
        """Adds a masked vector of who takes part in what, which has been checked, to the first sum."""
        assert self._counts is not None
        self._counts.add(update.client, update.masked)

    def unmask(self) -> "Aggregate":
        """Finds out in which experts enough clients take part, has these uploaded, and takes the masks off their sum.

        Raises:
            TrainingError: Too few delivered or helped, or what they revealed does not fit.
        """
        from hfedmoe_ray.trust.secure.aggregate import read_sums
        from hfedmoe_ray.trust.secure.messages import read_vector
        from hfedmoe_ray.trust.secure.server import Sum

        training, counts = self._training, self._counts
        assert counts is not None and training is not None and training.layout is not None
        (total,), _ = self._open(training, counts)
        enough = {key for key, n in training.layout.counted(total).items() if n >= self.options.min_clients}
        layout = training.layout.only(enough)
        values = replace(
            training,
            session=replace(training.session, purpose="values"),
            layout=layout,
            kept=training.layout,
        )
        blocks = layout.blocks()
        whole = Sum(values.session, blocks)
        self._missing = {}
        lost: list[ClientRecord] = []
        self._ask(
            "upload",
            dict.fromkeys(sorted(counts.arrived), values),
            lambda client, payload: whole.add(client, read_vector(payload, len(blocks))[0]),
            lost,
        )
        self._missing = {record.client: record for record in lost}
        sums, (revealed, silent) = self._open(values, whole)
        self.delivered = frozenset(whole.arrived)
        found = read_sums(layout, sums)
        self._notify(
            "aggregated",
            {
                "round": self._round,
                "threshold": self._threshold,
                "keys": sorted(training.roster),
                "shares": list(training.present),
                "counted": sorted(counts.arrived),
                "delivered": sorted(whole.arrived),
                "unmasked": sorted(revealed),
                "silent": {record.client: record.reason for record in silent},
                "experts": len(enough),
                "withheld": len(self._state.weights.experts) - len(enough),
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

    def _open(
        self, asked: "Request", total: "Sum"
    ) -> tuple[list[Array], tuple[Collection[int], Sequence[ClientRecord]]]:
        """Takes the masks off a sum, with the help of those whose vectors are in it.

        Args:
            asked: What they were told before they sent their vectors.
            total: The masked sum.

        Returns:
            The sum, who helped, and a record of who did not.
        """
        from hfedmoe_ray.trust.secure.messages import Request, read_revealed
        from hfedmoe_ray.trust.secure.session import BelowThreshold

        arrived, purpose = frozenset(total.arrived), asked.session.purpose
        self._enough(arrived, "delivered a masked update")
        requests = {
            client: Request(
                session=asked.session,
                rosters={purpose: asked.roster},
                present=asked.present,
                arrived=arrived,
                letters={
                    sender: self._letters[sender][purpose][client] for sender in asked.present if sender != client
                },
            )
            for client in sorted(arrived)
        }
        silent: list[ClientRecord] = []
        revealed: dict[int, Revealed] = self._ask(
            "unmask", requests, lambda client, payload: read_revealed(payload, requests[client]), silent
        )
        try:
            return total.unmask(asked.roster, asked.present, revealed), (revealed, silent)
        except (BelowThreshold, ValueError) as error:
            raise TrainingError(self._failed(str(error))) from error

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
        """A client's record with the bytes of all steps, and how it ended where it trained but did not upload."""
        if record.kind != "train":
            return record
        if missing := self._missing.get(record.client):
            record = replace(record, status=missing.status, reason=missing.reason)
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
