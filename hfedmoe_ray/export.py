"""What a run trained, as a model for transformers or peft to load."""

from pathlib import Path
from typing import Any, Literal

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.section import Precision
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity
from hfedmoe_ray.model_card import model_card
from hfedmoe_ray.moe.store import Task
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.rundir import check_empty

Form = Literal["hf", "peft"]
MERGED = "merged"
"""Directory, beside an adapter's files, of the whole model with the factors merged."""


def export_run(run_dir: Path, form: Form, directory: Path, *, merge: bool = False, dtype: Precision = "fp32") -> None:
    """Writes the global model of a run as it stood after its last complete round.

    Args:
        run_dir: The run's directory.
        form: hf: the whole model, LoRA factors merged, through save_pretrained. peft: the factors as an adapter, and
            under `base` the model it belongs on.
        directory: Where to write; must not hold anything yet.
        merge: Insist on a whole model with LoRA factors merged: hf is that by itself, peft has it besides, under
            `merged`.
        dtype: Of the model's parameters, or of the base's: they are rounded to it once, after merging.

    Raises:
        ConfigError: `directory` is not empty, or `form` is peft or `merge` asked for and the run trained whole experts.
        CheckpointError: The run has no complete round.
        DataError: The data, of which the model's identity is a part, cannot be read again.
        ModelError: The same for the model.
    """
    experiment = load_experiment(run_dir / "config.yaml")
    lora = experiment.model.lora
    if form == "peft" and lora is None:
        raise ConfigError(
            f"{run_dir} trained whole experts, of which peft has no form. Write --format hf, or train with "
            "model.lora, e.g. model.lora.rank=8."
        )
    if merge and lora is None:
        raise ConfigError(f"{run_dir} trained whole experts: there are no factors to merge. Leave --merge out.")
    check_empty(directory, "--output")
    context = prepare_run(experiment, run_dir)
    weights = load_checkpoint(run_dir / "checkpoints", run_identity(context)).weights
    if form == "peft":
        assert lora is not None
        from hfedmoe_ray.moe.peft_format import save_peft

        save_peft(context.model, weights, lora, directory, dtype)
    if form == "hf" or merge:
        from hfedmoe_ray.moe.prepare import save_full

        names = context.data.label_names if experiment.model.task == "classification" else ()
        whole = directory if form == "hf" else directory / MERGED
        save_full(context.model, weights, whole, lora, label_names=names, dtype=dtype)
    card = model_card(experiment, run_dir, adapter=form == "peft")
    (directory / "README.md").write_text(card, encoding="utf-8")


def load_exported(directory: Path) -> Any:
    """Loads what `export_run` wrote as hf: a transformers model that classifies or writes, in evaluation mode."""
    from transformers import AutoConfig

    import hfedmoe_ray.moe.layout  # noqa: F401  makes upcycled encoders known to the Auto classes
    from hfedmoe_ray.moe.quiet import quiet_transformers
    from hfedmoe_ray.moe.subset import AUTO_CLASSES

    (architecture,) = AutoConfig.from_pretrained(directory).architectures
    tasks: dict[str, Task] = {"ForCausalLM": "causal", "ForConditionalGeneration": "seq2seq"}
    task: Task = next((task for ending, task in tasks.items() if architecture.endswith(ending)), "classification")
    with quiet_transformers():
        return AUTO_CLASSES[task].from_pretrained(directory).eval()
