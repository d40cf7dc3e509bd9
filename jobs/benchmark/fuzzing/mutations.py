"""Ways to spoil an answer, or to change it without harm: bytes, headers, tensors, metrics, and whose answer it is.

Every mutation is a function of an honest answer and a source of chance. Most do one thing wrong and leave the rest
right, so that they get far into the checks; after one that changes tensors, checksums are often made to fit again.
"""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fuzzing.cases import CLASSES, EXPERTS, HIDDEN, LAYERS, Case, Sent
from hfedmoe_ray.types import Array
from hfedmoe_ray.wire import checksum, dump_metrics, expert_name, parse_metrics, read_upload

Mutation = Callable[[Case, Sent, Random], Sent]
MUTATIONS: dict[str, Mutation] = {}
"""By name."""
ODD_NUMBERS = (-1, 0, 1, 2, 3, 4, 50, 51, 1000, 1001, 2**31, 2**53, 2**63, 10**18, 10**400, -(2**63), -0.0, 1.5, 1e308)
ODD_VALUES: tuple[Any, ...] = (None, True, "", "1", [], {}, [[]], "0.0", "\ud800", *ODD_NUMBERS)
ODD_FLOATS = (math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 0.5, 1.0, 1.02, 1e-45, 3e4, 1e6, 2e6, 1e30, 3e38)
ODD_TEXTS = ("NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "[" * 5000, "\x00", "1E1", "01", "0x1")
ALIASES = ("00.0", "0.00", "+0.0", "0.0 ", "0._0", "-1.0", "0.-1", "٠.٠", "0.0.0", "0", "9.9", "0.2", "1.2", "", "0.1")
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U32", "U16", "I8", "U8", "BOOL", "C64", "F8_E4M3", "f32", 3, None)
KINDS: tuple[Any, ...] = tuple(np.dtype(one) for one in ("<f8", "<f4", "<f2", "<i8", "<u4", "<u2", "<i1", "?", "<c8"))


def mutation(function: Mutation) -> Mutation:
    """Registers a mutation under its name."""
    MUTATIONS[function.__name__.replace("_", " ")] = function
    return function


def mutated(case: Case, chance: Random, most: int = 3) -> tuple[list[str], Sent]:
    """An honest answer after one to `most` mutations, and their names."""
    names = [chance.choice(list(MUTATIONS)) for _ in range(1 if chance.random() < 0.7 else chance.randint(1, most))]
    sent = MUTATIONS[names[0]](case, case.honest, chance)
    done = names[:1]
    for name in names[1:]:
        try:
            sent = MUTATIONS[name](case, sent, chance)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError):
            continue  # those before have left nothing that this one could change
        done.append(name)
    return done, sent


# -------------------------------------------------------------------------------------------------- without harm


@mutation
def nothing(_case: Case, sent: Sent, _chance: Random) -> Sent:
    """As it was."""
    return sent


@mutation
def other_order(_case: Case, sent: Sent, chance: Random) -> Sent:
    """The same tensors and metrics, written in another order."""
    metrics = list(_metrics(sent).items())
    chance.shuffle(metrics)
    parsed = _split(sent.payload)
    if parsed is None:
        return sent
    header, data = list(parsed.header.items()), parsed.data
    chance.shuffle(header)
    return replace(sent, body=json.dumps(dict(metrics)).encode(), payload=_joined(dict(header), data))


@mutation
def trained_further(case: Case, sent: Sent, chance: Random) -> Sent:
    """Other numbers, as honest as the first, with checksums that fit."""

    def change(name: str, value: Array) -> Array:
        if value.dtype == np.float32 and name.startswith(("expert.", "shared.", "mean.")) and "scale" not in name:
            return value + np.float32(chance.choice([0.0, 1e-3, 0.1, 1.0]))
        return value

    return _signed(case, _with_tensors(sent, change))


# -------------------------------------------------------------------------------------------------------- bytes


@dataclass(frozen=True)
class _Half:
    """One of the two byte strings of an answer."""

    name: str

    def of(self, sent: Sent) -> bytes:
        value: bytes = getattr(sent, self.name)
        return value

    def put(self, sent: Sent, value: bytes) -> Sent:
        return replace(sent, payload=value) if self.name == "payload" else replace(sent, body=value)


def _half(chance: Random) -> _Half:
    return _Half(chance.choice(["payload", "payload", "body"]))


@mutation
def flipped_bits(_case: Case, sent: Sent, chance: Random) -> Sent:
    """A few bits are others, anywhere or in what says how long things are."""
    half = _half(chance)
    data = bytearray(half.of(sent))
    end = min(len(data), chance.choice([8, 400, len(data)]))
    for _ in range(chance.choice([1, 1, 2, 8])):
        if end:
            data[chance.randrange(end)] ^= 1 << chance.randrange(8)
    return half.put(sent, bytes(data))


@mutation
def cut(_case: Case, sent: Sent, chance: Random) -> Sent:
    """The end is missing, or the beginning, or all."""
    half = _half(chance)
    data = half.of(sent)
    place = chance.randint(0, len(data))
    return half.put(sent, chance.choice([data[:place], data[place:], data[:-1], b""]))


@mutation
def longer(_case: Case, sent: Sent, chance: Random) -> Sent:
    """There is more than there should be."""
    half = _half(chance)
    data = half.of(sent)
    extra = chance.choice([b"\0", b" ", b"{}", bytes(64), chance.randbytes(20), data])
    place = chance.choice([len(data), chance.randint(0, len(data))])
    return half.put(sent, data[:place] + extra + data[place:])


@mutation
def noise(_case: Case, sent: Sent, chance: Random) -> Sent:
    """Bytes of nothing."""
    return _half(chance).put(sent, chance.randbytes(chance.choice([0, 1, 7, 8, 9, 64, 500])))


@mutation
def pickled(_case: Case, sent: Sent, chance: Random) -> Sent:
    """What pickle would run, were it asked to."""
    return _half(chance).put(sent, b"cbuiltins\neval\n(S'1/0'\ntR.")


@mutation
def spliced(case: Case, sent: Sent, chance: Random) -> Sent:
    """The beginning of one answer and the end of another."""
    half = _half(chance)
    other = half.of(chance.choice([case.earlier, case.other]))
    place = chance.randint(0, len(other))
    return half.put(sent, half.of(sent)[:place] + other[place:])


@mutation
def wrong_length(_case: Case, sent: Sent, chance: Random) -> Sent:
    """The header is said to be of another length."""
    (length,) = struct.unpack("<Q", sent.payload[:8].ljust(8, b"\0"))
    length = chance.choice([0, 1, length - 1, length + 1, len(sent.payload), 2**32, 2**63, 2**64 - 1])
    return replace(sent, payload=struct.pack("<Q", length % 2**64) + sent.payload[8:])


# ------------------------------------------------------------------------------------------------------- replay


@mutation
def replayed(case: Case, sent: Sent, chance: Random) -> Sent:
    """An answer, or half of one, of the round before or of another client."""
    other = chance.choice([case.earlier, case.other])
    return chance.choice([other, replace(sent, payload=other.payload), replace(sent, body=other.body)])


@mutation
def larger_state(_case: Case, sent: Sent, chance: Random) -> Sent:
    """It gives the server more to keep for it."""
    return replace(sent, state_bytes=chance.choice([1, 8, 10**5, 10**12]))


# ------------------------------------------------------------------------------------------------------- header


@dataclass
class _Parsed:
    header: dict[str, Any]
    data: bytes


def _split(payload: bytes) -> _Parsed | None:
    """Header and data of a payload that still has them."""
    try:
        (length,) = struct.unpack("<Q", payload[:8])
        header = json.loads(payload[8 : 8 + length])
        return _Parsed(header, payload[8 + length :]) if isinstance(header, dict) and header else None
    except (ValueError, struct.error, OverflowError, RecursionError):
        return None


def _joined(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@mutation
def edited_header(_case: Case, sent: Sent, chance: Random) -> Sent:
    """A type, shape, place or field of one entry is another."""
    parsed = _split(sent.payload)
    if parsed is None:
        return sent
    name = chance.choice(list(parsed.header))
    entry = parsed.header[name]
    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        return sent
    shape, span = list(entry["shape"]), list(entry.get("data_offsets", [0, 0]))
    match chance.randrange(7):
        case 0:
            entry["dtype"] = chance.choice(DTYPES)
        case 1:
            entry["shape"] = chance.choice(
                [shape[::-1], [1, *shape], [math.prod(shape)], [], [*shape, 0], [-1], [2**62]]
            )
        case 2:
            entry["data_offsets"] = [n + chance.choice([-4, -1, 0, 1, 4, 2**40]) for n in span]
        case 3:
            entry[chance.choice(["more", "dtype ", "Shape"])] = chance.choice(ODD_VALUES[:9])
        case 4:
            del entry[chance.choice(list(entry))]
        case 5:
            entry[chance.choice(list(entry))] = chance.choice(ODD_VALUES[:9])
        case _:
            parsed.header[name] = chance.choice(ODD_VALUES[:9])
    return replace(sent, payload=_joined(parsed.header, parsed.data))


@mutation
def overlapping(_case: Case, sent: Sent, chance: Random) -> Sent:
    """Two entries lie at the same place."""
    parsed = _split(sent.payload)
    if parsed is None or not all(isinstance(one, dict) for one in parsed.header.values()):
        return sent
    one, other = chance.choice(list(parsed.header)), chance.choice(list(parsed.header))
    parsed.header[one] = parsed.header[one] | {"data_offsets": parsed.header[other].get("data_offsets")}
    return replace(sent, payload=_joined(parsed.header, parsed.data))


@mutation
def header_text(_case: Case, sent: Sent, chance: Random) -> Sent:
    """An entry stands twice, or the header is not what a header is."""
    parsed = _split(sent.payload)
    if parsed is None:
        return sent
    text = json.dumps(parsed.header).encode()
    name = chance.choice(list(parsed.header))
    twice = json.dumps({name: parsed.header[name]}).encode()[:-1] + b"," + text[1:]
    meta = b'{"__metadata__":{"format":"pt"},' + text[1:]
    spaces = text + b" " * chance.choice([1, 8, 10**6])
    other = chance.choice(
        [b"[" * 3000, b'{"a":' * 3000, b"[]", b"null", b"{}", b"\xff" + text, text.decode().encode("utf-16")]
    )
    return replace(sent, payload=_joined(chance.choice([twice, twice, meta, spaces, other]), parsed.data))


@mutation
def renamed(_case: Case, sent: Sent, chance: Random) -> Sent:
    """An entry has another name: another spelling of its expert, another expert, another kind."""
    parsed = _split(sent.payload)
    if parsed is None:
        return sent
    name = chance.choice(list(parsed.header))
    words = name.split(".")
    other = chance.choice(list(parsed.header))
    new = chance.choice(
        [
            ".".join([words[0], chance.choice(ALIASES), *words[3:]]),
            f"{name}:x",
            name.rpartition(":")[0],
            f"{name}.x",
            other,
            "surprise",
            "prototype.sums",
            "signal.loss",
            "signal.surprise",
            "profile.tokens",
            "",
        ]
    )
    header = {new if one == name else one: entry for one, entry in parsed.header.items()}
    return replace(sent, payload=_joined(header, parsed.data))


# ------------------------------------------------------------------------------------------------------ tensors


def _tensors(sent: Sent) -> dict[str, Array]:
    """Of a payload that can still be read; else none."""
    try:
        return dict(sorted(load(sent.payload).items()))  # the library has them in another order each time
    except (SafetensorError, KeyError, ValueError, OverflowError, MemoryError):  # an earlier mutation has spoilt it
        return {}


def _with_tensors(sent: Sent, change: Callable[[str, Array], Array]) -> Sent:
    tensors = _tensors(sent)
    if not tensors:
        return sent
    with np.errstate(all="ignore"):
        return replace(sent, payload=_saved({name: change(name, value) for name, value in tensors.items()}))


def _saved(tensors: dict[str, Array]) -> bytes:
    return save({name: np.ascontiguousarray(value) for name, value in tensors.items()})


def _signed(case: Case, sent: Sent) -> Sent:
    """The answer with checksums of what it holds now, as a client would compute that means to be believed."""
    try:
        metrics = parse_metrics(sent.body)
        with np.errstate(all="ignore"):
            update = read_upload(sent.payload, metrics, case.wire, case.weights)
    except (ValueError, TypeError):
        return sent
    found = {expert_name(key): checksum(tensors) for key, tensors in update.experts.items()}
    fields: dict[str, Any] = {"rebuilt": found} if case.wire.lossy else {"after": {**metrics.after, **found}}
    return replace(sent, body=dump_metrics(replace(metrics, **fields)))


def _maybe_signed(case: Case, sent: Sent, chance: Random) -> Sent:
    return _signed(case, sent) if chance.random() < 0.7 else sent


@mutation
def odd_numbers(case: Case, sent: Sent, chance: Random) -> Sent:
    """A number of a tensor, or all, is NaN, infinite, huge, negative."""
    tensors = _tensors(sent)
    if not tensors:
        return sent
    chosen = chance.choice(list(tensors))
    number, place, everywhere = chance.choice(ODD_FLOATS), chance.random(), chance.random() < 0.3

    def change(name: str, value: Array) -> Array:
        if name != chosen or not value.size:
            return value
        changed = value.copy()
        with np.errstate(all="ignore"):
            if everywhere:
                changed[...] = np.asarray(number).astype(value.dtype)
            else:
                changed.reshape(-1)[int(place * value.size)] = np.asarray(number).astype(value.dtype)
        return changed

    return _maybe_signed(case, _with_tensors(sent, change), chance)


@mutation
def scaled(case: Case, sent: Sent, chance: Random) -> Sent:
    """All numbers of a kind are so many times what they were."""
    kind = chance.choice(["expert", "shared", "mean", "profile", "signal", "prototype", "profile.tokens"])
    factor = chance.choice([-1.0, 0.0, 0.5, 1.005, 1.5, 30.0, 1e3, 1e9, 1e30])

    def change(name: str, value: Array) -> Array:
        return (value * factor).astype(value.dtype) if name.startswith(kind) else value

    return _maybe_signed(case, _with_tensors(sent, change), chance)


@mutation
def other_form(case: Case, sent: Sent, chance: Random) -> Sent:
    """A tensor of another shape or type."""
    tensors = _tensors(sent)
    if not tensors:
        return sent
    chosen, kind = chance.choice(list(tensors)), chance.choice(KINDS)
    how = chance.randrange(6)

    def change(name: str, value: Array) -> Array:
        if name != chosen:
            return value
        forms: list[Callable[[], Array]] = [
            lambda: value.astype(kind),
            lambda: value.T,
            lambda: value.reshape(-1),
            lambda: value[None],
            lambda: value[:0] if value.ndim else value,
            lambda: np.concatenate([value, value]) if value.ndim else value,
        ]
        return forms[how]()

    return _maybe_signed(case, _with_tensors(sent, change), chance)


@mutation
def swapped(case: Case, sent: Sent, chance: Random) -> Sent:
    """Two tensors have each other's names."""
    tensors = _tensors(sent)
    if not tensors:
        return sent
    one, other = chance.choice(list(tensors)), chance.choice(list(tensors))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    return _maybe_signed(case, replace(sent, payload=_saved(tensors)), chance)


@mutation
def missing(case: Case, sent: Sent, chance: Random) -> Sent:
    """Tensors are left out: one, or all of an expert or kind."""
    tensors = _tensors(sent)
    if not tensors:
        return sent
    chosen = chance.choice(list(tensors))
    start = chance.choice([chosen, ".".join(chosen.split(".")[:3]), chosen.split(".")[0]])
    left = {name: value for name, value in tensors.items() if not name.startswith(start)}
    return _maybe_signed(case, replace(sent, payload=_saved(left)), chance)


@mutation
def added(case: Case, sent: Sent, chance: Random) -> Sent:
    """A tensor that nobody asked for, or that is asked for only elsewhere."""
    tensors = _tensors(sent)
    if not tensors:
        return sent
    alias = chance.choice(ALIASES)
    new: list[dict[str, Array]] = [
        {f"expert.{alias}.bias": np.ones(HIDDEN, np.float32)},
        {f"expert.{alias}.bias:{part}": value for part, value in _parts().items()},
        {f"mean.{alias}": np.ones(HIDDEN, np.float32)},
        {f"mean.{alias}": np.full(HIDDEN, 0x3F80, np.uint16)},
        {"shared.more": np.ones(3, np.float32)},
        {f"signal.{chance.choice(['loss', 'accuracy', 'x'])}": np.ones((LAYERS, EXPERTS))},
        {"prototype.sums": np.ones((CLASSES, HIDDEN), np.float32), "prototype.counts": np.array([1, 2], np.float32)},
        {"prototype.counts": np.array([1, 2], np.float32)},
        {"profile.more": np.ones((LAYERS, EXPERTS))},
        {"": np.ones(1)},
    ]
    return _maybe_signed(case, replace(sent, payload=_saved(tensors | chance.choice(new))), chance)


def _parts() -> dict[str, Array]:
    return {"int8": np.ones(HIDDEN, np.int8), "scale": np.ones(1, np.float32)}


@mutation
def odd_places(case: Case, sent: Sent, chance: Random) -> Sent:
    """Numbers of a top-k tensor are for places that there are not, twice, out of order, or too many."""
    tensors = _tensors(sent)
    chosen = sorted(name for name in tensors if name.endswith(":places"))
    if not chosen:
        return odd_numbers(case, sent, chance)
    name = chance.choice(chosen)
    places, values = tensors[name], tensors[name.replace(":places", ":values")]
    if places.ndim != 1 or values.ndim != 1 or not places.size or places.dtype != np.uint32:
        return sent
    new = {
        "twice": np.repeat(places, 2),
        "reversed": places[::-1],
        "beyond": places + np.uint32(10**6),
        "largest": np.full_like(places, 2**32 - 1),
        "all": np.arange(24, dtype=np.uint32),
        "fewer": places[:1],
        "none": places[:0],
        "same": np.full_like(places, places[0]),
    }[chance.choice(["twice", "reversed", "beyond", "largest", "all", "fewer", "none", "same"])]
    fitted = np.resize(values, new.size) if chance.random() < 0.8 else values
    changed = tensors | {name: new, name.replace(":places", ":values"): fitted}
    return _maybe_signed(case, replace(sent, payload=_saved(changed)), chance)


# ------------------------------------------------------------------------------------------------------- metrics


def _metrics(sent: Sent) -> dict[str, Any]:
    """Of a body that can still be read; else none."""
    try:
        values = json.loads(sent.body)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _told(sent: Sent, values: dict[str, Any]) -> Sent:
    return replace(sent, body=json.dumps(values).encode())


@mutation
def odd_field(_case: Case, sent: Sent, chance: Random) -> Sent:
    """A field of the metrics is missing, new, or says something odd."""
    values = _metrics(sent)
    if not values:
        return sent
    name = chance.choice(list(values))
    match chance.randrange(4):
        case 0:
            del values[name]
        case 1:
            values[chance.choice(["more", "Samples", ""])] = chance.choice(ODD_VALUES)
        case 2:
            values[name] = chance.choice(ODD_VALUES)
        case _:
            values[name] = chance.choice(ODD_NUMBERS)
    return _told(sent, values)


@mutation
def odd_text(_case: Case, sent: Sent, chance: Random) -> Sent:
    """JSON that is none, or that means two things: NaN, numbers without end, keys that stand twice."""
    values = _metrics(sent)
    if not values:
        return sent
    name = chance.choice(list(values))
    if chance.random() < 0.3:
        twice = json.dumps({name: chance.choice([values[name], *ODD_VALUES[:9]])})
        return replace(sent, body=f"{twice[:-1]}, {json.dumps(values)[1:]}".encode())
    values[name] = "@"
    return replace(sent, body=json.dumps(values).replace('"@"', chance.choice(ODD_TEXTS)).encode())


@mutation
def odd_claim(_case: Case, sent: Sent, chance: Random) -> Sent:
    """Other examples, tokens, steps or seconds than there can be, or than there were."""
    values = _metrics(sent)
    if not values:
        return sent
    name = chance.choice(["samples", "tokens", "examples", "correct", "answered", "seconds", "peak_mib", "trained"])
    number = chance.choice(ODD_NUMBERS)
    table = values.get("trained")
    if name == "trained" and isinstance(table, dict) and table:
        values["trained"] = table | {chance.choice(list(table)): number}
    elif name == "answered":
        values["answered"] = {"right": number}
    elif name != "trained":
        values[name] = number
    return _told(sent, values)


@mutation
def odd_table(_case: Case, sent: Sent, chance: Random) -> Sent:
    """Checksums or steps of other experts, of fewer, or none."""
    values = _metrics(sent)
    name = chance.choice(["trained", "before", "after", "rebuilt"])
    table = values.get(name)
    if not isinstance(table, dict):
        return sent
    pairs = dict(table)
    key = chance.choice([*pairs, "0.0"])
    match chance.randrange(6):
        case 0:
            pairs.pop(key, None)
        case 1:
            pairs[chance.choice(ALIASES)] = pairs.get(key, 1)
        case 2:
            pairs[chance.choice(ALIASES)] = pairs.pop(key, 1)
        case 3:
            pairs[key] = chance.choice(ODD_VALUES)
        case 4:
            pairs = {}
        case _:
            others = values.get(chance.choice(["before", "after", "rebuilt"]))
            pairs[key] = others.get(key, "") if isinstance(others, dict) else ""
    return _told(sent, values | {name: pairs})


@mutation
def odd_scale(_case: Case, sent: Sent, chance: Random) -> Sent:
    """Output scales that are too many, too few or too large."""
    values = _metrics(sent)
    if not values:
        return sent
    values["scale"] = [chance.choice([1.0, -2, 99.0, 101.0, 1e300]) for _ in range(chance.randrange(4))]
    return _told(sent, values)
