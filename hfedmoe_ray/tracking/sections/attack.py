"""That a run was attacked on purpose, and how far a backdoor came."""

from hfedmoe_ray.tracking import charts
from hfedmoe_ray.tracking.attacked import attacked
from hfedmoe_ray.tracking.charts import Series
from hfedmoe_ray.tracking.formatting import percent
from hfedmoe_ray.tracking.markup import figure, section
from hfedmoe_ray.tracking.record import RunRecord


def attack(run: RunRecord) -> str:
    """What the hostile clients did; empty where there are none."""
    options = run.config.get("attack")
    if not options:
        return ""
    intro = (
        f"This run was attacked on purpose: {attacked(options, run.hostile)}. The server was not told who is "
        "hostile. Its model is for study."
    )
    points = [(float(r.round), r.backdoor_success) for r in run.rounds if r.backdoor_success is not None]
    if not points:
        return section("Simulated attack", intro)
    image = charts.line_chart(
        [Series(name="backdoor", points=points)],
        label="Backdoor success over rounds",
        write=lambda share: f"{100 * share:.3g} %",
        over="round",
    )
    note = (
        f"With the trigger, {percent(points[-1][1])} of the test texts of other labels get the target from the global "
        f"model; in round {points[0][0]:g} it was {percent(points[0][1])}. Some of that is no backdoor: texts that get "
        "this label without a trigger count too."
    )
    return section("Simulated attack", intro, figure("Backdoor success", image, note=note))
