"""Studies, each from command to page on a tiny model, with their numbers computed another way."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_federation import experiment

from hfedmoe_ray.cli import main
from hfedmoe_ray.config.load import dump_experiment
from hfedmoe_ray.data.dataset import FederatedDataset
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.strategies.scores import uniform_plan
from hfedmoe_ray.studies import STUDIES, activation
from hfedmoe_ray.studies.plots import Curve, Estimate, curves, estimates
from hfedmoe_ray.studies.statistics import mean_of
from hfedmoe_ray.studies.study import Setting
from hfedmoe_ray.types import Role, TaskWeights


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all studies of this module keep their runs, so that what two need is run once."""
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def config(sources: Path, output: Path) -> Path:
    path = output / "tiny.yaml"
    path.write_text(dump_experiment(experiment(sources)))
    return path


def studied(name: str, config: Path, output: Path, *options: str) -> dict[str, Any]:
    """Runs a study by its command and returns what stands in its JSON."""
    assert main(["study", name, str(config), *options, "--output", str(output)]) == 0
    check_page((output / f"{name}.html").read_text())
    found: dict[str, Any] = json.loads((output / f"{name}.json").read_text())
    told = (output / f"{name}.md").read_text()
    assert found["headline"] in told
    assert found["paragraph"] in told
    assert "nan" not in told.lower().split()
    return found["numbers"]


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
    setting = Setting(config=config, overrides=(), seeds=(0,), output=output, tell=print)
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
        Setting(
            config=Path(__file__).parents[2] / "configs" / study.config,
            overrides=(),
            seeds=study.seeds,
            output=Path(),
            tell=print,
        ).experiment(0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["activations"], "Did you mean activation"), (["activation", "--seeds", "0,x"], "write different whole numbers")],
)
def test_bad_arguments_are_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", *arguments]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
