"""Numbers in a ring: whatever clients send, sums neither wrap nor err more than is said."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfedmoe_ray.trust.secure.fixed_point import FixedPoint
from hfedmoe_ray.trust.secure.masks import ring_dtype

KINDS = st.builds(
    FixedPoint,
    ring=st.sampled_from([32, 64]),
    clients=st.integers(1, 10_000),
    bound=st.floats(1e-6, 1e9, allow_nan=False),
)


@given(KINDS, st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=20))
def test_no_number_is_larger_than_its_share_of_the_ring(kind: FixedPoint, values: list[float]):
    """So that n of them, in Python's own integers, stay in the ring."""
    sent, clipped = kind.encode(np.array([*values, kind.bound, -kind.bound]))
    signed = [int(one) for one in sent.view(f"<i{kind.ring // 8}")]
    assert all(abs(one) * kind.clients < 2 ** (kind.ring - 1) for one in signed)
    assert clipped == sum(abs(value) > kind.bound for value in values)
    assert signed[-2] * 2 >= kind.limit - 2, "half of the step would fit as well"


@given(KINDS, st.data())
def test_a_sum_errs_by_half_a_step_for_each_client(kind: FixedPoint, data: st.DataObject):
    count = min(kind.clients, 7)
    unit = st.floats(-1, 1)
    values = np.array(data.draw(st.lists(unit, min_size=count, max_size=count))) * kind.bound
    total = np.zeros(1, ring_dtype(kind.ring))
    for value in values:
        total += kind.encode(np.array([value]))[0]
    rounding = 0.5 * kind.step * count + 2.0 ** (-50) * kind.bound * count
    assert abs(kind.decode(total)[0] - sum(values)) <= rounding


def test_whole_numbers_are_exact_and_what_is_not_finite_is_refused():
    kind = FixedPoint(ring=32, clients=100, bound=1.0)
    sent, _ = kind.encode(np.ones(3))
    total = np.zeros(3, np.uint32)
    for _ in range(100):
        total += sent
    assert kind.decode(total).tolist() == [100.0] * 3
    with pytest.raises(ValueError, match="not finite"):
        kind.encode(np.array([1.0, np.nan]))
