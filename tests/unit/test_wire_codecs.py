"""Codecs: how far a number may be off, the same bits on both sides, and parts that cannot be such an array."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.wire import Wire
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.wire.codecs import BF16, FP16, GROUP, Codec, Int8, TopK, build_codec, from_bf16, to_bf16

SHAPES = [(96, 384), (384, 96), (3, 5, 8), (40, 8), (7,), (1,), ()]
ALL: list[Codec] = [BF16(), FP16(), Int8(), TopK(0.1)]


def changes(shape, scale=1e-4, seed=0):
    return np.asarray(np.random.default_rng(seed).normal(size=shape) * scale, dtype=np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-38, 1e-8, 1e-4, 1e30])
def test_numbers_come_back_within_the_precision_of_their_codec(shape, scale):
    values = changes(shape, scale)
    error = {type(codec): np.abs(codec.decode(codec.encode(values), shape) - values) for codec in ALL}
    smallest = np.finfo(np.float32).smallest_subnormal
    assert (error[BF16] <= np.abs(values) * 2**-8 + 2**-133).all()
    assert (error[FP16] <= np.abs(values) * 2**-11 + np.abs(values).max() * 2**-24 + smallest).all()
    rows = values.reshape(-1, values.shape[-1]) if shape else values.reshape(1, 1)
    if rows.shape[1] >= GROUP:
        largest = np.abs(rows).max(axis=1, keepdims=True)
        assert (error[Int8].reshape(rows.shape) <= largest / 254 * (1 + 1e-6) + 128 * smallest).all()
    assert (error[Int8] <= np.abs(values).max() / 254 * (1 + 1e-6) + 128 * smallest).all()


def test_bfloat16_rounds_as_torch_does():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    special = np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45, 1.00390625, 1.01171875])
    values = np.concatenate([bits.view(np.float32), special])
    theirs = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(from_bf16(to_bf16(values)), theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("codec", ALL, ids=lambda codec: type(codec).__name__)
def test_nothing_comes_back_as_nothing_and_the_shape_is_kept(codec: Codec, shape):
    back = codec.decode(codec.encode(np.zeros(shape, np.float32)), shape)
    assert back.shape == shape
    assert back.dtype == np.float32
    assert not back.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", ALL, ids=lambda codec: type(codec).__name__)
def test_a_diverged_tensor_is_never_mistaken_for_a_good_one(codec: Codec, bad):
    values = changes((4, 200))
    values[1, 7] = bad
    try:
        back = codec.decode(codec.encode(values), values.shape)
    except ValueError:
        return
    assert not np.isfinite(back).all()


def test_the_largest_numbers_are_sent_exactly_and_ties_go_to_the_first():
    values = np.float32([[1, -3, 0, 2], [-2, 0, 2, 1]])
    sent = TopK(0.5).encode(values)
    assert sent["places"].tolist() == [1, 3, 4, 6]
    assert sent["values"].tolist() == [-3, 2, -2, 2]
    assert TopK(0.375).encode(values)["places"].tolist() == [1, 3, 4]
    assert TopK(1.0).encode(values)["places"].size == 6, "a number that did not change is not sent"
    assert TopK(0.01).encode(values)["places"].tolist() == [1], "at least one"


@pytest.mark.parametrize("shape", [(96, 384), (384, 96), (1024, 8), (384, 16)])
def test_bytes_are_about_as_predicted(shape):
    values = changes(shape)
    for codec in ALL:
        sent = sum(part.nbytes for part in codec.encode(values).values())
        assert sent <= values.size * codec.bytes_per_number + 4
    assert Int8().bytes_per_number / 4 < 0.27


def test_every_precision_of_the_configuration_has_its_codec():
    made = {upload: build_codec(Wire(upload=upload)) for upload in ("fp32", "bf16", "fp16", "int8", "topk")}
    assert made["fp32"] is None
    assert [type(codec) for codec in list(made.values())[1:]] == [BF16, FP16, Int8, TopK]


HALF, SCALE = np.zeros((2, 3), np.float16), np.ones(1, np.float32)
EIGHT, PLACES, VALUES = np.zeros((2, 3), np.int8), np.uint32([0, 5]), np.float32([1, 2])


@pytest.mark.parametrize(
    ("codec", "parts", "told"),
    [
        (BF16(), {}, "parts none"),
        (BF16(), {"bf16": np.zeros((2, 3), np.int16)}, "int16"),
        (BF16(), {"bf16": np.zeros((2, 3), np.float32)}, "float32"),
        (BF16(), {"bf16": np.zeros((3, 2), np.uint16)}, r"\[3, 2\]"),
        (FP16(), {"fp16": HALF}, "parts fp16, not fp16, scale"),
        (FP16(), {"fp16": HALF, "scale": SCALE, "more": SCALE}, "more"),
        (FP16(), {"fp16": HALF, "scale": SCALE * np.nan}, "scale"),
        (FP16(), {"fp16": HALF, "scale": np.ones(2, np.float32)}, r"\[2\]"),
        (Int8(), {"int8": EIGHT, "scale": -SCALE}, "scale is negative"),
        (Int8(), {"int8": EIGHT, "scale": SCALE * np.inf}, "infinite"),
        (Int8(), {"int8": EIGHT, "scale": np.ones(1, np.float64)}, "float64"),
        (Int8(), {"int8": EIGHT.astype(np.uint8), "scale": SCALE}, "uint8"),
        (Int8(), {"int8": EIGHT, "scale": np.ones((1, 1), np.float32)}, r"\[1, 1\]"),
        (TopK(0.1), {"places": PLACES}, "parts places"),
        (TopK(0.1), {"places": PLACES, "values": VALUES[:1]}, r"places is uint32 \[2\]"),
        (TopK(0.1), {"places": PLACES.astype(np.int64), "values": VALUES}, "int64"),
        (TopK(0.1), {"places": PLACES.astype(np.float32), "values": VALUES}, "float32"),
        (TopK(0.1), {"places": np.uint32([0, 6]), "values": VALUES}, "below 6"),
        (TopK(0.1), {"places": np.uint32([0, 2**32 - 1]), "values": VALUES}, "below 6"),
        (TopK(0.1), {"places": np.uint32([3, 3]), "values": VALUES}, "increasing"),
        (TopK(0.1), {"places": np.uint32([3, 1]), "values": VALUES}, "increasing"),
        (TopK(0.1), {"places": PLACES.reshape(1, 2), "values": VALUES.reshape(1, 2)}, r"\[1, 2\]"),
    ],
)
def test_parts_that_are_no_such_array_are_refused_in_words(codec: Codec, parts, told):
    with pytest.raises(ValueError, match=told):
        codec.decode(parts, (2, 3))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"share": 0.1}, "share belongs to `upload: topk`"),
        ({"upload": "int8", "share": 0.1}, "int8 sends every number"),
        ({"error_feedback": True}, "fp32 loses nothing"),
        ({"upload": "topk", "share": 0.0}, "greater than 0"),
        ({"upload": "int4"}, "'fp32', 'bf16'"),
    ],
)
def test_a_wire_that_makes_no_sense_is_refused_with_what_to_write(keys, told):
    with pytest.raises(ValueError, match=told):
        Wire.model_validate(keys)


def test_nothing_is_owed_of_factors_that_the_server_makes_anew(quickstart: Path):
    topk, lora = "wire.upload=topk", "model.lora.rank=4"
    with pytest.raises(ConfigError, match=r"write `model\.lora\.average: factors` or `wire\.error_feedback: false`"):
        load_experiment(quickstart, [topk, lora])
    for remedy in ("model.lora.average=factors", "wire.error_feedback=false"):
        load_experiment(quickstart, [topk, lora, remedy])


def test_error_feedback_comes_with_topk_and_on_request():
    assert Wire(upload="topk").feeds_back
    assert not Wire(upload="topk", error_feedback=False).feeds_back
    assert not Wire(upload="int8").feeds_back
    assert Wire(upload="int8", error_feedback=True).feeds_back
