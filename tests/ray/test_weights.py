"""Versions in the object store: what did not change is not put again, and nothing that comes out can be written."""

import os

import numpy as np
import pytest
import ray
from mapped import mapping
from tiny_worker import SHAPE, task, weights

from hfedmoe_ray.runtime import weights as stored
from hfedmoe_ray.runtime.weights import WeightStore
from hfedmoe_ray.types import ExpertKey, PersonalWeights, Weights

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@pytest.fixture(autouse=True)
def _small_objects_too(monkeypatch: pytest.MonkeyPatch):
    """The weights of these tests are small, and yet are to be objects."""
    monkeypatch.setattr(stored, "INLINE_BYTES", 0)


def single(version: int, value: np.ndarray) -> Weights:
    experts = {key: {"up": value} for key in list(SHAPE.keys())}
    return Weights(version=version, shared={"router": np.zeros(3)}, experts=experts)


def test_only_changed_experts_are_put_again():
    store = WeightStore()
    for version in (0, 1):
        store.publish(weights(version))
    old, new = (store.refs(task(0, version)) for version in (0, 1))
    assert old.shared != new.shared
    assert {key for key in old.experts if old.experts[key] != new.experts[key]} == {ExpertKey(0, 0)}


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (np.array([0.0, 1.0]), np.array([0.0, 1.0]), True),
        (np.array([np.nan, 1.0]), np.array([np.nan, 1.0]), True),
        (np.array([0.0, 1.0]), np.array([-0.0, 1.0]), False),
        (np.array([0.0, 1.0]), np.array([0.0, 1.0], dtype=np.float32), False),
        (np.array([0.0, 1.0]), np.array([[0.0, 1.0]]), False),
        (np.array(1.0), np.array(1.0), True),
    ],
    ids=["equal", "nan", "negative zero", "type", "shape", "scalar"],
)
def test_sameness_is_of_bytes(before: np.ndarray, after: np.ndarray, kept: bool):
    store = WeightStore()
    store.publish(single(0, before))
    store.publish(single(1, after))
    assert (store.refs(task(0, 0)).experts == store.refs(task(0, 1)).experts) is kept


def test_only_two_versions_are_kept_and_those_that_are_asked_for():
    store = WeightStore()
    for version in range(3):
        store.publish(weights(version))
    store.refs(task(0, 1))
    with pytest.raises(KeyError):
        store.refs(task(0, 0))
    store.publish(weights(3), keep=frozenset({1}))
    assert [store.refs(task(0, version)).shared for version in (1, 2, 3)]
    store.publish(weights(4))
    with pytest.raises(KeyError):
        store.refs(task(0, 1))


def test_fetched_arrays_are_shared_memory_that_refuses_writes():
    store = WeightStore()
    means = np.arange(100_000.0)
    published = single(0, np.arange(100_000.0))
    store.publish(Weights(version=0, shared=published.shared, experts=published.experts, means=means))
    refs = store.refs(task(0, 0, present=1))
    one, two = refs.fetch(), refs.fetch()
    key = ExpertKey(1, 0)
    assert list(one.experts) == [ExpertKey(0, 0), key]
    places = {mapping(os.getpid(), fetched.experts[key]["up"].ctypes.data)[0] for fetched in (one, two)}
    assert len(places) == 1, "each fetch made a copy"
    for array in (one.experts[key]["up"], one.shared["router"], one.means):
        assert array is not None
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert np.array_equal(one.means, means)


def test_private_weights_replace_objects_and_keep_theirs_while_unchanged():
    own = PersonalWeights(shared={"head": np.ones(2)}, experts={ExpertKey(0, 1): {"up": np.ones(2)}})
    store = WeightStore()
    store.publish(weights(0, personal={5: own}))
    store.publish(weights(1, personal={5: own}))
    private, public = store.refs(task(5, 1, personal=5)), store.refs(task(5, 1))
    assert {key for key in public.experts if private.experts[key] != public.experts[key]} == {ExpertKey(0, 1)}
    assert private.shared[-1] == store.refs(task(5, 0, personal=5)).shared[-1]
    assert set(private.fetch().shared) == {"router", "head"}
    assert store.refs(task(4, 1, personal=4)) == store.refs(task(4, 1)), "a client without private weights"


def test_what_is_small_travels_in_the_task_and_refuses_writes_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stored, "INLINE_BYTES", 64)
    small, large = np.arange(8.0), np.arange(9.0)
    store = WeightStore()
    store.publish(
        Weights(version=0, shared={"head": large}, experts={key: {"up": small} for key in list(SHAPE.keys())})
    )
    refs = store.refs(task(0, 0, present=1))
    assert not any(isinstance(ref, ray.ObjectRef) for ref in refs.experts.values())
    assert all(isinstance(ref, ray.ObjectRef) for ref in refs.shared)
    fetched = refs.fetch()
    assert np.array_equal(fetched.shared["head"], large)
    for expert in fetched.experts.values():
        assert np.array_equal(expert["up"], small)
        with pytest.raises(ValueError, match="read-only"):
            expert["up"][0] = 1
