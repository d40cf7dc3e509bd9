"""Whole runs in one process, on tiny models of both families: budgets kept, the untouched untouched, repeatable."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_federation import HFEDMOE, experiment, final_weights, run

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import CheckpointError, TrainingError
from hfedmoe_ray.estimates import predict_upload
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.train import local as client_work
from hfedmoe_ray.wire import upload

TOPK = {"upload": "topk", "share": 0.05}
STRATEGIES: dict[str, dict[str, Any]] = {
    "hfedmoe": HFEDMOE,
    "paper": HFEDMOE | {"resident": "all"},
    "frozen": HFEDMOE | {"unselected": "frozen"},
    "drop": HFEDMOE | {"unselected": "drop"},
    "reroute": HFEDMOE | {"unselected": "reroute"},
    "coverage": HFEDMOE | {"coverage": 0.8},
    "flex_moe": {"name": "flex_moe"},
    "random": {"name": "random"},
    "fedavg": {"name": "fedavg"},
    "local": {"name": "local"},
}


@pytest.mark.parametrize("family", ["bert", "mixtral"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_trains_what_it_reports_and_nothing_else(sources: Path, tmp_path: Path, family: str, strategy: str):
    context, summary, recorder = run(experiment(sources, family, strategy=STRATEGIES[strategy]), tmp_path / "run")
    assert summary["status"] == "finished"
    assert summary["clients"]["ok"] == sum(len(report.clients) for report in recorder.rounds)
    assert 0 <= summary["accuracy"] <= 1
    assert 0 <= summary["own_accuracy"] <= 1
    budgets = {row["client"]: row["resident_experts"] for row in recorder.facts["clients"]}
    for report in recorder.rounds[1:]:
        for record in report.clients:
            within = strategy in ("hfedmoe", "drop", "reroute", "coverage", "flex_moe", "random")
            assert record.resident == (budgets[record.client] if within else context.model.shape.total_experts)
            if strategy not in ("paper", "fedavg", "local"):
                assert record.trained <= budgets[record.client]
            assert record.bytes_up >= record.trained * context.model.shape.expert_bytes
    before, after = initial_weights(context.model, "experts"), final_weights(context)
    counts = sum(np.array(report.selected) for report in recorder.rounds)
    for key, tensors in before.experts.items():
        same = all((tensors[name] == after.experts[key][name]).all() for name in tensors)
        if counts[key] == 0 or strategy == "local":
            assert same, f"expert {key} was trained by nobody and changed"
        elif strategy in ("flex_moe", "random", "fedavg"):
            assert not same, f"expert {key} was trained by {counts[key]} clients and did not change"
    if strategy == "local":
        assert sorted(after.personal) == list(budgets)
        assert any(
            (own.shared[name] != before.shared[name]).any() for own in after.personal.values() for name in own.shared
        )


def test_a_run_is_a_function_of_its_configuration(sources: Path, tmp_path: Path):
    results = [run(experiment(sources), tmp_path / name)[1]["model_sha256"] for name in ("one", "two")]
    other = run(experiment(sources, seed=1), tmp_path / "three")[1]["model_sha256"]
    assert results[0] == results[1] != other


@pytest.mark.parametrize(("strategy", "wire"), [("hfedmoe", {}), ("local", {}), ("hfedmoe", TOPK)])
def test_a_stopped_run_resumes_to_the_same_model(sources: Path, tmp_path: Path, strategy: str, wire: dict[str, Any]):
    made = experiment(
        sources, strategy=STRATEGIES[strategy], rounds=3, clients=experiment(sources).clients.model_dump(), wire=wire
    )
    _, undisturbed, whole = run(made, tmp_path / "whole")
    _, stopped, first = run(made, tmp_path / "cut", stop_after=1)
    assert stopped["status"] == "stopped"
    assert [report.round for report in first.rounds] == [0, 1]
    context, resumed, rest = run(made, tmp_path / "cut", resume=True)
    assert [report.round for report in rest.rounds] == [2, 3]
    assert rest.facts["resumed_from"] == 1
    for key in ("model_sha256", "accuracy", "own_accuracy", "bytes_up", "bytes_down", "clients"):
        assert resumed[key] == undisturbed[key], key
    assert [asdict(r)["selected"] for r in first.rounds + rest.rounds] == [asdict(r)["selected"] for r in whole.rounds]
    with pytest.raises(CheckpointError, match="another experiment"):
        run(made.model_copy(update={"seed": 5}), context.run_dir, resume=True)


@pytest.mark.parametrize("wire", [*({"upload": name} for name in ("bf16", "fp16", "int8")), TOPK])
def test_in_every_precision_the_canary_holds_and_fewer_bytes_are_sent(
    sources: Path, tmp_path: Path, whole_bytes: int, wire: dict[str, Any]
):
    _, summary, recorder = run(experiment(sources, "mixtral", rounds=1, wire=wire), tmp_path / "run")
    assert summary["clients"]["ok"] == 8
    assert any(count for row in recorder.rounds[1].selected for count in row)
    # Tensors are tiny here: their names alone are a fifth of what is sent.
    most = {"bf16": 0.7, "fp16": 0.75, "int8": 0.6, "topk": 0.5}[wire["upload"]]
    assert recorder.rounds[1].bytes_up < most * whole_bytes


@pytest.fixture(scope="module")
def whole_bytes(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """What a round's updates weigh in fp32."""
    _, _, recorder = run(experiment(sources, "mixtral", rounds=1), tmp_path_factory.mktemp("whole"))
    sent: int = recorder.rounds[1].bytes_up
    return sent


def test_the_state_of_a_client_is_kept_with_its_update_or_dropped_with_it(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pack = upload.pack_update
    sent: list[int] = []

    def poisoned(experts, shared, profile, means, **options):
        if profile is not None:  # an update, not a state
            sent.append(1)
            if len(sent) in (1, 6):  # client 0 in round 1, client 1 in round 2
                profile = replace(profile, kl=profile.kl * np.nan)
        return pack(experts, shared, profile, means, **options)

    monkeypatch.setattr(upload, "pack_update", poisoned)
    context, summary, recorder = run(experiment(sources, wire=TOPK), tmp_path / "run")
    assert summary["clients"]["rejected"] == 2
    assert [[r.client for r in report.clients if r.status == "rejected"] for report in recorder.rounds] == [
        [],
        [0],
        [1],
    ]
    states = [
        {
            file.stem: file.read_bytes()
            for file in (context.run_dir / "checkpoints" / f"round-000{round}").glob("client-*")
        }
        for round in (1, 2)
    ]
    assert sorted(states[0]) == ["client-1", "client-2", "client-3"]
    assert sorted(states[1]) == ["client-0", *sorted(states[0])]
    assert [states[0][name] == states[1][name] for name in sorted(states[0])] == [True, False, False]


def test_with_and_without_the_prefix_cache_the_same_run_within_rounding(sources: Path, tmp_path: Path):
    made = experiment(sources)
    off = made.model_copy(update={"local": made.local.model_copy(update={"cache": "off"})})
    (_, _, cached), (_, _, plain) = (run(one, tmp_path / str(i)) for i, one in enumerate((made, off)))
    # Before any step the states differ by rounding alone; AdamW's first steps are signs of gradients, and where one is
    # nearly 0, rounding decides it.
    for tolerance, left, right in zip((1e-5, 1e-2, 1e-2), cached.rounds, plain.rounds, strict=True):
        if left.round > 0:
            assert left.loss == pytest.approx(right.loss, rel=tolerance)
        assert left.test_loss == pytest.approx(right.test_loss, rel=tolerance)


def test_class_means_start_the_head_above_chance(sources: Path, tmp_path: Path):
    made = experiment(sources, rounds=1, seed=1)
    model = made.model.model_copy(update={"head": "prototypes"})
    _, _, started = run(made.model_copy(update={"model": model}), tmp_path / "means")
    _, _, cold = run(made, tmp_path / "random")
    assert started.rounds[0].accuracy > max(0.5, cold.rounds[0].accuracy)


def test_a_client_that_lies_is_left_out_and_a_fault_of_ours_stops_the_run(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pack = upload.pack_update
    sent: list[int] = []

    def poisoned(experts, shared, *rest, **options):
        sent.append(1)
        if len(sent) == 1:
            shared = {name: value * np.nan for name, value in shared.items()}
        return pack(experts, shared, *rest, **options)

    monkeypatch.setattr(upload, "pack_update", poisoned)
    _, summary, recorder = run(experiment(sources, rounds=1), tmp_path / "lie")
    assert summary["clients"] == {"ok": 7, "late": 0, "failed": 0, "memory": 0, "rejected": 1, "dropped": 0}
    (rejected,) = [record for record in recorder.rounds[1].clients if record.status == "rejected"]
    assert "NaN" in rejected.reason

    monkeypatch.setattr(
        upload,
        "pack_update",
        lambda experts, *rest, **options: pack(
            {key: {name: value + 1 for name, value in tensors.items()} for key, tensors in experts.items()},
            *rest,
            **options,
        ),
    )
    with pytest.raises(TrainingError, match="other than it stood after training"):
        run(experiment(sources, rounds=1), tmp_path / "fault")


def test_the_same_error_in_every_client_ends_the_run_with_its_traceback(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_):
        raise ZeroDivisionError("what the clients have in common")

    monkeypatch.setattr(client_work.ClientWorker, "_batches", broken)
    with pytest.raises(TrainingError, match=r"4 clients failed with the same error: ZeroDivisionError(?s:.*)in _train"):
        run(experiment(sources), tmp_path / "run")


LORAS: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"rank": 2, "attention": True}),
    ("mixtral", {"rank": 2, "attention": True}),
    ("mixtral", {"rank": 2, "average": "factors"}),
    ("mixtral", {"rank": 2, "base": "int8"}),
]


@pytest.mark.parametrize(("family", "lora"), LORAS)
def test_low_rank_factors_learn_and_send_little(sources: Path, tmp_path: Path, family: str, lora: dict[str, Any]):
    """The canary watches the factors as it watches experts; only experts somebody trained have moved."""
    plain = experiment(sources, family)
    model, local = plain.model.model_dump() | {"lora": lora}, plain.local.model_dump() | {"steps": 4}
    made = experiment(sources, family, model=model, local=local)
    context, summary, recorder = run(made, tmp_path / "run")
    assert summary["clients"]["ok"] == sum(len(report.clients) for report in recorder.rounds)
    losses = [report.loss for report in recorder.rounds[1:]]
    # The random BERT is too small to learn its texts in two rounds, in full too.
    assert losses[-1] < 0.95 * losses[0] or family == "bert"
    before = initial_weights(context.model, "experts", made.model.lora, made.seed)
    after = final_weights(context)
    counts = sum(np.array(report.selected) for report in recorder.rounds)
    moved = {
        key
        for key, tensors in before.experts.items()
        if any((after.experts[key][name] != array).any() for name, array in tensors.items())
    }
    assert moved
    assert all(counts[key] for key in moved)
    assert all("lora_" in name for tensors in after.experts.values() for name in tensors)
    shape, full = context.model.shape, prepare_run(plain, tmp_path / "full").model.shape
    assert shape.expert_bytes < 0.5 * full.expert_bytes
    for report in recorder.rounds[1:]:
        for record in report.clients:
            # As planned; beside numbers an update holds the names of its tensors.
            assert 0 <= record.bytes_up - predict_upload(made, shape, record.trained, record.resident) < 8000


def test_a_run_with_factors_resumes_to_the_same_model_and_either_average_makes_one(sources: Path, tmp_path: Path):
    def made(average: str) -> Experiment:
        model = experiment(sources).model.model_dump() | {"lora": {"rank": 2, "attention": True, "average": average}}
        return experiment(sources, model=model)

    whole = run(made("svd"), tmp_path / "whole")[1]["model_sha256"]
    run(made("svd"), tmp_path / "cut", stop_after=1)
    assert run(made("svd"), tmp_path / "cut", resume=True)[1]["model_sha256"] == whole
    assert run(made("factors"), tmp_path / "factors")[1]["model_sha256"] != whole


def test_a_client_that_uses_more_memory_than_its_device_has_is_reported(sources: Path, tmp_path: Path):
    tiers = [
        {"name": "small", "share": 0.5, "experts": 0.25, "memory_gib": 0.05},
        {"name": "large", "share": 0.5, "experts": 0.5, "memory_gib": 64},
    ]
    made = experiment(sources, backend="ray", rounds=1, clients={"count": 2, "tiers": tiers}, evaluate={"own": "never"})
    _, _, recorder = run(made, tmp_path / "run")
    records = {record.tier: record for report in recorder.rounds for record in report.clients if record.round == 1}
    assert records["small"].status == "ok", "what it trained is used all the same"
    assert records["small"].over_mib == pytest.approx(records["small"].peak_mib - 0.05 * 1024)
    assert records["large"].over_mib == 0
    (fields,) = [fields for name, fields in recorder.events if name == "over_memory"]
    assert fields["client"] == records["small"].client
    assert f"used {records['small'].peak_mib:.0f} MiB" in fields["reason"]
