"""Saving the server's state after every round, so that a killed run continues where it was, to the last bit.

A checkpoint is a directory written under another name, flushed to disk, then renamed; the file LATEST is replaced
last. Whatever instant the machine dies at, LATEST names a complete checkpoint.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.errors import CheckpointError
from hfedmoe_ray.federation.flight import flight_fields, read_flight
from hfedmoe_ray.federation.state import Demotion, FederationState
from hfedmoe_ray.tracking.jsonl import plain
from hfedmoe_ray.tracking.record import round_report
from hfedmoe_ray.types import Array, ExpertKey, Fetch, PersonalWeights, RoutingProfile, Weights
from hfedmoe_ray.wire import PROFILE_FIELDS, expert_key, expert_name

_PLAIN = (
    "round",
    "bytes_up",
    "bytes_down",
    "seconds",
    "peaks_mib",
    "trainings",
    "out_of_memory",
    "simulated",
    "backdoor_success",
)


def run_identity(context: RunContext) -> str:
    """Returns a hash of all that decides a run's weights. How long it runs, where, and who watches does not."""
    fields = context.experiment.model_dump(
        mode="json",
        exclude={"name", "rounds", "backend", "actors", "output", "evaluate", "runtime", "tracking", "compare"},
    )
    parts = [json.dumps(fields, sort_keys=True), context.model.sha256, context.data.sha256]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def save_checkpoint(directory: Path, state: FederationState, identity: str, keep: int) -> Path:
    """Writes `directory/round-NNNN` and points LATEST at it; all but the newest `keep` are removed.

    Args:
        directory: The run's checkpoint directory.
        state: What to save.
        identity: Hash of everything that must not change between saving and resuming.
        keep: Checkpoints to keep.

    Raises:
        CheckpointError: It cannot be written; the one before is as it was.
    """
    name = f"round-{state.round:04d}"
    partial = directory / f".{name}.{os.getpid()}"
    final = directory / name
    try:
        _write(partial, state, identity)
        # A round is saved again only when a run was resumed from an older checkpoint; the older copy gives way.
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _flush(directory)
        latest = directory / f".LATEST.{os.getpid()}"
        latest.write_text(name + "\n")
        _flush(latest)
        latest.replace(directory / "LATEST")
        _flush(directory)
    except TimeoutError:
        raise  # an OSError too, but of a client's state that does not arrive: nothing is wrong with the disk
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of round {state.round} cannot be written to {directory}: {error}. The one before is "
            "complete: make room there (or have it writable again), and `hfedmoe resume`."
        ) from error
    for old in sorted(directory.glob("round-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def _write(partial: Path, state: FederationState, identity: str) -> None:
    """Writes a checkpoint under another name than its own, down to the disk."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_tensors(state), partial / "state.safetensors")
    for client, fetch in state.clients.items():
        (partial / _client_file(client)).write_bytes(fetch())
    fields = {
        "identity": identity,
        "version": state.weights.version,
        "samples": {str(client): count for client, count in state.samples.items()},
        "profile_tokens": {str(client): profile.tokens for client, profile in state.profiles.items()},
        "accuracies": state.accuracies,
        "own_accuracies": {str(client): value for client, value in state.own_accuracies.items()},
        "personalised_accuracies": {str(client): value for client, value in state.personalised_accuracies.items()},
        "benchmarks": {str(round): answered for round, answered in state.benchmarks.items()},
        "statuses": dict(state.statuses),
        "demotions": {str(client): asdict(demotion) for client, demotion in state.demotions.items()},
        "clients": sorted(state.clients),
        "flights": [flight_fields(flight) for flight in state.flights],
        "unmeasured": plain(state.unmeasured),
        **{scalar: getattr(state, scalar) for scalar in _PLAIN},
    }
    (partial / "state.json").write_text(json.dumps(fields, indent=1))
    for file in partial.iterdir():
        _flush(file)


def load_checkpoint(directory: Path, identity: str) -> FederationState:
    """Reads the checkpoint that LATEST names.

    Raises:
        CheckpointError: There is none, it is damaged, or it belongs to another experiment or version.
    """
    latest = directory / "LATEST"
    if not latest.exists():
        raise CheckpointError(
            f"{directory} holds no finished checkpoint, so there is nothing to resume: the run stopped before its "
            "first round ended. Start it again with `hfedmoe run`."
        )
    path = directory / latest.read_text().strip()
    try:
        fields = json.loads((path / "state.json").read_text())
        tensors = load_file(path / "state.safetensors")
        clients = {client: (path / _client_file(client)).read_bytes() for client in fields["clients"]}
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged ({error}). Write the name of an older round-* directory into {latest}, "
            "or start the run again."
        ) from error
    if fields["identity"] != identity:
        raise CheckpointError(
            f"checkpoint {path} was written by another experiment (configuration, model or data differ), and "
            "continuing it would mix the two. Resume with the run's own config.yaml, or use another name."
        )
    try:
        return _state(fields, tensors, clients)
    except KeyError as missing:
        raise CheckpointError(
            f"checkpoint {path} was written by another version of hfedmoe_ray: it holds no {missing}. Resume with that "
            "version (config.yaml names it), or start the run again."
        ) from missing


def _tensors(state: FederationState) -> dict[str, Array]:
    weights = state.weights
    tensors = _named("global", weights.shared, weights.experts)
    if weights.means is not None:
        tensors["means"] = weights.means
    for number, older in state.older.items():
        tensors |= _named(f"version-{number}", older.shared, older.experts)
        if older.means is not None:
            tensors[f"version-{number}/means"] = older.means
    for client, own in (weights.personal or {}).items():
        tensors |= _named(f"client-{client}", own.shared, own.experts)
    for client, profile in state.profiles.items():
        tensors |= {f"profile/{client}/{name}": getattr(profile, name) for name in PROFILE_FIELDS}
    tensors |= {f"strategy/{name}": value for name, value in state.strategy.items()}
    tensors |= {f"server/{name}": value for name, value in state.server.items()}
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def _named(
    owner: str, shared: Mapping[str, Array], experts: Mapping[ExpertKey, Mapping[str, Array]]
) -> dict[str, Array]:
    tensors = {f"{owner}/shared/{name}": value for name, value in shared.items()}
    for key, named in experts.items():
        tensors |= {f"{owner}/expert/{expert_name(key)}/{name}": value for name, value in named.items()}
    return tensors


def _state(fields: Mapping[str, Any], tensors: Mapping[str, Array], clients: Mapping[int, bytes]) -> FederationState:
    shared: dict[str, dict[str, Array]] = {}
    experts: dict[str, dict[ExpertKey, dict[str, Array]]] = {}
    profiles: dict[int, dict[str, Array]] = {}
    strategy: dict[str, Array] = {}
    server: dict[str, Array] = {}
    means: dict[str, Array] = {}
    for path, value in tensors.items():
        match path.split("/"):
            case ["means"]:
                means["global"] = value
            case [owner, "means"]:
                means[owner] = value
            case ["strategy", *name]:
                strategy["/".join(name)] = value
            case ["server", *name]:
                server["/".join(name)] = value
            case ["profile", client, name]:
                profiles.setdefault(int(client), {})[name] = value
            case [owner, "shared", name]:
                shared.setdefault(owner, {})[name] = value
            case [owner, "expert", key, name]:
                experts.setdefault(owner, {}).setdefault(expert_key(key), {})[name] = value
    personal = {
        int(owner.removeprefix("client-")): PersonalWeights(
            shared=shared.get(owner, {}), experts=experts.get(owner, {})
        )
        for owner in sorted(shared.keys() | experts.keys())
        if owner.startswith("client-")
    }
    versions = {"global": fields["version"]} | {
        owner: int(owner.removeprefix("version-")) for owner in shared if owner.startswith("version-")
    }
    weights = {
        owner: Weights(
            version=number,
            shared=shared[owner],
            experts=dict(sorted(experts[owner].items())),
            means=means.get(owner),
            personal=(personal or None) if owner == "global" else None,
        )
        for owner, number in versions.items()
    }
    return FederationState(
        weights=weights.pop("global"),
        older={older.version: older for older in weights.values()},
        flights=[read_flight(flight) for flight in fields["flights"]],
        unmeasured=None if fields["unmeasured"] is None else round_report(fields["unmeasured"]),
        profiles={
            client: RoutingProfile(**named, tokens=fields["profile_tokens"][str(client)])
            for client, named in sorted(profiles.items())
        },
        samples={int(client): count for client, count in fields["samples"].items()},
        accuracies=[(int(round), float(accuracy)) for round, accuracy in fields["accuracies"]],
        benchmarks={int(round): answered for round, answered in fields["benchmarks"].items()},
        statuses=Counter(fields["statuses"]),
        demotions={int(client): Demotion(**demotion) for client, demotion in fields["demotions"].items()},
        clients={client: _held(state) for client, state in clients.items()},
        strategy=strategy,
        server=server,
        own_accuracies={int(client): value for client, value in fields["own_accuracies"].items()},
        personalised_accuracies={int(client): value for client, value in fields["personalised_accuracies"].items()},
        **{scalar: fields[scalar] for scalar in _PLAIN},
    )


def _held(state: bytes) -> Fetch:
    return lambda: state


def _client_file(client: int) -> str:
    return f"client-{client}.bin"


def _flush(path: Path) -> None:
    """Forces a file or directory entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
