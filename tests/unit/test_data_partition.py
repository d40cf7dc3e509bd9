import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from hfedmoe_ray.config.data import Partition
from hfedmoe_ray.data.partition import deal, draw_examples, natural, repair, split_own_test, stratified_order
from hfedmoe_ray.errors import DataError
from hfedmoe_ray.seeds import generator

LABELS = np.repeat(np.arange(10), 200)
RANDOM_RULES = ("iid", "dirichlet", "shards", "quantity")

label_arrays = arrays(np.int64, st.integers(20, 200), elements=st.integers(0, 6))


def assert_dealt_once(parts, examples):
    assert sorted(np.concatenate(parts)) == list(range(examples))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


def shares(labels, part, classes=10):
    return np.bincount(labels[part], minlength=classes) / len(part)


def mean_skew(labels, parts):
    """Mean total variation distance between a client's label shares and those of the whole."""
    whole = shares(labels, np.arange(len(labels)))
    return np.mean([np.abs(shares(labels, part) - whole).sum() / 2 for part in parts])


@settings(max_examples=60, deadline=None)
@given(
    labels=label_arrays,
    partition=st.builds(
        Partition,
        how=st.sampled_from(RANDOM_RULES),
        alpha=st.floats(0.01, 100.0),
        shards_per_client=st.integers(1, 4),
        min_examples=st.integers(1, 3),
    ),
    clients=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_every_example_is_dealt_exactly_once(labels, partition, clients, seed):
    parts = deal(partition, labels, None, clients, seed)
    assert len(parts) == clients
    assert_dealt_once(parts, len(labels))
    assert min(map(len, parts)) >= partition.min_examples


@settings(max_examples=40, deadline=None)
@given(groups=st.lists(st.sampled_from("abcdefgh"), min_size=20, max_size=100), clients=st.integers(1, 4))
def test_natural_keeps_groups_whole(groups, clients):
    parts = natural(groups, clients)
    assert_dealt_once(parts, len(groups))
    owners = [{groups[row] for row in part} for part in parts]
    assert sum(map(len, owners)) == len(set(groups))


@pytest.mark.parametrize("how", RANDOM_RULES)
def test_a_partition_is_a_function_of_the_seed(how):
    partition = Partition(how=how, alpha=0.5)
    first, again, other = (deal(partition, LABELS, None, 8, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_iid_sizes_differ_by_at_most_one_and_labels_are_alike():
    parts = deal(Partition(how="iid"), LABELS, None, 7, 0)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert mean_skew(LABELS, parts) < 0.1


def test_dirichlet_skew_falls_with_alpha():
    skews = [
        np.mean([mean_skew(LABELS, deal(Partition(how="dirichlet", alpha=a), LABELS, None, 10, s)) for s in range(5)])
        for a in (0.05, 0.3, 1.0, 10.0, 1000.0)
    ]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.7
    assert skews[-1] < 0.05


def test_shards_give_each_client_few_labels():
    parts = deal(Partition(how="shards", shards_per_client=2), LABELS, None, 10, 0)
    assert {len(part) for part in parts} == {200}
    assert all(len(np.unique(LABELS[part])) <= 2 for part in parts)
    assert any(len(np.unique(LABELS[part])) == 2 for part in parts)


def test_quantity_skews_sizes_and_keeps_label_shares():
    parts = deal(Partition(how="quantity", alpha=0.5), LABELS, None, 8, 1)
    sizes = [len(part) for part in parts]
    assert max(sizes) > 4 * min(sizes)
    for part in parts:
        counts = np.bincount(LABELS[part], minlength=10)
        assert counts.max() - counts.min() <= 1


def test_quantity_sizes_are_more_even_with_larger_alpha():
    def spread(alpha):
        return np.mean([np.std([len(p) for p in deal(Partition(how="quantity", alpha=alpha), LABELS, None, 8, s)])
                        for s in range(5)])  # fmt: skip

    assert spread(0.3) > spread(3.0) > spread(100.0)


def test_natural_makes_the_largest_groups_clients_and_adds_small_ones_to_the_smallest():
    groups = ["big"] * 9 + ["mid"] * 5 + ["low"] * 3 + ["one"]
    parts = natural(groups, 3)
    assert [{groups[row] for row in part} for part in parts] == [{"big"}, {"mid"}, {"low", "one"}]


def test_min_examples_are_kept_by_repair_where_no_draw_can():
    partition = Partition(how="dirichlet", alpha=0.01, min_examples=15)
    parts = deal(partition, LABELS, None, 100, 0)
    assert_dealt_once(parts, len(LABELS))
    assert min(map(len, parts)) >= 15


def test_repair_takes_from_the_largest_only():
    before = [np.arange(0, 50), np.arange(50, 53), np.arange(53, 73)]
    after = repair(before, 10, generator(0, "test"))
    assert_dealt_once(after, 73)
    assert [len(part) for part in after] == [43, 10, 20]
    assert np.array_equal(after[2], before[2])


# ---------------------------------------------------------------------------------------- stratified order and splits


@settings(max_examples=60, deadline=None)
@given(labels=label_arrays, share=st.floats(0.0, 1.0), seed=st.integers(0, 1000))
def test_a_stretch_of_the_stratified_order_has_the_shares_of_the_whole(labels, share, seed):
    order = stratified_order(labels, generator(seed, "test"))
    assert sorted(order) == list(range(len(labels)))
    count = round(share * len(labels))
    drawn = np.bincount(labels[order[:count]], minlength=7)
    sizes = np.bincount(labels, minlength=7)
    exact = sizes * count / len(labels)
    # A stretch over the share p of positions holds less than one more or fewer than p n of each class, so p itself is
    # less than K / N away from count / N, where K classes occur.
    assert (np.abs(drawn - exact) < 1 + sizes * (sizes > 0).sum() / len(labels) + 1e-9).all()


def test_draw_examples_keeps_label_shares_and_order():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    rows = draw_examples(labels, 100, generator(0, "test"))
    assert (np.diff(rows) > 0).all()
    assert np.abs(np.bincount(labels[rows]) - [60, 30, 10]).max() <= 1


@settings(max_examples=60, deadline=None)
@given(
    labels=arrays(np.int64, st.integers(1, 60), elements=st.integers(0, 4)),
    share=st.floats(0.0, 0.99),
    seed=st.integers(0, 1000),
)
def test_own_test_and_training_rows_are_the_whole(labels, share, seed):
    train, own_test = split_own_test(labels, share, generator(seed, "test"))
    assert sorted([*train, *own_test]) == list(range(len(labels)))
    assert len(train) >= 1
    assert (len(own_test) > 0) == (share > 0 and len(labels) > 1)


def test_own_test_is_stratified():
    labels = np.repeat([0, 1], [80, 20])
    _, own_test = split_own_test(labels, 0.2, generator(0, "test"))
    assert np.bincount(labels[own_test]).tolist() == [16, 4]


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("how", RANDOM_RULES)
def test_too_few_examples_name_the_clients_and_what_to_change(how):
    with pytest.raises(
        DataError, match=r"50 training examples cannot give 10 clients 8 each.*clients 6, 7, 8, 9 would go"
    ):
        deal(Partition(how=how), LABELS[:50], None, 10, 0)


def test_more_clients_than_examples_name_the_empty_client():
    with pytest.raises(DataError, match=r"client 3 would go short.*clients.count to at most 3"):
        deal(Partition(how="iid", min_examples=1), np.array([0, 1, 0]), None, 4, 0)


def test_fewer_groups_than_clients():
    partition = Partition(how="natural", key="speaker", min_examples=1)
    with pytest.raises(DataError, match=r"'speaker' has 2 different values for 4 clients: clients 2, 3 would be empty"):
        deal(partition, np.zeros(40, np.int64), ["a", "b"] * 20, 4, 0)


def test_small_groups_are_named_and_never_filled_up():
    partition = Partition(how="natural", key="speaker", min_examples=8)
    with pytest.raises(DataError, match=r"client 1 would have fewer than 8.*min_examples"):
        deal(partition, np.zeros(40, np.int64), ["a"] * 37 + ["b"] * 3, 2, 0)
