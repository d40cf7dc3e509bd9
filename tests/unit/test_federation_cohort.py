"""Who takes part: the same draw whoever asks, by chance or by size, from those that are there."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from tiny_federation import experiment, run

from hfedmoe_ray.config.schema import Availability, Clients
from hfedmoe_ray.errors import DataError, TrainingError
from hfedmoe_ray.federation.availability import available
from hfedmoe_ray.federation.cohort import select_cohort
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.seeds import generator

TIERS = ({"name": "any", "share": 1.0, "experts": 0.5},)
ROUNDS = range(1, 401)


def clients(**keys):
    return Clients.model_validate({"count": 20, "per_round": 5, "tiers": TIERS} | keys)


def chosen(made, rounds=ROUNDS, examples=(1,) * 20, seed=0):
    """How often each client was drawn."""
    counts = np.zeros(made.count, dtype=int)
    for round in rounds:
        cohort = select_cohort(made, seed, round, examples)
        assert list(cohort) == sorted(set(cohort))
        counts[list(cohort)] += 1
    return counts


def trace(tmp_path: Path, *rows: str, heading: str = "client,first,last") -> Availability:
    path = tmp_path / "trace.csv"
    path.write_text("\n".join([heading, *rows]) + "\n")
    return Availability(how="file", path=str(path))


def test_a_uniform_draw_is_uniform_and_does_not_look_at_sizes():
    counts = chosen(clients())
    assert counts.sum() == 5 * len(ROUNDS)
    assert np.abs(counts - 100).max() < 4 * np.sqrt(400 * 0.25 * 0.75)
    assert (chosen(clients(), examples=range(1, 21)) == counts).all()
    expected = generator(0, "cohort", 7).choice(20, size=5, replace=False)
    assert select_cohort(clients(), 0, 7, (1,) * 20) == tuple(sorted(expected))


def test_a_weighted_draw_follows_sizes():
    made = clients(sampling="weighted", per_round=1)
    sizes = np.array([1] * 10 + [4] * 10)
    shares = chosen(made, range(2000), sizes) / 2000
    np.testing.assert_allclose(shares, sizes / 50, atol=4 * np.sqrt(0.08 * 0.92 / 2000))


def test_by_day_every_client_is_there_for_its_share_of_each_day_at_a_time_of_its_own():
    made = clients(availability={"how": "diurnal", "share": 0.25, "period": 8})
    there = np.zeros((20, 33), dtype=bool)
    for round in range(33):
        there[available(made, 0, round), round] = True
    assert (there[:, :8].sum(axis=1) == 2).all(), "a quarter of eight rounds"
    assert (there[:, :25] == there[:, 8:]).all(), "every day is like the last"
    starts = {int(np.flatnonzero(row[1:] & ~row[:-1])[0]) % 8 for row in there}
    assert len(starts) > 4, "they do not wake together"
    counts = chosen(made, range(1, 9))
    assert counts.max() <= 2


def test_by_file_only_those_it_names_take_part_and_all_of_them_where_they_are_few(tmp_path: Path):
    made = clients(availability=trace(tmp_path, "3,1,2", "4,2,2", *(f"{c},3,9" for c in range(10)), "15,1,1", "15,2,2"))
    assert select_cohort(made, 0, 1, (1,) * 20) == (3, 15)
    assert select_cohort(made, 0, 2, (1,) * 20) == (3, 4, 15)
    assert set(select_cohort(made, 0, 3, (1,) * 20)) < set(range(10))
    with pytest.raises(TrainingError, match=r"no client is available in round 10"):
        select_cohort(made, 0, 10, (1,) * 20)


def test_a_run_waits_for_nobody_who_is_not_there(sources: Path, tmp_path: Path):
    made = experiment(sources)
    there = trace(tmp_path, "0,0,9", "2,2,2")
    made = made.model_copy(update={"clients": made.clients.model_copy(update={"availability": there})})
    _, summary, recorder = run(made, tmp_path / "run")
    assert [[record.client for record in report.clients] for report in recorder.rounds[1:]] == [[0], [0, 2]]
    assert summary["status"] == "finished"
    started = [fields["cohort"] for name, fields in recorder.events if name == "round_started"]
    assert started[1:] == [1, 2]


def test_over_selection_asks_more_and_drops_whoever_is_still_at_work(sources: Path, tmp_path: Path):
    made = experiment(sources)
    asking = made.clients.model_copy(update={"per_round": 2, "over_select": 1.5})
    assert asking.asked == 3
    ended: list[list[int]] = []

    class Watched(LocalExecutor):
        def run(self, tasks, notify, further):
            try:
                yield from super().run(tasks, notify, further)
            finally:
                ended.append([one.client for one in tasks])
                assert all((one.weight < 0) == (one.kind == "train") for one in tasks), "the quickest first"

    changed = made.model_copy(update={"clients": asking})
    _, summary, recorder = run(changed, tmp_path / "run", where=Watched)
    for report in recorder.rounds[1:]:
        statuses = {record.client: record.status for record in report.clients}
        assert sorted(statuses.values()) == ["dropped", "ok", "ok"]
        (dropped,) = [record for record in report.clients if record.status == "dropped"]
        assert "the round had its 2 updates" in dropped.reason
        assert list(statuses) in ended, "the executor was not closed"
    assert summary["clients"]["dropped"] == 2


def test_over_selection_where_all_are_asked_already_is_refused():
    with pytest.raises(ValidationError, match="every round has all 20 clients already"):
        clients(per_round=None, over_select=1.3)
    assert clients(over_select=1.3).asked == 7
    assert clients(over_select=9).asked == 20


@pytest.mark.parametrize(
    ("rows", "heading", "message"),
    [
        (["1,2"], "client,first", "line 2.*client, first, last"),
        (["1,2,x"], "client,first,last", "line 2.*whole numbers"),
        (["0,0,1", "20,0,1"], "client,first,last", "line 3.*client 20.*0 to 19"),
        (["1,5,4"], "client,first,last", "line 2.*rounds 5 to 4"),
    ],
)
def test_a_trace_that_makes_no_sense_says_where(tmp_path: Path, rows: list[str], heading: str, message: str):
    with pytest.raises(DataError, match=message):
        select_cohort(clients(availability=trace(tmp_path, *rows, heading=heading)), 0, 1, (1,) * 20)


def test_a_trace_that_is_missing_says_what_to_write(tmp_path: Path):
    made = clients(availability={"how": "file", "path": str(tmp_path / "none.csv")})
    with pytest.raises(DataError, match=r"none\.csv.*columns client, first, last"):
        select_cohort(made, 0, 1, (1,) * 20)


@pytest.mark.parametrize(
    ("availability", "message"),
    [
        ({"how": "file"}, "needs `path`"),
        ({"how": "always", "share": 0.5}, "share belongs to `how: diurnal`"),
        ({"how": "diurnal", "path": "x.csv"}, "path belongs to `how: file`"),
    ],
)
def test_options_that_nothing_would_read_are_refused(availability: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        Availability.model_validate(availability)
