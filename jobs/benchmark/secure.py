"""What secure aggregation costs: bytes and seconds of a client and of the server, for 10, 50 and 100 clients.

hfedmoe bench secure [--json FILE] [--clients 10,50,100] [--ring 32]

The quickstart's model and tiers, with made-up updates: nothing is trained, everything else is the real thing, each
client's part one after the other in this process. In the second case of each row 30 % of the clients vanish after they
have shared their secrets, the costliest moment for the server. Every sum is compared with the plain one, number by
number. Of the sum of counts that comes before only bytes are counted: it has one number for each expert. Seconds are
those of one core.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from output import Row, json_option, publish

from hfedmoe_ray.budget import expert_counts, tier_of
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.config.secure import Secure
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.moe.prepare import initial_weights, router_layers
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.strategies.rules import RuleSet
from hfedmoe_ray.strategies.scores import resident_plan, top_experts
from hfedmoe_ray.trust.secure.client import Participant
from hfedmoe_ray.trust.secure.keys import digest
from hfedmoe_ray.trust.secure.layout import Layout, make_layout
from hfedmoe_ray.trust.secure.masks import ring_dtype
from hfedmoe_ray.trust.secure.messages import Request, write_keys, write_letters, write_revealed, write_vector
from hfedmoe_ray.trust.secure.server import Sum
from hfedmoe_ray.trust.secure.session import PURPOSES, Session, threshold_of
from hfedmoe_ray.types import Array, ClientUpdate, ExpertPlan, RoutingProfile, TaskWeights, Weights
from hfedmoe_ray.wire import pack_update

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
GONE = 0.3
TOKENS = 8 * 16 * 64
"""Of a client in a round: steps, batch, length."""


@dataclass
class Cost:
    """What one case was measured to take."""

    client_s: dict[str, list[float]] = field(default_factory=dict)
    """By step, of each client."""
    server_s: dict[str, float] = field(default_factory=dict)
    up: dict[int, int] = field(default_factory=dict)
    """Bytes sent by each client, all steps."""
    down: dict[int, int] = field(default_factory=dict)
    """Keys, letters and lists that each client is sent."""
    plain: dict[int, int] = field(default_factory=dict)
    """Bytes of its update in the clear."""
    exact: bool = True

    @contextmanager
    def client(self, step: str) -> Iterator[None]:
        """Times a step of a client."""
        began = time.process_time()
        yield
        self.client_s.setdefault(step, []).append(time.process_time() - began)

    @contextmanager
    def server(self, step: str) -> Iterator[None]:
        """Times a step of the server; of many calls, all together."""
        began = time.process_time()
        yield
        self.server_s[step] = self.server_s.get(step, 0.0) + time.process_time() - began

    @property
    def figures(self) -> dict[str, Any]:
        """As JSON."""
        steps = {f"client_{step}_s": median(seconds) for step, seconds in self.client_s.items()}
        return {
            **steps,
            "client_s": sum(steps.values()),
            **{f"server_{step}_s": seconds for step, seconds in self.server_s.items()},
            "up_bytes_mean": sum(self.up.values()) / len(self.up),
            "down_bytes_mean": sum(self.down.values()) / len(self.down),
            "plain_bytes_mean": sum(self.plain.values()) / len(self.plain),
            "up_over_plain": sum(self.up.values()) / sum(self.plain.values()),
            "exact": self.exact,
        }


def plans(experiment: Experiment, context: RunContext) -> dict[int, ExpertPlan]:
    """As many experts as each client's tier holds, drawn at random."""
    shape = (context.model.shape.layers, context.model.shape.experts)
    drawn = {}
    for client, tier in enumerate(tier_of(experiment.clients)):
        resident, _ = expert_counts(tier, context.model.shape)
        score = generator(0, "bench", client).random(shape)
        chosen = top_experts(score, np.ones(shape, dtype=bool), resident, "global")
        drawn[client] = resident_plan(shape, chosen, "mean", None)
    return drawn


def update(client: int, plan: ExpertPlan, weights: Weights) -> ClientUpdate:
    """What a client might have trained: every expert of its plan, by changes of about a thousandth."""
    rng = generator(1, "bench", client)

    def changed(value: Array) -> Array:
        return np.asarray(value + rng.standard_normal(value.shape, dtype=np.float32) * np.float32(1e-3))

    shape = np.shape(plan.roles)
    means = {} if weights.means is None else {key: (weights.means[key], 100) for key in plan.present}
    uniform = np.full(shape, 1 / shape[1])
    return ClientUpdate(
        client=client,
        samples=int(rng.integers(50, 500)),
        experts={key: {name: changed(value) for name, value in weights.experts[key].items()} for key in plan.trainable},
        shared={name: changed(value) for name, value in weights.shared.items()},
        trained=dict.fromkeys(plan.trainable, 8),
        profile=RoutingProfile(usage=uniform, specific=uniform, kl=uniform * 0, routed=uniform * TOKENS, tokens=TOKENS),
        means=means,
    )


def prepared(count: int, secure: Secure) -> tuple[Layout, dict[int, ExpertPlan], Weights]:
    """The quickstart's model and tiers for so many clients, and where everything is in their vectors."""
    experiment = load_experiment(CONFIG, ["tracking.wandb.mode=disabled"])
    context = prepare_run(experiment, Path("unused"))
    model = experiment.model
    weights = initial_weights(context.model, model.trainable, model.lora, 0)
    many = experiment.clients.model_copy(update={"count": count})
    plan_of = plans(experiment.model_copy(update={"clients": many}), context)
    layout = make_layout(
        secure,
        RuleSet(),
        weights,
        plan_of,
        routers=router_layers(context.model),
        shape=(context.model.shape.layers, context.model.shape.experts),
        max_tokens=TOKENS,
    )
    return layout.among(tuple(plan_of), secure.min_clients), plan_of, weights


def measure(count: int, secure: Secure) -> dict[str, Cost]:
    """Aggregates once with everybody there to the end, and once with 30 % gone."""
    layout, plan_of, weights = prepared(count, secure)
    session = Session(number=1, threshold=threshold_of(secure.threshold, count), ring=secure.ring)
    # A client refuses to reveal twice in a session, as is done here: so it must not remember.
    clients = {client: Participant(client, digest(b"%d" % client), session, lambda *_: None) for client in plan_of}
    cost, roster, letters = Cost(), {}, {}
    for client, one in clients.items():
        with cost.client("keys"):
            roster[client] = one.advertise()
        cost.up[client] = len(write_keys(dict.fromkeys(PURPOSES, roster[client])))
    for client, one in clients.items():
        with cost.client("shares"):
            letters[client] = one.share(roster)
        cost.up[client] += len(write_letters(dict.fromkeys(PURPOSES, letters[client])))
        told = Request(session=session, rosters=dict.fromkeys(PURPOSES, roster), present=tuple(plan_of))
        cost.down[client] = 3 * told.nbytes  # with the tasks shares, train and upload
    stay = sorted(generator(0, "bench", count).permutation(count)[: count - round(GONE * count)].tolist())
    whole, part, blocks = _Both(layout, session, plan_of), _Both(layout, session, stay), layout.blocks()
    start = TaskWeights(shared=weights.shared, experts=weights.experts)
    for client, one in clients.items():
        sent = update(client, plan_of[client], weights)
        means = {key: mean for key, (mean, _) in sent.means.items()}
        cost.plain[client] = len(pack_update(sent.experts, sent.shared, sent.profile, means))
        with cost.client("encode"):
            values = layout.encode(sent, plan_of[client], start, RuleSet(), 1.0)
        whole.plain(client, values)
        part.plain(client, values)
        with cost.client("mask"):
            one.mask(roster, tuple(plan_of), blocks, values)
        cost.up[client] += len(write_vector(values, None)) + len(write_vector([layout.takes_part(values)], None))
        with cost.server("add"):
            whole.masked(client, values)
        part.masked(client, values)
    gone = replace(cost, client_s=dict(cost.client_s), server_s=dict(cost.server_s))
    for both, into in ((whole, cost), (part, gone)):
        into.client_s["reveal"] = []
        revealed = {}
        for client in both.clients:
            inbox = {sender: letters[sender][client] for sender in plan_of if sender != client}
            request = Request(
                session=session,
                rosters={"values": roster},
                present=tuple(plan_of),
                arrived=frozenset(both.clients),
                letters=inbox,
            )
            with into.client("reveal"):
                revealed[client] = clients[client].reveal(roster, request.present, request.arrived, inbox)
            if both is whole:
                cost.up[client] += 2 * len(write_revealed(revealed[client]))
                cost.down[client] += 2 * request.nbytes
        with into.server("unmask"):
            found = both.sum.unmask(roster, tuple(plan_of), revealed)
        into.exact = all((one == other).all() for one, other in zip(found, both.expected, strict=True))
    return {"all": cost, "some": gone}


class _Both:
    """The sum of some clients' masked vectors, and of the plain ones."""

    def __init__(self, layout: Layout, session: Session, clients: Collection[int]) -> None:
        self.clients = sorted(clients)
        self.sum = Sum(session, layout.blocks())
        self.expected = [np.zeros(block.size, ring_dtype(session.ring)) for block in layout.blocks()]

    def plain(self, client: int, values: Sequence[Array]) -> None:
        for total, one in zip(self.expected, values, strict=True):
            if client in self.clients and len(one):
                np.add(total, one, out=total)

    def masked(self, client: int, values: Sequence[Array]) -> None:
        if client in self.clients:
            self.sum.add(client, values)


@click.command()
@json_option
@click.option("--clients", default="10,50,100", show_default=True, help="How many, each a case of its own.")
@click.option("--ring", default=32, show_default=True, help="Bits of a number: 32 or 64.")
def main(json_file: Path | None, clients: str, ring: int) -> None:
    """Bytes and seconds of secure aggregation, of a client and of the server."""
    figures: dict[str, Any] = {"ring": ring, "gone": GONE}
    rows = []
    for count in map(int, clients.split(",")):
        for variant in ("padded", "grouped"):
            costs = measure(count, Secure.model_validate({"variant": variant, "ring": ring}))
            for case, cost in costs.items():
                found = cost.figures
                figures[f"{count}_{variant}_{case}"] = found
                rows.append(_row(f"{count} clients, {variant}{'' if case == 'all' else ', 30 % gone'}", found))
    publish("Secure aggregation with the quickstart's model", figures, rows, json_file)


def _row(what: str, found: dict[str, Any]) -> Row:
    server = found["server_add_s"] + found["server_unmask_s"]
    measured = (
        f"{found['up_bytes_mean'] / 2**20:.2f} MiB up, {found['up_over_plain']:.2f} of plain; client "
        f"{found['client_s']:.2f} s, server {server:.2f} s"
    )
    return Row(what=what, measured=measured, bar="exact", ok=found["exact"])


if __name__ == "__main__":
    main()
