"""How the change of a tensor is written in fewer bytes, and read back by the server to the very same numbers.

A codec turns an fp32 array into a few named arrays and back. What it is given is never a weight but the change of one
since the published version, which is small: a number of 8 bits then errs by a share of the step, not of the weight.
Reading trusts nothing: every part must have the type and size that follow from the shape of the published tensor.

All of this is elementwise IEEE arithmetic in NumPy, so client and server get the same bits on any machine.
Legend: N numbers in a tensor, G groups of numbers that share a scale.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import ceil, prod

import numpy as np

from hfedmoe_ray.config.wire import Wire
from hfedmoe_ray.types import Array

Parts = Mapping[str, Array]
"""The arrays that stand for one tensor, by a short name."""
Shape = tuple[int, ...]
GROUP = 128
"""int8: rows shorter than this share a scale with their neighbours, or the scales would outweigh what they save."""
_BF16_NAN = 0x7FC0


class Codec(ABC):
    """A way to write fp32 numbers in fewer bytes. Lossy; `decode(encode(x))` is what the receiver will have."""

    bytes_per_number: float
    """Bytes on the wire for each number of a tensor, about: for predictions."""

    @abstractmethod
    def most_bytes(self, shape: Shape) -> int:
        """The most that the parts of a tensor of a shape can weigh."""

    @abstractmethod
    def encode(self, values: Array) -> dict[str, Array]:
        """Returns the parts of fp32 `values`. NaN and infinity are written so that `decode` or its caller sees them."""

    @abstractmethod
    def decode(self, parts: Parts, shape: Shape) -> Array:
        """Returns fp32 values of a shape.

        Raises:
            ValueError: The parts are not those of such an array.
        """


def build_codec(wire: Wire) -> Codec | None:
    """The codec of a configuration; None for fp32, where tensors are sent as they are."""
    match wire.upload:
        case "fp32":
            return None
        case "bf16":
            return BF16()
        case "fp16":
            return FP16()
        case "int8":
            return Int8()
        case "topk":
            return TopK(wire.kept_share)


def to_bf16(values: Array) -> Array:
    """Returns fp32 numbers rounded to bfloat16, to nearest and ties to even, as uint16 (NumPy has no bfloat16)."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), _BF16_NAN, rounded).astype(np.uint16)


def from_bf16(values: Array) -> Array:
    """Inverse of `to_bf16`, exact."""
    return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)


class BF16(Codec):
    """The upper half of every number: 8 bits of precision at any magnitude."""

    bytes_per_number = 2.0

    def most_bytes(self, shape: Shape) -> int:
        """See `Codec.most_bytes`."""
        return 2 * prod(shape)

    def encode(self, values: Array) -> dict[str, Array]:
        """See `Codec.encode`."""
        return {"bf16": to_bf16(values)}

    def decode(self, parts: Parts, shape: Shape) -> Array:
        """See `Codec.decode`."""
        _expect(parts, {"bf16": (np.uint16, shape)})
        return from_bf16(parts["bf16"])


class FP16(Codec):
    """Half precision, 11 bits, of numbers divided by the power of two that brings the tensor's largest near 1.

    Without it the changes of a small learning rate would fall below half precision's smallest number.
    """

    bytes_per_number = 2.0

    def most_bytes(self, shape: Shape) -> int:
        """See `Codec.most_bytes`."""
        return 2 * prod(shape) + 4

    def encode(self, values: Array) -> dict[str, Array]:
        """See `Codec.encode`."""
        _, exponent = np.frexp(np.abs(values).max(initial=0.0))
        scale = np.float32(np.ldexp(1.0, int(exponent) - 1)) if np.isfinite(values).all() else np.float32(np.nan)
        return {"fp16": np.asarray(values / scale, dtype=np.float16), "scale": np.array([scale])}

    def decode(self, parts: Parts, shape: Shape) -> Array:
        """See `Codec.decode`."""
        _expect(parts, {"fp16": (np.float16, shape), "scale": (np.float32, (1,))})
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is the receiver's to see
            values: Array = parts["fp16"].astype(np.float32) * _checked_scale(parts["scale"])
        return values.reshape(shape)


class Int8(Codec):
    """8 bits a number and one fp32 scale for each row (last axis), short rows taken together: max |row| is 127."""

    bytes_per_number = 1.0 + 4.0 / GROUP

    def most_bytes(self, shape: Shape) -> int:
        """See `Codec.most_bytes`."""
        return prod(shape) + 4 * ceil(prod(shape) / _group_size(shape))

    def encode(self, values: Array) -> dict[str, Array]:
        """See `Codec.encode`."""
        flat = values.reshape(-1)
        size = _group_size(values.shape)
        scale = np.maximum.reduceat(np.abs(flat), np.arange(0, flat.size, size)) / np.float32(127)  # [G]
        divisor = np.repeat(np.where(scale > 0, scale, np.float32(1)), size)[: flat.size]
        with np.errstate(invalid="ignore"):  # NaN or infinity: the scale tells the receiver
            levels = np.clip(np.rint(flat / divisor), -127, 127).astype(np.int8)
        return {"int8": levels.reshape(values.shape), "scale": scale}

    def decode(self, parts: Parts, shape: Shape) -> Array:
        """See `Codec.decode`."""
        size, count = _group_size(shape), prod(shape)
        _expect(parts, {"int8": (np.int8, shape), "scale": (np.float32, (ceil(count / size),))})
        scale = np.repeat(_checked_scale(parts["scale"]), size)[:count]
        with np.errstate(over="ignore"):  # what is not finite is the receiver's to see
            values: Array = parts["int8"].astype(np.float32) * scale.reshape(shape)
        return values


class TopK(Codec):
    """The numbers of largest magnitude of each tensor, exact, with their places; the others count as 0."""

    def __init__(self, share: float) -> None:
        """Sends a share of each tensor's numbers, at least one."""
        self.share = share
        self.bytes_per_number = share * 8.0

    def most_bytes(self, shape: Shape) -> int:
        """See `Codec.most_bytes`."""
        return 8 * self._count(prod(shape))

    def encode(self, values: Array) -> dict[str, Array]:
        """See `Codec.encode`. Of equal magnitudes the first are sent; numbers that are 0 never are."""
        flat = values.reshape(-1)
        magnitude = np.where(np.isfinite(flat), np.abs(flat), np.inf)
        count = self._count(flat.size)
        least = np.partition(magnitude, flat.size - count)[flat.size - count]
        larger = np.flatnonzero(magnitude > least)
        equal = np.flatnonzero((magnitude == least) & (magnitude > 0))[: count - larger.size]
        places = np.sort(np.concatenate([larger, equal])).astype(np.uint32)
        return {"places": places, "values": flat[places]}

    def decode(self, parts: Parts, shape: Shape) -> Array:
        """See `Codec.decode`."""
        places, values = parts.get("places", np.empty(0)), parts.get("values", np.empty(0))
        size, total = (min(places.size, values.size),), prod(shape)
        _expect(parts, {"places": (np.uint32, size), "values": (np.float32, size)})
        if places.size and (places[-1] >= total or (places[1:] <= places[:-1]).any()):
            raise ValueError(f"the places are not increasing numbers below {total}")
        if places.size > self._count(total):
            raise ValueError(f"{places.size} numbers are sent, more than {self._count(total)}")
        result = np.zeros(total, dtype=np.float32)
        result[places] = values
        return result.reshape(shape)

    def _count(self, total: int) -> int:
        """Numbers sent of so many, at most."""
        return max(1, int(self.share * total))


def _group_size(shape: Shape) -> int:
    """Numbers that share a scale: whole rows, as many as reach `GROUP`."""
    row = shape[-1] if shape else 1
    return row * ceil(GROUP / row)


def _checked_scale(scale: Array) -> Array:
    if not (np.isfinite(scale) & (scale >= 0)).all():
        raise ValueError("a scale is negative, NaN or infinite")
    return scale


def _expect(parts: Parts, expected: Mapping[str, tuple[type[np.generic], Shape]]) -> None:
    if parts.keys() != expected.keys():
        raise ValueError(f"it has the parts {', '.join(sorted(parts)) or 'none'}, not {', '.join(sorted(expected))}")
    for name, (dtype, shape) in expected.items():
        part = parts[name]
        if part.dtype != dtype or part.shape != shape:
            raise ValueError(f"{name} is {part.dtype} {list(part.shape)}, not {np.dtype(dtype)} {list(shape)}")
