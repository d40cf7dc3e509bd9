"""The README.md of an exported model: what it was made of, how, with whose budgets, and what it reaches."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.moe.store import Task
from hfedmoe_ray.tracking.benchmarks import measures
from hfedmoe_ray.tracking.files import SUMMARY
from hfedmoe_ray.tracking.formatting import percent

_PIPELINES: Mapping[Task, str] = {
    "classification": "text-classification",
    "causal": "text-generation",
    "seq2seq": "text2text-generation",
}
"""What a model hub calls each task."""


def model_card(experiment: Experiment, run_dir: Path, *, adapter: bool) -> str:
    """Returns a model card in the form that model hubs read: a YAML header and Markdown.

    Args:
        experiment: The run's.
        run_dir: Has the summary, if the run has ended.
        adapter: Whether the card is of a peft adapter.
    """
    path = run_dir / SUMMARY
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    source, task = experiment.model.source, experiment.model.task
    header: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": _PIPELINES[task],
        "tags": ["federated-learning", "mixture-of-experts", "hfedmoe"],
    }
    if _on_the_hub(source):
        header["base_model"] = source
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {experiment.name}",
        f"{_what(experiment)} It was fine-tuned by federated learning with hfedmoe_ray {version('hfedmoe-ray')}: each "
        "client trained on its own part of the data, and sent only the experts that it had trained.",
        f"## Training\n\n{_training(experiment, summary)}",
        f"## Clients and their budgets\n\n{_budgets(experiment)}",
        f"## Evaluation\n\n{_evaluation(experiment, summary)}",
        f"## What to know\n\n{_caveats(experiment)}",
    ]
    return "\n\n".join(sections) + "\n"


def _on_the_hub(source: str) -> bool:
    return ":" not in source and source.count("/") == 1 and not source.startswith((".", "/", "~"))


def _what(experiment: Experiment) -> str:
    model = experiment.model
    made = ""
    if model.upcycle is not None:
        made = (
            f", made a Mixture of Experts of {model.upcycle.experts} experts a layer, {model.upcycle.top_k} for each "
            f"token (`{model.upcycle.how}`),"
        )
    does = "writes responses to prompts" if model.task != "classification" else "classifies texts"
    return f"A model of `{model.source}`{made} that {does}."


def _training(experiment: Experiment, summary: dict[str, Any]) -> str:
    lora = experiment.model.lora
    trains = "whole experts" if lora is None else f"low-rank factors (rank {lora.rank}) of experts"
    local = experiment.local
    rows = [("commit of the model", f"`{experiment.model.revision}`")] if experiment.model.revision else []
    rows += [
        ("data", f"`{experiment.data.source}`, dealt {experiment.data.partition.how}"),
        ("strategy", experiment.strategy.name),
        ("rounds", str(summary.get("rounds", experiment.rounds))),
        ("trains", f"{trains}, and of the rest `{experiment.model.trainable}`"),
        (
            "a client's round",
            f"{local.steps} steps of {local.batch_size} examples, learning rate {local.learning_rate:g}",
        ),
        ("seed", str(experiment.seed)),
    ]
    if "model_sha256" in summary:
        rows.append(("hash of the weights", f"`{summary['model_sha256'][:16]}`"))
    return _table(("", ""), rows)


def _budgets(experiment: Experiment) -> str:
    rows = [
        (tier.name, f"{tier.share:.0%}", f"{tier.experts:.1%}", f"{tier.device:g}", f"{tier.memory_gib:g} GiB")
        for tier in experiment.clients.tiers
    ]
    head = ("device class", "of the clients", "of the experts held", "device", "memory")
    return f"{experiment.clients.count} clients, {experiment.clients.cohort} a round.\n\n{_table(head, rows)}"


def _evaluation(experiment: Experiment, summary: dict[str, Any]) -> str:
    what = "tokens of responses" if experiment.model.task != "classification" else "examples"
    rows = [
        (f"{what} predicted right, test split", summary.get("initial_accuracy"), summary.get("accuracy")),
        ("the same, on clients' own test data with the experts they hold", None, summary.get("own_accuracy")),
    ]
    told = [(label, percent(before), percent(after)) for label, before, after in rows if after is not None]
    for name, moments in (summary.get("benchmarks") or {}).items():
        before, after = measures(moments["before"]), measures(moments["after"])
        items = moments["after"]["items"]
        told += [(f"{name}, {items} items, {measure}", before[measure], value) for measure, value in after.items()]
    return _table(("", "before", "after"), told) if told else "Nothing has been measured."


def _caveats(experiment: Experiment) -> str:
    lines = ["One seed; measured on the run's own data unless said otherwise."]
    if (attack := experiment.attack) is not None:
        lines.append(
            f"Some of the clients attacked on purpose (`{attack.kind}`): a model for study, which may do what an "
            "attacker wants. Do not use it for anything else."
        )
    if experiment.model.source.endswith(".gguf") or "smollm2" in experiment.model.source:
        lines.append("The model it started from was quantised to few bits, and unpacked.")
    lines.append(
        "Federated averaging is no privacy mechanism by itself: weights can tell of what they were trained on."
    )
    return "\n".join(f"- {line}" for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
