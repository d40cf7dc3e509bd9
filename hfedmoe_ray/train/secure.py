"""A client's part in secure aggregation: answers the server's requests from what it keeps on its own node."""

import hashlib
from dataclasses import replace
from math import nan
from typing import Any

from hfedmoe_ray.context import RunContext, cache_dir
from hfedmoe_ray.federation.validation import check_canary
from hfedmoe_ray.strategies import build_strategy
from hfedmoe_ray.trust.secure.client import Participant
from hfedmoe_ray.trust.secure.messages import Request, write_keys, write_letters, write_revealed, write_vector
from hfedmoe_ray.trust.secure.session import Session
from hfedmoe_ray.trust.secure.vault import Vault
from hfedmoe_ray.types import ClientMetrics, ClientTask, ClientUpdate, RoutingProfile, TaskWeights

HIDDEN: dict[str, Any] = {
    "tokens": 0,
    "loss": nan,
    "trained": {},
    "before": {},
    "after": {},
    "rebuilt": {},
    "scale": (),
}
"""What the server is not told of a client that trained. It learns the mean loss, and of each expert how many clients
took part, from the sum."""


class SecureClients:
    """Takes every client's part that this process serves. Keeps nothing itself: each has files of its own."""

    def __init__(self, context: RunContext) -> None:
        """Takes note of the run; its clients' files lie below the cache directory of this node."""
        assert context.experiment.secure is not None
        name = hashlib.sha256(str(context.run_dir).encode()).hexdigest()[:16]
        self.directory = cache_dir() / "secure" / name
        """Where the clients' files are on this node."""
        self._options = context.experiment.secure
        experiment = context.experiment
        self._rules = build_strategy(experiment.strategy, context.model.shape, experiment.seed, experiment.rules).rules

    def answer(self, task: ClientTask) -> tuple[bytes, ClientMetrics]:
        """Takes a step without training: keys, shares, upload or unmask.

        Raises:
            Refused: What is asked would reveal what the client has to keep.
            ValueError: What it was sent cannot be read.
        """
        request = task.secure
        assert request is not None
        match task.kind:
            case "keys":
                keys = {one.purpose: self._participant(task, one).advertise() for one in request.sessions()}
                payload = write_keys(keys)
            case "shares":
                payload = write_letters(
                    {
                        one.purpose: self._participant(task, one).share(request.rosters[one.purpose])
                        for one in request.sessions()
                    }
                )
            case "upload":
                payload = self._upload(task, request)
            case _:
                participant = self._participant(task, request.session)
                revealed = participant.reveal(request.roster, request.present, request.arrived, request.letters)
                payload = write_revealed(revealed)
        metrics = ClientMetrics(client=task.client, round=task.round, kind=task.kind, samples=0, tokens=0, loss=0.0)
        return payload, metrics

    def take_part(
        self,
        task: ClientTask,
        start: TaskWeights,
        update: ClientUpdate,
        told: RoutingProfile,
        metrics: ClientMetrics,
    ) -> tuple[bytes, ClientMetrics]:
        """Keeps what was trained on this node, and masks which experts that is.

        The proof of what was trained, which the server asks for where updates are in the clear, is checked here.

        Args:
            task: The client's.
            start: The published weights it started from.
            update: What it has trained and measured.
            told: The routing profile that is sent where profiles are in the clear.
            metrics: What it would tell of itself.

        Returns:
            The payload, and the metrics without what is not the server's to know.

        Raises:
            NotAsTrained: It was not trained as planned.
            Refused: Another update was masked in this session.
            ValueError: A number is not finite.
        """
        request = task.secure
        assert request is not None and request.layout is not None
        check_canary(update, metrics, task.plan, start)
        values = request.layout.encode(update, task.plan, start, self._rules, metrics.loss)
        Vault(self.directory, task.client).keep(request.session, values)
        presence = [request.layout.takes_part(values)]
        participant = self._participant(task, request.session)
        participant.mask(request.roster, request.present, request.layout.presence(), presence)
        profile = told if self._options.profiles == "clear" else None
        return write_vector(presence, profile), replace(metrics, **HIDDEN)

    def _upload(self, task: ClientTask, request: Request) -> bytes:
        """Masks what was kept, of the experts that enough clients take part in."""
        assert request.layout is not None and request.kept is not None
        kept = Vault(self.directory, task.client).kept(request.session)
        values = [block.copy() for block in request.layout.chosen(kept, request.kept)]
        participant = self._participant(task, request.session)
        participant.mask(request.roster, request.present, request.layout.blocks(), values)
        return write_vector(values, None)

    def _participant(self, task: ClientTask, session: Session) -> Participant:
        vault = Vault(self.directory, task.client)
        return Participant(task.client, vault.root(), session, vault.remember)
