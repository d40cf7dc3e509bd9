"""Checkpoints: exact, atomic, refused where they do not belong."""

import json
from collections import Counter

import numpy as np
import pytest
from recorded_run import round_report

from hfedmoe_ray.errors import CheckpointError
from hfedmoe_ray.federation.checkpoint import load_checkpoint, save_checkpoint
from hfedmoe_ray.federation.state import FederationState, model_sha256
from hfedmoe_ray.tracking.jsonl import plain
from hfedmoe_ray.types import ExpertKey, PersonalWeights, RoutingProfile, Weights


def state(round=3, personal=True):
    rng = np.random.default_rng(round)

    def array(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def tensors():
        return {"up": array(3, 2), "down": array(2, 3)}

    experts = {ExpertKey(layer, e): tensors() for layer in range(2) for e in range(12)}
    own = PersonalWeights(shared={"head.weight": array(2)}, experts={ExpertKey(1, 11): tensors()})
    weights = Weights(
        version=round,
        shared={"encoder.layer.0.gate": array(4), "head.weight": array(2)},
        experts=experts,
        means=array(2, 12, 5),
        personal={7: own} if personal else None,
    )
    grid = rng.random((2, 12))
    profile = RoutingProfile(usage=grid, specific=grid, kl=grid, routed=grid, tokens=99)
    return FederationState(
        weights=weights,
        round=round,
        profiles={7: profile, 2: profile},
        samples={7: 10, 2: 4},
        accuracies=[(0, 0.1), (3, 0.25)],
        own_accuracies={7: 0.5},
        statuses=Counter(ok=9, late=1),
        clients={7: lambda: b"its own", 11: lambda: b""},
        bytes_up=12,
        bytes_down=13,
        seconds=1.5,
        peaks_mib={"phone": 100.0},
        unmeasured=round_report(3),
    )


@pytest.mark.parametrize("personal", [True, False])
def test_a_state_comes_back_to_the_last_bit(tmp_path, personal):
    saved = state(personal=personal)
    save_checkpoint(tmp_path, saved, "id", keep=2)
    loaded = load_checkpoint(tmp_path, "id")
    assert model_sha256(loaded.weights, "base") == model_sha256(saved.weights, "base")
    assert list(loaded.weights.experts) == list(saved.weights.experts)
    assert (loaded.weights.means == saved.weights.means).all()
    assert loaded.weights.version == saved.weights.version
    assert (loaded.weights.personal is None) == (not personal)
    assert (loaded.profiles[7].usage == saved.profiles[7].usage).all()
    assert loaded.profiles[2].tokens == 99
    assert {client: fetch() for client, fetch in loaded.clients.items()} == {7: b"its own", 11: b""}
    for name in ("round", "samples", "accuracies", "own_accuracies", "statuses", "bytes_up", "seconds"):
        assert getattr(loaded, name) == getattr(saved, name), name
    assert plain(loaded.unmeasured) == plain(saved.unmeasured)


def test_only_the_newest_are_kept_and_a_half_written_one_is_never_read(tmp_path):
    for round in range(1, 5):
        save_checkpoint(tmp_path, state(round), "id", keep=2)
    (tmp_path / ".round-0005.123").mkdir()
    assert sorted(path.name for path in tmp_path.glob("round-*")) == ["round-0003", "round-0004"]
    assert load_checkpoint(tmp_path, "id").round == 4


def test_saving_a_round_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, state(3), "id", keep=2)
    again = state(3)
    again.bytes_up = 77
    save_checkpoint(tmp_path, again, "id", keep=2)
    assert load_checkpoint(tmp_path, "id").bytes_up == 77


def test_what_does_not_belong_or_is_damaged_is_refused_in_words(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        load_checkpoint(tmp_path, "id")
    path = save_checkpoint(tmp_path, state(), "id", keep=2)
    with pytest.raises(CheckpointError, match="another experiment"):
        load_checkpoint(tmp_path, "other")
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path, "id")
    path = save_checkpoint(tmp_path, state(), "id", keep=2)
    next(path.glob("client-7*")).unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path, "id")
    path = save_checkpoint(tmp_path, state(), "id", keep=2)
    fields = json.loads((path / "state.json").read_text())
    del fields["unmeasured"]
    (path / "state.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"another version of hfedmoe_ray: it holds no 'unmeasured'"):
        load_checkpoint(tmp_path, "id")


def test_the_model_hash_sees_every_part():
    base = state()
    hashes = {model_sha256(base.weights, "base"), model_sha256(base.weights, "other base")}
    for change in ("shared", "expert", "personal"):
        other = state()
        match change:
            case "shared":
                other.weights.shared["head.weight"][0] += 1
            case "expert":
                other.weights.experts[ExpertKey(1, 3)]["up"][0, 0] += 1
            case "personal":
                other.weights.personal[7].experts[ExpertKey(1, 11)]["up"][0, 0] += 1
        hashes.add(model_sha256(other.weights, "base"))
    assert len(hashes) == 5
