"""The report: everything the run recorded is on the page, nothing else is fetched, and no text can break it."""

import dataclasses
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from html_page import Page
from recorded_run import (
    CONFIG,
    EXPERTS,
    LABELS,
    LAYERS,
    ROUNDS,
    TIERS,
    facts,
    record_run,
    round_report,
    summary,
    tell_round,
)

from hfedmoe_ray.errors import CheckpointError
from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.tracking import charts
from hfedmoe_ray.tracking.files import FileTracker
from hfedmoe_ray.tracking.jsonl import dumps, plain
from hfedmoe_ray.tracking.report import write_report
from hfedmoe_ray.tracking.svg import CATEGORIES, STEPS, every, step, ticks
from hfedmoe_ray.tracking.thinning import spans, thinned
from hfedmoe_ray.tracking.timeline import stretch


def recorded(
    run_dir: Path, rounds: list[RoundReport], told: dict[str, Any] | None = None, result: dict[str, Any] | None = None
) -> Path:
    tracker = FileTracker(run_dir)
    tracker.start(CONFIG, facts() if told is None else told)
    for report in rounds:
        tell_round(tracker, report)
    if result:
        tracker.finish(result)
    return run_dir


def page_of(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text())


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(record_run(tmp_path_factory.mktemp("runs") / "quickstart")).read_text()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_headline_is_the_result(page: Page) -> None:
    assert "10 clients of 3 tiers trained for 8 rounds." in page.text
    assert "classifies 66.7 % of the test set correctly; before training it was 5.0 % (+61.7 points)." in page.text


def test_every_round_is_in_the_table_and_in_the_curves(page: Page) -> None:
    rows = page.table("Round", "Test loss")
    assert [row["Round"] for row in rows] == [str(number) for number in range(ROUNDS + 1)]
    for number, row in enumerate(rows):
        report = round_report(number)
        assert row["Test accuracy"] == f"{100 * report.accuracy:.1f} %"
        assert row["Training loss"] == f"{report.loss:.3f}"
        assert any(tip.startswith(f"global model, test set, round {number}: ") for tip in page.tips)
        assert any(tip.startswith(f"round {number}, evaluate: ") for tip in page.tips)


def test_every_client_is_in_the_table_with_what_it_had(page: Page) -> None:
    rows = page.table("Client", "Tier")
    assert [row["Client"] for row in rows] == [str(client) for client in range(len(TIERS))]
    assert [row["Tier"] for row in rows] == TIERS
    assert rows[0]["Resources"] == "0.1 CPU, 1 GiB"
    assert rows[9]["Budget"] == rows[9]["Held"] == "24"
    assert rows[0]["Examples"] == str(sum(facts()["partition"][0]))
    assert rows[7]["Results"] == "7 ok, 1 late"
    assert rows[1]["Own accuracy"] == "65.0 %"


def test_what_a_robust_rule_held_back_is_told_round_by_round(page: Page, html: str, tmp_path: Path) -> None:
    assert "trimmed mean in the place of the mean" in page.text
    assert "9 updates in 8 rounds: their change was larger than clip_median 1.5 allows." in page.text
    assert "60 experts in 8 rounds: fewer than 2 clients had trained them" in page.text
    for tip in ("update, round 2: 2", "update, round 3: 0", "expert, round 8: 4"):
        assert f"<title>{tip}</title>" in html
    plain = [dataclasses.replace(round_report(number), robust={}) for number in (0, 1)]
    assert "Robust aggregation" not in page_of(recorded(tmp_path, plain)).text


def test_peak_memory_stands_beside_what_was_predicted(page: Page, tmp_path: Path) -> None:
    rows = page.table("Tier", "Peak memory", "Predicted")
    assert [(row["Tier"], row["Peak memory"], row["Predicted"]) for row in rows] == [
        ("phone", "323 MiB", "350 MiB (+8 %)"),
        ("laptop", "336 MiB", "350 MiB (+4 %)"),
        ("server", "363 MiB", "350 MiB (−4 %)"),
    ]
    unknown = page_of(recorded(tmp_path, [round_report(1)], facts(predicted_mib={})))
    assert "Predicted" not in unknown.table("Tier", "Peak memory")[0]


def test_the_pictures_hold_every_value(page: Page) -> None:
    counts = facts()["partition"]
    for client, row in enumerate(counts):
        for label, count in enumerate(row):
            told = f"client {client} ({TIERS[client]}), {LABELS[label]}: {count}"
            assert (told in page.tips) == (count > 0)
    total = [[0] * EXPERTS for _ in range(LAYERS)]
    for number in range(ROUNDS + 1):
        for layer, row in enumerate(round_report(number).selected):
            for expert, count in enumerate(row):
                total[layer][expert] += count
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            assert f"layer {layer}, expert {expert}: {total[layer][expert]}" in page.tips


def test_what_went_wrong_is_listed_with_its_traceback(page: Page) -> None:
    rows = page.table("Round", "Reason")
    assert [(row["Round"], row["Client"], row["What"]) for row in rows] == [
        ("2", "4", "tried again"),
        ("3", "7", "late"),
        ("5", "2", "failed"),
    ]
    assert "RuntimeError: <out of & memory>" in rows[2]["Reason"]
    assert 'File "local.py", line 1' in rows[2]["Reason"]


def test_every_expert_tells_what_became_of_it_over_the_rounds(page: Page) -> None:
    selected = [round_report(number).selected for number in range(1, ROUNDS + 1)]
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            counts = [trained[layer][expert] for trained in selected]
            (tip,) = (tip for tip in page.tips if tip.startswith(f"layer {layer}, expert {expert}: trained "))
            assert f"trained {sum(counts)} times" in tip
            if max(counts):
                assert f"most in round {counts.index(max(counts)) + 1} " in tip


def test_lost_results_are_told_by_tier_and_by_client(page: Page) -> None:
    assert "phone: 1 failed" in page.tips
    assert "laptop: 1 late" in page.tips
    assert "client 2 (phone), round 5: 1 failed" in page.tips
    assert "client 7 (laptop), round 3: 1 late" in page.tips
    assert not any(tip.startswith("client 0 (phone), round") for tip in page.tips), "it lost nothing"


def test_learning_is_drawn_over_rounds_and_over_what_they_cost(page: Page) -> None:
    reports = [round_report(number) for number in range(ROUNDS + 1)]
    sent = sum(report.bytes_up + report.bytes_down for report in reports) / 2**20
    took = sum(report.seconds for report in reports)
    last = f"{100 * reports[-1].accuracy:.3g} %"
    assert f"global model, test set, round {ROUNDS}: {last}" in page.tips
    assert f"global model, test set, MiB sent, both ways {sent:.4g}: {last}" in page.tips
    assert f"global model, test set, s {took:.4g}: {last}" in page.tips


def test_a_rounds_slots_are_drawn_from_its_events() -> None:
    def event(name: str, second: float, **fields: Any) -> dict[str, Any]:
        return {"time": f"2026-01-01T00:00:{second:06.3f}+00:00", "event": name, **fields}

    def task(client: int, slot: int, start: float, end: float, *, round: int = 1) -> list[Any]:
        about = {"client": client, "round": round, "kind": "train"}
        return [event("task_started", start, slot=slot, **about), event("task_finished", end, **about)]

    events = [
        event("round_started", 10, round=1),
        *task(5, 0, 8, 12, round=0),
        *task(1, 0, 12, 16),
        *task(2, 1, 10, 14),
        *task(3, 1, 15, 22),
        event("round_started", 20, round=2),
        *task(4, 0, 21, 22, round=2),
    ]
    drawn = stretch(events, 1)
    assert drawn is not None
    assert [(turn.client, turn.slot, turn.start, turn.end) for turn in drawn.turns] == [
        (5, 0, 0.0, 2.0),
        (1, 0, 2.0, 6.0),
        (2, 1, 0.0, 4.0),
        (3, 1, 5.0, 10.0),
    ]
    assert drawn.busy == pytest.approx((2 + 4 + 4 + 5) / 20)
    assert stretch(events, 2) is None, "nothing tells when it ended"


@pytest.mark.parametrize("count", [1, 59, 60, 61, 300])
def test_long_runs_are_drawn_from_all_rounds_or_from_evenly_spaced_ones(count: int) -> None:
    cut = spans(count, 60)
    assert [index for span in cut for index in span] == list(range(count))
    assert len(cut) <= 60
    few = thinned(range(count), 60)
    assert len(few) == min(count, 60)
    assert (few[0], few[-1]) == (0, count - 1)
    assert max(b - a for a, b in pairwise(few)) <= -(-count // 59) if count > 1 else True


def test_the_page_asks_for_nothing_and_runs_nothing(html: str, page: Page) -> None:
    assert "<script" not in html and "javascript:" not in html
    assert "@import" not in html and "url(" not in html
    assert not re.search(r"https?://", html)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), f"{tag} has an event handler"
        if (tag, name) == ("a", "href"):
            assert ("h2", "id", value.removeprefix("#")) in page.attributes, f"{value} leads nowhere"
        elif name in ("src", "href", "srcset", "data", "action"):
            assert value == "data:,", f"{tag} refers to {value}"


def test_it_is_made_for_phones_dark_rooms_and_screen_readers(html: str, page: Page) -> None:
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    assert "prefers-color-scheme: dark" in html
    pictures = html.count("<svg")
    assert pictures >= 9
    assert (
        sum(tag == "svg" and name == "aria-label" and bool(value) for tag, name, value in page.attributes) == pictures
    )
    used = set(re.findall(r"\b([ch]\d)\b", " ".join(value for _, name, value in page.attributes if name == "class")))
    for kind in used | {f"c{n}" for n in range(CATEGORIES)} | {f"h{n}" for n in range(STEPS + 1)}:
        assert html.count(f"--{kind}:") >= 2, f"{kind} needs a colour in light and in dark"


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run_dir = record_run(tmp_path)
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()


def test_text_from_outside_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</title><script>alert('x')</script>\"'&"
    told = facts(labels=[evil, *LABELS[1:]], versions={"torch": evil})
    told["clients"][0] |= {"tier": evil, "resources": {evil: evil}}
    clients = tuple(
        dataclasses.replace(client, status="rejected", reason=evil, tier=evil) for client in round_report(1).clients
    )
    run_dir = recorded(
        tmp_path,
        [dataclasses.replace(round_report(1), clients=clients, phases={evil: 3.0})],
        told,
        {"status": "failed", "error": evil},
    )
    tracker = FileTracker(tmp_path)
    tracker.event("warning", {"message": evil})
    tracker.event("task_error", {"round": 1, "client": 0, "traceback": evil})
    html = write_report(run_dir).read_text()
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 15
    assert Page(html).text.count("alert('x')") > 10


def test_missing_facts_are_left_out(tmp_path: Path) -> None:
    page = page_of(recorded(tmp_path, [round_report(0), round_report(1)], {}))
    assert "Who has which data" not in page.text
    assert len(page.table("Client", "Tier")) == len(TIERS), "clients are known from their results"
    assert page.table("Client", "Tier")[0]["Budget"] == "–"
    assert "The run has not ended" in page.text


def test_a_run_without_a_single_evaluation(tmp_path: Path) -> None:
    blind = [
        dataclasses.replace(round_report(n), accuracy=None, test_loss=None, own_accuracy=None, loss=None)
        for n in (0, 1)
    ]
    page = page_of(recorded(tmp_path, blind, result=summary(accuracy=None, own_accuracy_by_client={})))
    assert "The global model was not evaluated." in page.text
    assert "No round has been measured." in page.text


def test_accuracy_over_simulated_time_is_drawn_where_the_run_has_a_clock(tmp_path: Path, page: Page) -> None:
    timed = [dataclasses.replace(round_report(n), simulated_seconds=60.0 + n) for n in range(3)]
    drawn = page_of(recorded(tmp_path, timed, result=summary(simulated_seconds=183.0)))
    for report, clock in zip(timed, (60, 121, 183), strict=True):
        assert f"global model, test set, simulated s {clock}: {100 * report.accuracy:.3g} %" in drawn.tips
    assert "Simulated time" in drawn.text
    assert "Simulated time" not in page.text


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    page = page_of(recorded(tmp_path, []))
    assert "trained for 0 rounds" in page.text
    assert len(page.table("Client", "Tier")) == len(TIERS)


def test_a_strategy_without_profiles_and_a_single_round(tmp_path: Path) -> None:
    report = dataclasses.replace(round_report(1), usage=tuple((0.0,) * EXPERTS for _ in range(LAYERS)), agreement=None)
    page = page_of(recorded(tmp_path, [report], result=summary(rounds=1)))
    assert "How much the router uses them" not in page.text
    assert "Which experts were trained" in page.text
    assert "after round 1" not in page.text, "one measurement has no before"


def test_clients_that_read_their_own_files(tmp_path: Path) -> None:
    told = facts(partition=[[0] * len(LABELS) for _ in TIERS])
    page = page_of(recorded(tmp_path, [round_report(0)], told))
    assert "the server does not know their labels" in page.text


def test_an_error_stands_at_the_top(tmp_path: Path) -> None:
    page = page_of(
        recorded(tmp_path, [round_report(0)], result={"status": "failed", "error": "only 2 of 10 clients delivered"})
    )
    assert "The run failed. only 2 of 10 clients delivered" in page.text


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run directory"):
        write_report(tmp_path)


@pytest.mark.parametrize("low, high", [(0, 1), (0.62, 0.68), (0, 0), (-3, 2.2), (1e-4, 3e-4), (0, 12345)])
def test_axis_marks_are_few_even_and_enclose_the_data(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high
    assert 3 <= len(marks) <= 8
    gaps = [b - a for a, b in pairwise(marks)]
    assert max(gaps) == pytest.approx(min(gaps))


def test_only_nothing_has_the_colour_of_nothing() -> None:
    assert step(0, 50) == 0
    assert step(1, 5000) == 1
    assert step(50, 50) == STEPS
    steps = [step(value, 50) for value in range(51)]
    assert steps == sorted(steps)


def test_labels_are_thinned_until_they_fit() -> None:
    assert every(10, room=300, needed=20) == 1
    assert every(100, room=300, needed=20) == 10
    assert every(0, room=300, needed=20) == 1


def test_end_labels_of_two_lines_that_meet_do_not_overlap() -> None:
    series = [charts.Series(name=name, points=[(0, 0.1), (1, 0.5)]) for name in ("a", "b")]
    image = charts.line_chart(series, label="x", write=lambda value: f"{value:g}")
    heights = [float(y) for y in re.findall(r'class="end c\d" x="[\d.]+" y="([\d.]+)"', image)]
    assert len(heights) == 2
    assert abs(heights[0] - heights[1]) >= 12


def test_of_very_many_clients_those_that_were_asked_are_listed(tmp_path: Path) -> None:
    rows = [facts()["clients"][0] | {"client": client} for client in range(5000)]
    counts = [[1] * len(LABELS)] * len(rows)
    told = facts(clients=rows, partition=counts)
    reports = [round_report(number) for number in range(ROUNDS + 1)]
    page = page_of(recorded(tmp_path / "run", reports, told))
    assert [row["Client"] for row in page.table("Client", "Tier")] == [str(client) for client in range(len(TIERS))]
    assert f"Of 5000 clients, {len(TIERS)} were asked" in page.text
    assert "100 of 5000 clients, evenly spaced, are drawn." in page.text
    page = page_of(recorded(tmp_path / "none", [], told))
    assert len(page.table("Client", "Tier")) == 200


def test_a_large_run_has_a_page_of_bounded_size(tmp_path: Path) -> None:
    def length(rounds: int, clients: int) -> int:
        rows = [facts()["clients"][client % len(TIERS)] | {"client": client} for client in range(clients)]
        told = facts(clients=rows, partition=[facts()["partition"][0]] * clients)
        run_dir = recorded(tmp_path / f"{rounds}x{clients}", [], told)
        template, lines = round_report(3), []
        for number in range(rounds):
            records = [
                dataclasses.replace(template.clients[client % len(TIERS)], round=number, client=client)
                for client in range(number % 100, clients, 100)
            ]
            lines += [{"event": "client", **plain(record)} for record in records]
        with (run_dir / "events.jsonl").open("a") as file:
            file.writelines(dumps(line) + "\n" for line in lines)
        told_rounds = [plain(dataclasses.replace(template, round=number)) | {"clients": []} for number in range(rounds)]
        text = "".join(dumps({"time": "2026-01-01T00:00:00+00:00", **line}) + "\n" for line in told_rounds)
        (run_dir / "metrics.jsonl").write_text(text)
        return len(write_report(run_dir).read_text())

    small, large = length(250, 600), length(500, 1200)
    assert large < 1.2 * small, "what grows with the run is told by some of it"
    assert large < 1_500_000
