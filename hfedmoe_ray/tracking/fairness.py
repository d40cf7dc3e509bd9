"""How unequally a model serves the clients, in words."""

from collections.abc import Mapping
from typing import Any

from hfedmoe_ray.tracking.formatting import percent


def fairness(summary: Mapping[str, Any]) -> str:
    """How unequally the model serves the clients, in sentences."""
    told = ""
    for name, when in (("own", "as the run left them"), ("personalised", "after one more local round each")):
        mean_over, worst, spread = (summary.get(f"{name}_{key}") for key in ("accuracy", "worst_tenth", "variance"))
        if mean_over is not None and worst is not None and spread is not None:
            told += (
                f" On their own test data, {when}, clients reach {percent(mean_over)} on average, the worst tenth of "
                f"them {percent(worst)}; the standard deviation over clients is {100 * spread**0.5:.1f} points."
            )
    return told
