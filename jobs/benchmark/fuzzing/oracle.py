"""A second opinion: whether an answer is well-formed, told from its bytes alone.

Written to be read against the description of the protocol, not to be quick, and shares nothing with the code that it
judges: it reads JSON and safetensors itself, and knows the numbers' formats from their definition.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fuzzing.cases import CLASSES, EXPERTS, HIDDEN, LAYERS, LIMITS, Case, Sent
from hfedmoe_ray.types import Array, ExpertKey, Role

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "U32": "<u4", "U16": "<u2", "I8": "<i1"}
_INTEGERS = ("client", "round", "samples", "tokens", "correct", "examples")
_NUMBERS = ("loss", "seconds", "step_seconds", "peak_mib")
_TABLES = ("trained", "before", "after", "rebuilt")
_MUST = ("client", "round", "kind", "samples", "tokens", "loss")
_LARGE = 2**16
"""Honest answers of these cases weigh a twentieth."""
Spec = Mapping[str, tuple[str, tuple[int, ...]]]


class Malformed(Exception):
    """What is wrong with an answer."""


def flaw(case: Case, sent: Sent) -> str:
    """What is wrong with an answer; empty where it may be used."""
    try:
        metrics = _metrics(sent.body)
        tensors = _tensors(sent.payload)
        _claims(case, metrics)
        trained = {_key(name) for name in metrics.get("trained", {})}
        values = _weights(case, tensors, trained)
        _checksums(case, metrics, values)
        _norm(case, values)
        _measured(case, metrics, tensors)
        most_state = 4096 if case.wire.feeds_back else 0
        _must(sent.state_bytes <= most_state, "state")
    except Malformed as problem:
        return str(problem)
    return ""


def _must(holds: Any, problem: str) -> None:
    if not holds:
        raise Malformed(problem)


# ------------------------------------------------------------------------------------------------------------ metrics


def _metrics(body: bytes) -> dict[str, Any]:
    values = _object(body)
    _must(set(values) <= {*_INTEGERS, *_NUMBERS, *_TABLES, "kind", "scale", "answered"}, "field")
    _must(all(name in values for name in _MUST), "missing field")
    for name in _INTEGERS:
        value = values.get(name, 0)
        _must(type(value) is int, f"type of {name}")
    for name in _NUMBERS:
        value = values.get(name, 0.0)
        _must(type(value) in (int, float) or (name == "loss" and value is None), f"type of {name}")
    for name in _TABLES:
        table = values.get(name, {})
        _must(type(table) is dict, f"type of {name}")
        _must(all(type(one) is (int if name == "trained" else str) for one in table.values()), f"types in {name}")
    answered = values.get("answered", {})
    _must(type(answered) is dict, "type of answered")
    _must(all(type(one) in (int, float) for one in answered.values()), "types in answered")
    scale = values.get("scale", [])
    _must(type(scale) is list and all(type(one) in (int, float) for one in scale), "type of scale")
    return values


def _claims(case: Case, metrics: Mapping[str, Any]) -> None:
    task = case.task
    _must((metrics["client"], metrics["round"], metrics["kind"]) == (task.client, task.round, task.kind), "task")
    _must(1 <= metrics["samples"] <= LIMITS.samples, "samples")
    _must(0 <= metrics["tokens"] <= LIMITS.tokens, "tokens")
    examples = metrics.get("examples", 0)
    _must(0 <= examples < 2**53, "examples")
    _must(0 <= metrics.get("correct", 0) <= examples, "correct")
    _must(all(0 <= amount < 2**53 for amount in metrics.get("answered", {}).values()), "answered")
    for name in ("seconds", "step_seconds", "peak_mib"):
        _must(0 <= metrics.get(name, 0) <= 1e9, name)
    _must(metrics["loss"] is None or abs(metrics["loss"]) <= 1e30, "loss")
    start = task.plan.scale or ()
    scale = metrics.get("scale", [])
    _must(len(scale) == len(start), "scales")
    _must(all(abs(now) <= 100 * max(1, abs(then)) for now, then in zip(scale, start, strict=True)), "scale")
    trainable = _names(case, Role.TRAIN)
    trained = metrics.get("trained", {})
    _must(set(trained) <= trainable, "trained")
    _must(all(1 <= steps <= LIMITS.steps for steps in trained.values()), "steps")


def _checksums(case: Case, metrics: Mapping[str, Any], values: Mapping[str, Mapping[str, Array]]) -> None:
    before, after, rebuilt = (metrics.get(name, {}) for name in ("before", "after", "rebuilt"))
    if case.task.kind != "train":
        _must(not before and not after and not rebuilt, "checksums without training")
        return
    trainable = _names(case, Role.TRAIN)
    _must(set(before) == set(after) == trainable, "names of checksums")
    _must(set(rebuilt) == (set(values) - {"shared"} if case.wire.lossy else set()), "names of rebuilt")
    for name in trainable:
        published = _digest(case.weights.experts[_key(name)])
        _must(before[name] == published, "before")
        if name not in values:
            _must(after[name] == published, "after, untrained")
            continue
        _must(after[name] != published, "after, trained")
        _must(_digest(values[name]) == (rebuilt if case.wire.lossy else after)[name], "arrived")


def _digest(tensors: Mapping[str, Array]) -> str:
    text = b"".join(name.encode() + tensors[name].tobytes() for name in sorted(tensors))
    return hashlib.sha256(text).hexdigest()[:32]


# ------------------------------------------------------------------------------------------------------------ payload


def _tensors(payload: bytes) -> dict[str, Array]:
    """Arrays by name, of bytes that hold nothing else."""
    _must(8 < len(payload) < _LARGE, "length")
    (length,) = struct.unpack("<Q", payload[:8])
    _must(0 < length <= len(payload) - 8, "length of the header")
    header, data = _object(payload[8 : 8 + length]), payload[8 + length :]
    tensors, places = {}, []
    for name, entry in header.items():
        _must(type(entry) is dict and set(entry) == {"dtype", "shape", "data_offsets"}, "entry")
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        _must(type(dtype) is str and dtype in _NUMPY, "dtype")
        _must(type(shape) is list and all(type(n) is int and n >= 0 for n in shape), "shape")
        _must(type(span) is list and len(span) == 2 and all(type(n) is int for n in span), "offsets")
        begin, end = span
        kind = np.dtype(_NUMPY[dtype])
        _must(0 <= begin <= end <= len(data) and end - begin == math.prod(shape) * kind.itemsize, "extent")
        places.append((begin, end))
        tensors[name] = np.frombuffer(data[begin:end], dtype=kind).reshape(shape)
    position = 0
    for begin, end in sorted(places):
        _must(begin == position, "tiling")
        position = end
    _must(position == len(data), "tail")
    return tensors


def _weights(case: Case, tensors: Mapping[str, Array], trained: set[ExpertKey]) -> dict[str, dict[str, Array]]:
    """New values of experts by name, and of shared parameters under "shared"."""
    expected: dict[str, Mapping[str, Array]] = {f"{k.layer}.{k.expert}": case.weights.experts[k] for k in trained}
    if case.task.kind == "train":
        expected["shared"] = case.weights.shared
    wanted = {
        (f"{group}.{name}" if group == "shared" else f"expert.{group}.{name}"): (group, name)
        for group, named in expected.items()
        for name in named
    }
    parts: dict[str, dict[str, Array]] = {prefix: {} for prefix in wanted}
    for name, value in tensors.items():
        if name.split(".")[0] in ("expert", "shared"):
            prefix, part = name.rsplit(":", 1) if case.wire.lossy and ":" in name else (name, "")
            _must(prefix in parts, f"entry {name}")
            parts[prefix][part] = value
    values: dict[str, dict[str, Array]] = {group: {} for group in expected}
    for prefix, (group, name) in wanted.items():
        old = expected[group][name]
        new = _decoded(case, parts[prefix], old)
        _must(np.isfinite(new).all(), "finite weights")
        values[group][name] = new
    return values


def _decoded(case: Case, parts: Mapping[str, Array], old: Array) -> Array:
    """The new value of a tensor."""
    count, shape = old.size, old.shape
    match case.wire.upload:
        case "fp32":
            _is(parts, {"": ("<f4", shape)})
            return parts[""]
        case "bf16":
            _is(parts, {"bf16": ("<u2", shape)})
            change = _from_bf16(parts["bf16"])
        case "fp16":
            _is(parts, {"fp16": ("<f2", shape), "scale": ("<f4", (1,))})
            _must(0 <= parts["scale"][0] < math.inf, "scale")
            with np.errstate(all="ignore"):
                change = np.array([float(x) * float(parts["scale"][0]) for x in parts["fp16"].ravel()]).astype("<f4")
        case "int8":
            row = shape[-1] if shape else 1
            group = row * -(-128 // row)
            _is(parts, {"int8": ("<i1", shape), "scale": ("<f4", (-(-count // group),))})
            scales = [float(one) for one in parts["scale"]]
            _must(all(0 <= one < math.inf for one in scales), "scale")
            with np.errstate(all="ignore"):
                numbers = [float(x) * scales[i // group] for i, x in enumerate(parts["int8"].ravel().tolist())]
                change = np.array(numbers).astype("<f4")
        case _:
            _must(set(parts) == {"places", "values"}, "parts")
            places, sent = parts["places"], parts["values"]
            _is(parts, {"places": ("<u4", (len(places.ravel()),)), "values": ("<f4", (len(places.ravel()),))})
            numbers = places.tolist()
            _must(numbers == sorted(set(numbers)) and all(n < count for n in numbers), "places")
            _must(len(numbers) <= max(1, int(case.wire.kept_share * count)), "number of places")
            change = np.zeros(count, "<f4")
            for n, value in zip(numbers, sent, strict=True):
                change[n] = value
    with np.errstate(all="ignore"):
        return (old.astype("<f4") + change.reshape(shape)).astype("<f4")


def _is(parts: Mapping[str, Array], spec: Spec) -> None:
    _must(set(parts) == set(spec), "parts")
    for name, (dtype, shape) in spec.items():
        _must(parts[name].dtype == np.dtype(dtype) and parts[name].shape == shape, f"part {name}")


def _norm(case: Case, values: Mapping[str, Mapping[str, Array]]) -> None:
    def norm(groups: Sequence[Mapping[str, Array]]) -> float:
        with np.errstate(all="ignore"):
            squares = sum(float((value.astype("f8") ** 2).sum()) for group in groups for value in group.values())
        return math.sqrt(squares) if squares < math.inf else math.inf

    old = [case.weights.shared if name == "shared" else case.weights.experts[_key(name)] for name in values]
    _must(norm(list(values.values())) <= 100 * max(1.0, norm(old)), "norm")


# ------------------------------------------------------------------------------------------------------- measurements


def _measured(case: Case, metrics: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    grid = (LAYERS, EXPERTS)
    profile = [f"profile.{name}" for name in ("usage", "specific", "kl", "routed")]
    signals = [f"signal.{name}" for name in case.signals]
    _must(all(name in tensors for name in [*profile, *signals, "profile.tokens"]), "missing measurement")
    tokens = tensors["profile.tokens"]
    _must(tokens.dtype == np.dtype("<i8") and tokens.shape == (1,) and 1 <= tokens[0] <= LIMITS.tokens, "tokens")
    for name in [*profile, *signals]:
        value = tensors[name]
        _must(value.dtype == np.dtype("<f8") and value.shape == grid, f"form of {name}")
        most = {"profile.routed": float(tokens[0]), "signal.loss": 1e30, "signal.gradient": 1e30}
        bound = most.get(name, 1.0 if name == "signal.accuracy" else 1.01)
        _must(all(0 <= x <= bound for x in value.ravel().tolist()), f"range of {name}")
    _must(all(abs(sum(row) - 1) <= 0.01 + 1e-9 for row in tensors["profile.usage"].tolist()), "sum of usage")
    known = {*profile, *signals, "profile.tokens"}
    held = _names(case, Role.TRAIN, Role.FROZEN)
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "mean":
            _must(rest in held, "mean of an expert that is not held")
            _must(value.dtype == np.dtype("<u2" if case.wire.lossy else "<f4") and value.shape == (HIDDEN,), "mean")
            numbers = (_from_bf16(value) if case.wire.lossy else value).tolist()
            _must(all(abs(x) <= 1e6 for x in numbers), "range of a mean")
        elif kind == "prototype":
            _must(case.task.kind == "profile" and rest in ("sums", "counts"), "prototype")
        elif kind not in ("expert", "shared"):
            _must(name in known, f"entry {name}")
    _prototypes(metrics, tensors)


def _prototypes(metrics: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    sums, counts = tensors.get("prototype.sums"), tensors.get("prototype.counts")
    _must((sums is None) == (counts is None), "half of the prototypes")
    if sums is None or counts is None:
        return
    heads = {(CLASSES, HIDDEN), (EXPERTS, HIDDEN)}
    _must(sums.shape in heads and counts.shape == sums.shape[:1], "prototypes' shape")
    _must(sums.dtype == counts.dtype == np.dtype("<f4"), "prototypes' type")
    numbers = counts.tolist()
    _must(all(n >= 0 for n in numbers) and sum(numbers) <= metrics["samples"], "prototypes' counts")
    for row, count in zip(sums.tolist(), numbers, strict=True):
        _must(all(abs(x) <= np.float32(1e6) * np.float32(count) for x in row), "prototypes' sums")


# -------------------------------------------------------------------------------------------------------------- basics


def _object(data: bytes) -> dict[str, Any]:
    """JSON without a key that stands twice, and without numbers that are none."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _must(len({key for key, _ in pairs}) == len(pairs), "key twice")
        return dict(pairs)

    def number(text: str) -> float:
        _must(math.isfinite(float(text)), "not finite")
        return float(text)

    def refuse(_constant: str) -> None:
        _must(False, "not finite")

    try:
        text = data.decode("utf-8")
        values = json.loads(text, object_pairs_hook=unique, parse_float=number, parse_constant=refuse)
        json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise Malformed("JSON") from error
    _must(type(values) is dict, "no object")
    return dict(values)


def _names(case: Case, *roles: Role) -> set[str]:
    return {f"{layer}.{e}" for layer, row in enumerate(case.task.plan.roles) for e, r in enumerate(row) if r in roles}


def _key(name: str) -> ExpertKey:
    layer, expert = name.split(".")
    return ExpertKey(int(layer), int(expert))


def _from_bf16(value: Array) -> Array:
    """bfloat16 is the upper half of an fp32 number."""
    return np.frombuffer(b"".join(b"\0\0" + struct.pack("<H", n) for n in value.ravel().tolist()), "<f4").reshape(
        value.shape
    )
