"""Simulated time to accuracy: what the runs' work would take on real devices, by a roofline (`devices`; ours).

Accuracy by round is that of real runs. The work of a client's round is measured where it can be: FLOPs are counted
while the real sub-model of its plan takes one step, bytes are those its updates had. Seconds are then arithmetic. A
round waits for nothing but its slowest client; evaluation takes no time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from hfedmoe_ray.studies.continued import continued
from hfedmoe_ray.studies.devices import DEVICES, EFFICIENCY, Device, Work, bound, seconds
from hfedmoe_ray.studies.outcomes import common_target, mean_accuracies
from hfedmoe_ray.studies.plots import Curve, curves, grouped_bars
from hfedmoe_ray.studies.runs import make_runs
from hfedmoe_ray.studies.study import Figure, Findings, Setting, Study, Table
from hfedmoe_ray.tracking.charts import legend
from hfedmoe_ray.tracking.formatting import MISSING, duration, percent
from hfedmoe_ray.tracking.record import RunRecord
from hfedmoe_ray.tracking.tiers import mean

STRATEGIES: dict[str, tuple[str, ...]] = {
    "hfedmoe": ("strategy=hfedmoe",),
    "hfedmoe, all experts held": ("strategy=hfedmoe", "strategy.resident=all"),
    "random": ("strategy=random",),
    "fedavg": ("strategy=fedavg",),
}
DEADLINE = 0.75
"""With a deadline, a round ends when this share of its clients is in."""

Works = Mapping[tuple[int, int], Work]
"""By (round, client)."""


def measure(setting: Setting) -> Findings:
    """Time to an accuracy that every strategy reaches, for a mixed fleet and for each device."""
    runs = make_runs(setting, STRATEGIES)
    works: dict[str, list[Works]] = {}
    for name, some in runs.items():
        for run in some:
            setting.tell(f"work of {name}, seed {run.config['seed']}")
            works.setdefault(name, []).append(work_of(run))
    accuracy = {name: mean_accuracies(some) for name, some in runs.items()}
    target = common_target(accuracy.values(), 1.0)
    waiting = {name: _mean_times(some, None) for name, some in works.items()}
    hasty = {name: _mean_times(some, DEADLINE) for name, some in works.items()}
    rounds = {name: [r.round for r in runs[name][0].rounds if r.accuracy is not None] for name in runs}
    reached = {
        name: next((at for at, value in zip(rounds[name], accuracy[name], strict=True) if value >= target), None)
        for name in runs
    }
    until = {name: None if at is None else sum(waiting[name][:at]) for name, at in reached.items()}
    each = {
        device.name: {
            name: mean([seconds(device, one) for run in some for one in run.values()]) for name, some in works.items()
        }
        for device in DEVICES
    }
    typical = {name: _typical(some) for name, some in works.items()}
    limits = {device.name: {name: bound(device, one) for name, one in typical.items()} for device in DEVICES}
    ranked = sorted((time, name) for name, time in until.items() if time is not None)
    first = next(iter(runs))
    slow_device = max(DEVICES, key=lambda device: each[device.name][first]).name
    return Findings(
        numbers={
            "simulated": True,
            "efficiency": EFFICIENCY,
            "devices": DEVICES,
            "target": target,
            "rounds_to_target": reached,
            "seconds_to_target": until,
            "seconds_by_round": waiting,
            "seconds_by_round_with_deadline": hasty,
            "client_seconds_by_device": each,
            "bound_by": limits,
            "accuracy_by_round": accuracy,
            "work_of_a_client": {name: asdict(one) for name, one in typical.items()},
        },
        headline=_headline(ranked, target),
        paragraph=(
            "These seconds are not measured. A roofline turns work into seconds on devices as their data sheets "
            f"describe them, at {percent(EFFICIENCY, 0)} of their peaks (ours). The work is that of real runs: FLOPs "
            "counted while each client's sub-model took a step, and the bytes that were sent. The fleet is mixed: "
            f"clients have the {len(DEVICES)} devices in turn. A round lasts as long as its slowest client; with a "
            f"deadline, until {percent(DEADLINE, 0)} of the clients are in, at the price of the others' updates, which "
            "the accuracies here do not pay (the study failures says what that costs). The target is the highest "
            "accuracy that every strategy's mean reaches, and at least a point above the start. The slowest device is "
            f"the {slow_device}, limited by {limits[slow_device][first]} under {first}."
        ),
        figures=[
            Figure(
                caption="Accuracy by simulated time, mixed fleet",
                html=legend(list(runs), lines=True)
                + curves(
                    [
                        Curve(
                            name=name,
                            points=[
                                (float(sum(waiting[name][:at])), value)
                                for at, value in zip(rounds[name], accuracy[name], strict=True)
                            ],
                        )
                        for name in runs
                    ],
                    label="Accuracy by simulated seconds",
                    across="simulated seconds",
                    write=lambda share: f"{100 * share:.1f} %",
                    write_x=lambda time: f"{time:g}",
                ),
            ),
            Figure(
                caption="A client's round, simulated",
                html=legend(list(runs))
                + grouped_bars(
                    each,
                    label="Simulated seconds of a client's round by device and strategy",
                    write=lambda time: f"{time:.2f} s",
                ),
            ),
        ],
        tables=[
            Table(
                title="Time to accuracy, simulated",
                headings=["Strategy", "*A round", "*With deadline", "*Rounds to target", "*Time to target", "*Best"],
                rows=[
                    [
                        name,
                        duration(mean(waiting[name])),
                        duration(mean(hasty[name])),
                        MISSING if reached[name] is None else str(reached[name]),
                        MISSING if until[name] is None else duration(until[name] or 0.0),
                        percent(max(accuracy[name])),
                    ]
                    for name in runs
                ],
                note=f"Mixed fleet; means over {len(setting.seeds)} seeds; target {percent(target)}.",
            ),
            Table(
                title="Devices",
                headings=["Device", "*fp32 TFLOP/s", "*Memory GB/s", "*Down Mbit/s", "*Up Mbit/s", "Limited by"],
                rows=[
                    [
                        device.name,
                        f"{device.flops / 1e12:.2f}",
                        f"{device.bandwidth / 1e9:.0f}",
                        f"{device.down * 8 / 1e6:.0f}",
                        f"{device.up * 8 / 1e6:.0f}",
                        ", ".join(sorted(set(limits[device.name].values()))),
                    ]
                    for device in DEVICES
                ],
                note="Peaks from public documents, listed under sources. Limited by: what takes most of a typical "
                "client's round, under any of the strategies.",
            ),
        ],
        sources=[
            *dict.fromkeys(source for device in DEVICES for source in device.sources),
            "Williams, Waterman, Patterson, Roofline: an insightful visual performance model, CACM 52(4), 2009",
        ],
    )


def _headline(ranked: Sequence[tuple[float, str]], target: float) -> str:
    if not ranked:
        return f"Simulated: no strategy reaches {percent(target)}."
    (soonest, first), (latest, last) = ranked[0], ranked[-1]
    if first == last:
        return f"Simulated: {first} alone reaches {percent(target)}, after {duration(soonest)}."
    return (
        f"Simulated: {first} is first at {percent(target)}, after {duration(soonest)}; {last} is last of "
        f"{len(ranked)}, after {duration(latest)}."
    )


def round_seconds(clients: Sequence[float], deadline: float | None) -> float:
    """How long a round of clients lasts: until the slowest is in, or the share `deadline` of them."""
    ranked = sorted(clients)
    return ranked[-1] if deadline is None else ranked[max(0, int(np.ceil(deadline * len(ranked))) - 1)]


def device_of(client: int) -> Device:
    """A client's device in the mixed fleet: each in turn."""
    return DEVICES[client % len(DEVICES)]


def _mean_times(runs: Sequence[Works], deadline: float | None) -> list[float]:
    """Simulated seconds of each round of a mixed fleet, mean over seeds; a round nobody trained in takes none."""
    rounds = sorted({number for works in runs for number, _ in works})
    return [
        mean(
            [
                round_seconds([seconds(device_of(c), one) for (at, c), one in works.items() if at == number], deadline)
                for works in runs
            ]
        )
        for number in rounds
    ]


def _typical(runs: Sequence[Works]) -> Work:
    """The mean client's round."""
    every = [one for works in runs for one in works.values()]
    return Work(
        steps=every[0].steps,
        flops=mean([one.flops for one in every]),
        traffic=mean([one.traffic for one in every]),
        bytes_down=mean([one.bytes_down for one in every]),
        bytes_up=mean([one.bytes_up for one in every]),
    )


def work_of(run: RunRecord) -> Works:
    """The work of every client in every round: bytes as recorded, FLOPs and traffic of a step of its last plan."""
    from hfedmoe_ray.studies.work import step_costs

    with continued(run) as federation:
        costs = step_costs(federation)
        steps = federation.experiment.local.steps
    return {
        (result.round, result.client): Work(
            steps=steps,
            flops=costs[result.client].flops,
            traffic=costs[result.client].traffic,
            bytes_down=result.bytes_down,
            bytes_up=result.bytes_up,
        )
        for result in run.results
        if result.round > 0 and result.client in costs
    }


STUDY = Study(
    name="time",
    title="Simulated time to accuracy",
    shows="simulated seconds to an accuracy on phones, a Jetson, a laptop and a workstation",
    cost="12 runs and their work counted, about 5 minutes",
    config="study_small.yaml",
    measure=measure,
)
