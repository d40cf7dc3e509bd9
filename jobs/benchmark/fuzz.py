"""Hostile answers by the hundred thousand: none may crash the server, and none that is malformed be accepted.

hfedmoe bench fuzz [--updates 100000] [--seed 0] [--processes 2] [--json FILE]

Honest answers of clients of a tiny model, in every precision, are spoilt in one to three ways (`fuzzing.mutations`) and
given to the code that receives them in a run. What it says of each is compared with a second opinion, formed from the
bytes alone by code that shares nothing with it (`fuzzing.oracle`): it must not accept what is malformed there, and
should not reject what is not.
"""

import random
import re
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import click
from fuzzing.cases import Case, Sent, cases, receive
from fuzzing.mutations import MUTATIONS, mutated
from fuzzing.oracle import flaw
from output import Row, json_option, publish

_SHOWN = 5
"""Disagreements that are told in full."""


@dataclass
class Tally:
    """What became of a number of answers."""

    answers: int = 0
    by_mutation: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    """By mutation, those that were used; of several mutations each counts."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rejections, by reason without names and numbers."""
    crashes: int = 0
    malformed_accepted: int = 0
    well_formed_rejected: int = 0
    wrong: list[str] = field(default_factory=list)
    """The first of those three, in words."""

    def judge(self, case: Case, names: list[str], sent: Sent) -> None:
        """Has the server and the second opinion judge an answer."""
        self.answers += 1
        self.by_mutation.update(set(names))
        try:
            reason = receive(case, sent)
        except Exception:
            self.crashes += 1
            self._tell(case, names, traceback.format_exc())
            return
        told = flaw(case, sent)
        if reason:
            self.reasons[kind_of(reason)] += 1
        else:
            self.accepted.update(set(names))
        if told and not reason:
            self.malformed_accepted += 1
            self._tell(case, names, f"accepted, though malformed: {told}")
        if reason and not told:
            self.well_formed_rejected += 1
            self._tell(case, names, f"rejected, though well-formed: {reason}")

    def add(self, other: "Tally") -> None:
        """Adds what another has counted."""
        for name in ("answers", "crashes", "malformed_accepted", "well_formed_rejected"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("by_mutation", "accepted", "reasons"):
            getattr(self, name).update(getattr(other, name))
        self.wrong += other.wrong

    def _tell(self, case: Case, names: list[str], what: str) -> None:
        if len(self.wrong) < _SHOWN:
            self.wrong.append(f"{case.name}, {' + '.join(names)}: {what}")


def kind_of(reason: str) -> str:
    """A reason without what differs from one answer to the next."""
    short = re.sub(r"^(cannot be read: |not a safetensors payload: |Error while deserializing: )+", "", reason)
    told = re.split(r"[(\[]|(?<!metrics):", re.sub(r"'[^']*'|\"[^\"]*\"|\S*[\d.]\S*", "#", short))[0]
    return " ".join(told.split())[:70]


def judged(answers: int, seed: str) -> Tally:
    """Judges so many answers of all cases in turn; the same seed is the same answers."""
    chance, made, tally = random.Random(seed), cases(), Tally()
    for number in range(answers):
        case = made[number % len(made)]
        tally.judge(case, *mutated(case, chance))
    return tally


@click.command()
@json_option
@click.option("--updates", default=100_000, show_default=True, help="Answers to spoil.")
@click.option("--seed", default=0, show_default=True, help="Of all chance.")
@click.option("--processes", default=2, show_default=True, help="Among which the answers are divided.")
def main(json_file: Path | None, updates: int, seed: int, processes: int) -> None:
    """Hostile updates against the code that receives them."""
    started = time.perf_counter()
    shares = [updates // processes + (index < updates % processes) for index in range(processes)]
    tally = Tally()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for part in pool.map(judged, shares, [f"{seed} {index}" for index in range(processes)]):
            tally.add(part)
    seconds = time.perf_counter() - started
    accepted = updates - sum(tally.reasons.values()) - tally.crashes
    figures = {
        "updates": tally.answers,
        "seed": seed,
        "accepted": accepted,
        "rejected": sum(tally.reasons.values()),
        "crashes": tally.crashes,
        "malformed_accepted": tally.malformed_accepted,
        "well_formed_rejected": tally.well_formed_rejected,
        "seconds": seconds,
        "mutations": {
            name: {"answers": tally.by_mutation[name], "accepted": tally.accepted[name]} for name in sorted(MUTATIONS)
        },
        "reasons": dict(tally.reasons.most_common()),
        "wrong": tally.wrong,
    }
    rows = [
        Row(what="updates, each spoilt in one to three ways", measured=str(tally.answers)),
        Row(what="that crashed the server", measured=str(tally.crashes), bar="0", ok=not tally.crashes),
        Row(
            what="malformed and accepted",
            measured=str(tally.malformed_accepted),
            bar="0",
            ok=not tally.malformed_accepted,
        ),
        Row(
            what="well-formed and rejected",
            measured=str(tally.well_formed_rejected),
            bar="0",
            ok=not tally.well_formed_rejected,
        ),
        Row(what="accepted, as the change did no harm", measured=str(accepted)),
        Row(what="kinds of reasons for the others", measured=str(len(tally.reasons))),
        Row(what="updates a second, both opinions", measured=f"{tally.answers / seconds:.0f}"),
    ]
    for told in tally.wrong[:_SHOWN]:
        click.echo(told, err=True)
    publish(f"Hostile updates: seed {seed}, {seconds:.0f} s", figures, rows, json_file)


if __name__ == "__main__":
    main()
