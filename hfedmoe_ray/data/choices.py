"""Multiple-choice questions, answered by which of the choices a language model finds likeliest after the prompt.

Prompts and choices are tokenised as lm-evaluation-harness does, together, and cut where the prompt alone would end, so
that the same items get the same log-likelihoods; each by itself where an encoder reads the prompts.

Legend: N items, R = rows: every choice of every item, item by item.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from hfedmoe_ray.config.evaluation import Benchmark
from hfedmoe_ray.data import store
from hfedmoe_ray.data.dataset import FederatedDataset, Split
from hfedmoe_ray.data.items import key_of, padded, read_items, stored_rows
from hfedmoe_ray.data.labels import IntArray
from hfedmoe_ray.data.sources import texts_of
from hfedmoe_ray.data.tables import Table
from hfedmoe_ray.data.tokenize import pad_id
from hfedmoe_ray.errors import DataError
from hfedmoe_ray.types import Array


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The items of a benchmark as text."""

    prompts: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...]
    """Of each item, as they follow its prompt, the delimiter included."""
    lengths: IntArray
    """Characters of every choice [R], by which its log-likelihood is normalised."""
    answers: IntArray
    """The right choice of each item [N]."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The tokenised items of a benchmark."""

    rows: Split
    """Prompt and choice of every row."""
    item: IntArray
    """Number of each row's item [R]."""
    lengths: IntArray
    """Characters of each choice [R]."""
    answers: IntArray
    """The right choice of each item [N]."""

    def __len__(self) -> int:
        return len(self.answers)

    def part(self, index: int, count: int) -> "Choices":
        """Returns slice `index` of `count` of the items, as `Split.part` does of examples."""
        first, end = len(self) * index // count, len(self) * (index + 1) // count
        start, stop = np.searchsorted(self.item, [first, end])
        return Choices(
            rows=self.rows.rows(int(start), int(stop), f"{self.rows.key}/{index}of{count}"),
            item=self.item[start:stop] - first,
            lengths=self.lengths[start:stop],
            answers=self.answers[first:end],
        )


def read_questions(benchmark: Benchmark) -> Questions:
    """Reads a benchmark's file.

    Raises:
        DataError: The file, a column or a text is missing, or an answer names no choice.
    """
    table, key = read_items(benchmark), key_of(benchmark)
    prompts = texts_of(table, benchmark.prompt, f"{key}.prompt")
    columns = [texts_of(table, pattern, f"{key}.choices") for pattern in benchmark.choices]
    return Questions(
        prompts=prompts,
        choices=tuple(tuple(benchmark.delimiter + text for text in row) for row in zip(*columns, strict=True)),
        lengths=np.array([len(text) for row in zip(*columns, strict=True) for text in row], dtype=np.int64),
        answers=_answers(table, benchmark, key),
    )


def tokenize_questions(
    tokenizer: Any, questions: Questions, max_length: int, *, translates: bool = False
) -> dict[str, Array]:
    """Returns the arrays of `Choices` by name; of what is longer than `max_length` the prompt's beginning is left out.

    Raises:
        DataError: A choice alone is longer, or has no token of its own.
    """
    rows: list[tuple[list[int], int]] = []
    for prompt, choices in zip(questions.prompts, questions.choices, strict=True):
        for choice in choices:
            before, after = _encoded_pair(tokenizer, prompt, choice, translates=translates)
            if not after:
                raise DataError(
                    f"evaluate.benchmarks: the choice {choice!r} after {prompt[-40:]!r} has no token of its own, so it "
                    "cannot be told how likely it is. Correct the row."
                )
            if len(after) >= max_length:
                raise DataError(
                    f"evaluate.benchmarks: a choice has {len(after)} tokens, but data.max_length is {max_length}: "
                    f"{choice[:80]!r}... Raise data.max_length."
                )
            before = before[-(max_length if translates else max_length - len(after)) :]
            rows.append((before + after, len(before)))
    return padded(rows, pad_id(tokenizer)) | {
        "item": np.repeat(np.arange(len(questions.prompts)), [len(choices) for choices in questions.choices]),
        "characters": questions.lengths,
        "answers": questions.answers,
    }


def stored_choices(data: FederatedDataset, name: str) -> Choices:
    """Opens a benchmark that was prepared with the data of a run."""
    prefix = store.benchmark(name)
    rows = stored_rows(data, name, data.array(f"{prefix}.item"))
    answers, characters = data.array(f"{prefix}.answers"), data.array(f"{prefix}.characters")
    return Choices(rows=rows, item=rows.labels, lengths=characters, answers=answers)


def _encoded_pair(tokenizer: Any, prompt: str, choice: str, *, translates: bool) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the choice after it; spaces at the prompt's end belong to the choice."""
    spaces = len(prompt) - len(prompt.rstrip())
    if spaces:
        prompt, choice = prompt[:-spaces], prompt[-spaces:] + choice
    if translates:
        before, after = (tokenizer(prompt)["input_ids"], tokenizer(choice, add_special_tokens=False)["input_ids"])
        return list(before) or [pad_id(tokenizer)], list(after)
    whole = list(tokenizer(prompt + choice, add_special_tokens=False)["input_ids"])
    before = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not before:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [pad_id(tokenizer) if start is None else start], whole
    return before, whole[len(before) :]


def _answers(table: Table, benchmark: Benchmark, key: str) -> IntArray:
    """The number of each item's right choice, from 0."""
    answers = []
    for row, value in enumerate(table.column(benchmark.answer, f"{key}.answer"), start=1):
        number = -1
        if (
            isinstance(value, int)
            or (isinstance(value, float) and value.is_integer())
            or (isinstance(value, str) and value.isdecimal())
        ):
            number = int(value)
        if not 0 <= number < len(benchmark.choices):
            raise DataError(
                f"{table.where}, row {row}: the answer {value!r} is no number of one of the {len(benchmark.choices)} "
                f"choices, from 0. Correct the row, or point {key}.answer at the right column."
            )
        answers.append(number)
    return np.array(answers, dtype=np.int64)
