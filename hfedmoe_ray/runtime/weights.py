"""One version of the global model in the object store: an object for the shared part, and one for each expert.

Objects are put once per version, whatever the number of clients; an expert that did not change since the version
before keeps its object. A task carries references, so a client fetches only the experts its plan names, and clients
of one node read the same memory, through pages that cannot be written (see `protect`). What is so small that its
numbers weigh no more than the care for a reference travels in the task itself.

What is derived from published experts (merged ones, and those in few bits) is made when a task first asks for it, put
beside its version and given to every task that asks for the same.

The state of a client is an object too, from one of its tasks to the next.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from hfedmoe_ray.moe.derived import bits_of, merged_expert, quantised_expert
from hfedmoe_ray.runtime import timeouts
from hfedmoe_ray.runtime.overlay import overlay
from hfedmoe_ray.runtime.protect import protected
from hfedmoe_ray.types import Array, Bits, ClientTask, ExpertKey, Fetch, MergedExpert, TaskWeights, Weights

Arrays = Mapping[str, Array]
Ref = Any
"""A ray.ObjectRef (Ray's own type is not generic over what it holds), or a small object itself."""

_Derived = MergedExpert | tuple[ExpertKey, Bits]
"""What an object can be made to hold: a merged expert, or one in few bits."""

MEANS = "means"
INLINE_BYTES = 4096
"""Arrays of no more bytes together are no object of their own (Ray's own limit for arguments is 100 KiB, for a call
with a few of them; a task may name hundreds)."""
VERSIONS_KEPT = 2
"""The current version, and the one before it for tasks that started from it."""


@dataclass(frozen=True, kw_only=True)
class TaskRefs:
    """The weights of one task by reference. A reference inside a dataclass is passed on, not fetched."""

    shared: tuple[Ref, ...]
    """Objects that hold shared parameters; later ones are laid over earlier ones."""
    experts: Mapping[ExpertKey, Ref]
    means: Ref | None
    merged: tuple[Ref, ...] = ()
    """One object a merged expert, in the plan's order."""
    state: Ref | None = None
    """A tuple that begins with the client's state (uint8)."""

    def fetch(self) -> TaskWeights:
        """Reads the objects, where they lie, as arrays that cannot be written.

        Raises:
            ray.exceptions.RayError: an object is lost, or does not arrive within `timeouts.FETCH`.
        """
        keys = list(self.experts)
        optional = [ref for ref in (self.means, self.state) if ref is not None]
        values = _get([*self.shared, *self.experts.values(), *self.merged, *optional])
        shared: dict[str, Array] = {}
        for part in values[: len(self.shared)]:
            shared.update(protected(part))
        experts = values[len(self.shared) : len(self.shared) + len(keys)]
        merged = values[len(self.shared) + len(keys) : len(values) - len(optional)]
        return TaskWeights(
            shared=shared,
            experts={key: protected(part) for key, part in zip(keys, experts, strict=True)},
            means=None if self.means is None else protected(values[-len(optional)])[MEANS],
            merged=tuple(protected(part) for part in merged),
            state=b"" if self.state is None else values[-1][0].tobytes(),
        )


@dataclass(frozen=True)
class _Entry:
    """A stored mapping of arrays, and the arrays it was made from."""

    ref: Ref
    source: Arrays


@dataclass(frozen=True, kw_only=True)
class _Personal:
    shared: _Entry
    experts: Mapping[ExpertKey, _Entry]


@dataclass(frozen=True, kw_only=True)
class _Version:
    shared: _Entry
    experts: Mapping[ExpertKey, _Entry]
    means: _Entry | None
    personal: Mapping[int, _Personal]
    derived: dict[tuple[_Derived, int | None], Ref] = field(default_factory=dict)
    """Objects made of this version's experts, and of whose private ones among them."""


class WeightStore:
    """Publishes versions and hands out the references a task needs."""

    def __init__(self) -> None:
        self._versions: dict[int, _Version] = {}

    def publish(self, weights: Weights, keep: frozenset[int] = frozenset()) -> None:
        """Puts a version into the object store, reusing the objects of whatever did not change since the one before.

        Older ones than that are dropped, but for those in `keep`.
        """
        last = self._versions[max(self._versions)] if self._versions else None
        personal: dict[int, _Personal] = {}
        for client, own in (weights.personal or {}).items():
            known = last.personal.get(client) if last else None
            personal[client] = _Personal(
                shared=_put(own.shared, known.shared if known else None),
                experts=_put_each(own.experts, known.experts if known else {}),
            )
        self._versions[weights.version] = _Version(
            shared=_put(weights.shared, last.shared if last else None),
            experts=_put_each(weights.experts, last.experts if last else {}),
            means=None if weights.means is None else _put({MEANS: weights.means}, last.means if last else None),
            personal=personal,
        )
        for version in sorted(self._versions)[:-VERSIONS_KEPT]:
            if version not in keep:
                del self._versions[version]

    def refs(self, task: ClientTask) -> TaskRefs:
        """References to what `task` reads: what its plan needs of the weights, and the client's state.

        Private weights of `task.personal` are laid over the global ones.

        Raises:
            KeyError: the version was never published, or is no longer kept.
        """
        version = self._versions[task.version]
        own = None if task.personal is None else version.personal.get(task.personal)
        private = own.experts if own else {}
        owner = task.personal if private else None
        experts = overlay(version.experts, version.experts, private)
        return TaskRefs(
            shared=(version.shared.ref, *([own.shared.ref] if own else [])),
            experts={
                key: experts[key].ref
                if (bits := bits_of(task.plan, key)) is None
                else _derived(version, experts, (key, bits), owner)
                for key in task.plan.present
            },
            means=version.means.ref if version.means and task.plan.needs_means else None,
            merged=tuple(_derived(version, experts, one, owner) for one in task.plan.merged),
            state=None if task.state is None else _state_ref(task.state),
        )

    def clear(self) -> None:
        """Drops every reference, so that the object store frees the arrays."""
        self._versions.clear()


class StoredState:
    """A client's state that stays in the object store, to be fetched by whichever actor serves the client next."""

    def __init__(self, ref: Ref) -> None:
        """Takes note of an object, a tuple that begins with the state."""
        self.ref = ref

    def __call__(self) -> bytes:
        """Copies it here, for a checkpoint."""
        state: bytes = ray.get(self.ref, timeout=timeouts.FETCH)[0].tobytes()
        return state


def keep_state(ref: Ref, state: Array, *, put_again: bool) -> StoredState | None:
    """Keeps the state that a task returned; None for an empty one.

    Args:
        ref: The object, a tuple that begins with the state, which has arrived on this node.
        state: The state.
        put_again: Whether its first copy is on another node; with that node the client's past would be lost.
    """
    if not state.size:
        return None
    return StoredState(ray.put((state,)) if put_again else ref)


def _state_ref(state: Fetch) -> Ref:
    """The object of a state, made now if it comes from a checkpoint."""
    return state.ref if isinstance(state, StoredState) else ray.put((np.frombuffer(state(), dtype=np.uint8),))


def _derived(version: _Version, experts: Mapping[ExpertKey, _Entry], what: _Derived, owner: int | None) -> Ref:
    """The object of a merged expert, or of one in few bits, made now unless a task has asked for it before.

    Args:
        version: Where it is kept.
        experts: What it is made from: the version's experts, or the owner's private ones laid over them.
        what: A merged expert, or which one to have in how few bits.
        owner: Client whose private experts are among `experts`.
    """
    if (what, owner) not in version.derived:
        if isinstance(what, MergedExpert):
            arrays = merged_expert(what, {key: experts[key].source for key in what.keys})
        else:
            key, bits = what
            arrays = quantised_expert(experts[key].source, bits)
        version.derived[what, owner] = _object(arrays)
    return version.derived[what, owner]


def _put_each(experts: Mapping[ExpertKey, Arrays], last: Mapping[ExpertKey, _Entry]) -> dict[ExpertKey, _Entry]:
    return {key: _put(arrays, last.get(key)) for key, arrays in experts.items()}


def _put(arrays: Arrays, last: _Entry | None) -> _Entry:
    """The entry for these arrays: the last one where they are the same, byte for byte, else a new object."""
    if last is not None and _same(arrays, last.source):
        return last
    return _Entry(_object(dict(arrays)), arrays)


def _object(arrays: dict[str, Array]) -> Ref:
    """Arrays as a task names them."""
    return arrays if sum(array.nbytes for array in arrays.values()) <= INLINE_BYTES else ray.put(arrays)


def _get(refs: Sequence[Ref]) -> list[Any]:
    """What is named, in order."""
    stored = [ref for ref in refs if isinstance(ref, ray.ObjectRef)]
    fetched = iter(ray.get(stored, timeout=timeouts.FETCH) if stored else ())
    return [next(fetched) if isinstance(ref, ray.ObjectRef) else ref for ref in refs]


def _same(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(_same_bytes(one[name], other[name]) for name in one)


def _same_bytes(one: Array, other: Array) -> bool:
    """Equality of bytes, not of numbers: 0.0 is not -0.0 here, and NaN equals itself."""
    if one is other:
        return True
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return np.array_equal(one.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8))
