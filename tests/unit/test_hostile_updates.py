"""What clients may send: nothing ends in another error than a rejection, and nothing malformed is accepted.

The mutations, and the second opinion on what they make, are those of `hfedmoe bench fuzz`, which tries 100 000.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.extra import numpy as hnp

from hfedmoe_ray.trust.foreign_text import MOST_SHOWN, one_line, printable
from hfedmoe_ray.trust.limits import most_payload_bytes, most_state_bytes
from hfedmoe_ray.wire import build_codec, parse_metrics
from hfedmoe_ray.wire.tensors import read_tensors

sys.path.append(str(Path(__file__).parents[2] / "jobs" / "benchmark"))
from fuzz import Tally
from fuzzing.cases import WIRES, Case, cases, receive
from fuzzing.mutations import MUTATIONS, mutated
from fuzzing.oracle import flaw

CASES = cases()
CODECS = [codec for wire in WIRES.values() if (codec := build_codec(wire)) is not None]
PARTS = ("bf16", "fp16", "int8", "scale", "places", "values", "")
KINDS = [np.dtype(one) for one in ("<u2", "<f2", "<f4", "<f8", "<i1", "<u4", "<i8")]
thoroughly = settings(deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
quickly = settings(thoroughly, max_examples=400)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_an_honest_answer_is_accepted_and_weighs_no_more_than_it_can(case: Case):
    assert receive(case, case.honest) == ""
    assert flaw(case, case.honest) == ""
    trains = case.task.kind == "train"
    most = most_payload_bytes(case.task.plan, case.weights, case.wire, case.signals, trains=trains)
    assert len(case.honest.payload) <= most <= 4 * len(case.honest.payload)
    assert case.honest.state_bytes <= most_state_bytes(case.weights, case.wire)
    for stale in (case.earlier, case.other):
        assert "answers for client" in receive(case, stale)


@thoroughly
@given(st.sampled_from(CASES), st.randoms(use_true_random=False))
def test_a_spoilt_answer_is_judged_as_its_bytes_deserve(case: Case, chance: random.Random):
    names, sent = mutated(case, chance)
    reason, wrong = receive(case, sent), flaw(case, sent)
    assert bool(reason) == bool(wrong), (names, reason, wrong)


def test_every_mutation_spoils_something_but_those_that_should_not():
    tally, chance = Tally(), random.Random(0)
    for case in CASES:
        for name, mutation in MUTATIONS.items():
            for _ in range(4):
                tally.judge(case, [name], mutation(case, case.honest, chance))
    assert not tally.wrong
    for name, tried in tally.by_mutation.items():
        harmless = name in ("nothing", "other order", "trained further")
        assert (tally.accepted[name] == tried) == harmless, name


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@quickly
@given(
    st.binary(max_size=300)
    | st.dictionaries(st.sampled_from(["client", "trained", "loss", "x"]), nested).map(json.dumps)
)
def test_metrics_that_are_none_are_a_value_error(data: bytes | str):
    with pytest.raises(ValueError):
        parse_metrics(data if isinstance(data, bytes) else data.encode(errors="replace"))


@quickly
@given(st.binary(max_size=200), st.integers(0, 80))
def test_bytes_that_are_no_tensors_are_a_value_error(data: bytes, length: int):
    for payload in (data, length.to_bytes(8, "little") + data):
        try:
            read_tensors(payload)
        except ValueError:
            continue


def arrays() -> st.SearchStrategy[np.ndarray]:
    return st.sampled_from(KINDS).flatmap(
        lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=8))
    )


@quickly
@given(
    st.sampled_from(CODECS),
    st.dictionaries(st.sampled_from(PARTS), arrays(), max_size=3),
    hnp.array_shapes(min_dims=0, max_dims=2, max_side=8),
)
def test_whatever_the_parts_a_codec_makes_an_array_of_that_shape_or_a_value_error(codec, parts, shape):
    try:
        decoded = codec.decode(parts, shape)
    except ValueError:
        return
    assert (decoded.dtype, decoded.shape) == (np.float32, shape)
    assert sum(part.nbytes for part in parts.values()) <= codec.most_bytes(shape)


@quickly
@given(st.sampled_from(CODECS), hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=40)))
def test_what_a_codec_writes_weighs_no_more_than_it_says(codec, values):
    with np.errstate(all="ignore"):
        parts = codec.encode(values)
    assert sum(part.nbytes for part in parts.values()) <= codec.most_bytes(values.shape)


def hostile_texts() -> Iterator[str]:
    yield "\x1b]0;owned\x07\x1b[2J wiped"
    yield "two\nlines\r\nof \u202etext"
    yield "x" * 10**7


@pytest.mark.parametrize("text", hostile_texts(), ids=["escapes", "lines", "long"])
def test_text_of_clients_is_one_short_line(text: str):
    shown = one_line(text)
    assert shown.isprintable()
    assert len(shown) <= MOST_SHOWN + 1
    lines = printable(text[:1000])
    assert all(line.isprintable() for line in lines.split("\n"))
    assert lines.count("\n") == text.count("\n")
