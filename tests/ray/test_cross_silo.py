"""The cross-silo example on two labelled nodes, each with a file of its own: what is opened where, and what crosses.

On one machine both nodes run as the same user, so that "cannot read" is not the operating system's doing: each node
works in a directory of its own, the configuration names a file relative to it, and every process of a node notes what
it opens. What crosses is looked for in everything that the server took out of the object store, and in what it wrote.
"""

import json
import os
import pickle
import runpy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.data.dataset import FederatedDataset
from hfedmoe_ray.data.tokenize import load_tokenizer
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.runtime.cluster import connected
from hfedmoe_ray.runtime.federate import federate
from hfedmoe_ray.runtime.pool import RayExecutor

pytestmark = pytest.mark.ray
EXAMPLE = Path(__file__).parents[2] / "examples" / "cross_silo"
CLIENT_OF = {"north": 0, "south": 1}
WORDS = {"north": "qvxzwkjhgbtfpd", "south": "zjxqkwvbhgdptc"}
"""Before every text of a site: words of no language, whose ids nothing else has in a row."""
SMALL = (
    "rounds=1",
    "model.upcycle={how: split, experts: 4, top_k: 2, layers: [5], calibration_steps: 0}",
    "local={steps: 2, batch_size: 8, profile_examples: 8}",
    "data.source=client-{client}.jsonl",
)
RUN = 6
"""Ids of a text in a row that count as having seen it."""


@dataclass(frozen=True)
class Silos:
    """Where everything is."""

    places: Mapping[str, Path]
    """Working directory of the head and of each site."""
    logs: Path


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory, ray_directory: str) -> Iterator[Silos]:
    root = tmp_path_factory.mktemp("silos")
    runpy.run_path(str(EXAMPLE / "silos.py"))["main"]([str(root), "--examples", "20"])
    places = {"head": root / "head"} | {site: root / site for site in CLIENT_OF}
    places["head"].mkdir()
    for site, client in CLIENT_OF.items():
        mark(root / site / f"client-{client}.jsonl", WORDS[site])
    cluster = Cluster()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "watched"), prepend=os.pathsep)
        for name, place in places.items():
            patch.chdir(place)
            patch.setenv("HFEDMOE_CACHE", str(place / "cache"))
            patch.setenv("WATCHED_LOG", str(place / "opened.txt"))
            size = {"num_cpus": 0 if name == "head" else 1, "object_store_memory": 2**28, "memory": 3 * 2**30}
            cluster.add_node(**size, labels={} if name == "head" else {"site": name}, temp_dir=ray_directory)
        patch.chdir(places["head"])
        patch.setenv("HFEDMOE_CACHE", str(places["head"] / "cache"))
        with connected(cluster.address):
            yield Silos(places, Path(ray_directory))
    cluster.shutdown()


def mark(file: Path, word: str) -> None:
    """Puts a word before every text of a file."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    marked = [row | {"text": f"{word} {row['text']}"} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in marked))


def traces(word: str, tokenizer: Any) -> list[bytes]:
    """How a text that begins with it would show: the word, or its ids in a row, as numbers of any type or as JSON."""
    ids = tokenizer(word, add_special_tokens=False)["input_ids"][:RUN]
    assert len(ids) == RUN, "too few to be told from chance"
    packed = [np.asarray(ids, kind).tobytes() for kind in ("<i2", "<i4", "<i8", "<f4")]
    return [word.encode(), *packed, ", ".join(map(str, ids)).encode(), ",".join(map(str, ids)).encode()]


def seen(looked_for: list[bytes], where: bytes) -> bool:
    return any(trace in where for trace in looked_for)


def test_texts_stay_on_the_node_whose_client_reads_them(silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    test = silos.places["head"].parent / "test.jsonl"
    experiment = load_experiment(EXAMPLE / "experiment.yaml", [*SMALL, f"data.test={test}"])
    received: list[bytes] = []
    get: Callable[..., Any] = ray.get

    def kept(*arguments: Any, **options: Any) -> Any:
        value = get(*arguments, **options)
        received.append(pickle.dumps(value))
        return value

    monkeypatch.setattr(ray, "get", kept)
    summary = federate(
        experiment,
        tmp_path / "run",
        resume=False,
        make_executor=RayExecutor,
        render=lambda _name, _fields: None,
        should_stop=lambda: False,
    )
    monkeypatch.undo()
    assert summary["status"] == "finished"
    assert summary["clients"]["ok"] >= len(CLIENT_OF)

    # Each client's file was opened by one process, of its own node.
    opened = {
        site: [line.split() for line in (place / "opened.txt").read_text().splitlines()]
        for site, place in silos.places.items()
        if (place / "opened.txt").is_file()
    }
    for site, client in CLIENT_OF.items():
        private = silos.places[site] / f"client-{client}.jsonl"
        assert {path for _, path in opened[site]} == {str(private)}
        others = [path for place, lines in opened.items() if place != site for _, path in lines]
        assert str(private) not in others
        assert len({pid for pid, _ in opened[site]}) == 1

    # Nothing of a text is in what the server received, nor in what it and Ray have written.
    context = prepare_run(experiment, tmp_path / "run")
    tokenizer = load_tokenizer(context.model.path)
    traces_of = {site: traces(word, tokenizer) for site, word in WORDS.items()}
    looked_for = [*traces_of["north"], *traces_of["south"]]
    crossed = b"".join(received)
    assert b'"samples"' in crossed, "metrics are not among what was received: the test looks in the wrong place"
    assert b"expert.0.0" in crossed or b"expert.0.1" in crossed, "updates are not among what was received"
    assert not seen(looked_for, crossed)
    written = files_below(tmp_path / "run", silos.places["head"], silos.logs)
    assert {"events.jsonl", "metrics.jsonl", "summary.json"} <= {file.name for file in written}
    assert any(file.suffix in (".out", ".err", ".log") for file in written)
    assert [file for file in written if seen(looked_for, file.read_bytes())] == []

    # Nor does a site come to have anything of the other's.
    for site, other in (("north", "south"), ("south", "north")):
        there = files_below(silos.places[site])
        assert not any(seen(traces_of[other], file.read_bytes()) for file in there)
        # It would be found: a site's own file has its words, and what its client reads of it the ids.
        assert [file.name for file in there if seen(traces_of[site], file.read_bytes())] == [
            f"client-{CLIENT_OF[site]}.jsonl"
        ]
        monkeypatch.chdir(silos.places[site])
        ids = FederatedDataset(context.data, experiment.data).train(CLIENT_OF[site]).input_ids
        assert seen(traces_of[site], ids.tobytes())


def files_below(*directories: Path) -> list[Path]:
    return [file for directory in directories for file in directory.rglob("*") if file.is_file()]
