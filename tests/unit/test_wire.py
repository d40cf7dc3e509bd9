"""What travels: exact round trips, and clear refusals of everything else."""

import dataclasses
import math

import numpy as np
import pytest
from safetensors.numpy import save

from hfedmoe_ray.types import ClientMetrics, ExpertKey, RoutingProfile
from hfedmoe_ray.wire import checksum, dump_metrics, pack_update, parse_metrics, unpack_update

PROFILE = RoutingProfile(
    usage=np.full((1, 2), 0.5), specific=np.ones((1, 2)), kl=np.zeros((1, 2)), routed=np.array([[3.0, 4.0]]), tokens=7
)
METRICS = ClientMetrics(
    client=4, round=2, kind="train", samples=9, tokens=7, loss=0.5, trained={"0.1": 3}, before={"0.1": "a"}
)


def test_an_update_comes_back_bit_for_bit():
    experts = {ExpertKey(0, 1): {"up.weight": np.float32([[1.5, -0.0]]), "down": np.float32([np.pi])}}
    shared = {"layer.0.gate.weight": np.float32([1e-38, 3.0])}
    payload = pack_update(experts, shared, PROFILE, {ExpertKey(0, 0): np.float32([1, 2])})
    update = unpack_update(payload, METRICS)
    assert checksum(update.experts[ExpertKey(0, 1)]) == checksum(experts[ExpertKey(0, 1)])
    assert checksum(update.shared) == checksum(shared)
    assert update.trained == {ExpertKey(0, 1): 3}
    mean, tokens = update.means[ExpertKey(0, 0)]
    assert (mean == [1, 2]).all()
    assert tokens == 3
    assert update.profile is not None
    assert (update.profile.routed == PROFILE.routed).all()
    assert update.profile.tokens == 7
    assert update.payload_bytes == len(payload)


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        (b"", "safetensors"),
        (b"\x80\x04pickle", "safetensors"),
        (save({"surprise.x": np.zeros(1)}), "unknown entry"),
        (save({"expert.0.x.w": np.zeros(1)}), "invalid literal"),
        (save({"profile.usage": np.zeros((1, 2))}), "routing profile"),
    ],
)
def test_anything_else_is_a_value_error(payload, told):
    with pytest.raises(ValueError, match=told):
        unpack_update(payload, METRICS)


def test_metrics_come_back_equal_and_a_loss_that_is_no_number_survives_as_one():
    assert parse_metrics(dump_metrics(METRICS)) == METRICS
    broken = dataclasses.replace(METRICS, loss=math.nan)
    assert b"NaN" not in dump_metrics(broken)
    assert math.isnan(parse_metrics(dump_metrics(broken)).loss)


def test_a_checksum_sees_names_and_bits_but_not_order():
    one, two = np.float32([1, 2]), np.float32([3])
    assert checksum({"a": one, "b": two}) == checksum({"b": two, "a": one})
    assert checksum({"a": one}) != checksum({"c": one})
    assert checksum({"a": np.float32([0.0])}) != checksum({"a": np.float32([-0.0])})
