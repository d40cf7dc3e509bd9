"""What is worked on ahead comes in order, is bounded, and ends with who asked for it."""

from contextlib import closing

import pytest

from hfedmoe_ray.federation.ahead import AHEAD, Ahead


def test_results_come_in_order_and_few_are_begun_before_they_are_wanted():
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item * item

    found = Ahead().in_order(work, range(10))
    for taken, result in enumerate(found, start=1):
        assert result == (taken - 1) ** 2
        assert len(begun) <= taken + AHEAD
    assert sorted(begun) == list(range(10))


def test_an_error_is_raised_in_its_place_and_nothing_is_begun_after_it():
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            raise KeyError(item)
        return item

    ahead = Ahead()
    with closing(ahead.in_order(work, range(10))) as found:
        assert next(found) == 0
        with pytest.raises(KeyError):
            next(found)
    assert len(begun) <= 2 + AHEAD
    assert list(ahead.in_order(str, range(3))) == ["0", "1", "2"], "the threads serve the next row"
