"""Updates that are averaged as they come, instead of round by round. Torch-free."""

from typing import Annotated

from pydantic import Field, PositiveInt

from hfedmoe_ray.config.section import NonNegativeFloat, Section


class Asynchronous(Section):
    """FedBuff (Nguyen et al., arXiv 2106.06639): no client waits for another; a round is one averaging of a buffer.

    Who is done when is decided by the simulated clock, so every tier needs `simulated`, and results depend on no
    machine. Everybody is profiled in round 0.
    """

    in_flight: PositiveInt
    """M: clients at work at any simulated time. Who is done makes room for another that was not done in this round."""
    buffer: PositiveInt
    """K: updates that are averaged at once."""
    staleness: NonNegativeFloat = 0.5
    """a: what a client changed counts (1 + tau)^-a, where tau averages have been taken since it started."""
    max_staleness: Annotated[int, Field(ge=0)] = 10
    """An update of a larger tau is dropped."""
