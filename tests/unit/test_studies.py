"""Studies, each from command to page on a tiny model, with their numbers computed another way."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_federation import experiment

from hfedmoe_ray.cli import main
from hfedmoe_ray.config.load import dump_experiment
from hfedmoe_ray.data.dataset import FederatedDataset
from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.federation.dropout import drops_out
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.strategies.scores import uniform_plan
from hfedmoe_ray.studies import (
    STUDIES,
    ablations,
    activation,
    balance,
    experts,
    failures,
    merging,
    retention,
    robustness,
    simulated_time,
)
from hfedmoe_ray.studies.devices import DEVICES, Device, Work, bound, seconds
from hfedmoe_ray.studies.outcomes import common_target, mean_accuracies
from hfedmoe_ray.studies.plots import Curve, Estimate, curves, estimates
from hfedmoe_ray.studies.runs import make_runs
from hfedmoe_ray.studies.statistics import mean_of
from hfedmoe_ray.studies.study import Setting
from hfedmoe_ray.tracking.record import read_run
from hfedmoe_ray.train.examples import Examples
from hfedmoe_ray.types import ExpertPlan, MergedExpert, Role, TaskWeights


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all studies of this module keep their runs, so that what two need is run once."""
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def config(sources: Path, output: Path) -> Path:
    path = output / "tiny.yaml"
    skewed = {"how": "dirichlet", "alpha": 0.5}
    data = experiment(sources).data.model_dump() | {"partition": skewed, "test_examples": 60}
    path.write_text(dump_experiment(experiment(sources, data=data)))
    return path


def setting_of(config: Path, output: Path) -> Setting:
    return Setting(config=config, overrides=(), seeds=(0,), output=output, processes=1, tell=print)


def studied(name: str, config: Path, output: Path, *options: str) -> dict[str, Any]:
    """Runs a study by its command and returns what stands in its JSON."""
    assert main(["study", name, str(config), *options, "--processes", "1", "--output", str(output)]) == 0
    check_page((output / f"{name}.html").read_text())
    found: dict[str, Any] = json.loads((output / f"{name}.json").read_text())
    told = (output / f"{name}.md").read_text()
    assert found["headline"] in told
    assert found["paragraph"] in told
    assert "nan" not in told.lower().split()
    return found["numbers"]


def runs(output: Path) -> list[Path]:
    return sorted((output / "runs").iterdir())


class Page(HTMLParser):
    """Fails on tags that do not nest, and on whatever would be fetched or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "data", "action"):
                assert value == "data:,"
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(html: str) -> None:
    Page(html)
    assert "@import" not in html
    assert "url(" not in html
    assert html.count("<svg") == html.count('role="img" aria-label="') >= 1
    # Sources may be cited by an address, which is text: nothing refers to one.
    assert not re.search(r'="https?://', html)


def test_activation_is_the_union_of_what_a_batch_routes_to(config: Path, output: Path) -> None:
    found = studied("activation", config, output, "--seeds", "0,1")
    shares = [one["mean"] for one in found["share"]]
    assert shares == sorted(shares)
    assert 2 / 6 <= shares[0] <= shares[-1] <= 1
    setting = setting_of(config, output)
    context = prepare_run(setting.experiment(0), output)
    routed = activation.routed_examples(context)
    # Batches passed through the model whole, padding and all.
    model = SparseModel(context.model.path)
    weights = initial_weights(context.model, "experts")
    everything = uniform_plan((2, 6), Role.FROZEN)
    model.bind(everything, TaskWeights(shared=weights.shared, experts=weights.experts), "experts")
    data = FederatedDataset(context.data, context.experiment.data)
    rng = np.random.default_rng(0)
    for client in range(4):
        split = data.train(client)
        for size in (1, 3, 8):
            rows = rng.choice(len(split), size=size, replace=False)
            batch = split.batch(rows)
            with torch.inference_mode():
                model.forward(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask))
            np.testing.assert_array_equal(routed[client].hit[rows].any(axis=0), model.tape.counts() > 0)
            assert routed[client].tokens[rows].sum() == batch.attention_mask.sum()


def test_a_larger_batch_of_one_client_is_drawn_from_clients_that_have_it() -> None:
    few = activation.Routed(hit=np.zeros((2, 1, 4), bool), tokens=np.ones(2, int))
    many = activation.Routed(hit=np.eye(4, dtype=bool)[:, None], tokens=np.full(4, 5))
    share, tokens = activation.activated([few, many], 4, seed=0)
    assert share.tolist() == [1.0]
    assert tokens == 20.0
    share, _ = activation.activated([few, many], 2, seed=0)
    assert share.tolist() == [0.25], "every other batch is of the client without experts"


def test_an_interval_is_students() -> None:
    found = mean_of([1.0, 2.0, 3.0])
    half = 4.302653 / 3**0.5
    assert (found.low, found.mean, found.high) == pytest.approx((2 - half, 2, 2 + half), abs=1e-6)
    alone = mean_of([0.5])
    assert alone.low == alone.mean == alone.high == 0.5


def test_charts_hold_every_value_and_write_nothing_outside() -> None:
    lines = [
        Curve(name=name, points=[(2.0**n, n / 9 + shift) for n in range(9)], spread=[(0.0, 1.2)] * 9)
        for name, shift in (("a", 0.0), ("b", 0.01))
    ]
    image = curves(lines, label="x", across="size", write=lambda y: f"{y:.3f}", write_x=str, doubling=True)
    assert all(f"b, size {2.0**n}: {n / 9 + 0.01:.3f}" in image for n in range(9))
    rows = [Estimate(name=f"row {n}", mean=n, low=n - 1, high=n + 1, values=(n,)) for n in range(3)]
    drawn = estimates(rows, label="x", write=lambda y: f"{y:g}", reference=1.0)
    assert "row 2: 2, 1 to 3" in drawn
    for picture in (image, drawn):
        width, height = map(float, re.findall(r'viewBox="0 0 (\d+) (\d+)"', picture)[0])
        assert all(0 <= float(x) <= width for x in re.findall(r' (?:x|cx|x1|x2)="([-\d.]+)"', picture))
        assert all(0 <= float(y) <= height for y in re.findall(r' (?:y|cy|y1|y2)="([-\d.]+)"', picture))


def test_the_list_names_every_study_with_its_own_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--list"]) == 0
    told = capsys.readouterr().out
    for study in STUDIES.values():
        assert f"\n{study.name} " in told
        setting_of(Path(__file__).parents[2] / "configs" / study.config, Path()).experiment(0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["activations"], "Did you mean activation"), (["activation", "--seeds", "0,x"], "write different whole numbers")],
)
def test_bad_arguments_are_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", *arguments]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_popularity_counts_what_the_runs_recorded_and_runs_nothing_twice(config: Path, output: Path) -> None:
    found = studied("popularity", config, output, "--seeds", "0")
    made = len(runs(output))
    records = {run.config["strategy"]["resident"] + run.strategy: run for run in map(read_run, runs(output))}
    for name, run in (
        ("hfedmoe, each batch", records["allhfedmoe"]),
        ("random, residents", records["budgetrandom"]),
    ):
        counted = np.zeros((2, 6))
        for report in run.rounds[1:]:
            counted += report.selected
        (grid,) = found["clients_by_expert"][name]
        np.testing.assert_allclose(grid, counted / 2)
        flat = sorted(np.ravel(grid), reverse=True)
        assert found["variation"][name]["mean"] == pytest.approx(np.std(flat) / np.mean(flat))
        assert found["never_trained"][name]["mean"] == sum(value == 0 for value in flat) / 12
        assert found["upper_tenth"][name]["mean"] == pytest.approx(flat[0] / sum(flat))
    before = (output / "popularity.html").read_bytes()
    changed = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/summary.json")}
    assert studied("popularity", config, output, "--seeds", "0") == found
    assert (output / "popularity.html").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in output.glob("runs/*/summary.json")} == changed
    assert len(runs(output)) == made


def test_failures_lose_what_the_lot_says(config: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "RATES", (0.0, 0.5))
    monkeypatch.setattr(failures, "STRATEGIES", ("hfedmoe",))
    found = studied("failures", config, output, "evaluate.target=0.3", "--seeds", "0,1")
    assert found["target"] == 0.3
    lost = [drops_out(0.5, seed, number, c) for seed in (0, 1) for number in (1, 2) for c in range(4)]
    for name in failures.STRATEGIES:
        assert found["updates_lost"][name] == {"0.0": 0.0, "0.5": sum(lost) / len(lost)}
        values = found["outcomes"][name]["0.5"]["accuracy"]["values"]
        assert len(values) == 2
        assert found["outcomes"][name]["0.5"]["accuracy"]["mean"] == pytest.approx(sum(values) / 2)
    for run in map(read_run, runs(output)):
        if run.config["clients"]["failure_rate"] == 0.5 and run.config["seed"] == 1:
            reached = [r.round for r in run.rounds if r.accuracy >= 0.3]
            assert found["rounds_to_target"][run.strategy]["0.5"][1] == (min(reached) if reached else None)


def test_a_target_lies_between_the_best_start_and_the_least_end() -> None:
    def record(*accuracies: float) -> Any:
        return SimpleNamespace(rounds=[SimpleNamespace(round=n, accuracy=a) for n, a in enumerate(accuracies)])

    means = mean_accuracies([record(0.2, 0.8, 0.7), record(0.4, 1.0, 0.5)])
    assert means == pytest.approx([0.3, 0.9, 0.6])
    assert common_target([means, [0.2, 0.5]], 0.5) == pytest.approx(0.3 + 0.5 * (0.5 - 0.3))
    assert common_target([means, [0.2, 0.3]], 1.0) == pytest.approx(0.31), "where one never rises above the start"
    assert failures.rounds_to(record(0.1, 0.5, 0.4), 0.4) == 1
    assert failures.rounds_to(record(0.1, 0.2), 0.4) is None


def test_a_watched_round_is_the_round_the_run_would_have_had(config: Path, output: Path) -> None:
    found = studied("aggregation", config, output, "--seeds", "0")
    (watched,) = found["clients"]["fedavg"]
    setting = setting_of(config, output)
    # FedAvg trains and deploys the same experts, all of them: the next round's own accuracies are those watched.
    for rounds, stage in ((2, "received"), (3, "aggregated")):
        (longer,) = make_runs(setting, {"fedavg": ["strategy=fedavg", f"rounds={rounds}"]})["fedavg"]
        assert watched[stage] == longer.summary["own_accuracy_by_client"]
    assert sorted(watched["trained"]) == ["0", "1", "2", "3"]
    # A client that keeps what it trained fits its own data: as well as it did before, over all clients, or better.
    assert np.mean([*watched["trained"].values()]) >= np.mean([*watched["received"].values()])
    mean = found["means"]["fedavg"]["aggregated"]["mean"]
    assert mean == pytest.approx(np.mean([*watched["aggregated"].values()]))


def test_runs_in_processes_of_their_own_are_those_made_here(config: Path, output: Path, tmp_path: Path) -> None:
    (here,) = make_runs(setting_of(config, output), {"random": ["strategy=random"]})["random"]
    apart = replace(setting_of(config, tmp_path), processes=2)
    broken = ["strategy=random", "local.learning_rate=1e30"]
    with pytest.raises(TrainingError, match=r"1 of 2 runs failed, broken with seed 0 because: only 0 of 4 clients"):
        make_runs(apart, {"random": ["strategy=random"], "broken": broken, "the same": ["strategy=random"]})
    there = read_run(tmp_path / "runs" / here.run_dir.name)
    assert there.summary["status"] == "finished"
    assert there.summary["model_sha256"] == here.summary["model_sha256"]


def test_retention_is_a_ratio_seed_by_seed(
    config: Path, output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "STRATEGIES", ("hfedmoe", "fedavg"))
    found = studied("retention", config, output, "--seeds", "0")
    for name, kept in found["retention"].items():
        skewed, even = (found["outcomes"][f"{name}, {kind}"]["accuracy"]["mean"] for kind in ("skewed", "even"))
        assert kept["mean"] == pytest.approx(skewed / even)
    even = [run for run in map(read_run, runs(output)) if run.config["data"]["partition"]["how"] == "iid"]
    assert {run.strategy for run in even} == set(retention.STRATEGIES)
    arguments = ["study", "retention", str(config), "data.partition={how: iid}", "--output", str(output)]
    assert main(arguments) == 2
    assert "even one, but" in " ".join(capsys.readouterr().err.split())


def test_an_ablation_changes_what_it_names_and_nothing_else(config: Path) -> None:
    setting = setting_of(config, Path())
    made = {name: setting.experiment(0, *lines) for name, lines in ablations.variants(setting).items()}
    whole = made.pop(ablations.WHOLE).model_dump()
    assert len(made) == len(ablations.PARTS) - 1 + len(ablations.BUDGETS)
    for one in made.values():
        other = one.model_dump()
        assert sum(other["strategy"][key] != value for key, value in whole["strategy"].items()) in (0, 1)
        assert {key for key in whole if other[key] != whole[key]} in ({"strategy"}, {"clients"})
    assert [tier.experts for tier in made["budgets x 4"].clients.tiers] == [1.0, 1.0]


def test_ablations_are_compared_seed_by_seed(config: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {name: ablations.PARTS[name] for name in (ablations.WHOLE, "literal router weights")}
    monkeypatch.setattr(ablations, "PARTS", parts)
    monkeypatch.setattr(ablations, "BUDGETS", ())
    found = studied("ablations", config, output, "--seeds", "0,1")
    left, right = (found["outcomes"][name]["accuracy"]["values"] for name in reversed(parts))
    difference = found["differences"]["literal router weights"]["accuracy"]
    assert difference["mean"] == pytest.approx(np.mean(np.subtract(left, right)))
    assert difference["low"] <= difference["mean"] <= difference["high"]


def test_the_number_of_experts_is_what_is_varied(config: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "COUNTS", (3, 6))
    found = studied("experts", config, output, "--seeds", "0")
    assert found["top_k"] == {"3": "1", "6": "2"}
    for run in map(read_run, runs(output)):
        count = run.config["model"]["upcycle"]["experts"]
        assert len(run.rounds[-1].selected[0]) == count
    assert found["outcomes"]["3"]["bytes_up"] != found["outcomes"]["6"]["bytes_up"]


def work(**changes: Any) -> Work:
    return replace(Work(steps=10, flops=1e9, traffic=1e6, bytes_down=5e6, bytes_up=2e6), **changes)


def test_the_roofline_by_hand_and_in_every_direction() -> None:
    device = Device(name="x", flops=1e10, bandwidth=1e9, down=1e6, up=5e5, sources=("none",))
    # Ten steps of max(1e9/1e10, 1e6/1e9) / 0.5 = 0.2 s, then 5 s down and 4 s up.
    assert seconds(device, work(), 0.5) == pytest.approx(2 + 5 + 4)
    assert seconds(device, work(traffic=4e8), 0.5) == pytest.approx(8 + 5 + 4)
    assert bound(device, work(), 0.5) == "download"
    assert bound(device, work(traffic=4e8), 0.5) == "memory"
    assert bound(device, work(flops=1e12), 0.5) == "compute"
    assert bound(device, work(bytes_up=1e9), 0.5) == "upload"
    for real in DEVICES:
        base = seconds(real, work())
        for name in ("steps", "flops", "traffic", "bytes_down", "bytes_up"):
            assert seconds(real, work(**{name: 3 * getattr(work(), name)})) >= base
        for name in ("flops", "bandwidth", "down", "up"):
            assert seconds(replace(real, **{name: 2 * getattr(real, name)}), work()) <= base
        assert seconds(real, work(), 0.1) > base
        assert real.sources
    ranked = [seconds(real, work()) for real in DEVICES]
    assert min(ranked) == ranked[-1], "nothing is quicker than the workstation"


def test_a_round_lasts_as_long_as_its_slowest_or_until_its_deadline() -> None:
    assert simulated_time.round_seconds([3.0, 1.0, 2.0, 9.0], None) == 9.0
    assert simulated_time.round_seconds([3.0, 1.0, 2.0, 9.0], 0.75) == 3.0
    assert simulated_time.round_seconds([3.0, 1.0, 2.0, 9.0], 0.5) == 2.0
    assert simulated_time.round_seconds([4.0], 0.75) == 4.0


def test_simulated_time_follows_the_recorded_bytes_and_counted_work(config: Path, output: Path) -> None:
    found = studied("time", config, output, "--seeds", "0")
    assert found["simulated"] is True
    whole, part = (found["work_of_a_client"][name] for name in ("fedavg", "hfedmoe"))
    assert whole["flops"] > part["flops"] > 0
    assert whole["traffic"] > part["traffic"] > 0
    (fedavg,) = (
        run
        for run in map(read_run, runs(output))
        if run.strategy == "fedavg" and run.config["rounds"] == 2 and run.config["data"]["partition"]["how"] != "iid"
    )
    sent = [(r.bytes_up, r.bytes_down) for r in fedavg.results if r.round > 0]
    assert (whole["bytes_up"], whole["bytes_down"]) == tuple(np.mean(sent, axis=0))
    one = simulated_time.work_of(fedavg)
    slowest = [
        max(seconds(DEVICES[client % len(DEVICES)], w) for (at, client), w in one.items() if at == number)
        for number in (1, 2)
    ]
    assert found["seconds_by_round"]["fedavg"] == pytest.approx(slowest)
    for name, reached in found["rounds_to_target"].items():
        above = [at for at, value in enumerate(found["accuracy_by_round"][name]) if value >= found["target"]]
        assert reached == (min(above) if above else None)
        taken = None if reached is None else pytest.approx(sum(found["seconds_by_round"][name][:reached]))
        assert found["seconds_to_target"][name] == taken


def test_loads_add_up_over_rounds(config: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = {name: balance.STRATEGIES[name] for name in (balance.FLEX, balance.GREEDY, "hfedmoe")}
    monkeypatch.setattr(balance, "STRATEGIES", some)
    found = studied("balance", config, output, "--seeds", "0")
    for run in map(read_run, runs(output)):
        if run.strategy == "flex_moe":
            name = balance.FLEX if run.config["strategy"]["tolerance"] is not None else balance.GREEDY
            first, second = (np.array(report.selected, float) for report in run.rounds[1:])
            for load, told in zip((first, first + second), found["variation_by_round"][name], strict=True):
                assert told["mean"] == pytest.approx(load.std() / load.mean())
            held = balance.holders(run)
            # Four clients, two rounds, and what the budgets of the two tiers let them hold.
            budgets = {row.client: row.resident_experts for row in run.clients}
            assert held.sum() == 2 * sum(budgets.values())
            assert (held >= first + second).all(), "nobody trains what it does not hold"
            assert found["variation_of_assigned"][name]["mean"] == pytest.approx(held.std() / held.mean())
    assert (
        found["variation_of_assigned"][balance.FLEX]["mean"] <= found["variation_of_assigned"][balance.GREEDY]["mean"]
    )


def test_errors_of_layers_are_those_of_the_model_itself(config: Path, output: Path) -> None:
    found = studied("merging", config, output, "--seeds", "0")
    assert set(found["error"]) == {"merge", "mean", "drop", "drop, more residents"}
    assert sorted(map(int, found["error"]["merge"])) == [2, 4], "more are not absent on the larger tier"
    assert all(one["mean"] > 0 for by_total in found["error"].values() for one in by_total.values())
    setting = setting_of(config, output)
    context = prepare_run(setting.experiment(0), output)
    weights = initial_weights(context.model, "experts")
    model = SparseModel(context.model.path)
    everything = TaskWeights(shared=weights.shared, experts=weights.experts)
    model.bind(uniform_plan((2, 6), Role.FROZEN), everything, "experts")
    split = FederatedDataset(context.data, context.experiment.data).train(0)
    _, batch = Examples(split, None).inputs(model, np.arange(9))
    layers = merging.Layers(model)
    layers.run(batch)
    whole = ExpertPlan(roles=((Role.FROZEN,) * 6,) * 2, absent="drop")
    assert layers.errors(whole, weights).tolist() == [0.0, 0.0]
    assert layers.errors(ExpertPlan(roles=((Role.ABSENT,) * 6,) * 2, absent="drop"), weights).tolist() == [1.0, 1.0]
    # The first layer has the inputs it had whichever experts are dropped: the model itself says what it returns then.
    part = replace(whole, roles=((Role.FROZEN, Role.ABSENT) * 3, (Role.FROZEN,) * 6))
    other = SparseModel(context.model.path)
    other.bind(part, everything, "experts")
    again = merging.Layers(other)
    again.run(batch)
    exact, dropped = (one.outputs[0][batch["attention_mask"].ravel() == 1] for one in (layers, again))
    expected = float((dropped - exact).norm() / exact.norm())
    assert layers.errors(part, weights)[0] == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < 1
    # Alike experts merge without an error, whatever their shares; dropped, the same experts leave one.
    alike = {
        key: weights.experts[0, 1] if key.layer == 0 and key.expert in (1, 3, 5) else e
        for key, e in weights.experts.items()
    }
    twins = replace(weights, experts=alike)
    model.bind(uniform_plan((2, 6), Role.FROZEN), replace(everything, experts=alike), "experts")
    layers = merging.Layers(model)
    layers.run(batch)
    one = MergedExpert(layer=0, members=(1, 3, 5), shares=(0.5, 0.2, 0.3))
    assert layers.errors(replace(part, absent="merge", merged=(one,)), twins)[0] < 1e-5
    assert layers.errors(part, twins)[0] > 0.1


def test_robustness_tells_what_the_runs_were_attacked_with_and_came_to(
    config: Path, output: Path, monkeypatch: pytest.MonkeyPatch
):
    defences = {"mean": (), "median": ("robust.rule=median", "robust.clip_median=1")}
    monkeypatch.setattr(robustness, "DEFENCES", defences)
    found = studied("robustness", config, output, "rounds=1", "--seeds", "0")
    runs = [read_run(path.parent) for path in (output / "runs").glob("*/summary.json")]
    for defence, by_attack in found["accuracy"].items():
        for attack, value in by_attack.items():
            kind = {"no attack": None, "sign flip": "sign_flip", "backdoor": "backdoor"}[attack]
            rule = "median" if defence == "median" else "mean"
            (run,) = [
                run
                for run in runs
                if run.config["rounds"] == 1
                and run.config["robust"]["rule"] == rule
                and (run.config["attack"] or {}).get("kind") == kind
                and run.config["evaluate"]["own"] == "never"
            ]
            assert value["mean"] == run.summary["accuracy"]
            if kind == "backdoor":
                assert found["backdoor_success"][defence]["mean"] == run.summary["backdoor_success"]
    lost = found["accuracy"]["mean"]["sign flip"]["mean"] - found["accuracy"]["mean"]["no attack"]["mean"]
    assert found["lost_to_sign_flip"]["mean"]["mean"] == pytest.approx(lost)
