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
from hfedmoe_ray.trust.secure.vault import Vault
from hfedmoe_ray.types import ClientMetrics, ClientTask, ClientUpdate, TaskWeights

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
        """Takes a step without training: keys, shares or unmask.

        Raises:
            Refused: What is asked would reveal what the client has to keep.
            ValueError: What it was sent cannot be read.
        """
        request, participant = self._participant(task)
        match task.kind:
            case "keys":
                payload = write_keys(participant.advertise())
            case "shares":
                payload = write_letters(participant.share(request.roster))
            case _:
                revealed = participant.reveal(request.roster, request.present, request.arrived, request.letters)
                payload = write_revealed(revealed)
        metrics = ClientMetrics(client=task.client, round=task.round, kind=task.kind, samples=0, tokens=0, loss=0.0)
        return payload, metrics

    def upload(
        self, task: ClientTask, start: TaskWeights, update: ClientUpdate, metrics: ClientMetrics
    ) -> tuple[bytes, ClientMetrics]:
        """Masks what was trained; returns the payload, and the metrics without what is not the server's to know.

        The proof of what was trained, which the server asks for where updates are in the clear, is checked here.

        Raises:
            NotAsTrained: It was not trained as planned.
            Refused: Another update was masked in this session.
            ValueError: A number is not finite.
        """
        request, participant = self._participant(task)
        assert request.layout is not None
        check_canary(update, metrics, task.plan, start)
        values = request.layout.encode(update, task.plan, start, self._rules, metrics.loss)
        participant.mask(request.roster, request.present, request.layout.blocks(), values)
        profile = update.profile if self._options.profiles == "clear" else None
        return write_vector(values, profile), replace(metrics, **HIDDEN)

    def _participant(self, task: ClientTask) -> tuple[Request, Participant]:
        assert task.secure is not None
        vault = Vault(self.directory, task.client)
        return task.secure, Participant(task.client, vault.root(), task.secure.session, vault.remember)
