"""A task under way in an asynchronous run, as a value that a checkpoint can hold."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hfedmoe_ray.types import ExpertPlan, LoadBalance, MergedExpert, Role


@dataclass(frozen=True, kw_only=True)
class Flight:
    """What one client was given to do, and when, on the simulated clock, it will be done with it."""

    client: int
    round: int
    """In which it was started."""
    version: int
    """Of the weights it started from."""
    plan: ExpertPlan
    started: float
    """Simulated seconds since the run began."""
    seconds: float
    """It takes, simulated."""

    @property
    def ends(self) -> float:
        """When its update arrives, in simulated seconds since the run began."""
        return self.started + self.seconds


def flight_fields(flight: Flight) -> dict[str, Any]:
    """Returns a flight as JSON can hold it, exactly."""
    return asdict(flight)


def read_flight(fields: Mapping[str, Any]) -> Flight:
    """Returns the flight that `flight_fields` was given."""
    plan = fields["plan"]
    balance = plan["balance"]
    merged = (
        MergedExpert(layer=one["layer"], members=tuple(one["members"]), shares=tuple(one["shares"]))
        for one in plan["merged"]
    )
    return Flight(
        **{
            **fields,
            "plan": ExpertPlan(
                **{
                    **plan,
                    "roles": tuple(tuple(map(Role, row)) for row in plan["roles"]),
                    "merged": tuple(merged),
                    "scale": None if plan["scale"] is None else tuple(plan["scale"]),
                    "balance": None
                    if balance is None
                    else LoadBalance(**{**balance, "load": tuple(map(tuple, balance["load"]))}),
                }
            ),
        }
    )
