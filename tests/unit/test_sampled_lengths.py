"""What a plan knows of texts is what the run then finds; and it says where it knows nothing."""

import re
from pathlib import Path

import numpy as np
import pytest
from tiny_federation import experiment

from hfedmoe_ray.cli import main
from hfedmoe_ray.config.load import dump_experiment
from hfedmoe_ray.data.dataset import FederatedDataset
from hfedmoe_ray.data.prepare import prepare_data
from hfedmoe_ray.data.sources import load_raw
from hfedmoe_ray.sampled_lengths import TEXTS, sampled_lengths, why_unknown

DATA = {"max_length": 12, "partition": {"how": "iid"}}


@pytest.mark.parametrize("task", ["classification", "causal"])
def test_a_sample_has_the_lengths_of_the_prepared_texts(sources: Path, tmp_path: Path, task: str):
    written = {"prompt": "label", "response": "text"} if task == "causal" else {}
    model = {"source": str(sources / "mixtral"), "task": task}
    made = experiment(sources, model=model, data=DATA | written | {"source": str(sources / "texts.jsonl")})
    assert not why_unknown(made)
    first, kept = sampled_lengths(made), sampled_lengths(made)
    raw = load_raw(made.data)
    data = prepare_data(made.data, raw, tokenizer_dir=sources / "mixtral", clients=4, seed=0, cache=tmp_path)
    prepared = FederatedDataset(data, made.data).all_train()
    assert len(prepared) < TEXTS
    for found in (first, kept):  # all of them, in another order
        assert np.array_equal(np.sort(found.texts), np.sort(prepared.lengths))
        assert (found.prompts is None) == (prepared.prompts is None) == (task == "classification")
        if found.prompts is not None and prepared.prompts is not None:
            assert np.array_equal(np.sort(found.prompts), np.sort(prepared.prompts))


def test_a_plan_says_whether_it_knows_the_texts(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Without them it is an upper bound."""
    peaks = []
    for source in (sources / "texts.jsonl", tmp_path / "elsewhere.jsonl"):
        made = experiment(sources, data=DATA | {"source": str(source), "max_length": 500})
        (tmp_path / "tiny.yaml").write_text(dump_experiment(made))
        assert main(["plan", str(tmp_path / "tiny.yaml")]) == 0
        said = capsys.readouterr().out
        assert ("estimated from how long the texts are" in said) == source.is_file()
        assert (f"at most, as if every text had 500 tokens (there is no {source} here)" in said) != source.is_file()
        peaks.append(max(map(float, re.findall(r"phone .*?([\d.]+) MiB", said))))
    assert peaks[0] < peaks[1]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"source": "hub:somebody/texts"}, "on the hub"),
        ({"source": "client-{client}.jsonl", "partition": {"how": "files"}, "labels": ["x"]}, "clients' own nodes"),
    ],
)
def test_texts_of_elsewhere_are_not_fetched_for_a_plan(sources: Path, data: dict[str, object], reason: str):
    assert reason in why_unknown(experiment(sources, data=DATA | data))


def test_without_its_tokenizer_a_model_says_nothing_of_texts(sources: Path):
    # Nothing is asked of the hub either.
    made = experiment(sources, model={"source": "somebody/elsewhere", "trainable": "experts"})
    assert "tokenizer" in why_unknown(made)
